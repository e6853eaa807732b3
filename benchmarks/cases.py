"""What `make bench` measures. Each case times our way and a plain reference in the same run, on data drawn here."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import afa, affinity, apc, semples, walks, weaktr
from benchmarks.timing import CLASSES, SIZE, Memory, Timing, best_of, mask, photograph
from pipeline.core import store
from pipeline.core.labels import LabelSpace


def prepare(folder: Path) -> list[Timing]:
    """Opening, hashing and checking images and masks in one process."""
    from pipeline.core.records import decode

    for index in range(60):
        Image.fromarray(photograph(index)).save(folder / f"{index}.jpg", quality=90)

    def ours() -> None:
        import hashlib

        for path in sorted(folder.glob("*.jpg")):
            data = path.read_bytes()
            decode(data)
            hashlib.sha256(data).digest()

    return [Timing("prepare: read, decode, hash", "images", 60, best_of(ours), None, "")]


def score_maps(folder: Path) -> list[Timing]:
    """CAM at scales 1.0 and 1.2 with flips, DeiT-Tiny: views in batches against one view at a time, all classes."""
    import torch
    import torch.nn.functional as F

    from pipeline.core import plugins
    from pipeline.core.records import ImageRecord
    from pipeline.core.sections import Extract
    from pipeline.imaging import transforms
    from pipeline.jobs.score_maps import score
    from pipeline.methods.cam import method as cam
    from pipeline.training.settings import Schedule

    del folder
    torch.set_num_threads(1)
    labels = LabelSpace(tuple(f"class {number}" for number in range(CLASSES)))
    params = cam.Params("deit_tiny_patch16_224", 224, "gap", 1.0, 0.1, 0.0)
    schedule = Schedule(1, 0, 1, 1, 1e-3, 0.0, "adamw", "poly", 0, 0.0)
    method = cam.Method(labels, params, schedule, plugins.load("nn", "vit")).eval()
    settings = Extract((1.0, 1.2), None, True, "irn", 4, 16, 0.5, False, "fp32", 64, "gzip", 0, {})
    images = [photograph(index) for index in range(4)]
    records = [ImageRecord(str(index), "", SIZE, "train", (index, index + 5), b"") for index in range(4)]

    def ours() -> list[np.ndarray]:
        found = score(images, records, method, cam.Options(), settings, "cpu")
        return [one["scores"].astype(np.float32) for one in found]

    @torch.inference_mode()
    def one_view_at_a_time() -> list[np.ndarray]:
        out = []
        for image, record in zip(images, records, strict=True):
            total = torch.zeros(CLASSES, *SIZE)  # as the published programs do: all classes, full size, view by view
            for scale in settings.scales:
                view = transforms.resize(image, transforms.view_size(SIZE, scale, 16))
                for flip in (False, True):
                    tensor = torch.from_numpy(view.copy()).permute(2, 0, 1)[None].float() / 255
                    tensor = tensor.flip(-1) if flip else tensor
                    maps = F.interpolate(method.score_maps(tensor, cam.Options()).scores, SIZE, mode="bilinear")
                    total += (maps.flip(-1) if flip else maps)[0]
            kept = total[list(record.tags or ())]
            out.append((kept / (kept.amax(dim=(1, 2), keepdim=True) + 1e-5)).numpy())
        return out

    for mine, plain in zip(ours(), one_view_at_a_time(), strict=True):
        coarse = F.interpolate(torch.from_numpy(mine)[None], SIZE, mode="bilinear")[0].numpy()
        if np.abs(coarse - plain).mean() > 0.02:
            raise AssertionError("score maps and their reference differ")
    return [
        Timing(
            "score maps, 375×500, 4 views, DeiT-Tiny",
            "images",
            4,
            best_of(ours),
            best_of(one_view_at_a_time),
            "one view at a time",
        )
    ]


def crf(folder: Path) -> list[Timing]:
    """Dense CRF on background and the two classes that are there, against all of VOC's 21 planes."""
    from pipeline.crf import CrfSettings, dense_crf, unary_from_labels

    del folder
    settings = CrfSettings(10, 3, 3, 50, 5, 10)
    image, labels = photograph(0), (mask(0) > 0).astype(np.uint8)
    ours = best_of(lambda: dense_crf(image, unary_from_labels(labels, 3, gt_prob=0.7), settings), 2)
    everything = best_of(lambda: dense_crf(image, unary_from_labels(labels, CLASSES + 1, gt_prob=0.7), settings), 2)
    return [Timing("CRF on present classes (2 and background)", "images", 1, ours, everything, "all 21 planes")]


def stores(folder: Path) -> list[Timing]:
    """Writing and random reading of 300 masks, against one PNG per mask."""
    masks = [(f"{index:04d}", mask(index)) for index in range(300)]
    order = np.random.default_rng(0).permutation(300)
    labels = LabelSpace(tuple(f"class {number}" for number in range(CLASSES)))
    pngs, part = folder / "png", folder / "store"
    pngs.mkdir()

    def write_store() -> None:
        items = ((image_id, {"mask": found}) for image_id, found in masks)
        store.write_part(
            store.part_path(part, 0),
            store.PSEUDO_MASKS,
            items,
            labels=labels,
            part=0,
            parts=1,
            params_digest="",
            compression="gzip",
        )

    def write_pngs() -> None:
        for image_id, found in masks:
            Image.fromarray(found).save(pngs / f"{image_id}.png")

    write = Timing("store: write masks", "masks", 300, best_of(write_store), best_of(write_pngs), "PNG files")
    opened = store.Store(part, store.PSEUDO_MASKS)

    def read_store() -> None:
        for at in order:
            opened.read(masks[at][0], "mask")

    def read_pngs() -> None:
        for at in order:
            np.asarray(Image.open(io.BytesIO((pngs / f"{masks[at][0]}.png").read_bytes())))

    return [write, Timing("store: read masks at random", "masks", 300, best_of(read_store), best_of(read_pngs), "PNG files")]


def evaluate(folder: Path) -> list[Timing]:
    """One pass for all 100 thresholds, against a confusion matrix for each of them."""
    from pipeline import metrics

    del folder
    truth, winner = mask(0), mask(1)
    best = np.random.default_rng(0).random(SIZE, np.float32)

    def ours() -> np.ndarray:
        return metrics.threshold_curve(metrics.score_histogram(truth, winner, best, CLASSES + 1, 100))

    def one_by_one() -> np.ndarray:
        values = []
        for threshold in range(100):
            label = np.where(np.floor(best * 100) >= threshold, winner, 0).astype(np.uint8)
            values.append(metrics.miou(metrics.confusion(truth, label, CLASSES + 1), protocol="background"))
        return np.array(values)

    if not np.allclose(ours(), one_by_one()):
        raise AssertionError("the threshold curve and its reference differ")
    pixels = SIZE[0] * SIZE[1] / 1e6
    return [Timing("evaluate: 100 thresholds", "Mpx", pixels, best_of(ours), best_of(one_by_one), "one by one")]


CASES: dict[str, Callable[[Path], list[Timing] | list[Timing | Memory]]] = {
    "prepare": prepare, "score_maps": score_maps, "crf": crf, "stores": stores, "evaluate": evaluate,
    "weaktr_training": weaktr.training, "weaktr_score_maps": weaktr.score_maps, "weaktr_fusion": weaktr.fused,
    "par": affinity.par, "propagation": affinity.propagation, "edge_walk": walks.edges, "afa_training": afa.training,
    "apc_pooling": apc.adaptive_k, "apc_contrast": apc.contrast,
    "semples_refine": semples.refinement,
}  # fmt: skip
