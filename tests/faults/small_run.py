"""What the fault tests of runs share: a small distillation, and ways to damage a file."""

import json
from pathlib import Path

from g2l_core.encoders.resolve import resolve_encoder
from pipeline.config import settings_of
from pipeline.distill import run_distill
from pipeline.settings import DistillHow, DistillSettings

KEY = "timm-mobilenetv3_small_050-64-random0"
STUDENT, STUDENT_WEIGHTS = "timm:mobilenetv3_small_050@64", "random:1"

OPTIONS = {
    "steps": 6, "lr": 1e-3, "validate_every": 3, "checkpoint_every": 2, "early_stop": 0, "batch_size": 8,
    "pool_blocks": 2, "hold_out": "0.34",
}  # fmt: skip


def settings(**changes) -> DistillSettings:
    return settings_of({**OPTIONS, **changes})[0]


def distill(store: Path, out: Path, *, resume: bool = True, **changes):
    student = resolve_encoder(STUDENT, weights=STUDENT_WEIGHTS)
    how = DistillHow(resume=resume, workers=1, device="cpu")
    return run_distill(store, KEY, student, out, settings(**changes), how=how)


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def damaged(content: bytes, rng, n: int):
    """`n` damaged contents of a file, each with its name: empty, binary, another type, torn, or with a flipped bit."""
    yield "empty", b""
    yield "binary", rng.bytes(1000)
    yield "zeros", bytes(len(content))
    yield "a list", b"[1, 2]"
    yield "text", b'"text"'
    yield "deep", b"[" * 100_000
    for _ in range(n // 3):
        place = int(rng.integers(1, len(content) - 1))
        yield f"torn at {place}", content[:place]
    for _ in range(n - 6 - n // 3):
        bit = int(rng.integers(8 * len(content)))
        yield f"bit {bit}", flipped(content, bit)


def retyped(content: bytes, rng, n: int):
    """`n` JSON texts of which one value anywhere has another type."""
    for _ in range(n):
        parsed = json.loads(content)
        places = list(_places(parsed))
        holder, key = places[int(rng.integers(len(places)))]
        others = [other for other in ("text", 7, None, [1], {"a": 1}, True) if type(other) is not type(holder[key])]
        holder[key] = others[int(rng.integers(len(others)))]
        yield f"{key} of another type", json.dumps(parsed).encode()


def _places(value):
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])
