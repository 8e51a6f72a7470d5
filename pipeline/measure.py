"""What a student costs on this machine, in every runtime that is installed: behind `g2l measure`.

Each row is measured in a process of its own, so that memory and start are those of that runtime alone.
"""

import multiprocessing
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

from g2l_core.distillation.held_out import read_held_out
from g2l_core.distillation.replay import good_rows
from g2l_core.encoders.exported import RUNTIMES, export_encoder, is_export_folder, network_files, read_export_record
from g2l_core.encoders.resolve import EncoderSpec, read_student_record, run_encoder, spec_from_json
from g2l_core.encoders.student_folder import write_json
from g2l_core.encoders.trust import with_trusted_code
from g2l_core.encoders.weight_files import shards_of
from g2l_core.errors import G2LError, UsageError
from g2l_core.files import write_text
from g2l_core.rng import keyed_generator
from g2l_core.store.features import FeatureStore
from g2l_core.types import Rgb
from pipeline.energy import EnergyMeter
from pipeline.progress import say
from pipeline.runs import read_run
from pipeline.speed import MEASURED
from pipeline.tables import bytes_text, table_text

VIEW_PX = 224
"""Side of drawn pixels where there is no store."""

CARD_HEADING = "## Speed"


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """What is measured, and how."""

    store: Path | None = None
    patches: int = 256
    batch_size: int = 32
    threads: int | None = None
    teacher: bool = True
    trust_code: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one encoder costs in one runtime."""

    name: str
    runtime: str
    """torch, or the runtime of an exported folder; with its precision, as in int8+onnx."""
    failed: str = ""
    """Why nothing was measured; empty where it was."""
    start_s: float | None = None
    """From the start of a process to the first features: programs loaded, network opened, one batch encoded."""
    patch_ms: float | None = None
    """Of encoding, a patch; the median of several batches."""
    patches_per_s: float | None = None
    memory_bytes: int | None = None
    """The largest resident memory of the process."""
    disk_bytes: int | None = None
    """Of the network's files."""
    joules: float | None = None
    """Of the processor, a patch; None where the machine does not count it."""
    slides_per_h: float | None = None
    first_slide_s: float | None = None
    """From the start of a process to the features of the store's slide of median size, reading included."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All rows, and what they are of."""

    run: str
    rows: tuple[Cost, ...]
    patches: int
    pixels: str
    """Where the pixels came from, in words."""
    threads: int
    slides: int
    patches_a_slide: float | None
    """Mean of the store's slides; None without a store."""
    read_ms: float | None
    """Of reading a patch from its slide, in one thread."""
    energy: str
    """How energy was counted, or why not."""


@dataclass(frozen=True, kw_only=True)
class _Pixels:
    """Patches to encode, and what the store says of slides."""

    pixels: np.ndarray
    words: str
    read_s: float | None = None
    counts: tuple[int, ...] = ()


def run_measure(run: Path, settings: MeasureSettings, *, card: bool = False) -> Measured:
    """Measure the student of a run in every runtime that is installed, and its teacher where that can run.

    Exported folders RUN-onnx, RUN-openvino and RUN-onnx-int8 beside the run are measured as they are; float32 forms
    that are not there are made in a temporary folder.

    Args:
        run: The run folder.
        settings: What is measured.
        card: Whether the table goes into the student's README.md, and into the run folder for reports.

    Raises:
        G2LError: The run or the store cannot be used.
    """
    student = with_trusted_code(run_encoder(run), settings.trust_code)
    record = read_student_record(run / "student" / "encoder.json")
    pixels = _pixels(settings)
    with ExitStack() as stack:
        aside = Path(stack.enter_context(TemporaryDirectory(prefix="g2l-measure-")))
        np.save(aside / "pixels.npy", pixels.pixels)
        rows = [_cost(spec, name, aside, settings, pixels) for name, spec in _candidates(run, student, aside, settings)]
    found = Measured(
        run=run.resolve().name,
        rows=tuple(rows),
        patches=len(pixels.pixels),
        pixels=pixels.words,
        threads=_threads(settings),
        slides=len(pixels.counts),
        patches_a_slide=float(np.mean(pixels.counts)) if pixels.counts else None,
        read_ms=None if pixels.read_s is None else 1e3 * pixels.read_s,
        energy=EnergyMeter().words,
    )
    if card:
        _write_card(run / "student" / "README.md", found)
        write_json(run / MEASURED, {"weights_digest": record["weights_digest"], **measure_json(found)})
    return found


def _threads(settings: MeasureSettings) -> int:
    import torch

    return settings.threads or torch.get_num_threads()


# -- what is encoded --------------------------------------------------------------------------------------


def _pixels(settings: MeasureSettings) -> _Pixels:
    """Patches of the store, of all slides alike; else noise, for which networks take as long."""
    if settings.store is None:
        shape = (settings.patches, VIEW_PX, VIEW_PX, 3)
        drawn = keyed_generator("measure").integers(0, 256, shape, dtype=np.uint8)
        return _Pixels(pixels=drawn, words="random pixels, as no --store was given")
    store = FeatureStore.open(settings.store)
    good = {slide.slide_id: good_rows(slide) for slide in store.slides()}
    good = {name: rows for name, rows in good.items() if len(rows)}
    if not good:
        raise UsageError(f"{settings.store} has no patch to measure with")
    share = -(-settings.patches // len(good))
    begin = perf_counter()
    chosen = {name: rows[:share] for name, rows in good.items()}
    pixels: Rgb = read_held_out(store, chosen, (), limit=settings.patches, seed=0).pixels
    return _Pixels(
        pixels=pixels,
        words=f"patches of {len(good):,} slides of {settings.store.name}",
        read_s=(perf_counter() - begin) / len(pixels),
        counts=tuple(map(len, good.values())),
    )


def _candidates(
    run: Path, student: EncoderSpec, aside: Path, settings: MeasureSettings
) -> Iterator[tuple[str, EncoderSpec | str]]:
    """What is to be measured, by name; in place of a spec, why it cannot be."""
    from g2l_core.encoders.runtimes import installed_runtimes
    from g2l_core.encoders.student_export import FORMS, export_student

    yield student.name, student
    for form, facts in FORMS.items():
        folder = run.resolve().with_name(f"{run.resolve().name}-{form}")
        if not facts.runtime:
            continue
        if facts.runtime not in installed_runtimes():
            if facts.precision == "fp32":
                yield folder.name, f'{RUNTIMES[facts.runtime]} is not installed: pip install "g2l[{facts.runtime}]"'
        elif is_export_folder(str(folder)):
            yield folder.name, _of_run(folder, run)
        elif facts.precision == "fp32":
            say(f"making {form}, as there is no {folder}")
            try:
                export_student(run, form, aside / folder.name, settings.trust_code)
                yield folder.name, export_encoder(aside / folder.name)
            except G2LError as error:
                yield folder.name, str(error)
    if settings.teacher:
        facts_of_teacher = read_run(run).teacher
        try:
            spec = spec_from_json(facts_of_teacher.to_json(), str(run / "run.json"))
            yield f"teacher {facts_of_teacher.name}", with_trusted_code(spec, settings.trust_code)
        except (G2LError, TypeError, KeyError, ValueError) as error:
            yield f"teacher {facts_of_teacher.name}", f"G2L cannot build it: {error}"


def _of_run(folder: Path, run: Path) -> EncoderSpec | str:
    """The exported folder as an encoder, or why it is none of this run."""
    try:
        ours = read_student_record(run / "student" / "encoder.json")["weights_digest"]
        if read_export_record(folder)["student_weights_digest"] != ours:
            return f"{folder} was exported from another student; export it again"
        return export_encoder(folder)
    except G2LError as error:
        return str(error)


# -- measuring --------------------------------------------------------------------------------------------


def _cost(spec: EncoderSpec | str, name: str, aside: Path, settings: MeasureSettings, pixels: _Pixels) -> Cost:
    if isinstance(spec, str):
        return Cost(name=name, runtime="", failed=spec)
    runtime = spec.card_precision if spec.is_export else "fp32, torch"
    say(f"measuring {name}")
    begin = perf_counter()
    try:
        with _own_process() as process:
            job = process.submit(_measure_one, spec, aside / "pixels.npy", settings.batch_size, settings.threads)
            found = job.result()
    except BrokenProcessPool:
        return Cost(name=name, runtime=runtime, failed="its process was ended, most likely for want of memory")
    if isinstance(found, str):
        return Cost(name=name, runtime=runtime, failed=found)
    start = found["ready"] - begin  # one clock for all processes of a machine
    pace = found["patch_s"] + (pixels.read_s or 0.0) / _threads(settings)  # reading and encoding share the cores
    median = float(np.median(pixels.counts)) if pixels.counts else None
    return Cost(
        name=name,
        runtime=runtime,
        start_s=start,
        patch_ms=1e3 * found["patch_s"],
        patches_per_s=1 / found["patch_s"],
        memory_bytes=found["memory"],
        disk_bytes=_disk_bytes(spec),
        joules=found["joules"],
        slides_per_h=None if not pixels.counts else 3600 / (float(np.mean(pixels.counts)) * pace),
        first_slide_s=None if median is None else start + median * pace,
    )


@contextmanager
def _own_process() -> Iterator[ProcessPoolExecutor]:
    """A process that begins as a new program does, with nothing loaded."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def _measure_one(spec: EncoderSpec, pixels_file: Path, batch_size: int, threads: int | None) -> dict[str, Any] | str:
    """Load and encode in this process; the reason if it cannot be done."""
    import torch

    from g2l_core.encoders.loading import encode, load_encoder

    if threads:
        torch.set_num_threads(threads)
    pixels = np.load(pixels_file)
    batches = [pixels[start : start + batch_size] for start in range(0, len(pixels), batch_size)]
    batches = [batch for batch in batches if len(batch) == batch_size] or batches
    try:
        encoder = load_encoder(spec, device="cpu", precision="auto" if spec.is_export else "fp32")
        encode(encoder, batches[0])
        ready = perf_counter()
        meter, seconds = EnergyMeter(), list[float]()
        for batch in batches:
            begin = perf_counter()
            encode(encoder, batch)
            seconds.append((perf_counter() - begin) / len(batch))
        joules = meter.joules()
    except G2LError as error:
        return str(error)
    return {
        "ready": ready,
        "patch_s": float(np.median(seconds)),
        "memory": _largest_memory(),
        "joules": None if joules is None else joules / sum(map(len, batches)),
    }


def _largest_memory() -> int:
    """The most bytes that this process has held. What `resource` says on Linux can be of the process before it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _disk_bytes(spec: EncoderSpec) -> int | None:
    """Bytes of the network's files; None of networks without any."""
    from g2l_core.encoders.weights import weights_file

    if spec.source.kind in {"random", "module"}:
        return None
    try:
        files = network_files(Path(spec.source.where)) if spec.is_export else shards_of(weights_file(spec))
        return sum(file.stat().st_size for file in files)
    except (G2LError, OSError):
        return None


# -- printing ---------------------------------------------------------------------------------------------


def measure_json(found: Measured) -> dict[str, Any]:
    """Everything as plain values."""
    return {**asdict(found), "rows": [asdict(row) for row in found.rows]}


_COLUMNS: Mapping[str, str] = {
    "patches_per_s": "patches/s",
    "slides_per_h": "slides/h",
    "first_slide_s": "first slide, s",
    "start_s": "start, s",
    "memory_bytes": "memory",
    "disk_bytes": "on disk",
    "joules": "J a patch",
}


def measure_rows(found: Measured) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Titles and cells of the table; a column that no row has a value for is left out."""
    measured = [row for row in found.rows if not row.failed]
    shown = [field for field in _COLUMNS if any(getattr(row, field) is not None for row in measured)]
    header = ("encoder", "computes in", *(_COLUMNS[field] for field in shown))
    return header, [(row.name, row.runtime, *(_cell(row, field) for field in shown)) for row in measured]


def _cell(row: Cost, field: str) -> str:
    value = getattr(row, field)
    if value is None:
        return ""
    if field.endswith("_bytes"):
        return bytes_text(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def measure_text(found: Measured) -> str:
    """The table for people, and what it was measured on."""
    header, cells = measure_rows(found)
    lines = [table_text(cells, header=header, right=range(2, len(header)), width=120)] if cells else []
    lines += [f"not measured  {row.name}: {row.failed}" for row in found.rows if row.failed]
    return "\n".join([*lines, *_words(found)])


def _words(found: Measured) -> Sequence[str]:
    reading = "" if found.read_ms is None else f", read in {found.read_ms:.1f} ms a patch in one thread"
    lines = [f"on {found.patches:,} {found.pixels}{reading}; {found.threads} thread{'s' * (found.threads > 1)}, CPU"]
    if found.patches_a_slide is not None:
        lines.append(f"slides: {found.slides:,} of {found.patches_a_slide:,.0f} patches on average, reading included")
    return [*lines, f"energy: {found.energy}"]


def _write_card(path: Path, found: Measured) -> None:
    """Put the table into the model card, in place of the one that was there."""
    header, cells = measure_rows(found)
    table = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *cells)]
    before = path.read_text(encoding="utf-8").partition(f"\n{CARD_HEADING}\n")[0].rstrip("\n")
    words = [f"{line[0].upper()}{line[1:]}." for line in _words(found)]
    write_text(path, "\n".join([before, "", CARD_HEADING, "", *table, "", *words, ""]))
