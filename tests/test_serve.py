"""`serve`: a machine learning backend for Label Studio, asked over HTTP as Label Studio asks it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipeline.core.labels import LabelSpace
from pipeline.core.sections import Settings
from pipeline.jobs import http_json, segment, serve, task_images
from pipeline.jobs.label_interface import default_interface, read_interface
from pipeline.jobs.task_images import ImageSources
from stages import serve as command
from tests.project_copy import environment
from tests.test_exporters import decode_brush
from tests.test_segment import picture, save, small
from tests.toys import PROJECT, Toy, toy_recipe

LABELS = LabelSpace(("disc", "square"))
INTERFACE = (
    '<View><Header value="Paint"/><Image name="photo" value="$file"/>'
    '<BrushLabels name="masks" toName="photo"><Label value="Scheibe" predicted_values="disc, ball"/>'
    '<Label value="square"/><Label value="other"/></BrushLabels></View>'
)


@dataclass
class Client:
    """HTTP as `requests` in Label Studio speaks it."""

    port: int

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            assert answer.getheader("Content-Type") == "application/json"
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        return self.send("GET", path)

    def post(self, path: str, payload: Any) -> tuple[int, dict[str, Any]]:
        return self.send("POST", path, json.dumps(payload).encode(), Content_Type="application/json")

    def predict(self, *addresses: Any, config: str | None = INTERFACE) -> tuple[int, dict[str, Any]]:
        tasks = [{"id": 100 + n, "project": 1, "data": {"file": address}} for n, address in enumerate(addresses)]
        params = {"login": None, "password": None, "context": None}
        return self.post("/predict", {"tasks": tasks, "project": "1.17", "label_config": config, "params": params})


@dataclass
class Served:
    """A running `python -m stages.serve`, its folder, and what its first line says."""

    folder: Path
    client: Client
    process: subprocess.Popen[str]
    version: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "images" / "deep er").mkdir(parents=True)
    Image.fromarray(picture(24, 40)).save(folder / "images" / "deep er" / "größe.png")
    upright = Image.Exif()
    upright[274] = 6  # to be turned by a quarter
    Image.fromarray(picture(24, 40)).save(folder / "images" / "turned.jpg", exif=upright)
    (folder / "images" / "broken.png").write_bytes(b"\x89PNG\r\n")
    (folder / "secret.png").write_bytes((folder / "images" / "deep er" / "größe.png").read_bytes())
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    (folder / "images" / "circle.png").symlink_to("circle.png")
    toy = Toy(folder / "images")
    toy.recipes["cam"]["segment"] = toy_recipe("cam")["segment"] | {"window": 16, "window_stride": 12}
    toy.write(folder)
    (folder / "artifacts" / "cam").mkdir(parents=True)
    save(folder / "artifacts" / "cam" / "segmenter.safetensors", small(), LABELS)
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.serve", "cam", "--port", "0"], cwd=folder, stderr=subprocess.PIPE, text=True,
        env=environment() | {"PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert process.stderr is not None
    line = process.stderr.readline()
    match = re.fullmatch(r"(cam-[0-9a-f]{8}) answers at http://127\.0\.0\.1:(\d+); ctrl-c ends it\n", line)
    assert match, line + process.stderr.read()
    drain = threading.Thread(target=process.stderr.read)  # a full pipe would stop the server
    drain.start()
    yield Served(folder, Client(int(match[2])), process, match[1])
    process.kill()
    process.wait()
    drain.join()


def expected(served: Served, monkeypatch: pytest.MonkeyPatch, image: np.ndarray) -> dict[str, np.ndarray]:
    """What stage segment predicts."""
    monkeypatch.chdir(served.folder)
    weights = Path("artifacts/cam/segmenter.safetensors")
    job = segment.job_of(Settings.read("cam"), weights, root=Path(), labels=LABELS, out=Path(), device="cpu")
    return segment.segment_one(image, segment.load("vit", weights.resolve(), LABELS, "cpu", str(served.folder)), job)


def test_health_setup_and_versions_answer_as_label_studio_expects(served: Served) -> None:
    status, health = served.client.get("/health")
    assert status == 200 and health["status"] == "UP"
    payload = {"project": "1.17", "schema": INTERFACE, "hostname": "http://localhost:8080", "access_token": "x"}
    assert served.client.post("/setup", payload) == (200, {"model_version": served.version})
    assert served.client.get("/versions") == (200, {"versions": [served.version]})


def test_a_prediction_is_the_mask_of_stage_segment_in_brush_regions(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "/data/local-files/?d=deep%20er/gr%C3%B6%C3%9Fe.png"
    status, answer = served.client.predict(address)
    assert status == 200 and answer["model_version"] == served.version
    (result,) = answer["results"]
    assert result["model_version"] == served.version and 0 < result["score"] < 1
    prediction = expected(served, monkeypatch, picture(24, 40))
    restored = np.zeros((24, 40), np.uint8)
    for region in result["result"]:
        assert (region["type"], region["from_name"], region["to_name"]) == ("brushlabels", "masks", "photo")
        assert (region["original_height"], region["original_width"], region["image_rotation"]) == (24, 40, 0)
        assert region["value"]["format"] == "rle"
        (label,) = region["value"]["brushlabels"]
        pixels = decode_brush(region["value"]["rle"]).reshape(24, 40, 4)[..., 3] > 0
        restored[pixels] = {"Scheibe": 1, "square": 2}[label]
    np.testing.assert_array_equal(restored, prediction["label"])
    assert len(np.unique(prediction["label"])) > 1  # a mask of background alone would prove little
    assert result["score"] == serve.quality(picture(24, 40), prediction["label"], prediction["confidence"])


def test_every_address_of_the_same_photograph_gives_the_same_prediction(served: Served) -> None:
    data = (served.folder / "images" / "deep er" / "größe.png").read_bytes()
    addresses = [
        "/data/local-files/?d=deep er/größe.png",
        "http://label.studio:8080/data/local-files/?d=deep%20er%2Fgr%C3%B6%C3%9Fe.png",
        "/data/upload/deep%20er/gr%C3%B6%C3%9Fe.png",
        "deep er/größe.png",
        str(served.folder / "images" / "deep er" / "größe.png"),
        "data:image/png;base64," + base64.b64encode(data).decode(),
    ]
    status, answer = served.client.predict(*addresses)
    assert status == 200
    assert [result for result in answer["results"] if result != answer["results"][0] or not result["result"]] == []


def test_a_photograph_is_predicted_upright(served: Served) -> None:
    _, answer = served.client.predict("turned.jpg")
    sizes = {(region["original_height"], region["original_width"]) for region in answer["results"][0]["result"]}
    assert sizes == {(40, 24)}


def test_without_an_interface_regions_are_those_of_labels_xml(served: Served) -> None:
    payload = {"tasks": [{"id": 1, "data": {"image": "deep er/größe.png"}}]}
    status, answer = served.client.post("/predict", payload)
    assert status == 200
    assert {region["from_name"] for region in answer["results"][0]["result"]} == {"tag"}
    assert served.client.post("/predict", {"tasks": []}) == (200, {"results": [], "model_version": served.version})


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("../secret.png", "lies outside of --images"),
        ("/data/local-files/?d=..%2Fsecret.png", "lies outside of --images"),
        ("/data/upload/%2e%2e/secret.png", "lies outside of --images"),
        ("/etc/passwd", "lies outside of --images"),
        ("link.png", "lies outside of --images"),
        ("circle.png", "cannot be read"),
        ("deep er", "is not in --images"),
        ("nothing.png", "is not in --images"),
        ("a\0b", "embedded null byte"),
        ("a" * 5000, "cannot be read: File name too long"),
        ("broken.png", "is no image of JPEG"),
        ("file:///etc/passwd", "only files under --images"),
        ("http://169.254.169.254/latest/meta-data", "only files under --images"),
        ("s3://bucket/a.png", "only files under --images"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "is no image of JPEG"),
        ("data:image/png,abc", "must be in base64"),
        ("data:image/png;base64,?", "must be in base64"),
        (7, "no 'file' that is a text (there: file)"),
    ],
)
def test_an_image_that_is_not_allowed_or_no_image_is_refused_in_words(served: Served, address: Any, problem: str) -> None:
    status, answer = served.client.predict(address)
    assert status == 400 and set(answer) == {"error"}
    assert answer["error"].startswith("task 100: ") and problem in answer["error"]
    assert len(answer["error"]) < 600 and "Traceback" not in answer["error"]


def test_a_task_that_cannot_be_predicted_does_not_stop_the_others(served: Served) -> None:
    status, answer = served.client.predict("nothing.png", "turned.jpg")
    assert status == 200 and len(answer["results"]) == 2
    assert answer["results"][0] == {"error": f"task 100: image 'nothing.png': is not in --images {served.folder}/images"}
    assert answer["results"][1]["result"]


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        ({}, "`tasks` must be a list"),
        ({"tasks": [3]}, "task 0: expected a JSON object, got int"),
        ({"tasks": [{"id": 5}]}, "task 5: expected a JSON object, got NoneType"),
        ([], "expected a JSON object, got list"),
        ({"tasks": [], "label_config": "<View/>"}, "no <BrushLabels> on an <Image>"),
        ({"tasks": [], "label_config": "<View>"}, "is no XML"),
    ],
)
def test_a_wrong_request_is_refused_in_words(served: Served, payload: Any, problem: str) -> None:
    status, answer = served.client.post("/predict", payload)
    assert status == 400 and problem in answer["error"]


def test_what_is_no_json_request_is_refused(served: Served) -> None:
    send, json_type = served.client.send, {"Content_Type": "application/json"}
    assert send("POST", "/predict", b"{}", Content_Type="text/plain")[0] == 415  # as a page of another site could send
    assert send("POST", "/predict", b"{", **json_type) == (400, {"error": "the request is no JSON"})
    assert send("POST", "/predict", b"[" * 100_000, **json_type)[0] == 400
    assert send("POST", "/predict", Content_Length=str(http_json.MAX_BODY + 1), **json_type)[0] == 413
    assert send("POST", "/predict", Content_Length="-1", **json_type)[0] == 411
    assert served.client.get("/predict")[0] == served.client.post("/nothing", {})[0] == 404


@pytest.mark.parametrize("path", ["/webhook", "/train"])
def test_training_is_no_work_of_the_backend_and_its_events_are_accepted(served: Served, path: str) -> None:
    status, answer = served.client.post(path, {"action": "START_TRAINING", "project": {"id": 1}})
    assert status == 201 and answer["status"] == "ignored" and "dvc repro" in answer["detail"]


def test_interrupting_the_server_ends_it_without_a_traceback(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Interrupted(ThreadingHTTPServer):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            raise KeyboardInterrupt

    monkeypatch.chdir(served.folder)
    monkeypatch.setenv("TAG2MASK_DEVICE", "cpu")
    monkeypatch.setattr(http_json, "server", lambda *_: Interrupted(("127.0.0.1", 0), BaseHTTPRequestHandler))
    with caplog.at_level("INFO", "tag2mask"):
        result = CliRunner().invoke(command.main, ["cam", "--host", "0.0.0.0"])
    assert result.exit_code == 0 and result.exception is None
    assert "0.0.0.0 can be reached from other machines" in caplog.text and caplog.messages[-1] == "ended"


def test_wrong_arguments_are_reported_before_the_server_begins(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(served.folder)
    monkeypatch.setenv("TAG2MASK_DEVICE", "cpu")

    def refusal(*words: str) -> str:
        result = CliRunner().invoke(command.main, ["cam", *words])
        assert result.exit_code == 1
        return result.output

    assert "--images no is no folder" in refusal("--images", "no")
    assert "no.safetensors is missing; train it by `dvc repro`" in refusal("--segmenter", "no.safetensors")
    assert "'localhost:8080' is no URL like http://localhost:8080" in refusal("--allow-urls", "localhost:8080")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen at 127.0.0.1" in refusal("--port", str(taken.getsockname()[1]))


def test_one_brush_of_several_is_chosen_by_its_labels() -> None:
    first = '<BrushLabels name="a" toName="x"><Label value="cat"/></BrushLabels>'
    second = '<brushlabels name="b" toName="x"><Label value="disc"/></brushlabels>'
    elsewhere = '<BrushLabels name="c" toName="video"><Label value="disc"/></BrushLabels>'
    image = '<Image name="x" value="$x.y"/>'
    interface = read_interface(f"<View>{elsewhere}{first}{second}{image}</View>", LABELS)
    assert (interface.brush.name, interface.brush.labels, interface.image_key) == ("b", {1: "disc"}, "x.y")
    with pytest.raises(ValueError, match=r"no label of the labelling interface \(cat\) is a class .* \(disc, square\)"):
        read_interface(f"<View>{first}{image}</View>", LABELS)


def test_the_interface_of_the_export_is_the_default(tmp_path: Path) -> None:
    from pipeline.core.records import Records
    from pipeline.exporters import label_studio

    label_studio.write(iter(()), Records(LABELS, (), ()), tmp_path)
    interface = read_interface((tmp_path / "labels.xml").read_text("utf-8"), LABELS)
    assert interface == default_interface(LABELS)


def test_entities_of_an_interface_are_never_expanded() -> None:
    bomb = '<!DOCTYPE v [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><View>&b;</View>'
    with pytest.raises(ValueError, match="DOCTYPE"):
        read_interface(bomb, LABELS)


def png_of_size(width: int, height: int) -> bytes:
    """A few bytes that say that they are a huge greyscale picture."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")


@pytest.mark.parametrize("size", [(8001, 8000), (2**31 - 1, 2**31 - 1)])
def test_a_picture_that_would_fill_the_memory_is_refused_by_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="more than 64 megapixels"):
        task_images.pixels(png_of_size(*size))


def test_large_files_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.png").open("wb") as file:
        os.truncate(file.fileno(), task_images.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="more than 64 MiB"):
        ImageSources(tmp_path, frozenset()).read("large.png")


@contextmanager
def file_server(content: bytes) -> Iterator[str]:
    """A server that gives /a.png, and leads /moved.png to it by a redirect."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/a.png" else 302)
            self.send_header("Location", "/a.png")
            self.end_headers()
            self.wfile.write(content if self.path == "/a.png" else b"")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_an_allowed_server_is_asked_and_no_other_not_even_by_a_redirect(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(8, 9)).save(buffer, "PNG")
    with file_server(buffer.getvalue()) as url:
        sources = ImageSources(tmp_path, frozenset({task_images.origin(url)}))
        np.testing.assert_array_equal(sources.read(f"{url}/a.png"), picture(8, 9))
        with pytest.raises(ValueError, match="302"):
            sources.read(f"{url}/moved.png")
        with pytest.raises(ValueError, match="only files under --images"):
            sources.read(f"{url.replace('127.0.0.1', 'localhost')}/a.png")
        with pytest.raises(ValueError, match="is no URL like"):
            sources.read(f"{url.replace('http://', 'http://user@')}/a.png")
        with pytest.raises(ValueError, match="only files under --images"):
            ImageSources(tmp_path, frozenset()).read(f"{url}/a.png")


@contextmanager
def running(answer: http_json.Answer) -> Iterator[Client]:
    with http_json.server(answer, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever).start()
        yield Client(int(server.server_address[1]))
        server.shutdown()


def test_a_failure_inside_is_logged_and_the_client_learns_no_more_than_that() -> None:
    def fail(method: str, path: str, payload: Any) -> Any:
        raise RuntimeError("secret path")

    with running(fail) as client:
        assert client.post("/predict", {}) == (500, {"error": "the server failed; its log says why"})


def test_more_requests_than_are_answered_at_a_time_are_sent_away_and_health_still_answers() -> None:
    entered, free = threading.Semaphore(0), threading.Event()

    def slow(method: str, path: str, payload: Any) -> Any:
        if method == "POST":
            entered.release()
            free.wait(30)
        return 200, {}

    with running(slow) as client:
        waiting = [threading.Thread(target=client.post, args=("/predict", {})) for _ in range(http_json.MAX_BODIES)]
        for thread in waiting:
            thread.start()
        assert all(entered.acquire(timeout=30) for _ in waiting)
        assert client.post("/predict", {})[0] == 503
        assert client.get("/health") == (200, {})
        free.set()
        for thread in waiting:
            thread.join()
        assert client.post("/predict", {})[0] == 200
