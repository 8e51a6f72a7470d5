"""The one rule of imports, and what must stay light to import."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = (
    {"errors", "types", "options", "results", "rng", "concurrency", "files", "version"},
    {"slides", "store", "metrics", "report", "synthetic"},
    {"tissue", "patches", "encoders", "heads"},
    {"extraction", "distillation", "benchmark", "datasets"},
    {"api"},
)
"""A room of g2l_core imports rooms of lower floors only; rooms of one floor do not know each other."""

LIGHT = [
    "g2l_core", "pipeline.cli.main", "g2l_core.store.features", "g2l_core.encoders.resolve",
    "g2l_core.metrics.similarity", "g2l_core.distillation.spec", "g2l_core.api.cohort",
]  # fmt: skip


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at the top or inside a function; `from package import module` gives both."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def floor_of(room: str) -> int:
    return next(floor for floor, rooms in enumerate(FLOORS) if room in rooms)


def test_every_room_has_a_floor():
    rooms = {path.relative_to(ROOT / "g2l_core").parts[0].removesuffix(".py") for path in files("g2l_core")}
    assert rooms - {"__init__", "__main__"} == set().union(*FLOORS)


def test_rooms_import_lower_floors_only():
    wrong = []
    for path in files("g2l_core"):
        room = path.relative_to(ROOT / "g2l_core").parts[0].removesuffix(".py")
        for module in imports(path) if room != "__init__" else ():
            package, _, rest = module.partition(".")
            other = rest.partition(".")[0]
            if package == "pipeline" or (
                package == "g2l_core" and other not in {"", room, "__version__"} and floor_of(other) >= floor_of(room)
            ):
                wrong.append(f"{name_of(path)} imports {module}")
    assert not wrong


@pytest.mark.parametrize("package", ["g2l_core", "pipeline"])
def test_no_circle_of_imports(package):
    modules = {name_of(path): path for path in files(package)}
    graph = {name: {m for m in imports(path) if m in modules and m != name} for name, path in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["cache-teacher", "--help"],
        ["distill", "--help"],
        ["store", "ls", "STORE"],
        ["store", "info", "STORE"],
    ],
)
def test_looking_imports_no_torch(command, cached_store):
    arguments = [str(cached_store) if part == "STORE" else part for part in command]
    code = f"import sys; from pipeline.cli.main import app; app({arguments!r}, standalone_mode=False)"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_the_list_of_commands_is_quick():
    """Nothing that takes long to import is there before a command is chosen."""
    code = "import sys; from pipeline.cli.main import app; app(['--help'], standalone_mode=False)"
    code += "; sys.exit(bool({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
