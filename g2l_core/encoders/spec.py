"""What decides an encoder's features, as one frozen value that can be written as JSON."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from g2l_core.errors import UnknownNameError, UsageError
from g2l_core.store.provenance import digest

POOLINGS = ("native", "cls", "mean", "cls_mean", "tokens")
"""`native` is the pooling of the architecture's own head. `mean` leaves out class and register tokens. `tokens` is one
vector of all patch tokens, row by row."""

PRECISIONS = ("auto", "fp32", "bf16", "fp16")

STORED_LICENSE = "licence"
"""The key of `EncoderSpec.license` in stores and run folders, from before the spelling was settled."""

EXPORT = "export"
"""The kind of weights that are an exported network, which a runtime other than torch runs."""

MIN_INPUT_PX = 16

MPP_TOLERANCE = 0.1
"""Maximum relative difference between the scale of patches and the one on an encoder's card."""


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """Where an encoder's weights come from. `str` gives the text that specs and stores keep, `parse` reads it.

    The texts are hub:REPOSITORY@REVISION#FILE#NETWORK (all but the repository may be absent), package:MODULE/GLOB,
    file:PATH#NETWORK, run:FOLDER, export:FOLDER, module:FUNCTION (the function loads them) and random:SEED.
    """

    kind: str
    """What stands before the colon; empty for an architecture without weights."""
    where: str
    """The repository, module, path, folder, function or seed."""
    revision: str = ""
    """Of a repository; empty for its newest."""
    file: str = ""
    """The name of a file in a repository, or the pattern of one in a package."""
    network: str = ""
    """The key of one of several networks in the file, such as teacher; empty for the rule of `networks`."""

    @classmethod
    def parse(cls, text: str) -> "WeightsSource":
        """Read the text that `str` gives."""
        kind, _, where = text.partition(":")
        if kind == "hub":
            address, _, file = where.partition("#")
            file, _, network = file.partition("#")
            repository, _, revision = address.partition("@")
            return cls(kind=kind, where=repository, revision=revision, file=file, network=network)
        if kind == "package":
            module, _, pattern = where.partition("/")
            return cls(kind=kind, where=module, file=pattern)
        if kind == "file":
            path, network = split_network(where)
            return cls(kind=kind, where=path, network=network)
        return cls(kind=kind, where=where)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        file = f"{'/' if self.kind == 'package' else '#'}{self.file}" if self.file else ""
        network = f"{'#' if self.kind == 'hub' and not self.file else ''}#{self.network}" if self.network else ""
        return f"{self.kind}:{self.where}{revision}{file}{network}" if self.kind else ""


def split_network(text: str) -> tuple[str, str]:
    """The path in FILE#NETWORK, and the key of the network, which is empty where there is none."""
    found = re.fullmatch(r"(.+)#([A-Za-z_][\w-]*)", text, re.DOTALL)
    return (found[1], found[2]) if found else (text, "")


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Everything that decides an encoder's features, except the values of its weights and the precision."""

    name: str
    """The name that users write."""
    architecture: str
    """timm's name, or MODULE:FUNCTION that returns a torch module."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `timm.create_model` or of the function. Layers have the names in `architectures.LAYERS`."""
    weights: str
    """Where the weights come from, as a `WeightsSource` writes it."""
    layout: str = "auto"
    """How the weights file names its tensors (`weight_layouts.LAYOUTS`); auto finds out from the names."""
    input_px: int = 224
    """Side of the network's input, to which views of another size are resampled."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    pooling: str = "native"
    width: int | None = None
    """Of nested features, how many of the first are taken; None is all."""
    widths: tuple[int, ...] = ()
    """At which smaller widths they were trained to be good too."""
    dim: int | None = None
    """Number of features by the model's card, which is checked when the network is built."""
    mpp: float | None = None
    """Micrometers per pixel that the card asks for; None if it names none."""
    also_mpp: tuple[float, ...] = ()
    """Further scales at which it was trained."""
    card_precision: str = "fp32"
    """What `--precision auto` means on a GPU."""
    parameters: int | None = None
    license: str = "unknown"
    gated: bool = False
    trained_on: str = ""
    """What it was trained on, for reports."""
    named_in: str = field(default="", compare=False)
    """The file that describes it and may be somebody else's; empty if the user named it. It is not written anywhere,
    and code that such a file names is not run (`trust`)."""

    def __post_init__(self) -> None:
        """Refuse an encoder that cannot be built.

        Raises:
            UsageError: A field has an unknown name or is out of its range.
        """
        if self.pooling not in POOLINGS:
            raise UnknownNameError("pooling", self.pooling, POOLINGS)
        if self.interpolation not in {"bicubic", "bilinear"}:
            raise UnknownNameError("interpolation", self.interpolation, ("bicubic", "bilinear"))
        if self.input_px < MIN_INPUT_PX:
            raise UsageError(f"{self.name}: an input of {self.input_px} px is too small; at least {MIN_INPUT_PX}")
        if min(self.std) <= 0:
            raise UsageError(f"{self.name}: std must be above 0, not {self.std}")
        if self.width is not None and self.width not in self.widths:
            good = (
                f"has the widths {', '.join(map(str, self.widths))}" if self.widths else "was not trained with --nested"
            )
            raise UsageError(f"{self.name}: a width of {self.width} is asked for, but it {good}")

    @property
    def source(self) -> WeightsSource:
        """Where the weights come from."""
        return WeightsSource.parse(self.weights)

    @property
    def is_untrained(self) -> bool:
        """Whether the weights are random."""
        return self.source.kind == "random"

    @property
    def is_export(self) -> bool:
        """Whether it is an exported network, which a runtime other than torch runs."""
        return self.source.kind == EXPORT

    def describe_weights(self) -> str:
        """What the weights were trained on, or else where they come from, for people."""
        where = self.source.where
        words = {
            "random": f"random, seed {where}", "file": f"file {where}", "run": f"distilled, {where}",
            EXPORT: f"exported, {where}",
        }  # fmt: skip
        return self.trained_on or words.get(self.source.kind, self.weights)

    def fits_mpp(self, mpp: float) -> bool:
        """Whether the card allows patches at `mpp` micrometers per pixel."""
        wanted = () if self.mpp is None else (self.mpp, *self.also_mpp)
        return not wanted or any(abs(mpp - known) <= MPP_TOLERANCE * known for known in wanted)


def spec_from_json(fields: Mapping[str, Any], named_in: str = "a stored description") -> EncoderSpec:
    """The spec that `spec_to_json` wrote. Unknown keys are ignored.

    Args:
        fields: The spec as plain values.
        named_in: The file that they come from.
    """
    fields = {("license" if key == STORED_LICENSE else key): value for key, value in fields.items()}
    known: dict[str, Any] = {k: v for k, v in fields.items() if k in EncoderSpec.__dataclass_fields__}
    known["named_in"] = named_in
    known |= {k: tuple(known[k]) for k in ("mean", "std", "also_mpp", "widths") if k in known}
    return EncoderSpec(**known)


def spec_to_json(spec: EncoderSpec) -> dict[str, Any]:
    """The spec as values that JSON can hold. Those of nested features are left out where there are none."""
    lists = {"mean": list(spec.mean), "std": list(spec.std), "also_mpp": list(spec.also_mpp)}
    fields = {**asdict(spec), **lists}
    fields |= {"widths": list(spec.widths)}
    for name in ("named_in", *(name for name in ("width", "widths") if not fields[name])):
        del fields[name]
    return {(STORED_LICENSE if k == "license" else k): v for k, v in fields.items()}


def spec_digest(spec: EncoderSpec, weights_digest: str, precision: str) -> str:
    """sha256 of everything that decides an encoder's features."""
    deciding = ("architecture", "arguments", "input_px", "mean", "std", "interpolation", "pooling")
    fields = spec_to_json(spec)
    settings = {"weights": weights_digest, "precision": precision, "resampling": "pillow"}
    settings |= {"width": str(spec.width)} if spec.width else {}
    return digest({**{f: fields[f] for f in deciding}, **settings})
