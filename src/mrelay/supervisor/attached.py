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
    """`program` and `folder` (None: nothing is pinned) are to be set before the first `attach`.

    `adopted`: the program's maps are those of the relay before. Else that one's program, which forwards by other
    maps, stays where it is until `leave_unclaimed`, and passes everything else on as ours does.
    """

    def __init__(self, kind: str, link: Callable[[int], Place], new: Callable[[int, int], Place]) -> None:
        """`kind` is what pins' names begin with; `link` is one from a descriptor, `new` attaches."""
        self.program = -1
        self.folder: Path | None = None
        self.adopted = True
        self._kind, self._link, self._new = kind, link, new
        self._links: dict[int, Place] = {}
        self._uses: dict[int, int] = {}
        self._old: set[int] = set()  # where an earlier relay's program is still at work

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
        if (link := self._links.pop(ifindex, None)) is not None:
            with contextlib.suppress(OSError):  # the interface may be gone
                link.close()

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
        if not self.adopted:
            self._old.add(ifindex)
            return link
        try:
            link.replace(self.program)
        except OSError:  # of an interface that is gone, whose number another one has now
            link.close()
            path.unlink()
            return None
        return link

    def leave_unclaimed(self) -> None:
        """The rules are up: ours replaces what a relay before us left; what nobody asked for since goes."""
        for ifindex in self._old & self._links.keys():
            self._replace(ifindex)
        self._old.clear()
        for ifindex, path in pins.links(self.folder, self._kind).items() if self.folder else ():
            if ifindex not in self._links:
                path.unlink(missing_ok=True)

    def _replace(self, ifindex: int) -> None:
        try:
            self._links[ifindex].replace(self.program)
        except OSError:
            self._links.pop(ifindex).close()
            if path := self._path(ifindex):
                path.unlink(missing_ok=True)
            try:
                self._links[ifindex] = self._new_link(ifindex)
            except OSError as error:
                log.warning("no fast path at interface %d: %s", ifindex, error.strerror)

    def close(self) -> None:
        """Let go of all links; those that are pinned go on. It is as new then."""
        for link in self._links.values():
            link.close()
        self._links, self._uses, self._old, self.program = {}, {}, set(), -1


def pin(fd: int, path: Path) -> None:
    """As libbpf.pin; what can't be pinned goes on without."""
    try:
        libbpf.pin(fd, str(path))
    except OSError as error:
        log.info("cannot pin %s (%s): forwarding ends with the relay", path.name, error.strerror)
