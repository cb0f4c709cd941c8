"""The web page: the files beside this one, as they are, to whoever asks.

Owns reading them, at import, since control can read no file later. What they show they ask of the API. Called by
api. Nothing here blocks.
"""

import hashlib
from importlib.resources import files
from typing import Final, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

INDEX: Final = "index.html"
_TYPES: Final = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class File(NamedTuple):
    """One file of the page; `tag` changes when it does (RFC 9110 §8.8.3)."""

    data: bytes
    media_type: str
    tag: str


def _read() -> dict[str, File]:
    found = {}
    for entry in files(__name__).iterdir():
        media_type = _TYPES.get(entry.name.rpartition(".")[2])
        if media_type:
            data = entry.read_bytes()
            found[entry.name] = File(data, media_type, f'"{hashlib.sha256(data).hexdigest()[:16]}"')
    return found


FILES: Final = _read()


def answer(name: str, request: Request) -> Response | None:
    """The file of this name; None when there is none."""
    file = FILES.get(name)
    if file is None:
        return None
    headers = {
        "ETag": file.tag,
        "Cache-Control": "no-cache",
    }  # asked for again each time: the relay may be another
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.data, media_type=file.media_type, headers=headers)
