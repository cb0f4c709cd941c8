"""Modules that our libraries import only when first used, imported now instead.

By then control is an unprivileged user, who may not be able to read the place they are installed in.
Imported by control.main, for its effect.
"""

import concurrent.futures.thread
import encodings.idna  # codecs look it up by name

import anyio._backends._asyncio
import uvicorn.lifespan.off
import uvicorn.protocols.http.h11_impl
from fastapi import FastAPI

from mrelay.control.views import Health

__all__ = ["anyio", "concurrent", "encodings", "uvicorn"]


def _use_fastapi() -> None:
    """What it and pydantic import late differs by version; a route and its document bring it in."""
    app = FastAPI()
    app.get("/", response_model=Health)(_use_fastapi)
    app.openapi()


_use_fastapi()
