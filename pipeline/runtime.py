"""The environment → device, processes, progress, provenance. Decides where work runs and never what comes out.

This is the only file that reads os.environ, and the only project file that is in no stage's deps.

TAG2MASK_DEVICE    auto (default) | cpu | cuda | cuda:1
TAG2MASK_WORKERS   processes for work that is cut into parts; default: one per core, 1 on CUDA
TAG2MASK_RANKS     processes that share the shards of a training step; default: one per core, or per CUDA device
TAG2MASK_LAUNCHER  spawn (default) | inline: run everything in this process, for debugging
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from pipeline.core import store
from pipeline.core.config import PARAMS_FILE, ParamsError
from pipeline.core.store import StoreError

PROJECT = Path(__file__).resolve().parents[1]
PROVENANCE = Path("provenance")
EXEMPT = "pipeline/runtime.py"

In = TypeVar("In")
Out = TypeVar("Out")

log = logging.getLogger("tag2mask")


def _choice(name: str, default: str, allowed: Callable[[str], bool], what: str) -> str:
    value = os.environ.get(name, default)
    if not allowed(value):
        raise SystemExit(f"{name}={value!r} is not allowed; allowed is {what}")
    return value


def _count(name: str, default: int) -> int:
    return int(_choice(name, str(default), lambda text: text.isdigit() and int(text) >= 1, "a whole number >= 1"))


def cores() -> int:
    return len(os.sched_getaffinity(0))


def device() -> str:
    """Torch device name. Asks torch only where the variable leaves it open."""
    value = _choice(
        "TAG2MASK_DEVICE",
        "auto",
        lambda text: text in ("auto", "cpu") or text.startswith("cuda"),
        "auto, cpu, cuda or cuda:N",
    )
    if value == "cpu":
        return value
    import torch

    if value == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.cuda.is_available():
        raise SystemExit(f"TAG2MASK_DEVICE={value}, but torch sees no CUDA device; `make doctor` says why")
    return value


def workers(on: str = "cpu") -> int:
    return _count("TAG2MASK_WORKERS", cores() if on == "cpu" else 1)


def ranks(shards: int) -> int:
    """Training processes: never more than shards, since a shard is not cut."""
    on = device()
    if on == "cpu":
        default = cores()
    else:
        import torch

        default = torch.cuda.device_count() if on == "cuda" else 1
    return min(shards, _count("TAG2MASK_RANKS", default))


def loaders(device: str) -> int:
    """Threads that decode images ahead of training. On CPU the cores are the ranks', so decoding stays in line."""
    return 0 if device == "cpu" else _count("TAG2MASK_WORKERS", min(8, cores()))


def check_params() -> None:
    """Strictly parses all of params.yaml in a process of its own, so that no plug-in of another stage is imported here.

    A typing error in retrain is then found before train has run for hours. Only DVC runs need it.
    """
    if stage_name() is None:
        return
    done = subprocess.run([sys.executable, "-m", "stages.check"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ParamsError(done.stderr.strip().removeprefix("Error: "))


def inline() -> bool:
    allowed = ("spawn", "inline")
    return _choice("TAG2MASK_LAUNCHER", "spawn", lambda text: text in allowed, "spawn or inline") == "inline"


def stage_name() -> str | None:
    """`train@cam` when DVC runs us, else None."""
    return os.environ.get("DVC_STAGE")


def one_thread() -> None:
    """One torch thread in this process and in those that it starts: images and shards share the cores, sums have one order.

    Before anything is built or computed: two threads that make MKL's first call of a vector function together can get a kernel of
    low accuracy (pytorch/pytorch#188792).
    """
    os.environ.update(
        {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    )  # for a torch that is imported later, and for children
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def each(
    function: Callable[[In], Out], items: Sequence[In], *, what: str, device: str = "cpu", unit: int = 1
) -> Iterator[Out]:
    """function(item) for every item, results in the order of `items`, with a progress bar. unit: images an item.

    With more than one process, `function` must be picklable; at most two items per process are in flight, so memory does not
    grow with their number. An error in one item ends the run after the items in flight have finished. Every process has one thread.
    """
    one_thread()
    processes = workers(device)
    if processes == 1 or len(items) <= 1 or inline():
        yield from progress(map(function, items), len(items) * unit, what, unit)
        return
    yield from progress(_pooled(function, items, processes), len(items) * unit, what, unit)


def _pooled(function: Callable[[In], Out], items: Sequence[In], processes: int) -> Iterator[Out]:
    context = multiprocessing.get_context("spawn")  # fork after torch has threads is unsafe
    with ProcessPoolExecutor(min(processes, len(items)), context, one_thread) as pool:
        running: dict[Future[Out], int] = {}
        done: dict[int, Out] = {}
        source, next_out = iter(enumerate(items)), 0
        exhausted = False
        while not exhausted or running:
            while not exhausted and len(running) + len(done) < 2 * processes + 2:
                try:
                    at, item = next(source)
                except StopIteration:
                    exhausted = True
                    break
                running[pool.submit(function, item)] = at
            finished, _ = wait(running, return_when=FIRST_COMPLETED) if running else (set(), None)
            for future in finished:
                done[running.pop(future)] = future.result()
            while next_out in done:
                yield done.pop(next_out)
                next_out += 1


def info(text: str, *values: object) -> None:
    """Logs a line."""
    log.info(text, *values)


def progress(items: Iterable[Out], total: int, what: str, unit: int = 1) -> Iterator[Out]:
    """Passes items through with a rich bar on a terminal, and a log line at each tenth elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total, note="")
            for item in items:
                yield item
                bar.update(task, advance=unit, note=item if isinstance(item, str) else "")
        return
    started, told = time.monotonic(), 0
    for at, item in enumerate(items, 1):
        yield item
        tenth = at * unit * 10 // max(1, total)
        if tenth > told:
            told = tenth
            note = f" {item}" if isinstance(item, str) else ""
            log.info("%s %d/%d %.0f s%s", what, at * unit, total, time.monotonic() - started, note)


@contextmanager
def stage(provenance: Path = PROVENANCE) -> Iterator[None]:
    """Wraps a stage script's work: logging before, import guard and provenance after."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    started = time.time()
    one_thread()
    try:
        yield
    except (ParamsError, StoreError, FileNotFoundError, ValueError) as error:
        log.debug("", exc_info=True)
        raise click.ClickException(str(error)) from error
    name = stage_name()
    if name is None:
        return
    guard(name)
    usage = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    provenance.mkdir(exist_ok=True)
    facts = {
        "stage": name,
        "seconds": round(time.time() - started, 2),
        "peak_memory_mib": round(usage[0].ru_maxrss / 1024, 1),
        "peak_memory_mib_largest_child": round(usage[1].ru_maxrss / 1024, 1),
        "device": device() if "torch" in sys.modules else "cpu",
        "host": platform.node(),
        "python": platform.python_version(),
        "params_digest": params_digest(name),
        "code_digest": code_digest(),
        "versions": {
            package: metadata.version(package)
            for package in ("torch", "timm", "numpy", "pillow", "h5py", "dvc")
            if package.split("-")[0] in sys.modules or package == "dvc"
        },
    }
    _write_whole(provenance / f"{name}.json", json.dumps(facts, indent=1) + "\n")
    provenance_script(provenance)


def provenance_script(folder: Path) -> None:
    """provenance.js: what all *.json of the folder say, as a call that the report makes use of; the report itself holds none of it."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    _write_whole(folder / "provenance.js", f"tag2mask.provenance({json.dumps(found)});\n")


def _write_whole(path: Path, text: str) -> None:
    """By a rename, since stages of several columns may end, and read one another's files, at the same time."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def imported_files() -> list[str]:
    """Project files that this process has imported, relative to the project, sorted."""
    files = set()
    for module in list(sys.modules.values()):
        origin = getattr(module, "__file__", None)
        if not isinstance(origin, str) or not Path(origin).is_absolute():  # torch names some modules by bare file names
            continue
        path = Path(origin).resolve()
        if path.is_relative_to(PROJECT) and ".venv" not in path.parts and path.name != "__init__.py":
            files.add(path.relative_to(PROJECT).as_posix())
    return sorted(files)


def code_digest() -> str:
    """sha256 over the project files imported so far: unfinished work of other code is never picked up again."""
    digest = hashlib.sha256()
    for file in imported_files():
        if file != EXEMPT:
            digest.update(file.encode() + (PROJECT / file).read_bytes())
    return digest.hexdigest()


def guard(name: str, folder: Path = PROJECT) -> None:
    """RuntimeError if this process has imported a project file that stage `name` of folder/dvc.yaml does not declare as a dep."""
    deps = declared_deps(name, folder)
    covered = tuple(dep.rstrip("/") + "/" for dep in deps)
    strays = [file for file in imported_files() if file != EXEMPT and file not in deps and not file.startswith(covered)]
    if strays:
        raise RuntimeError(
            f"stage {name} imported {', '.join(strays)}, which dvc.yaml does not list among its deps: a change there "
            "would not re-run the stage. Add it to deps in dvc.yaml, or do not import it"
        )


def declared_deps(name: str, folder: Path = PROJECT) -> list[str]:
    """The deps of one stage, as DVC resolves them."""
    return [dep if isinstance(dep, str) else next(iter(dep)) for dep in _resolved(name, folder).get("deps", [])]


def command_paths(name: str, folder: Path = PROJECT) -> dict[str, Path]:
    """The options of one stage's command line, as dvc.yaml has them: paths stand there alone."""
    words = shlex.split(_resolved(name, folder)["cmd"])
    return {word[2:]: Path(words[at + 1]) for at, word in enumerate(words) if word.startswith("--")}


def params_digest(name: str, folder: Path = PROJECT) -> str:
    """sha256 over the values of the params that one stage declares, of params.yaml and of its recipe."""
    values: dict[str, Any] = {}
    for entry in _resolved(name, folder).get("params", []):
        by_file = {PARAMS_FILE.name: [entry]} if isinstance(entry, str) else entry
        for file, keys in by_file.items():
            content = yaml.safe_load((folder / file).read_text(encoding="utf-8"))
            values |= {f"{file}:{key}": _at(content, key) for key in keys}
    return store.digest(values)


def _at(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content


def _resolved(name: str, folder: Path) -> dict[str, Any]:
    """A stage's entry in folder/dvc.yaml, its ${…} filled in by DVC's own rules, without the rest of DVC, which starts slowly."""
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
