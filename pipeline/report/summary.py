"""audit/<run>.json → a table in the terminal. `python -m pipeline.report.summary audit`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from pipeline.core import sections
from pipeline.report import run_metrics
from pipeline.report.templates import figure, stage_name


@click.command()
@click.argument("audit", type=click.Path(path_type=Path, exists=True))
def main(audit: Path) -> None:
    """Prints mIoU per stage of every evaluated run of params.yaml, stages that lower it, and where the results lie."""
    methods = [method for method in sections.read()["methods"] if (audit / f"{method}.json").is_file()]
    if not methods:
        raise click.ClickException(f"{audit} has figures of no run; run `dvc repro`")
    figures_of_runs = run_metrics.read(audit, methods)
    stages = run_metrics.shown_stages(figures_of_runs)
    table = Table(title="mIoU per stage (predictions and stages that end in val: split val; all others: split train)")
    table.add_column("method")
    for stage in stages:
        table.add_column(stage_name(stage), justify="right")
    for method, figures in figures_of_runs.items():
        table.add_row(method, *(figure(figures["stages"].get(stage, {}).get("miou")) for stage in stages))
    background_only = figures_of_runs[methods[0]].get("background_only", {})
    splits = run_metrics.splits_of(figures_of_runs)
    table.add_row("background only", *(figure(background_only.get(splits[stage])) for stage in stages), style="dim")
    console = Console(width=110)
    console.print(table)
    for method, figures in figures_of_runs.items():
        threshold = figures["threshold"]
        if "regret" in threshold:
            console.print(
                f"{method}: threshold {threshold['chosen']}, chosen without ground truth; regret {threshold['regret']} "
                "mIoU of the score maps, compared with the oracle threshold"
            )
        for before, after, miou_before, miou_after in run_metrics.miou_drops(figures):
            drop = f"{figure(miou_before)} ({stage_name(before)}) to {figure(miou_after)} ({stage_name(after)})"
            console.print(f"{method}: mIoU drops from {drop}")
        console.print(f"masks:   artifacts/{method}/pseudo_masks (HDF5; docs/pseudo_masks.md says how to read it)")
        console.print(f"figures: {audit}/{method}.json")
    console.print("report:  report/index.html")


if __name__ == "__main__":
    main()
