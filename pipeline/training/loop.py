"""A Trainable + images → trained weights and a CSV of losses. One loop for methods, learned refiners and segmenters.

A step is cut into `shards`; every shard is computed by itself, with one torch thread on CPU, and their gradients are summed in
shard order. Ranks (processes) only share out the shards, so the result does not depend on how many there are.

A phase with `keep_best` is scored after each epoch, on at most SCORED training images that are always the same, each seen in the same
crop without augmentation, shared out over the ranks as shards are. It ends with the weights of the best epoch. No mask is involved.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes
from torch import Tensor

from pipeline.core.contracts import Batch, Clock, Phase
from pipeline.core.records import sample
from pipeline.training import checkpoint, optim
from pipeline.training.data import Draw, TrainingImages, order, seed_of

CHECKPOINT_SECONDS = 45.0
LOG_STEPS = 10
SCORED = 512  # images
GROW_SCALE_AFTER = 2000  # fp16: good steps in a row before the loss scale doubles
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Job:
    """All that a rank needs, picklable. `build` makes the trainable with its initial weights, the same in every process."""

    build: Callable[[], Any]
    images: TrainingImages
    seed: int
    precision: str
    work: Path  # checkpoints lie here until the run has ended well
    device: str
    ranks: int
    loaders: int  # threads that decode ahead, per rank; 0 decodes in line


def train(job: Job) -> Iterator[str]:
    """Runs or resumes the job; yields a short note after each step. Leaves `model` and `log.csv` to `finished(job)`."""
    if not len(job.images):
        raise ValueError("there is no training image: records.h5 has none in split train that can be used here")
    trainable = job.build()
    shared = _Shared.allocate(trainable, job)
    others = []
    if job.ranks > 1:
        context = processes.get_context("spawn")
        shared = replace(shared, barrier=context.Barrier(job.ranks))
        others = [context.Process(target=_other_rank, args=(job, shared, rank), daemon=True) for rank in range(1, job.ranks)]
        for other in others:
            other.start()
    try:
        yield from _run(job, trainable, shared, 0)
    except BaseException:
        if shared.barrier is not None:
            shared.barrier.abort()
        raise
    finally:
        for other in others:
            other.join(timeout=30)
    if not (job.work / "log.csv").exists():  # no phase has a step
        job.work.mkdir(parents=True, exist_ok=True)
        (job.work / "log.csv").write_text(_table([{"step": 0, "phase": "none", "lr": 0.0, "loss": 0.0}]), encoding="utf-8")
    checkpoint.save_tensors(job.work / "trained.safetensors", trainable.state_dict(), {})


def total_steps(job: Job) -> int:
    """Steps of all phases together."""
    return sum(_steps(phase, len(job.images)) for phase in job.build().phases())


def _steps(phase: Phase, count: int) -> int:
    return max(1, round(phase.epochs * count / phase.batch_size)) if phase.epochs > 0 else 0


@dataclass
class _Shared:
    """Memory that all ranks see: per step parity and shard, the gradients and float buffers laid end to end, and losses."""

    flat: Tensor  # f32[2, shards, gradients + buffers]
    losses: Tensor  # f64[2, shards, names]
    scores: Tensor  # f64[shards, 2], a sum and of how many
    barrier: Any

    @staticmethod
    def allocate(trainable: Any, job: Job) -> _Shared:
        shards = max(phase.shards for phase in trainable.phases())
        size = sum(p.numel() for p in trainable.parameters()) + sum(b.numel() for b in _buffers(trainable))
        flat, losses = torch.zeros(2, shards, size), torch.zeros(2, shards, 16, dtype=torch.float64)
        scores = torch.zeros(shards, 2, dtype=torch.float64)
        if job.ranks > 1:
            for shared in (flat, losses, scores):
                shared.share_memory_()
        return _Shared(flat, losses, scores, None)

    def meet(self) -> None:
        # parity makes one meeting per step enough: a row is written again only after the next meeting
        if self.barrier is not None:
            self.barrier.wait(timeout=3600)


def _buffers(trainable: Any) -> list[Tensor]:
    return [buffer for buffer in trainable.buffers() if buffer.is_floating_point()]


def _other_rank(job: Job, shared: _Shared, rank: int) -> None:
    for _ in _run(job, job.build(), shared, rank):
        pass


def _run(job: Job, trainable: Any, shared: _Shared, rank: int) -> Iterator[str]:
    if job.device == "cpu":
        torch.set_num_threads(1)
    device = f"cuda:{rank}" if job.device == "cuda" and job.ranks > 1 else job.device
    trainable.to(device).train()
    phases: list[Phase] = trainable.phases()
    state = _State(job, trainable)
    state.resume()
    for number, phase in enumerate(phases):
        if number < state.phase:
            continue
        if phase.restart and state.step == 0:
            fresh = {name: value for name, value in job.build().state_dict().items() if name.startswith(phase.restart)}
            trainable.load_state_dict(fresh, strict=False)
        yield from _run_phase(job, trainable, shared, rank, device, state, number, phase)
        state.phase, state.step = number + 1, 0
        state.optimiser = None


def _run_phase(
    job: Job, trainable: Any, shared: _Shared, rank: int, device: str, state: _State, number: int, phase: Phase
) -> Iterator[str]:
    steps, mine = _steps(phase, len(job.images)), range(rank, phase.shards, job.ranks)
    before_phase = sum(_steps(earlier, len(job.images)) for earlier in trainable.phases()[:number])
    groups = trainable.param_groups(phase)
    optimiser = optim.make(phase, groups)
    state.adopt(optimiser)
    trained = [parameter for group in groups for parameter in group.parameters]
    buffers = _buffers(trainable)
    saved = time.monotonic()
    for step, batches in _batches(job, number, phase, steps, state.step, mine):
        parity, clock = (before_phase + step) % 2, Clock(number, step, steps)  # it must alternate across phases too
        before = [buffer.clone() for buffer in trainable.buffers()]  # each shard starts from the same running statistics
        names: list[str] = []
        for shard, batch in zip(mine, batches, strict=True):
            for buffer, value in zip(trainable.buffers(), before, strict=True):
                buffer.copy_(value)
            torch.manual_seed(seed_of("model", job.seed, number, step, shard))
            for parameter in trained:
                parameter.grad = None
            losses = _losses(trainable, _to(batch, device), clock, job.precision, device)
            names = list(losses)
            total = torch.stack(list(losses.values())).sum()
            (total * (state.scale / phase.shards)).backward()
            _pack(shared.flat[parity, shard], trained, buffers)
            shared.losses[parity, shard, : len(names)] = torch.stack(
                [value.detach().double() for value in losses.values()]
            ).cpu()
        shared.meet()
        optim.set_lr(optimiser, phase.lr * optim.lr_factor(phase, step, steps))
        finite = _unpack(shared.flat[parity, : phase.shards], trained, buffers, state.scale)
        means = shared.losses[parity, : phase.shards, : len(names)].mean(dim=0).tolist() if names else []
        if finite:
            optimiser.step()
        elif job.precision != "fp16":
            told = ", ".join(f"{name} {value:g}" for name, value in zip(names, means, strict=True))
            raise RuntimeError(
                f"phase {phase.name}, step {step}: gradients are not finite (losses: {told}); "
                "lower schedule.lr or raise schedule.warmup in params.yaml"
            )
        state.after_step(step + 1, finite, job.precision)
        score = None
        if phase.keep_best and _ends_epoch(phase, step, steps, len(job.images)):
            score = _score(job, trainable, shared, mine, number, phase, device)
            state.keep(phase.keep_best, score)
        if rank == 0:
            state.log(phase, step, steps, dict(zip(names, means, strict=True)), optimiser, score)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                state.save(optimiser)
                saved = time.monotonic()
        yield f"{phase.name} loss {sum(means):.4f}"
    state.put_best()


def _ends_epoch(phase: Phase, step: int, steps: int, count: int) -> bool:
    """Whether a pass over the images ends within this step. The last step always counts: steps are a rounded number."""
    return step + 1 == steps or (step + 1) * phase.batch_size // count > step * phase.batch_size // count


def _score(
    job: Job, trainable: Any, shared: _Shared, mine: Sequence[int], number: int, phase: Phase, device: str
) -> float | None:
    """The mean score of the weights as they are, the same in all ranks; None where nothing could be scored."""
    images, each = scored_images(job.images), phase.batch_size // phase.shards
    modes = [(module, module.training) for module in trainable.modules()]
    trainable.eval()
    for shard in mine:
        torch.manual_seed(seed_of("score", job.seed, number, shard))
        total = torch.zeros(2, dtype=torch.float64)
        for at in range(shard * each, len(images), each * phase.shards):
            draws = [Draw(index, 0) for index in range(at, min(at + each, len(images)))]
            with torch.no_grad(), _autocast(job.precision, device):
                total += trainable.score(_to(images.batch(number, draws), device)).double().cpu()
        shared.scores[shard] = total
    for module, mode in modes:
        module.training = mode
    shared.meet()  # the steps of an epoch meet too, so nobody writes again before all have read
    total, count = shared.scores[: phase.shards].sum(dim=0).tolist()
    return total / count if count and math.isfinite(total) else None


def scored_images(images: TrainingImages) -> TrainingImages:
    """At most SCORED of them, fixed by their ids, with augmentation off: a square of the short side, at a place fixed by the id."""
    plain = replace(
        images.augment, scale_min=1.0, scale_max=1.0, area_min=None, flip=0.0, jitter=0.0, rand_augment=None, erase=0.0
    )
    return replace(images, records=sample(images.records, SCORED), augment=plain)


def _batches(
    job: Job, number: int, phase: Phase, steps: int, first: int, mine: Sequence[int]
) -> Iterator[tuple[int, list[Batch]]]:
    """(step, this rank's shards) from step `first` on; with loaders, the next steps are decoded ahead by threads."""
    each = phase.batch_size // phase.shards

    def make(step: int, shard: int) -> Batch:
        draws = order(job.seed, number, len(job.images), phase.batch_size, step)
        return job.images.batch(number, draws[shard * each : (shard + 1) * each])

    if job.loaders == 0:
        for step in range(first, steps):
            yield step, [make(step, shard) for shard in mine]
        return
    ahead = 2 + job.loaders // max(1, len(mine))
    with ThreadPoolExecutor(job.loaders) as pool:
        waiting = {s: [pool.submit(make, s, shard) for shard in mine] for s in range(first, min(steps, first + ahead))}
        for step in range(first, steps):
            if step + ahead < steps:
                waiting[step + ahead] = [pool.submit(make, step + ahead, shard) for shard in mine]
            yield step, [future.result() for future in waiting.pop(step)]


def _autocast(precision: str, device: str) -> torch.autocast:
    dtype = PRECISIONS[precision]
    return torch.autocast(device.split(":")[0], dtype=dtype, enabled=dtype is not None)


def _losses(trainable: Any, batch: Batch, clock: Clock, precision: str, device: str) -> dict[str, Tensor]:
    with _autocast(precision, device):
        return {name: value.float() for name, value in trainable.losses(batch, clock).items()}


def _to(batch: Batch, device: str) -> Batch:
    if device == "cpu":
        return batch
    return Batch(
        images=batch.images.to(device, non_blocking=True),
        tags=batch.tags.to(device, non_blocking=True),
        valid=batch.valid.to(device, non_blocking=True),
        masks=None if batch.masks is None else batch.masks.to(device, non_blocking=True),
    )


def _pack(row: Tensor, trained: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
    at = 0
    for parameter in trained:
        target = row[at : at + parameter.numel()]
        at += parameter.numel()
        if parameter.grad is None:
            target.zero_()
        else:
            target.copy_(parameter.grad.reshape(-1))
    for buffer in buffers:
        row[at : at + buffer.numel()].copy_(buffer.reshape(-1))
        at += buffer.numel()


def _unpack(rows: Tensor, trained: Sequence[Tensor], buffers: Sequence[Tensor], scale: float) -> bool:
    """Sets each gradient to the sum over shards and each float buffer to their mean. False if a gradient is not finite."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    at = 0
    for parameter in trained:
        gradient = total[at : at + parameter.numel()].to(parameter.device).reshape(parameter.shape)
        parameter.grad = gradient if scale == 1 else gradient / scale
        at += parameter.numel()
    finite = bool(torch.isfinite(total[:at].sum()))
    for buffer in buffers:
        buffer.copy_((total[at : at + buffer.numel()] / len(rows)).reshape(buffer.shape))
        at += buffer.numel()
    return finite


class _State:
    """Where a run stands, and its checkpoint file."""

    def __init__(self, job: Job, trainable: Any) -> None:
        self.path = job.work / "checkpoint.safetensors"
        self.trainable = trainable
        self.phase, self.step = 0, 0
        self.scale = 2.0**14 if job.precision == "fp16" else 1.0
        self.good = 0
        self.rows: list[dict[str, Any]] = []
        self.recent: list[dict[str, float]] = []
        self.before = 0  # steps of finished phases
        self.optimiser: dict[str, Tensor] | None = None
        self.best: dict[str, Tensor] = {}  # of this phase
        self.best_score: float | None = None

    def resume(self) -> None:
        if not self.path.exists():
            return
        tensors, told = checkpoint.read_tensors(self.path), checkpoint.read_metadata(self.path)
        self.trainable.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
        self.optimiser = {name[6:]: value for name, value in tensors.items() if name.startswith("optim.")}
        self.best = {name[5:]: value for name, value in tensors.items() if name.startswith("best.")}
        facts = json.loads(told["state"])
        self.phase, self.step, self.scale, self.good = facts["phase"], facts["step"], facts["scale"], facts["good"]
        self.rows, self.recent, self.before = facts["rows"], facts["recent"], facts["before"]
        self.best_score = facts["best_score"]

    def adopt(self, optimiser: torch.optim.Optimizer) -> None:
        """Gives a fresh optimiser the moments of the checkpoint, if there is one for this phase."""
        if not self.optimiser:
            return
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in self.optimiser.items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})

    def save(self, optimiser: torch.optim.Optimizer) -> None:
        tensors = {f"model.{name}": value for name, value in self.trainable.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for index, moments in optimiser.state_dict()["state"].items():
            tensors |= {
                f"optim.{index}.{key}": torch.as_tensor(value) for key, value in moments.items() if value is not None
            }
        facts = {
            "phase": self.phase, "step": self.step, "scale": self.scale, "good": self.good, "rows": self.rows,
            "recent": self.recent, "before": self.before, "best_score": self.best_score,
        }  # fmt: skip
        checkpoint.save_tensors(self.path, tensors, {"state": json.dumps(facts)})

    def keep(self, prefixes: tuple[str, ...], score: float | None) -> None:
        """Remembers the weights as they are, if none were better."""
        if score is None or (self.best_score is not None and score <= self.best_score):
            return
        self.best_score = score
        weights = self.trainable.state_dict()
        self.best = {name: value.detach().clone() for name, value in weights.items() if name.startswith(prefixes)}

    def put_best(self) -> None:
        """As a phase ends: what was remembered takes the place of what is; where nothing was, all stays."""
        self.trainable.load_state_dict(self.best, strict=False)
        self.best, self.best_score = {}, None

    def after_step(self, done: int, finite: bool, precision: str) -> None:
        self.step = done
        if precision != "fp16":
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good % GROW_SCALE_AFTER == 0:
            self.scale *= 2

    def log(
        self,
        phase: Phase,
        step: int,
        steps: int,
        losses: dict[str, float],
        optimiser: torch.optim.Optimizer,
        score: float | None,
    ) -> None:
        """A row of means every LOG_STEPS, at the end, and wherever there is a score."""
        self.recent.append({"loss": math.fsum(losses.values()), **losses})
        if (step + 1) % LOG_STEPS == 0 or step + 1 == steps or score is not None:
            names = sorted({name for row in self.recent for name in row} - {"loss"})
            mean = {name: sum(row.get(name, 0.0) for row in self.recent) / len(self.recent) for name in ["loss", *names]}
            lr = max(group["lr"] for group in optimiser.param_groups)
            told = {} if score is None else {"score": score}
            self.rows.append({"step": self.before + step + 1, "phase": phase.name, "lr": lr, **mean, **told})
            self.recent = []
            (self.path.parent / "log.csv").parent.mkdir(parents=True, exist_ok=True)
            (self.path.parent / "log.csv").write_text(_table(self.rows), encoding="utf-8")
        if step + 1 == steps:
            self.before += steps


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    return text.getvalue()
