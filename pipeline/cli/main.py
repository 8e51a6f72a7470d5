"""The command line, put together: one module for each stage's commands, and what happens to errors and Ctrl-C.

Commands import their stage when they run, so that help is quick.
"""

import logging
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer

from g2l_core import __version__
from g2l_core.errors import G2LError, machine_fault, machine_fault_text, with_remedy
from pipeline.cli import (
    EXIT_CODES,
    EXIT_INTERNAL,
    EXIT_REFUSED,
    bench,
    datasets,
    demo,
    deploy,
    distill,
    extract,
    heads,
    interchange,
    models,
    plan,
    publish,
    store,
    store_copies,
    store_edit,
    study,
    view,
)  # fmt: skip
from pipeline.cli.interruption import interrupt
from pipeline.cli.printing import show

app = typer.Typer(
    name="g2l",
    help="Cache a giga-scale pathology teacher once, distill a cancer-specific student, benchmark both.",
    epilog="Exit codes: " + "; ".join(f"{code} {meaning.split(';')[0]}" for code, meaning in EXIT_CODES.items()),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for command in (
    extract.cache_teacher, extract.embed, distill.distill, distill.baseline, bench.bench, distill.sweep,
    deploy.export_student, deploy.measure, deploy.doctor, publish.publish, heads.fit_head, heads.predict, plan.plan,
    models.models, datasets.datasets, view.view, demo.demo, study.run, study.init,
):  # fmt: skip
    app.command()(command)
store.app.command()(interchange.export)
store.app.command(name="import")(interchange.import_features)
for command in (
    store_edit.label, store_copies.subset, store_copies.merge, store_edit.rm, store_edit.du,
    store_copies.pack, store_copies.compact, store_copies.publish, store_edit.upload,
):  # fmt: skip
    store.app.command()(command)
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


def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One clear line in place of a traceback."""
    fault = machine_fault(error)
    if issubclass(kind, G2LError):
        show(f"error: {with_remedy(str(error))}", err=True)
    elif fault:
        show(f"error: {machine_fault_text(fault, 'a file')}", err=True)
    else:
        what = f"{kind.__name__}: {' '.join(str(error).split())}"
        show(
            f"internal error: {what} ({_place(trace)}). This is a fault of G2L: run the same command as "
            "g2l --debug COMMAND for the traceback, and report it with that to those who gave you G2L",
            err=True,
        )


def _place(trace: TracebackType | None) -> str:
    """The last line of G2L that an error came through."""
    own = [
        frame for frame in traceback.extract_tb(trace) if "g2l_core" in frame.filename or "pipeline" in frame.filename
    ]
    if not own:
        return "outside of G2L"
    return f"{'/'.join(Path(own[-1].filename).parts[-3:])}:{own[-1].lineno} in {own[-1].name}"


def main() -> None:
    """The console script: runs the command line, turns errors into exit codes."""
    sys.excepthook = explain
    if os.environ.get("NO_COLOR"):  # Rich would still write bold and dim, which are escapes too
        os.environ["TERM"] = "dumb"
    signal.signal(signal.SIGINT, interrupt)
    try:
        app(prog_name="g2l")
    except SystemExit as end:
        leave_stuck_threads(end.code)
        raise
    except Exception as error:  # noqa: BLE001  the boundary: what happened is said, and the exit code tells which
        sys.excepthook(type(error), error, error.__traceback__)
        is_ours = not isinstance(error, G2LError) and machine_fault(error) is None
        raise SystemExit(EXIT_INTERNAL if is_ours else EXIT_REFUSED) from None


def leave_stuck_threads(code: object) -> None:
    """End the process here if a thread is stuck in a slide that takes too long.

    Libraries abort when they are torn down under it, and the exit code would be lost.
    """
    if any(thread.name == "g2l-slide" for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    main()
