"""Ten thousand real patches as one job in one thread: eager torch, ONNX Runtime and OpenVINO with the same student.

python tests/benchmarks/bench_deploy.py WORK [--patches 10000] [--encoder efficientnet-lite0] [--batch-size 32]

G2L_TEST_DATA holds the images (1,224 of oral mucosa, 224 px, in turn until there are enough). A job decodes each JPEG
and encodes it, as `g2l embed` does, in batches of one size. Runtimes take turns in pieces of a tenth, so that other
programs on the machine cost all alike. Printed are the seconds on the clock and of the processor, and the ratio to
torch of both.
"""

import argparse
import os
import sys
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch

from g2l_core.encoders.exported import export_encoder
from g2l_core.encoders.loading import encode, load_encoder
from g2l_core.encoders.resolve import resolve_encoder, run_encoder
from g2l_core.encoders.student_export import export_student
from g2l_core.patches.render import read_image
from pipeline.tables import table_text
from tests.small_student import make_run

PIECES = 10


def main() -> None:
    """Print a line a runtime."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--patches", type=int, default=10_000)
    parser.add_argument("--encoder", default="efficientnet-lite0")
    parser.add_argument("--batch-size", type=int, default=32)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    run = asked.work / "run"
    if not run.exists():
        make_run(run, resolve_encoder(asked.encoder))
    specs = {"torch": run_encoder(run)}
    for form in ("onnx", "openvino"):
        out = asked.work / f"run-{form}"
        if not out.exists():
            export_student(run, form, out)
        specs[form] = export_encoder(out)
    encoders = {
        name: load_encoder(spec, device="cpu", precision="fp32" if name == "torch" else "auto")
        for name, spec in specs.items()
    }
    parameters = sum(p.numel() for p in encoders["torch"].module.parameters())
    files = sorted((Path(os.environ["G2L_TEST_DATA"]) / "patches/oscc-rahman").rglob("*.jpg"))
    batches = -(-asked.patches // asked.batch_size)
    wall, spent = dict.fromkeys(encoders, 0.0), dict.fromkeys(encoders, 0.0)
    largest = 0.0
    for piece in range(PIECES):
        own = range(piece * batches // PIECES, (piece + 1) * batches // PIECES)
        last = dict[str, np.ndarray]()
        for name, encoder in encoders.items():
            begin, cpu = perf_counter(), process_time()
            for batch in own:
                names = islice(cycle(files), batch * asked.batch_size % len(files), None)
                patches = np.stack([read_image(path, 224) for path in islice(names, asked.batch_size)])
                last[name] = encode(encoder, patches)
            wall[name] += perf_counter() - begin
            spent[name] += process_time() - cpu
        done = (piece + 1) * batches // PIECES * asked.batch_size
        print(f"{done:,} patches: processor {', '.join(f'{n} {s:.0f} s' for n, s in spent.items())}", file=sys.stderr)
        largest = max(largest, *(float(np.abs(last[name] - last["torch"]).max()) for name in encoders))
    count = batches * asked.batch_size
    cells = [
        (
            name, f"{wall[name]:.0f}", f"{spent[name]:.0f}", f"{count / wall[name]:.1f}", f"{count / spent[name]:.1f}",
            f"{wall['torch'] / wall[name]:.2f}", f"{spent['torch'] / spent[name]:.2f}",
        )
        for name in encoders
    ]  # fmt: skip
    header = ("runtime", "clock, s", "processor, s", "patches/s", "by processor", "ratio", "by processor")
    print(table_text(cells, header=header, right=range(1, len(header)), width=120))
    print(f"{count:,} patches, {asked.encoder} with {parameters / 1e6:.1f} M parameters, batches of {asked.batch_size}")
    print(f"largest difference of a feature from torch: {largest:.1e}")


if __name__ == "__main__":
    main()
