"""The HTTP API: JSON on the Unix socket that the supervisor made.

Owns paths, status codes and the OpenAPI document; what they do is in relay and stats. Handlers run in
control's event loop and never block it: long answers are made in threads.
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
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import WithJsonSchema
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from mrelay import __version__
from mrelay.control import views
from mrelay.control.metrics import exposition
from mrelay.control.relay import Exists, NoRule, Relay
from mrelay.model.issue import ConfigError, Issue

log = logging.getLogger(__name__)

GRACE = 1  # seconds for requests under way when the relay stops

RuleTable = Annotated[dict[str, Any], Body(), WithJsonSchema(views.RULE_SCHEMA)]
RulesTable = Annotated[dict[str, Any], Body(), WithJsonSchema(views.RULES_SCHEMA)]


def create_app(relay: Relay) -> FastAPI:
    """The application, serving `relay`."""
    app = FastAPI(title="mrelay", version=__version__, docs_url=None, redoc_url=None)
    _add_looking(app, relay)
    _add_changing(app, relay)
    _add_errors(app)
    return app


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

    @app.get("/metrics")
    async def metrics() -> Response:
        """The counters for Prometheus."""
        stats, workers = await relay.stats.stats(), await relay.stats.workers()
        text = await asyncio.to_thread(exposition, stats, workers, relay.rules())
        return Response(text, media_type=CONTENT_TYPE_LATEST)


def _add_changing(app: FastAPI, relay: Relay) -> None:
    refused: dict[int | str, dict[str, Any]] = {422: {"model": views.Errors}, 507: {"model": views.Errors}}
    absent: dict[int | str, dict[str, Any]] = {404: {"model": views.Errors}, 507: {"model": views.Errors}}

    taken = {**refused, 409: {"model": views.Errors}}

    @app.post("/v1/rules", status_code=201, response_model=views.Rule, responses=taken)
    async def add(rule: RuleTable) -> Response:
        """Add a rule; answered when it is saved and in force."""
        return _json(await relay.add(rule), 201)

    @app.delete("/v1/rules/{name}", status_code=204, responses=absent)
    async def remove(name: str) -> Response:
        """Remove a rule; answered when it is no longer in force."""
        await relay.remove(name)
        return Response(status_code=204)

    @app.put("/v1/rules", response_model=views.Difference, responses=refused)
    async def apply(rules: RulesTable, dry_run: bool = False) -> Response:
        """Make the running rules exactly these; what that changes, by name."""
        tables = rules.get("rules")
        if not isinstance(tables, list) or len(rules) != 1:
            raise ConfigError([Issue("", "", "rules", "is not a list of rules", 'send {"rules": […]}')])
        return _json(await relay.apply(tables, dry_run=dry_run))


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
        return _error(error.status_code, "", "", problem, "GET /openapi.json says what there is")

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


class Server(uvicorn.Server):
    """Serves on a listening socket, in the loop that runs already, and leaves signals alone."""

    def __init__(self, app: FastAPI, listening: socket) -> None:
        config = uvicorn.Config(
            app,
            http=H11Protocol,
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
