"""The HTTP API: JSON over HTTP.

Owns paths, status codes and the OpenAPI document; what they do is in relay and stats, who may do it in guard, what
serves them in server. Handlers run in control's event loop and never block it: long answers are made in threads.
"""

import asyncio
import logging
import os
from typing import Annotated, Any

from fastapi import Body, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import WithJsonSchema
from starlette.exceptions import HTTPException

from mrelay import __version__, logs, reasons
from mrelay.control import answers, eventstream, page, views
from mrelay.control.answers import as_json, json_of_many
from mrelay.control.events import Cursor, Page
from mrelay.control.eventstream import EventStream
from mrelay.control.observe import NoRule
from mrelay.control.observe_api import add_observing
from mrelay.control.relay import Exists, Relay
from mrelay.control.supervisor import RequestFailed
from mrelay.model.issue import ConfigError, Issue

log = logging.getLogger(__name__)

Since = Annotated[str | None, WithJsonSchema({"type": "string", "examples": ["42", "6a2b3c4d:42"]})]
Limit = Annotated[int | None, Query(ge=1)]
RuleTable = Annotated[dict[str, Any], Body(), WithJsonSchema(views.RULE_SCHEMA)]
WHY_SECONDS = 2.0
WhySeconds = Annotated[float, Query(ge=0.5, le=120, description="How long to look, in seconds.")]
LogTable = Annotated[dict[str, Any], Body(), WithJsonSchema(views.LogLevels.model_json_schema())]
RulesTable = Annotated[dict[str, Any], Body(), WithJsonSchema(views.RULES_SCHEMA)]


def create_app(relay: Relay) -> FastAPI:
    """The application, for a Guard to stand before."""
    app = FastAPI(title="mrelay", version=__version__, docs_url=None, redoc_url=None)
    _add_page(app)
    _add_looking(app, relay)
    _add_changing(app, relay)
    add_observing(app, relay)
    _add_errors(app)
    return app


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    @app.get("/page/{name}", include_in_schema=False)
    async def file(request: Request, name: str = page.INDEX) -> Response:
        answer = page.answer(name, request)
        if answer is None:
            raise HTTPException(404)
        return answer


def _add_looking(app: FastAPI, relay: Relay) -> None:
    @app.get("/v1/health", response_model=views.Health)
    async def health() -> Response:
        """Whether the relay serves its rules, and what it runs on."""
        return as_json(relay.health())

    @app.get("/v1/access", response_model=views.Access)
    async def access(request: Request) -> Response:
        """What whoever asks may do."""
        problem, remedy = request.state.problem or ("", "")
        look = hasattr(request.state, "peer")
        return as_json({"look": look, "change": not problem, "problem": problem, "remedy": remedy})

    @app.get("/v1/rules", response_model=views.Rules)
    async def rules() -> Response:
        """The running rules and how each one and its outputs are."""
        return as_json(relay.rules())

    _add_why(app, relay)

    @app.get("/v1/flows", response_model=views.Flows)
    async def flows(limit: Limit = None) -> Response:
        """The flows that the workers have seen lately: all, or so many of the busiest."""
        return await json_of_many(await relay.stats.flows(limit))

    @app.get("/v1/stats", response_model=views.Stats)
    async def stats() -> Response:
        """Counters: received = matched + the sum of drops."""
        return await json_of_many(await relay.stats.stats())

    @app.get("/v1/reasons", response_model=views.Reasons)
    async def why_dropped() -> Response:
        """What each reason in /v1/stats means."""
        return as_json({"drops": reasons.DROPS, "passed": reasons.PASSED})

    @app.get("/v1/workers", response_model=views.Workers)
    async def workers() -> Response:
        """The worker processes."""
        return as_json(await relay.stats.workers())

    _add_history(app, relay)

    @app.get("/v1/log", response_model=views.LogLevels)
    async def log_levels() -> Response:
        """From which level on each role logs."""
        return as_json(logs.levels())

    _add_events(app, relay)

    text = {
        media_type: {"schema": {"type": "string"}} for media_type in ("text/plain", "application/openmetrics-text")
    }

    @app.get("/metrics", response_class=Response, responses={200: {"content": text}})
    async def metrics(request: Request) -> Response:
        """For Prometheus, in the format that Accept asks for (docs/metrics.md)."""
        made, media_type = await relay.metrics(request.headers.get("accept", ""))
        return Response(made, headers={"content-type": media_type})


def _add_history(app: FastAPI, relay: Relay) -> None:
    @app.get("/v1/history", response_model=views.History)
    async def history() -> Response:
        """Rates of the last ten minutes."""
        return as_json(relay.history.relay())

    @app.get(
        "/v1/rules/{name}/history", response_model=views.RuleHistory, responses={404: {"model": views.Errors}}
    )
    async def rule_history(name: str) -> Response:
        """Rates of a rule in the last ten minutes."""
        relay.rule(name)
        return as_json(relay.history.rule(name))


def _add_why(app: FastAPI, relay: Relay) -> None:
    errors: dict[str, Any] = {"model": views.Errors}

    @app.get("/v1/rules/{name}/why", response_model=views.Why, responses={404: errors, 422: errors})
    async def why(name: str, seconds: WhySeconds = WHY_SECONDS) -> Response:
        """Whether the rule forwards; if not, the first stage that fails, and the remedy.

        Looks at its traffic for `seconds`, or half a second when all is well. If nothing comes for the rule's
        groups, and nothing has for a while, they are joined anew once.
        """
        return as_json(await relay.why(name, seconds))

    @app.get("/v1/why", response_model=views.WhyAll, responses={422: errors})
    async def why_all(seconds: WhySeconds = WHY_SECONDS) -> Response:
        """The same in short for all rules; those that are not well are looked at three at a time."""
        return as_json(await relay.why_all(seconds))


def _add_events(app: FastAPI, relay: Relay) -> None:
    errors: dict[str, Any] = {"model": views.Errors}
    stream = {
        "description": "Server-sent events.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
    busy = answers.error(
        503, "", "", f"{eventstream.MOST} clients follow the events already", "try again when one has left"
    )

    @app.get("/v1/events", response_model=Page, responses={422: errors})
    async def events(since: Since = None) -> Response:
        """What happened lately: the events after `since`, or all that are kept, the oldest first.

        Ids restart at 1 with each control process, of which `run` is one; RUN:ID is a place in one run.
        """
        page = relay.events.page(_cursor(since))
        text = await asyncio.to_thread(page.model_dump_json)
        return Response(text, media_type="application/json")

    @app.get("/v1/events/stream", response_class=Response, responses={200: stream, 422: errors, 503: errors})
    async def follow(
        request: Request, since: Since = None, last_event_id: Annotated[str | None, Header()] = None
    ) -> Response:
        """The events after Last-Event-ID or `since`, or those from now on, as they happen.

        The first message is `hello`: /v1/events without its events. Each other one is named by its type and holds
        one event. Comments keep the connection alive; a client that does not read is disconnected.
        """
        return EventStream(relay.events, _cursor(last_event_id or since), request.state.abort, busy)


def _cursor(text: str | None) -> Cursor | None:
    try:
        return None if text is None else Cursor.parse(text)
    except ValueError as error:
        raise ConfigError([Issue("", "", "since", str(error), "give an id such as 42, or 6a2b3c4d:42")]) from None


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
        return as_json(added, 201)

    @app.put("/v1/rules/{name}", response_model=views.Rule, responses={**refused, 404: errors})
    async def change(name: str, rule: RuleTable, request: Request) -> Response:
        """Replace the rule of this name; answered when the new one is saved and in force."""
        changed = await relay.change(name, rule)
        log.info("rule %s changed by %s", name, request.state.peer)
        return as_json(changed)

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
        return as_json(difference)

    @app.post("/v1/stop", response_model=views.Stopping, responses=refused)
    async def stop(request: Request, flush: bool = False) -> Response:
        """Stop the relay. What the kernel's fast path carries goes on until the next start, unless `flush`."""
        log.info("stopped by %s", request.state.peer)
        return as_json(relay.stop(flush=flush))

    @app.patch("/v1/log", response_model=views.LogLevels, responses=refused)
    async def set_log_levels(levels: LogTable) -> Response:
        """Change the level of the roles that are named, until the relay stops; all levels."""
        return as_json(relay.set_log_levels(levels))


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ConfigError)
    async def refused(_: Request, error: ConfigError) -> Response:
        return answers.errors(422, error.issues)

    @app.exception_handler(Exists)
    async def exists(_: Request, error: Exists) -> Response:
        remedy = "choose another name, or remove that rule first"
        return answers.error(409, str(error), "name", f"there is a rule '{error}' already", remedy)

    @app.exception_handler(NoRule)
    async def absent(_: Request, error: NoRule) -> Response:
        return answers.error(
            404,
            str(error),
            "name",
            f"there is no rule '{error}'",
            "see: mrelay rule list (GET /v1/rules)",
        )

    @app.exception_handler(OSError)
    async def not_saved(_: Request, error: OSError) -> Response:
        problem = f"the rules can't be saved: {os.strerror(error.errno or 0)}; nothing was changed"
        return answers.error(507, "", "", problem, "make room in the state directory, or see its owner")

    @app.exception_handler(RequestFailed)
    async def failed(_: Request, error: RequestFailed) -> Response:
        return answers.error(503, "", "", error.problem, error.remedy)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        issues = [
            Issue("", "", ".".join(map(str, one["loc"][1:])), one["msg"], "see /openapi.json")
            for one in error.errors()
        ]
        return answers.errors(422, issues)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        problem = f"{request.method} {request.url.path}: {error.detail}"
        answer = answers.error(error.status_code, "", "", problem, "GET /openapi.json says what there is")
        answer.headers.update(error.headers or {})  # Allow (RFC 9110 §15.5.6)
        return answer

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        return answers.error(
            500, "", "", f"internal error: {type(error).__name__}", "see the relay's log; report it"
        )
