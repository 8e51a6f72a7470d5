"""The JSON schema of a store's facts, for programs that read or check them without G2L.

`python -m g2l_core.store.json_schema` writes docs/store-format.schema.json.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from g2l_core.files import write_text
from g2l_core.store import schema
from g2l_core.store.documents import CHECKSUM
from g2l_core.store.facts import SlideFacts, StoreFacts

FILE = Path(__file__).parents[2] / "docs" / "store-format.schema.json"


def facts_schema() -> dict[str, Any]:
    """The schema: a document is the `zarr.json` of a store or of a slide, told apart by the keys of its facts."""
    kinds = {"store": StoreFacts, "slide": SlideFacts}
    definitions: dict[str, Any] = {}
    for name, kind in kinds.items():
        found = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
        definitions |= found.pop("$defs", {})
        found["properties"][CHECKSUM] = {"type": "integer", "title": "crc32c of the other keys as canonical JSON"}
        found["required"] = [*found.get("required", []), CHECKSUM]
        definitions[name] = found
    for definition in definitions.values():
        definition["properties"].pop("extra", None)  # where G2L keeps keys that it does not know
    run = definitions["ExtractionRunFacts"]["properties"]
    run["utilisation"] = run.pop("utilization")  # the key keeps its old spelling
    facts = {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in kinds]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"zarr.json of a G2L store, format {schema.FORMAT}, or of one of its slides",
        "type": "object",
        "properties": {
            "zarr_format": {"const": 3},
            "node_type": {"const": "group"},
            "attributes": {"type": "object", "properties": {schema.ATTRIBUTE: facts}},
        },
        "required": ["zarr_format", "node_type"],
        "$defs": definitions,
    }


if __name__ == "__main__":
    write_text(FILE, json.dumps(facts_schema(), indent=1) + "\n")
