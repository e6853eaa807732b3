"""A run's trained segmenter by torch, for images outside of the DAG."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import store
from pipeline.core.labels import LabelSpace
from pipeline.core.sections import Settings
from pipeline.jobs import segment, segment_folder


@dataclass(frozen=True)
class TorchSegmenter:
    """Predictor of segment_folder, picklable: each process loads the weights."""

    name: str
    job: segment.Job
    sha256: str  # of the weights

    @classmethod
    def of(cls, settings: Settings, weights: Path, device: str) -> TorchSegmenter:
        """ValueError where `weights` are missing, or not of the run's segmenter."""
        labels = segment_folder.labels_of(weights)
        job = segment.job_of(settings, weights, root=Path(), labels=labels, out=Path(), device=device)
        return cls(settings.name, job, store.file_digest(weights))

    @property
    def labels(self) -> LabelSpace:
        return self.job.labels

    @property
    def device(self) -> str:
        return self.job.device

    def description(self) -> dict[str, Any]:
        """What masks depend on."""
        settings = store.digest(dataclasses.asdict(self.job.settings))
        return {"method": self.name, "segmenter": self.sha256, "settings": settings}

    def network(self) -> Any:
        """The segmenter in eval mode, loaded once per process."""
        return segment.load(self.job.segmenter, self.job.weights.resolve(), self.labels, self.device, self.sha256)

    def mask(self, image: np.ndarray) -> np.ndarray:
        """u8[h,w,3] RGB → u8[h,w] mask values, as stage segment makes them."""
        return segment.segment_one(image, self.network(), self.job)["label"]
