"""The command line: each module holds the commands of one stage, `main` puts them together.

`options` makes a command's options from the specs that it takes.
"""

EXIT_DONE, EXIT_SOME_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 0, 1, 2, 130
