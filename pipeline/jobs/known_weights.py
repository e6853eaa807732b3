"""Weights that recipes and presets start from: what for, from where, with which checksum, under which licence.

Addresses are those of timm, open_clip, the authors or, for ONNX, rembg. A checksum stands here only where the file was
measured or its publisher says it: `digest` is the beginning of the sha256 of what `url` gives, which torch's hub and timm
write into a file's name (eight digits), "" where nobody says it. `at_hand` are whole checksums of files that were measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FOLDER = "data/weights"
OWN = "in the repository"
LABELS = "ImageNet-1k labels"
HUB = "https://huggingface.co/{}/resolve/main/{}"
TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/"
DEIT = "https://dl.fbaipublicfiles.com/deit/"

Kind = Literal["backbone", "saliency", "critic"]


@dataclass(frozen=True)
class KnownWeights:
    """One file of weights.

    name          what `get` takes
    file          its name in data/weights, as presets and recipes have it
    purpose       what starts from it, in the words of params.yaml and recipes
    supervision   what it learned from
    licence       of the weights; "in the repository": the project's own
    megabytes     of the file, about
    kind          backbone: of a family of pipeline/nn; saliency: of refiner segments; critic: of SemPLeS
    family        folder of pipeline/nn, "" for another kind
    architecture  as recipes have it
    url           of the file; "" where it can only be fetched by hand, from `page`
    page          where its authors publish it
    digest        beginning of the sha256 of the file at `url`
    at_hand       sha256 → which file that is
    """

    name: str
    file: str
    purpose: str
    supervision: str
    licence: str
    megabytes: float
    kind: Kind
    family: str
    architecture: str
    url: str
    page: str
    digest: str = ""
    at_hand: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return f"{FOLDER}/{self.file}"


def _timm(
    name: str, purpose: str, megabytes: float, family: str, page: str, *, url: str = "", digest: str = "",
    supervision: str = LABELS, at_hand: Mapping[str, str] | None = None,
) -> KnownWeights:  # fmt: skip
    """Weights of timm: without `url`, its hub's own file."""
    return KnownWeights(
        name, f"{name}.safetensors", purpose, supervision, "Apache-2.0", megabytes, "backbone", family, name,
        url or HUB.format(page, "model.safetensors"), f"https://huggingface.co/{page}", digest, at_hand or {},
    )  # fmt: skip


def _scenes(name: str, family: str, megabytes: float, sha256: str) -> KnownWeights:
    return KnownWeights(
        name, f"{name}.fp16.safetensors", f"the demo: recipes/scenes with backbone {family}",
        "image-level labels of drawings", OWN, megabytes, "backbone", family, name, "", f"{FOLDER}/README.md", "",
        {sha256: OWN},
    )  # fmt: skip


KNOWN = (
    _timm(
        "deit_tiny_patch16_224", "recipes/photos, every method; recipes/*/cam.yaml (backbone vit)", 23, "vit",
        "timm/deit_tiny_patch16_224.fb_in1k", url=DEIT + "deit_tiny_patch16_224-a1311bcf.pth", digest="a1311bcf",
        at_hand={"0af164d9dc507fd8d9e16b38fe09661fe68beabbbcfed644ff007bfc7bb032c6": "a float16 copy of timm's file"},
    ),
    _timm(
        "deit_small_patch16_224", "WeakTr and SemPLeS in recipes/voc2012 and coco2014 (backbone vit)", 88, "vit",
        "timm/deit_small_patch16_224.fb_in1k", url=DEIT + "deit_small_patch16_224-cd65a155.pth", digest="cd65a155",
    ),
    _timm(
        "vit_base_patch16_384", "APC in recipes/voc2012 and coco2014 (backbone vit)", 347, "vit",
        "timm/vit_base_patch16_384.augreg_in21k_ft_in1k", supervision="ImageNet-21k and 1k labels",
    ),
    _timm(
        "vit_base_patch16_224", "any method with backbone vit: a larger ViT at 224 px", 346, "vit",
        "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k", supervision="ImageNet-21k and 1k labels",
    ),
    _timm(
        "resnet50", "cam, ppl and refiner irn with backbone resnet", 102, "resnet", "timm/resnet50.a1_in1k",
        url=TIMM + "v0.1-rsb-weights/resnet50_a1_0-14fe96d1.pth", digest="14fe96d1",
    ),
    _timm(
        "resnet101", "the segmenter of PPL in recipes/voc2012 and coco2014 (segmenter resnet)", 179, "resnet",
        "timm/resnet101.a1h_in1k", url=TIMM + "v0.1-rsb-weights/resnet101_a1h-36d3f2aa.pth", digest="36d3f2aa",
    ),
    _timm(
        "tf_efficientnet_lite0", "cam, apc and ppl with backbone efficientnet; segmenter smp", 19, "efficientnet",
        "timm/tf_efficientnet_lite0.in1k",
        at_hand={"57f92a8d5a8fe26c1ff93ba7b7cac13275d95a1c2f6c9a9ff12e743e2c8fcb20": "without num_batches_tracked"},
    ),
    KnownWeights(
        "mit_b1", "mit_b1.pth", "AFA in recipes/voc2012 and coco2014 (backbone and segmenter mit)", LABELS,
        "NVIDIA Source Code License (no commercial use)", 55, "backbone", "mit", "mit_b1", "",
        "https://github.com/NVlabs/SegFormer",
    ),
    KnownWeights(
        "resnet38d", "resnet38d.pth", "PPL in recipes/voc2012 and coco2014 (backbone resnet, refiner affinitynet)", LABELS,
        "not stated", 500, "backbone", "resnet", "resnet38d", "", "https://github.com/jiwoon-ahn/psa",
    ),
    KnownWeights(
        "clip_vit_b32", "clip_vit_b32.safetensors", "SemPLeS: train.model.critic (model ViT-B-32-quickgelu)",
        "images with texts of the web", "MIT", 605, "critic", "", "ViT-B-32-quickgelu",
        HUB.format("timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors"),
        "https://huggingface.co/timm/vit_base_patch32_clip_224.openai",
    ),
    KnownWeights(
        "u2netp", "u2netp.safetensors", "refiner segments: fit_refiner.segments with source network",
        "pixel masks of DUTS-TR (saliency)", "Apache-2.0", 4.5, "saliency", "", "u2netp", "",
        "https://github.com/xuebinqin/U-2-Net", "",
        {"ad6f16d981125e7fce60f72d2ad42558f761c8552f2d6df8420786f251bab249": "batch norms folded"},
    ),
    KnownWeights(
        "u2netp_onnx", "u2netp.onnx", "refiner segments: fit_refiner.segments with source network and onnx settings",
        "pixel masks of DUTS-TR (saliency)", "Apache-2.0", 4.6, "saliency", "", "onnx",
        "https://github.com/danielgatis/rembg/releases/download/v0.0.0/u2netp.onnx", "https://github.com/danielgatis/rembg",
        "309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8",
    ),
    _scenes("scenes_vit", "vit", 1.6, "bebcb89d20c237d6619c56f46ceb427a995e1d67af0c6c5ccfe339289d25e310"),
    _scenes("scenes_mit", "mit", 2.2, "bdfd67c5495b5c264d2d7c5dcce9b07702d844cf8b42616ea1e4fad59262d50b"),
    _scenes("scenes_resnet", "resnet", 2.1, "874b3143e69d3ac1cfffac5df98971e0435e4b68cabc3169106c38282d1309ff"),
)  # fmt: skip


def named(name: str) -> KnownWeights:
    """ValueError lists the names."""
    for weights in KNOWN:
        if weights.name == name:
            return weights
    raise ValueError(f"no weights {name!r} are known; there are {', '.join(weights.name for weights in KNOWN)}")


def of_digest(sha256: str) -> tuple[KnownWeights, str] | None:
    """The weights that a file's sha256 belongs to, and which file of theirs it is; None where nobody knows."""
    for weights in KNOWN:
        if sha256 in weights.at_hand:
            return weights, weights.at_hand[sha256]
        if weights.digest and sha256.startswith(weights.digest):
            return weights, "as published"
    return None
