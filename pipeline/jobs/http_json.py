"""A function from requests to answers, both JSON → an HTTP server. Limits what a client can make it hold or wait for."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

log = logging.getLogger("tag2mask")

# (method, path, JSON of the body or None) → status and JSON; ValueError becomes a 400 with its text
Answer = Callable[[str, str, Any], tuple[HTTPStatus, Any]]
MAX_BODY = 96 * 2**20  # bytes of a request: an image of task_images.MAX_BYTES in base64 fits
MAX_BODIES = 4  # that are read or answered at a time
SECONDS = 30  # that a client may be silent


class Refusal(Exception):
    """A request that is not answered: status and text."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


def server(answer: Answer, host: str, port: int) -> ThreadingHTTPServer:
    """Listens at once, and answers in serve_forever(). ValueError where the address cannot be taken; port 0: a free one."""
    bodies = threading.BoundedSemaphore(MAX_BODIES)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version, sys_version = "tag2mask", ""
        timeout = SECONDS

        def do_GET(self) -> None:
            self._respond(None)

        def do_POST(self) -> None:
            if not bodies.acquire(blocking=False):
                self._send(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "busy with other requests; ask again"}, last=True)
                return
            try:
                self._respond(self._body())
            except Refusal as refusal:  # what is left of the body would be read as the next request
                self._send(refusal.status, {"error": str(refusal)}, last=True)
            finally:
                bodies.release()

        def _body(self) -> Any:
            if self.headers.get_content_type() != "application/json":  # a page of another site can send no such request
                raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the request must be application/json")
            length = self.headers.get("Content-Length", "")
            if not length.isascii() or not length.isdecimal():
                raise Refusal(HTTPStatus.LENGTH_REQUIRED, "the request must have a Content-Length")
            if int(length) > MAX_BODY:
                raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {MAX_BODY >> 20} MiB")
            try:
                return json.loads(self.rfile.read(int(length)))
            except (ValueError, RecursionError):
                raise Refusal(HTTPStatus.BAD_REQUEST, "the request is no JSON") from None

        def _respond(self, payload: Any) -> None:
            try:
                status, content = answer(self.command, urlsplit(self.path).path, payload)
            except ValueError as error:
                status, content = HTTPStatus.BAD_REQUEST, {"error": str(error)}
            except Exception as error:
                log.error("%s %s: %s: %s", self.command, self.path, type(error).__name__, error)
                log.debug("", exc_info=True)
                status, content = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "the server failed; its log says why"}
            self._send(status, content)

        def _send(self, status: HTTPStatus, content: Any, *, last: bool = False) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if last:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            log.info("%s %s", self.address_string(), format % args)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            log.debug("a client left", exc_info=True)

    try:
        return Server((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen at {host}:{port}: {error}; name another by --host and --port") from None
