"""Readiness and state for the service manager: the sd_notify(3) protocol.

Owns NOTIFY_SOCKET. The supervisor calls it; without a service manager every call does nothing. A call
sends one datagram and does not block: False says that it was not sent.
"""

import os
import socket
import time
from array import array
from collections.abc import Mapping, MutableMapping
from typing import Final

_LISTEN_FDS_START: Final = 3  # SD_LISTEN_FDS_START, systemd/sd-daemon.h


def notify(*assignments: str) -> bool:
    """Send these `NAME=value` lines as one message; True when the service manager's socket took it."""
    return _send("\n".join(assignments), [])


def _send(text: str, fds: list[int]) -> bool:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    path = "\0" + address[1:] if address[0] == "@" else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        try:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
            sock.sendmsg([text.encode(errors="replace")], rights, 0, path)
        except OSError:
            return False
    return True


def ready(text: str = "") -> bool:
    """Start-up, or a reload, is complete."""
    return notify("READY=1", *_status(text))


def reloading(text: str = "") -> bool:
    """The configuration is being read again; `ready` ends it."""
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    return notify("RELOADING=1", f"MONOTONIC_USEC={now}", *_status(text))


def stopping(text: str = "") -> bool:
    """The service is on its way down."""
    return notify("STOPPING=1", *_status(text))


def status(text: str) -> bool:
    """One line for `systemctl status`."""
    return notify(*_status(text))


def watchdog() -> bool:
    """The service is alive: due at least every `watchdog_interval` seconds."""
    return notify("WATCHDOG=1")


def store(name: str, fd: int) -> bool:
    """Have the service manager keep a copy of `fd` over a restart (FDSTORE=1); `name` has no colon in it."""
    # FDPOLL=0: an error on a socket is no reason to let it go.
    return _send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [fd])


def unstore(name: str) -> bool:
    """Have it close what it keeps under this name."""
    return notify("FDSTOREREMOVE=1", f"FDNAME={name}")


def stored(environ: MutableMapping[str, str] = os.environ) -> list[tuple[str, int]]:
    """What was kept for us: names and descriptors, which are ours from now on. Empty when asked again."""
    pid, count, names = (environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not (count.isascii() and count.isdigit()):
        return []
    fds = range(_LISTEN_FDS_START, _LISTEN_FDS_START + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)
    return list(zip(names.split(":"), fds, strict=True)) if count != "0" else []


def watchdog_interval(environ: Mapping[str, str] = os.environ) -> float | None:
    """Seconds in which this process must call `watchdog`, None when nobody waits for it."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    interval = environ.get("WATCHDOG_USEC", "")
    return int(interval) / 1e6 if interval.isascii() and interval.isdigit() and int(interval) else None


def _status(text: str) -> list[str]:
    return [f"STATUS={' '.join(text.split())}"] if text else []
