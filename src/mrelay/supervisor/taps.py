"""The taps that control reads, each with the filter that its request describes.

Owns a copy of each, so that closing one ends it, whoever else has it. Taps are control's alone: they end with it
and are no resource of a rule. Called by supervisor.requests, and main; nothing blocks.
"""

import ipaddress
import socket
import threading
from typing import Final

from mrelay.kernel import cbpf
from mrelay.kernel.packet import PROTOCOLS
from mrelay.kernel.tap import MOST, Network, disarm, open_tap, tap_filter
from mrelay.messages import OpenTap, TapFilter, Tapped
from mrelay.supervisor.resources import Refused

MAX_TAPS: Final = 64
MAX_NETWORKS: Final = 64
_MULTICAST_BITS: Final = {4: 4, 6: 8}  # of a prefix: 224.0.0.0/4, ff00::/8
_MAX_ONE_IN: Final = 1 << 20
_MAX_INT: Final = (1 << 31) - 1


class Taps:
    """Those that are open, by the number of their request."""

    def __init__(self) -> None:
        self._open: dict[int, socket.socket] = {}

    def open(self, request: OpenTap) -> Tapped:
        """Open it; raises Refused, OSError."""
        if len(self._open) >= MAX_TAPS:
            raise Refused(f"{MAX_TAPS} taps are open", "end another why, discover, capture or health check first")
        _require(request.id not in self._open, f"tap {request.id} is open")
        _require(0 < request.ifindex <= _MAX_INT, f"interface {request.ifindex}")
        program = _filter(request.what)
        self._open[request.id] = open_tap(
            request.ifindex,
            program,
            outgoing=request.what.outgoing,
            protocol=PROTOCOLS[request.what.family],
            timed=bool(request.what.networks),  # memberships are listened to all the time, and need no time
        )
        return Tapped(request.id)

    def fd(self, number: int) -> int:
        """The descriptor of an open one."""
        return self._open[number].fileno()

    def close(self, *numbers: int) -> None:
        """Closing what is not open is fine.

        They end at once; the rest, for which the kernel takes some 20 ms each, nobody has to wait for.
        """
        socks = [self._open.pop(number) for number in numbers if number in self._open]
        for sock in socks:
            disarm(sock)
        if socks:
            threading.Thread(target=_close_each, args=(socks,), daemon=True).start()

    def close_all(self) -> None:
        """When control is gone."""
        self.close(*self._open)


def _close_each(socks: list[socket.socket]) -> None:
    for sock in socks:
        sock.close()


def _filter(what: TapFilter) -> list[cbpf.Insn]:
    _require(len(what.networks) <= MAX_NETWORKS, f"{len(what.networks)} networks: at most {MAX_NETWORKS}")
    _require(bool(what.networks) or what.membership, "a tap for nothing")
    _require(what.incoming or what.outgoing, "a tap for neither direction")
    _require(0 < what.snap <= MOST, f"{what.snap} bytes of a frame")
    _require(0 < what.one_in <= _MAX_ONE_IN, f"one frame in {what.one_in}")
    _require(what.family in PROTOCOLS, f"family {what.family}")
    return tap_filter(
        [_network(text) for text in what.networks],
        what.snap,
        membership=what.membership,
        incoming=what.incoming,
        outgoing=what.outgoing,
        one_in=what.one_in,
    )


def _network(text: str) -> Network:
    """Groups, or one host: nobody may listen to all that is said to everyone else."""
    _require("%" not in text, f"{text!r:.50} has a scope; the interface is named by its index")
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        raise Refused(f"{text!r:.50} is no network") from None
    groups = network.is_multicast and network.prefixlen >= _MULTICAST_BITS[network.version]
    _require(groups or network.prefixlen == network.max_prefixlen, f"{text!r:.50}: neither groups nor one host")
    return network


def _require(fine: bool, problem: str) -> None:
    if not fine:
        raise Refused(problem)
