"""The supervisor's loop: requests from control, ends of children, signals.

Owns the process that has the privileges. It parses nothing but our own messages and its start arguments
(one JSON object from `mrelay run`); the config file it only opens. Blocks in select only. Exit statuses:
77 without the privileges it needs (EX_NOPERM), 78 when control finds the config bad (EX_CONFIG), 1 when
start-up fails otherwise.
"""

import errno
import grp
import json
import logging
import os
import pwd
import selectors
import signal
import socket
import stat
import sys
import time
from typing import Any, Final, NoReturn

from mrelay.kernel import caps, notify
from mrelay.messages import (
    BadMessage,
    Done,
    Failed,
    Grant,
    Granted,
    Held,
    Listen,
    Message,
    Ready,
    Release,
    Reload,
    Resource,
    Revoked,
    Setup,
    StartWorkers,
    Stop,
    WorkerDown,
    WorkerSetup,
    WorkerUp,
    channel_pair,
)
from mrelay.supervisor.children import Child, end_all, new_counters
from mrelay.supervisor.resources import Refused, Resources

log = logging.getLogger("mrelay.supervisor")

EX_NOPERM: Final = 77  # sysexits.h
EX_CONFIG: Final = 78  # sysexits.h
_NEEDED: Final = (caps.CAP_NET_RAW, caps.CAP_NET_ADMIN, caps.CAP_SETUID, caps.CAP_SETGID, caps.CAP_KILL)
_STOP_SECONDS: Final = 5.0
_USER: Final = "mrelay"
_MAX_FLOWS: Final = 1 << 20


class WorkerChild(Child):
    """A worker, and the counters that outlive it."""

    def __init__(self, number: int, core: int, flow_limit: int, user: tuple[int, int]) -> None:
        super().__init__(f"worker {number}", "mrelay.worker", *user, core=core)
        self.number, self.flow_limit = number, flow_limit
        self.counters = new_counters(flow_limit)


class Supervisor:
    """`options`: what `mrelay run` was told (config, engine, workers, socket, state_dir, user)."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._user = _find_user(options["user"])
        self._resources = Resources()
        self._listener: socket.socket | None = None
        self._workers: list[WorkerChild] = []
        self._control = Child("control", "mrelay.control", *self._user)
        self._state_dir = _open_state_dir(options["state_dir"], self._user)
        self._selector = selectors.DefaultSelector()
        self._ready = False

    # ---- children --------------------------------------------------------------------------

    def _children(self) -> list[Child]:
        return [self._control, *self._workers]

    def _start_due(self) -> None:
        now = time.monotonic()
        for child in self._children():
            if child.due is not None and child.due <= now:
                if child.pidfd < 0:
                    self._start(child)
                else:
                    child.kill()  # it hung up, but did not end

    def _start(self, child: Child) -> None:
        child.start()
        assert child.channel is not None  # noqa: S101  start made it
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)
        self._selector.register(child.channel.sock, selectors.EVENT_READ, child)
        if isinstance(child, WorkerChild):
            self._introduce(child, equip=True)
        else:
            self._set_up_control()

    def _set_up_control(self) -> None:
        config, workers = self._options["config"], _workers_text(self._options["workers"])
        fds = [self._state_dir]
        if config is not None:
            fds.append(os.open(config, os.O_RDONLY | os.O_CLOEXEC))
        held = list(self._resources.held)
        restarted = self._control.restarts > 0
        engine, state_dir = self._options["engine"], self._options["state_dir"]
        self._control.tell(Setup(config, state_dir, engine, workers, len(held), restarted), fds)
        for fd in fds[1:]:
            os.close(fd)
        for what in held:
            self._control.tell(Held(what))
        for worker in self._workers:
            if worker.channel is not None:
                self._introduce(worker, equip=False)

    def _introduce(self, worker: WorkerChild, *, equip: bool) -> None:
        """A new channel between this worker and control; a new worker also gets every socket."""
        theirs, its = channel_pair()
        with theirs, its:
            setup = WorkerSetup(worker.number, worker.core or 0, worker.flow_limit)
            worker.tell(setup, [its.fileno(), worker.counters])
            for what, opened in self._resources.held.items() if equip else ():
                if opened.sockets:
                    worker.tell(Granted(what, used=worker.restarts > 0), opened.fds(worker.number))
            up = WorkerUp(worker.number, worker.core or 0, worker.pid, worker.restarts, worker.flow_limit)
            self._control.tell(up, [theirs.fileno(), worker.counters])

    def _child_ended(self, child: Child) -> None:
        self._selector.unregister(child.pidfd)
        if child.channel is not None:
            self._selector.unregister(child.channel.sock)
        reason = child.ended()
        if child is self._control and child.restarts == 1 and not self._ready:
            self._give_up(child.status)
        delay = max(0.0, (child.due or 0.0) - time.monotonic())
        log.warning("%s ended (%s): starting it again in %.1f s", child.name, reason, delay)
        if isinstance(child, WorkerChild):
            self._control.tell(WorkerDown(child.number, child.restarts, reason))

    def _give_up(self, status: int) -> NoReturn:
        """Control could not even start: a bad config (it said why), or something that trying again won't mend."""
        self._shut_down()
        sys.exit(status if status > 0 else 1)

    # ---- requests --------------------------------------------------------------------------

    def _request(self, message: Message) -> None:
        match message:
            case Grant(id, what):
                self._answer(id, lambda: self._grant(what))
            case Release(id, what):
                self._answer(id, lambda: self._release(what))
            case Listen(id, mode, group):
                self._answer(id, lambda: self._listen(mode, group))
            case StartWorkers(id, cores, flow_limit):
                self._answer(id, lambda: self._start_workers(cores, flow_limit))
            case Ready(status):
                self._announce(status)
            case _:
                raise BadMessage(f"{type(message).__name__} is not for the supervisor")

    def _answer(self, id_: int, work: Any) -> None:
        try:
            fds: list[int] = work()
        except Refused as error:
            self._control.tell(Failed(id_, errno.EPERM, str(error), error.remedy))
        except OSError as error:
            remedy = str(getattr(error, "remedy", ""))
            self._control.tell(Failed(id_, error.errno or 0, error.strerror or str(error), remedy))
        else:
            self._control.tell(Done(id_), fds)

    def _grant(self, what: Resource) -> list[int]:
        new = what not in self._resources.held
        opened = self._resources.open(what)
        if new and opened.sockets:
            for worker in self._workers:
                worker.tell(Granted(what, used=False), opened.fds(worker.number))
        return []

    def _release(self, what: Resource) -> list[int]:
        opened = self._resources.held.get(what)
        if opened is not None and opened.sockets:
            for worker in self._workers:
                worker.tell(Revoked(what))
        self._resources.close(what)
        return []

    def _listen(self, mode: int, group: str | None) -> list[int]:
        if mode & 0o007 or mode & ~0o777:
            raise Refused(f"mode {mode:o} would let everybody in", "use 0660 and a group")
        gid = -1 if group is None else _find_group(group)
        if self._listener is None:
            self._listener = _listen_at(self._options["socket"])
        os.chown(self._options["socket"], -1, gid)
        os.chmod(self._options["socket"], mode)
        return [self._listener.fileno()]

    def _start_workers(self, cores: tuple[int, ...], flow_limit: int) -> list[int]:
        if self._workers:
            same = [w.core for w in self._workers] == list(cores) and self._workers[0].flow_limit == flow_limit
            if not same:
                raise Refused("workers can't be changed while they run", "restart the relay to change workers")
            return []
        if not cores or len(set(cores)) != len(cores) or not set(cores) <= os.sched_getaffinity(0):
            raise Refused(f"cores {list(cores)} are not all ours to use")
        if not 1 <= flow_limit <= _MAX_FLOWS:
            raise Refused(f"flow limit {flow_limit}", f"choose one from 1 to {_MAX_FLOWS}")
        self._resources.workers = len(cores)
        self._workers = [WorkerChild(n, core, flow_limit, self._user) for n, core in enumerate(cores)]
        for worker in self._workers:
            self._start(worker)
        return []

    def _announce(self, status: str) -> None:
        if not self._ready:
            self._ready = True
            print("ready", flush=True)
            notify.ready(status)

    # ---- the loop --------------------------------------------------------------------------

    def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        # Kept to the very end: a second signal may come while we stop.
        self._signals = wakeup, signals = socket.socketpair()
        for sock in (wakeup, signals):
            sock.setblocking(False)
        signal.set_wakeup_fd(signals.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _noted)
        self._selector.register(wakeup, selectors.EVENT_READ, None)
        while True:
            self._start_due()
            for key, _ in self._selector.select(self._until_due()):
                if key.data is None:
                    if self._signalled(wakeup.recv(64)):
                        return
                elif key.fd == key.data.pidfd:
                    self._child_ended(key.data)
                elif key.data.channel is not None and key.fd == key.data.channel.fileno():
                    self._hear(key.data)

    def _until_due(self) -> float | None:
        due = [child.due for child in self._children() if child.due is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _signalled(self, numbers: bytes) -> bool:
        """Whether it is time to stop."""
        if signal.SIGHUP in numbers:
            self._reload()
        return signal.SIGTERM in numbers or signal.SIGINT in numbers

    def _reload(self) -> None:
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
            message, fds = got
            for fd in fds:
                os.close(fd)
            if child is not self._control:
                raise BadMessage("workers have nothing to ask")
            self._request(message)
        except BlockingIOError:
            return
        except (BadMessage, ConnectionError) as error:
            log.error("%s sent what it may not (%s): ending it", child.name, error)
            child.kill()

    def _shut_down(self) -> None:
        notify.stopping()
        end_all([self._control], Stop(), _STOP_SECONDS)
        self._resources.close_all()
        end_all(list(self._workers), Stop(), _STOP_SECONDS)
        if self._listener is not None:
            self._listener.close()
            os.unlink(self._options["socket"])

    def main(self) -> int:
        """Run, then leave nothing behind."""
        self.run()
        self._shut_down()
        return 0


def _noted(*_: object) -> None:
    """Signals arrive through the wakeup descriptor; this only keeps them from ending us."""


def _workers_text(workers: int | str | list[int] | None) -> str | None:
    """As the Setup message says it: "auto", a number, or cores with commas (`1,` for core 1 alone)."""
    if isinstance(workers, list):
        return ",".join(map(str, workers)) + ("," if len(workers) == 1 else "")
    return None if workers is None else str(workers)


def _find_user(name: str | None) -> tuple[int, int]:
    """uid and gid for control and workers: `name`, or user mrelay, or nobody."""
    for candidate in [name] if name else [_USER, "nobody"]:
        try:
            entry = pwd.getpwnam(candidate)
        except KeyError:
            continue
        if entry.pw_uid == 0:
            sys.exit(f"mrelay: --user {candidate} is root: name an unprivileged user")
        return entry.pw_uid, entry.pw_gid
    sys.exit(f"mrelay: no user {name or _USER}: create it with 'useradd --system {name or _USER}'")


def _find_group(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise Refused(f"no group {name}", f"create it with 'groupadd --system {name}'") from None


def _open_state_dir(path: str, user: tuple[int, int]) -> int:
    """The state directory, made if need be, as a descriptor that control can work below."""
    try:
        os.makedirs(path, mode=0o755, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if os.fstat(fd).st_uid != user[0]:
            if os.listdir(fd):
                raise OSError(errno.EPERM, "it is another user's, and not empty")
            os.fchown(fd, *user)
    except OSError as error:
        sys.exit(f"mrelay: state directory {path}: {error.strerror}: name another with --state-dir")
    return fd


def _listen_at(path: str) -> socket.socket:
    """A listening Unix socket that nobody else can reach yet; a dead one's file is replaced."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    _clear_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(mask)
    sock.listen(128)
    return sock


def _clear_path(path: str) -> None:
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise Refused(f"{path} exists and is no socket", "move it away, or choose another path with --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise Refused(f"a relay already listens on {path}", "stop it, or choose another path with --socket")


def main() -> int:
    """`python -m mrelay.supervisor OPTIONS`, as `mrelay run` starts it."""
    logging.basicConfig(level=logging.INFO, format="mrelay: %(message)s", stream=sys.stderr)
    lacking = caps.missing(_NEEDED)
    if lacking:
        log.error("mrelay run lacks %s: run it as root (sudo mrelay run …)", ", ".join(lacking))
        return EX_NOPERM
    options = json.loads(sys.argv[1])
    try:
        _clear_path(options["socket"])  # before a second relay sends anything twice
    except (Refused, OSError) as error:
        log.error("cannot start: %s: %s", error, getattr(error, "remedy", "choose another path with --socket"))
        return 1
    return Supervisor(options).main()
