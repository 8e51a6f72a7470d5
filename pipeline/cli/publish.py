"""`g2l publish`: a student for others."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.deploy import Run
from pipeline.cli.options import Json
from pipeline.cli.printing import tell
from pipeline.cli.store_copies import DryRun


def publish(
    run: Run,
    out: Annotated[
        Path | None, typer.Option(help="The folder to make; RUN-hub if not given.", show_default=False)
    ] = None,
    upload_to: Annotated[
        str | None,
        typer.Option(
            help="OWNER/NAME: send the folder to this model of the hub. Your token: HF_TOKEN.", show_default=False
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --upload-to: a repository that is made is private.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make a run's student ready for others: weights, configuration, model card with its terms, checksums.

    Nothing is sent anywhere without --upload-to. Folders of this machine are left out of card and record.
    """
    from g2l_core.errors import UsageError
    from pipeline.publish import publish_student
    from pipeline.tables import bytes_text

    if private and upload_to is None:
        raise UsageError("--private is for --upload-to: leave it out")
    target = out or run.with_name(f"{run.resolve().name}-hub")
    done = publish_student(run, target, repository=upload_to or "", private=private, dry_run=dry_run)
    lines = [
        f"{done.folder}: {', '.join(done.files)}; {bytes_text(done.bytes)}",
        f"terms: {done.terms}; README.md says because of what",
    ]
    if done.uploaded_to:
        lines.append(f"uploaded to {done.uploaded_to}")
    elif not dry_run:
        lines.append(f"nothing was sent; to send it: hf upload OWNER/NAME {done.folder}")
    tell("\n".join(lines), {**asdict(done), "folder": str(done.folder)}, dry_run=dry_run, as_json=as_json)
