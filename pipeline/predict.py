"""From slides to answers with a fitted head: behind `g2l predict`."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from g2l_core.encoders.exported import with_runtime
from g2l_core.encoders.loading import RUNTIME_FACTS, LoadedEncoder
from g2l_core.encoders.resolve import STUDENT_FOLDER, EncoderSpec, run_encoder, spec_from_json
from g2l_core.errors import SlideError, StoreError, UsageError, require_output_folder, writing
from g2l_core.extraction.extract import ExtractionProgress
from g2l_core.files import csv_row, write_text, write_with
from g2l_core.heads.head import RECORD, Head, SlidePrediction, read_head
from g2l_core.heads.heatmap import LONGEST_PX, heatmap_geojson, heatmap_picture, measurements
from g2l_core.heads.sampling import Sampled
from g2l_core.patches.grid import GridSpec
from g2l_core.patches.views import ViewSpec
from g2l_core.slides.slide import open_slide
from g2l_core.store.features import FeatureStore, StoredSlide
from g2l_core.store.location import folder_of
from g2l_core.store.locks import locked_output
from g2l_core.store.provenance import digest
from g2l_core.store.schema import STATUS
from g2l_core.tissue.methods import TissueMethod
from g2l_core.types import Mpp
from pipeline.budget import Budget, BudgetRun
from pipeline.cache_teacher import recognized_sources, run_extraction, stored_keys
from pipeline.settings import ExtractionSettings

FEATURES = "features.zarr"
TABLE = "predictions.csv"
MAPS = "heatmaps"


@dataclass(frozen=True, kw_only=True)
class PredictionSummary:
    """What `g2l predict` did."""

    out: Path
    store: Path
    rows: tuple[Mapping[str, str], ...]
    """Of predictions.csv, by slide."""
    failed: Mapping[str, str]
    """Why slides have no answer."""
    notes: tuple[str, ...]


def head_encoder(head: Head, folder: Path) -> EncoderSpec:
    """The encoder that a head was fitted on: the student in its folder, else the one that it names.

    Raises:
        G2LError: It cannot be found.
    """
    if (folder / STUDENT_FOLDER).is_dir():
        return run_encoder(folder)
    try:
        return spec_from_json(dict(head.facts.encoder), str(folder / RECORD))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{folder} was fitted on features whose encoder G2L cannot run ({error}). "
            "Fit a head on the student of a run folder"
        ) from error


def run_predict(
    inputs: Sequence[Path],
    head_folder: Path,
    out: Path,
    settings: ExtractionSettings,
    *,
    store: Path | None = None,
    tissue: TissueMethod | None = None,
    pictures: bool = True,
    budget: Budget | None = None,
) -> PredictionSummary:
    """Find tissue and patches, encode them, and apply the head: a row, a GeoJSON and a picture for every slide.

    The features stay in OUT/features.zarr, or in `store`, so that an interrupted run goes on where it stopped, and
    another head over the same slides encodes nothing.

    Args:
        inputs: Slides, folders of slides, or a manifest.
        head_folder: From `g2l fit-head`.
        out: Where predictions.csv and the heatmaps go.
        settings: How stage one runs; precision and views are the head's own.
        store: Keep the features there.
        tissue: The method that the head's grid names, where that is a network or a folder.
        pictures: Whether heatmaps are drawn.
        budget: Encode some patches of each slide only, and estimate the answer.

    Raises:
        G2LError: Nothing could be started, or no slide has an answer.
    """
    head = read_head(head_folder)
    require_output_folder(out, (TABLE, FEATURES, MAPS), "predictions")
    spec = head_encoder(head, head_folder)
    precision = str(head.facts.encoder.get("precision") or "fp32")
    settings = replace(settings, views=0, precision=precision.removesuffix("+compile"), pictures=False)
    path = store or out / FEATURES
    sampling = BudgetRun(head, budget, settings) if budget else None
    encode = partial(_sample, sampling, head, with_runtime(spec, settings.runtime)) if sampling else None
    with writing(out), locked_output(out):
        grid, views = GridSpec.from_json(head.facts.grid), ViewSpec.from_json(head.facts.views)
        sources, _ = recognized_sources(inputs, path, settings)
        summary = run_extraction(inputs, path, [spec], grid, views, settings, tissue=tissue, encode=encode)
        opened = FeatureStore.open(path)
        key = summary.encoders[0]
        _require_same(head, opened, key)
        failed, rows = dict(summary.failed_slides), list[dict[str, str]]()
        for slide_id in (source.slide_id for source in sources if source.slide_id not in failed):
            try:
                slide, some = opened.slide(slide_id), sampling.answers[slide_id] if sampling else None
                rows.append(_answer(head, slide, key, some, out, pictures=pictures))
            except (SlideError, StoreError, UsageError) as error:
                failed[slide_id] = str(error)
        if rows:
            write_text(out / TABLE, _table(rows))
        elif not failed:
            raise UsageError("no slide was given")
        return PredictionSummary(
            out=out, store=path, rows=tuple(rows), failed=failed, notes=(*summary.notes, *_notes(rows))
        )


def _sample(
    sampling: BudgetRun,
    head: Head,
    spec: EncoderSpec,
    store: FeatureStore,
    slide_ids: Sequence[str],
    encoders: Sequence[LoadedEncoder],
    settings: ExtractionSettings,
) -> ExtractionProgress:
    """Answer from some patches of each slide, in the place of encoding them all."""
    encoder = encoders[0] if encoders else None
    key = encoder.key if encoder else stored_keys(folder_of(store.path), [spec], settings)[0]
    _require_same(head, store, key)
    return sampling.encode(store, slide_ids, key, encoder, settings)


def _require_same(head: Head, store: FeatureStore, key: str) -> None:
    """Refuse features of another encoder than the head's: other weights, preprocessing or precision.

    An export of the head's own student passes: its features were compared with the student's when it was written.
    """
    fitted, facts = head.facts.encoder.get("digest"), store.encoders[key]
    found, exported_from = facts.digest, facts.extra.get(RUNTIME_FACTS, {}).get("student_digest")
    if fitted not in {found, exported_from}:
        raise UsageError(
            f"the head was fitted on features of {head.facts.encoder.get('name')} with digest {str(fitted)[:12]}; the "
            f"encoder here has {found[:12]}. Weights, preprocessing and precision must be the same"
        )


def _answer(
    head: Head, slide: StoredSlide, key: str, some: Sampled | None, out: Path, *, pictures: bool
) -> dict[str, str]:
    """Apply the head to a slide, or take the answer from some of its patches, and draw it.

    Raises:
        G2LError: The slide has no good patch, or its features or pixels cannot be read.
    """
    if some is not None:
        shown, found = some.rows, some.estimate.found
    else:
        shown = np.flatnonzero(slide.patch_status == STATUS["ok"])
        if not len(shown):
            raise SlideError(f"{slide.slide_id}: no patch of it is good")
        found = head.apply(slide.features(key)[shown])
    if pictures and slide.facts.kind == "slide":
        part = f"{some.encoded:,} of {len(slide):,} patches encoded" if some else ""
        _draw(head, slide, shown, found, part, out)
    return _row(head, slide, found, some)


def _row(head: Head, slide: StoredSlide, found: SlidePrediction, some: Sampled | None) -> dict[str, str]:
    facts = head.facts
    row = {"slide_id": slide.slide_id}
    if facts.kind == "regression":
        row[facts.label] = f"{found.values[0]:.6g}"
    else:
        row["predicted"] = facts.classes[int(found.values.argmax())]
        row |= {f"p({name})": f"{value:.6f}" for name, value in zip(facts.classes, found.values, strict=True)}
    if some is not None:
        margins = zip(facts.classes, some.estimate.margin.tolist(), strict=True)
        row |= {f"margin({name})": f"{margin:.6g}" if np.isfinite(margin) else "" for name, margin in margins}
    if facts.kind == "probe":
        weights = some.estimate.weights if some else np.ones(len(found.patches))
        share = np.bincount(found.patches.argmax(axis=1), weights, len(facts.classes)) / weights.sum()
        row |= {f"share({name})": f"{value:.6f}" for name, value in zip(facts.classes, share, strict=True)}
    known = digest(slide.facts.fingerprint)[:16] in facts.trained_on["slides"]
    row["patches"] = str(len(slide) if some else len(found.patches))
    if some is not None:
        row |= {"encoded": str(some.encoded), "settled": "yes" if some.settled else "no"}
    return row | {"trained_on": "yes" if known else "no", "source": slide.facts.source}


def _draw(head: Head, slide: StoredSlide, rows: np.ndarray, found: SlidePrediction, part: str, out: Path) -> None:
    """Draw these rows; `part` says how many they are of how many, where they are not all."""
    from PIL import Image

    facts, side = head.facts, slide.facts.patch_px_level0
    coords = slide.coords[rows]
    named = measurements(found.patches, facts.classes, found.attention)
    base = out / MAPS / slide.slide_id
    base.parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(f"{base}.geojson"), heatmap_geojson(coords, side, named, facts.task))
    shown, limits, what = _shown(head, found)
    icc = bool(facts.grid.get("icc"))
    with open_slide(Path(slide.facts.source), mpp_override=slide.facts.mpp, icc=icc) as opened:
        thumbnail = opened.read_thumbnail(Mpp(max(opened.level0_size) * opened.mpp / LONGEST_PX))
    caption = "; ".join(text for text in (what, part, slide.slide_id) if text)
    image = heatmap_picture(thumbnail.image, thumbnail.downsample, coords, side, shown, limits=limits, caption=caption)
    write_with(Path(f"{base}.png"), lambda path: Image.fromarray(image).save(path, "PNG"))


def _shown(head: Head, found: SlidePrediction) -> tuple[np.ndarray, tuple[float, float], str]:
    """The values that a picture shows, the ends of its scale, and what they are: the slide's own class, or the number.

    Of two classes it is always the second one's probability, so that pictures of several slides compare.
    """
    facts = head.facts
    if facts.kind == "regression":
        values = found.patches[:, 0]
        return values, (float(values.min()), float(values.max())), facts.label
    shown = 1 if len(facts.classes) == 2 else int(found.values.argmax())
    name, value = facts.classes[shown], found.values[shown]
    return found.patches[:, shown], (0.0, 1.0), f"p({name}) of each patch; slide {value:.2f}"


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(csv_row(rows[0]))
    writer.writerows(csv_row(row.values()) for row in rows)
    return text.getvalue()


def _notes(rows: Sequence[Mapping[str, str]]) -> list[str]:
    known = [row["slide_id"] for row in rows if row["trained_on"] == "yes"]
    if not known:
        return []
    return [f"{len(known)} slide{'s' * (len(known) > 1)} the head was fitted on, first {known[0]}: no new evidence"]


def summary_json(summary: PredictionSummary) -> dict[str, Any]:
    """The summary for programs."""
    return {
        "out": str(summary.out),
        "store": str(summary.store),
        "predictions": [dict(row) for row in summary.rows],
        "failed": dict(summary.failed),
        "notes": list(summary.notes),
    }


def summary_text(summary: PredictionSummary) -> str:
    """The summary for people: at most twenty slides, and where the rest is."""
    from pipeline.tables import table_text

    if not summary.rows:
        return "no slide has an answer"
    hidden = {"source", "trained_on"}
    columns = [name for name in summary.rows[0] if name not in hidden and not name.startswith(("share(", "margin("))]
    cells = [tuple(_short(row[name]) for name in columns) for row in summary.rows[:20]]
    table = table_text(cells, header=tuple(columns), right=range(1, len(columns)))
    more = f"\nand {len(summary.rows) - 20:,} more" if len(summary.rows) > 20 else ""
    notes = "".join(f"\nnote: {note}" for note in summary.notes)
    return f"{table}{more}{notes}\ntable: {summary.out / TABLE}  heatmaps: {summary.out / MAPS}"


def _short(text: str) -> str:
    """A probability with three digits."""
    return f"{float(text):.3f}" if len(text) == 8 and text[1:2] == "." and text.replace(".", "").isdigit() else text
