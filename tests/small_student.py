"""A run folder around any encoder, made without training: what exports and measurements need."""

from dataclasses import asdict
from pathlib import Path

from g2l_core.encoders.loading import load_encoder
from g2l_core.encoders.resolve import EncoderSpec, resolve_encoder
from g2l_core.encoders.student_folder import ModelCard, write_student
from pipeline.runs import RunRecord, write_run
from tests.faults.small_run import settings

TINY_VIT = """\
architecture = "vit_small_patch14_reg4_dinov2"
weights = "random:1"
input_px = 56
pooling = "cls"
mean = [0.7, 0.6, 0.7]
std = [0.2, 0.2, 0.2]
mpp = 0.5
[arguments]
img_size = 56
depth = 2
embed_dim = 48
num_heads = 3
"""


def tiny_vit(folder: Path) -> EncoderSpec:
    """A small DINOv2 with registers, seeded."""
    (folder / "tiny.toml").write_text(TINY_VIT)
    return resolve_encoder(str(folder / "tiny.toml"))


def make_run(folder: Path, spec: EncoderSpec, *, train=("a",), held_out=("b",)) -> Path:
    """A finished run whose student is the encoder itself, and whose teacher is it too.

    `train` and `held_out` are slide ids, or how many patches of each slide there are.
    """
    folder.mkdir(parents=True)
    encoder = load_encoder(spec, device="cpu", precision="fp32")
    plain = asdict(settings())
    card = ModelCard(
        name=folder.name, teachers=[encoder.facts.to_json()], student=spec, settings=plain, train_slides=len(train),
        train_patches=1, held_out="some", step=1, before={}, after={},
    )  # fmt: skip
    write_student(folder, encoder.module, spec, trained_on="nothing", card=card)
    rows = {
        side: dict(part) if isinstance(part, dict) else dict.fromkeys(part, 1)
        for side, part in (("train", train), ("held_out", held_out))
    }
    record = RunRecord(
        teacher=encoder.facts, student=encoder.facts, settings={**plain, "where": []}, held_out="some", rows=rows
    )
    write_run(folder, record)
    return folder
