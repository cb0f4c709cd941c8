"""The part of the API that looks at the wire itself.

Owns its paths and how answers are streamed; what they do is in observe. It is for those who may change rules, too,
since packets may hold anything: hence POST, which peers and tokens that may only look are refused. Nothing here
blocks.
"""

import contextlib
import json
import logging
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Final, TypeVar

from fastapi import Body, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, WithJsonSchema

from mrelay.control import views
from mrelay.control.answers import json_of_many
from mrelay.control.relay import Relay

PCAPNG: Final = "application/x-pcapng"
LINES: Final = "application/x-ndjson"  # a JSON object a line

log = logging.getLogger(__name__)

T = TypeVar("T")
CaptureTable = Annotated[dict[str, Any], Body(), WithJsonSchema(views.CAPTURE_SCHEMA)]
DiscoverTable = Annotated[dict[str, Any], Body(), WithJsonSchema(views.DISCOVER_SCHEMA)]


def add_observing(app: FastAPI, relay: Relay) -> None:
    """Add the paths."""
    errors: dict[str, Any] = {"model": views.Errors}
    refused: dict[int | str, dict[str, Any]] = dict.fromkeys((400, 403, 422, 503), errors)
    lines: dict[int | str, dict[str, Any]] = {200: {"content": {LINES: {"schema": _schema(views.Discovered)}}}}

    absent = {**refused, 404: errors}
    file: dict[int | str, dict[str, Any]] = {
        200: {"content": {PCAPNG: {"schema": {"type": "string", "format": "binary"}}}}
    }

    @app.get("/v1/streams", response_model=views.Streams)
    async def streams() -> Response:
        """The health of the streams of rules that ask for it."""
        return await json_of_many(relay.observe.streams.view())

    @app.post("/v1/discover", response_class=StreamingResponse, responses={**refused, **lines})
    async def discover(what: DiscoverTable) -> Response:
        """What streams there are on an interface: a line of JSON about every second, each in place of the last."""
        found = await begun(relay.observe.discover(what))
        return StreamingResponse((json.dumps(view) + "\n" async for view in found), media_type=LINES)

    @app.post("/v1/capture", response_class=StreamingResponse, responses={**absent, **file})
    async def capture(what: CaptureTable, request: Request) -> Response:
        """The frames of a rule or flow, as pcapng: as they come in, go out, or are dropped, with the reason."""
        found = await begun(relay.observe.capture(what))
        log.info("capture of %.200r by %s", what.get("what"), request.state.peer)
        return StreamingResponse(found, media_type=PCAPNG)


async def begun(stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same stream, of which we know that it begins; raises what keeps it from that."""
    try:
        first = await anext(stream)
    except StopAsyncIteration:
        return stream

    async def whole() -> AsyncGenerator[T, None]:
        async with contextlib.aclosing(stream):
            yield first
            async for one in stream:
                yield one

    return whole()


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """For what is streamed, which FastAPI does not describe by itself."""
    return model.model_json_schema(mode="serialization")
