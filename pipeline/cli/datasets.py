"""`g2l datasets`: public datasets as manifests."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from g2l_core.errors import UnknownNameError, UsageError
from pipeline.cli.options import from_specs

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
) -> None:
    """List public datasets, describe one, or read its folder as published and write its manifest.

    Its labels (NAME-labels.csv), and images that had to be written, are written beside the manifest.
    """
    from g2l_core.datasets.page import describe
    from g2l_core.datasets.table import DATASETS

    if name is None:
        if root or out:
            raise UsageError("--root and --out need the NAME of a dataset; g2l datasets lists them")
        for dataset in DATASETS.values():
            typer.echo(f"{dataset.name:18}{dataset.title}")
        return
    key = name.lower().replace("_", "-")
    if key not in DATASETS:
        raise UnknownNameError("dataset", name, DATASETS, "g2l datasets lists them.")
    if root is None:
        if out:
            raise UsageError("--out needs --root, the folder to read")
        typer.echo("\n".join(describe(DATASETS[key])))
        return
    from g2l_core.datasets.manifest import write_manifest

    typer.echo(_written_text(DATASETS[key], write_manifest(DATASETS[key], root, out or Path(f"{key}.csv"))))


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
