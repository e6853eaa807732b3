"""dvc.lock and the work tree → the runs that DVC would run again."""

from __future__ import annotations

from collections.abc import Sequence

ALWAYS = ["always changed"]  # what DVC says of stage `code` of a project folder, whatever it would write


def runs(methods: Sequence[str]) -> set[str]:
    """Of these runs, those of which an input, a setting or the code of a stage has changed since. Empty without DVC.

    Takes as long as `dvc status` does.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import SCMError

    try:
        with Repo() as repo:
            changed = repo.status(targets=[f"evaluate@{method}" for method in methods], with_deps=True)
    except (DvcException, SCMError, OSError):  # no project of DVC, or DVC is at work in it
        return set()
    names = {name.rpartition(":")[2] for name, why in changed.items() if why != ALWAYS}
    of_all = any("@" not in name for name in names)  # prepare
    return {method for method in methods if of_all or any(name.endswith(f"@{method}") for name in names)}
