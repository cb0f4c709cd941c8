"""The shapes of the API's answers and requests: what /openapi.json says, and nothing else. Pure."""

from typing import Any, Final, Literal

from pydantic import BaseModel, Field


class Health(BaseModel):
    """`pid` is the supervisor's; `uptime` in seconds; `landlock` the ABI version that confines, 0 for none.

    `no_fast_path`: why the engine is "uring"; empty when it is "ebpf".
    """

    ready: bool
    version: str
    pid: int
    engine: Literal["ebpf", "uring"]
    no_fast_path: str
    egress: Literal["io_uring", "sendmmsg"]
    uptime: float
    landlock: int


class Access(BaseModel):
    """Whether this client may look, and change rules; if not, why, and what to do about it."""

    look: bool
    change: bool
    problem: str
    remedy: str


class OutputState(BaseModel):
    """`state` as in Rule."""

    to: str
    state: str


class Rule(BaseModel):
    """`state` is "up", "waiting: …" or "error: …"; it is "up" when the input and all outputs are."""

    name: str
    from_: str = Field(alias="from")
    to: list[str]
    link_local: bool
    allow_loop: bool
    rate: str | None
    health: str | None
    state: str
    outputs: list[OutputState]


class Rules(BaseModel):
    rules: list[Rule]


class Difference(BaseModel):
    """Names of rules."""

    added: list[str]
    removed: list[str]
    changed: list[str]
    unchanged: list[str]


class Flow(BaseModel):
    """`bytes` of UDP payload; `bps` in bits per second; both rates over about a second.

    `health` in a few words, for rules that ask for it; /v1/streams has the figures.
    """

    interface: str
    vlan: int | None
    source: str
    group: str
    port: int
    worker: int
    engine: Literal["xdp", "ebpf", "uring"]
    why: str
    packets: int
    bytes: int
    pps: float
    bps: float
    rules: list[str]
    outputs: list[str]
    health: str | None


class Flows(BaseModel):
    flows: list[Flow]


class History(BaseModel):
    """Datagrams a second, the oldest first: a value for each `step` seconds up to `end` (seconds since 1970).

    `drops` has the reasons for which there was any.
    """

    step: float
    end: float
    received: list[float]
    matched: list[float]
    drops: dict[str, list[float]]


class RuleHistory(BaseModel):
    """As in History; null where the rule was not there yet. `errors`: datagrams that outputs could not send."""

    step: float
    end: float
    pps: list[float | None]
    bps: list[float | None]
    errors: list[float | None]


class OutputStats(BaseModel):
    """`packets` were handed to the kernel without error; `state` as in Rule."""

    to: str
    state: str
    packets: int
    bytes: int
    errors: int


class RuleStats(BaseModel):
    """As in Flow; `state` as in Rule.

    `drops`, by reason, but for those that are 0: datagrams that the rule took and passed nowhere. Where several
    rules take a stream each counts for itself, also when another passed it: so the sums are not the relay's.
    """

    name: str
    state: str
    packets: int
    bytes: int
    pps: float
    bps: float
    drops: dict[str, int]
    outputs: list[OutputStats]


class Stats(BaseModel):
    """Datagrams; received = matched + the sum of drops. `flows` is how many there are, `engines` by engine.

    `time`: when it was so, in seconds since 1970; the difference between two answers divides into rates.

    `carried`: those of `matched` that the kernel's fast path carried. `passed`, by reason: frames, of all traffic
    on its interfaces, that it left to the slow path or the IP stack since its maps were made; empty without one.
    """

    time: float
    received: int
    matched: int
    drops: dict[str, int]
    rules: list[RuleStats]
    flows: int
    engines: dict[str, int]
    carried: int
    passed: dict[str, int]


class Reasons(BaseModel):
    """What the reasons in /v1/stats mean: of `drops`, and of `passed`."""

    drops: dict[str, str]
    passed: dict[str, str]


class Worker(BaseModel):
    """`pid` is null while it is down. `cpu_percent` of one core, over about a second.

    `state` is "running", "starting", "restarting", or why it stays down ("crash loop (…): next try in 30 s").
    `carried`: those of `received` that the kernel's fast path carried for it.
    `repairs`: how often it had other rules in force than it was told, and was told them again.
    """

    worker: int
    core: int
    pid: int | None
    state: str
    restarts: int
    repairs: int
    egress: str
    flows: int
    received: int
    carried: int
    cpu_percent: float


class Workers(BaseModel):
    workers: list[Worker]


AlarmKind = Literal["loss", "jitter", "silence"]


class StreamHealth(BaseModel):
    """A flow of a rule that asks for its health, since it was first heard. Null: its format can't tell.

    `seen`: "not all" for ten seconds after datagrams were missed by ourselves, `missed` times in all; what is
    missing there is `excused`, not `lost`. `units`: what its format numbers (datagrams, messages, transport
    packets), without duplicates. `loss`: the ratio over the last ten seconds; `jitter` and `silence` in seconds.
    """

    rule: str
    interface: str
    vlan: int | None
    source: str
    group: str
    port: int
    format: str
    seen: Literal["all", "sampled", "not all"]
    missed: int
    packets: int
    bytes: int
    silence: float
    loss: float | None
    jitter: float | None
    units: int
    lost: int | None
    reordered: int | None
    duplicates: int | None
    restarts: int | None
    excused: int
    bad: int
    details: dict[str, int]
    alarms: list[AlarmKind]


class RuleHealth(BaseModel):
    """A rule that asks for health. `problem`: why nothing is heard; `alarms` of it as long as it has no stream."""

    rule: str
    health: str
    problem: str
    alarms: list[AlarmKind]


class Streams(BaseModel):
    """`left_out`: frames of streams beyond the 4,096 that are measured."""

    streams: list[StreamHealth]
    rules: list[RuleHealth]
    left_out: int


class Heard(BaseModel):
    """One sender to a group. `host`: its name by multicast DNS. `ttl`: what its last datagram had."""

    address: str
    host: str | None
    packets: int
    bytes: int
    ttl: int


class HeardGroup(BaseModel):
    """`port` null: somebody wants the group, and nothing was heard of it. Rates over the last seconds.

    `members` reported by IGMP or MLD that they want it; `names` of sessions by SAP. `rules` take it already;
    `rule` is the command that adds one for it.
    """

    vlan: int | None
    group: str
    port: int | None
    sources: list[Heard]
    packets: int
    bytes: int
    pps: float
    bps: float
    members: list[str]
    names: list[str]
    rules: list[str]
    rule: str


class Querier(BaseModel):
    """Who asks for memberships, and the version of the protocol it speaks."""

    address: str
    protocol: Literal["IGMP", "MLD"]
    version: int


class Service(BaseModel):
    """A service that multicast DNS told of."""

    name: str
    host: str
    port: int


class Discovered(BaseModel):
    """What was heard in `seconds`. `missed`: frames that came too fast, so that counts and rates are too low.

    `left_out`: what there was no room for in the lists. The groups are the busiest first.
    """

    interface: str
    seconds: float
    missed: int
    left_out: int
    queriers: list[Querier]
    groups: list[HeardGroup]
    services: list[Service]


class Stage(BaseModel):
    """One stage on a stream's way. `text` in one line; `evidence`: what was seen; `remedy` when it failed."""

    stage: str
    status: Literal["ok", "failed", "unknown", "skipped"]
    text: str
    evidence: list[str]
    remedy: str


class WhyLine(BaseModel):
    """`stage`: the first that failed, null when none did; `summary` is what it says."""

    rule: str
    verdict: Literal["forwarding", "partly", "not forwarding"]
    stage: str | None
    summary: str


class Why(WhyLine):
    """`seconds`: how long it was looked at. `stages` in order; those behind the one that failed are "skipped"."""

    seconds: float
    stages: list[Stage]


class WhyAll(BaseModel):
    rules: list[WhyLine]


class Stopping(BaseModel):
    """`flows`: how many the kernel goes on to forward."""

    flows: int


Level = Literal["debug", "info", "warning", "error", "critical"]


class LogLevels(BaseModel):
    """From which level on each role logs."""

    supervisor: Level = "info"
    control: Level = "info"
    worker: Level = "info"


class Error(BaseModel):
    """What is wrong where, and what to do; `rule` and `key` are empty where they say nothing."""

    rule: str
    key: str
    problem: str
    remedy: str


class Errors(BaseModel):
    errors: list[Error]


# What a request may hold is checked by mrelay.model, whose errors have remedies; this is for readers only.
_ENDPOINT: Final[dict[str, Any]] = {"anyOf": [{"type": "string"}, {"type": "object"}]}
RULE_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["name", "from", "to"],
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
        "from": {**_ENDPOINT, "examples": ["eth0:239.1.1.1:5000"]},
        "to": {"type": "array", "minItems": 1, "items": {**_ENDPOINT, "examples": ["eth1:239.2.2.2:6000"]}},
        "link_local": {"type": "boolean", "default": False},
        "allow_loop": {"type": "boolean", "default": False},
        "rate": {"type": "string", "examples": ["10kpps,50Mbit/s"]},
        "health": {"anyOf": [{"type": "string"}, {"type": "object"}], "examples": ["rtp,loss=0.1%"]},
    },
    "additionalProperties": False,
}
RULES_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["rules"],
    "properties": {"rules": {"type": "array", "items": RULE_SCHEMA}},
    "additionalProperties": False,
}
DISCOVER_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["interface"],
    "properties": {
        "interface": {"type": "string", "examples": ["eth0"]},
        "to": {"type": "string", "examples": ["eth1"], "description": "where suggested rules send to"},
        "seconds": {"type": "number", "exclusiveMinimum": 0, "maximum": 3600, "default": 10},
    },
    "additionalProperties": False,
}
CAPTURE_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["what"],
    "properties": {
        "what": {
            "type": "string",
            "examples": ["studio-a", "eth0:10.1.1.9@239.1.1.1:5000"],
            "description": "a rule's name, or a flow, written as an input",
        },
        "side": {"type": "string", "enum": ["in", "out", "dropped"], "default": "in"},
        "seconds": {"type": "number", "exclusiveMinimum": 0, "maximum": 3600, "default": 10},
        "packets": {"type": "integer", "minimum": 1, "maximum": 10000000, "default": 10000000},
        "bytes": {"type": "integer", "minimum": 1, "maximum": 10000000000, "default": 100000000},
    },
    "additionalProperties": False,
}
