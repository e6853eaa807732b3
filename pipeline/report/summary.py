"""metrics/*.json → a table in the terminal. `python -m pipeline.report.summary metrics`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from pipeline.core import sections
from pipeline.report.page import figure, read_metrics, setbacks, shown_stages, splits_of


@click.command()
@click.argument("metrics", type=click.Path(path_type=Path, exists=True))
def main(metrics: Path) -> None:
    """Prints mIoU per stage of every run of params.yaml, and says where the results lie."""
    methods = list(sections.read()["methods"])
    found = read_metrics(metrics, methods)
    stages = shown_stages(found)
    table = Table(title="mIoU per stage (predictions and what ends in val: split val; all others: train)")
    table.add_column("method")
    for stage in stages:
        table.add_column(stage.replace("_", " "), justify="right")
    for method, facts in found.items():
        table.add_row(method, *(figure(facts["stages"].get(stage, {}).get("miou")) for stage in stages))
    nothing = found[methods[0]].get("background_only", {})
    splits = splits_of(found)
    table.add_row("background only", *(figure(nothing.get(splits[stage])) for stage in stages), style="dim")
    console = Console(width=110)
    console.print(table)
    for method, facts in found.items():
        threshold = facts["threshold"]
        if "regret" in threshold:
            console.print(
                f"{method}: threshold {threshold['chosen']}, chosen without masks, "
                f"costs the score maps {threshold['regret']} mIoU (regret)"
            )
        for before, after, had, has in setbacks(facts):
            console.print(
                f"{method} loses: {before.replace('_', ' ')} {figure(had)} → {after.replace('_', ' ')} {figure(has)}"
            )
        console.print(f"masks:   artifacts/{method}/pseudo_masks (HDF5; docs/pseudo_masks.md says how to read it)")
        console.print(f"metrics: {metrics}/{method}.json")
    console.print("report:  report/index.html")


if __name__ == "__main__":
    main()
