"""What control may ask of the supervisor and gets an answer to: the table, what is checked of each, the answers.

Owns the API's sockets, and which of control's requests they were opened for. supervisor.main hands over each such
message; an answer, also one that refuses, goes to control. BadMessage for what no control of ours would send.
Blocks as long as the kernel needs to open what is asked for.
"""

import errno
import os
import socket
from collections.abc import Callable, Sequence
from typing import Final

from mrelay.messages import (
    AT_ONCE,
    MAX_BUSY_POLL,
    AttachXdp,
    Done,
    Failed,
    Grant,
    Listen,
    Listening,
    ListeningTcp,
    ListenTcp,
    OpenTap,
    Outcome,
    Refusal,
    Release,
    Resource,
    Revoked,
    StartWorkers,
    Tapped,
)
from mrelay.supervisor.children import Child, WorkerChild
from mrelay.supervisor.host import find_group, listen_at
from mrelay.supervisor.resources import Refused, Resources
from mrelay.supervisor.taps import Taps
from mrelay.supervisor.targets import Targets
from mrelay.supervisor.tcp import TcpListener
from mrelay.wire import BadMessage

_MAX_FLOWS: Final = 1 << 20
Asked = Grant | Release | Listen | ListenTcp | StartWorkers | OpenTap
_Answer = Outcome | Done | Listening | ListeningTcp | Tapped


class Requests:
    """`answer` takes each."""

    def __init__(
        self,
        path: str,
        resources: Resources,
        taps: Taps,
        targets: Targets,
        control: Child,
        workers: Sequence[WorkerChild],
        start: Callable[[StartWorkers], None],
    ) -> None:
        """`path`: of the API's Unix socket. `start` fills `workers`, which is empty at first."""
        self._path, self._resources, self._taps, self._targets = path, resources, taps, targets
        self._control, self._workers, self._start = control, workers, start
        self._listener: socket.socket | None = None
        self._listens: tuple[int, str | None] | None = None  # the mode and group that were asked for
        self._tcp = TcpListener()

    def answer(self, asked: Asked) -> None:
        """Carry it out, and tell control how that went."""
        try:
            answer = self._carry_out(asked)
        except (Refused, OSError) as error:
            self._control.tell(Failed(asked.id, *_why(error)))
        else:
            self._control.tell(answer, self._fds(answer))

    def _carry_out(self, asked: Asked) -> _Answer:
        match asked:
            case Grant() | Release():
                return self._serve_resources(asked)
            case StartWorkers():
                self._start_workers(asked)
            case Listen():
                return self._listen(asked.id, asked.mode, asked.group)
            case ListenTcp():
                self._tcp.open(asked.address, asked.port, starting=self._listener is None)
                return ListeningTcp(asked.id)
            case OpenTap():
                return self._taps.open(asked)
        return Done(asked.id)

    def _fds(self, answer: _Answer) -> list[int]:
        """The descriptors that come along with an answer."""
        if isinstance(answer, Tapped):
            return [self._taps.fd(answer.id)]
        sock = {Listening: self._listener, ListeningTcp: self._tcp.sock}.get(type(answer))
        return [sock.fileno()] if sock else []

    def close(self) -> None:
        """No client reaches the relay any more."""
        if self._listener is not None:
            self._listener.close()
            os.unlink(self._path)

    # ---- resources -------------------------------------------------------------------------

    def _serve_resources(self, asked: Grant | Release) -> Outcome:
        if len(asked.what) > AT_ONCE:
            raise BadMessage(f"{len(asked.what)} resources in one request")
        work = self._grant if isinstance(asked, Grant) else self._release
        return Outcome(asked.id, tuple(work(asked.what)))

    def _grant(self, asked: Sequence[Resource]) -> list[Refusal]:
        """Open each that can be, and pass the new ones on; the others."""
        refused: list[Refusal] = []
        new: list[Resource] = []
        for at, what in enumerate(asked):
            held = what in self._resources.held
            try:
                self._resources.open(what)
            except (Refused, OSError) as error:
                refused.append(Refusal(at, *_why(error)))
            else:
                new += [] if held else [what]
        for worker in self._workers:
            worker.grant(self._resources, new, used=False)
        if any(isinstance(what, AttachXdp) for what in asked):
            self._targets.tell()
        return refused

    def _release(self, asked: Sequence[Resource]) -> list[Refusal]:
        """Close each, first the workers' copies; what could not be closed in good order."""
        held = self._resources.held
        if copied := tuple(what for what in asked if what in held and held[what].sockets):
            for worker in self._workers:
                worker.tell(Revoked(copied))
        refused: list[Refusal] = []
        for at, what in enumerate(asked):
            try:
                self._resources.close(what)
            except OSError as error:
                refused.append(Refusal(at, *_why(error)))
        return refused

    # ---- the API's socket ------------------------------------------------------------------

    def _listen(self, id_: int, mode: int, group: str | None) -> Listening:
        if mode & ~0o666:
            raise Refused(f"{mode:o} is not the mode of a socket", "use 0660 and a group")
        if self._listens not in (None, (mode, group)):
            raise Refused("the API socket's mode and group can't be changed", "restart the relay to change them")
        if self._listener is None:
            self._listener = listen_at(self._path, mode, -1 if group is None else find_group(group))
            self._listens = mode, group
        owner = os.lstat(self._path)
        return Listening(id_, owner.st_uid, owner.st_gid)

    # ---- workers ---------------------------------------------------------------------------

    def _start_workers(self, asked: StartWorkers) -> None:
        self._check_workers(asked)
        fast = self._resources.fast
        if asked.fast:
            if not self._workers:  # one that was refused stays so: those that run have no part of it
                fast.start(len(asked.cores), asked.flow_limit)
            self._control.tell(fast.message(), fast.fds())
        if not self._workers:
            self._resources.workers = len(asked.cores)
            self._start(asked)

    def _check_workers(self, asked: StartWorkers) -> None:
        if self._workers:
            sizes = {(w.flow_limit, w.busy_poll) for w in self._workers}
            same = sizes == {(asked.flow_limit, asked.busy_poll)}
            if not same or [w.core for w in self._workers] != list(asked.cores):
                raise Refused("workers can't be changed while they run", "restart the relay to change workers")
            return
        check_sizes(asked)


def check_sizes(asked: StartWorkers) -> None:
    """Raises Refused for workers that there can't be on this host."""
    cores, flow_limit = asked.cores, asked.flow_limit
    if not cores or len(set(cores)) != len(cores) or not set(cores) <= os.sched_getaffinity(0):
        raise Refused(f"cores {list(cores)} are not all ours to use")
    if not 1 <= flow_limit <= _MAX_FLOWS:
        raise Refused(f"flow limit {flow_limit}", f"choose one from 1 to {_MAX_FLOWS}")
    if not 0 <= asked.busy_poll <= MAX_BUSY_POLL:
        raise Refused(f"busy_poll {asked.busy_poll}", f"choose one from 0 to {MAX_BUSY_POLL}")


def _why(error: Refused | OSError) -> tuple[int, str, str]:
    """Number, problem and remedy, for control."""
    if isinstance(error, Refused):
        return errno.EPERM, str(error), error.remedy
    return error.errno or 0, error.strerror or str(error), str(getattr(error, "remedy", ""))
