"""The table of encoders: against the paper, against the cards, built on the meta device, and its page in docs/."""

import math
from pathlib import Path

import pytest
import torch

from g2l_core.encoders.architectures import build_architecture
from g2l_core.encoders.patch_encoder import PatchEncoder
from g2l_core.encoders.resolve import TABLE, resolve_encoder
from g2l_core.encoders.tables import encoder_lines, setting_lines, with_table

ISSUED = """h-optimus-0 h-optimus-1 h0-mini hibou-b hibou-l uni uni2-h virchow virchow2 prov-gigapath phikon phikon-v2
ctranspath kaiko-s8 kaiko-s16 kaiko-b8 kaiko-b16 kaiko-l14 lunit-s8 lunit-s16 midnight-12k openmidnight gpfm""".split()

CARDS = {
    "h-optimus-0": "1.1e9", "h-optimus-1": "1.1e9", "h0-mini": "86e6", "hibou-b": "86e6", "hibou-l": "0.3e9",
    "uni": "0.3e9", "uni2-h": "681e6", "virchow": "631e6", "virchow2": "631e6", "prov-gigapath": "1.13e9",
    "phikon": "86e6", "phikon-v2": "303e6", "ctranspath": "28e6", "kaiko-s8": "22e6", "kaiko-s16": "22e6",
    "kaiko-b8": "86e6", "kaiko-b16": "86e6", "kaiko-l14": "303e6", "lunit-s8": "21.7e6", "lunit-s16": "21.7e6",
    "midnight-12k": "1.1e9", "openmidnight": "1.1e9", "gpfm": "0.3e9",
}  # fmt: skip
"""Parameters as cards, papers and hubs give them, to the digits that they give."""

PREFIX_TOKENS = {
    "h-optimus-0": 5, "h-optimus-1": 5, "h0-mini": 5, "hibou-b": 5, "hibou-l": 5, "uni": 1, "uni2-h": 9, "virchow": 1,
    "virchow2": 5, "prov-gigapath": 1, "phikon": 1, "phikon-v2": 1, "kaiko-s8": 1, "kaiko-s16": 1, "kaiko-b8": 1,
    "kaiko-b16": 1, "kaiko-l14": 5, "lunit-s8": 1, "lunit-s16": 1, "midnight-12k": 1, "openmidnight": 5, "gpfm": 1,
}  # fmt: skip
"""The class token and the registers that the cards name."""

GRID = {14: 16, 16: 14, 8: 28}
"""Tokens along a side of 224 px, by a token's side."""


def test_constants_are_the_papers():
    teacher, student = TABLE["h-optimus-0"], TABLE["hibou-l"]
    assert teacher.mean == (0.707223, 0.578729, 0.703617)
    assert teacher.std == (0.211883, 0.230117, 0.177517)
    assert student.mean == (0.7068, 0.5755, 0.722)
    assert student.std == (0.195, 0.2316, 0.1816)
    assert (teacher.dim, student.dim) == (1536, 1024)
    assert teacher.weights.startswith("hub:bioptimus/H-optimus-0@")
    assert student.weights.startswith("hub:histai/hibou-L@")
    assert teacher.arguments == {"img_size": 224, "init_values": 1e-5, "dynamic_img_size": False}
    assert (teacher.layout, student.layout) == ("auto", "transformers-dinov2")
    assert (teacher.card_precision, student.card_precision) == ("fp16", "fp32")
    assert {(spec.input_px, spec.pooling, spec.license) for spec in (teacher, student)} == {(224, "cls", "Apache-2.0")}


def test_the_table_holds_what_it_should():
    assert set(ISSUED) <= set(TABLE)
    assert all(spec.name == name for name, spec in TABLE.items())
    pinned = [n for n, s in TABLE.items() if s.weights.startswith("hub:") and "@" in s.weights]
    assert set(ISSUED) - set(pinned) == {"kaiko-s8", "kaiko-s16", "kaiko-b8", "kaiko-b16", "openmidnight"}
    assert all(len(TABLE[name].weights.partition("@")[2].partition("#")[0]) == 40 for name in pinned)


@pytest.mark.parametrize("name", TABLE)
def test_every_entry_is_built(name):
    """On torch's meta device, shapes without memory: a giant runs in a second, its features included."""
    spec = TABLE[name]
    with torch.device("meta"):
        network = build_architecture(spec.architecture, spec.arguments, 0)
        module = PatchEncoder(network, spec).eval()
        features = module(torch.zeros(2, spec.input_px, spec.input_px, 3, dtype=torch.uint8))
    assert features.shape == (2, spec.dim)
    counted = sum(p.numel() for p in network.parameters())
    assert counted == spec.parameters
    if name in CARDS:
        digits = len(CARDS[name].partition("e")[0].replace(".", "").lstrip("0"))
        card, unit = float(CARDS[name]), 10 ** (math.floor(math.log10(float(CARDS[name]))) - digits + 1)
        assert abs(counted - card) <= max(0.01 * card, unit / 2)
    if name in PREFIX_TOKENS:
        token_px = network.patch_embed.patch_size[0]
        assert network.num_prefix_tokens == PREFIX_TOKENS[name]
        assert network.patch_embed.grid_size == (GRID[token_px], GRID[token_px])


@pytest.mark.parametrize("name", ["hibou-b@448", "virchow2@112", "gpfm@224+tokens", "uni+mean"])
def test_other_sizes_and_poolings_are_built(name):
    spec = resolve_encoder(name)
    with torch.device("meta"):
        network = build_architecture(spec.architecture, spec.arguments, 0)
        features = PatchEncoder(network, spec)(torch.zeros(1, 224, 224, 3, dtype=torch.uint8))
    grid = (spec.input_px // network.patch_embed.patch_size[0]) ** 2
    wanted = {"cls": network.num_features, "mean": network.num_features, "cls_mean": 2 * network.num_features,
              "tokens": grid * network.num_features}  # fmt: skip
    assert features.shape == (1, wanted[spec.pooling])


def test_the_page_of_encoders_is_current():
    page = (Path(__file__).parents[2] / "docs/encoders.md").read_text(encoding="utf-8")
    assert with_table(page) == page, "python -m g2l_core.encoders.tables docs/encoders.md"
    assert all(f"| `{name}` |" in page for name in TABLE)


def test_the_printed_table_fits_a_terminal():
    lines = encoder_lines()
    assert all(len(line.rstrip()) <= 86 for line in lines)
    assert all(any(line.startswith(f"{name} ") for line in lines) for name in TABLE)
    settings = "\n".join(setting_lines(TABLE["virchow2"]))
    for fact in ("vit_huge_patch14_224", "reg_tokens=4", "0.5, 2, 1, 0.25", "cls_mean", "CC-BY-NC-ND-4.0"):
        assert fact in settings
