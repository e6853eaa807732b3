"""Folders that the page is made from → the runs that it can show, and why it cannot show the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import metrics_file
from pipeline.core import store


@dataclass(frozen=True)
class Inputs:
    """Files and folders that the page is made from.

    records     records.h5
    audit       <run>.json, all figures; <run>.csv, a row per image and stage; <run>.h5 of SMALL_MASKS
    metrics     upper_bound/<run>.json
    plots       <run>/threshold.csv
    gallery     <run>.h5 of GALLERY
    inspection  <run>.h5 of INSPECTION
    """

    records: Path
    audit: Path
    metrics: Path
    plots: Path
    gallery: Path
    inspection: Path

    def files_of(self, run: str) -> list[Path]:
        """All that evaluate and extract write of a run for the page."""
        audit = [self.audit / f"{run}{suffix}" for suffix in (".json", ".csv", ".h5")]
        return [*audit, self.plots / run / "threshold.csv", self.gallery / f"{run}.h5", self.inspection / f"{run}.h5"]


@dataclass(frozen=True)
class Runs:
    """shown: names of the runs that the page shows; absent: of the others, why it does not, in words."""

    shown: list[str]
    absent: dict[str, str]


def runs(inputs: Inputs, methods: Sequence[str]) -> Runs:
    """methods: names of the runs of params.yaml. FileNotFoundError where the page would be empty."""
    absent = dict(_absent(inputs, methods))
    shown = [method for method in methods if method not in absent]
    if not shown:
        reasons = "; ".join(f"{method}: {reason}" for method, reason in absent.items())
        raise FileNotFoundError(f"there is no run to report. {reasons}. Run `dvc repro`")
    return Runs(shown, absent)


def _absent(inputs: Inputs, methods: Sequence[str]) -> Iterator[tuple[str, str]]:
    records = store.file_digest(inputs.records) if inputs.records.is_file() else ""
    for method in methods:
        missing = [path for path in inputs.files_of(method) if not path.is_file()]
        if inputs.audit / f"{method}.json" in missing:
            yield method, "not evaluated yet"
        elif missing:
            yield method, f"{', '.join(path.as_posix() for path in missing)} is missing"
        else:
            try:
                figures = metrics_file.read(inputs.audit / f"{method}.json")
            except ValueError as error:
                yield method, str(error).partition(";")[0]
                continue
            if figures["data"]["records"] != records:
                yield method, f"evaluated on other data than {inputs.records.as_posix()} has now"
