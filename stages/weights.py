"""Initial weights: what there is, one of them fetched and checked, any file explained. No stage of the DAG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.jobs import known_weights, weights

PATH: Any = click.Path(path_type=Path)


@click.group()
def main() -> None:
    """Initial weights of methods, segmenters and refiners. Nothing else in tag2mask calls the network."""


@main.command("list")
def list_weights() -> None:
    """Lists the known weights: what starts from them, what they learned from, size, licence, checksum, address."""
    for known, present in weights.table():
        digests = ", ".join(f"{sha256} ({which})" for sha256, which in known.at_hand.items())
        click.echo(f"{known.name}{'  (here)' if present else ''}")
        click.echo(f"    for      {known.purpose}")
        click.echo(f"    file     {known.path}, {known.megabytes:g} MB")
        click.echo(f"    learned  from {known.supervision}")
        click.echo(f"    licence  {known.licence}")
        click.echo(f"    source   {known.url or known.page}")
        published = f"{known.digest}… as published" if 0 < len(known.digest) < 64 else known.digest
        click.echo(f"    sha256   {'; '.join(filter(None, (published, digests))) or 'unknown'}")


@main.command()
@click.argument("name")
@click.option("--from", "source", type=PATH, help="A file that was fetched by hand: checked, and converted if need be.")
def get(name: str, source: Path | None) -> None:
    """Fetches the weights NAME to where recipes and presets look for them, checks them, and prints their sha256."""
    with runtime.stage():
        path, sha256 = weights.get(known_weights.named(name), source, runtime)
    click.echo(f"{path}\nsha256 {sha256}")


@main.command()
@click.argument("file", type=PATH)
@click.option("--backbone", help="Folder of pipeline/nn: says why the file does not fit, together with --architecture.")
@click.option("--architecture", help="Network of that family, as recipes name it.")
def check(file: Path, backbone: str | None, architecture: str | None) -> None:
    """Says what a FILE of weights is and what it fits. The exit code is 1 if nothing can start from it."""
    with runtime.stage():
        if (backbone is None) != (architecture is None):
            raise ValueError("--backbone and --architecture go together")
        findings = weights.check(file)
        problems = list(findings.problems)
        if backbone and architecture and not problems:
            problem = weights.check_architecture(file, backbone, architecture)
            problems += [problem] if problem else []
    click.echo("\n".join([str(file), f"sha256 {findings.sha256}", *findings.lines]))
    if problems:
        raise click.ClickException("\n".join(problems))


if __name__ == "__main__":
    main()
