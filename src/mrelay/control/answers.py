"""How the API answers: JSON, and errors that say what is wrong and what to do about it.

Owns the shape of both. Called by api and the doors before it. Nothing here blocks: threads make long answers.
"""

import asyncio
import json

from starlette.responses import JSONResponse, Response

from mrelay.model.issue import Issue


def error(status: int, rule: str, key: str, problem: str, remedy: str) -> Response:
    """One error."""
    return errors(status, [Issue("", rule, key, problem, remedy)])


def errors(status: int, issues: list[Issue]) -> Response:
    """views.Errors"""
    keys = ("rule", "key", "problem", "remedy")
    return as_json({"errors": [{key: getattr(issue, key) for key in keys} for issue in issues]}, status)


def as_json(content: object, status: int = 200) -> Response:
    """A short answer."""
    return JSONResponse(content, status)


async def json_of_many(content: object) -> Response:
    """A long answer: made in a thread."""
    text = await asyncio.to_thread(json.dumps, content, separators=(",", ":"))
    return Response(text, media_type="application/json")
