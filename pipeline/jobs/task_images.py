"""An image as a task of Label Studio names it → pixels: from a folder, out of a data: URI, or from an allowed server.

Tasks come over the network, so nothing outside the folder is read, no other server is asked, and sizes are limited before
anything is decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from dataclasses import dataclass
from pathlib import Path
from urllib import request
from urllib.error import URLError
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.core import records

MAX_BYTES = 64 * 2**20  # of an image file
MAX_PIXELS = 64_000_000  # of a decoded image; 48 million take 2.3 GiB in the segmenter
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
SECONDS = 10  # that a server may be silent
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class ImageSources:
    """Where images may come from. root: a folder; origins: servers as `origin` writes them."""

    root: Path
    origins: frozenset[str]

    def read(self, address: str) -> np.ndarray:
        """u8[h,w,3] RGB, upright, as prepare reads it. ValueError names the address and says why it is refused."""
        shown = address if len(address) <= 200 else f"{address[:60]}…"
        try:
            return pixels(self._bytes(address))
        except ValueError as error:
            raise ValueError(f"image {shown!r}: {error}") from error

    def _bytes(self, address: str) -> bytes:
        if address.startswith("data:"):
            return _data_uri(address)
        at = urlsplit(address) if SCHEME.match(address) or address.startswith("/data/") else None
        if at is None:
            return self._file(address)
        if at.path.rstrip("/") == "/data/local-files":  # Label Studio's own address of a file under its document root
            return self._file(parse_qs(at.query).get("d", [""])[0])
        if at.path.startswith("/data/upload/"):
            return self._file(unquote(at.path.removeprefix("/data/upload/")))
        if at.scheme in PORTS and origin(address) in self.origins:
            return _download(address)
        allowed = ", ".join(sorted(self.origins)) or "no server"
        raise ValueError(
            f"only files under --images, data: URIs and servers that --allow-urls names ({allowed}) are read; "
            "import the tasks from local files, or start the server with --allow-urls"
        )

    def _file(self, name: str) -> bytes:
        try:
            path, root = (self.root / name).resolve(), self.root.resolve()
            if not path.is_relative_to(root):
                raise ValueError("lies outside of --images")
            if not path.is_file():
                raise ValueError(f"is not in --images {self.root}")
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"has more than {MAX_BYTES >> 20} MiB")
            return path.read_bytes()
        except (OSError, RuntimeError) as error:  # a name too long, a loop of links, a file that nobody may read
            raise ValueError(f"cannot be read: {getattr(error, 'strerror', None) or 'its links go in a circle'}") from None


def origin(url: str) -> str:
    """`http://host:port` of a URL, lower case, the port always there. ValueError if it is no http or https URL."""
    at = urlsplit(url)
    if at.scheme not in PORTS or not at.hostname or at.username is not None:
        raise ValueError(f"{url!r} is no URL like http://localhost:8080")
    return f"{at.scheme}://{at.hostname}:{at.port or PORTS[at.scheme]}"


def pixels(data: bytes) -> np.ndarray:
    """Bytes of an image file → u8[h,w,3] RGB, upright. ValueError where format or size is not allowed, or it is damaged."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"has more than {MAX_BYTES >> 20} MiB")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            size = header.size
    except UnidentifiedImageError:
        raise ValueError(f"is no image of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        size = (MAX_PIXELS, 2)
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"has more than {MAX_PIXELS // 10**6} megapixels")
    try:
        return records.decode(data)
    except Exception as error:  # decoders raise many kinds of errors on broken files
        raise ValueError(f"cannot be read: {error or type(error).__name__}") from error


def _data_uri(address: str) -> bytes:
    head, comma, body = address.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("a data: URI must be in base64")
    try:
        return base64.b64decode(unquote(body), validate=True)
    except binascii.Error:
        raise ValueError("a data: URI must be in base64") from None


class _NoRedirects(request.HTTPRedirectHandler):
    """A redirect would lead to a server that nobody allowed."""

    def redirect_request(self, *answer: object) -> None:
        return None


def _download(url: str) -> bytes:
    opener = request.build_opener(_NoRedirects, request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=SECONDS) as answer:
            return answer.read(MAX_BYTES + 1)
    except (URLError, TimeoutError) as error:
        raise ValueError(f"the server does not give it: {error}") from None
