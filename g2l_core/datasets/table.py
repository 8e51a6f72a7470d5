"""The table of public datasets, read from datasets.toml."""

import tomllib
from collections.abc import Mapping
from importlib.resources import files

from pydantic import TypeAdapter

from g2l_core.datasets.spec import Dataset


def _read() -> dict[str, Dataset]:
    content = tomllib.loads(files(__package__).joinpath("datasets.toml").read_text(encoding="utf-8"))
    common = content["common_notes"]
    tables = {
        name: {**table, "name": name, "notes": [common.get(note, note) for note in table.get("notes", ())]}
        for name, table in content["datasets"].items()
    }
    return TypeAdapter(dict[str, Dataset]).validate_python(tables)


DATASETS: Mapping[str, Dataset] = _read()
"""The datasets by name, in the order of the file."""
