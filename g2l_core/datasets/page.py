"""Make docs/datasets.md from the table: `python -m g2l_core.datasets.page > docs/datasets.md`."""

from g2l_core.datasets.spec import Dataset
from g2l_core.datasets.table import DATASETS

HEAD = """# Public datasets

`g2l datasets` lists them, `g2l datasets NAME` shows where to get one and how its folder must look, and `g2l datasets
NAME --root DIR` reads the folder exactly as its authors publish it and writes the manifest for stage one:

```sh
# needs the images of IDC, and h-optimus-0
g2l datasets idc --root IDC_regular_ps50_idx5          # idc.csv, and idc-labels.csv
g2l cache-teacher idc.csv --store idc.zarr --teacher h-optimus-0 --views 0 --patch-px 50 --crop-px 50
g2l embed idc.csv --store idc.zarr --encoder hibou-l --encoder run/
g2l bench breast --store idc.zarr --encoders h-optimus-0,hibou-l,run/ --baseline hibou-l --out report/
```

- `NAME.csv` has one row a slide or image. Where images or patches of one slide differ in label or split,
  `NAME-labels.csv` says so by `slide_id` and `patch_id`, or by `slide_id`, `x` and `y`. `g2l bench` reads that file
  from the folder it is called in when the task file is a shipped one (`breast`, `prostate`, `lymph-node`,
  `colorectal`, `lung`); a task file of your own names it relative to itself.
- Sets with images of one size are used in place. Arrays (PCam) and images of other shapes are written once as
  PNG into `NAME-images/` beside the manifest; the notes say how.
- TIGER and AGGC22 have masks. Their patches are labeled on the grid of stage one's defaults (`--mpp 0.5 --patch-px
  256`).
- A suite's task file names all its datasets; give every store with `--store`. Tasks whose dataset no store has are
  reported as failed, the others are evaluated.
- A table that names missing images is refused. Missing slides are left out, and their number is printed.
- Nothing is downloaded, and you must keep to the licenses. None of these folders was available when this was written:
  each layout is taken from the source that is named, and the notes say what no source settles.

"""


def page() -> str:
    """The whole page in Markdown."""
    rows = [_row(dataset) for dataset in DATASETS.values()]
    head = ["dataset", "unit", "number", "classes", "license", "task file"]
    table = [_line(head), _line(["---"] * len(head)), *rows]
    return HEAD + "\n".join([*table, "", *(_section(dataset) for dataset in DATASETS.values())])


def _row(dataset: Dataset) -> str:
    classes = "; ".join(f"{label}: {len(names) or 'numbers'}" for label, names in dataset.labels.items())
    count = f"{dataset.published:,}" if dataset.published else "by download"
    link = f"[{dataset.name}](#{dataset.name})"
    return _line([link, dataset.unit, count, classes, dataset.license, dataset.suite])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _section(dataset: Dataset) -> str:
    return "\n".join([f"## {dataset.name}", "", "```", *describe(dataset), "```", ""])


def describe(dataset: Dataset) -> list[str]:
    """The lines that `g2l datasets NAME` prints."""
    size = f"{dataset.published:,} x " if dataset.published else ""
    mpp = f", {dataset.mpp:g} um/px" if dataset.mpp else ""
    lines = [
        dataset.title,
        f"get it     {dataset.url}",
        f"license    {dataset.license}",
        f"size       {size}{dataset.unit}{mpp}",
        *(f"label      {label}: {', '.join(names) or 'a number'}" for label, names in dataset.labels.items()),
        f"split      {dataset.split}",
        f"patients   {dataset.patients}",
        "folder",
        *(f"           {line}" for line in dataset.layout.splitlines()),
        f"           layout as of: {dataset.source}",
    ]
    return [*lines, *(f"note       {note}" for note in dataset.notes), f"tasks      g2l bench {dataset.suite}"]


if __name__ == "__main__":
    print(page(), end="")  # noqa: T201
