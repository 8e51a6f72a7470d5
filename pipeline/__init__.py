"""The three stages and the command line: wiring, no arithmetic."""
