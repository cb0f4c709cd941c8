"""The messages that the three roles exchange.

Owns the only table of what may be said between roles; every role uses it, through a wire.Channel. Standard library
only, because the supervisor imports it. A message is a frozen dataclass. Nothing here blocks.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

VERSION: Final = 2
AT_ONCE: Final = 32  # resources in one message, with two descriptors each at most; or rules
WEIGHT: Final = 256  # outputs and addresses of the rules in one message: each is 200 bytes at most on the wire
_HALF: Final = WEIGHT // 2
T = TypeVar("T")


# ---- what control asks of the supervisor: each names one kernel object, and is its key ------------


@dataclass(frozen=True, slots=True)
class OpenIngress:
    """Receive rings for every worker on interface `ifindex`: one of `slots` short frames, one of long ones.

    `family` 4 or 6: only frames of it, which the fast path, now attached there, left; 0: every frame, before
    anything else sees it.
    """

    ifindex: int
    slots: int
    family: int = 0


@dataclass(frozen=True, slots=True)
class JoinGroup:
    """Membership of `group` on `ifindex`, source-specific when `source` is given."""

    ifindex: int
    group: str
    source: str | None


@dataclass(frozen=True, slots=True)
class HoldUnicast:
    """A bound, never read UDP socket, so that the host sends no port-unreachable for a unicast input."""

    address: str
    port: int


@dataclass(frozen=True, slots=True)
class OpenEgress:
    """The sending socket of one output, one copy for every worker, all with the same source port.

    `address` and `port` are None for a `*` output (the worker names each destination). `source` is
    "egress", "keep" or an address. `epoch` changes when the interface's addresses do, so that a new
    socket picks its source address afresh.
    """

    output: int
    ifindex: int
    family: int  # 4 or 6
    address: str | None
    port: int | None
    source: str
    epoch: int


@dataclass(frozen=True, slots=True)
class SetGro:
    """UDP GRO forwarding on `ifindex`, whatever its name; releasing it puts back what was there."""

    ifindex: int


@dataclass(frozen=True, slots=True)
class AttachXdp:
    """The fast path's XDP program in the driver of `ifindex`; only while the rings for a family are open there.

    While it is, an XdpTargets tells which interfaces it may send to, before Done and whenever that changes.
    """

    ifindex: int


Resource = OpenIngress | JoinGroup | HoldUnicast | OpenEgress | SetGro | AttachXdp


@dataclass(frozen=True, slots=True)
class Grant:
    """Control to supervisor: open these, in this order; AT_ONCE at most. Answered by Outcome."""

    id: int
    what: tuple[Resource, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """Control to supervisor: close these, likewise. Releasing what is not held is fine."""

    id: int
    what: tuple[Resource, ...]


@dataclass(frozen=True, slots=True)
class Listen:
    """Control to supervisor: the API socket, with this file mode and group. Answered by Listening or Failed."""

    id: int
    mode: int
    group: str | None


@dataclass(frozen=True, slots=True)
class ListenTcp:
    """Control to supervisor: a TCP socket that listens here. Answered by ListeningTcp or Failed.

    One for the relay's life, and first asked for before Listen: who has read a client's request can't have it.
    """

    id: int
    address: str
    port: int


MAX_BUSY_POLL: Final = 1000  # microseconds


@dataclass(frozen=True, slots=True)
class StartWorkers:
    """Control to supervisor: one worker on each of these cores, with tables of these sizes.

    `busy_poll`: microseconds (worker.pace). `fast`: with the kernel's fast path; then it is answered, before Done,
    by a FastPath.
    """

    id: int
    cores: tuple[int, ...]
    flow_limit: int
    busy_poll: int
    fast: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """Control to supervisor: every rule that can be up is up; also when a reload is over, whatever came of it."""

    status: str


@dataclass(frozen=True, slots=True)
class Status:
    """Control to supervisor: the line for the service manager changed."""

    text: str


@dataclass(frozen=True, slots=True)
class LogLevel:
    """Control to supervisor, and supervisor to worker: `role` (logs.ROLES) logs from `level` (logs.LEVELS) on."""

    role: str
    level: str


@dataclass(frozen=True, slots=True)
class ProbeNeighbour:
    """Control to supervisor: have the kernel find out whether a neighbour that the fast path sends to is there.

    What sends through the IP stack does so by itself; the fast path does not. Not answered: netlink tells.
    """

    ifindex: int
    address: str


@dataclass(frozen=True, slots=True)
class TapFilter:
    """Which frames of an interface a tap gets, of each the first `snap` bytes.

    Those to `networks`: prefixes of groups, or single hosts, of which only UDP; by chance one in `one_in` of them.
    `membership`: all IGMP and MLD too. `family` 4 or 6: incoming frames of it that the fast path left; 0: frames
    of both, before anything else sees them.
    """

    networks: tuple[str, ...]
    membership: bool = False
    incoming: bool = True
    outgoing: bool = False
    snap: int = 65535
    one_in: int = 1
    family: int = 0


@dataclass(frozen=True, slots=True)
class OpenTap:
    """Control to supervisor: copies of frames of `ifindex`. Answered by Tapped or Failed."""

    id: int
    ifindex: int
    what: TapFilter


@dataclass(frozen=True, slots=True)
class Tapped:
    """Supervisor to control: OpenTap `id` is carried out; its descriptor comes along (see kernel.tap)."""

    id: int


@dataclass(frozen=True, slots=True)
class CloseTap:
    """Control to supervisor: no more frames for the tap of OpenTap `id`. Not answered; all close with control."""

    id: int


@dataclass(frozen=True, slots=True)
class Quit:
    """Control to supervisor: a client stops the relay. `keep`: what the fast path carries goes on."""

    keep: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the resource at place `at` of a request could not be had: nothing was changed for it."""

    at: int
    errno: int
    problem: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """Supervisor to control: Grant or Release `id` is carried out, but for these."""

    id: int
    refused: tuple[Refusal, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """Supervisor to control: request `id` is carried out."""

    id: int


@dataclass(frozen=True, slots=True)
class Listening:
    """Supervisor to control: Listen `id` is carried out; the descriptor comes along. Whose its file is."""

    id: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class ListeningTcp:
    """Supervisor to control: ListenTcp `id` is carried out; the descriptor comes along."""

    id: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Supervisor to control: request `id` failed; nothing was changed."""

    id: int
    errno: int
    problem: str
    remedy: str


# ---- what the supervisor tells control ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setup:
    """First message to a new control. Descriptors: the state directory, then the config file if `config`.

    `engine`, `workers` override the file. `have` counts what the Held messages that follow tell of.
    """

    config: str | None
    state_dir: str
    engine: str | None
    workers: str | None
    have: int
    restarted: bool


@dataclass(frozen=True, slots=True)
class Held:
    """Supervisor to a new control: these are open already, from before it started."""

    what: tuple[Resource, ...]


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A worker runs. Descriptors: control's end of their channel, the counters' memory, and its /proc/PID/statm
    where there is one."""

    worker: int
    core: int
    pid: int
    restarts: int
    flow_limit: int


@dataclass(frozen=True, slots=True)
class FastPath:
    """Supervisor to control, and to a worker after its WorkerSetup: the fast path's maps.

    Descriptors: those of ebpf.layout.MAPS, in that order, and the program for what XDP broadcasts; none when there
    is no fast path, and `problem` says why.
    `pinned`: it outlives the relay. `workers`, `slots`, `routes`, `outputs`, `cpus` are ebpf.layout.Sizes.
    """

    problem: str
    pinned: bool
    workers: int
    slots: int
    routes: int
    outputs: int
    cpus: int


@dataclass(frozen=True, slots=True)
class XdpTargets:
    """Supervisor to control: the interfaces that take frames from XDP now."""

    ifindexes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WorkerDown:
    """A worker ended; another is started in `delay` seconds. `trouble`: why it keeps ending, or is not started."""

    worker: int
    restarts: int
    reason: str
    trouble: str
    delay: float


@dataclass(frozen=True, slots=True)
class Reload:
    """SIGHUP came. Descriptor: the config file, opened anew (none when the relay has no file)."""

    problem: str


# ---- what the supervisor tells a worker --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """First message to a new worker. Descriptors: its channel to control, the counters' memory."""

    worker: int
    core: int
    flow_limit: int
    busy_poll: int


@dataclass(frozen=True, slots=True)
class Granted:
    """To a worker: its copies of `what` come along, in this order: of each an egress socket, or two rings, short
    then long.

    `used`: a worker that is gone had them before.
    """

    what: tuple[Resource, ...]
    used: bool


@dataclass(frozen=True, slots=True)
class Revoked:
    """To a worker: close its copies of `what`."""

    what: tuple[Resource, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """To control or a worker: end in good order."""


# ---- between control and a worker --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RuleOutput:
    """An output as an engine needs it.

    `link` is the counter slot of this (rule, output); `output` is the egress socket (OpenEgress.output).
    `address` and `port` are None for `*`. `ttl` 0 means decrement, `dscp` -1 means keep, `keep` means
    source=keep.
    """

    link: int
    output: int
    oif: int
    address: str | None
    port: int | None
    ttl: int
    dscp: int
    keep: bool


@dataclass(frozen=True, slots=True)
class PutRule:
    """A rule as an engine needs it, of counter slot `rule`.

    Addresses are integers in closed ranges; `vlan` 0 means untagged; `family` is 4 or 6. `pps` datagrams and
    `bps` bits of payload are what it passes in a second, 0 meaning all. A flow from an address in `own` is our
    own stream come back.
    """

    rule: int
    ifindex: int
    vlan: int
    family: int
    group_low: int
    group_high: int
    port_low: int
    port_high: int
    source_low: int
    source_high: int
    pps: int
    bps: int
    own: tuple[int, ...]
    outputs: tuple[RuleOutput, ...]


@dataclass(frozen=True, slots=True)
class PutRules:
    """Control to worker: add or replace these rules, from the next Commit on; so many as rule_messages says."""

    what: tuple[PutRule, ...]


@dataclass(frozen=True, slots=True)
class PutMore:
    """Control to worker: more of a rule that was put since the last Commit and is too long for one message."""

    rule: int
    own: tuple[int, ...]
    outputs: tuple[RuleOutput, ...]


@dataclass(frozen=True, slots=True)
class DropRules:
    """Control to worker: remove the rules of these slots, from the next Commit on."""

    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """Control to worker: the PutRules, PutMore and DropRules since the last Commit take effect together now.

    `whole`: they are all the rules there are; any other is dropped.
    """

    generation: int
    whole: bool


@dataclass(frozen=True, slots=True)
class Committed:
    """Worker to control: generation in force; `egress` is "io_uring" or "sendmmsg"; `digest` as in Synced."""

    generation: int
    egress: str
    digest: int


@dataclass(frozen=True, slots=True)
class Sync:
    """Control to worker: bring the shared counters up to date."""

    id: int


@dataclass(frozen=True, slots=True)
class Synced:
    """Worker to control: they are, as of now.

    `digest`: of the rules in force (model.ruleset.RuleSet.digest), those of Commit `generation`, which is 0 when
    this control has sent none yet.
    """

    id: int
    generation: int
    digest: int


Message = (
    Status | LogLevel
    | Grant | Release | Listen | ListenTcp | StartWorkers | ProbeNeighbour | OpenTap | CloseTap | Quit | Ready
    | Outcome | Done | Listening | ListeningTcp | Tapped | Failed | Setup | Held
    | WorkerUp | FastPath | XdpTargets | WorkerDown | Reload | WorkerSetup | Granted | Revoked | Stop | PutRules
    | PutMore | DropRules | Commit | Committed | Sync | Synced
)  # fmt: skip


def parts(what: Sequence[T]) -> Iterator[tuple[T, ...]]:
    """So many resources or slots at a time as one message takes."""
    for start in range(0, len(what), AT_ONCE):
        yield tuple(what[start : start + AT_ONCE])


def rule_messages(rules: Iterable[PutRule]) -> Iterator[PutRules | PutMore]:
    """What puts them: several in a message, and one that is many times as long as another in several."""
    part: list[PutRule] = []
    weight = 0
    for rule in rules:
        first, *rest = _pieces(rule)
        if part and (len(part) == AT_ONCE or weight + _weight(first) > WEIGHT):
            yield PutRules(tuple(part))
            part, weight = [], 0
        part.append(first)
        weight += _weight(first)
        if rest:
            yield PutRules(tuple(part))
            yield from (PutMore(rule.rule, piece.own, piece.outputs) for piece in rest)
            part, weight = [], 0
    if part:
        yield PutRules(tuple(part))


def joined(rule: PutRule, more: PutMore) -> PutRule:
    """The rule with the more of it."""
    return replace(rule, own=rule.own + more.own, outputs=rule.outputs + more.outputs)


def _weight(rule: PutRule) -> int:
    return len(rule.outputs) + len(rule.own)


def _pieces(rule: PutRule) -> list[PutRule]:
    """The rule, or some with a part each of its addresses and outputs."""
    if _weight(rule) <= WEIGHT:
        return [rule]
    ends = range(_HALF, max(len(rule.own), len(rule.outputs)) + _HALF, _HALF)
    return [
        replace(rule, own=rule.own[end - _HALF : end], outputs=rule.outputs[end - _HALF : end]) for end in ends
    ]
