"""From the wire to the relay: the stages that say whether a rule's datagrams come in as they should. Pure."""

import re
from collections.abc import Callable
from typing import Final

from mrelay.diagnose.facts import Bridge, Facts, Join, Link
from mrelay.diagnose.finding import Finding, failed, fine, listed, several, span, unknown
from mrelay.diagnose.traffic import (
    GROUP,
    PORT,
    PROTOCOL,
    PROTOCOLS,
    SOURCE,
    VLAN,
    Name,
    Stream,
    matching,
    near,
    portless,
)
from mrelay.model.endpoint import Input, text_of

QUERY_INTERVAL: Final = 125  # seconds, RFC 3376 §8.2, RFC 3810 §9.2
_NEAR: Final = 3  # near misses that are told
_XDP: Final = "XDP carries it, which no tap sees"


def rule(facts: Facts) -> Finding:
    """Is it a rule that runs?"""
    wanted = facts.rule.from_
    outputs = several(len(facts.rule.to), "output")
    return fine(f"takes {wanted}, {outputs}")


def interface(facts: Facts) -> Finding:
    """Is its interface there and up?"""
    link, wanted = facts.link, facts.rule.from_
    if not link.ifindex:
        like = f"did you mean {listed(link.like)}? " if link.like else ""
        return failed(
            f"there is no interface {link.name}",
            f"{like}`ip -br link` lists what there is; the rule starts by itself once it is there",
        )
    if not link.up:
        return failed(f"{link.name} is down", f"ip link set {link.name} up")
    if not link.carrier:
        return failed(
            f"{link.name} is up, but has no carrier",
            "look at the cable, the switch's port, or the other end of the pair",
        )
    if wanted.address.is_multicast and not link.multicast:
        return failed(f"{link.name} does no multicast", f"ip link set {link.name} multicast on")
    if facts.deaf:
        problem, remedy = _cure(facts.deaf)
        return failed(f"{link.name} can't be listened to: {problem}", remedy)
    return fine(f"{link.name} is up, MTU {link.mtu}", *_bridge(link.bridge))


def _bridge(bridge: Bridge | None) -> tuple[str, ...]:
    if bridge is None:
        return ()
    snooping = "snoops" if bridge.snooping else "does not snoop"
    return (f"bridge {bridge.name} {snooping}, it is {'a' if bridge.querier else 'no'} querier",)


def membership(facts: Facts) -> Finding:
    """Has it joined, in our record and in the kernel's?"""
    wanted = facts.rule.from_
    if not wanted.address.is_multicast:
        return fine(f"{text_of(wanted.address)} is a unicast address: nothing to join")
    if not facts.joins:
        return unknown(facts.warning or "nothing is joined")
    broken = [join for join in facts.joins if join.problem]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        problem, remedy = _cure(broken[0].problem)
        return failed(f"{_said(broken[0])} can't be joined{more}: {problem}", remedy)
    absent = [join for join in facts.joins if join.member is False]
    if absent:
        return failed(
            f"the kernel has no membership of {listed(map(_said, absent))} on {facts.link.name}",
            "restart the relay (systemctl restart mrelay), and report it with its log",
            "mrelay joined it, /proc/net does not list it",
        )
    where = "/proc/net has it too" if all(join.member for join in facts.joins) else "/proc/net does not say more"
    return fine(f"joined {listed(map(_said, facts.joins))}", where)


def _cure(problem: str) -> tuple[str, str]:
    """What the supervisor said, and the command that helps."""
    sysctl = re.search(r"sysctl ([\w.]+)", problem)
    if sysctl:
        return problem, f"sysctl -w {sysctl[1]}=1024 (and in /etc/sysctl.d); it is tried again within 5 s"
    text, _, remedy = problem.partition(" — ")
    return text, remedy or "see mrelay doctor"


def _said(join: Join) -> str:
    return f"{join.source}@{join.group}" if join.source else join.group


def querier(facts: Facts) -> Finding:
    """Does anyone ask for memberships, so that a switch that snoops goes on sending?"""
    if not facts.rule.from_.address.is_multicast:
        return fine("not needed for a unicast address")
    if facts.querier is not None:
        seen = facts.querier
        return fine(f"{seen.address} asks for memberships ({seen.protocol}), {span(seen.ago)} ago")
    bridge, arrives = facts.link.bridge, bool(facts.counted or matching(facts.traffic, facts.rule.from_))
    nobody = f"no querier was heard on {facts.link.name} in {span(facts.listened)}"
    if bridge is not None and bridge.querier:
        return fine(f"bridge {bridge.name} of this host is the querier")
    if facts.revived:
        return failed(
            f"the switch before {facts.link.name} stopped sending the group: nobody asks for memberships there",
            _switch_on(bridge),
            "nothing came until the group was joined anew just now, then it did",
            nobody,
        )
    if bridge is not None and bridge.snooping and not arrives and not _anything_near(facts):
        return failed(
            f"bridge {bridge.name} snoops, and no querier is heard there: memberships are forgotten after minutes",
            _switch_on(bridge),
            nobody,
        )
    return unknown(nobody, f"one asks every {QUERY_INTERVAL} s; without any, a switch that snoops stops sending")


def _anything_near(facts: Facts) -> bool:
    wanted = facts.rule.from_
    return bool(near(facts.traffic, wanted, facts.others) or portless(facts.traffic, wanted) or facts.elsewhere)


def _switch_on(bridge: Bridge | None) -> str:
    if bridge is not None:
        return f"ip link set {bridge.name} type bridge mcast_querier 1"
    return (
        "switch an IGMP/MLD querier on, at the switch or a router of that segment"
        " (on a Linux bridge: ip link set br0 type bridge mcast_querier 1)"
    )


def frames(facts: Facts) -> Finding:
    """Does anything come that the rule takes?"""
    wanted = facts.rule.from_
    found = matching(facts.traffic, wanted)
    if found:
        return fine(*_arrived(facts, found))
    if facts.counted:
        why = (
            _XDP
            if any(flow.engine == "xdp" for flow in facts.flows)
            else facts.blind or "the tap saw none of them"
        )
        return fine(f"{several(facts.counted, 'datagram')} in {span(facts.seconds)}, by the rule's counter", why)
    if facts.blind:
        return unknown(f"could not look at {facts.link.name}: {facts.blind}")
    broken = portless(facts.traffic, wanted)
    if broken:
        return _no_port(broken)
    misses = near(facts.traffic, wanted, facts.others)
    if misses:
        return _near_miss(facts, misses)
    if facts.elsewhere:
        return _elsewhere(facts)
    return _nothing(facts)


def _arrived(facts: Facts, found: list[tuple[Name, Stream]]) -> tuple[str, ...]:
    total = sum(stream.datagrams for _, stream in found)
    lost = f", and more than the tap could hold ({facts.traffic.lost:,} frames)" if facts.traffic.lost else ""
    sources = listed(dict.fromkeys(name.source_text for name, _ in found))
    lines = [
        f"{name}: {several(stream.datagrams, 'datagram')}, TTL {_ttl(stream)}" for name, stream in found[:_NEAR]
    ]
    return (f"{several(total, 'datagram')} in {span(facts.seconds)} from {sources}{lost}", *lines)


def _ttl(stream: Stream) -> str:
    return str(stream.ttl_low) if stream.ttl_low == stream.ttl_high else f"{stream.ttl_low} to {stream.ttl_high}"


def _no_port(broken: list[tuple[Name, Stream]]) -> Finding:
    name, stream = broken[0]
    if not stream.fragments:
        return failed(
            f"what comes from {name.source_text} to {name.group_text} has damaged UDP headers",
            "capture it at the sender and look for what cuts it short",
            f"{several(stream.datagrams, 'packet')}",
        )
    if name.family == 6:
        text = f"{name.source_text} sends fragments to {name.group_text}, and IPv6 fragments are not put together"
    else:
        text = f"only fragments come from {name.source_text} to {name.group_text}, and they never make a datagram"
    return failed(
        text,
        "have the sender use datagrams that fit the path's MTU (1,472 bytes of payload for 1,500), "
        "or find where the other fragments are lost",
        several(stream.fragments, "fragment"),
    )


def _near_miss(facts: Facts, misses: list[tuple[Name, Stream, tuple[str, ...]]]) -> Finding:
    wanted = facts.rule.from_
    name, _, what = misses[0]
    text = "; ".join(_SAID[one](name, wanted, facts.link) for one in what)
    lines = [f"{other}: {several(stream.datagrams, 'datagram')}" for other, stream, _ in misses[:_NEAR]]
    return failed(f"what comes is not what the rule wants: {text}", _remedy(facts, name, what), *lines)


_SAID: Final[dict[str, Callable[[Name, Input, Link], str]]] = {
    PORT: lambda name, wanted, _: f"packets for {name.group_text} arrive on port {name.port}, not {wanted.ports}",
    SOURCE: lambda name, wanted, _: f"they come from {name.source_text}, the rule wants {_source(wanted)}",
    VLAN: lambda name, wanted, _: f"they are {_tag(name.vlan)}, the rule wants {_tag(wanted.vlan)}",
    PROTOCOL: lambda name, _, __: f"{_protocol(name)} comes from {name.source_text} to {name.group_text}, not UDP",
    GROUP: lambda name, wanted, _: f"packets for {name.group_text} arrive, not for {text_of(wanted.address)}",
}


def _source(wanted: Input) -> str:
    return text_of(wanted.source) if wanted.source is not None else "any"


def _tag(vlan: int | None) -> str:
    return "untagged" if vlan is None else f"tagged with VLAN {vlan}"


def _protocol(name: Name) -> str:
    return PROTOCOLS.get(name.protocol, f"IP protocol {name.protocol}")


def _remedy(facts: Facts, name: Name, what: tuple[str, ...]) -> str:
    """The input that would take it; a stream that isn't UDP no rule takes."""
    if PROTOCOL in what:
        return "have the sender send UDP: mrelay relays nothing else"
    wanted, group = facts.rule.from_, name.group_text
    source = f"{_bracketed(name.source_text)}@" if wanted.source is not None else ""
    vlan = "" if name.vlan is None else f",vlan={name.vlan}"
    port = wanted.ports if PORT not in what else name.port
    address = _bracketed(group) if GROUP in what else text_of(wanted.address)
    right = f"{facts.link.name}:{source}{address}:{port}{vlan}"
    to = " ".join(f"--to '{output}'" for output in facts.rule.to)
    change = f"mrelay rule remove {facts.rule.name} && mrelay rule add {facts.rule.name} --from {right} {to}"
    return f"have the sender match the rule, or the rule the sender: {change}"


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _elsewhere(facts: Facts) -> Finding:
    name, count = max(facts.elsewhere.items(), key=lambda one: one[1])
    wanted = facts.rule.from_
    right = str(wanted).replace(f"{wanted.interface}:", f"{name}:", 1)
    return failed(
        f"{text_of(wanted.address)} arrives on {name}, not on {facts.link.name}",
        f"make the rule's input {right}, or move the sender",
        f"{several(count, 'datagram')} on {name} in {span(facts.seconds)}",
    )


def _nothing(facts: Facts) -> Finding:
    wanted, link = facts.rule.from_, facts.link
    whom = f"{text_of(wanted.address)} port {wanted.ports}"
    evidence = [f"{len(facts.traffic.streams)} other multicast streams are heard on {link.name}"]
    if facts.last is not None:
        evidence.insert(
            0, f"the rule took {several(facts.total, 'datagram')} before, the last {span(facts.last)} ago"
        )
    others = [(name, stream) for name, stream, _ in near(facts.traffic, wanted)[:_NEAR]]
    evidence += [f"{name}: {several(stream.datagrams, 'datagram')}, another rule's" for name, stream in others]
    if facts.querier is None and wanted.address.is_multicast:
        evidence.append(f"no querier was heard in {span(facts.listened)}")
    slow = f"if it sends seldom, look longer (mrelay why {facts.rule.name} --seconds 30)"
    return failed(
        f"nothing for {whom} arrives on {link.name} in {span(facts.seconds)}",
        f"look at the sender: does it send, out of the right interface, with a TTL above 1; {slow}",
        *evidence,
    )


def headers(facts: Facts) -> Finding:
    """Are its headers whole, and do they let it go on?"""
    found = matching(facts.traffic, facts.rule.from_)
    if not found:
        return unknown("no headers were seen")
    for name, stream in found:
        if stream.headers_bad * 2 > stream.datagrams:
            return failed(
                f"the IPv4 header checksum of what {name.source_text} sends is wrong",
                "find what damages it: the sender, or a device on the way that rewrites addresses or the TTL",
                f"{stream.headers_bad:,} of {several(stream.datagrams, 'datagram')}",
            )
        if stream.checked and stream.checksums_bad * 2 > stream.checked:
            return failed(
                f"the UDP checksum of what {name.source_text} sends is wrong: receivers throw such datagrams away",
                "find what damages it; a sender on a virtual machine: ethtool -K IFACE tx off there",
                f"{stream.checksums_bad:,} of {several(stream.checked, 'datagram')}",
            )
    return _ttl_lasts(facts, found)


def _ttl_lasts(facts: Facts, found: list[tuple[Name, Stream]]) -> Finding:
    lacking = [output for output in facts.outputs if output.ttl is None]
    ended = [(name, stream) for name, stream in found if stream.ttl_high <= 1]
    if not ended or not lacking:
        return fine(f"TTL {listed(dict.fromkeys(_ttl(stream) for _, stream in found))}, checksums hold")
    name, _ = ended[0]
    to = lacking[0].to
    return failed(
        f"{name.source_text} sends with TTL 1, so nothing may go on to {listed(output.to for output in lacking)}",
        f"add a TTL to the output: {to},ttl=8; or have the sender use a higher one",
        f"{name}: TTL {_ttl(found[0][1])}",
    )
