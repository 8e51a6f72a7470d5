"""The table of encoders for people, at the command line and in docs/encoders.md.

`python -m g2l_core.encoders.tables docs/encoders.md` rewrites the table of the page. A test keeps it current.
"""

import re
import sys
from pathlib import Path

from g2l_core.encoders.registry import TABLE
from g2l_core.encoders.spec import EncoderSpec, spec_to_json

_POOLING_WORDS = {"cls": "class", "cls_mean": "class + mean", "native": "its head", "mean": "mean", "tokens": "tokens"}


def describe_scales(spec: EncoderSpec) -> str:
    """The scales on an encoder's card, um/px."""
    return "any" if spec.mpp is None else ", ".join(f"{mpp:g}" for mpp in (spec.mpp, *spec.also_mpp))


def describe_parameters(spec: EncoderSpec) -> str:
    """Parameters in millions."""
    return f"{(spec.parameters or 0) / 1e6:,.1f} M"


def describe_source(spec: EncoderSpec) -> str:
    """Repository or package of the weights."""
    source = spec.source
    return source.where if source.kind == "hub" else source.where.replace("_", "-")


def encoder_lines() -> list[str]:
    """The table of `g2l models` at 80 columns, and how other encoders are named."""
    lines = [f"{'encoder':18}{'features':>8}{'px':>5}  {'um/px':16}{'params':>10}  {'license':20}"]
    for spec in TABLE.values():
        license = spec.license + (" *" if spec.gated else "")
        size = f"{spec.name:18}{spec.dim:>8}{spec.input_px:>5}"
        lines.append(f"{size}  {describe_scales(spec):16}{describe_parameters(spec):>10}  {license}")
    return [
        *lines,
        "",
        "* gated: accept the license on the model's page, then set HF_TOKEN.",
        "NAME@PX is another input size, NAME+POOLING another pooling (cls, mean, cls_mean,",
        "tokens). Encoders too: timm:NAME with --weights, a run folder of g2l distill, a spec",
        "file (mine.toml), MODULE:FUNCTION. All of one: g2l models NAME.",
    ]


def setting_lines(spec: EncoderSpec) -> list[str]:
    """The settings of one encoder, one on each line."""
    words = {"trained_on": "trained on", "input_px": "input, px", "card_precision": "card's precision"}
    shown = {**spec_to_json(spec), "mpp": describe_scales(spec)}
    del shown["also_mpp"]
    lines = []
    for key, value in shown.items():
        text = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
        text = " ".join(map(str, text)) if isinstance(text, list) else text
        lines.append(f"{words.get(key, key):18}{'' if text is None else text}")
    return lines


def with_table(page: str) -> str:
    """The page with a new table between its two marks."""
    rows = [
        "| name | features | input | um/px | pooling | parameters | license | weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| `{spec.name}` | {spec.dim} | {spec.input_px} px | {describe_scales(spec)} | "
        f"{_POOLING_WORDS[spec.pooling]} | {describe_parameters(spec)} | {spec.license} | "
        f"{describe_source(spec)}{', gated' if spec.gated else ''} |"
        for spec in TABLE.values()
    ]
    table = "\n".join(rows)
    return re.sub(r"(?s)(<!-- table -->\n).*(\n<!-- end of table -->)", lambda m: m[1] + table + m[2], page)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_table(target.read_text(encoding="utf-8")), encoding="utf-8")
