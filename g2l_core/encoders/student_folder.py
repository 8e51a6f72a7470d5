"""Write a distilled student as a folder that timm, and other readers of timm's layout, load without G2L."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from g2l_core.encoders.patch_encoder import PatchEncoder
from g2l_core.encoders.resolve import RECORD_DIGEST, STUDENT_FOLDER, STUDENT_RECORD, EncoderSpec, spec_to_json
from g2l_core.encoders.spec import spec_digest
from g2l_core.encoders.terms import COPYLEFT, FREE, NON_COMMERCIAL, UNKNOWN, Source, combined, verdict
from g2l_core.encoders.timm_compat import import_timm
from g2l_core.encoders.weights import state_digest
from g2l_core.files import sync_folder, write_text, write_with
from g2l_core.store.provenance import digest


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What users must know of a student, for its README.md."""

    name: str
    teachers: Sequence[Mapping[str, Any]]
    """What the store keeps of each teacher."""
    student: EncoderSpec
    """The student before training."""
    settings: Mapping[str, Any]
    train_slides: int
    train_patches: int
    held_out: str
    step: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    warnings: tuple[str, ...] = ()
    """What the curves of the run warned of."""
    sources: Sequence[Source] = ()
    """Teachers, start and data with their terms."""
    widths: tuple[int, ...] = ()
    """Further widths that the student was trained to be good at."""
    baseline: str = ""
    """What the encoder is, where it is no student but a baseline that learned from no teacher."""
    loss: str = ""
    """What was minimized, where it is not the loss in the settings."""


def write_student(
    run: Path, module: PatchEncoder, spec: EncoderSpec, *, trained_on: str, card: ModelCard
) -> dict[str, Any]:
    """Write RUN/student so that `timm.create_model("local-dir:RUN/student", pretrained=True, num_classes=0)` loads it.

    Args:
        run: The run folder.
        module: The trained student, on any device.
        spec: The student before training.
        trained_on: What its weights were trained on, for people.
        card: The content of README.md, the hub's model card.

    Returns:
        The content of encoder.json: the spec, the digests of the tensors, of the encoder in float32, and of all that.
    """
    network = module.network.cpu()
    tensors = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    weights_digest = state_digest(tensors)
    spec = replace(
        spec, layout="timm", trained_on=trained_on, license=combined(card.sources) if card.sources else spec.license,
        widths=card.widths,
    )  # fmt: skip
    record = {
        **spec_to_json(spec),
        "weights_digest": weights_digest,
        "digest": spec_digest(spec, weights_digest, "fp32"),
    }
    record[RECORD_DIGEST] = digest(record)
    temporary = run / f"{STUDENT_FOLDER}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write_tensors(temporary / "model.safetensors", tensors)
    write_json(temporary / STUDENT_RECORD, record)
    if ":" not in spec.architecture:
        write_json(temporary / "config.json", timm_config(network, spec))
    write_text(temporary / "README.md", model_card(card, spec))
    shutil.rmtree(run / STUDENT_FOLDER, ignore_errors=True)
    temporary.rename(run / STUDENT_FOLDER)
    sync_folder(run)
    return record


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, all of them or nothing."""
    write_with(path, lambda temporary: save_file(dict(tensors), temporary, metadata={"format": "pt"}))


def timm_config(network: nn.Module, spec: EncoderSpec) -> dict[str, Any]:
    """The config.json that timm's `local-dir:` and hub loading read: architecture, arguments, preprocessing."""
    config = import_timm().get_pretrained_cfg(spec.architecture)
    size = [3, spec.input_px, spec.input_px]
    return {
        "architecture": spec.architecture,
        "num_classes": 0,
        "num_features": getattr(network, "head_hidden_size", None) or getattr(network, "num_features", None),
        # layers are left out: timm takes them as classes, which JSON cannot hold
        "model_args": {key: value for key, value in spec.arguments.items() if not key.endswith("_layer")},
        "pretrained_cfg": {
            "input_size": size,
            "fixed_input_size": bool(config.fixed_input_size),
            "interpolation": spec.interpolation,
            "crop_pct": 1.0,
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": 0,
            "first_conv": config.first_conv,
            "classifier": config.classifier,
        },
    }


def model_card(card: ModelCard, spec: EncoderSpec) -> str:
    """README.md for the hub: a header, how to load the student, how it was made, its terms, and what was measured."""
    terms = verdict(card.sources)
    scale = f" at {spec.mpp:g} um/px" if spec.mpp else ""
    near = "its teachers" if len(card.teachers) > 1 else "its teacher"
    near = f"{near.replace('its', 'the')}, from which it did not learn" if card.baseline else near
    names = " and ".join(teacher["name"] for teacher in card.teachers)
    lines = [
        "---",
        "library_name: timm",
        f"tags: [pathology, feature-extraction, {'baseline' if card.baseline else 'distillation'}, g2l]",
        "license: other",
        f"license_name: {json.dumps(terms)}",
        "---",
        "",
        f"# {card.name}",
        "",
        *_intro(card, names),
        f"Input {spec.input_px} px{scale}, pooling {spec.pooling}.",
        "",
        *(line for warning in card.warnings for line in (f"**Warning**: {warning}.", "")),
        "```python",
        *usage(spec),
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {what} | {words} |" for what, words in _made_of(card).items()),
        "",
        *_on_terms(card, spec),
        *_on_widths(card),
        *_measured(card),
        f"These values show how near it is to {near}, and not how good either is at a task.",
        "",
    ]
    return "\n".join(lines)


def _intro(card: ModelCard, teachers: str) -> list[str]:
    if card.baseline:
        return [
            "A baseline made by g2l baseline, to tell what distillation adds; not a distilled student. "
            f"{card.student.name}, {card.baseline}.",
        ]
    return [
        f"A patch encoder for H&E slides, distilled by G2L (arXiv 2510.11176): {card.student.name} learned the "
        f"features of {teachers}.",
    ]


def _on_terms(card: ModelCard, spec: EncoderSpec) -> list[str]:
    """What the weights may be used for, and the terms of each thing that they are made from."""
    sources = card.sources or [Source(what=f"the start {card.student.name}", license=spec.license)]
    words = {
        FREE: "free for any use, if it is named",
        COPYLEFT: "what is made from it has the same terms",
        UNKNOWN: "not known to be free: ask its owner",
        NON_COMMERCIAL: "no commercial use",
    }
    return [
        "## Terms",
        "",
        f"This student is {verdict(sources)}. It is made from:",
        "",
        "| made from | its terms | in short |",
        "|---|---|---|",
        *(f"| {source.what} | {source.license} | {words[source.kind]} |" for source in sources),
        "",
        "The strictest of them holds. This is read from their licenses by a program, and is no legal advice.",
        "",
    ]


def _measured(card: ModelCard) -> list[str]:
    """Two tables of held-out values: of the student's own features, and of those behind the projector."""
    over = "s, as means over them" if len(card.teachers) > 1 else ""
    lines = [f"## Held-out patches, against the teacher{over}", ""]
    parts = {
        "The student's own features, which this folder gives:": False,
        "With the projector that training has put behind them, and which is no part of this folder "
        "(`projector.safetensors` of the run):": True,
    }
    for title, is_projected in parts.items():
        names = [name for name in card.after if name != "step" and ("_projected" in name) == is_projected]
        if names:
            lines += [title, "", "| metric | before | after |", "|---|---|---|"]
            lines += [f"| {name} | {card.before[name]:z.3f} | {card.after[name]:z.3f} |" for name in names] + [""]
    return lines


def _made_of(card: ModelCard) -> dict[str, str]:
    train = card.settings["train"]
    optim = train["optim"]
    origins = (
        f"{teacher['name']} ({teacher.get('trained_on') or teacher.get('weights') or 'weights unknown'}), "
        f"digest {teacher['digest'][:12]}"
        for teacher in card.teachers
    )
    return {
        ("compared with" if card.baseline else "teachers" if len(card.teachers) > 1 else "teacher"): "; ".join(origins),
        "student before": f"{card.student.name} ({card.student.describe_weights()})",
        "data": f"{card.train_patches:,} patches of {card.train_slides} slides; held out: {card.held_out}",
        "training": f"step {card.step:,} of {train['steps']:,}, batch {card.settings['batch_size']}, loss "
        f"{card.loss or train['objective']['loss']}{_terms_beside(train)}, lr {optim['lr']:g}, "
        f"weight decay {optim['weight_decay']:g}",
    }


def _terms_beside(train: Mapping[str, Any]) -> str:
    """The weights of the terms beside the loss, where there are any."""
    terms = train.get("robustness", {})
    return "".join(
        f" + {terms[name]:g} x {words}"
        for name, words in (("stain_weight", "distance of stains"), ("center_weight", "distance of centers"))
        if terms.get(name)
    )


def _on_widths(card: ModelCard) -> list[str]:
    if not card.widths:
        return []
    widths = ", ".join(map(str, card.widths))
    return [
        f"It was trained so that its first {widths} features alone can be used, as `features[:, :{card.widths[0]}]`;",
        "the table has the values of each width after @.",
        "",
    ]


def usage(spec: EncoderSpec) -> list[str]:
    """Python that loads the student without G2L and computes its features."""
    if ":" in spec.architecture:
        return [f"# {spec.architecture} builds the network; model.safetensors is its state dict"]
    layers = {
        "SwiGLUPacked": "timm.layers.SwiGLUPacked",
        "SiLU": "torch.nn.SiLU",
        "LayerNorm(1e-12)": "functools.partial(torch.nn.LayerNorm, eps=1e-12)",
        "ConvStem": "g2l_core.encoders.architectures.ConvStem",
    }
    more = "".join(f", {key}={layers[value]}" for key, value in spec.arguments.items() if key.endswith("_layer"))
    lines = [
        "import timm, torch",
        f'model = timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0{more}).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
    ]
    prefix = "tokens = model.forward_features(transform(patch)[None])"
    match spec.pooling:
        case "native":
            return [*lines, "features = model(transform(patch)[None])"]
        case "cls":
            return [*lines, prefix, "features = tokens[:, 0]"]
        case "mean":
            return [*lines, prefix, "features = tokens[:, model.num_prefix_tokens:].mean(1)"]
        case "tokens":
            return [*lines, prefix, "features = tokens[:, model.num_prefix_tokens:].flatten(1)"]
        case _:
            mean = "tokens[:, model.num_prefix_tokens:].mean(1)"
            return [*lines, prefix, f"features = torch.cat([tokens[:, 0], {mean}], 1)"]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")
