"""From the relay to the receivers: the stages that say what becomes of a rule's datagrams. Pure."""

from typing import Final

from mrelay.diagnose.facts import RUNNING, UP, Facts, Output
from mrelay.diagnose.finding import Finding, failed, fine, listed, several, span, unknown
from mrelay.diagnose.traffic import matching

_HEADERS: Final = {4: 28, 6: 48}  # bytes of IP and UDP, without options
# Drop reasons that mean too much of something, and what to do.
_LIMITS: Final = {
    "rate_limited": ("it is over its rate", "raise the rule's rate, or have the sender send less"),
    "ring_full": (
        "the worker was too slow, its receive ring was full",
        "give it more: workers or ring_slots under [relay], gro = true, fewer outputs; see mrelay workers",
    ),
    "miss_limited": (
        "new flows come faster than they may (20,000 a second on a worker)",
        "find out who sends from so many sources or to so many ports: mrelay flows",
    ),
}


def _seen(facts: Facts) -> int:
    """Datagrams for the rule that the tap saw."""
    return sum(stream.datagrams for _, stream in matching(facts.traffic, facts.rule.from_))


def workers(facts: Facts) -> Finding:
    """Are those who forward it there?"""
    restarted = [worker for worker in facts.workers if worker.restarts]
    down = [worker for worker in facts.workers if worker.state != RUNNING]
    if down:
        return failed(
            f"worker {down[0].number} is not running: {down[0].state}",
            "see the relay's log for why it ends; mrelay workers shows when it is tried again",
            *(f"worker {worker.number}: {worker.state}" for worker in facts.workers),
        )
    if restarted:
        return failed(
            f"worker {restarted[0].number} ended or hung while we looked, and was started again",
            "see the relay's log for why; if it happens again, report it with that log",
            f"{several(restarted[0].restarts, 'restart')} in {span(facts.seconds)}",
        )
    return fine(f"{several(len(facts.workers), 'worker')} running")


def loop(facts: Facts) -> Finding:
    """Is it our own stream that comes back?"""
    if facts.rule.allow_loop or not facts.drops.get("loop"):
        return fine("allowed" if facts.rule.allow_loop else "not our own stream come back")
    for name, _ in matching(facts.traffic, facts.rule.from_):
        if name.source in facts.own:
            return failed(
                f"it is the relay's own stream come back: {name.source_text} is an address that it sends from",
                "find the way back (a bridge, a switch, another relay), or set allow_loop = true if it is meant",
                f"{facts.drops['loop']:,} dropped as loop in {span(facts.seconds)}",
            )
    return fine("not our own stream come back")


def limits(facts: Facts) -> Finding:
    """Is there too much of it?"""
    for reason, (text, remedy) in _LIMITS.items():
        count = facts.drops.get(reason, 0)
        if count and _is_ours(facts, reason):
            rate = f" ({facts.rule.rate})" if reason == "rate_limited" else ""
            return failed(f"{text}{rate}", remedy, f"{count:,} dropped as {reason} in {span(facts.seconds)}")
    return fine("no limit is reached")


def _is_ours(facts: Facts, reason: str) -> bool:
    """Drops are counted for all rules together; a rule that loses nothing has none of them."""
    if reason == "rate_limited" and facts.rule.rate is None:
        return False
    return facts.traffic.lost > 0 or _seen(facts) > facts.counted


def outputs(facts: Facts) -> Finding:
    """Can each of them be sent to, and is it?"""
    for output in facts.outputs:
        finding = _output(facts, output)
        if finding is not None:
            return finding
    return fine(
        f"{several(len(facts.outputs), 'output')} up",
        *(f"{output.to}: {several(output.sent, 'datagram')}" for output in facts.outputs),
    )


def _output(facts: Facts, output: Output) -> Finding | None:
    where = f"output {output.to}"
    if output.state != UP:
        return failed(f"{where}: {output.state}", _remedy(output))
    if not output.link.carrier:
        remedy = "look at the cable, the switch's port, or the other end of the pair"
        return failed(f"{where}: {output.link.name} has no carrier", remedy)
    if output.errors:
        return _errors(facts, output)
    if (length := _length(facts, output)) > output.link.mtu > 0:
        name, mtu = output.link.name, output.link.mtu
        return failed(
            f"{where}: datagrams of {length:,} bytes don't fit {name}'s MTU of {mtu:,}, and leave in fragments",
            f"ip link set {name} mtu {length} (and all the way from there), or have the sender use smaller ones",
        )
    if facts.counted and not output.sent:
        return failed(
            f"{where}: nothing was sent of {several(facts.counted, 'datagram')}",
            f"mrelay log debug --role worker, then look at what it says of {output.to}",
        )
    return None


def _length(facts: Facts, output: Output) -> int:
    """Bytes of the longest packet that leaves there, by those that came."""
    found = matching(facts.traffic, facts.rule.from_)
    lengths = (stream.longest - _HEADERS[name.family] + _HEADERS[output.family] for name, stream in found)
    return max(lengths, default=0)


def _remedy(output: Output) -> str:
    """What to do about a state of control/want.py or control/routes.py."""
    state, name = output.state, output.link.name
    if state.startswith("waiting: no interface"):
        like = f"did you mean {listed(output.link.like)}? " if output.link.like else ""
        return f"{like}`ip -br link` lists what there is; the output starts by itself once it is there"
    if state.startswith("waiting") and "is down" in state:
        return f"ip link set {name} up"
    address = output.to.partition(":")[2].partition(",")[0].rpartition(":")[0].strip("[]")
    if state.startswith("no route"):
        return f"ip route add {address} dev {name} (or via a gateway on {name})"
    if state.startswith("no neighbour"):
        return f"is that host up, and on {name}'s network? ip neigh show dev {name}; ping -I {name} {address}"
    return "see what it says; mrelay doctor checks the host"


def _errors(facts: Facts, output: Output) -> Finding:
    where, count = f"output {output.to}", several(output.errors, "datagram")
    return failed(
        f"{where}: the kernel refuses to send",
        "see the worker's message in the relay's log: it names the error",
        f"{count} in {span(facts.seconds)}",
        *(f"{number:,} dropped as {reason}" for reason, number in facts.drops.items() if number),
    )


def flow(facts: Facts) -> Finding:
    """Who carries it?"""
    if not facts.flows:
        return unknown("no flow is installed")
    lines = [
        f"{one.source} -> {one.group} port {one.port}: {one.engine}{f' ({one.why})' if one.why else ''}"
        for one in facts.flows[:3]
    ]
    engines = listed(dict.fromkeys(one.engine for one in facts.flows))
    return fine(f"{several(len(facts.flows), 'flow')}, carried by {engines}", *lines)


def receivers(facts: Facts) -> Finding:
    """Who downstream has asked for it?"""
    groups = [output for output in facts.outputs if output.multicast]
    if not groups:
        return fine("unicast outputs: nobody has to ask")
    lines = [_members(output) for output in groups]
    if any(output.members for output in groups):
        return fine("receivers have asked for it", *lines)
    return unknown("nobody was heard asking for it (they need not, without a switch that snoops)", *lines)


def _members(output: Output) -> str:
    who = listed(f"{member.address} ({member.protocol}, {span(member.ago)} ago)" for member in output.members)
    return f"{output.to}: {who or 'nobody was heard'}"


def forwarding(facts: Facts) -> Finding:
    """Does it come out?"""
    sent = sum(output.sent for output in facts.outputs)
    if facts.counted:
        since = f", without a pause for {span(facts.since)}" if facts.since is not None else ""
        return fine(
            f"forwarding{since}: {several(facts.counted, 'datagram')} in, {sent:,} out in {span(facts.seconds)}",
            f"{facts.total:,} in all since the rule was added, by its own counters",
        )
    seen = _seen(facts)
    if seen and sum(facts.drops.values()):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in facts.drops.items() if count)
        return failed(
            f"{several(seen, 'datagram')} came, none was forwarded",
            "README.md says what each reason means; the relay's log names the flow",
            f"dropped: {reasons}",
        )
    if seen:
        return failed(
            f"{several(seen, 'datagram')} came, and the rule counted none of them",
            "restart the relay (systemctl restart mrelay), and report it with its log",
        )
    return failed(f"nothing was forwarded in {span(facts.seconds)}", "look longer: --seconds 30")
