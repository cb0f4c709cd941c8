"""Interfaces that one kernel program is at: attached, pinned, and taken over from the relay before.

Owns the links, and their pins in a folder of a BPF file system. Called by supervisor.fastpath. A call may wait for
the interface's driver.
"""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from mrelay.ebpf import pins
from mrelay.kernel import libbpf

log = logging.getLogger("mrelay.supervisor")

Place = libbpf.TcxLink | libbpf.XdpLink | libbpf.ClsactFilter


class Attached:
    """`program` and `folder` (None: nothing is pinned) are to be set before the first `attach`."""

    def __init__(self, kind: str, link: Callable[[int], Place], new: Callable[[int, int], Place]) -> None:
        """`kind` is what pins' names begin with; `link` is one from a descriptor, `new` attaches."""
        self.program = -1
        self.folder: Path | None = None
        self._kind, self._link, self._new = kind, link, new
        self._links: dict[int, Place] = {}
        self._uses: dict[int, int] = {}

    def attach(self, ifindex: int) -> None:
        """Be at this interface from now on; as often as `detach` is called. OSError."""
        if not self._uses.get(ifindex):
            self._links[ifindex] = self._taken_over(ifindex) or self._new_link(ifindex)
        self._uses[ifindex] = self._uses.get(ifindex, 0) + 1

    def detach(self, ifindex: int) -> None:
        """Undo one `attach`."""
        self._uses[ifindex] -= 1
        if self._uses[ifindex]:
            return
        if path := self._path(ifindex):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the interface may be gone
            self._links.pop(ifindex).close()

    def _path(self, ifindex: int) -> Path | None:
        return self.folder and self.folder / f"{self._kind}{ifindex}"

    def _new_link(self, ifindex: int) -> Place:
        link, path = self._new(self.program, ifindex), self._path(ifindex)
        if path is not None and not isinstance(link, libbpf.ClsactFilter):
            pin(link.fd, path)
        return link

    def _taken_over(self, ifindex: int) -> Place | None:
        """The link that a relay before us left there, with our program from now on; None if there is none."""
        path = self._path(ifindex)
        if not path or not path.exists():
            return None
        try:
            link = self._link(libbpf.get_pinned(str(path)))
        except OSError as error:
            log.warning("cannot take over what is pinned at %s: %s", path, error.strerror)
            path.unlink()
            return None
        try:
            link.replace(self.program)
        except OSError:  # of an interface that is gone, whose number another one has now
            link.close()
            path.unlink()
            return None
        return link

    def leave_unclaimed(self) -> None:
        """What a relay before us left and nobody asked for since goes."""
        for ifindex, path in pins.links(self.folder, self._kind).items() if self.folder else ():
            if ifindex not in self._links:
                path.unlink()

    def close(self) -> None:
        """Let go of all links; those that are pinned go on."""
        for link in self._links.values():
            link.close()
        self._links, self.program = {}, -1


def pin(fd: int, path: Path) -> None:
    """As libbpf.pin; what can't be pinned goes on without."""
    try:
        libbpf.pin(fd, str(path))
    except OSError as error:
        log.info("cannot pin %s (%s): forwarding ends with the relay", path.name, error.strerror)
