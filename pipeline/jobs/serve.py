"""A trained segmenter → predictions for Label Studio, by the requests that it sends to a machine learning backend.

Label Studio asks `GET /health`, `POST /setup` when the backend is added and before each batch, `POST /predict` for a batch
of tasks, and sends events to `POST /webhook` or `/train`. See https://labelstud.io/guide/ml_create for the requests.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.audit import indicators
from pipeline.core import store
from pipeline.core.labels import LabelSpace
from pipeline.core.problems import listed
from pipeline.core.sections import Settings
from pipeline.jobs import http_json, segment, segment_folder
from pipeline.jobs.engine import Engine
from pipeline.jobs.label_interface import Interface, default_interface, read_interface
from pipeline.jobs.task_images import ImageSources, origin
from pipeline.mask_files import brush_regions

log = logging.getLogger("tag2mask")

Segmenter = Callable[[np.ndarray], Mapping[str, np.ndarray]]
LOCAL = ("127.0.0.1", "::1", "localhost")
NOT_TRAINED = "tag2mask trains by `dvc repro`: put corrected masks into data/corrections (docs/exports.md)"


def run(
    settings: Settings, weights: Path, images: Path, *, urls: Iterable[str], host: str, port: int, engine: Engine
) -> None:
    """Answers until it is interrupted. ValueError where an argument is wrong or the port is taken.

    urls: servers, as http://localhost:8080, from which images may be fetched
    """
    if not images.is_dir():
        raise ValueError(f"--images {images} is no folder; name the folder that holds the images of the tasks")
    sources = ImageSources(images, frozenset(map(origin, urls)))
    backend = backend_of(settings, weights, sources, engine.device())
    with http_json.server(backend.answer, host, port) as server:
        if host not in LOCAL:
            engine.info("%s can be reached from other machines, and asks nobody who he is", host)
        engine.info("%s answers at http://%s:%d; ctrl-c ends it", backend.version, *server.server_address[:2])
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            engine.info("ended")


def backend_of(settings: Settings, weights: Path, sources: ImageSources, device: str) -> Backend:
    """The segmenter of a run, loaded. ValueError if `weights` are missing or of another segmenter."""
    labels = segment_folder.labels_of(weights)
    job = segment.job_of(settings, weights, root=sources.root, labels=labels, out=Path(), device=device)
    model = segment.load(job.segmenter, weights.resolve(), labels, device, "")
    version = f"{settings.name}-{store.digest([store.file_digest(weights), job.params_digest])[:8]}"
    return Backend(version, labels, lambda image: segment.segment_one(image, model, job), sources)


@dataclass(frozen=True)
class Backend:
    """Answers to requests, without HTTP.

    version    changes with the weights and with the settings: Label Studio keeps a prediction per version
    segmenter  u8[h,w,3] → label u8[h,w] of mask values and confidence u8[h,w] (of 255)
    """

    version: str
    labels: LabelSpace
    segmenter: Segmenter
    sources: ImageSources
    lock: threading.Lock = field(default_factory=threading.Lock)  # one image at a time: its planes fill the memory

    def answer(self, method: str, path: str, payload: Any) -> tuple[HTTPStatus, Any]:
        """Status and JSON of an answer. payload: the request's JSON, None without one. ValueError on a wrong request."""
        match method, path:
            case "GET", "/health" | "/":
                return HTTPStatus.OK, {"status": "UP", "model_class": "tag2mask", "model_version": self.version}
            case "GET", "/versions":
                return HTTPStatus.OK, {"versions": [self.version]}
            case "POST", "/setup":
                self._interface(_mapping(payload).get("schema"))
                return HTTPStatus.OK, {"model_version": self.version}
            case "POST", "/predict":
                return self._predict(_mapping(payload))
            case "POST", "/webhook" | "/train":
                return HTTPStatus.CREATED, {"status": "ignored", "detail": NOT_TRAINED}
        return HTTPStatus.NOT_FOUND, {
            "error": f"there is no {method} {path}; there are /health, /setup, /predict, /versions"
        }

    def _interface(self, xml: Any) -> Interface:
        return read_interface(xml, self.labels) if isinstance(xml, str) and xml.strip() else default_interface(self.labels)

    def _predict(self, payload: Mapping[str, Any]) -> tuple[HTTPStatus, Any]:
        """A result per task, in their order. Label Studio leaves out one without `result`, and keeps the others."""
        tasks = payload.get("tasks")
        if not isinstance(tasks, list):
            raise ValueError("`tasks` must be a list")
        interface = self._interface(payload.get("label_config"))
        results: list[dict[str, Any]] = []
        problems: list[str] = []
        for number, task in enumerate(tasks):
            name = task.get("id", number) if isinstance(task, Mapping) else number
            try:
                results.append(self._prediction(task, interface))
            except ValueError as error:
                problems.append(f"task {name}: {error}")
                results.append({"error": problems[-1]})
        for problem in problems:
            log.warning("%s", problem)
        if tasks and len(problems) == len(tasks):
            raise ValueError(listed(problems))
        return HTTPStatus.OK, {"results": results, "model_version": self.version}

    def _prediction(self, task: Any, interface: Interface) -> dict[str, Any]:
        data = _mapping(_mapping(task).get("data"))
        address = data.get(interface.image_key)
        if not isinstance(address, str):
            there = ", ".join(map(str, data)) or "nothing"
            raise ValueError(f"its data have no {interface.image_key!r} that is a text (there: {there})")
        image = self.sources.read(address)
        with self.lock:
            prediction = self.segmenter(image)
        score = quality(image, prediction["label"], prediction["confidence"])
        regions = brush_regions(prediction["label"], interface.brush, self.version)
        return {"model_version": self.version, "score": score, "result": regions}


def quality(image: np.ndarray, label: np.ndarray, confidence: np.ndarray) -> float | None:
    """The quality score of a prediction, 0..1, as the audit defines it (docs/audit.md); None where no class is shown."""
    context = indicators.ImageContext(None, indicators.edge_ranks(image))
    expected_iou = indicators.mask_indicators(label, confidence, context)["expected_iou"]
    return None if math.isnan(expected_iou) else round(expected_iou, 5)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value
