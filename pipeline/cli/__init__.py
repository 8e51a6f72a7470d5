"""The command line: each module holds the commands of one stage, `main` puts them together.

`options` makes a command's options from the specs that it takes.
"""

EXIT_DONE, EXIT_SOME_FAILED, EXIT_REFUSED, EXIT_INTERNAL, EXIT_INTERRUPTED = 0, 1, 2, 70, 130

EXIT_CODES = {
    EXIT_DONE: "everything is done",
    EXIT_SOME_FAILED: "finished, but some inputs failed; each is named on stderr",
    EXIT_REFUSED: "wrong usage, or the input or the machine does not allow it",
    EXIT_INTERNAL: "internal error: a fault of G2L",
    EXIT_INTERRUPTED: "interrupted",
}
