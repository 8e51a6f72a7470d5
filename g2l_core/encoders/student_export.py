"""Export a student to other programs' formats. Each export is compared with the student before it is kept."""

import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from g2l_core.encoders.conversion import (
    LinearClassifier,
    NormalizedEncoder,
    calibrate_onnx,
    calibration_images,
    example_images,
    open_torchscript,
    open_transformers,
    quantize_onnx,
    write_onnx,
    write_openvino,
    write_torchscript,
    write_transformers,
    write_wsinfer,
)
from g2l_core.encoders.exported import write_export_record
from g2l_core.encoders.gate import MAX_PROBABILITY_CHANGE, Agreement, Encode, HeldOutPatches, compare
from g2l_core.encoders.loading import LoadedEncoder, encode_all, load_encoder
from g2l_core.encoders.patch_encoder import PatchEncoder
from g2l_core.encoders.resolve import RESTORE, STUDENT_FOLDER, STUDENT_RECORD, EncoderSpec, run_encoder, spec_to_json
from g2l_core.encoders.runtimes import SessionNetwork
from g2l_core.encoders.student_folder import timm_config, write_json
from g2l_core.encoders.trust import with_trusted_code
from g2l_core.errors import EncoderError, RunError, UnknownNameError, UsageError, refuse_open_files, writing
from g2l_core.files import write_text
from g2l_core.store.locks import locked_output

TOLERANCE = 1e-4
"""Maximum relative difference of features, in float32, between the student and an export that keeps float32."""

BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Form:
    """A format that a student can be exported to."""

    runtime: str = ""
    """The runtime with which G2L runs it; empty where only other programs do."""
    precision: str = "fp32"
    batch: int | None = None
    """Images that must be run together; None is any number."""
    needs: str = ""
    """What must be given beside the run: store or head."""


FORMS = {
    "timm": Form(),
    "torchscript": Form(),
    "onnx": Form(runtime="onnx"),
    "onnx-int8": Form(runtime="onnx", precision="int8", needs="store"),
    "onnx-int8-dynamic": Form(runtime="onnx", precision="int8-dynamic", batch=1, needs="store"),
    "openvino": Form(runtime="openvino"),
    "wsinfer": Form(needs="head"),
    "transformers": Form(),
}

FORMATS = tuple(FORMS)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export that was kept."""

    out: Path
    agreement: Agreement | None
    """None where no patches were given: then random images were compared."""


def export_student(
    run: Path,
    form: str,
    out: Path,
    trusted: Collection[str] = (),
    *,
    held_out: HeldOutPatches | None = None,
    head: LinearClassifier | None = None,
) -> Exported:
    """Write the student of a run for other programs and runtimes.

    Forms in float32 must give the student's features of random images to within `TOLERANCE`. With `held_out`, every
    converted form must pass the gate on them too; forms in 8 bits are made with `held_out` only.

    Args:
        run: The run folder, or the folder of a head that has a student.
        form: A name of `FORMS`. transformers holds only a DINOv2 with registers, in Hibou's own layout.
        out: The folder to make.
        trusted: Modules whose code may run if the run's record names it.
        held_out: Patches that the export is judged on.
        head: What the wsinfer form classifies with.

    Raises:
        UnknownNameError: There is no such format.
        RunError: `out` exists, is being written, or cannot be written to.
        EncoderError: The format cannot hold the student, or the export does not give its features.
        UsageError: A package, the patches or the head are missing.
    """
    if form not in FORMS:
        raise UnknownNameError("format", form, FORMS)
    _require_given(form, held_out, head)
    unfinished = out.with_name(out.name + ".partial")
    with writing(out), locked_output(unfinished):
        if out.exists():
            raise RunError(f"{out} exists; give another --out")
        encoder = load_encoder(with_trusted_code(run_encoder(run), trusted), device="cpu", precision="fp32")
        temporary = unfinished / "student"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            agreement = _write(form, encoder, run, temporary, held_out, head)
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Exported(out=out, agreement=agreement)


def _require_given(form: str, held_out: HeldOutPatches | None, head: LinearClassifier | None) -> None:
    """Refuse a form whose patches or head are missing, before anything is loaded.

    Raises:
        UsageError: They are.
    """
    if FORMS[form].needs == "head" and head is None:
        raise UsageError(
            f"--format {form} is for programs that run classifiers: give the folder of g2l fit-head in place of the run"
        )
    if FORMS[form].needs == "store":
        if held_out is None:
            raise UsageError(
                f"--format {form} changes features, so that it is judged on held-out patches: give --store, such as "
                "the store that the run was distilled from"
            )
        held_out.require_enough()
        if form == "onnx-int8" and not len(held_out.calibration):
            raise UsageError(
                f"--format {form} takes its scales from patches of further slides than those that it is judged on, and "
                "--store has none: give the store that the run was distilled from"
            )


def _write(
    form: str,
    encoder: LoadedEncoder,
    run: Path,
    folder: Path,
    held_out: HeldOutPatches | None,
    head: LinearClassifier | None,
) -> Agreement | None:
    """Write a form into a folder, and judge it.

    Raises:
        EncoderError: It is not the student.
    """
    if form == "timm":
        _timm(encoder, run, folder)
        return None
    folder.mkdir()
    agreement = None
    if head is not None and form == "wsinfer":
        _wsinfer(encoder, head, folder, held_out)
    elif (network := _CONVERSIONS[form](encoder, folder, held_out)) is not None:
        agreement = _judge(form, encoder, network, held_out)
    write_json(folder / "preprocessing.json", preprocessing(encoder.spec))
    write_text(folder / "README.md", _card(run, form, agreement))
    if FORMS[form].runtime:
        _record(form, encoder, folder, agreement)
    return agreement


def _judge(form: str, encoder: LoadedEncoder, network: nn.Module, held_out: HeldOutPatches | None) -> Agreement | None:
    """Compare a written network with the student: on random images where it keeps float32, and on patches."""
    if FORMS[form].precision == "fp32":
        images = example_images(encoder)
        for batch in (images, images[:1], torch.cat([images, images[:1]])):
            _require_same(network, encoder, batch, form)
    if held_out is None:
        return None
    exported = replace(encoder, module=PatchEncoder(network, replace(encoder.spec, pooling="native")).eval())
    agreement = compare(held_out, _encode(encoder), _encode(exported))
    agreement.require_near(form)
    return agreement


def _encode(encoder: LoadedEncoder) -> Encode:
    return lambda pixels: encode_all(encoder, pixels, BATCH)


def _record(form: str, encoder: LoadedEncoder, folder: Path, agreement: Agreement | None) -> None:
    """Write what lets G2L run the folder as an encoder."""
    known = FORMS[form]
    names = ("model.xml", "model.bin") if known.runtime == "openvino" else ("model.onnx",)
    facts = {
        "form": form,
        "runtime": known.runtime,
        "precision": known.precision,
        "batch": known.batch,
        "student_digest": encoder.digest,
        "student_weights_digest": encoder.weights_digest,
        "gate": agreement.to_json() if agreement else None,
    }
    write_export_record(folder, replace(encoder.spec, dim=encoder.dim), names, facts)


def _card(run: Path, form: str, agreement: Agreement | None) -> str:
    """The student's model card, with what was compared."""
    text = (run / STUDENT_FOLDER / "README.md").read_text(encoding="utf-8")
    if agreement is None:
        return text
    lines = [
        f"\n## The {form} form\n",
        f"Its features of {agreement.patches:,} patches of {agreement.slides} slides ({agreement.origin})",
        f"have a cosine of {agreement.min_cosine:.5f} at least and {agreement.median_cosine:.5f} at the median",
        "to those of the student in float32 in torch.",
    ]
    if agreement.doubt:
        lines.append(f"\n**Warning**: {agreement.doubt}.")
    if agreement.probe is not None:
        lost = agreement.probe
        lines.append(f"A probe of {lost.task}: {lost.metric} {lost.exported:.4f}, with the student {lost.student:.4f}.")
    return text.rstrip("\n") + "\n" + "\n".join(lines) + "\n"


def _timm(encoder: LoadedEncoder, run: Path, folder: Path) -> None:
    """Copy the student's folder, whose weights were checked when they were loaded."""
    shutil.copytree(run / STUDENT_FOLDER, folder)
    path = run / STUDENT_FOLDER / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if ":" not in encoder.spec.architecture else None
    except (OSError, ValueError, RecursionError) as error:
        refuse_open_files(error, path, EncoderError)
        raise EncoderError(f"{path} cannot be read ({error}). {RESTORE}") from error
    if config is not None and config != timm_config(encoder.module.network, encoder.spec):
        raise EncoderError(f"{path} does not describe the student of {STUDENT_RECORD}. {RESTORE}")


def preprocessing(spec: EncoderSpec) -> dict[str, object]:
    """How a patch becomes the network's input, as values that JSON can hold."""
    wanted = ("name", "input_px", "mean", "std", "interpolation", "pooling", "mpp")
    fields = spec_to_json(spec)
    return {
        **{key: fields[key] for key in wanted},
        "input": "float32 (batch, 3, input_px, input_px), red green blue, (pixels / 255 - mean) / std",
        "output": "float32 (batch, features)",
    }


def _require_same(network: nn.Module, encoder: LoadedEncoder, images: Tensor, form: str) -> None:
    with torch.inference_mode():
        wanted, exported = encoder.module.pooled(images), network(images)
    error = float((exported - wanted).abs().max() / wanted.abs().max())
    if not error <= TOLERANCE:
        raise EncoderError(
            f"the {form} export differs from the student by {error:.1e} of the largest feature; not written"
        )


def _torchscript(encoder: LoadedEncoder, folder: Path, _: HeldOutPatches | None) -> nn.Module:
    write_torchscript(NormalizedEncoder(encoder.module), example_images(encoder), folder / "model.pt")
    return open_torchscript(folder / "model.pt")


def _onnx(encoder: LoadedEncoder, folder: Path, _: HeldOutPatches | None) -> nn.Module:
    write_onnx(encoder, folder / "model.onnx")
    return SessionNetwork(folder / "model.onnx", "onnx")


def _onnx_int8(encoder: LoadedEncoder, folder: Path, held_out: HeldOutPatches | None) -> nn.Module:
    """Static 8 bits, from the patches of other slides."""
    assert held_out is not None
    aside = folder / "aside"
    aside.mkdir()
    write_onnx(encoder, aside / "model.onnx")
    images = calibration_images(encoder, held_out.calibration)
    calibrate_onnx(aside / "model.onnx", folder / "model.onnx", images)
    shutil.rmtree(aside)
    return SessionNetwork(folder / "model.onnx", "onnx")


def _onnx_int8_dynamic(encoder: LoadedEncoder, folder: Path, _: HeldOutPatches | None) -> nn.Module:
    aside = folder / "aside"
    aside.mkdir()
    write_onnx(encoder, aside / "model.onnx")
    quantize_onnx(aside / "model.onnx", folder / "model.onnx")
    shutil.rmtree(aside)
    return SessionNetwork(folder / "model.onnx", "onnx", batch=FORMS["onnx-int8-dynamic"].batch)


def _openvino(encoder: LoadedEncoder, folder: Path, _: HeldOutPatches | None) -> nn.Module:
    write_openvino(encoder, folder / "model.xml")
    return SessionNetwork(folder / "model.xml", "openvino")


def _transformers(encoder: LoadedEncoder, folder: Path, _: HeldOutPatches | None) -> nn.Module | None:
    write_transformers(encoder, folder)
    return open_transformers(folder) if encoder.spec.pooling == "cls" else None  # its pooler gives the class token


_CONVERSIONS: dict[str, Callable[[LoadedEncoder, Path, HeldOutPatches | None], nn.Module | None]] = {
    "torchscript": _torchscript,
    "onnx": _onnx,
    "onnx-int8": _onnx_int8,
    "onnx-int8-dynamic": _onnx_int8_dynamic,
    "openvino": _openvino,
    "transformers": _transformers,
}


def _wsinfer(encoder: LoadedEncoder, head: LinearClassifier, folder: Path, held_out: HeldOutPatches | None) -> None:
    """Write a classifier, and compare its probabilities with the head's on the student's features.

    Raises:
        EncoderError: They differ, or the head takes other features.
    """
    if head.weights.shape[1] != encoder.dim:
        raise EncoderError(f"the head takes {head.weights.shape[1]} features, its student gives {encoder.dim}")
    write_wsinfer(encoder, head, folder)
    network = open_torchscript(folder / "torchscript_model.pt")
    batches = [example_images(encoder)]
    if held_out is not None:
        batches += [torch.from_numpy(images) for images in calibration_images(encoder, held_out.pixels)]
    for images in batches:
        with torch.inference_mode():
            found = network(images).softmax(1).numpy()
            features = encoder.module.pooled(images).numpy().astype(np.float64)
        logits = features @ head.weights.astype(np.float64).T + head.bias
        wanted = np.exp(logits - logits.max(axis=1, keepdims=True))
        difference = np.abs(found - wanted / wanted.sum(axis=1, keepdims=True)).max()
        if not difference <= MAX_PROBABILITY_CHANGE:
            raise EncoderError(f"the wsinfer export's probabilities differ by {difference:.3f} from the head's")
