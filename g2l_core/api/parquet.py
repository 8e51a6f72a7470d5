"""The table of patches, with features or without, as a Parquet file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from g2l_core.api.frames import patch_frame
from g2l_core.api.optional import require
from g2l_core.api.selection import Part, whole_parts
from g2l_core.errors import writing
from g2l_core.files import write_with


def write_parquet(parts: Sequence[Part], path: Path, encoder: str | None, *, view: int) -> None:
    """Write the file that `Cohort.to_parquet` describes, a row group a slide."""
    arrow, parquet = (require(name, "parquet", "store.to_parquet") for name in ("pyarrow", "pyarrow.parquet"))
    if encoder is not None:
        whole_parts(parts, encoder, view)
    frame = patch_frame(parts)
    table = arrow.Table.from_pandas(frame, preserve_index=False)
    patch_id = table.schema.get_field_index("patch_id")
    table = table.set_column(patch_id, "patch_id", table["patch_id"].cast(arrow.string()))

    def write(temporary: Path) -> None:
        schema = table.schema
        if encoder is not None:
            dim = parts[0].slide.feature_facts(encoder).dim
            schema = schema.append(arrow.field("features", arrow.list_(arrow.float32(), dim)))
        with parquet.ParquetWriter(temporary, schema) as writer:
            start = 0
            for part in parts:
                rows = table.slice(start, len(part))
                start += len(part)
                if encoder is not None:
                    values = part.features(encoder, view).astype(np.float32)
                    lists = arrow.FixedSizeListArray.from_arrays(arrow.array(values.ravel()), values.shape[1])
                    rows = rows.append_column(schema.field("features"), lists)
                writer.write_table(rows)

    with writing(path):
        write_with(path, write)
