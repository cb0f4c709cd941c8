"""The kernel's fast path: its programs and maps, where they are attached, and what of them outlives us.

Owns the descriptors of all of it, and the pins: where the BPF file system is mounted, maps and links are pinned,
so that forwarding goes on when every process of the relay is gone, and the next relay takes it over. Maps that
were made by programs of another version, or for other sizes, are replaced: the old program carries its flows until
the new rules are up, and passes everything else on as ours does. Called by resources and main; loading blocks for
some ten milliseconds.
"""

import errno
import hashlib
import logging
import os
import shutil
from functools import partial
from pathlib import Path

from mrelay.ebpf import layout, load, pins
from mrelay.ebpf.layout import MAPS, Sizes
from mrelay.kernel import libbpf, netdev
from mrelay.kernel.packet import SLOT
from mrelay.messages import FastPath as Message
from mrelay.supervisor.attached import Attached, pin

log = logging.getLogger("mrelay.supervisor")


class FastPath:
    """`maps`: descriptors by name; none before `start`, or where there is no fast path, and `problem` says why.

    `targets`: interfaces that take frames from XDP, since the first `attach_xdp`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: of the pins; None to pin nothing."""
        self.maps: dict[str, int] = {}
        self.problem = "it was not asked for"
        self.targets: netdev.Watch | None = None
        self._folder = folder
        self._sizes = Sizes(0, 0, 0, 0, 0)
        self._filters: list[tuple[int, int]] = []
        self._copier = -1
        self._tc = Attached(pins.LINK, libbpf.TcxLink, libbpf.attach_ingress)
        self._xdp = Attached(pins.XDP, libbpf.XdpLink, libbpf.attach_xdp)
        self._land = Attached(pins.LAND, libbpf.TcxLink, partial(libbpf.attach_tcx, first=True))

    def start(self, workers: int, flow_limit: int) -> None:
        """Load it, once; `problem` says what was in the way."""
        if self.maps:
            return
        self.problem = libbpf.available() or load.missing() or load.outdated()
        if self.problem:
            return
        try:
            self._load(layout.sizes(workers, flow_limit, libbpf.possible_cpus()))
        except OSError as error:
            if (new := self._maps_folder()) and not self._tc.adopted:
                shutil.rmtree(new, ignore_errors=True)
            said, _, verifier = (error.strerror or str(error)).partition("\n")
            self.problem = f"the kernel refuses it: {said}"
            if verifier:
                log.info("the verifier's last words:\n%s", verifier)
            self._forget()

    def _load(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._prepare_folder()
        self.maps = self._pinned_maps()
        self._tc.adopted = self._xdp.adopted = bool(self.maps)
        self.maps = self.maps or load.create_maps(sizes)
        self._tc.folder = self._xdp.folder = self._folder
        self._copier = load.load_copy(self.maps)
        for worker in range(sizes.workers):  # one by one: those before one that is refused are closed
            self._filters.append(load.load_rings(self.maps, worker))
        self._pin_maps()
        self._tc.program = load.load_relay(self.maps, sizes, lands=self._attach_land())

    def _attach_land(self) -> bool:
        """Before anything is sent round by lo; False: nothing may be. It stays for as long as the maps."""
        self._land.folder, self._land.program = self._maps_folder(), load.load_land(self.maps)
        try:
            self._land.attach(layout.LOOPBACK)
        except OSError as error:
            log.info("no copies go round by lo (%s): merged frames are forwarded a little slower", error.strerror)
            return False
        return True

    def message(self) -> Message:
        """What control and workers are told; `fds` goes along."""
        sizes, pinned = self._sizes, self._folder is not None
        return Message(self.problem, pinned, sizes.workers, sizes.slots, sizes.routes, sizes.outputs, sizes.cpus)

    def fds(self) -> list[int]:
        """The descriptors, in order."""
        return [*(self.maps[name] for name in MAPS), self._copier] if self.maps else []

    def filter(self, worker: int, size: int) -> int:
        """The program for a worker's ring with slots of `size` bytes."""
        short, long = self._filters[worker]
        return short if size == SLOT else long

    # ---- where it is attached ----------------------------------------------------------------

    def attach(self, ifindex: int) -> None:
        """Be at this interface's tc ingress from now on; as often as `detach` is called."""
        self._tc.attach(ifindex)

    def detach(self, ifindex: int) -> None:
        """Undo one `attach`."""
        if self.maps:  # else it has ended, and goes on by its pins
            self._tc.detach(ifindex)

    def attach_xdp(self, ifindex: int) -> None:
        """Be in this interface's driver, too. OSError: ENOENT where the kernel can't tell the `targets`."""
        if self.targets is None:
            self.targets = netdev.Watch()
        if self._xdp.program < 0:
            self._xdp.program = self._load_xdp()
        self._xdp.attach(ifindex)

    def _load_xdp(self) -> int:
        try:
            return load.load_xdp(self.maps, self._sizes)
        except OSError as error:  # not to be taken for what a driver says
            raise OSError(errno.ENOEXEC, f"the kernel refuses the program: {error.strerror or error}") from error

    def detach_xdp(self, ifindex: int) -> bool:
        """Undo one `attach_xdp`; False when it goes on by its pin."""
        if self.maps:
            self._xdp.detach(ifindex)
        return bool(self.maps)

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
        for name in load.OBJECTS:
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
        if folder.exists() and {path.name for path in folder.iterdir()} >= set(MAPS):
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        for name, fd in self.maps.items():
            pin(fd, folder / name)

    def leave_unclaimed(self) -> None:
        """All rules are up: what a relay before us left and nobody asked for since goes."""
        if self._folder is None or not self.maps:
            return
        current = self._maps_folder()
        for attached in (self._xdp, self._tc):
            attached.leave_unclaimed()
        for path in self._folder.glob(f"{pins.MAPS}*"):
            if path != current:
                shutil.rmtree(path, ignore_errors=True)

    # ---- the end -----------------------------------------------------------------------------

    def end(self, *, keep: bool) -> None:
        """Let go of all of it. `keep`: what is pinned goes on forwarding."""
        if self._folder is not None and self.maps and not keep:
            try:
                pins.flush(self._folder)
            except OSError as error:
                log.warning("cannot remove what is pinned in %s: %s", self._folder, error.strerror)
        self._forget()

    def _forget(self) -> None:
        of_filters = (fd for pair in self._filters for fd in pair)
        places = self._xdp, self._tc, self._land  # in this order: what is sent round lands
        programs = (*(attached.program for attached in places), self._copier, *of_filters)
        for attached in places:
            attached.close()
        for fd in (*self.maps.values(), *programs):
            if fd >= 0:
                os.close(fd)
        if self.targets is not None:
            self.targets.close()
        self.maps, self._filters, self._copier, self.targets = {}, [], -1, None
