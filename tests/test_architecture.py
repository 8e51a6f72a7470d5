"""Imports point down, light modules stay light, and nothing is left out of the map."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

RANKS = [
    {"errors"},
    {"types", "randomness"},
    {"ome_zarr", "scale", "tiles", "staging"},
    {"readers"},
    {"slides", "grid", "views", "engine", "epochs", "losses", "metrics", "store", "timm_bridge", "geojson"},
    {"manifest", "report_data", "encoder_spec", "task_spec", "architectures", "tissue", "layouts", "artefacts", "qc"},
    {"encoder_table", "encoder_files", "hub"},
    {"encoders", "encoder_docs"},
    {"encoder_loading", "patches"},
    {"laying", "students", "datasets", "repair", "pixel_cache", "open_slides", "distiller", "objectives", "board"}
    | {"public_data"},
    {"loader", "batching", "task_data", "optimisation", "ranks", "target_statistics", "student_export"},
    {"caching", "checkpoints", "watching", "task_families", "task_notes", "task_pictures"},
    {"training", "tasks"},
    {"report_meanings"},
    {"report_tables"},
    {"svg"},
    {"report_plots", "html_page"},
    {"report_pictures", "training_page"},
    {"report_html", "report_json"},
    {"report"},
    {"synthetic_tissue"},
    {"synthetic"},
]
LIGHT = [
    "g2l_core",
    "pipeline.cli.main",
    "g2l_core.store.features",
    "g2l_core.encoders.resolve",
    "g2l_core.metrics.similarity",
]


def rank_of(module: str) -> int:
    return next(rank for rank, names in enumerate(RANKS) if module in names)


def modules() -> list[Path]:
    return sorted((ROOT / "g2l_core").rglob("*.py"))


def room(path: Path) -> str:
    """The module of the library that a file belongs to: its name, or its folder's."""
    return path.relative_to(ROOT / "g2l_core").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_every_module_has_a_rank():
    assert {room(p) for p in modules()} - {"__init__"} == set().union(*RANKS)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    mine = room(path)
    for module in imports(path):
        assert not module.startswith("pipeline"), f"{path} imports {module}"
        if module.startswith("g2l_core.") and mine != "__init__":
            theirs = module.split(".")[1]
            assert theirs == mine or rank_of(theirs) < rank_of(mine), f"{mine} imports {theirs}"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", [["--help"], ["store", "ls", "STORE"], ["store", "info", "STORE"]])
def test_looking_imports_no_torch(command, cached_store):
    arguments = [str(cached_store) if part == "STORE" else part for part in command]
    code = f"import sys; from pipeline.cli.main import app; app({arguments!r}, standalone_mode=False)"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
