"""`g2l distill`, `g2l sweep`, `g2l export-student`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import Device, Seed, Weights, Workers

LOSS, SCHEDULE, DATA, MACHINE = "Loss", "Schedule", "Data", "Machine"

Folder = Annotated[Path, typer.Option(help="The feature store.", show_default=False)]
TargetsGb = Annotated[
    float, typer.Option(help="Targets of up to so many GB are held in memory.", rich_help_panel=MACHINE)
]
PixelCacheDir = Annotated[
    Path | None,
    typer.Option("--pixel-cache", help="Keep decoded patches in this fast local folder.", show_default=False),
]
PixelCacheGb = Annotated[float, typer.Option(help="Most GB of them.", rich_help_panel=MACHINE)]


def _take_recipe(context: typer.Context, value: str | None) -> str | None:
    """Let a recipe's options stand where the command line gives none."""
    if value is not None and not context.resilient_parsing:
        from pipeline.config import read_recipe

        context.default_map = {**(context.default_map or {}), **read_recipe(value)}
    return value


def distill(
    context: typer.Context,
    store: Folder,
    teacher: Annotated[str, typer.Option(help="The teacher, by its name or key in the store.", show_default=False)],
    student: Annotated[str, typer.Option(help="The encoder to train.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The run folder.", show_default=False)],
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
    loss: Annotated[
        str,
        typer.Option(help="logsum, logsum_corr, mse, smooth_l1, cosine, kl, kl_queue or rkd.", rich_help_panel=LOSS),
    ] = "logsum",
    alpha: Annotated[float, typer.Option(help="Exponent of the Log-Sum losses.", rich_help_panel=LOSS)] = 4.0,
    temperature: Annotated[
        float | None, typer.Option(help="Of kl (1), kl_queue (0.07).", show_default=False, rich_help_panel=LOSS)
    ] = None,
    teacher_norm: Annotated[
        str, typer.Option(help="Targets standardized over batch, dataset or none.", rich_help_panel=LOSS)
    ] = "auto",
    student_norm: Annotated[
        str, typer.Option(help="batch or none; auto follows the teacher.", rich_help_panel=LOSS)
    ] = "auto",
    reduce: Annotated[
        str, typer.Option(help="Log-Sum over ranks: per-rank, global; or per-sample.", rich_help_panel=LOSS)
    ] = "per-rank",
    batch_statistics: Annotated[
        str, typer.Option(help="A batch's statistics: per-rank or global.", rich_help_panel=LOSS)
    ] = "per-rank",
    projector: Annotated[str, typer.Option(help="linear or mlp.", rich_help_panel=LOSS)] = "linear",
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the training patches.", rich_help_panel=SCHEDULE)
    ] = 10,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps, in place of --epochs.", show_default=False, rich_help_panel=SCHEDULE),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Patches a step and rank.", rich_help_panel=SCHEDULE)] = 32,
    lr: Annotated[
        float, typer.Option(help="Learning rate at the start; cosine-annealed.", rich_help_panel=SCHEDULE)
    ] = 1e-4,
    weight_decay: Annotated[
        float, typer.Option(help="Weight decay at the start; cosine-annealed.", rich_help_panel=SCHEDULE)
    ] = 0.05,
    warmup: Annotated[
        int, typer.Option(min=0, help="Steps over which the learning rate rises.", rich_help_panel=SCHEDULE)
    ] = 0,
    clip: Annotated[
        float, typer.Option(min=0, help="Largest norm of the gradient; 0 clips nothing.", rich_help_panel=SCHEDULE)
    ] = 0.0,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Batches whose gradients make a step.", rich_help_panel=SCHEDULE)
    ] = 1,
    layer_decay: Annotated[
        float, typer.Option(help="A block's learning rate as a share of the next one's.", rich_help_panel=SCHEDULE)
    ] = 1.0,
    ema: Annotated[
        float,
        typer.Option(help="Decay of averaged weights, which are kept then; 0 keeps none.", rich_help_panel=SCHEDULE),
    ] = 0.0,
    grad_checkpoint: Annotated[
        bool, typer.Option("--grad-checkpoint", help="Less memory, slower.", rich_help_panel=MACHINE)
    ] = False,
    early_stop: Annotated[
        int,
        typer.Option(
            min=0,
            help="Stop after more than this many steps in a row above the mean; 0 never.",
            rich_help_panel=SCHEDULE,
        ),
    ] = 10,
    early_stop_window: Annotated[int, typer.Option(min=1, help="Steps of that mean.", rich_help_panel=SCHEDULE)] = 100,
    keep: Annotated[
        str, typer.Option(help="Weights of the student: last, or best by held-out CKA.", rich_help_panel=SCHEDULE)
    ] = "last",
    where: Annotated[
        list[str] | None,
        typer.Option(help="Use only slides with COLUMN=PATTERN; repeatable.", show_default=False, rich_help_panel=DATA),
    ] = None,
    hold_out: Annotated[
        str, typer.Option(help="Share of the patients to watch on, or COLUMN=PATTERN.", rich_help_panel=DATA)
    ] = "0.1",
    slides: Annotated[
        int | None, typer.Option(min=1, help="Train on so many slides.", show_default=False, rich_help_panel=DATA)
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(
            min=0, help="Replay so many views; 0: new ones (--online).", show_default=False, rich_help_panel=DATA
        ),
    ] = None,
    online: Annotated[
        bool, typer.Option("--online", help="Run the teacher on every batch, for comparison.", rich_help_panel=DATA)
    ] = False,
    teacher_weights: Annotated[
        str | None,
        typer.Option(help="Of a teacher that runs live, as --weights.", show_default=False, rich_help_panel=DATA),
    ] = None,
    validate_every: Annotated[int, typer.Option(min=1, help="Steps between validations.", rich_help_panel=DATA)] = 200,
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=DATA)
    ] = 200,
    pool_blocks: Annotated[
        int, typer.Option(min=1, help="Blocks of 64 patches that batches are drawn from.", rich_help_panel=DATA)
    ] = 256,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="Of the student's forward pass: auto (fp32), fp32 or bf16.")] = "auto",
    workers: Workers = 2,
    targets_gb: TargetsGb = 4.0,
    pixel_cache: PixelCacheDir = None,
    pixel_cache_gb: PixelCacheGb = 50.0,
) -> None:
    """Stage two: train a student on the stored features, seeing the very pixels that the teacher saw.

    The teacher is not loaded. Interrupt it at any time and go on with --resume. Several GPUs:
    torchrun --nproc-per-node N -m pipeline.cli.main distill ...
    """
    from g2l_core.encoders.resolve import resolve_encoder
    from pipeline.config import option_names, settings_of
    from pipeline.distill import DistillHow, run_distill

    chosen = {name: context.params[name] for name in option_names() if name in context.params}
    settings, passes = settings_of(chosen)
    how = DistillHow(
        resume=resume, device=device, workers=workers, targets_gb=targets_gb, pixel_cache=pixel_cache,
        pixel_cache_gb=pixel_cache_gb,
    )  # fmt: skip
    summary = run_distill(
        store,
        resolve_encoder(teacher, weights=teacher_weights) if online else teacher,
        resolve_encoder(student, weights=weights),
        out,
        settings,
        epochs=passes,
        how=how,
    )
    if summary.leads:
        typer.echo(_text(summary))


def _text(summary: Any) -> str:
    stopped = " (stopped early: the loss rose)" if summary.stopped_early else ""
    lines = [f"{summary.out}: {summary.steps:,} steps{stopped}; held out: {summary.held_out}"]
    lines.append(f"{'':24}{'before':>9}{'after':>9}")
    lines += [
        f"{name:24}{summary.before[name]:>9.3f}{summary.after[name]:>9.3f}" for name in summary.before if name != "step"
    ]
    lines.append(f"{summary.share_waiting:.1%} of the time waiting for data; curves: {summary.out / 'curves.html'}")
    return "\n".join(lines)


def sweep(
    file: Annotated[str, typer.Argument(help="losses, alpha, views, slides, or a TOML file.", show_default=False)],
    store: Folder,
    teacher: Annotated[str, typer.Option(help="The teacher, by its name or key in the store.", show_default=False)],
    student: Annotated[str, typer.Option(help="The encoder to train.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder of the sweep; made or completed.", show_default=False)],
    weights: Weights = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE of g2l distill for every run; repeatable.", show_default=False),
    ] = None,
    device: Device = "auto",
    workers: Workers = 2,
    targets_gb: TargetsGb = 4.0,
    pixel_cache: PixelCacheDir = None,
    pixel_cache_gb: PixelCacheGb = 50.0,
) -> None:
    """Many runs from one cache: losses, alpha, views, seeds, numbers of slides; one table and one page.

    Interrupt it at any time: the same command goes on where it stopped.
    """
    from pipeline.distill import DistillHow
    from pipeline.sweep import read_sweep, run_sweep, sweep_text

    plan = read_sweep(file, option or [])
    how = DistillHow(
        resume=True, device=device, workers=workers, targets_gb=targets_gb, pixel_cache=pixel_cache,
        pixel_cache_gb=pixel_cache_gb,
    )  # fmt: skip
    found = run_sweep(plan, store, teacher, student, weights, out, how)
    typer.echo(sweep_text(found, out))
    raise typer.Exit(1 if found.failed else 0)


def export_student(
    run: Annotated[Path, typer.Argument(help="A run folder of g2l distill.", show_default=False)],
    form: Annotated[str, typer.Option("--format", help="timm, torchscript, onnx or transformers.")] = "timm",
    out: Annotated[
        Path | None, typer.Option(help="The folder to make; RUN-FORMAT if not given.", show_default=False)
    ] = None,
) -> None:
    """Write a run's student for other programs, with its model card, checked against the student."""
    from g2l_core.encoders.student_export import export_student as export

    target = out or run.with_name(f"{run.resolve().name}-{form}")
    typer.echo(f"{export(run, form, target)}: {form}, with README.md (the model card)")
