"""What the documents tell people to type: the commands of their shell blocks, and whether g2l would take them."""

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from pipeline.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
NEEDS = "# needs "
"""How a block begins that tests cannot run: it says what it needs."""

_SEPARATORS = frozenset({"&&", "||", ";", "|", "&", ">", ">>", "2>", "(", ")", "then", "do", "done", "fi"})
_LAUNCHERS = (["torchrun"], ["srun"], ["time"], ["nohup"])


@dataclass(frozen=True)
class Block:
    """A fenced block of shell commands."""

    page: str
    text: str

    @property
    def is_run(self) -> bool:
        """Whether it needs nothing but what the tests have."""
        return not self.text.startswith(NEEDS)


def shell_blocks(path: Path) -> list[Block]:
    """The blocks marked as `sh` of a page, in order."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"^[ ]*```sh\n(.*?)^[ ]*```", text, re.DOTALL | re.MULTILINE)
    return [Block(str(path.relative_to(ROOT)), block) for block in found]


def commands(script: str) -> Iterator[list[str]]:
    """The simple commands of a shell script, as words; variables that the script sets stand for their values."""
    joined = re.sub(r"\\\n\s*", " ", script)
    known: dict[str, str] = {}
    for line in joined.splitlines():
        words: list[str] = []
        for word in _words(line):
            if word in _SEPARATORS:
                yield from _one(words, known)
                words = []
            else:
                words.append(word)
        yield from _one(words, known)


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    return list(lexer)


def _one(words: list[str], known: dict[str, str]) -> Iterator[list[str]]:
    """A command without the variables set before it; these are remembered."""
    while words and (found := re.fullmatch(r"(\w+)=(.*)", words[0])):
        known[found[1]] = found[2]
        words = words[1:]
    if words:
        yield [re.sub(r"\$\{?(\w+)\}?", lambda name: known.get(name[1], "1"), word) for word in words]


def g2l_commands(script: str) -> Iterator[list[str]]:
    """The arguments of each g2l command in a script, also of those that a launcher starts."""
    for words in commands(script):
        if words[0] == "g2l":
            yield words[1:]
        elif [words[0]] in _LAUNCHERS or words[0] == "python":
            at = next((i for i, word in enumerate(words) if word in {"g2l", "g2l_core"}), None)
            if at is not None:
                yield words[at + 1 :]


COMMAND_LINE: Any = get_command(app)
UsageError: Any = typer.BadParameter.__base__


def parse(arguments: Iterable[str]) -> None:
    """Parse as the command line does, and do nothing.

    Raises:
        ValueError: The command line would refuse it, with its words.
    """
    command, context, rest = COMMAND_LINE, None, list(arguments)
    try:
        while True:
            context = command.make_context(command.name or "g2l", rest, parent=context)
            if not hasattr(command, "resolve_command"):
                return
            _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    except UsageError as refusal:
        raise ValueError(refusal.format_message()) from refusal
