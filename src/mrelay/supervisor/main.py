"""The supervisor's loop: requests from control, ends of children, signals.

Owns the process that has the privileges. It parses nothing but our own messages and its start arguments
(one JSON object from `mrelay run`); the config file it only opens. Blocks in select only. Exit statuses:
77 without the privileges it needs (EX_NOPERM), 78 when control finds the config bad (EX_CONFIG), 1 when
start-up fails otherwise.
"""

import errno
import json
import logging
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from mrelay import logs
from mrelay.child import collect_less
from mrelay.ebpf.pins import pin_folder
from mrelay.kernel import caps, notify
from mrelay.kernel.netdev import Watch
from mrelay.messages import (
    AT_ONCE,
    MAX_BUSY_POLL,
    AttachXdp,
    CloseTap,
    Done,
    Failed,
    Grant,
    Granted,
    Held,
    Listen,
    Listening,
    ListeningTcp,
    ListenTcp,
    LogLevel,
    Message,
    OpenTap,
    Outcome,
    ProbeNeighbour,
    Quit,
    Ready,
    Refusal,
    Release,
    Reload,
    Resource,
    Revoked,
    Setup,
    StartWorkers,
    Status,
    Stop,
    Tapped,
    WorkerDown,
    WorkerSetup,
    WorkerUp,
    XdpTargets,
    parts,
)
from mrelay.supervisor.backoff import CAP
from mrelay.supervisor.children import OUTDATED, Child, ControlChild, Process, WorkerChild, end_all
from mrelay.supervisor.host import clear_path, find_group, find_users, listen_at, open_state_dir
from mrelay.supervisor.resources import Refused, Resources, probe_neighbour
from mrelay.supervisor.service import Service
from mrelay.supervisor.taps import Taps
from mrelay.supervisor.tcp import TcpListener
from mrelay.supervisor.watch import CHECK
from mrelay.wire import BadMessage, channel_pair

log = logging.getLogger("mrelay.supervisor")

EX_NOPERM: Final = 77  # sysexits.h
EX_CONFIG: Final = 78  # sysexits.h
_NEEDED: Final = (caps.CAP_NET_RAW, caps.CAP_NET_ADMIN, caps.CAP_SETUID, caps.CAP_SETGID, caps.CAP_KILL)
# Kept if we have them: for unicast inputs below port 1024, paths and groups that are not ours, and so that
# children can empty their bounding sets.
_USEFUL: Final = (
    *(caps.CAP_NET_BIND_SERVICE, caps.CAP_CHOWN, caps.CAP_DAC_OVERRIDE, caps.CAP_SETPCAP),
    *(caps.CAP_BPF, caps.CAP_PERFMON),  # for the kernel's fast path
)
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_STOP_SECONDS: Final = 5.0
_SPARE_AFTER: Final = 0.5  # seconds after a start, which needs the processor more
_MAX_FLOWS: Final = 1 << 20
_Asked = Grant | Release | Listen | ListenTcp | StartWorkers | OpenTap
_Answer = Outcome | Done | Listening | ListeningTcp | Tapped


class Supervisor:
    """`options`: what `mrelay run` was told (config, engine, workers, socket, state_dir, user, worker_user)."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        user, self._worker_user = find_users(options["user"], options["worker_user"])
        self._resources = Resources(pin_folder(options["socket"], Path(options["pin_dir"])))
        self._resources.adopt()
        self._taps = Taps()
        self._listener: socket.socket | None = None
        self._listens: tuple[int, str | None] | None = None  # the mode and group that were asked for
        self._tcp = TcpListener()
        self._workers: list[WorkerChild] = []
        self._control = ControlChild("control", "mrelay.control", *user)
        # Imported, unprivileged and waiting: takes the place of the next worker that ends.
        self._spare = Child("spare worker", "mrelay.worker", *self._worker_user)
        self._spare.due = None
        self._state_dir = open_state_dir(options["state_dir"], user)
        self._selector = selectors.DefaultSelector()
        self._service = Service()
        self._next_check = 0.0
        self._targets: frozenset[int] | None = None  # of XDP, as control knows them
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
        self._targets = None
        self._tell_targets()
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
                self._give(worker, list(self._resources.held), used=worker.restarts > 0)
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
                self._answer(message)
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

    def _carry_out(self, asked: _Asked) -> _Answer:
        """One request that is answered; the answer."""
        match asked:
            case Grant() | Release():
                return self._serve_resources(asked)
            case StartWorkers():
                self._start_workers(asked)
            case Listen() | ListenTcp():
                return self._serve(asked)
            case OpenTap():
                return self._taps.open(asked)
        return Done(asked.id)

    def _answer(self, asked: _Asked) -> None:
        try:
            answer = self._carry_out(asked)
        except (Refused, OSError) as error:
            self._control.tell(Failed(asked.id, *_why(error)))
        else:
            self._control.tell(answer, self._fds(answer))

    def _fds(self, answer: _Answer) -> list[int]:
        """The descriptors that come along with an answer."""
        if isinstance(answer, Tapped):
            return [self._taps.fd(answer.id)]
        sock = {Listening: self._listener, ListeningTcp: self._tcp.sock}.get(type(answer))
        return [sock.fileno()] if sock else []

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
            self._give(worker, new, used=False)
        if any(isinstance(what, AttachXdp) for what in asked):
            self._tell_targets()
        return refused

    def _give(self, worker: WorkerChild, what: Sequence[Resource], *, used: bool) -> None:
        """Its copies of those that it needs some of."""
        held = self._resources.held
        for part in parts([each for each in what if held[each].sockets]):
            worker.tell(Granted(part, used), [fd for each in part for fd in held[each].fds(worker.number)])

    def _tell_targets(self) -> None:
        """Which interfaces take frames from XDP, if it is anywhere and control does not know."""
        watch = self._resources.fast.targets
        if watch is None:
            return
        if watch.fileno() not in self._selector.get_map():
            self._selector.register(watch, selectors.EVENT_READ, watch)
        try:
            watch.drain()
            targets = watch.targets()
        except OSError as error:  # what control knows stays; frames for what can't take them are lost meanwhile
            log.error("cannot ask which interfaces take frames from XDP: %s", error)
            return
        if targets != self._targets:
            self._targets = targets
            self._control.tell(XdpTargets(tuple(sorted(targets))))

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

    def _serve(self, message: Listen | ListenTcp) -> Listening | ListeningTcp:
        if isinstance(message, Listen):
            return self._listen(message.id, message.mode, message.group)
        self._tcp.open(message.address, message.port, starting=self._listener is None)
        return ListeningTcp(message.id)

    def _listen(self, id_: int, mode: int, group: str | None) -> Listening:
        if mode & ~0o666:
            raise Refused(f"{mode:o} is not the mode of a socket", "use 0660 and a group")
        if self._listens not in (None, (mode, group)):
            raise Refused("the API socket's mode and group can't be changed", "restart the relay to change them")
        path = self._options["socket"]
        if self._listener is None:
            self._listener = listen_at(path, mode, -1 if group is None else find_group(group))
            self._listens = mode, group
        owner = os.lstat(path)
        return Listening(id_, owner.st_uid, owner.st_gid)

    def _start_workers(self, asked: StartWorkers) -> None:
        self._check_workers(asked)
        cores = asked.cores
        if asked.fast:
            self._resources.fast.start(len(cores), asked.flow_limit)
            self._control.tell(self._resources.fast.message(), self._resources.fast.fds())
        if self._workers:
            return
        self._resources.workers = len(cores)
        self._workers = [
            WorkerChild(n, core, asked.flow_limit, asked.busy_poll, self._worker_user)
            for n, core in enumerate(cores)
        ]
        for worker in self._workers:
            self._start(worker)

    def _check_workers(self, asked: StartWorkers) -> None:
        if self._workers:
            sizes = {(w.flow_limit, w.busy_poll) for w in self._workers}
            same = sizes == {(asked.flow_limit, asked.busy_poll)}
            if not same or [w.core for w in self._workers] != list(asked.cores):
                raise Refused("workers can't be changed while they run", "restart the relay to change workers")
            return
        check_sizes(asked)

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
                elif isinstance(key.data, Watch):
                    self._tell_targets()
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
        if self._listener is not None:
            self._listener.close()
            os.unlink(self._options["socket"])

    def main(self) -> int:
        """Run, then leave nothing behind."""
        self.run()
        self._shut_down()
        for number in _SIGNALS:  # Python takes its handlers off before the process is gone
            signal.signal(number, signal.SIG_IGN)
        return 0


def _why(error: Refused | OSError) -> tuple[int, str, str]:
    """Number, problem and remedy, for control."""
    if isinstance(error, Refused):
        return errno.EPERM, str(error), error.remedy
    return error.errno or 0, error.strerror or str(error), str(getattr(error, "remedy", ""))


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


def check_sizes(asked: StartWorkers) -> None:
    """Raises Refused for workers that there can't be on this host."""
    cores, flow_limit = asked.cores, asked.flow_limit
    if not cores or len(set(cores)) != len(cores) or not set(cores) <= os.sched_getaffinity(0):
        raise Refused(f"cores {list(cores)} are not all ours to use")
    if not 1 <= flow_limit <= _MAX_FLOWS:
        raise Refused(f"flow limit {flow_limit}", f"choose one from 1 to {_MAX_FLOWS}")
    if not 0 <= asked.busy_poll <= MAX_BUSY_POLL:
        raise Refused(f"busy_poll {asked.busy_poll}", f"choose one from 0 to {MAX_BUSY_POLL}")


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


def _raise_descriptor_limit() -> None:
    """Every worker's sockets are ours too, and descriptors on their way to a worker count as well."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> int:
    """`python -m mrelay.supervisor OPTIONS`, as `mrelay run` starts it."""
    options = json.loads(sys.argv[1])
    logs.configure(options["log_format"], options["log_level"])
    logs.set_up("supervisor")
    lacking = caps.missing(_NEEDED)
    if lacking:
        log.error("mrelay run lacks %s: run it as root (sudo mrelay run …)", ", ".join(lacking))
        return EX_NOPERM
    try:
        caps.keep_only(_NEEDED + _USEFUL)
    except caps.PrivilegeError as error:
        log.error("cannot start: %s", error)
        return EX_NOPERM
    _raise_descriptor_limit()
    collect_less()
    os.chdir("/")
    try:
        clear_path(options["socket"])  # before a second relay sends anything twice
    except (Refused, OSError) as error:
        log.error("cannot start: %s: %s", error, getattr(error, "remedy", "choose another path with --socket"))
        return 1
    return Supervisor(options).main()
