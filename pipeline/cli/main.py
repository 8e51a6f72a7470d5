"""The command line, put together: one module for each stage's commands, and what happens to errors and Ctrl-C.

Commands import their stage when they run, so that help is quick.
"""

import logging
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Annotated

import typer

from g2l_core import __version__
from g2l_core.errors import G2LError
from pipeline.cli import EXIT_INTERRUPTED, EXIT_REFUSED, bench, datasets, demo, distill, extract, models, plan, store

app = typer.Typer(
    name="g2l",
    help="Cache a giga-scale pathology teacher once, distill a cancer-specific student, benchmark both.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for command in (
    extract.cache_teacher, extract.embed, distill.distill, bench.bench, distill.sweep, distill.export_student,
    plan.plan, models.models, datasets.datasets, demo.demo,
):  # fmt: skip
    app.command()(command)
app.add_typer(store.app, name="store")


def show_version(asked: bool) -> None:
    """Print the version and leave; before the parser misses a command."""
    if asked:
        typer.echo(f"g2l {__version__}")
        raise typer.Exit


@app.callback()
def settings(
    debug: Annotated[bool, typer.Option("--debug", metavar="", help="Show tracebacks.")] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", metavar="", help="Show the version and exit.", callback=show_version, is_eager=True),
    ] = False,
) -> None:
    """Options before the command."""
    sys.excepthook = sys.__excepthook__ if debug else explain
    if debug:
        logging.basicConfig()
        logging.getLogger("g2l_core").setLevel(logging.DEBUG)


def explain(kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """One clear line in place of a traceback."""
    if issubclass(kind, G2LError):
        typer.echo(f"error: {error}", err=True)
    else:
        typer.echo(f"internal error: {kind.__name__}: {error}\nrun g2l --debug ... for the traceback", err=True)


def main() -> None:
    """The console script: runs the command line, turns errors into exit codes."""
    sys.excepthook = explain
    signal.signal(signal.SIGINT, interrupt)
    try:
        app()
    except G2LError as error:
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(EXIT_REFUSED) from None


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Leave on Ctrl-C at once, with the exit code that says so.

    As after `kill -9`, what is recorded is kept; an orderly shutdown would wait for batches under way in other
    threads, or tear Zarr's event loop from under them.
    """
    if marks := sys.modules.get("g2l_core.slides.under_way"):
        marks.forget_own()
    typer.echo("\ninterrupted; what is recorded is kept, and the same call goes on from there", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
