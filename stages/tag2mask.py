"""The console command `tag2mask`: a name per command line of this package, imported when it is called and not before."""

from __future__ import annotations

import importlib
from importlib import metadata

import click

# name of a command → (module of this package, its line in the list of commands)
COMMANDS = {
    "init": ("init", "Makes a project folder for your photographs."),
    "run": ("run", "Runs whatever is not up to date, and shows figures as they come."),
    "status": ("status", "Says what is up to date, and what a run would do."),
    "report": ("report", "Writes the report from what is there, and opens it."),
    "check": ("check", "Lists what is wrong or missing: settings, recipes, data, weights, steps."),
    "plan": ("plan", "Predicts hours, bytes and memory for a number of images."),
    "doctor": ("doctor", "Checks this machine and the installation."),
    "weights": ("weights", "Lists, gets and checks initial weights."),
    "export": ("export_masks", "Writes a run's pseudo-masks in the formats of other tools."),
    "segment": ("segment_folder", "Segments a folder of images with a trained segmenter."),
    "export-model": ("export_model", "Writes a trained segmenter as ONNX."),
    "serve": ("serve", "Serves a trained segmenter to Label Studio."),
    "fiftyone": ("to_fiftyone", "Writes a FiftyOne data set of images, tags and masks."),
}
# what dvc.yaml of a project folder calls
STAGES = (
    "code", "prepare", "train", "extract", "fit_refiner", "refine", "export", "cross_validate", "retrain", "segment",
    "relabel", "evaluate", "report",
)  # fmt: skip


def command_of(module: str) -> click.Command:
    """The click command in a module of this package."""
    return importlib.import_module(f"{__package__}.{module}").main


class Commands(click.Group):
    """A group whose commands are modules. Its list of commands imports none of them: some import torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, "stage"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "stage":
            return stage
        return command_of(COMMANDS[cmd_name][0]) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


class Stages(click.Group):
    """Stages of the DAG, as DVC calls them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(STAGES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return command_of(cmd_name) if cmd_name in STAGES else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Stages"):
            formatter.write_text(", ".join(STAGES))


@click.group(cls=Stages, name="stage")
def stage() -> None:
    """One stage by itself, as DVC calls it. `tag2mask run` calls them in order."""


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(metadata.version("tag2mask"), prog_name="tag2mask")
def main() -> None:
    """Image-level tags in, pixel-level masks out, and how good they are.

    \b
    tag2mask init mine --images photographs --tags tags.csv
    cd mine
    tag2mask run
    tag2mask report --open
    """


if __name__ == "__main__":
    main()
