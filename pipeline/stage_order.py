"""The stages whose masks are scored, in the order of the pipeline, and which of them comes from which."""

from __future__ import annotations

# split → its stages. On train the classes are those of the tags, on val those that the network finds itself
OF_SPLIT = {
    "train": ("score_maps", "decoder", "refined", "pseudo_masks", "relabelled"),
    "val": ("score_maps_val", "decoder_val", "predictions"),
}
SPLIT_OF = {stage: split for split, stages in OF_SPLIT.items() for stage in stages}
STAGES = tuple(SPLIT_OF)
LAST = {"train": "pseudo_masks", "val": "predictions"}  # the stage whose masks are used in the end
CHAINS = (
    ("score_maps", "decoder"),
    ("score_maps", "refined", "pseudo_masks", "relabelled"),
    ("score_maps_val", "decoder_val", "predictions"),
)
# (earlier, later): a stage's masks are compared with those of the first of these that the image has; not every method has a
# decoder
FLOWS = (
    ("score_maps", "decoder"), ("score_maps", "refined"), ("refined", "pseudo_masks"), ("pseudo_masks", "relabelled"),
    ("score_maps_val", "decoder_val"), ("decoder_val", "predictions"), ("score_maps_val", "predictions"),
)  # fmt: skip


def without_split(stage: str) -> str:
    """The name of a stage where its split is known: an image is of one split."""
    return stage.removesuffix("_val")


GALLERY = tuple(dict.fromkeys(without_split(stage) for stage in STAGES))
