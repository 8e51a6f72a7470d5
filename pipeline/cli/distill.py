"""`g2l distill`, `g2l baseline` and `g2l sweep`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from g2l_core.errors import UsageError
from g2l_core.options import ENCODER
from pipeline.cli import EXIT_DONE, EXIT_SOME_FAILED
from pipeline.cli.options import Json, Weights, from_specs
from pipeline.cli.printing import tell
from pipeline.settings import BaselineSettings, DistillHow, Recipe

if TYPE_CHECKING:
    from g2l_core.encoders.resolve import EncoderSpec
    from pipeline.distill import DistillSummary

MUCH_WAITING = 0.2
"""A larger share of the time than this spent waiting for data is pointed out."""

Folder = Annotated[Path, typer.Option(help="The feature store.", show_default=False)]
Teacher = Annotated[
    list[str],
    typer.Option(help="A teacher, by its name or key in the store; several for several teachers.", show_default=False),
]
Student = Annotated[str, typer.Option(help="The encoder to train.", show_default=False)]


def _take_recipe(context: typer.Context, value: str | None) -> str | None:
    """Let a recipe's options stand where the command line gives none."""
    if value is not None and not context.resilient_parsing:
        from pipeline.config import OPTIONS, read_recipe

        options = read_recipe(value)
        if isinstance(options.get("teacher"), str):
            options["teacher"] = [options["teacher"]]
        for name in options.keys() & OPTIONS.keys():
            if OPTIONS[name].option.parse and isinstance(options[name], tuple):
                options[name] = ",".join(map(str, options[name])) or "none"
        context.default_map = {**(context.default_map or {}), **options}
    return value


@from_specs()
def distill(
    store: Folder,
    teacher: Teacher,
    student: Student,
    out: Annotated[Path, typer.Option(help="The run folder.", show_default=False)],
    options: Annotated[dict[str, Any], Recipe],
    how: DistillHow,
    config: Annotated[
        str | None,
        typer.Option(
            callback=_take_recipe,
            is_eager=True,
            show_default=False,
            help="A recipe: breast, prostate, or a TOML file of these options.",
        ),
    ] = None,
    weights: Weights = None,
    teacher_weights: Annotated[
        str | None,
        typer.Option(help="Weights of a teacher that runs live, as --weights.", rich_help_panel=ENCODER),
    ] = None,
    as_json: Json = False,
) -> None:
    """Stage two: train a student on the stored features, seeing the very pixels that the teacher saw.

    The teacher is not loaded. Interrupt it at any time: the same command again goes on where it stopped. Several GPUs:
    torchrun --nproc-per-node N -m g2l_core distill ...
    """
    from g2l_core.encoders.resolve import resolve_encoder
    from pipeline.config import read_recipe, settings_of
    from pipeline.distill import run_distill

    recipe = read_recipe(config) if config else {}

    def resolved(role: str, name: str, weights: str | None) -> "EncoderSpec":
        in_recipe = recipe.get(role, ())
        named_in = f"the recipe {config}" if name in ([in_recipe] if isinstance(in_recipe, str) else in_recipe) else ""
        return resolve_encoder(name, weights=weights, named_in=named_in, trusted=how.trust_code)

    settings, epochs = settings_of(options)
    if teacher_weights is not None and len(teacher) > 1:
        raise UsageError("--teacher-weights speaks of one teacher that runs live, and several are given")
    teachers = [resolved("teacher", name, teacher_weights) if settings.online else name for name in teacher]
    summary = run_distill(
        store,
        teachers,
        resolved("student", student, weights),
        out,
        settings,
        epochs=epochs,
        how=how,
    )
    if summary.is_main:
        then = f"g2l embed SLIDES --store {store} --encoder {out}"
        tell(_text(summary), asdict(summary), as_json=as_json, then=then)


def _text(summary: "DistillSummary") -> str:
    from pipeline.tables import table_text

    stopped = " (stopped early: the loss rose)" if summary.stopped_early else ""
    lines = [f"{summary.out}: {summary.steps:,} steps{stopped}; held out: {summary.held_out}"]
    rows = [
        (name, f"{summary.before[name]:.3f}", f"{summary.after[name]:.3f}") for name in summary.before if name != "step"
    ]
    lines.append(table_text(rows, header=("", "before", "after"), right=(1, 2)))
    lines.append(f"{summary.share_waiting:.1%} of the time waiting for data; curves: {summary.out / 'curves.html'}")
    if summary.share_waiting > MUCH_WAITING:
        lines.append(
            "patches were read too slowly for the student: more --workers, or --pixel-cache on a fast disk, help"
        )
    return "\n".join(lines)


@from_specs(without=("permissive", "targets_gb"))
def baseline(
    run: Annotated[Path, typer.Argument(help="A run folder of g2l distill.", show_default=False)],
    asked: BaselineSettings,
    how: DistillHow,
    out: Annotated[
        Path | None, typer.Option(help="The baseline's run folder; pca has none.", show_default=False)
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="The run's store, if it is elsewhere now.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """What distillation must beat: the same student, patches, steps and batches as a run, without its teacher.

    simclr, supervised and start write a run folder, an encoder like other runs. pca writes an encoder into the store.
    """
    from pipeline.baseline import prepare, run_baseline

    if (out is None) != (asked.kind == "pca"):
        raise UsageError(
            "--kind pca writes an encoder into the store and no run folder: leave --out out"
            if out
            else f"--kind {asked.kind}: expected the baseline's run folder, as in --out runs/{asked.kind}"
        )
    found = prepare(run, asked, how, store)
    if out is None:
        from pipeline.pca import run_pca

        key, share = run_pca(found)
        text = f"{found.store.path}: {key}, which has {share:.1%} of its teacher's variance"
        tell(text, {"store": str(found.store.path), "encoder": key, "share_of_variance": share}, as_json=as_json)
        return
    summary = run_baseline(found, out)
    if summary.is_main:
        then = f"g2l embed SLIDES --store {found.store.path} --encoder {out}"
        tell(_text(summary), asdict(summary), as_json=as_json, then=then)


@from_specs(without=("resume", "restart"))
def sweep(
    file: Annotated[str, typer.Argument(help="losses, alpha, views, slides, or a TOML file.", show_default=False)],
    store: Folder,
    student: Student,
    out: Annotated[Path, typer.Option(help="The folder of the sweep; made or completed.", show_default=False)],
    how: DistillHow,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="As of g2l distill, where the sweep has no sets of teachers.", show_default=False),
    ] = None,
    weights: Weights = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE of g2l distill for every run; repeatable.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Many runs from one cache: losses, alpha, views, seeds, numbers of slides; one table and one page.

    Interrupt it at any time: the same command goes on where it stopped.
    """
    from pipeline.sweep import PAGE, read_sweep, run_sweep, sweep_text

    plan = read_sweep(file, option or [])
    result = run_sweep(plan, store, teacher or (), student, weights, out, how)
    best = max(result.finished, key=lambda run: run.after["cka_debiased"])
    facts: dict[str, Any] = {"folder": str(out), "page": str(out / PAGE), "failed": dict(result.failed)}
    facts["finished"] = [asdict(run) for run in result.finished]
    then = f"g2l embed SLIDES --store {store} --encoder '{out / best.folder}'"
    tell(sweep_text(result, out), facts, as_json=as_json, then=then)
    raise typer.Exit(EXIT_SOME_FAILED if result.failed else EXIT_DONE)
