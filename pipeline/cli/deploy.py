"""`g2l export-student`, `g2l measure` and `g2l doctor`: a student on the machine that it is for."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from g2l_core.options import MACHINE, OUTPUT
from pipeline.cli import EXIT_DONE, EXIT_SOME_FAILED
from pipeline.cli.options import Json, Seed, TrustCode, from_specs

if TYPE_CHECKING:
    from g2l_core.encoders.student_export import Exported

Run = Annotated[Path, typer.Argument(help="A run folder of g2l distill.", show_default=False)]


@from_specs()
def export_student(
    run: Annotated[
        Path, typer.Argument(help="A run folder of g2l distill, or a head of g2l fit-head.", show_default=False)
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="timm, torchscript, onnx, onnx-int8, onnx-int8-dynamic, openvino, wsinfer or transformers.",
        ),
    ] = "timm",
    out: Annotated[
        Path | None, typer.Option(help="The folder to make; RUN-FORMAT if not given.", show_default=False)
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            help="Judge the export on this store's patches that the student was not trained on.", show_default=False
        ),
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(help="A task file: judge the export by a probe on its labels too.", show_default=False),
    ] = None,
    task: Annotated[str, typer.Option(help="The task, if the file has several.", show_default=False)] = "",
    seed: Seed = 0,
    trust_code: TrustCode = None,
    as_json: Json = False,
) -> None:
    """Write a run's student for other programs and runtimes, with its model card, if its features stay the same.

    Every form is run and compared with the student; one that is not near enough is refused with the figures.
    """
    from pipeline.export_student import GateSettings, run_export

    target = out or run.with_name(f"{run.resolve().name}-{form}")
    settings = GateSettings(store=store, tasks=tasks, task=task, seed=seed)
    exported = run_export(run, form, target, settings, trust_code or ())
    typer.echo(_export_json(exported, form) if as_json else _export_text(exported, form))


def _export_json(exported: "Exported", form: str) -> str:
    agreement = exported.agreement.to_json() if exported.agreement else None
    return json.dumps({"out": str(exported.out), "format": form, "agreement": agreement}, indent=2)


def _export_text(exported: "Exported", form: str) -> str:
    lines = [f"{exported.out}: {form}, with README.md (the model card)"]
    if (found := exported.agreement) is not None:
        lines.append(
            f"on {found.patches:,} patches of {found.slides} slides ({found.origin}): cosine {found.min_cosine:.5f} at "
            f"least, {found.median_cosine:.5f} at the median; {found.min_centered_cosine:.5f} at least without the mean"
        )
        lines += [f"warning: {found.doubt}"] if found.doubt else []
        if found.probe is not None:
            probe = found.probe
            lines.append(f"probe of {probe.task}: {probe.metric} {probe.exported:.4f}, student {probe.student:.4f}")
    return "\n".join(lines)


@from_specs()
def measure(
    run: Run,
    store: Annotated[
        Path | None,
        typer.Option(help="Measure on this store's patches, and count its slides.", show_default=False),
    ] = None,
    patches: Annotated[int, typer.Option(min=16, help="Patches that each runtime encodes.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Patches encoded together.")] = 32,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Threads of each runtime; those of torch if not given.",
            show_default=False,
            rich_help_panel=MACHINE,
        ),
    ] = None,
    teacher: Annotated[
        bool, typer.Option("--teacher/--no-teacher", help="Measure the teacher too, where its weights are at hand.")
    ] = True,
    card: Annotated[
        bool,
        typer.Option(
            "--card",
            help="Put the table into the student's model card, and its speed into reports of g2l bench.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    trust_code: TrustCode = None,
    as_json: Json = False,
) -> None:
    """What a student costs on this machine: patches a second, slides an hour, memory, size, latency, energy.

    Every runtime that is installed runs in a process of its own; the teacher stands beside it.
    """
    from pipeline.measure import MeasureSettings, measure_json, measure_text, run_measure

    settings = MeasureSettings(
        store=store, patches=patches, batch_size=batch_size, threads=threads, teacher=teacher,
        trust_code=tuple(trust_code or ()),
    )  # fmt: skip
    found = run_measure(run, settings, card=card)
    typer.echo(json.dumps(measure_json(found), indent=2) if as_json else measure_text(found))


@from_specs()
def doctor(
    folder: Annotated[Path, typer.Option(help="Where stores will be: its disk is measured.")] = Path(),
    hub: Annotated[
        bool, typer.Option("--hub/--no-hub", help="Ask the model hub for your login and for access to each model.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Check this machine: versions, torch, GPU, slide formats, model hub, disk, memory, and a short run of stage one.

    Each finding comes with its remedy. The exit code is 1 if something is broken.
    """
    from pipeline.doctor import examine, findings_json, findings_text, is_broken

    findings = examine(folder, hub=hub)
    typer.echo(json.dumps(findings_json(findings), indent=2) if as_json else findings_text(findings))
    raise typer.Exit(EXIT_SOME_FAILED if is_broken(findings) else EXIT_DONE)
