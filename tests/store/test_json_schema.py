"""The published JSON schema is that of the code, and what stores hold fits it."""

import json
from pathlib import Path

import jsonschema
import pytest

from g2l_core.store.json_schema import FILE, facts_schema

GOLDEN = Path(__file__).resolve().parents[1] / "golden/store-format2"


def test_the_file_is_current():
    assert json.loads(FILE.read_text()) == json.loads(json.dumps(facts_schema())), (
        "python -m g2l_core.store.json_schema"
    )


def groups(store):
    return [store / "zarr.json", *(store / "slides").glob("*/zarr.json"), store / "slides/zarr.json"]


def test_stores_fit_the_schema(cached_store):
    for path in [*groups(cached_store), *groups(GOLDEN)]:
        jsonschema.validate(json.loads(path.read_text()), facts_schema())


@pytest.mark.parametrize("changes", [{"n_patches": "6"}, {"features": []}, {"tables": {"coords": {"0": "x"}}}])
def test_what_is_wrong_does_not_fit(changes):
    document = json.loads((GOLDEN / "slides/p01-1/zarr.json").read_text())
    document["attributes"]["g2l"] |= changes
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, facts_schema())
