"""Settings of all methods, refiners and segmenters → recipes/schema.json, for editors. Run after a change of settings."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.jobs import schema


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=schema.SCHEMA, show_default=True, help="Written: the schema."
)
def main(out: Path) -> None:
    """Writes the JSON schema of recipes."""
    out.write_text(schema.text(), encoding="utf-8")
    click.echo(out)


if __name__ == "__main__":
    main()
