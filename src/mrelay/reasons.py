"""Reasons: why a datagram was dropped, and why a frame took the slow path. Their names, and what each means.

The one home of both: control counts by these names and serves the words (/v1/reasons), the web page and `mrelay
stats` show them, and a test compares the README. Standard library only; nothing here blocks.
"""

from typing import Final

# In the order of the counters (counters.Counters.drops).
DROPS: Final = {
    "no_rule": "addressed to a group or address that a rule names, but no rule takes its port, VLAN or source",
    "not_udp": "another protocol, to a group or address that a rule names",
    "malformed": "a header that contradicts itself, or a wrong IPv4 header checksum",
    "truncated": "shorter than its own header says",
    "fragment": "a fragment that was not put together",
    "ttl_expired": "it came with TTL 1, and no output has a ttl: add ttl to the output",
    "too_big": "the kernel found it too long to send",
    "no_neighbour": "the kernel has no way to the destination",
    "tx_error": "any other refusal by the kernel; the log names it once for each flow",
    "ring_full": "the worker was too slow, the receive ring was full",
    "rate_limited": "over the rate of every rule that takes it",
    "loop": "it came from an address that the relay sends from: its own stream has come back",
    "no_output": "a rule takes it, but none of the rule's outputs is up",
    "miss_limited": "of an unknown flow, and such came faster than 20,000 a second on one worker",
}

# Those that a frame shows by itself, so that one can say it of a captured frame.
SHOWN_BY_FRAME: Final = frozenset(
    ("no_rule", "not_udp", "malformed", "truncated", "fragment", "ttl_expired", "loop", "no_output")
)

# Why the fast path passed a frame on, in the order of enum passed (bpf/mrelay.h).
PASSED: Final = {
    "no_flow": "no such stream was handed over: it is new, or can't be carried; or it is none of the relay's",
    "shape": "no plain UDP: another protocol, IPv4 options, extension headers, a fragment, an odd header",
    "ttl": "its TTL runs out, and an output has no ttl",
    "too_big": "longer than an output's MTU",
    "hop": "the next hop of an output is not known (yet), or its interface is down",
    "waiting": "frames before it are still on their way through the slow path",
    "listener": "a program on this host listens to its port",
}
