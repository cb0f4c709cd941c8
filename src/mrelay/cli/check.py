"""`mrelay check`: validates a config file and says what it would do on this host.

Called by the command line. Reads the file, /proc and /sys; joins, sends and changes nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from cyclopts import Parameter

from mrelay.cli import files, host, output
from mrelay.cli.failure import FAILED, Failure
from mrelay.cli.options import AsJson
from mrelay.control.want import MAX_HOLDS, MAX_JOINS
from mrelay.ebpf import load
from mrelay.kernel import libbpf
from mrelay.model.config import Config, ConfigError, load_config
from mrelay.model.endpoint import Input, text_of
from mrelay.model.issue import Issue
from mrelay.model.rule import Rule


@dataclass(frozen=True)
class Join:
    """What a rule makes the host receive; `how` is join, hold (a unicast address) or none."""

    rule: str
    interface: str
    group: str
    source: str | None
    vlan: int | None
    how: str


@dataclass(frozen=True)
class Warn:
    """What would keep a valid rule from working here, and what to do about it."""

    rule: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        place = f"rule '{self.rule}': " if self.rule else ""
        return f"warning: {place}{self.problem} — {self.remedy}"


def check(
    file: Annotated[Path, Parameter(help="Config file; - is standard input.")],
    /,
    *,
    as_json: AsJson = False,
) -> int:
    """Validate, then print joins, outputs and warnings; 0 when the file is valid."""
    try:
        config = load_config(files.read(file), str(file))
    except ConfigError as error:
        return _refuse(file, error.issues, as_json)
    except Failure as failure:
        raise Failure(*failure.lines, status=FAILED) from failure
    joins = [_join(rule) for rule in config.rules]
    warnings = [*_engine(config), *_health(config), *_warnings(config.rules)]
    if as_json:
        output.print_json(_report(file, config, joins, warnings))
    else:
        _print(file, config, joins, warnings)
    return 0


def _refuse(file: Path, issues: Sequence[Issue], as_json: bool) -> int:
    if not as_json:
        raise Failure(*map(str, issues), f"{file}: {output.plural(len(issues), 'error')}")
    errors = [asdict(issue) for issue in issues]
    output.print_json({"file": str(file), "ok": False, "errors": errors})
    return FAILED


def _report(file: Path, config: Config, joins: list[Join], warnings: list[Warn]) -> dict[str, Any]:
    return {
        "file": str(file),
        "ok": True,
        "errors": [],
        "rules": [rule.to_table() for rule in config.rules],
        "joins": [asdict(join) for join in joins],
        "outputs": [{"rule": rule.name, "to": str(to)} for rule in config.rules for to in rule.to],
        "warnings": [asdict(warning) for warning in warnings],
    }


def _print(file: Path, config: Config, joins: list[Join], warnings: list[Warn]) -> None:
    rows = []
    for rule, join in zip(config.rules, joins, strict=True):
        first, *others = map(str, rule.to)
        rows.append([rule.name, str(rule.from_), join.how, first])
        rows += [["", "", "", other] for other in others]
    if rows:
        output.print_view(output.table(("RULE", "FROM", "MEMBERSHIP", "TO"), rows))
    for warning in warnings:
        print(warning)
    print(f"{file}: valid, {output.plural(len(config.rules), 'rule')}, {_count(warnings)}")


def _count(warnings: list[Warn]) -> str:
    return output.plural(len(warnings), "warning") if warnings else "no warnings"


def _join(rule: Rule) -> Join:
    origin = rule.from_
    return Join(
        rule.name,
        origin.interface,
        text_of(origin.address),
        text_of(origin.source) if origin.source else None,
        origin.vlan,
        _how(origin),
    )


def _how(origin: Input) -> str:
    """What `mrelay.control.want` asks the supervisor for, in words."""
    if not origin.address.is_multicast:
        ports = origin.ports.high - origin.ports.low + 1
        return f"hold {output.plural(ports, 'port')}" if ports <= MAX_HOLDS else "none"
    groups = origin.address.num_addresses
    if groups > MAX_JOINS:
        return "none"
    joined = f"join {output.plural(groups, 'group')}" if groups > 1 else "join"
    one_source = origin.source is not None and origin.source.num_addresses == 1
    return f"{joined} from {text_of(origin.source)}" if one_source and origin.source else joined


def _health(config: Config) -> Iterator[Warn]:
    """XDP takes frames before anything can listen."""
    at = config.relay.xdp
    for rule in config.rules:
        name = rule.from_.interface
        if rule.health and (at is True or (isinstance(at, tuple) and name in at)):
            yield Warn(
                rule.name, f"health is not measured at {name} while xdp is there", f"leave {name} out of xdp"
            )


def _engine(config: Config) -> Iterator[Warn]:
    problem = libbpf.available() or load.missing() or load.outdated()
    if config.relay.engine == "ebpf" and problem:
        remedy = 'set engine = "auto" under [relay] to do without'
        yield Warn("", f'engine = "ebpf", and a relay here would not start: {problem}', remedy)


def _warnings(rules: Sequence[Rule]) -> Iterator[Warn]:
    for rule in rules:
        for look in _LOOKS:
            yield from look(rule)
    if not rules:
        yield Warn("", "no rules, so nothing is relayed", "add a [[rule]]")


def _interfaces(rule: Rule) -> Iterator[Warn]:
    for name in dict.fromkeys([rule.from_.interface, *(to.interface for to in rule.to)]):
        flags = host.interface_flags(name)
        if flags is None:
            have = ", ".join(host.interfaces())
            yield Warn(rule.name, f"no interface {name} on this host", f"it waits for one; there are: {have}")
        elif not flags & host.IFF_UP:
            yield Warn(rule.name, f"{name} is down", f"it waits until: ip link set {name} up")


def _multicast(rule: Rule) -> Iterator[Warn]:
    origin = rule.from_
    flags = host.interface_flags(origin.interface)
    if not origin.address.is_multicast or flags is None or flags & (host.IFF_MULTICAST | host.IFF_LOOPBACK):
        return
    problem = f"{origin.interface} does not do multicast, so it sends no membership reports"
    yield Warn(rule.name, problem, f"if it can: ip link set {origin.interface} multicast on")


def _vlan(rule: Rule) -> Iterator[Warn]:
    origin = rule.from_
    if origin.vlan is None or not origin.address.is_multicast:
        return
    parent, vlan = origin.interface, origin.vlan
    problem = f"{parent} sends its membership reports untagged, so a snooping switch may not send VLAN {vlan}"
    remedy = (
        f"ip link add link {parent} name {parent}.{vlan} type vlan id {vlan}, and receive from "
        f"{parent}.{vlan} without vlan={vlan}; or make the group static in the switch"
    )
    yield Warn(rule.name, problem, remedy)


def _prefix(rule: Rule) -> Iterator[Warn]:
    origin = rule.from_
    if origin.address.is_multicast and origin.address.num_addresses > MAX_JOINS:
        problem = f"{text_of(origin.address)} has more than {MAX_JOINS} groups, so none is joined"
        yield Warn(rule.name, problem, "narrow the prefix, or have the switch send the groups here (static)")
    elif not origin.address.is_multicast and origin.ports.high - origin.ports.low >= MAX_HOLDS:
        problem = f"more than {MAX_HOLDS} ports: the host answers the sender with port-unreachable"
        yield Warn(rule.name, problem, f"narrow the range to {MAX_HOLDS} ports, or drop those ICMP answers")


def _own_address(rule: Rule) -> Iterator[Warn]:
    address = rule.from_.address
    if not address.is_multicast and not host.has_address(address.network_address):
        problem = f"{address.network_address} is not an address of this host"
        remedy = f"ip address add {address} dev {rule.from_.interface}, or write one of its addresses"
        yield Warn(rule.name, problem, remedy)


def _limits(rule: Rule) -> Iterator[Warn]:
    """Low limits are no matter, the relay opens more sockets; at 0 no socket takes even one."""
    origin = rule.from_
    name = "net.ipv4.igmp_max_msf" if origin.source else "net.ipv4.igmp_max_memberships"
    if origin.address.version == 4 and origin.address.is_multicast and host.sysctl(name) == 0:
        yield Warn(rule.name, f"{name} is 0, so {origin} can't be joined", f"sysctl -w {name}=20")


_LOOKS: Final[tuple[Callable[[Rule], Iterator[Warn]], ...]] = (
    _interfaces,
    _multicast,
    _vlan,
    _prefix,
    _own_address,
    _limits,
)
