"""COCO's category ids: those that have images, and the ten of 1..90 that nobody annotated (weights published for 90 ids)."""

from __future__ import annotations

COCO_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_USED_IDS = tuple(number for number in range(1, 91) if number not in COCO_UNUSED_IDS)
COCO_IDS = len(COCO_USED_IDS) + len(COCO_UNUSED_IDS)
