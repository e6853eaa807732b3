"""The environment → device, processes, progress, provenance. Decides where work runs, never a result.

The only file that reads os.environ. With code_files.py, which it uses, and the console command, it is a dep of no stage.

TAG2MASK_DEVICE    auto (default) | cpu | cuda | cuda:1
TAG2MASK_WORKERS   processes for work in parts that CPUs compute; default: one per core (on CUDA always one per GPU)
TAG2MASK_LOADERS   threads of a process that decode images ahead; default: 0 on CPU, on CUDA the GPU's share of cores, 1..8
TAG2MASK_RANKS     processes that share the shards of a training step; default: one per core, or per CUDA device
                   (torchrun's own variables say instead, where it has started this process)
TAG2MASK_ENGINE    local (default) | ray: parts are tasks of a Ray cluster, ranks workers of Ray Train
TAG2MASK_LAUNCHER  spawn (default) | inline: run everything in this process, for debugging
TAG2MASK_TIMELINE  a file: when each part and step was done, for `plan`
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from pipeline import code_files
from pipeline.core import store
from pipeline.core.config import PARAMS_FILE, ParamsError
from pipeline.core.processes import interrupted_by_signal
from pipeline.core.store import StoreError
from pipeline.engine import available, devices, local, provenance, ray_cluster, ray_parts, ray_train, torchrun
from pipeline.engine.threads import one_thread
from pipeline.progress import progress as shown
from pipeline.progress import warn as warn  # Engine's

PROVENANCE = Path("provenance")
TRACEBACK = Path(".work/traceback.txt")
INTERRUPTED = 130  # exit code of shells for Ctrl-C
# files, and folders with a slash behind, that no stage has among its deps
EXEMPT = ("pipeline/runtime.py", "pipeline/engine/", "pipeline/progress.py", "pipeline/code_files.py", "stages/tag2mask.py")
STAGES = (
    f"{(__package__ or '').removesuffix('pipeline')}stages"  # package of the command lines: `tag2mask.stages` in a wheel
)

In = TypeVar("In")
Out = TypeVar("Out")

log = logging.getLogger("tag2mask")
_used: dict[str, int] = {}  # workers and loaders of the last parts, ranks of the last training: for provenance


def _choice(name: str, default: str, allowed: Callable[[str], bool], description: str) -> str:
    value = os.environ.get(name, default)
    if not allowed(value):
        raise SystemExit(f"{name}={value!r} is not allowed; allowed is {description}")
    return value


def _count(name: str, default: int, least: int = 1) -> int:
    allowed = f"a whole number >= {least}"
    return int(_choice(name, str(default), lambda text: text.isdigit() and int(text) >= least, allowed))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def device() -> str:
    """Torch device name. Imports torch only for `auto` and CUDA. SystemExit where the device is not available.

    With Ray it is what the cluster's nodes compute on, whether this host has a GPU or not.
    """
    value = _choice(
        "TAG2MASK_DEVICE",
        "auto",
        lambda text: re.fullmatch(r"auto|cpu|cuda(:\d+)?", text) is not None,
        "auto, cpu, cuda or cuda:N",
    )
    if value == "cpu":
        return value
    if engine() == "ray":
        return ray_cluster.device(value)
    import torch

    if value == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.cuda.is_available():
        raise SystemExit(f"TAG2MASK_DEVICE={value}, but torch sees no CUDA device; `make doctor` says why")
    if not devices.visible(value):
        last = torch.cuda.device_count() - 1
        raise SystemExit(f"TAG2MASK_DEVICE={value} is not allowed; allowed is cuda, or cuda:0 to cuda:{last}")
    return value


def workers(device: str = "cpu") -> int:
    """Processes of this host for parts that compute on `device`: on CUDA one per GPU."""
    return _count("TAG2MASK_WORKERS", cores()) if device == "cpu" else max(1, len(devices.visible(device)))


def launch() -> Any:
    """How ranks of a training are started: by torchrun, if that has started this process, or by Ray Train; None: as
    processes beside this one."""
    if torchrun.is_in_use():
        return torchrun.launch
    return ray_train.launch if engine() == "ray" else None


def ranks(shards: int) -> int:
    """Training processes, at most one per shard; as many as torchrun has started."""
    name = device()
    places = _places(name)
    if torchrun.is_in_use():
        count = torchrun.ranks()
    else:
        count = _count("TAG2MASK_RANKS", places)
        if count > places and (name != "cpu" or engine() == "ray"):  # cores of one host can be shared
            raise SystemExit(f"TAG2MASK_RANKS={count} is not allowed; allowed is one per {name} device, here 1 to {places}")
        count = min(shards, count)
    if name != "cpu" and shards < places:
        log.info(
            "%d of %d GPUs train: as many as schedule.shards of the recipe, which is part of the result", shards, places
        )
    _used["ranks"] = count
    return count


def _places(device: str) -> int:
    """GPUs or cores that a training may use, on all hosts that it has."""
    if torchrun.is_in_use():
        return torchrun.ranks()
    if engine() == "local":
        return cores() if device == "cpu" else len(devices.visible(device))
    return ray_cluster.places(device)


def engine() -> str:
    """What starts the processes that work is shared out to."""
    return _choice("TAG2MASK_ENGINE", "local", lambda text: text in ("local", "ray"), "local or ray")


def described() -> list[tuple[str, str, str | None]]:
    """For `tag2mask doctor`: subject, state, what to do where something is missing. SystemExit where a variable is wrong."""
    state, advice = available.state(engine())
    if advice is not None:  # nothing can be asked of it
        return [("engine", state, advice)]
    name = device()
    counts = {"TAG2MASK_WORKERS": workers(), "TAG2MASK_LOADERS": loaders(name)}
    counts["TAG2MASK_RANKS"] = _count("TAG2MASK_RANKS", cores() if name == "cpu" else workers(name))
    return [("engine", state, None), ("processes", available.processes(name, workers(name), counts), None)]


def beside(device: str) -> int:
    """Processes for CPU work beside one that computes on `device`; Ray counts its own cores."""
    return 0 if device == "cpu" or engine() == "ray" or inline() else max(1, workers() // workers(device))


def loaders(device: str) -> int:
    """Threads that decode images ahead of what computes on `device`; 0 on CPU, where that uses all cores."""
    share = 0 if device == "cpu" else max(1, cores() // workers(device))  # of a GPU's process
    _used["loaders"] = _count("TAG2MASK_LOADERS", min(8, share), least=0)
    return _used["loaders"]


def check_params() -> None:
    """ParamsError where any section of params.yaml or of a recipe is wrong, or a file that this run needs is missing, so
    that train does not run before retrain fails.

    Checks in a separate process, so that this one imports no plug-in of another stage. Does nothing outside of DVC.
    """
    name = stage_name()
    if name is None:
        return
    command = [sys.executable, "-m", f"{STAGES}.check", "--run", name.partition("@")[2]]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:  # train itself warns, with its own phases
        raise ParamsError(result.stderr.rpartition("Error: ")[2].strip())


def with_own_commands() -> dict[str, str]:
    """The environment for DVC: `tag2mask` on its command lines is that of this installation."""
    command = Path(sys.argv[0])
    folders: list[Path | str] = [command.parent.resolve()] if command.name == "tag2mask" else []
    return {
        **os.environ,
        "PATH": os.pathsep.join(map(str, [*folders, Path(sys.executable).parent, os.environ.get("PATH", "")])),
    }


def inline() -> bool:
    """Whether all work runs in this process."""
    allowed = ("spawn", "inline")
    return _choice("TAG2MASK_LAUNCHER", "spawn", lambda text: text in allowed, "spawn or inline") == "inline"


def stage_name() -> str | None:
    """Name of the stage, as `train@cam`, where DVC runs this process; else None."""
    return os.environ.get("DVC_STAGE")


def map_parts(
    function: Callable[[In], Out],
    parts: Sequence[In],
    *,
    what: str,
    device: str = "cpu",
    images: Callable[[In], int] | None = None,
    done: int = 0,
) -> Iterator[Out]:
    """function(part) for every part, results in the order of `parts`, with a progress bar of images.

    device  where the function computes
    images  how many a part has; without it, a part is an image
    done    images of an earlier run that this one goes on from

    With more than one process `function` must be picklable; on CUDA each sees one GPU alone. At most two parts per process
    are in flight, so that memory does not grow with their number. An error, or a signal, ends the run after the parts in
    flight have finished. Every process has one torch thread.
    """
    one_thread()
    counts = [images(part) if images else 1 for part in parts]
    results: Iterator[Out]
    _used["workers"] = 1
    if engine() == "ray" and not inline() and parts:
        _used["workers"] = ray_cluster.places(device)
        results = ray_parts.map_parts(function, parts, device)
    elif (processes := workers(device)) == 1 or len(parts) <= 1 or inline():
        results = map(function, parts)
    else:
        _used["workers"] = processes
        results = local.map_parts(function, parts, processes, devices.visible(device))
    yield from shown(results, done + sum(counts), what, done=done, counts=counts, timeline=_timeline())


def progress(items: Iterable[Out], total: int, what: str, *, done: int = 0, noun: str = "images") -> Iterator[Out]:
    """Passes items through and shows how many of `total` there were, from `done` on; noun: what they are."""
    return shown(items, total, what, done=done, noun=noun, timeline=_timeline())


def _timeline() -> Path | None:
    value = os.environ.get("TAG2MASK_TIMELINE")
    return Path(value) if value else None


def stage_command(name: str, folder: Path, timeline: Path) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment by which a stage of the project in `folder` runs as DVC runs it, with a timeline."""
    words = shlex.split(_resolved(name, folder)["cmd"])
    if words[0] == "python":
        words[0] = sys.executable
    path = os.pathsep.join([str(code_files.ROOT), os.environ.get("PYTHONPATH", "")])
    names = {"DVC_STAGE": name, "TAG2MASK_TIMELINE": str(timeline), "PYTHONPATH": path}
    return words, {**with_own_commands(), **names}


def outs_of(name: str, folder: Path) -> list[Path]:
    """Outs of a stage, with its metrics and plots."""
    entry = _resolved(name, folder)
    listed = [out for kind in ("outs", "metrics", "plots") for out in entry.get(kind, [])]
    return [folder / (out if isinstance(out, str) else next(iter(out))) for out in listed]


def info(text: str, *values: object) -> None:
    """Logs a line."""
    log.info(text, *values)


@contextmanager
def stage(folder: Path = PROVENANCE) -> Iterator[None]:
    """Context of a stage's work: logging, messages of errors and of signals, then the check of imports, and provenance."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    started = time.time()
    _used.clear()
    one_thread()
    try:
        with interrupted_by_signal(), _beside_rank_0():
            check_code()
            yield
    except KeyboardInterrupt as interrupt:
        log.warning("%s", str(interrupt) or "interrupted; what is finished is kept; run again to go on")
        raise SystemExit(INTERRUPTED) from None
    except (ParamsError, StoreError, OSError, ValueError) as error:
        log.debug("", exc_info=True)
        raise click.ClickException(str(error)) from error
    except RuntimeError as error:
        _keep_traceback()
        raise click.ClickException(str(error)) from error
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {error}; please report it with {_keep_traceback()}"
        raise click.ClickException(text) from error
    name = stage_name()
    if name is None:
        return
    guard(name)
    name_of_device = device() if "torch" in sys.modules else "cpu"
    record = {
        "stage": name,
        "seconds": round(time.time() - started, 2),
        "device": name_of_device,
        "engine": "torchrun" if torchrun.is_in_use() else engine(),
        **_used,
        **devices.versions(name_of_device),
        **provenance.of_process(),
        "params_digest": params_digest(name),
        "code_digest": code_digest(),
    }
    provenance.write(folder, name, record)


@contextmanager
def _beside_rank_0() -> Iterator[None]:
    """Of the processes that torchrun has started, rank 0 alone runs the stage; the others train with it, and end here."""
    if not torchrun.is_in_use():
        yield
        return
    if (name := device()) != "cpu":
        torchrun.check_gpus(len(devices.visible(name)))
    if torchrun.is_first():
        try:
            yield
        finally:
            torchrun.end()
    else:
        torchrun.follow()
        raise SystemExit


def _keep_traceback() -> Path:
    """Writes the current exception's traceback to a file, for a report."""
    TRACEBACK.parent.mkdir(exist_ok=True)
    TRACEBACK.write_text(traceback.format_exc(), encoding="utf-8")
    return TRACEBACK


def imported_files() -> list[str]:
    """Files of tag2mask that this process has imported, relative to where it is installed, sorted."""
    files = set()
    for module in list(sys.modules.values()):
        origin = getattr(module, "__file__", None)
        if not isinstance(origin, str) or not Path(origin).is_absolute():  # torch names some modules by bare file names
            continue
        path = Path(origin).resolve()
        if path.is_relative_to(code_files.ROOT) and path.name != "__init__.py":
            files.add(path.relative_to(code_files.ROOT).as_posix())
    return sorted(file for file in files if code_files.is_code(file))


def is_exempt(file: str) -> bool:
    """Whether a file of the project says where work runs, and never what comes out."""
    return any(file == exempt or (exempt.endswith("/") and file.startswith(exempt)) for exempt in EXEMPT)


def code_digest() -> str:
    """sha256 of the files imported so far, by which unfinished work of other code is not continued."""
    digest = hashlib.sha256()
    for file in imported_files():
        if not is_exempt(file):
            digest.update(file.encode() + (code_files.ROOT / file).read_bytes())
    return digest.hexdigest()


def check_code() -> None:
    """ValueError where a stage of a project folder runs by other code than code.yaml says, as after an update."""
    name, recorded = stage_name(), Path(code_files.CODE_FILE)
    if name is None or not recorded.is_file():
        return
    entries = _code_entries(name, Path())
    stale = code_files.changed(yaml.safe_load(recorded.read_text(encoding="utf-8")) or {}, entries)
    if stale:
        raise ValueError(
            f"{recorded} does not go with the installed tag2mask ({', '.join(stale)} differ): start stages by "
            "`tag2mask run` or `dvc repro`, which renew it first"
        )


def guard(name: str, folder: Path = Path()) -> None:
    """RuntimeError if this process has imported a file of tag2mask that is no dep of stage `name` in folder/dvc.yaml."""
    deps, entries = declared_deps(name, folder), _code_entries(name, folder)
    covered = tuple(dep.rstrip("/") + "/" for dep in deps)
    undeclared = [
        file
        for file in imported_files()
        if not is_exempt(file)
        and file not in deps
        and not file.startswith(covered)
        and not any(code_files.covers(entry, file) for entry in entries)
    ]
    if undeclared:
        raise RuntimeError(
            f"stage {name} imported {', '.join(undeclared)}, which dvc.yaml does not list among its deps: a change there "
            "would not re-run the stage. Add it to deps in dvc.yaml, or do not import it"
        )


def declared_deps(name: str, folder: Path = Path()) -> list[str]:
    """Deps of a stage, as DVC resolves them."""
    return [dep if isinstance(dep, str) else next(iter(dep)) for dep in _resolved(name, folder).get("deps", [])]


def _code_entries(name: str, folder: Path) -> list[str]:
    """What a stage of a project folder declares of code.yaml; [] in a clone."""
    params = _resolved(name, folder).get("params", [])
    return [key for entry in params if isinstance(entry, dict) for key in entry.get(code_files.CODE_FILE, [])]


def command_paths(name: str, folder: Path = Path()) -> dict[str, Path]:
    """Paths by option name of a stage's command line in dvc.yaml, the only place that has them."""
    words = shlex.split(_resolved(name, folder)["cmd"])
    return {word[2:]: Path(words[index + 1]) for index, word in enumerate(words) if word.startswith("--")}


def params_digest(name: str, folder: Path = Path()) -> str:
    """sha256 of the values of the params that a stage declares, of params.yaml and of its recipe."""
    values: dict[str, Any] = {}
    for entry in _resolved(name, folder).get("params", []):
        by_file = {PARAMS_FILE.name: [entry]} if isinstance(entry, str) else entry
        for file, keys in by_file.items():
            content = yaml.safe_load((folder / file).read_text(encoding="utf-8"))
            values |= {f"{file}:{key}": _value_at(content, key) for key in keys}
    return store.digest(values)


def _value_at(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content


def _resolved(name: str, folder: Path) -> dict[str, Any]:
    """A stage's entry in folder/dvc.yaml with ${…} resolved by DVC's own parser; the rest of DVC is slow to import."""
    from dvc.parsing.context import Context

    params = yaml.safe_load((folder / PARAMS_FILE).read_text(encoding="utf-8"))
    base, _, key = name.partition("@")
    entry = yaml.safe_load((folder / "dvc.yaml").read_text(encoding="utf-8"))["stages"][base]
    context = Context(params)
    if "foreach" in entry:
        runs = context.resolve(entry["foreach"])
        context = Context({**params, "key": key, "item": runs[key]})
        entry = entry["do"]
    return context.resolve(entry)
