"""The table of encoders for people: at the command line, and as docs/encoders.md.

`python -m g2l_core.encoders.tables docs/encoders.md` writes the page's table anew; a test keeps it current.
"""

import re
import sys
from pathlib import Path

from g2l_core.encoders.registry import TABLE
from g2l_core.encoders.spec import EncoderSpec, spec_to_json

_POOLING_WORDS = {"cls": "class", "cls_mean": "class + mean", "native": "its head", "mean": "mean", "tokens": "tokens"}


def scales_of(spec: EncoderSpec) -> str:
    """The scales that a card names, um/px."""
    return "any" if spec.mpp is None else ", ".join(f"{mpp:g}" for mpp in (spec.mpp, *spec.also_mpp))


def parameters_of(spec: EncoderSpec) -> str:
    """Parameters in millions."""
    return f"{(spec.parameters or 0) / 1e6:,.1f} M"


def source_of(spec: EncoderSpec) -> str:
    """Repository or package of the weights."""
    source = spec.source
    return source.where if source.kind == "hub" else source.where.replace("_", "-")


def encoder_lines() -> list[str]:
    """The table at 80 columns, and how others are named."""
    lines = [f"{'encoder':18}{'features':>8}{'px':>5}  {'um/px':16}{'params':>10}  {'license':20}"]
    for spec in TABLE.values():
        license = spec.license + (" *" if spec.gated else "")
        size = f"{spec.name:18}{spec.dim:>8}{spec.input_px:>5}"
        lines.append(f"{size}  {scales_of(spec):16}{parameters_of(spec):>10}  {license}")
    return [
        *lines,
        "",
        "* gated: accept the license on the model's page, then set HF_TOKEN.",
        "NAME@PX is another input size, NAME+POOLING another pooling (cls, mean, cls_mean,",
        "tokens). Encoders too: timm:NAME with --weights, a run folder of g2l distill, a spec",
        "file (mine.toml), MODULE:FUNCTION. All of one: g2l models NAME.",
    ]


def setting_lines(spec: EncoderSpec) -> list[str]:
    """Every setting of one encoder, one a line."""
    words = {"trained_on": "trained on", "input_px": "input, px", "card_precision": "card's precision"}
    shown = {**spec_to_json(spec), "mpp": scales_of(spec)}
    del shown["also_mpp"]
    lines = []
    for key, value in shown.items():
        text = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
        text = " ".join(map(str, text)) if isinstance(text, list) else text
        lines.append(f"{words.get(key, key):18}{'' if text is None else text}")
    return lines


def with_table(page: str) -> str:
    """The page with the table between its two marks written anew."""
    rows = [
        "| name | features | input | um/px | pooling | parameters | license | weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| `{spec.name}` | {spec.dim} | {spec.input_px} px | {scales_of(spec)} | {_POOLING_WORDS[spec.pooling]} | "
        f"{parameters_of(spec)} | {spec.license} | {source_of(spec)}{', gated' if spec.gated else ''} |"
        for spec in TABLE.values()
    ]
    table = "\n".join(rows)
    return re.sub(r"(?s)(<!-- table -->\n).*(\n<!-- end of table -->)", lambda m: m[1] + table + m[2], page)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_table(target.read_text(encoding="utf-8")), encoding="utf-8")
