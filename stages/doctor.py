"""The machine and params.yaml → what is present, and what to do where something is missing."""

from __future__ import annotations

import click

from pipeline import runtime
from pipeline.jobs import doctor


@click.command()
@click.option("--quiet", is_flag=True, help="Only broken packages and missing tools.")
def main(quiet: bool) -> None:
    """Checks compiler, packages, CUDA, disk, DVC's link type, params.yaml, weights, data, engine and processes."""
    findings = doctor.findings(runtime, packages_only=quiet)
    for finding in findings:
        if not quiet or finding.advice:
            click.echo(finding.text)
    if any(finding.advice for finding in findings):
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
