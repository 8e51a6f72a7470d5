"""Write the transcript of docs/quickstart.md anew, from a run of the demo that has ended.

    g2l demo | tee g2l-demo.txt && python docs/make_quickstart.py g2l-demo

The demo itself is not run again: what it has printed lies in FOLDER.txt. The commands after it are, in a terminal of 80
columns. `.ci/run` runs the demo, and the test suite compares the page with what this gives (tests/pipeline/
test_end_to_end.py), word for word but for figures.
"""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "quickstart.md"
BEGIN, END = "<!-- transcript, by docs/make_quickstart.py -->\n", "<!-- end of transcript -->\n"
COLUMNS = 80
NAME = "g2l-demo"
AFTERWARDS = (
    f"g2l store du {NAME}/store.zarr",
    f"g2l store verify {NAME}/store.zarr",
    f"g2l view {NAME}/store.zarr --out page.html",
)


def transcript(folder: Path, printed: str, work: Path) -> str:
    """What a new user sees, as a block of Markdown.

    Args:
        folder: The demo's folder.
        printed: What `g2l demo` has printed on stdout.
        work: An empty folder, where the commands after it are called.
    """
    (work / NAME).symlink_to(folder.resolve())
    parts = [f"$ g2l demo\n{printed.replace(str(folder), NAME).strip()}\n"]
    parts += [f"$ {command}\n{_told(command, work)}\n" for command in AFTERWARDS]
    return f"{BEGIN}\n```text\n" + "\n".join(parts) + f"```\n\n{END}"


def _told(command: str, work: Path) -> str:
    """What a command prints on a terminal, without its progress."""
    leader, terminal = pty.openpty()
    program = [sys.executable, "-m", "pipeline.cli", *command.split()[1:]]
    known = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "dumb"}
    known["PYTHONPATH"] = os.pathsep.join([str(PAGE.parents[1]), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(program, cwd=work, env=known, stdout=terminal, stderr=subprocess.PIPE, text=True) as process:
        os.close(terminal)
        told = _until_closed(leader)
        faults = process.stderr.read() if process.stderr else ""
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}:\n{faults}")
    return told.replace("\r\n", "\n").strip()


def _until_closed(leader: int) -> str:
    read = bytearray()
    with os.fdopen(leader, "rb", buffering=0) as screen:
        try:
            while part := screen.read(4096):
                read += part
        except OSError:  # how Linux says that the other side is closed
            pass
    return read.decode()


def with_transcript(page: str, new: str) -> str:
    """The page with another transcript."""
    return page[: page.index(BEGIN)] + new + page[page.index(END) + len(END) :]


def masked(text: str) -> list[str]:
    """The words of a transcript; figures and digests, which depend on the machine, are all the same."""
    return re.sub(r"[+-]?\d[\d,]*(\.\d+)?", "#", re.sub(r"run-[0-9a-f]{8}\b", "run-#", text)).split()


def main(folder: Path) -> None:
    """Write the page."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as work:
        new = transcript(folder, folder.with_suffix(".txt").read_text(encoding="utf-8"), Path(work))
    PAGE.write_text(with_transcript(PAGE.read_text(encoding="utf-8"), new), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
