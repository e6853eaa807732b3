"""`tag2mask weights`: the table of known weights, one of them fetched to where recipes look for it, any file explained."""

from __future__ import annotations

import hashlib
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from pipeline.core import plugins
from pipeline.jobs import known_weights
from pipeline.jobs.engine import Engine
from pipeline.jobs.known_weights import KNOWN, OWN, KnownWeights

CHUNK = 2**20  # bytes
TIMEOUT = 30  # s without an answer
SAFETENSORS, ONNX, TORCH = ".safetensors", ".onnx", (".pth", ".pt", ".bin")
# architectures that `check` tries, by a key that only their family has; ViTs by width: position embeddings are resampled
MARKS = {
    "blocks.0.norm1.weight": "vit", "patch_embed1.proj.weight": "mit", "encoder.patch_embed1.proj.weight": "mit",
    "layer1.0.conv1.weight": "resnet", "conv1a.weight": "resnet", "conv_stem.weight": "efficientnet",
}  # fmt: skip
VITS = {
    192: ("deit_tiny_patch16_224",),
    384: ("deit_small_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"),
    768: ("vit_base_patch16_224", "vit_base_patch14_dinov2", "vit_base_patch14_reg4_dinov2"),
    1024: ("vit_large_patch16_224", "vit_large_patch14_dinov2"),
}
OTHERS = {
    "vit": ("scenes_vit",),
    "mit": ("scenes_mit", "mit_b0", "mit_b1", "mit_b2", "mit_b3", "mit_b4", "mit_b5"),
    "resnet": ("scenes_resnet", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet38d"),
    "efficientnet": ("tf_efficientnet_lite0", "efficientnet_b0", "mobilenetv2_100"),
}
ANY_SIZE = 224  # px, for which a ViT is built; position embeddings are resampled


@dataclass(frozen=True)
class Findings:
    """What `check` says about a file.

    sha256    of the file
    lines     what it is, for people
    problems  why it cannot be used; () where it can
    """

    sha256: str
    lines: tuple[str, ...]
    problems: tuple[str, ...]


def digest_of(path: Path) -> str:
    """sha256 of a file, which is not held in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(path: Path) -> dict[str, Any]:
    """Torch tensors of a .safetensors or .pth file in its own precision, out of wrappers. ValueError: neither, or broken."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from pipeline.nn.weights import unwrapped

    if path.suffix not in (SAFETENSORS, *TORCH):
        raise ValueError(f"{path}: allowed are files that end in {', '.join((SAFETENSORS, *TORCH, ONNX))}")
    try:
        state = load_file(path) if path.suffix == SAFETENSORS else torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None
    except UnpicklingError:
        raise ValueError(f"{path} holds more than tensors (pickled code), which is never run") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error) or "it ends early").splitlines()[0]
        raise ValueError(f"{path} is no whole file of torch.save: {reason}") from None
    tensors = unwrapped(state) if isinstance(state, Mapping) else {}
    if not tensors:
        raise ValueError(f"{path} holds no tensors; expected a state dict")
    return tensors


# ---- check ----


def check(path: Path) -> Findings:
    """A file of weights → what it is and what it fits. FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; `tag2mask weights list` says what there is to get")
    sha256 = digest_of(path)
    known = known_weights.of_digest(sha256)
    lines = (
        [] if known is None else [f"{known[0].name}, {known[1]}: {known[0].purpose}; learned from {known[0].supervision}"]
    )
    if path.suffix == ONNX:
        from pipeline.refiners.segments.onnx_network import described

        try:
            return Findings(sha256, (*lines, described(path.read_bytes(), str(path))), ())
        except ValueError as error:
            return Findings(sha256, tuple(lines), (str(error),))
    try:
        tensors = read_tensors(path)
    except ValueError as error:
        return Findings(sha256, tuple(lines), (str(error),))
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()})
    lines.append(f"{len(tensors)} tensors, {sum(value.numel() for value in tensors.values()):,} numbers, {', '.join(kinds)}")
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    problems = [f"{len(broken)} tensors have values that are not finite, {broken[0]} among them"] if broken else []
    fits = fitting(tensors, path)
    lines += [f"fits {words}" for words in fits]
    if not fits and known is None:
        lines.append("fits no architecture that was tried; `--backbone FOLDER --architecture NAME` tries another")
    return Findings(sha256, tuple(lines), tuple(problems))


def check_architecture(path: Path, family: str, architecture: str) -> str | None:
    """Why a file does not fit an architecture of pipeline/nn/<family>, or None. ValueError: there is no such
    architecture."""
    backbones = plugins.load("nn", family)
    backbone = backbones.create(architecture, ANY_SIZE, drop_path=0.0)
    try:
        backbones.load_initial(backbone, path)
    except (ValueError, KeyError, RuntimeError, AttributeError) as error:
        return str(error)
    return None


def fitting(tensors: Mapping[str, Any], path: Path) -> list[str]:
    """In words of params.yaml, what the tensors of a file fit, by the strict loaders that training uses."""
    if "stage1.rebnconvin.weight" in tensors and saliency_problem(tensors, path) is None:
        return ["refiner segments, source network"]
    family = next((MARKS[mark] for mark in MARKS if mark in tensors), None)
    if family is None:
        return []
    patches = tensors.get("patch_embed.proj.weight")
    names = OTHERS[family] if patches is None else VITS.get(len(patches), ())
    return [f"backbone {family}, architecture {name}" for name in names if check_architecture(path, family, name) is None]


def saliency_problem(tensors: Mapping[str, Any], path: Path) -> str | None:
    from pipeline.refiners.segments.u2net import Saliency

    try:
        Saliency({name: value.float().numpy() for name, value in tensors.items()}, str(path))
    except ValueError as error:
        return str(error)
    return None


# ---- get ----


def get(weights: KnownWeights, source: Path | None, engine: Engine) -> tuple[Path, str]:
    """Brings a file of the table to where recipes look for it, checked → its path and sha256. Leaves one that is there.

    source: a file that was fetched by hand, or None to fetch it. ValueError says what is wrong, and what to do by hand.
    """
    target = Path(weights.path)
    if target.is_file():
        engine.info("%s is there; delete it to get it anew", target)
        return target, digest_of(target)
    if weights.licence == OWN:
        raise ValueError(f"{target} is part of the repository: `git checkout {target}` brings it back")
    target.parent.mkdir(parents=True, exist_ok=True)
    if source is None:
        if not weights.url:
            raise ValueError(f"{weights.name} has no address of a file, only a page.\n{by_hand(weights)}")
        source = fetched(weights, target.with_name(f".{weights.name}.partial{Path(weights.url).suffix}"), engine)
        try:
            return _placed(weights, source, target)
        finally:
            source.unlink(missing_ok=True)
    if not source.is_file():
        raise ValueError(f"--from: there is no file {source}")
    return _placed(weights, source, target)


def by_hand(weights: KnownWeights) -> str:
    """What to do on a machine without network."""
    what = weights.url or f"the file that {weights.page} names"
    return (
        f"Fetch {what} on a machine with network, bring the file here, and run\n"
        f"    tag2mask weights get {weights.name} --from FILE"
    )


def fetched(weights: KnownWeights, partial: Path, engine: Engine) -> Path:
    """Downloads weights.url → `partial`. ValueError without network, or where the sha256 is another's."""
    try:
        with urllib.request.urlopen(weights.url, timeout=TIMEOUT) as answer, partial.open("wb") as file:
            size = int(answer.headers.get("Content-Length") or 0)
            for chunk in engine.progress(_chunks(answer), -(-size // CHUNK), f"{weights.name} (MB)"):
                file.write(chunk)
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        partial.unlink(missing_ok=True)
        reason = getattr(error, "reason", error)
        raise ValueError(f"{weights.url} cannot be fetched: {reason}.\n{by_hand(weights)}") from None
    actual = digest_of(partial)
    if not actual.startswith(weights.digest):
        partial.unlink()
        raise ValueError(
            f"{weights.url} gave a file with sha256 {actual}, expected is {weights.digest}…; it was thrown away: "
            "fetch it again, or by hand"
        )
    return partial


def _chunks(answer: Any) -> Iterator[bytes]:
    while chunk := answer.read(CHUNK):
        yield chunk


def _placed(weights: KnownWeights, source: Path, target: Path) -> tuple[Path, str]:
    """Converts to what recipes name, checks with the loader that will read it, and moves into place."""
    partial = target.with_name(f".{target.stem}.converted{target.suffix}")
    try:
        converted(weights, source, partial)
        problem = fit_problem(weights, partial)
        if problem:
            raise ValueError(f"{source} is not {weights.name}: {problem}\n`tag2mask weights check {source}` says what it is")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target, digest_of(target)


def converted(weights: KnownWeights, source: Path, target: Path) -> None:
    """Writes `source` in the target's format, its precision kept; bytes stay as they are where the format does."""
    if source.suffix == target.suffix and source.suffix in (SAFETENSORS, ONNX):
        shutil.copyfile(source, target)
        return
    if target.suffix == ONNX or source.suffix == ONNX:
        raise ValueError(f"--from: got {source.name}, allowed is a file that ends in {target.suffix}")
    tensors = read_tensors(source)
    if weights.kind == "saliency":
        from pipeline.refiners.segments.u2net import folded

        tensors = folded(tensors)
    if target.suffix == SAFETENSORS:
        from safetensors.torch import save_file

        save_file({name: value.contiguous().clone() for name, value in sorted(tensors.items())}, target)
    else:
        shutil.copyfile(source, target)


def fit_problem(weights: KnownWeights, path: Path) -> str | None:
    """Why a file cannot serve as these weights, or None."""
    if path.suffix == ONNX:
        actual = digest_of(path)
        return None if actual.startswith(weights.digest) else f"its sha256 is {actual}, expected is {weights.digest}"
    try:
        tensors = read_tensors(path)
    except ValueError as error:
        return str(error)
    if any(value.is_floating_point() and not bool(value.isfinite().all()) for value in tensors.values()):
        return "it has values that are not finite"
    if weights.kind == "saliency":
        return saliency_problem(tensors, path)
    return check_architecture(path, weights.family, weights.architecture) if weights.family else None


def table() -> list[tuple[KnownWeights, bool]]:
    """All known weights, and whether each is in its place."""
    return [(weights, Path(weights.path).is_file()) for weights in KNOWN]
