"""What faster arithmetic changes: the cosine of features to float32 on patches, the least and the mean, and the speed.

python tests/benchmarks/bench_precision.py FOLDER_OF_PATCHES [--device cpu]

Networks: ImageNet EfficientNet-Lite0 (real weights), and vision transformers with seeded random weights.
"""

import argparse
from pathlib import Path
from time import perf_counter

import cv2
import numpy as np

from g2l_core.encoders.loading import encode_all, load_encoder
from g2l_core.encoders.resolve import resolve_encoder
from g2l_core.encoders.timm_compat import import_timm

NETWORKS = {
    "efficientnet-lite0": None,
    "timm:vit_small_patch16_224": "random:0",
    "timm:vit_small_patch14_reg4_dinov2@224": "random:0",
}
BATCH_SIZE = 16


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of every row of `a` with the same row of `b`."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def main() -> None:
    """Print one line a network and precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    files = sorted(p for p in arguments.folder.rglob("*") if p.suffix.lower() in {".tif", ".tiff", ".png", ".jpg"})
    patches = np.stack([cv2.resize(cv2.imread(str(p)), (224, 224))[..., ::-1] for p in files[:128]])
    for name, weights in NETWORKS.items():
        exact = None
        for how in ("fp32", "fp32, attention not fused", "bf16", "fp16", "fp32+compile", "bf16+compile"):
            import_timm().layers.set_fused_attn(enable="not" not in how)
            spec = resolve_encoder(name, weights=weights)
            encoder = load_encoder(spec, device=arguments.device, precision=how.partition(",")[0])
            encode_all(encoder, patches[:BATCH_SIZE], BATCH_SIZE)
            begin = perf_counter()
            features = encode_all(encoder, patches, BATCH_SIZE)
            seconds = perf_counter() - begin
            exact = features if exact is None else exact
            found = cosines(features, exact)
            print(
                f"{name:40}{how:27}1 - cosine: most {1 - found.min():.1e}, mean {1 - found.mean():.1e}"
                f"   {len(patches) / seconds:6.1f} patches/s   n {len(patches)}"
            )


if __name__ == "__main__":
    main()
