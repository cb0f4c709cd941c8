"""The HTTP API: JSON on the Unix socket that the supervisor made.

Owns paths, status codes and the OpenAPI document; what they do is in relay and stats, and who may do it in
peers. Handlers run in control's event loop and never block it: long answers are made in threads.
"""

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Iterator
from socket import socket
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import WithJsonSchema
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mrelay import __version__, logs
from mrelay.control import views
from mrelay.control.metrics import exposition
from mrelay.control.peers import LOOKING, Access, Peer, peer_of
from mrelay.control.relay import Exists, NoRule, Relay
from mrelay.model.issue import ConfigError, Issue

log = logging.getLogger(__name__)

GRACE = 1  # seconds for requests under way when the relay stops

RuleTable = Annotated[dict[str, Any], Body(), WithJsonSchema(views.RULE_SCHEMA)]
LogTable = Annotated[dict[str, Any], Body(), WithJsonSchema(views.LogLevels.model_json_schema())]
RulesTable = Annotated[dict[str, Any], Body(), WithJsonSchema(views.RULES_SCHEMA)]


def create_app(relay: Relay, access: Access) -> FastAPI:
    """The application, serving `relay` to those who have `access`."""
    app = FastAPI(title="mrelay", version=__version__, docs_url=None, redoc_url=None)
    _add_looking(app, relay)
    _add_changing(app, relay)
    _add_errors(app)
    app.add_middleware(Gate, access=access)
    return app


class Gate:
    """Turns away whoever may only look, but wants to change something: before the request is read."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._app
        if scope["type"] == "http" and scope["method"] not in LOOKING:
            peer: Peer = scope["state"]["peer"]
            if not self._access.may_change(peer):
                log.warning("refused to %s: %s %.200r", peer, scope["method"], scope["path"])
                remedy = f"try again as root, or as a member of group {self._access.group}"
                answer = _error(403, "", "", f"uid {peer.uid} may look, but not change anything", remedy)
        await answer(scope, receive, send)


def _add_looking(app: FastAPI, relay: Relay) -> None:
    @app.get("/v1/health", response_model=views.Health)
    async def health() -> Response:
        """Whether the relay serves its rules, and what it runs on."""
        return _json(relay.health())

    @app.get("/v1/rules", response_model=views.Rules)
    async def rules() -> Response:
        """The running rules and how each one and its outputs are."""
        return _json(relay.rules())

    @app.get("/v1/flows", response_model=views.Flows)
    async def flows() -> Response:
        """The flows that the workers have seen lately."""
        return await _json_of_many(await relay.stats.flows())

    @app.get("/v1/stats", response_model=views.Stats)
    async def stats() -> Response:
        """Counters: received = matched + the sum of drops."""
        return await _json_of_many(await relay.stats.stats())

    @app.get("/v1/workers", response_model=views.Workers)
    async def workers() -> Response:
        """The worker processes."""
        return _json(await relay.stats.workers())

    @app.get("/v1/log", response_model=views.LogLevels)
    async def log_levels() -> Response:
        """From which level on each role logs."""
        return _json(logs.levels())

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """The counters for Prometheus."""
        stats, workers = await relay.stats.stats(), await relay.stats.workers()
        text = await asyncio.to_thread(exposition, stats, workers, relay.rules())
        return Response(text, media_type=CONTENT_TYPE_LATEST)


def _add_changing(app: FastAPI, relay: Relay) -> None:
    errors: dict[str, Any] = {"model": views.Errors}
    refused: dict[int | str, dict[str, Any]] = {400: errors, 403: errors, 422: errors, 507: errors}  # 400: no JSON
    absent: dict[int | str, dict[str, Any]] = {403: errors, 404: errors, 507: errors}

    taken = {**refused, 409: errors}

    @app.post("/v1/rules", status_code=201, response_model=views.Rule, responses=taken)
    async def add(rule: RuleTable, request: Request) -> Response:
        """Add a rule; answered when it is saved and in force."""
        added = await relay.add(rule)
        log.info("rule %s added by %s", added["name"], request.state.peer)
        return _json(added, 201)

    @app.delete("/v1/rules/{name}", status_code=204, responses=absent)
    async def remove(name: str, request: Request) -> Response:
        """Remove a rule; answered when it is no longer in force."""
        await relay.remove(name)
        log.info("rule %s removed by %s", name, request.state.peer)
        return Response(status_code=204)

    @app.put("/v1/rules", response_model=views.Difference, responses=refused)
    async def apply(rules: RulesTable, request: Request, dry_run: bool = False) -> Response:
        """Make the running rules exactly these; what that changes, by name."""
        tables = rules.get("rules")
        if not isinstance(tables, list) or len(rules) != 1:
            raise ConfigError([Issue("", "", "rules", "is not a list of rules", 'send {"rules": […]}')])
        difference = await relay.apply(tables, dry_run=dry_run)
        if not dry_run:
            counts = ", ".join(f"{len(names)} {what}" for what, names in difference.items())
            log.info("rules applied by %s: %s", request.state.peer, counts)
        return _json(difference)

    @app.post("/v1/stop", response_model=views.Stopping, responses=refused)
    async def stop(request: Request, flush: bool = False) -> Response:
        """Stop the relay. What the kernel's fast path carries goes on until the next start, unless `flush`."""
        log.info("stopped by %s", request.state.peer)
        return _json(relay.stop(flush=flush))

    @app.patch("/v1/log", response_model=views.LogLevels, responses=refused)
    async def set_log_levels(levels: LogTable) -> Response:
        """Change the level of the roles that are named, until the relay stops; all levels."""
        return _json(relay.set_log_levels(levels))


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ConfigError)
    async def refused(_: Request, error: ConfigError) -> Response:
        return _errors(422, error.issues)

    @app.exception_handler(Exists)
    async def exists(_: Request, error: Exists) -> Response:
        remedy = "choose another name, or remove that rule first"
        return _error(409, str(error), "name", f"there is a rule '{error}' already", remedy)

    @app.exception_handler(NoRule)
    async def absent(_: Request, error: NoRule) -> Response:
        return _error(
            404,
            str(error),
            "name",
            f"there is no rule '{error}'",
            "see: mrelay rule list (GET /v1/rules)",
        )

    @app.exception_handler(OSError)
    async def not_saved(_: Request, error: OSError) -> Response:
        problem = f"the rules can't be saved: {os.strerror(error.errno or 0)}; nothing was changed"
        return _error(507, "", "", problem, "make room in the state directory, or see its owner")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        issues = [
            Issue("", "", ".".join(map(str, one["loc"][1:])), one["msg"], "see /openapi.json")
            for one in error.errors()
        ]
        return _errors(422, issues)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        problem = f"{request.method} {request.url.path}: {error.detail}"
        answer = _error(error.status_code, "", "", problem, "GET /openapi.json says what there is")
        answer.headers.update(error.headers or {})  # Allow (RFC 9110 §15.5.6)
        return answer

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        return _error(500, "", "", f"internal error: {type(error).__name__}", "see the relay's log; report it")


def _error(status: int, rule: str, key: str, problem: str, remedy: str) -> Response:
    return _errors(status, [Issue("", rule, key, problem, remedy)])


def _errors(status: int, issues: list[Issue]) -> Response:
    keys = ("rule", "key", "problem", "remedy")
    return _json({"errors": [{key: getattr(issue, key) for key in keys} for issue in issues]}, status)


def _json(content: object, status: int = 200) -> Response:
    return JSONResponse(content, status)


async def _json_of_many(content: object) -> Response:
    text = await asyncio.to_thread(json.dumps, content, separators=(",", ":"))
    return Response(text, media_type="application/json")


class PeerProtocol(H11Protocol):
    """HTTP/1.1 that knows who is there: `request.state.peer`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn does
        """As asyncio calls it."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "peer": peer_of(transport.get_extra_info("socket"))}


class Server(uvicorn.Server):
    """Serves on a listening socket, in the loop that runs already, and leaves signals alone."""

    def __init__(self, app: FastAPI, listening: socket) -> None:
        config = uvicorn.Config(
            app,
            http=PeerProtocol,
            ws="none",
            lifespan="off",  # a module that is imported late, so early above
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE,
        )
        super().__init__(config)
        self._listening = listening
        self._stopped = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the supervisor's."""
        yield

    async def run_here(self) -> None:
        """Serve until `stop`."""
        await self.serve([self._listening])
        self._stopped.set()

    async def stop(self) -> None:
        """Let requests under way end, and stop."""
        self.should_exit = True
        await self._stopped.wait()
