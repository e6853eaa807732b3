"""What a worker does first on a node of a Ray cluster: go to the project folder, and compare its code with the stage's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline import code_files
from pipeline.engine.threads import one_thread


@dataclass(frozen=True)
class Origin:
    """Of work. folder: the project's; code: digests of tag2mask there."""

    folder: str
    code: dict[str, str]


def origin() -> Origin:
    return Origin(str(Path.cwd()), code())


@cache
def code() -> dict[str, str]:
    return code_files.digests(name.rstrip("/") for name in code_files.FOLDERS)


def arrive(origin: Origin) -> None:
    """Of every worker, before it works. ValueError where its node does not see the folder, or has other code, which could
    give other results without a word."""
    node = f"node {os.uname().nodename} of the Ray cluster"
    try:
        os.chdir(origin.folder)
    except OSError as error:
        raise ValueError(f"{node} does not see the project folder {origin.folder}; all must share it") from error
    if code() != origin.code:
        raise ValueError(
            f"{node} has another version of tag2mask, in {code_files.ROOT}; install the same version on all nodes"
        )
    one_thread()
