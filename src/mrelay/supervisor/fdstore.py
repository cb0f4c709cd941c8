"""Helper sockets that outlive the supervisor: copies in the service manager's descriptor store.

Owns their names there and the check of what comes back. While a copy is there, the end of this process sends no
leave; the next one adopts the sockets, and the kernel tells it what each has joined (kernel.membership). Called by
resources. Without a service manager nothing is kept. Nothing here blocks.
"""

import fcntl
import logging
import os
import re
import socket
from typing import Final

from mrelay.kernel import notify

log = logging.getLogger("mrelay.supervisor")

SIOCGSKNS: Final = 0x894C  # linux/sockios.h
# The interface, and the inode that tells sockets apart.
_NAME: Final = re.compile(r"join-([1-9][0-9]{0,9})-([0-9]{1,20})")


def keep(ifindex: int, sock: socket.socket) -> None:
    """Have a copy kept of a helper socket with memberships on this interface."""
    notify.store(_name(ifindex, sock), sock.fileno())


def release(ifindex: int, sock: socket.socket) -> None:
    """Have the copy closed: it holds nothing any more."""
    notify.unstore(_name(ifindex, sock))


def take_back() -> list[tuple[int, socket.socket]]:
    """The helper sockets that were kept, each with its interface; what is none of ours is given up."""
    found: list[tuple[int, socket.socket]] = []
    for name, fd in notify.stored():
        try:
            found.append(_checked(name, fd))
        except (OSError, ValueError) as error:
            log.warning("descriptor %.80r from the service manager is not taken back: %s", name, error)
            notify.unstore(name)
            os.close(fd)
    return found


def _name(ifindex: int, sock: socket.socket) -> str:
    return f"join-{ifindex}-{os.fstat(sock.fileno()).st_ino}"


def _checked(name: str, fd: int) -> tuple[int, socket.socket]:
    """ValueError or OSError unless it is the UDP socket that it is called, of this network and on an interface."""
    match = _NAME.fullmatch(name)
    if match is None or os.fstat(fd).st_ino != int(match[2]):
        raise ValueError("it is not what its name says")
    # A copy, so that whoever gets the error still has `fd` to close.
    with socket.socket(fileno=os.dup(fd)) as probe:
        if probe.family not in (socket.AF_INET, socket.AF_INET6) or probe.type != socket.SOCK_DGRAM:
            raise ValueError("it is no UDP socket")
        if _network(probe) != _our_network():
            raise ValueError("it belongs to another network namespace")
    socket.if_indextoname(int(match[1]))
    return int(match[1]), socket.socket(fileno=fd)


def _our_network() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return _network(sock)


def _network(sock: socket.socket) -> int:
    """The inode of the socket's network namespace; needs CAP_NET_ADMIN."""
    fd = fcntl.ioctl(sock, SIOCGSKNS, 0)
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)
