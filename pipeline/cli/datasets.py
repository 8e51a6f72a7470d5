"""`g2l datasets`: public datasets as manifests."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from g2l_core.errors import UnknownNameError, UsageError
from pipeline.cli.options import Json, from_specs
from pipeline.cli.printing import tell

if TYPE_CHECKING:
    from g2l_core.datasets.manifest import Written
    from g2l_core.datasets.spec import Dataset


@from_specs()
def datasets(
    name: Annotated[str | None, typer.Argument(help="One dataset; none lists all.", show_default=False)] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="Its folder as published. Without it, the dataset is described.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The manifest to write; NAME.csv here if not given.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List public datasets, describe one, or read its folder as published and write its manifest.

    Its labels (NAME-labels.csv), and images that had to be written, are written beside the manifest.
    """
    from g2l_core.datasets.page import describe
    from g2l_core.datasets.table import DATASETS

    if name is None:
        if root or out:
            raise UsageError("--root and --out need the NAME of a dataset; g2l datasets lists them")
        lines = [f"{dataset.name:18}{dataset.title}" for dataset in DATASETS.values()]
        tell("\n".join(lines), {key: _facts(dataset) for key, dataset in DATASETS.items()}, as_json=as_json)
        return
    key = name.lower().replace("_", "-")
    if key not in DATASETS:
        raise UnknownNameError("dataset", name, DATASETS, "g2l datasets lists them.")
    if root is None:
        if out:
            raise UsageError("--out needs --root, the folder to read")
        tell("\n".join(describe(DATASETS[key])), _facts(DATASETS[key]), as_json=as_json)
        return
    from g2l_core.datasets.manifest import write_manifest

    written = write_manifest(DATASETS[key], root, out or Path(f"{key}.csv"))
    tell(_written_text(DATASETS[key], written), asdict(written), as_json=as_json)


def _facts(dataset: "Dataset") -> dict[str, object]:
    """A dataset as plain values."""
    return {field.name: value for field in fields(dataset) if not callable(value := getattr(dataset, field.name))}


def _written_text(dataset: "Dataset", written: "Written") -> str:
    kind = "images" if dataset.patch_px else "slides"
    of = f" of {dataset.published:,} published" if dataset.published else ""
    patients = f", {written.patients:,} patients" if written.patients else ", no patient ids"
    groups = f" in {written.slides:,} groups" if dataset.patch_px else ""
    lines = [f"{written.manifest}: {written.rows:,} {kind}{of}{groups}{patients}"]
    if written.labels:
        cells = f": {written.cells:,} labeled patches" if written.cells else ""
        lines.append(f"{written.labels}{cells}")
    if written.images:
        lines.append(f"{written.images}: the images, written as PNG")
    lines += [f"left out: {what}" for what in written.left_out]
    size = f" --patch-px {dataset.patch_px} --crop-px {dataset.patch_px}" if dataset.patch_px else ""
    store = f"{dataset.name}.zarr"
    lines.append(f"next: g2l cache-teacher {written.manifest} --store {store} --teacher ENCODER --views 0{size}")
    lines.append(f"      g2l bench {dataset.suite} --store {store} --encoders ENCODER,... --out report")
    return "\n".join(lines)
