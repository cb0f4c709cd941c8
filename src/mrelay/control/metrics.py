"""What Prometheus scrapes.

Owns the metrics' names, types and help (docs/metrics.md is made from them by scripts/make_metrics.py). Called by
relay, in a thread, with what was gathered in the event loop; nothing here blocks. Labels have bounded values:
rules and outputs, which their owner wrote, and lists of ours; what packets say only of streams that health is
asked for, which are limited. There are no `_created` samples: counters outlive the process that would have to know
when they began.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from mrelay.control.proc import Usage
from mrelay.protocols.alarms import KINDS

Table = dict[str, Any]
Sample = tuple[str, str, float]  # a metric's name, labels as they are written, value
OPENMETRICS: Final = "application/openmetrics-text"
_UNITS: Final = ("bytes", "seconds")
_SUFFIXES: Final = {"counter": "_total", "gauge": "", "info": "_info"}


class Spec(NamedTuple):
    """A metric; a counter's samples are called NAME_total, an info's NAME_info."""

    kind: Literal["counter", "gauge", "info"]
    help: str
    labels: tuple[str, ...] = ()


_STREAM: Final = ("rule", "interface", "vlan", "source", "group", "port")
SPECS: Final[Mapping[str, Spec]] = {
    "mrelay_build": Spec(
        "info", "Version of the relay; what forwards, as in /v1/health.", ("version", "engine", "egress")
    ),
    "mrelay_start_time_seconds": Spec("gauge", "When the relay started, in seconds since 1970."),
    "mrelay_received_datagrams": Spec("counter", "Datagrams to an address that a rule names."),
    "mrelay_matched_datagrams": Spec("counter", "Datagrams that at least one rule took."),
    "mrelay_dropped_datagrams": Spec("counter", "Datagrams received and not matched.", ("reason",)),
    "mrelay_carried_datagrams": Spec(
        "counter", "Datagrams, of those matched, that the kernel's fast path carried."
    ),
    "mrelay_slow_path_frames": Spec(
        "counter", "Frames, of all traffic on its interfaces, that the fast path left to others.", ("reason",)
    ),
    "mrelay_flows": Spec("gauge", "Flows in the workers' tables, by what carries them.", ("engine",)),
    "mrelay_rules": Spec("gauge", "Rules that are up, and that are not.", ("state",)),
    "mrelay_rule_datagrams": Spec("counter", "Datagrams that a rule took.", ("rule",)),
    "mrelay_rule_bytes": Spec("counter", "UDP payload that a rule took.", ("rule",)),
    "mrelay_rule_up": Spec("gauge", "1 when a rule's input and all its outputs are up.", ("rule",)),
    "mrelay_output_datagrams": Spec(
        "counter", "Datagrams handed to the kernel for an output.", ("rule", "output")
    ),
    "mrelay_output_bytes": Spec("counter", "UDP payload handed to the kernel for an output.", ("rule", "output")),
    "mrelay_output_errors": Spec(
        "counter", "Datagrams that the kernel refused for an output.", ("rule", "output")
    ),
    "mrelay_output_up": Spec("gauge", "1 when an output is up.", ("rule", "output")),
    "mrelay_interface_up": Spec("gauge", "1 when an interface that rules name is up.", ("interface",)),
    "mrelay_interface_fast_path": Spec(
        "gauge", "1 when the kernel's fast path is at the interface.", ("interface",)
    ),
    "mrelay_worker_up": Spec("gauge", "1 when the worker runs.", ("worker",)),
    "mrelay_worker_restarts": Spec("counter", "Times that the worker was started again.", ("worker",)),
    "mrelay_worker_repairs": Spec(
        "counter", "Times that the worker had other rules than it was told.", ("worker",)
    ),
    "mrelay_worker_received_datagrams": Spec("counter", "Datagrams received by the worker's flows.", ("worker",)),
    "mrelay_worker_carried_datagrams": Spec("counter", "Those that the fast path carried for it.", ("worker",)),
    "mrelay_worker_flows": Spec("gauge", "Flows in the worker's table.", ("worker",)),
    "mrelay_process_cpu_seconds": Spec("counter", "User and system time of a process.", ("process",)),
    "mrelay_process_resident_memory_bytes": Spec("gauge", "Resident memory of a process.", ("process",)),
    "mrelay_events": Spec("counter", "Events, as in docs/events.md.", ("type",)),
    "mrelay_event_stream_clients": Spec("gauge", "Clients that follow the events."),
    "mrelay_stream_units": Spec(
        "counter", "What a stream numbers (datagrams, messages, transport packets), without duplicates.", _STREAM
    ),
    "mrelay_stream_lost_units": Spec("counter", "Of these, those that did not come.", _STREAM),
    "mrelay_stream_reordered_units": Spec("counter", "Those that came after one with a higher number.", _STREAM),
    "mrelay_stream_duplicate_units": Spec("counter", "Those that came again.", _STREAM),
    "mrelay_stream_missed": Spec(
        "counter", "Times that the relay could not hear all of it; what is missing there is not lost.", _STREAM
    ),
    "mrelay_stream_loss_ratio": Spec("gauge", "Lost of all, over the last ten seconds.", _STREAM),
    "mrelay_stream_jitter_seconds": Spec("gauge", "Interarrival jitter (RFC 3550).", _STREAM),
    "mrelay_stream_silence_seconds": Spec("gauge", "Since a stream's last datagram.", _STREAM),
    "mrelay_stream_alarm": Spec("gauge", "1 while an alarm of a stream is raised.", (*_STREAM, "alarm")),
}
_OF_STREAM: Final = {  # in /v1/streams
    "mrelay_stream_units": "units",
    "mrelay_stream_lost_units": "lost",
    "mrelay_stream_reordered_units": "reordered",
    "mrelay_stream_duplicate_units": "duplicates",
    "mrelay_stream_missed": "missed",
    "mrelay_stream_loss_ratio": "loss",
    "mrelay_stream_jitter_seconds": "jitter",
    "mrelay_stream_silence_seconds": "silence",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What is told: the objects of /v1/health, /v1/stats and /v1/workers; when the relay started; by interface:
    whether it is up, and whether the fast path is at it; by process: what it uses; how many events there were, by
    type, and clients that follow them; the streams of /v1/streams."""

    health: Table
    started: float
    stats: Table
    workers: Sequence[Table]
    interfaces: Mapping[str, tuple[bool, bool]]
    processes: Mapping[str, Usage]
    events: Mapping[str, int]
    followers: int
    streams: Sequence[Table]


def _samples(facts: Facts) -> Iterator[Sample]:
    health = facts.health
    yield "mrelay_build", _labels(version=health["version"], engine=health["engine"], egress=health["egress"]), 1
    yield "mrelay_start_time_seconds", "", facts.started
    yield from _totals(facts.stats)
    yield from _rules(facts.stats["rules"])
    for name, (up, fast) in facts.interfaces.items():
        yield "mrelay_interface_up", _labels(interface=name), up
        yield "mrelay_interface_fast_path", _labels(interface=name), fast
    for worker in facts.workers:
        yield from _worker(worker)
    for name, usage in facts.processes.items():
        yield from _process(name, usage)
    for kind, count in facts.events.items():
        yield "mrelay_events", _labels(type=kind), count
    yield "mrelay_event_stream_clients", "", facts.followers
    for stream in facts.streams:
        yield from _stream(stream)


def _totals(stats: Table) -> Iterator[Sample]:
    for what in ("received", "matched", "carried"):
        yield f"mrelay_{what}_datagrams", "", stats[what]
    for reason, count in stats["drops"].items():
        yield "mrelay_dropped_datagrams", _labels(reason=reason), count
    for reason, count in stats["passed"].items():
        yield "mrelay_slow_path_frames", _labels(reason=reason), count
    for engine, count in stats["engines"].items():
        yield "mrelay_flows", _labels(engine=engine), count
    up = sum(rule["state"] == "up" for rule in stats["rules"])
    yield "mrelay_rules", _labels(state="up"), up
    yield "mrelay_rules", _labels(state="waiting"), len(stats["rules"]) - up


def _rules(rules: Iterable[Table]) -> Iterator[Sample]:
    for rule in rules:
        of = _labels(rule=rule["name"])
        yield "mrelay_rule_datagrams", of, rule["packets"]
        yield "mrelay_rule_bytes", of, rule["bytes"]
        yield "mrelay_rule_up", of, rule["state"] == "up"
        for output in rule["outputs"]:
            to = _labels(rule=rule["name"], output=output["to"])
            yield "mrelay_output_datagrams", to, output["packets"]
            yield "mrelay_output_bytes", to, output["bytes"]
            yield "mrelay_output_errors", to, output["errors"]
            yield "mrelay_output_up", to, output["state"] == "up"


def _worker(worker: Table) -> Iterator[Sample]:
    of = _labels(worker=str(worker["worker"]))
    yield "mrelay_worker_up", of, worker["pid"] is not None
    yield "mrelay_worker_restarts", of, worker["restarts"]
    yield "mrelay_worker_repairs", of, worker["repairs"]
    yield "mrelay_worker_received_datagrams", of, worker["received"]
    yield "mrelay_worker_carried_datagrams", of, worker["carried"]
    yield "mrelay_worker_flows", of, worker["flows"]


def _process(name: str, usage: Usage) -> Iterator[Sample]:
    if usage.cpu is not None:
        yield "mrelay_process_cpu_seconds", _labels(process=name), usage.cpu
    if usage.resident is not None:
        yield "mrelay_process_resident_memory_bytes", _labels(process=name), usage.resident


def _stream(stream: Table) -> Iterator[Sample]:
    """Of a rule that asks for health. What a format can't tell has no sample."""
    labels = {name: "" if stream[name] is None else str(stream[name]) for name in _STREAM}
    of = _labels(**labels)
    for name, key in _OF_STREAM.items():
        if stream[key] is not None:
            yield name, of, stream[key]
    for kind in KINDS:
        yield "mrelay_stream_alarm", _labels(**labels, alarm=kind), kind in stream["alarms"]


def _labels(**labels: str) -> str:
    """As they are written. In what an operator names there may be anything."""
    return "{" + ",".join([f'{name}="{_escaped(value)}"' for name, value in labels.items()]) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


# The library prometheus-client takes 20 µs for a line, and 10,000 rules are 70,000 lines: this takes a fifteenth.
# In the tests that library, and promtool, read what is written here.
def exposition(facts: Facts, accept: str) -> tuple[bytes, str]:
    """The text in the format that an Accept header asks for, OpenMetrics or Prometheus's, and its media type."""
    openmetrics = any(kind.partition(";")[0].strip() == OPENMETRICS for kind in accept.split(","))
    lines: dict[str, list[str]] = defaultdict(list)
    for name, labels, value in _samples(facts):
        lines[name].append(f"{name}{_SUFFIXES[SPECS[name].kind]}{labels} {value + 0}")  # a truth is 1 or 0
    text = [line for name in SPECS for line in (*_head(name, openmetrics), *lines[name])]
    if openmetrics:
        return "\n".join([*text, "# EOF", ""]).encode(), f"{OPENMETRICS}; version=1.0.0; charset=utf-8"
    return "\n".join([*text, ""]).encode(), "text/plain; version=0.0.4; charset=utf-8"


def _head(name: str, openmetrics: bool) -> Iterator[str]:
    """In Prometheus's own format it is the sample that has a type, and there is no info."""
    spec = SPECS[name]
    family, kind = (
        (name, spec.kind) if openmetrics else (name + _SUFFIXES[spec.kind], spec.kind.replace("info", "gauge"))
    )
    yield f"# HELP {family} {spec.help}"
    yield f"# TYPE {family} {kind}"
    unit = name.rpartition("_")[2]
    if openmetrics and unit in _UNITS:
        yield f"# UNIT {family} {unit}"
