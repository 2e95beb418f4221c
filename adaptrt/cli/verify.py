"""`adaptrt verify`: check every byte of a file."""

from __future__ import annotations

import click

from adaptrt.cli.notes import Progress, printable
from adaptrt.cli.options import model_path
from adaptrt.format import verify


@click.command()
@click.argument("file")
@click.pass_context
def command(ctx: click.Context, file: str) -> None:
    """Check FILE against its digests; print each problem and exit with 1 if there is any."""
    with Progress(f"verifying {file}") as progress:
        problems = verify(model_path(file), progress)
    for problem in problems:
        click.echo(printable(f"{file}: {problem}"))
    if problems:
        ctx.exit(1)
    click.echo(f"{file}: ok")
