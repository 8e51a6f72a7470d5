"""Students that differ in their seed alone count as one encoder: a mean over seeds, with an interval over both."""

import json
from collections.abc import Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from g2l_core.encoders.resolve import RUN_RECORD, is_run_folder
from g2l_core.errors import RunError, UsageError
from g2l_core.files import parse_json


def grouped_by_seed(texts: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Run folders that a pattern such as `run-*/` names, put together where only their seeds differ.

    Args:
        texts: Encoders as users write them, patterns among them.

    Returns:
        The name of each encoder with what it is the mean of: itself, or the run folders of several seeds.

    Raises:
        UsageError: No run folder fits a pattern, or two of equal settings have the same seed.
        RunError: A run folder's record cannot be read.
    """
    groups: list[tuple[str, list[str]]] = []
    for text in texts:
        if not has_magic(text):
            groups.append((text, [text]))
            continue
        pattern, plus, width = text.rpartition("+")
        if not (plus and width.isdecimal()):
            pattern, width = text, ""
        folders = fitting_runs(pattern)
        if not folders:
            raise UsageError(
                f"no folder of g2l distill fits {text!r}; a pattern names run folders, as in 'runs/seed-*'"
            )
        alike: dict[str, list[str]] = {}
        for folder in folders:
            alike.setdefault(_settings_but_seed(folder), []).append(folder)
        of_width = f"+{width}" if width else ""
        groups += [(_name(members) + of_width, [m + of_width for m in members]) for members in alike.values()]
    return groups


def fitting_runs(pattern: str) -> list[str]:
    """The run folders whose paths fit a pattern, sorted."""
    fitting = sorted(glob(pattern))  # noqa: PTH207 - Path.glob takes no absolute pattern
    return [folder for folder in fitting if is_run_folder(folder)]


def _name(folders: Sequence[str]) -> str:
    """The name of a group in reports; of one run, the folder."""
    if len(folders) == 1:
        return folders[0]
    seeds = [_record(folder)["settings"]["train"]["seed"] for folder in folders]
    if len(set(seeds)) < len(seeds):
        twice = [folder for folder, seed in zip(folders, seeds, strict=True) if seeds.count(seed) > 1]
        raise UsageError(
            f"these runs have equal settings and the same seed, so they are no repetitions: {', '.join(twice)}"
        )
    return f"{Path(folders[0]).name} ({len(folders)} seeds)"


def _record(folder: str) -> Mapping[str, Any]:
    path = Path(folder) / RUN_RECORD
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
        [record[name] for name in ("student", "teacher", "store")], record["settings"]["train"]["seed"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not what g2l distill wrote ({error}); restore it from a copy") from error
    return record


def _settings_but_seed(folder: str) -> str:
    """What decides a run, without its seed and that of a student's random start."""
    record = _record(folder)
    settings = {**record["settings"], "train": {**record["settings"]["train"], "seed": None}}
    student = {name: value for name, value in record["student"].items() if "digest" not in name}
    student["weights"] = str(student.get("weights")).partition(":")[0] if _is_random(student) else student["weights"]
    teachers = [teacher.get("digest") for teacher in (record["teacher"], *record.get("more_teachers", ()))]
    return json.dumps([settings, student, teachers, record["store"], record.get("baseline")], sort_keys=True)


def _is_random(student: Mapping[str, Any]) -> bool:
    return str(student.get("weights")).startswith("random:")
