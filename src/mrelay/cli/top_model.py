"""What `mrelay top` shows: the last minute of a relay's rules and flows, sorted, filtered, as rows of text.

Owns the history that the relay itself does not keep for it. Called by top and top_app with each answer. Pure.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from mrelay.cli import output

MINUTE: Final = 60  # samples
MOST: Final = 200  # rows: more than a screen, and quick to draw
SPARKS: Final = "▁▂▃▄▅▆▇█"
SPARK_WIDTH: Final = 12

Table = dict[str, Any]
View = Literal["rules", "flows"]
SORTS: Final = ("packets", "bits", "name", "state")  # of flows, "state" is the engine


class Row(NamedTuple):
    """`key` names it over time; `text` is what a filter looks at."""

    key: str
    cells: tuple[str, ...]
    text: str


@dataclass
class Model:
    """The latest answers of /v1/stats and /v1/flows, and each line's packets a second in the last minute."""

    stats: Table | None = None
    flows: list[Table] = field(default_factory=list)
    _history: dict[str, deque[float]] = field(default_factory=dict)
    _drops: dict[str, float] = field(default_factory=dict)
    _engines: dict[str, set[str]] = field(default_factory=dict)  # by rule, of its busiest flows

    def take(self, stats: Table, flows: list[Table], seconds: float) -> None:
        """New answers, so many seconds after the last ones."""
        old = self.stats["drops"] if self.stats else stats["drops"]
        self._drops = {
            reason: (count - old.get(reason, 0)) / max(seconds, 0.001)
            for reason, count in stats["drops"].items()
            if count > old.get(reason, 0)
        }
        self.stats, self.flows = stats, flows
        self._engines = {}
        for flow in flows:
            for rule in flow["rules"]:
                self._engines.setdefault(rule, set()).add(flow["engine"])
        rates = {rule["name"]: rule["pps"] for rule in stats["rules"]}
        rates |= {flow_key(flow): flow["pps"] for flow in flows}
        self._history = {key: self._history.get(key, deque([0.0] * MINUTE, maxlen=MINUTE)) for key in rates}
        for key, rate in rates.items():
            self._history[key].append(rate)

    def forget(self) -> None:
        """Another relay is there: its counters have nothing to do with the last one's."""
        self.stats, self._drops = None, {}

    def summary(self) -> list[str]:
        """Two lines: what came in and became of it, and what is dropped now."""
        if self.stats is None:
            return ["no answer yet", ""]
        stats = self.stats
        pps, bps = (sum(rule[key] for rule in stats["rules"]) for key in ("pps", "bps"))
        up = sum(rule["state"] == "up" for rule in stats["rules"])
        engines = ", ".join(f"{output.count(n)} {engine}" for engine, n in stats["engines"].items() if n) or "none"
        first = (
            f"{up} of {output.plural(len(stats['rules']), 'rule')} up   flows: {engines}   "
            f"{output.scaled(pps, '')}packets/s   {output.scaled(bps, 'bit/s')}"
        )
        rising = ", ".join(f"{reason} {output.scaled(rate, '')}/s" for reason, rate in self._drops.items())
        total = output.count(sum(stats["drops"].values()))
        return [first, f"dropped {total} in all; now: {rising or 'nothing'}"]

    def rows(self, view: View, sort: str, text: str) -> list[Row]:
        """Those lines whose text has every word of `text` in it, in order, at most MOST."""
        wanted = text.lower().split()
        rules = [(self._rule(rule), rule) for rule in (self.stats or {"rules": []})["rules"]]
        found = rules if view == "rules" else [(self._flow(flow), flow) for flow in self.flows]
        kept = [(row, of) for row, of in found if all(word in row.text for word in wanted)]
        kept.sort(key=lambda each: _order(sort, *each))
        return [row for row, _ in kept[:MOST]]

    def rows_of(self, rule: str) -> list[Row]:
        """The busiest flows that a rule takes."""
        return [self._flow(flow) for flow in self.flows if rule in flow["rules"]]

    def rule_of(self, key: str) -> str:
        """The first rule that takes the flow with this key; nothing when it is gone."""
        return next((flow["rules"][0] for flow in self.flows if flow_key(flow) == key and flow["rules"]), "")

    def rule(self, name: str) -> Table | None:
        """As in /v1/stats; None when it is gone."""
        rules = self.stats["rules"] if self.stats else []
        return next((rule for rule in rules if rule["name"] == name), None)

    def _rule(self, rule: Table) -> Row:
        errors = sum(to["errors"] for to in rule["outputs"])
        engines = "+".join(sorted(self._engines.get(rule["name"], ()))) or "-"
        cells = (rule["name"], *self._traffic(rule["name"], rule), engines, output.count(errors), rule["state"])
        text = " ".join([rule["name"], engines, rule["state"], *(to["to"] for to in rule["outputs"])])
        return Row(rule["name"], cells, text.lower())

    def _flow(self, flow: Table) -> Row:
        key = flow_key(flow)
        where = flow["interface"] + ("" if flow["vlan"] is None else f" vlan {flow['vlan']}")
        stream = f"{flow['source']} > {_endpoint(flow['group'], flow['port'])}"
        cells = (stream, *self._traffic(key, flow), flow["engine"], where, " ".join(flow["rules"]))
        return Row(key, cells, " ".join([*cells, *flow["outputs"]]).lower())

    def _traffic(self, key: str, of: Table) -> tuple[str, str, str]:
        return output.scaled(of["pps"], ""), output.scaled(of["bps"], "bit/s"), self.spark(key)

    def spark(self, key: str) -> str:
        """The last minute, as high as its busiest moment."""
        return sparkline(self._history.get(key, ()))


COLUMNS: Final[dict[View, tuple[str, ...]]] = {
    "rules": ("RULE", "PACKETS/S", "BITRATE", "LAST MINUTE", "ENGINE", "ERRORS", "STATE"),
    "flows": ("FLOW", "PACKETS/S", "BITRATE", "LAST MINUTE", "ENGINE", "INTERFACE", "RULES"),
}


def flow_key(flow: Table) -> str:
    """What tells it from all others, and from every rule."""
    return " ".join(str(flow[name]) for name in ("interface", "vlan", "source", "group", "port"))


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def sparkline(values: Iterable[float], width: int = SPARK_WIDTH) -> str:
    """Means of equal parts, scaled to the greatest; a blank for nothing."""
    samples = list(values)
    if not samples:
        return " " * width
    size = len(samples) / width
    parts = [samples[int(i * size) : max(int(i * size) + 1, int((i + 1) * size))] for i in range(width)]
    means = [sum(part) / len(part) for part in parts]
    top = max(means)
    return "".join(SPARKS[min(7, int(8 * mean / top))] if mean > 0 else " " for mean in means)


def _order(sort: str, row: Row, of: Table) -> tuple[Any, ...]:
    keys: dict[str, Callable[[], Any]] = {
        "packets": lambda: -of["pps"],
        "bits": lambda: -of["bps"],
        "name": lambda: "",
        "state": lambda: (of.get("state", of.get("engine")) == "up", of.get("state", of.get("engine"))),
    }
    return keys[sort](), row.cells[0]


def aligned(columns: Sequence[str]) -> tuple[str, ...]:
    """Those that are numbers."""
    return tuple(column for column in columns if column in ("PACKETS/S", "BITRATE", "ERRORS", "PACKETS"))
