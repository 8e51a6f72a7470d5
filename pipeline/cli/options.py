"""Options that several commands share: one type, one help text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from g2l_core.patches.grid import GridSpec
    from g2l_core.tissue.methods import TissueMethod

Inputs = Annotated[
    list[Path],
    typer.Argument(help="Slides, folders of slides or of patch images, or a manifest CSV.", show_default=False),
]
Store = Annotated[Path, typer.Option(help="The feature store (a Zarr folder); made or completed.", show_default=False)]
Weights = Annotated[
    str | None, typer.Option(help="In place of the encoder's own: a file, hub:REPOSITORY@REVISION, or random:SEED.")
]
Mpp = Annotated[float, typer.Option(help="Micrometers per pixel of a patch; 20x is 0.5, 40x is 0.25.")]
PatchPx = Annotated[int, typer.Option(help="Side of a patch in pixels at that scale.")]
CropPx = Annotated[int, typer.Option(help="Side of a view, cut from the patch.")]
MaxPatches = Annotated[int | None, typer.Option(help="At most this many patches of a slide, at random.")]
Tissue = Annotated[
    str, typer.Option(help="otsu, color, none, a network (FILE.onnx, FILE.pt), or a folder of GeoJSON or PNG masks.")
]
Artifacts = Annotated[
    str,
    typer.Option(
        "--artifacts", "--artefacts", help="Leave out patches that show black, pen or blurred (by comma), or none."
    ),
]
Pictures = Annotated[
    bool, typer.Option("--pictures/--no-pictures", help="Draw every slide's kept patches beside the store.")
]
MinTissue = Annotated[float, typer.Option(help="Least share of a patch that must be tissue.")]
Seed = Annotated[int, typer.Option(help="Names every random draw.")]
MppOverride = Annotated[
    float | None, typer.Option(help="um/px of slides whose header and manifest give none.", show_default=False)
]
AcceptMpp = Annotated[bool, typer.Option("--accept-mpp", help="Go on with um/px that the audit calls doubtful.")]
ForceMpp = Annotated[
    bool, typer.Option("--force-mpp", help="Encode patches at a scale that the encoder's card does not name.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Precision = Annotated[str, typer.Option(help="auto (fp32 on CPU, the model card's on GPU), fp32, bf16 or fp16.")]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the network: faster on a GPU, half a minute to start.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Views encoded together.")]
Workers = Annotated[int, typer.Option(min=1, help="Threads that read and augment.")]
LocalWorkers = Annotated[int, typer.Option(min=0, help="Processes here that share the encoding; 0 is this one.")]
Scheduler = Annotated[
    str | None, typer.Option(help="A dask scheduler whose workers share the encoding.", show_default=False)
]
StageDir = Annotated[
    Path | None, typer.Option(help="Copy the next slides to this fast local folder ahead.", show_default=False)
]
StageGb = Annotated[float, typer.Option(min=0.001, help="Most GB of such copies at a time.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Take up only failed slides and unreadable patches.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only plan: patches, bytes, hours. See g2l plan.")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")]


def grid_of(
    *, mpp: float, patch_px: int, tissue: str, artifacts: str, min_tissue: float, max_patches: int | None, seed: int
) -> "tuple[GridSpec, TissueMethod]":
    """The grid that these options mean, and the tissue method that it names.

    Raises:
        UsageError: An option cannot be used.
    """
    from g2l_core.patches.grid import GridSpec, parse_artifacts
    from g2l_core.tissue.methods import resolve_tissue

    method = resolve_tissue(tissue)
    grid = GridSpec(
        mpp=mpp,
        patch_px=patch_px,
        tissue=method.identity,
        min_tissue=min_tissue,
        max_patches=max_patches,
        artifacts=parse_artifacts(artifacts),
        seed=seed,
    )
    return grid, method
