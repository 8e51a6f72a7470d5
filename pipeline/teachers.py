"""The teachers of a distillation: where their targets come from, which loss and weight each has, and their terms."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from g2l_core.distillation.distiller import HeadLayout
from g2l_core.distillation.distributed import ProcessGroup
from g2l_core.distillation.held_out import HeldOutSet
from g2l_core.distillation.joint import Balance, JointObjective
from g2l_core.distillation.objective import Objective, TargetStatistics
from g2l_core.distillation.robustness import RobustObjective
from g2l_core.distillation.spec import ObjectiveSpec, RobustnessSpec, TrainSettings
from g2l_core.encoders.loading import LoadedEncoder, encode_all, features_of, load_encoder
from g2l_core.encoders.resolve import EncoderSpec, find_stored
from g2l_core.encoders.spec import STORED_LICENSE
from g2l_core.encoders.terms import Source
from g2l_core.errors import ReadError, StoreMissingError, UnknownNameError, UsageError
from g2l_core.patches.spec import ViewSpec
from g2l_core.store.facts import EncoderFacts
from g2l_core.store.features import FeatureStore, StoredSlide
from pipeline.settings import CANONICAL, DistillSettings

AnyValue = TypeVar("AnyValue")

FEWEST_HELD_OUT = 4
"""Debiased CKA needs so many patches."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Where targets come from: a store's features, or a network that runs live."""

    facts: EncoderFacts
    key: str | None = None
    """The teacher's key in the store; None where it runs live."""
    live: LoadedEncoder | None = None
    asked: str = ""
    """How the user named it."""

    @property
    def name(self) -> str:
        """How a student's record names its teacher."""
        return self.key or f"{self.column}, run live"

    @property
    def column(self) -> str:
        """How logs name it."""
        return self.key or (self.live.key if self.live else "")


Teachers = tuple[Teacher, ...]


def open_teachers(
    store: FeatureStore, asked: Sequence[str | EncoderSpec], settings: DistillSettings, group: ProcessGroup
) -> Teachers:
    """The teachers that a user names, stored or loaded.

    Raises:
        UsageError: There is none, one is named twice, or settings for several are given with one.
        UnknownNameError: One is not stored.
    """
    teachers = tuple(_open_teacher(store, one, settings, group) for one in asked)
    if not teachers:
        raise UsageError("expected a teacher: give --teacher")
    columns = [teacher.column for teacher in teachers]
    if twice := [teacher for teacher in teachers if columns.count(teacher.column) > 1]:
        raise UsageError(
            f"--teacher {' and --teacher '.join(t.asked for t in twice)} are both {twice[0].column}: name each once"
        )
    several = settings.train.teachers
    given = {"--teacher-weight": several.weights, "--balance": several.balance != "fixed",
             "--missing-targets": several.missing != "refuse"}  # fmt: skip
    if len(teachers) == 1 and (unused := [name for name, value in given.items() if value]):
        raise UsageError(
            f"{unused[0]} is for several teachers, and there is one: give more with --teacher, or leave it out"
        )
    return teachers


def _open_teacher(
    store: FeatureStore, teacher: str | EncoderSpec, settings: DistillSettings, group: ProcessGroup
) -> Teacher:
    if not settings.online:
        asked = teacher.name if isinstance(teacher, EncoderSpec) else teacher
        key = find_stored(asked, store.encoders)
        return Teacher(facts=store.encoders[key], key=key, asked=asked)
    if not isinstance(teacher, EncoderSpec):
        raise UsageError("a live teacher is given by its spec")
    stored = (facts.precision for facts in store.encoders.values() if facts.name == teacher.name)
    live = load_encoder(teacher, device=str(group.device), precision=next(stored, "auto"))
    return Teacher(facts=replace(live.facts, extra={**live.facts.extra, "online": True}), live=live, asked=teacher.name)


def stored_keys(teachers: Teachers) -> tuple[str, ...]:
    """The keys of those whose features are stored."""
    return tuple(teacher.key for teacher in teachers if teacher.key is not None)


def _of_teacher(text: str, teachers: Teachers, option: str) -> Teacher:
    """The teacher that a user means in an option.

    Raises:
        UnknownNameError: None of this run's.
    """
    for teacher in teachers:
        if text in {teacher.asked, teacher.column}:
            return teacher
    by_key = {teacher.column: teacher for teacher in teachers}
    try:
        return by_key[find_stored(text, {key: teacher.facts for key, teacher in by_key.items()})]
    except UnknownNameError:
        raise UnknownNameError(f"teacher in {option}", text, by_key, "It names none of this run's.") from None


def objective_of_each(spec: ObjectiveSpec, teachers: Teachers) -> tuple[ObjectiveSpec, ...]:
    """The objective of each teacher.

    Raises:
        UsageError: A teacher has two losses or none.
        UnknownNameError: A loss is for none of the teachers.
    """
    if not spec.is_of_several:
        return (spec,) * len(teachers)
    named, rest = spec.losses_by_teacher()
    found = _by_column(named, teachers, "--loss")
    if rest is None and (without := [t.column for t in teachers if t.column not in found]):
        raise UsageError(f"--loss {spec.loss} gives {without[0]} none: name it, or put a loss for all others first")
    return tuple(spec.with_loss(found.get(teacher.column, rest or "")) for teacher in teachers)


def weights_of(settings: TrainSettings, teachers: Teachers) -> tuple[float, ...]:
    """The weight of each teacher's loss.

    Raises:
        UnknownNameError: A weight is for none of the teachers.
    """
    found = _by_column(settings.teachers.weight_by_teacher(), teachers, "--teacher-weight")
    return tuple(found.get(teacher.column, 1.0) for teacher in teachers)


def _by_column(named: Mapping[str, AnyValue], teachers: Teachers, option: str) -> dict[str, AnyValue]:
    found: dict[str, AnyValue] = {}
    for text, value in named.items():
        column = _of_teacher(text, teachers, option).column
        if column in found:
            raise UsageError(f"{option} names {column} twice: leave one out")
        found[column] = value
    return found


def build_objective(
    settings: TrainSettings,
    teachers: Teachers,
    layout: HeadLayout,
    statistics: Mapping[str, TargetStatistics],
    group: ProcessGroup,
) -> Objective | JointObjective | RobustObjective:
    """What the run minimizes: one teacher's loss as it is, or a joint one; with further terms where they are asked."""
    specs = objective_of_each(settings.objective, teachers)
    objectives = [
        Objective(spec, statistics.get(teacher.column), group) for spec, teacher in zip(specs, teachers, strict=True)
    ]
    terms = settings.robustness
    if layout.is_single:
        return objectives[0] if terms == RobustnessSpec() else RobustObjective(objectives[0], terms, group)
    balance = Balance(
        kind=settings.teachers.balance,
        weights=weights_of(settings, teachers),
        masked=settings.teachers.missing == "mask",
    )
    joint = JointObjective(layout, objectives, balance, group)
    return joint if terms == RobustnessSpec() else RobustObjective(joint, terms, group)


def replayed_views(
    store: FeatureStore, slides: Sequence[StoredSlide], teachers: Teachers, settings: DistillSettings
) -> int | None:
    """Number of augmented views to replay; None for the canonical view alone.

    Raises:
        StoreMissingError: A teacher has none, or fewer than the settings want, or lacks slides.
        ReadError: Slides were imported without their files.
        UsageError: Teachers have different numbers of views, and the settings say none.
    """
    _require_files(slides)
    keys, views = stored_keys(teachers), settings.views
    if isinstance(views, str):
        return None
    if not keys:
        stored = min(slide.n_views for slide in slides) - 1
        return stored if views is None else views
    there = {key: _with_features(key, slides, teachers, settings) for key in keys}
    stored_views = {key: min(slide.feature_facts(key).n_views for slide in there[key]) - 1 for key in keys}
    if views is None and len(set(stored_views.values())) > 1:
        words = " and ".join(f"{count} of {key}" for key, count in stored_views.items())
        fewest = max(1, min(stored_views.values()))
        raise UsageError(
            f"{store.path} has different numbers of augmented views, {words}: give --views {fewest}, or run "
            "g2l cache-teacher for the others"
        )
    wanted = views or max(min(stored_views.values()), 1)
    for key, stored in stored_views.items():
        _require_views(store, key, stored, wanted)
    return wanted


def paired_views(store: FeatureStore, views: int | None, settings: DistillSettings) -> int:
    """Number of augmented views to replay where each is shown with the one that differs from it only in stain.

    Two views of a patch differ only in stain if all their stored parameters are equal but those of the stain jitter:
    views 1 and 2, 3 and 4, and so on, where the store's views have it.

    Args:
        store: The store.
        views: What `replayed_views` has found.
        settings: What was asked.

    Raises:
        StoreMissingError: The store's views have no stain jitter, or there is no whole pair.
        UsageError: A number was asked for that is no number of pairs, or the canonical view alone.
    """
    if not ViewSpec.from_json(store.views).stain_jitter:
        raise StoreMissingError(
            f"--stain-weight compares views that differ only in stain, and {store.path} has none, nor can --online "
            "draw any for it: make another store with g2l cache-teacher --stain-jitter 0.05"
        )
    if views is None:
        raise UsageError(f"--stain-weight compares augmented views, and --views {CANONICAL} shows none: leave one out")
    if settings.views is not None and views % 2:
        raise UsageError(
            f"--stain-weight compares views 1 and 2, 3 and 4, ...: expected an even --views, not {settings.views}"
        )
    if views == 1:
        raise StoreMissingError(
            f"{store.path} has 1 augmented view, and --stain-weight compares it with the next: run g2l cache-teacher "
            "with --views 2"
        )
    return views - views % 2


def _with_features(
    key: str, slides: Sequence[StoredSlide], teachers: Teachers, settings: DistillSettings
) -> Sequence[StoredSlide]:
    """The slides that have features of a teacher. With one teacher, others are refused where they are read."""
    there = [slide for slide in slides if key in slide.facts.features]
    if len(teachers) == 1:
        return slides
    if settings.train.teachers.missing == "refuse" and len(there) < len(slides):
        without = next(slide.slide_id for slide in slides if key not in slide.facts.features)
        raise StoreMissingError(
            f"{len(slides) - len(there):,} of {len(slides):,} slides have no features of {key}, such as {without}: run "
            "g2l cache-teacher for them, leave them out with --where, or mask that teacher's loss there with "
            "--missing-targets mask"
        )
    if not there:
        raise StoreMissingError(f"none of the {len(slides):,} slides has features of {key}: run g2l cache-teacher")
    return there


def _require_views(store: FeatureStore, key: str, stored: int, wanted: int) -> None:
    if stored < wanted and store.encoders[key].imported:
        raise StoreMissingError(
            f"{key} was imported, and an import has only the canonical view: --views {CANONICAL} distills from that "
            "one. For augmented ones, run g2l cache-teacher with the slides, or g2l distill --online"
        )
    if stored < wanted:
        there = f"{stored} augmented views, not {wanted}," if stored else "only the canonical view"
        raise StoreMissingError(
            f"{store.path} has {there} of {key}: run g2l cache-teacher with --views {max(wanted, 2)}, or distill "
            f"from the canonical view alone with --views {CANONICAL}"
        )


def _require_files(slides: Sequence[StoredSlide]) -> None:
    """Refuse slides that were imported without file or scale: nobody can show their pixels to a student."""
    unscaled = [slide.slide_id for slide in slides if slide.facts.kind == "slide" and not slide.facts.mpp]
    lacking = [slide.slide_id for slide in slides if not slide.facts.fingerprint]
    if unscaled and not lacking:
        raise ReadError(
            f"the um/px of {len(unscaled):,} of {len(slides):,} slides is not known, such as {unscaled[0]}: run g2l "
            "store import again with --slides FOLDER and --mpp-override, or a --manifest with mpp, into the same store"
        )
    if lacking:
        raise ReadError(
            f"{len(lacking):,} of {len(slides):,} slides were imported without their files, such as {lacking[0]}: run "
            "g2l store import again with --slides FOLDER, into the same store, which finds them; or leave them out "
            "with --where"
        )


def doubts_of(teachers: Teachers) -> tuple[str, ...]:
    """What nobody knows about teachers that were imported and never compared with what their encoders give."""
    return tuple(
        f"the features of {teacher.column} were imported ({teacher.facts.imported}), "
        "and nobody has compared them with it"
        for teacher in teachers
        if not teacher.live and teacher.facts.imported and not teacher.facts.proof
    )


def with_live_targets(held_out: HeldOutSet, teachers: Teachers, batch_size: int) -> HeldOutSet:
    """Held-out patches with the features that live teachers give them; as they are where none runs live."""
    features = [encode_all(t.live, held_out.pixels, batch_size) for t in teachers if t.live is not None]
    return replace(held_out, targets=np.concatenate(features, axis=1).astype(np.float16)) if features else held_out


def require_held_out(held_out: HeldOutSet, layout: HeadLayout) -> None:
    """Refuse held-out patches of which too few have a teacher's features.

    Raises:
        StoreMissingError: Names the teacher.
    """
    first = 0
    for teacher, dim in zip(layout.teachers, layout.dims, strict=True):
        there = int((~np.isnan(held_out.targets[:, first])).sum())
        if there < FEWEST_HELD_OUT and len(layout.teachers) > 1:
            raise StoreMissingError(
                f"{there} held-out patches have features of {teacher}, and validation needs {FEWEST_HELD_OUT}: hold "
                "out others with --hold-out, or run g2l cache-teacher for them"
            )
        first += dim


def live_features(teachers: Teachers) -> Callable[[Tensor], Tensor] | None:
    """Gives live teachers' features of a batch on the device, rounded as a store keeps them; None without any."""
    live = [teacher.live for teacher in teachers if teacher.live is not None]
    if not live:
        return None
    return lambda pixels: torch.cat([features_of(one, pixels) for one in live], dim=1).half().float()


def sources_of(store: FeatureStore, slide_ids: Iterable[str], teachers: Teachers, student: EncoderSpec) -> list[Source]:
    """What a student is made from, with its terms: teachers, start and data. Random weights have none.

    The data's are what a column `license` (or `licence`) of the manifest says; slides without it are left out.
    """
    sources = [
        Source(what=f"the teacher {teacher.facts.name or teacher.column}", license=_terms(teacher.facts))
        for teacher in teachers
        if not teacher.facts.weights.startswith("random:")
    ]
    if not student.is_untrained:
        sources.append(Source(what=f"the start {student.name}", license=student.license))
    labels = (store.slide(slide_id).labels for slide_id in slide_ids)
    stated = {of_slide.get("license") or of_slide.get("licence") or "" for of_slide in labels}
    return sources + [Source(what="the slides", license=terms) for terms in sorted(stated) if terms]


def _terms(facts: EncoderFacts) -> str:
    return str(facts.extra.get(STORED_LICENSE) or facts.extra.get("license") or "unknown")
