"""`mrelay flows`, `mrelay stats`, `mrelay workers`: what a running relay does, as tables or JSON.

Called by the command line. Blocks on the control socket, and until Ctrl-C with --watch.
"""

from typing import Any, Final

from rich.console import RenderableType

from mrelay.cli import output
from mrelay.cli.client import Client
from mrelay.cli.options import DEFAULT_SOCKET, AsJson, Every, Socket, Watch
from mrelay.reasons import DROPS

_FLOW_COLUMNS: Final = (
    *("INTERFACE", "VLAN", "SOURCE", "GROUP", "PORT", "RULES", "OUTPUTS"),
    *("PACKETS", "PACKETS/S", "BITRATE", "WORKER", "ENGINE", "HEALTH"),
)
_FLOW_NUMBERS: Final = ("VLAN", "PORT", "PACKETS", "PACKETS/S", "BITRATE", "WORKER")
_MOST_OUTPUTS: Final = 16  # of one flow
_WORKER_COLUMNS: Final = (
    *("WORKER", "CORE", "PID", "STATE", "RESTARTS", "REPAIRS", "EGRESS", "FLOWS", "RECEIVED", "CARRIED", "CPU"),
)


def flows(
    *, as_json: AsJson = False, watch: Watch = False, every: Every = 1.0, socket: Socket = DEFAULT_SOCKET
) -> None:
    """The flows of a running relay, busiest first."""
    client = Client(socket)
    output.show(lambda: client.get("/v1/flows"), _flows_table, as_json=as_json, watch=watch, every=every)


def stats(
    *, as_json: AsJson = False, watch: Watch = False, every: Every = 1.0, socket: Socket = DEFAULT_SOCKET
) -> None:
    """The counters of a running relay."""
    client = Client(socket)
    output.show(lambda: client.get("/v1/stats"), _stats_view, as_json=as_json, watch=watch, every=every)


def workers(
    *, as_json: AsJson = False, watch: Watch = False, every: Every = 1.0, socket: Socket = DEFAULT_SOCKET
) -> None:
    """The workers of a running relay."""
    client = Client(socket)
    output.show(lambda: client.get("/v1/workers"), _workers_table, as_json=as_json, watch=watch, every=every)


def _flows_table(answer: dict[str, Any]) -> RenderableType:
    found = sorted(answer["flows"], key=lambda flow: -flow["pps"])
    if not found:
        return "No flows: nothing that a rule names has arrived. 'mrelay rule list' shows what is waited for."
    rows = [_flow_row(flow) for flow in found]
    return output.table(_FLOW_COLUMNS, rows, right=_FLOW_NUMBERS)


def _flow_row(flow: dict[str, Any]) -> list[str]:
    return [
        flow["interface"],
        "-" if flow["vlan"] is None else str(flow["vlan"]),
        flow["source"],
        flow["group"],
        str(flow["port"]),
        "\n".join(flow["rules"]) or "-",
        _lines(flow["outputs"]) or "-",
        output.count(flow["packets"]),
        output.scaled(flow["pps"], ""),
        output.scaled(flow["bps"], "bit/s"),
        str(flow["worker"]),
        flow["engine"] + (f": {flow['why']}" if flow["why"] else ""),
        flow["health"] or "-",
    ]


def _lines(outputs: list[str]) -> str:
    """One each, but not thousands of the same flow: what follows it would be far below."""
    more = len(outputs) - _MOST_OUTPUTS
    if more <= 1:
        return "\n".join(outputs)
    return "\n".join([*outputs[:_MOST_OUTPUTS], f"and {output.count(more)} more (all: --json)"])


def _stats_view(answer: dict[str, Any]) -> RenderableType:
    dropped = sum(answer["drops"].values())
    summary = (
        f"received {output.count(answer['received'])} = matched {output.count(answer['matched'])}"
        f" + dropped {output.count(dropped)}; {output.plural(answer['flows'], 'flow')}"
    )
    by_engine = [_engines(answer)] if answer["passed"] else []
    return output.stack(summary, *by_engine, "", _rules_table(answer["rules"]), "", _drops_table(answer["drops"]))


def _engines(answer: dict[str, Any]) -> str:
    """What the kernel's fast path did, and why it left the rest."""
    passed = {reason: frames for reason, frames in answer["passed"].items() if frames}
    reasons = ", ".join(f"{reason} {output.count(frames)}" for reason, frames in passed.items())
    left = f"; frames it passed on: {reasons}" if passed else ""
    slow = answer["received"] - answer["carried"]
    return f"the kernel carried {output.count(answer['carried'])}, the slow path {output.count(slow)}{left}"


def _rules_table(rules: list[dict[str, Any]]) -> RenderableType:
    rows = []
    for rule in rules:
        rows.append([rule["name"], "", *_traffic(rule), "", ""])
        for to in rule["outputs"]:
            counts = [output.count(to["packets"]), output.scaled(to["bytes"], "B"), "", ""]
            rows.append(["", to["to"], *counts, output.count(to["errors"]), to["state"]])
    columns = ("RULE", "OUTPUT", "PACKETS", "BYTES", "PACKETS/S", "BITRATE", "ERRORS", "STATE")
    return output.table(columns, rows, right=columns[2:-1]) if rows else "No rules."


def _traffic(rule: dict[str, Any]) -> list[str]:
    return [
        output.count(rule["packets"]),
        output.scaled(rule["bytes"], "B"),
        output.scaled(rule["pps"], ""),
        output.scaled(rule["bps"], "bit/s"),
    ]


def _drops_table(drops: dict[str, int]) -> RenderableType:
    rows = [[reason, output.count(number), DROPS.get(reason, "")] for reason, number in drops.items() if number]
    return output.table(("DROPPED", "PACKETS", "MEANS"), rows, right=("PACKETS",)) if rows else "Nothing dropped."


def _workers_table(answer: dict[str, Any]) -> RenderableType:
    rows = [_worker_row(worker) for worker in answer["workers"]]
    right = ("WORKER", "CORE", "PID", "RESTARTS", "REPAIRS", "FLOWS", "RECEIVED", "CARRIED", "CPU")
    return output.table(_WORKER_COLUMNS, rows, right=right) if rows else "No workers."


def _worker_row(worker: dict[str, Any]) -> list[str]:
    return [
        str(worker["worker"]),
        str(worker["core"]),
        "-" if worker["pid"] is None else str(worker["pid"]),
        worker["state"],
        str(worker["restarts"]),
        str(worker["repairs"]),
        worker["egress"] or "-",
        output.count(worker["flows"]),
        output.count(worker["received"]),
        output.count(worker["carried"]),
        f"{worker['cpu_percent']:.0f} %",
    ]
