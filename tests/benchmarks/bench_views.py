"""Milliseconds an image for drawn views on one core: this library and torchvision, in one run.

python tests/benchmarks/bench_views.py
"""

import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np
import torch

from g2l_core.patches.views import ViewSpec, apply_view, sample_views
from tests.patches.test_views import he_patch, torchvision_view

VIEWS = 400
ROUNDS = 5


def main() -> None:
    """Print the best of a few rounds of each, and their ratio."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    spec = ViewSpec()
    params = sample_views(spec, "slide", np.zeros((1, 2), np.int32), range(1, VIEWS + 1))[0]
    patches = [he_patch(seed) for seed in range(8)]
    tensors = [torch.from_numpy(patch).permute(2, 0, 1).contiguous() for patch in patches]
    ours, theirs = [], []
    for _ in range(ROUNDS):
        start = perf_counter()
        for row, drawn in enumerate(params):
            apply_view(patches[row % len(patches)], drawn, spec)
        middle = perf_counter()
        for row, drawn in enumerate(params):
            torchvision_view(tensors[row % len(tensors)], drawn, spec).contiguous()
        ours.append((middle - start) / VIEWS * 1e3)
        theirs.append((perf_counter() - middle) / VIEWS * 1e3)
    print(f"views: {min(ours):.3f} ms an image; torchvision {min(theirs):.3f} ms; {min(theirs) / min(ours):.1f} x")


if __name__ == "__main__":
    main()
