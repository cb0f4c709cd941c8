"""Modules that our libraries import only when first used, imported now instead.

By then control is an unprivileged user, who may not be able to read the place they are installed in.
Imported by control.main, for its effect.
"""

import concurrent.futures.thread
import encodings.idna  # codecs look it up by name

import anyio._backends._asyncio
import uvicorn.lifespan.off
import uvicorn.protocols.http.h11_impl

__all__ = ["anyio", "concurrent", "encodings", "uvicorn"]
