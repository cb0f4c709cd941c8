"""The supervisor's loop: messages from control, ends of children, signals.

Owns the children: when each starts, what it is given then, and what is said of its end. It parses nothing but our
own messages; the config file it only opens. Blocks in select only, and where supervisor.requests does.
"""

import logging
import os
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, Final, NoReturn

from mrelay import logs
from mrelay.ebpf.pins import pin_folder
from mrelay.kernel import notify
from mrelay.messages import (
    CloseTap,
    Grant,
    Held,
    Listen,
    ListenTcp,
    LogLevel,
    Message,
    OpenTap,
    ProbeNeighbour,
    Quit,
    Ready,
    Release,
    Reload,
    Setup,
    StartWorkers,
    Status,
    Stop,
    WorkerDown,
    WorkerSetup,
    WorkerUp,
    parts,
)
from mrelay.supervisor.backoff import CAP
from mrelay.supervisor.children import OUTDATED, Child, ControlChild, Process, WorkerChild, end_all
from mrelay.supervisor.host import find_users, open_state_dir
from mrelay.supervisor.requests import Requests
from mrelay.supervisor.resources import Refused, Resources, probe_neighbour
from mrelay.supervisor.service import Service
from mrelay.supervisor.taps import Taps
from mrelay.supervisor.targets import Targets
from mrelay.supervisor.watch import CHECK
from mrelay.wire import BadMessage, channel_pair

log = logging.getLogger("mrelay.supervisor")

EX_CONFIG: Final = 78  # sysexits.h
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_STOP_SECONDS: Final = 5.0
_SPARE_AFTER: Final = 0.5  # seconds after a start, which needs the processor more


class Supervisor:
    """`options`: what `mrelay run` was told (config, engine, workers, socket, state_dir, user, worker_user)."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        user, self._worker_user = find_users(options["user"], options["worker_user"])
        self._resources = Resources(pin_folder(options["socket"], Path(options["pin_dir"])))
        self._resources.adopt()
        self._taps = Taps()
        self._workers: list[WorkerChild] = []
        self._control = ControlChild("control", "mrelay.control", *user)
        # Imported, unprivileged and waiting: takes the place of the next worker that ends.
        self._spare = Child("spare worker", "mrelay.worker", *self._worker_user)
        self._spare.due = None
        self._state_dir = open_state_dir(options["state_dir"], user)
        self._selector = selectors.DefaultSelector()
        self._service = Service()
        self._next_check = 0.0
        self._targets = Targets(self._resources.fast, self._control, self._selector)
        self._requests = Requests(
            options["socket"],
            self._resources,
            self._taps,
            self._targets,
            self._control,
            self._workers,
            self._start_workers,
        )
        self._quit = self._keep = False  # told to stop by a client; the fast path goes on, as for SIGUSR1

    # ---- children --------------------------------------------------------------------------

    def _children(self) -> list[Child]:
        return [self._control, *self._workers, self._spare]

    def _start_due(self) -> None:
        now = time.monotonic()
        for child in self._children():
            if child.due is not None and child.due <= now:
                if child.process is None:
                    self._start(child)
                else:
                    child.kill()  # it hung up, but did not end
                    child.due = None  # its end will say when

    def _start(self, child: Child) -> None:
        try:
            self._listen_to(child.start(self._take_spare() if isinstance(child, WorkerChild) else None), child)
            if isinstance(child, WorkerChild):
                self._introduce(child, equip=True)
            elif child is self._control:
                self._set_up_control()
        except OSError as error:
            # No memory, no process or no descriptor is to be had: one end more, and everything else goes on.
            log.error("%s cannot be started: %s", child.name, error.strerror)
            child.kill()
            if child.process is None:
                before = child.trouble
                self._report(child, child.failed(f"cannot be started: {error.strerror}"), before)

    def _start_workers(self, asked: StartWorkers) -> None:
        self._workers += [
            WorkerChild(n, core, asked.flow_limit, asked.busy_poll, self._worker_user)
            for n, core in enumerate(asked.cores)
        ]
        for worker in self._workers:
            self._start(worker)

    def _take_spare(self) -> Process | None:
        """The spare worker's process, if there is one. The next one waits until the worker has its rules."""
        process = self._spare.give()
        if process is not None:
            self._listen_to(process, None)
            self._spare.due = time.monotonic() + _SPARE_AFTER
        return process

    def _listen_to(self, process: Process, child: Child | None) -> None:
        """Its end and its messages are `child`'s; None: nobody's any more."""
        for fd in (process.pidfd, process.channel.fileno() if process.channel else -1):
            if fd >= 0 and child is not None:
                self._selector.register(fd, selectors.EVENT_READ, child)
            elif fd >= 0:
                self._selector.unregister(fd)

    def _set_up_control(self) -> None:
        restarted = self._control.restarts > 0
        config, opened = self._open_config(restarted=restarted)
        fds = [self._state_dir, *opened]
        held, workers = list(self._resources.held), _workers_text(self._options["workers"])
        engine, state_dir = self._options["engine"], self._options["state_dir"]
        self._control.tell(Setup(config, state_dir, engine, workers, len(held), restarted), fds)
        for fd in opened:
            os.close(fd)
        for part in parts(held):
            self._control.tell(Held(part))
        self._targets.tell_afresh()
        for worker in self._workers:
            self._introduce(worker, equip=False)
            if worker.process is None:
                self._control.tell(_down(worker, "it ended before control did"))

    def _open_config(self, *, restarted: bool) -> tuple[str | None, list[int]]:
        """The config file and its descriptor. A restarted control does without one that is gone."""
        config = self._options["config"]
        try:
            return config, [os.open(config, os.O_RDONLY | os.O_CLOEXEC)] if config is not None else []
        except OSError as error:
            log.error("can't open %s: %s", config, error.strerror)
            if not restarted:
                self._give_up(EX_CONFIG)
            return None, []

    def _introduce(self, worker: WorkerChild, *, equip: bool) -> None:
        """A new channel between this worker and control; a new worker also gets every socket."""
        theirs, its = channel_pair()
        with theirs, its:
            setup = WorkerSetup(worker.number, worker.core, worker.flow_limit, worker.busy_poll)
            worker.tell(setup, [its.fileno(), worker.counters])
            if equip and self._resources.fast.maps:
                worker.tell(self._resources.fast.message(), self._resources.fast.fds())
            worker.tell(LogLevel("worker", logs.levels()["worker"]))  # a spare was started under an older one
            if equip:
                worker.grant(self._resources, list(self._resources.held), used=worker.restarts > 0)
            up = WorkerUp(worker.number, worker.core, worker.pid, worker.restarts, worker.flow_limit)
            self._control.tell(up, [theirs.fileno(), worker.counters, *worker.statm])

    def _child_ended(self, child: Child) -> None:
        assert child.process is not None  # noqa: S101  it was running until now
        self._listen_to(child.process, None)
        before, reason = child.trouble, child.ended()
        if child is self._control:
            self._taps.close_all()
        if child is self._control and child.restarts == 1 and not self._service.ready:
            self._give_up(child.status)
        self._report(child, reason, before)

    def _report(self, child: Child, reason: str, trouble_before: str) -> None:
        """Tell the log, and control, that a child is down; once and loudly when it is more than that."""
        log.warning("%s ended (%s): starting it again in %.1f s", child.name, reason, child.delay)
        if child.trouble and not trouble_before:
            log.error("%s: %s", child.name, _remedy(child))
        if isinstance(child, WorkerChild):
            self._control.tell(_down(child, reason))

    def _check_pulses(self) -> None:
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + CHECK
        for child in self._children():
            if said := child.check(now):
                log.warning("%s %s", child.name, said)

    def _give_up(self, status: int) -> NoReturn:
        """Control could not even start: a bad config (it said why), or something that trying again won't mend."""
        self._shut_down()
        sys.exit(status if status > 0 else 1)

    # ---- requests --------------------------------------------------------------------------

    def _request(self, message: Message) -> None:
        match message:
            case Grant() | Release() | Listen() | ListenTcp() | StartWorkers() | OpenTap():
                self._requests.answer(message)
            case CloseTap(id):
                self._taps.close(id)
            case Quit(keep):
                log.info("stopping, as a client asked")
                self._quit, self._keep = True, keep
            case ProbeNeighbour(ifindex, address):
                _probe(ifindex, address)
            case Ready(status):
                self._announce(status)
            case Status(text):
                self._service.say(text)
            case LogLevel(role, level):
                self._set_log_level(role, level)
            case _:
                raise BadMessage(f"{type(message).__name__} is not for the supervisor")

    def _announce(self, status: str) -> None:
        if not self._service.ready:
            self._spare.due = time.monotonic() + _SPARE_AFTER
        self._control.works()
        self._resources.leave_unclaimed()
        self._resources.fast.leave_unclaimed()
        self._service.announce(status)

    def _set_log_level(self, role: str, level: str) -> None:
        """Ours, the workers', or control's: that one sets its own, but the next must know."""
        if role not in logs.ROLES or level not in logs.LEVELS:
            raise BadMessage(f"no role {role!r:.50} or no level {level!r:.50}")
        logs.set_level(role, level, mine=role == "supervisor")
        for worker in self._workers if role == "worker" else ():
            worker.tell(LogLevel(role, level))

    # ---- the loop --------------------------------------------------------------------------

    def run(self) -> None:
        """Until SIGTERM, SIGINT, SIGUSR1 or Quit."""
        # Kept to the very end: a second signal may come while we stop.
        self._signals = wakeup, signals = socket.socketpair()
        for sock in (wakeup, signals):
            sock.setblocking(False)
        signal.set_wakeup_fd(signals.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, _noted)
        self._selector.register(wakeup, selectors.EVENT_READ, None)
        while not self._quit:
            self._check_pulses()
            self._start_due()
            self._service.turn(self._control, self._workers)
            logs.flush()
            for key, _ in self._selector.select(self._until_due()):
                if key.data is None:
                    if self._signalled(wakeup.recv(64)):
                        return
                elif isinstance(key.data, Targets):
                    key.data.tell()
                elif key.fd == key.data.pidfd:
                    self._child_ended(key.data)
                elif key.data.channel is not None and key.fd == key.data.channel.fileno():
                    self._hear(key.data)

    def _until_due(self) -> float:
        due = [child.due for child in self._children() if child.due is not None]
        if self._service.next_ping is not None:
            due.append(self._service.next_ping)
        return max(0.0, min([self._next_check, *due]) - time.monotonic())

    def _signalled(self, numbers: bytes) -> bool:
        """Whether it is time to stop."""
        if signal.SIGHUP in numbers:
            self._reload()
        if signal.SIGUSR1 in numbers:
            self._keep = True
            return True
        return signal.SIGTERM in numbers or signal.SIGINT in numbers

    def _reload(self) -> None:
        self._service.reloading()
        config = self._options["config"]
        if config is None:
            self._control.tell(Reload("this relay was started without a config file"))
            return
        try:
            fd = os.open(config, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._control.tell(Reload(f"can't open {config}: {error.strerror}"))
            return
        self._control.tell(Reload(""), [fd])
        os.close(fd)

    def _hear(self, child: Child) -> None:
        """One message from control. Workers say nothing to us; what is no message ends its sender."""
        assert child.channel is not None  # noqa: S101  the loop looked
        try:
            got = child.channel.receive()
            if got is None:
                self._selector.unregister(child.channel.sock)
                child.hung_up()
                return
            message, _ = got  # no descriptors: the channel takes none
            if child is not self._control:
                raise BadMessage("workers have nothing to ask")
            self._request(message)
        except BlockingIOError:
            return
        except (BadMessage, ConnectionError) as error:
            log.error("%s sent what it may not (%.200s): ending it", child.name, error)
            child.kill()

    def _shut_down(self) -> None:
        notify.stopping()
        end_all([self._control], Stop(), _STOP_SECONDS)
        if self._keep:
            self._resources.fast.end(keep=True)
        self._resources.close_all()
        end_all([*self._workers, self._spare], Stop(), _STOP_SECONDS)
        self._resources.fast.end(keep=False)
        self._requests.close()

    def main(self) -> int:
        """Run, then leave nothing behind."""
        self.run()
        self._shut_down()
        for number in _SIGNALS:  # Python takes its handlers off before the process is gone
            signal.signal(number, signal.SIG_IGN)
        return 0


def _probe(ifindex: int, address: str) -> None:
    """Nobody waits for an answer that could refuse it."""
    try:
        probe_neighbour(ifindex, address)
    except Refused as error:
        raise BadMessage(str(error)) from None


def _noted(*_: object) -> None:
    """Signals arrive through the wakeup descriptor; this only keeps them from ending us."""


def _down(worker: WorkerChild, reason: str) -> WorkerDown:
    return WorkerDown(worker.number, worker.restarts, reason, worker.trouble, worker.delay)


def _remedy(child: Child) -> str:
    """What to say, once, when a child is in trouble."""
    goes_on = f"It is tried again every {CAP:.0f} s; everything else goes on."
    if child.trouble == OUTDATED:
        return f"{OUTDATED} (systemctl restart mrelay). {goes_on}"
    return (
        f"{child.trouble}. {goes_on} Its own messages above say why it ends; if they don't, restart the relay, "
        "and report it with this log."
    )


def _workers_text(workers: int | str | list[int] | None) -> str | None:
    """As the Setup message says it: "auto", a number, or cores with commas (`1,` for core 1 alone)."""
    if isinstance(workers, list):
        return ",".join(map(str, workers)) + ("," if len(workers) == 1 else "")
    return None if workers is None else str(workers)
