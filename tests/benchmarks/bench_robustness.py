"""The terms for stain and center on real patches: robustness, predictability of the nuisance and the probe together.

python tests/benchmarks/bench_robustness.py DATA OUT [SEEDS]

DATA holds patches/oscc-rahman and manifest.csv, a row for each image. The nuisance is the magnification (100x or 400x),
for want of patches of several centers. Images are laid into sets of ten, so that neighbors of another set are
neighbors of another image. Prints the commands that it runs, and a table of means over seeds.
"""

import csv
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

OF_EACH = {"train": 80, "test": 40}
"""At most so many images of each class and magnification."""
SET = 10
TEACHER, STUDENT = "efficientnet-lite0@96", "timm:mobilenetv3_small_050@64"
ARMS = {
    "kd": "",
    "stain": "--stain-weight 1",
    "center": "--center-weight 1 --center-label magnification",
    "both": "--stain-weight 1 --center-weight 1 --center-label magnification",
}
FIGURES = (
    "robustness_pathorob_k10", "center_balanced_accuracy", "probe_balanced_accuracy", "probe_auc", "cka_debiased",
)  # fmt: skip
TASK = """
[tasks.oscc]
labels = "labels.csv"
label = "label"
center = "magnification"
split = "split"
metrics = ["cka", "probe", "robustness", "center"]
probe_c = 1.0
robustness_k = [10]
"""


def main(data: Path, out: Path, seeds: int) -> None:
    out.mkdir(parents=True)
    lay_out(data, out)
    g2l(
        out, f"cache-teacher images.csv --store s.zarr --teacher {TEACHER} --patch-px 224 --views 2 --stain-jitter 0.05"
    )
    for seed in range(seeds):
        for arm, terms in ARMS.items():
            g2l(
                out,
                f"distill --store s.zarr --teacher {TEACHER} --student {STUDENT} --weights random:{seed} --seed {seed} "
                f"--hold-out split=test --steps 80 --lr 1e-3 --validate-every 80 --checkpoint-every 80 --early-stop 0 "
                f"--out {arm}-{seed} {terms}",
            )
        g2l(out, f"baseline kd-{seed} --kind start --out start-{seed}")
    runs = [f"{arm}-{seed}" for arm in (*ARMS, "start") for seed in range(seeds)]
    g2l(out, "embed images.csv --store s.zarr " + " ".join(f"--encoder {run}" for run in runs))
    named = ",".join(f'"{arm}-*"' for arm in (*ARMS, "start"))
    g2l(out, f"bench tasks.toml --store s.zarr --out report --encoders {TEACHER},{named} --baseline kd-*")
    show(out / "report" / "results.csv")


def lay_out(data: Path, out: Path) -> None:
    """Links to the chosen images in folders of ten, a manifest and labels."""
    found = defaultdict(list)
    with (data / "manifest.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if "oscc-rahman" in row["path"]:
                part = "test" if "/test/" in row["path"] else "train"
                found[part, row["label"], row["magnification"]].append(data / row["path"])
    rows, rng = [], np.random.default_rng(0)
    for part, most in OF_EACH.items():
        chosen = [
            (path, label, power)
            for (of_part, label, power), paths in sorted(found.items())
            if of_part == part
            for path in sorted(rng.permutation([str(p) for p in sorted(paths)])[:most].tolist())
        ]
        for place, i in enumerate(rng.permutation(len(chosen)).tolist()):
            path, label, power = chosen[i]
            folder = out / f"{part}-{place // SET:02d}"
            folder.mkdir(exist_ok=True)
            (folder / Path(path).name).symlink_to(path)
            rows.append(
                {"path": f"{folder.name}/{Path(path).name}", "split": part, "label": label, "magnification": power}
            )
    for name in ("images.csv", "labels.csv"):
        with (out / name).open("w", newline="") as file:
            keys = {"slide_id": "", "patch_id": ""} if name == "labels.csv" else {"path": ""}
            writer = csv.DictWriter(file, [*keys, *list(rows[0])[1:]])
            writer.writeheader()
            for row in rows:
                folder, image = row["path"].split("/")
                place = {"slide_id": folder, "patch_id": image} if name == "labels.csv" else {"path": row["path"]}
                writer.writerow({**place, **{key: row[key] for key in list(row)[1:]}})
    (out / "tasks.toml").write_text(TASK)


def g2l(out: Path, command: str) -> None:
    print("g2l", command, flush=True)
    subprocess.run(
        [sys.executable, "-m", "g2l_core", *shlex.split(command)], cwd=out, check=True, stderr=subprocess.DEVNULL
    )


def show(results: Path) -> None:
    with results.open(newline="") as file:
        rows = {(r["encoder"], r["metric"]): r for r in csv.DictReader(file)}
    encoders = dict.fromkeys(encoder for encoder, _ in rows)
    print("| encoder |", " | ".join(FIGURES), "|")
    for encoder in encoders:
        cells = (rows.get((encoder, figure)) for figure in FIGURES)
        texts = [f"{float(c['value']):.3f} [{c['low'][:5]}, {c['high'][:5]}]" if c else "-" for c in cells]
        print(f"| {encoder} |", " | ".join(texts), "|")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), int(sys.argv[3]) if len(sys.argv) > 3 else 3)
