"""`dvc repro` with a line per stage: seconds, and figures as they come. No stage of the DAG."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from pipeline import runtime
from pipeline.core import sections
from pipeline.jobs import project, report, run

UNTIL = (
    "prepare",
    "train",
    "extract",
    "fit_refiner",
    "refine",
    "export",
    "cross_validate",
    "retrain",
    "segment",
    "relabel",
    "evaluate",
)


@click.command()
@click.argument("runs", nargs=-1)
@click.option("--until", type=click.Choice(UNTIL), help="Stops after this stage of each run; no report is written.")
def main(runs: tuple[str, ...], until: str | None) -> None:
    """Runs what is not up to date: of RUNS (keys of `methods` in params.yaml), or of all of them, then writes the report.

    Whatever has been done before, here or by a colleague who shares the cache, is not done again. A run that was interrupted
    goes on where it was. The same as `dvc repro`, with a line per stage.
    """
    console = Console(highlight=False, soft_wrap=True)
    try:
        if project.renew(Path()):
            console.print("dvc.yaml is that of the installed tag2mask now")
        targets = run.targets_of(runs, until, sections.runs(sections.read()))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    unchanged, ends = 0, set()
    for event in run.repro(targets, runtime.with_own_commands()):
        unchanged += event.kind == "unchanged"
        ends.add(event.kind)
        if event.kind != "unchanged" and event.name != "code":
            console.print(_line(event))
    if unchanged:
        console.print(f"[dim]{unchanged} stages were up to date[/]")
    if ends & {"failed", "interrupted"}:
        raise click.exceptions.Exit(130 if "interrupted" in ends else 1)
    if runs and until is None:  # DVC's stage report would run all other runs first
        with runtime.stage():
            values = sections.read()
            page = report.run(values, runtime.command_paths("report"), report.outdated_runs(values))
        click.echo(f"report: {page.resolve().as_uri()}")


def _line(event: run.Event) -> str:
    """What the terminal shows of an event, as rich's markup."""
    if event.kind == "output":
        return escape(event.name)
    if event.kind == "begun":
        return f"[dim]{event.name} …[/]"
    if event.kind in ("failed", "interrupted"):
        return f"[red]{event.name} {event.kind}[/]; what was finished is kept, and the next run goes on from there"
    took = run.seconds(event.name, runtime.PROVENANCE) if event.kind == "done" else None
    time = "from the cache" if event.kind == "cached" else "" if took is None else f"{took:.0f} s"
    return f"[bold]{event.name:<22}[/] {time:>9}  {escape(run.figures(event.name))}".rstrip()


if __name__ == "__main__":
    main()
