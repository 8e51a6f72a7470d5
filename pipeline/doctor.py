"""Whether this machine can do the work, and what to do where it cannot: behind `g2l doctor`."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from g2l_core.errors import EncoderError, G2LError
from g2l_core.version import __version__

OK, ADVICE, BROKEN, UNCHECKED = "ok", "advice", "broken", "not checked"

WANTED_MEMORY_GB, WANTED_DISK_MB_S, WANTED_FREE_GB = 8.0, 50.0, 20.0
"""Below these stage one is slow or stops: its pool of batches and one slide's tiles take 2 to 4 GB beside a network; a
student of 6 M parameters reads 100 patches/s, 10 to 20 MB/s; 100 slides of 10,000 patches with 1,536 features are 3 GB
a view."""

DISK_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    area: str
    """versions, torch, GPU, slides, hub, disk, memory or self-test."""
    what: str
    status: str
    """`OK`, `ADVICE`, `BROKEN` or `UNCHECKED`."""
    remedy: str = ""
    """What to do; empty where all is well."""


def examine(folder: Path, *, hub: bool = True) -> tuple[Finding, ...]:
    """Look at everything, one after the other.

    Args:
        folder: Where stores will be.
        hub: Whether the model hub is asked.
    """
    parts: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": versions,
        "torch": torch_build,
        "GPU": gpu,
        "slides": slide_formats,
        "hub": lambda: hub_access(ask=hub),
        "disk": lambda: disk(folder),
        "memory": memory,
        "self-test": self_test,
    }
    found = list[Finding]()
    for area, look in parts.items():
        try:
            found += look()
        except Exception as error:  # noqa: BLE001  a doctor names what breaks, whatever it is, and goes on
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            remedy = "reinstall G2L into a fresh environment: pip install g2l"
            found.append(Finding(area=area, what=what, status=BROKEN, remedy=remedy))
    return tuple(found)


def is_broken(findings: Sequence[Finding]) -> bool:
    """Whether something does not work at all."""
    return any(finding.status == BROKEN for finding in findings)


# -- programs ---------------------------------------------------------------------------------------------


def versions() -> Iterator[Finding]:
    """Every package that G2L declares: there, and of a version that fits; then the extras."""
    python = f"g2l {__version__}, Python {platform.python_version()}, {platform.platform()}"
    old = sys.version_info < (3, 11)
    yield Finding(
        area="versions", what=python, status=BROKEN if old else OK, remedy="install Python 3.11" if old else ""
    )
    try:
        declared = requires("g2l") or []
    except PackageNotFoundError:
        remedy = "install it to have its packages checked: pip install ."
        yield Finding(area="versions", what="g2l runs from a folder, uninstalled", status=UNCHECKED, remedy=remedy)
        return
    yield from _requirements(declared)


def _requirements(declared: Sequence[str]) -> Iterator[Finding]:
    """Judge requirements as pip writes them, those of extras together."""
    from packaging.requirements import Requirement

    wrong, fine, absent = list[str](), 0, dict[str, list[str]]()
    for requirement in map(Requirement, declared):
        extra = str(requirement.marker).rpartition("extra == ")[2].strip("\"'") if requirement.marker else ""
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        there = _version(requirement.name)
        if there is not None and requirement.specifier.contains(there, prereleases=True):
            fine += not extra
        elif extra in RUN_EXTRAS:
            absent.setdefault(extra, []).append(requirement.name)
        elif not extra:
            wrong.append(f"{requirement.name}{requirement.specifier} (here: {there or 'absent'})")
    yield Finding(area="versions", what=f"{fine} packages fit", status=OK)
    if wrong:
        command = "pip install " + " ".join(f"'{name.partition(' ')[0]}'" for name in wrong)
        yield Finding(area="versions", what=f"do not fit: {', '.join(wrong)}", status=BROKEN, remedy=command)
    for extra, names in absent.items():
        what = f"{RUN_EXTRAS[extra]} is not possible: {', '.join(names)} is absent"
        yield Finding(area="versions", what=what, status=ADVICE, remedy=f'if wanted: pip install "g2l[{extra}]"')


RUN_EXTRAS = {
    "onnx": "exporting to and running ONNX",
    "openvino": "exporting to and running OpenVINO",
    "cluster": "sharing the work over processes and machines",
}
"""What the extras are for that decide how work runs."""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def torch_build() -> Iterator[Finding]:
    """The build of torch and its threads, and whether timm can be imported with it."""
    import torch

    from g2l_core.encoders.timm_compat import import_timm

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    import_timm()
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    beside = f"{threads} thread{'s' * (threads > 1)} on {cores or os.cpu_count()} cores"
    what = f"torch {torch.__version__} ({build}), {beside}"
    few = threads < cores
    remedy = f"unset OMP_NUM_THREADS, or set it to {cores}" if few and "OMP_NUM_THREADS" in os.environ else ""
    remedy = remedy or (f"set OMP_NUM_THREADS={cores}" if few else "")
    yield Finding(area="torch", what=what, status=ADVICE if remedy else OK, remedy=remedy)


def gpu() -> Iterator[Finding]:
    """The GPUs that torch sees; or a driver that it does not."""
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            name, total = torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory
            torch.ones(1, device=f"cuda:{i}").add_(1).cpu()
            yield Finding(area="GPU", what=f"{name}, {total / 1e9:.0f} GB", status=OK)
    elif Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        reason = "this torch is built for the CPU" if not torch.version.cuda else "torch cannot use it"
        remedy = "install a CUDA build of torch that fits the driver (pytorch.org, Get started)"
        yield Finding(area="GPU", what=f"there is an NVIDIA driver, but {reason}", status=ADVICE, remedy=remedy)
    else:
        remedy = "a student runs on the CPU; a giga-scale teacher (g2l cache-teacher) wants a GPU"
        yield Finding(area="GPU", what="none", status=OK, remedy=remedy)


def slide_formats() -> Iterator[Finding]:
    """OpenSlide's version, the suffixes that are taken for slides, and the decoders of TIFF tiles."""
    import openslide

    from g2l_core.slides.readers import slide_suffixes

    suffixes = ", ".join(sorted(suffix.lstrip(".") for suffix in slide_suffixes()))
    what = f"OpenSlide {openslide.__library_version__}: {suffixes}"
    yield Finding(area="slides", what=what, status=OK)
    import imagecodecs

    decoders = {"JPEG": "JPEG8", "JPEG 2000": "JPEG2K", "LZW": "LZW", "Deflate": "ZLIB", "WebP": "WEBP", "Zstd": "ZSTD"}
    absent = [name for name, codec in decoders.items() if not getattr(imagecodecs, codec).available]
    fine = f"TIFF tiles in {', '.join(name for name in decoders if name not in absent)}"
    yield Finding(area="slides", what=fine, status=OK)
    if absent:
        what = f"no decoder for {', '.join(absent)}"
        yield Finding(area="slides", what=what, status=BROKEN, remedy="pip install --force-reinstall imagecodecs")


# -- the hub ----------------------------------------------------------------------------------------------


def hub_access(*, ask: bool) -> Iterator[Finding]:
    """The login at the hub, and access to the weights of every known encoder."""
    from huggingface_hub import constants, get_token

    from g2l_core.encoders.registry import TABLE
    from g2l_core.encoders.weights import is_cached

    names = {name: spec for name, spec in TABLE.items() if spec.source.kind == "hub"}
    cached = [name for name, spec in names.items() if is_cached(spec)]
    if cached:
        yield Finding(area="hub", what=f"on this machine already: {', '.join(cached)}", status=OK)
    if not ask or constants.HF_HUB_OFFLINE:
        why = "--no-hub" if not ask else "HF_HUB_OFFLINE is set"
        yield Finding(
            area="hub",
            what=f"login and access to {len(names) - len(cached)} models: {why}",
            status=UNCHECKED,
            remedy="carry weights over as files (--weights FILE), or run doctor where the hub is reached",
        )
        return
    token = get_token()
    yield from _login(token)
    left = {name: spec for name, spec in names.items() if name not in cached}
    yield from _access(left)


def _login(token: str | None) -> Iterator[Finding]:
    from huggingface_hub import errors, whoami

    if not token:
        remedy = "for gated models: hf auth login, or set HF_TOKEN"
        yield Finding(area="hub", what="no token", status=ADVICE, remedy=remedy)
        return
    try:
        yield Finding(area="hub", what=f"logged in as {whoami(token)['name']}", status=OK)
    except errors.HfHubHTTPError as error:
        if error.response.status_code in {401, 403}:
            yield Finding(
                area="hub", what="the token is not valid", status=ADVICE, remedy="hf auth login with a new one"
            )
        else:
            yield Finding(area="hub", what=f"login: the hub answers {error.response.status_code}", status=UNCHECKED)
    except OSError:
        yield Finding(area="hub", what="login: the hub cannot be reached", status=UNCHECKED)


def _access(left: dict[str, Any]) -> Iterator[Finding]:
    """Ask for the metadata of each model's weights; where the hub does not answer at all, once is enough."""
    from g2l_core.encoders.weights import hub_etag

    reached, refused = list[str](), dict[str, str]()
    for name, spec in left.items():
        try:
            hub_etag(spec)
            reached.append(name)
        except EncoderError as error:
            if "the hub cannot be reached" in str(error) and not reached and not refused:
                what = f"access to {len(left)} models: the hub cannot be reached"
                remedy = "carry weights over as files (--weights FILE), or set HTTPS_PROXY or HF_ENDPOINT"
                yield Finding(area="hub", what=what, status=UNCHECKED, remedy=remedy)
                return
            refused[name] = str(error).removeprefix(f"{spec.name}: ")
    if reached:
        yield Finding(area="hub", what=f"access to {', '.join(reached)}", status=OK)
    for name, reason in refused.items():
        what, _, remedy = reason.partition(". ")
        yield Finding(area="hub", what=f"{name}: {what}", status=ADVICE, remedy=remedy or "see g2l models")


# -- the machine ------------------------------------------------------------------------------------------


def disk(folder: Path) -> Iterator[Finding]:
    """Free space, and the speed of writing and of reading back."""
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    low = free < 1e9 * WANTED_FREE_GB
    yield Finding(
        area="disk",
        what=f"{existing}: {free / 1e9:,.0f} GB free",
        status=ADVICE if low else OK,
        remedy=f"free {WANTED_FREE_GB:.0f} GB, or keep stores on another disk; g2l plan says what yours needs"
        if low
        else "",
    )
    try:
        with TemporaryDirectory(prefix=".g2l-doctor-", dir=existing) as aside:
            write, read = _disk_speed(Path(aside) / "block")
    except OSError as error:
        what = f"{existing} cannot be written to: {error.strerror}"
        yield Finding(area="disk", what=what, status=BROKEN, remedy="give --folder where stores may be written")
        return
    slow = write < WANTED_DISK_MB_S
    yield Finding(
        area="disk",
        what=f"writes {write:,.0f} MB/s, synced; reads {read:,.0f} MB/s, cached",
        status=ADVICE if slow else OK,
        remedy="keep stores on a local disk, and copy slides there ahead (--stage-dir)" if slow else "",
    )


def _disk_speed(path: Path) -> tuple[float, float]:
    """MB/s of writing and of reading `DISK_BYTES`."""
    block = os.urandom(DISK_BYTES)
    begin = perf_counter()
    with path.open("wb") as file:
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
    written = perf_counter()
    path.read_bytes()
    return DISK_BYTES / 1e6 / (written - begin), DISK_BYTES / 1e6 / (perf_counter() - written)


def memory() -> Iterator[Finding]:
    """What this machine, or the container, lets a process have."""
    limits = [size for size in (_machine_memory(), _container_memory()) if size]
    if not limits:
        yield Finding(area="memory", what="this system does not say how much there is", status=UNCHECKED)
        return
    gb = min(limits) / 1e9
    low = gb < WANTED_MEMORY_GB
    remedy = f"{WANTED_MEMORY_GB:.0f} GB are wanted; else use smaller --batch-size and --workers 1" if low else ""
    yield Finding(area="memory", what=f"{gb:,.1f} GB", status=ADVICE if low else OK, remedy=remedy)


def _machine_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _container_memory() -> int:
    """The limit of a control group, version 2 or 1; 0 where there is none."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text(encoding="ascii"))
        except (OSError, ValueError):  # "max" is no number
            continue
    return 0


def self_test() -> Iterator[Finding]:
    """Stage one on one drawn slide with a tiny encoder: read, tile, encode, store, read back."""
    import numpy as np

    from g2l_core.encoders.resolve import resolve_encoder
    from g2l_core.patches.grid import GridSpec
    from g2l_core.patches.views import ViewSpec
    from g2l_core.store.features import FeatureStore
    from g2l_core.synthetic.cohort import CohortSpec, draw_slide, write_pyramid
    from pipeline.cache_teacher import run_extraction
    from pipeline.settings import ExtractionSettings

    begin = perf_counter()
    try:
        with TemporaryDirectory(prefix="g2l-doctor-") as aside:
            cohort, slide = CohortSpec(size_um=(768.0, 768.0)), Path(aside) / "drawn.tif"
            write_pyramid(slide, draw_slide(cohort, 0)[0], mpp=cohort.mpp[0])
            spec = resolve_encoder("timm:mobilenetv3_small_050@64", weights="random:0")
            settings = ExtractionSettings(views=0, pictures=False, batch_size=16)
            summary = run_extraction([slide], Path(aside) / "s.zarr", [spec], GridSpec(), ViewSpec(), settings)
            if not summary.is_complete or not summary.patches:
                raise EncoderError(f"stage one lost something: {summary.failed_slides or summary.unreadable or 'all'}")
            store = FeatureStore.open(Path(aside) / "s.zarr")
            for stored in store.slides():
                if not np.isfinite(stored.features(summary.encoders[0])).all():
                    raise EncoderError("features are not finite")
    except G2LError as error:
        yield Finding(
            area="self-test", what=str(error), status=BROKEN, remedy="g2l --debug doctor; report what it says"
        )
        return
    seconds = perf_counter() - begin
    what = f"{summary.patches} patches of a drawn slide through stage one in {seconds:.1f} s"
    yield Finding(area="self-test", what=what, status=OK)


# -- printing ---------------------------------------------------------------------------------------------


def findings_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Everything as plain values."""
    return {"broken": is_broken(findings), "findings": [asdict(finding) for finding in findings]}


def findings_text(findings: Sequence[Finding]) -> str:
    """A line for each finding, and its remedy below it."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:12}{finding.area:10}{finding.what}")
        if finding.remedy:
            lines.append(f"{'':22}-> {finding.remedy}")
    broken = sum(finding.status == BROKEN for finding in findings)
    return "\n".join([*lines, f"{broken} broken" if broken else "nothing is broken"])
