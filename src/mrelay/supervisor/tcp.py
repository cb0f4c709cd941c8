"""The TCP socket that control serves its API and its page on, when the config asks for one.

Owns that socket, and the rule that there is one for the relay's life. Called by supervisor.requests for ListenTcp;
the socket is handed to each control, which may neither open nor bind one itself. Nothing here blocks.
"""

import socket
from ipaddress import ip_address
from typing import Final

from mrelay.supervisor.resources import Refused

MIN_PORT: Final = 1024  # those below are for the host's own services; a proxy may have one
_BACKLOG: Final = 64


class TcpListener:
    """None at first: `sock` is None."""

    def __init__(self) -> None:
        self.sock: socket.socket | None = None
        self._asked: tuple[str, int] | None = None

    def open(self, address: str, port: int, *, starting: bool) -> None:
        """Have `sock` listen there. Refused; OSError when the address or the port can't be had now.

        What is asked for first, and while the relay is `starting` (no client has been heard yet), may be asked for
        again, and nothing else.
        """
        family = _checked(address, port)
        if self._asked is None and not starting:
            raise Refused("the relay was started without a TCP listener", "set listen under [relay], restart it")
        if self._asked not in (None, (address, port)):
            raise Refused("the relay's TCP address can't be changed", "restart the relay to change listen")
        self._asked = address, port
        if self.sock is None:
            self.sock = _listen_at(family, address, port)


def _checked(address: str, port: int) -> socket.AddressFamily:
    """The address's family; Refused when the two are not what a client can connect to."""
    try:
        parsed = ip_address(address)
    except ValueError:
        raise Refused(f"{address!r:.50} is no address") from None
    if str(parsed) != address or "%" in address or parsed.is_multicast:
        raise Refused(f"{address!r:.50} is no address to listen at")
    if not MIN_PORT <= port <= 65535:
        raise Refused(f"port {port} is not from {MIN_PORT} to 65535")
    return socket.AF_INET if parsed.version == 4 else socket.AF_INET6


def _listen_at(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # though old connections wait
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited: control may not set it
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
