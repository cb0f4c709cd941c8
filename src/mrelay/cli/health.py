"""`mrelay health [RULE]`: what the relay measures of the streams of rules that ask for it.

Called by the command line. Blocks on the control socket, and until Ctrl-C with --watch.
"""

from typing import Annotated, Any, Final

from cyclopts import Parameter
from rich.console import RenderableType

from mrelay.cli import output
from mrelay.cli.client import Client
from mrelay.cli.failure import Failure
from mrelay.cli.options import DEFAULT_SOCKET, AsJson, Every, Socket, Watch, running_rules

_COLUMNS: Final = (
    *("RULE", "SOURCE", "GROUP", "PORT", "FORMAT", "SEEN", "RECEIVED", "LOST", "LOSS", "REORDERED", "DUPLICATES"),
    *("JITTER", "SILENT", "MORE", "ALARMS"),
)
_NUMBERS: Final = ("PORT", "RECEIVED", "LOST", "LOSS", "REORDERED", "DUPLICATES", "JITTER", "SILENT")
# Of a format's own figures, those that tell of trouble, and how they are called here.
_MORE: Final = {
    "ssrc_changes": "SSRC changes",
    "session_changes": "session changes",
    "ts_continuity_errors": "continuity errors",
    "ts_discontinuities": "discontinuities",
    "ts_bad": "bad TS packets",
}


def health(
    rule: Annotated[str | None, Parameter(help="Only this rule's streams.", completer=running_rules)] = None,
    /,
    *,
    as_json: AsJson = False,
    watch: Watch = False,
    every: Every = 1.0,
    socket: Socket = DEFAULT_SOCKET,
) -> None:
    """The streams of a running relay that are measured."""
    client = Client(socket)
    output.show(lambda: _fetch(client, rule), _view, as_json=as_json, watch=watch, every=every)


def _fetch(client: Client, rule: str | None) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/v1/streams")
    if rule is None:
        return found
    kept = {key: [one for one in found[key] if one["rule"] == rule] for key in ("streams", "rules")}
    if not kept["rules"]:
        remedy = 'add health = "auto" to it, or see: mrelay rule list'
        raise Failure(f"no rule '{rule}' asks for health: {remedy}")
    return {**found, **kept}


def _view(found: dict[str, Any]) -> RenderableType:
    if not found["rules"]:
        return 'No rule asks for health: add health = "auto" to one (mrelay rule add … --health auto).'
    lines = [f"{one['rule']}: {one['problem']}" for one in found["rules"] if one["problem"]]
    lines += [
        f"{one['rule']}: no stream yet, alarm: {', '.join(one['alarms'])}"
        for one in found["rules"]
        if one["alarms"]
    ]
    if found["left_out"]:
        lines.append(f"{output.count(found['left_out'])} frames were of more streams than are measured (4,096)")
    rows = [_row(one) for one in found["streams"]]
    table = output.table(_COLUMNS, rows, right=_NUMBERS) if rows else "Nothing heard yet."
    return output.stack(*lines, table)


def _row(one: dict[str, Any]) -> list[str]:
    jitter, loss = one["jitter"], one["loss"]
    return [
        one["rule"],
        one["source"],
        one["group"],
        str(one["port"]),
        one["format"],
        one["seen"],
        output.count(one["units"]),
        *(_known(one[key]) for key in ("lost",)),
        "-" if loss is None else f"{100 * loss:.3g} %",
        *(_known(one[key]) for key in ("reordered", "duplicates")),
        "-" if jitter is None else f"{1000 * jitter:.3g} ms",
        f"{one['silence']:.0f} s",
        _more(one),
        ", ".join(one["alarms"]) or "-",
    ]


def _known(number: int | None) -> str:
    return "-" if number is None else output.count(number)


def _more(one: dict[str, Any]) -> str:
    counts = {"restarts": one["restarts"], "unreadable": one["bad"], "not heard": one["excused"]}
    counts |= {name: one["details"].get(key) for key, name in _MORE.items()}
    return ", ".join(f"{name} {output.count(count)}" for name, count in counts.items() if count) or "-"
