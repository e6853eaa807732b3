"""What is up to date, and what a run would do. No stage of the DAG."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from pipeline.jobs import project, status

SHOWN = {"ok": "[green]ok[/]", "new": "new", "do": "[yellow]to do[/]", "wait": "[dim]after[/]"}


@click.command()
def main() -> None:
    """Shows the state of every stage: ok; new, never run; to do, with the reasons; or after: it waits for stages before it.

    Nothing is run. Photographs whose size and time of change are as before are not read again.
    """
    try:
        if project.renew(Path()):
            click.echo("dvc.yaml is that of the installed tag2mask now")
    except project.ProjectError as error:
        raise click.ClickException(str(error)) from error
    states = status.states()
    stages = list(dict.fromkeys(name.partition("@")[0] for name in states))
    runs = list(dict.fromkeys(name.partition("@")[2] for name in states if "@" in name))
    console = Console(highlight=False)
    table = Table("stage", *runs, box=None)
    for stage in stages:
        of_runs = [states.get(f"{stage}@{run}", states.get(stage)) for run in runs]
        table.add_row(stage, *("" if state is None else SHOWN[state.state] for state in of_runs))
    console.print(table)
    for name, state in states.items():
        for reason in state.reasons:
            console.print(f"{name}: {reason}", markup=False)
    if all(state.state == "ok" for state in states.values()):
        console.print("everything is up to date")


if __name__ == "__main__":
    main()
