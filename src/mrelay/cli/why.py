"""`mrelay why`: whether a rule forwards, and if not, where it stops and what to do.

Called by the command line. Blocks on the control socket for as long as the relay looks.
"""

import json
from typing import Annotated, Any, Final
from urllib.parse import quote

from cyclopts import Parameter, validators
from rich.console import RenderableType
from rich.text import Text

from mrelay.cli import output
from mrelay.cli.client import Client
from mrelay.cli.failure import FAILED
from mrelay.cli.options import DEFAULT_SOCKET, AsJson, Socket, running_rules

_MARKS: Final = {
    "ok": ("ok", "green"),
    "failed": ("FAILED", "bold red"),
    "unknown": ("?", "yellow"),
}
_SKIPPED: Final = "skipped"
_GOOD: Final = "forwarding"


def why(
    name: Annotated[
        str | None, Parameter(help="The rule's name; without one, all rules.", completer=running_rules)
    ] = None,
    /,
    *,
    seconds: Annotated[
        float,
        Parameter(
            validator=validators.Number(gte=0.5, lte=120),
            help="How long to look, 0.5 to 120; shorter when all is well. A slow stream needs more.",
        ),
    ] = 2.0,
    as_json: AsJson = False,
    socket: Socket = DEFAULT_SOCKET,
) -> int:
    """GET the answer and show it; the exit status."""
    target = "/v1/why" if name is None else f"/v1/rules/{quote(name, safe='')}/why"
    with Client(socket).opened("GET", f"{target}?seconds={seconds}") as response:
        answer: dict[str, Any] = json.loads(response.read())
    answers = answer["rules"] if name is None else [answer]
    if as_json:
        output.print_json(answer)
    else:
        output.print_view(_all(answers) if name is None else _one(answer))
    return 0 if all(one["verdict"] == _GOOD for one in answers) else FAILED


def _all(answers: list[dict[str, Any]]) -> RenderableType:
    if not answers:
        return "No rules. 'mrelay rule add --help' says how to add one."
    rows = [[one["rule"], one["verdict"], one["stage"] or "-", one["summary"]] for one in answers]
    return output.table(("RULE", "VERDICT", "STOPS AT", "WHY"), rows)


def _one(answer: dict[str, Any]) -> RenderableType:
    head = Text(f"{answer['rule']}: {_head(answer)}", style="bold")
    looked = [stage for stage in answer["stages"] if stage["status"] != _SKIPPED]
    rest = ", ".join(stage["stage"] for stage in answer["stages"] if stage["status"] == _SKIPPED)
    lines = [line for stage in looked for line in _stage(stage)]
    return output.stack(head, Text(""), *lines, *([Text(f"not looked at: {rest}", style="dim")] if rest else []))


def _head(answer: dict[str, Any]) -> str:
    match answer["verdict"]:
        case "partly":
            return f"forwards in part, see '{answer['stage']}'"
        case "not forwarding":
            return f"not forwarding, stops at '{answer['stage']}'"
    return str(answer["verdict"])


def _stage(stage: dict[str, Any]) -> list[Text]:
    mark, style = _MARKS[stage["status"]]
    first = Text.assemble((f"{mark:<8}", style), f"{stage['stage']:<12}", stage["text"])
    more = [Text(f"{'':20}{line}", style="dim") for line in stage["evidence"]]
    remedy = [Text(f"{'':20}remedy: {stage['remedy']}", style="bold")] if stage["remedy"] else []
    return [first, *more, *remedy]
