"""The kernel's fast path: its programs and maps, where they are attached, and what of them outlives us.

Owns the descriptors of all of it, and the pins: where the BPF file system is mounted, maps and links are pinned,
so that forwarding goes on when every process of the relay is gone, and the next relay takes it over. Maps that
were made by programs of another version, or for other sizes, are replaced: the old program carries its flows until
the new rules are up, and passes everything else on as ours does. Called by resources and main; loading blocks for
some ten milliseconds.
"""

import contextlib
import hashlib
import logging
import os
import shutil
from pathlib import Path

from mrelay.ebpf import layout, load, pins
from mrelay.ebpf.layout import MAPS, Sizes
from mrelay.ebpf.pins import LINK
from mrelay.kernel import libbpf
from mrelay.kernel.packet import SLOT
from mrelay.messages import FastPath as Message

log = logging.getLogger("mrelay.supervisor")


class FastPath:
    """`maps`: descriptors by name; none before `start`, or where there is no fast path, and `problem` says why."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: of the pins; None to pin nothing."""
        self.maps: dict[str, int] = {}
        self.problem = "it was not asked for"
        self._folder = folder
        self._sizes = Sizes(0, 0, 0, 0, 0)
        self._program = -1
        self._filters: list[tuple[int, int]] = []
        self._links: dict[int, libbpf.TcxLink | libbpf.ClsactFilter] = {}
        self._uses: dict[int, int] = {}
        self._adopted = False  # the maps are those of the relay before us
        self._old: set[int] = set()  # interfaces where its program is still at work, with other maps

    def start(self, workers: int, flow_limit: int) -> None:
        """Load it, once; `problem` says what was in the way."""
        if self.maps:
            return
        self.problem = libbpf.available() or load.missing()
        if self.problem:
            return
        try:
            self._load(layout.sizes(workers, flow_limit, libbpf.possible_cpus()))
        except OSError as error:
            said, _, verifier = (error.strerror or str(error)).partition("\n")
            self.problem = f"the kernel refuses it: {said}"
            if verifier:
                log.info("the verifier's last words:\n%s", verifier)
            self._forget()

    def _load(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._prepare_folder()
        self.maps = self._pinned_maps()
        self._adopted = bool(self.maps)
        self.maps = self.maps or load.create_maps(sizes)
        self._program = load.load_relay(self.maps, sizes)
        self._filters = [load.load_rings(self.maps, worker) for worker in range(sizes.workers)]
        self._pin_maps()

    def message(self) -> Message:
        """What control and workers are told; `fds` goes along."""
        sizes = self._sizes
        return Message(self.problem, sizes.workers, sizes.slots, sizes.routes, sizes.outputs, sizes.cpus)

    def fds(self) -> list[int]:
        """The maps' descriptors, in order."""
        return [self.maps[name] for name in MAPS] if self.maps else []

    def filter(self, worker: int, size: int) -> int:
        """The program for a worker's ring with slots of `size` bytes."""
        short, long = self._filters[worker]
        return short if size == SLOT else long

    # ---- where it is attached ----------------------------------------------------------------

    def attach(self, ifindex: int) -> None:
        """Be at this interface's ingress from now on; as often as `detach` is called."""
        if not self._uses.get(ifindex):
            self._links[ifindex] = self._taken_over(ifindex) or self._new_link(ifindex)
        self._uses[ifindex] = self._uses.get(ifindex, 0) + 1

    def detach(self, ifindex: int) -> None:
        """Undo one `attach`."""
        if not self.maps:  # it has ended, and goes on by its pins
            return
        self._uses[ifindex] -= 1
        if not self._uses[ifindex]:
            self._unpin(f"{LINK}{ifindex}")
            with contextlib.suppress(OSError):  # the interface may be gone
                self._links.pop(ifindex).close()

    def _new_link(self, ifindex: int) -> libbpf.TcxLink | libbpf.ClsactFilter:
        link = libbpf.attach_ingress(self._program, ifindex)
        if isinstance(link, libbpf.TcxLink):
            self._pin(link.fd, f"{LINK}{ifindex}")
        return link

    def _taken_over(self, ifindex: int) -> libbpf.TcxLink | None:
        """The link that a relay before us left there, with our program from now on; None if there is none."""
        path = self._folder and self._folder / f"{LINK}{ifindex}"
        if not path or not path.exists():
            return None
        try:
            link = libbpf.TcxLink(libbpf.get_pinned(str(path)))
        except OSError as error:
            log.warning("cannot take over what is pinned at %s: %s", path, error.strerror)
            path.unlink()
            return None
        if not self._adopted:
            self._old.add(ifindex)
            return link
        try:
            link.replace(self._program)
        except OSError:  # of an interface that is gone, whose number another one has now
            link.close()
            path.unlink()
            return None
        return link

    def _replace_old(self) -> None:
        """The workers have the rules: our program takes the place of those that forward by other maps."""
        for ifindex in self._old & self._links.keys():
            try:
                self._links[ifindex].replace(self._program)
            except OSError:
                self._links.pop(ifindex).close()
                self._unpin(f"{LINK}{ifindex}")
                self._links[ifindex] = self._new_link(ifindex)
        self._old.clear()

    # ---- pins --------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        if self._folder is None:
            return
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            log.info("nothing is pinned (%s: %s): forwarding ends with the relay", self._folder, error.strerror)
            self._folder = None

    def _maps_folder(self) -> Path | None:
        """For these programs and sizes."""
        if self._folder is None:
            return None
        digest = hashlib.sha256(repr(self._sizes).encode())
        for name in (load.RELAY, load.RING):
            digest.update(load.path(name).read_bytes())
        return self._folder / f"{pins.MAPS}{digest.hexdigest()[:16]}"

    def _pinned_maps(self) -> dict[str, int]:
        """Those that a relay of the same version and sizes left; none when one is missing."""
        folder = self._maps_folder()
        found: dict[str, int] = {}
        if folder is None or not folder.exists():
            return found
        try:
            for name in MAPS:
                found[name] = libbpf.get_pinned(str(folder / name))
        except OSError as error:
            log.warning("cannot take over the maps in %s: %s", folder, error.strerror)
            for fd in found.values():
                os.close(fd)
            return {}
        log.info("going on with what a relay before us left in the kernel")
        return found

    def _pin_maps(self) -> None:
        folder = self._maps_folder()
        if folder is None:
            return
        if folder.exists() and {path.name for path in folder.iterdir()} == set(MAPS):
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        for name, fd in self.maps.items():
            self._pin(fd, f"{folder.name}/{name}")

    def _pin(self, fd: int, name: str) -> None:
        if self._folder is None:
            return
        try:
            libbpf.pin(fd, str(self._folder / name))
        except OSError as error:
            log.info("cannot pin %s (%s): forwarding ends with the relay", name, error.strerror)

    def _unpin(self, name: str) -> None:
        if self._folder is not None:
            (self._folder / name).unlink(missing_ok=True)

    def leave_unclaimed(self) -> None:
        """All rules are up: what a relay before us left and nobody asked for since goes."""
        if self._folder is None or not self.maps:
            return
        self._replace_old()
        current = self._maps_folder()
        for ifindex, path in pins.links(self._folder).items():
            if ifindex not in self._links:
                path.unlink()
        for path in self._folder.glob(f"{pins.MAPS}*"):
            if path != current:
                shutil.rmtree(path)

    # ---- the end -----------------------------------------------------------------------------

    def end(self, *, keep: bool) -> None:
        """Let go of all of it. `keep`: what is pinned goes on forwarding."""
        if self._folder is not None and self.maps and not keep:
            pins.flush(self._folder)
        self._forget()

    def _forget(self) -> None:
        for link in self._links.values():
            link.close()
        for fd in [*self.maps.values(), self._program, *(fd for pair in self._filters for fd in pair)]:
            if fd >= 0:
                os.close(fd)
        self.maps, self._program, self._filters, self._links = {}, -1, [], {}
