"""A service manager for tests: a NOTIFY_SOCKET that keeps what it is told, and the descriptors it is given."""

import os
import selectors
import socket
import time
from pathlib import Path
from typing import Self

from mrelay.wire import _unpack_fds

DEADLINE = 20.0  # seconds, on a slow machine


class Manager:
    """As a context manager. `said`: every message's assignments, in order; `store`: descriptors by name."""

    def __init__(self, folder: Path, watchdog: float | None = None) -> None:
        self.path = folder / "notify"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(self.path))
        self.path.chmod(0o666)
        self._watchdog = watchdog
        self.said: list[dict[str, str]] = []
        self.store: list[tuple[str, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.forget()
        self._sock.close()

    def forget(self) -> None:
        """Close every descriptor in the store, as systemd does when a service is stopped for good."""
        for _, fd in self.store:
            os.close(fd)
        self.store.clear()

    @property
    def environment(self) -> dict[str, str]:
        """What a service is started with, but for what depends on its process id."""
        watchdog = {} if self._watchdog is None else {"WATCHDOG_USEC": str(int(self._watchdog * 1e6))}
        return {"NOTIFY_SOCKET": str(self.path), **watchdog}

    def wait(self, key: str, value: str | None = None) -> dict[str, str]:
        """The next message that assigns `key` (that `value`); AssertionError when none comes."""
        deadline = time.monotonic() + DEADLINE
        while (left := deadline - time.monotonic()) > 0:
            message = self.take(left)
            if key in message and value in (None, message[key]):
                return message
        raise AssertionError(f"never told {key}={value}; only {self.said}")

    def take(self, seconds: float) -> dict[str, str]:
        """The next message, empty when none comes in time."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._sock, selectors.EVENT_READ)
            if not selector.select(seconds):
                return {}
        data, ancillary, _, _ = self._sock.recvmsg(1 << 16, socket.CMSG_SPACE(4 * 64), socket.MSG_CMSG_CLOEXEC)
        message = dict(line.split("=", 1) for line in data.decode().splitlines())
        self.said.append(message)
        self._keep(message, _unpack_fds(ancillary))
        return message

    def take_all(self) -> None:
        """Read what waits."""
        while self.take(0):
            pass

    def _keep(self, message: dict[str, str], fds: list[int]) -> None:
        name = message.get("FDNAME", "")
        if message.get("FDSTORE") == "1":
            self.store += [(name, fd) for fd in fds]
        elif message.get("FDSTOREREMOVE") == "1":
            for entry in [entry for entry in self.store if entry[0] == name]:
                self.store.remove(entry)
                os.close(entry[1])
