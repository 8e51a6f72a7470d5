"""The command line: each module holds the commands of one stage, `main` puts them together."""
