"""What DVC would run → state of every stage, with reasons. Nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline import code_files

KINDS = {"changed deps": "input", "changed outs": "result"}


@dataclass(frozen=True)
class State:
    """state: up to date; new, never run; to do, for these reasons; waiting for others, and perhaps unchanged after them."""

    state: Literal["ok", "new", "do", "wait"]
    reasons: tuple[str, ...]


def states() -> dict[str, State]:
    """Stage → its state, in the order in which they run, of the project in the working directory."""
    import networkx
    from dvc.repo import Repo

    with Repo() as repo:
        changed: Mapping[str, list[Any]] = {name: why for name, why in repo.status().items() if name != "code"}
        graph = repo.index.graph  # with files that `dvc add` keeps, which are no stages
        names = {stage: stage.addressing for stage in graph}
        sorted_stages = reversed(list(networkx.topological_sort(graph)))
        order = [names[stage] for stage in sorted_stages if not names[stage].endswith(".dvc")]
        before = {names[stage]: {names[other] for other in networkx.descendants(graph, stage)} for stage in graph}
    locked = _locked()
    new_code = _changed_code(locked)
    found = {}
    for name in order:
        reasons = [*_reasons(changed.get(name, ())), *(f"code {entry} changed" for entry in new_code.get(name, ()))]
        waits = before[name] & ({*changed} | {*new_code})
        if name not in locked:
            found[name] = State("new", ())
        else:
            found[name] = State("do", tuple(reasons)) if reasons else State("wait" if waits else "ok", ())
    found.pop("code", None)
    return found


def _reasons(entries: Any) -> Iterator[str]:
    """DVC's status of a stage as short texts."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry.removeprefix("changed ") + " changed"  # its command
            continue
        for kind, paths in entry.items():
            for path, state in paths.items():
                if isinstance(state, Mapping):  # of params: key → state
                    yield from (f"{key} of {path} {word}" for key, word in state.items())
                else:
                    yield f"{KINDS.get(kind, kind)} {path} {state}"


def _locked() -> Mapping[str, Any]:
    """What dvc.lock says of the stages that have run."""
    lock = Path("dvc.lock")
    return (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {}) if lock.is_file() else {}


def _changed_code(locked: Mapping[str, Any]) -> dict[str, list[str]]:
    """Stage → entries of code.yaml in dvc.lock that the installed code no longer agrees with; {} in a clone."""
    recorded = {name: entry.get("params", {}).get(code_files.CODE_FILE, {}) for name, entry in locked.items()}
    changed = {name: code_files.changed(entries, entries) for name, entries in recorded.items()}
    return {name: entries for name, entries in changed.items() if entries}
