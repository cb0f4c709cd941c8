"""The control process from its first message to its last.

Owns bring-up, the event loop, and what becomes of each of the supervisor's messages. Started as
`python -m mrelay.control …` with the channel to the supervisor (see child.py); exits 0 after Stop,
78 for a config that can't be used, 1 for everything else. Nothing blocks the loop after bring-up.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from mrelay import __version__, logs
from mrelay.child import collect_less, confine, settle
from mrelay.control import preload  # noqa: F401  for its effect
from mrelay.control.api import create_app
from mrelay.control.events import ControlStarted, EventLog, WorkerDied, WorkerStarted
from mrelay.control.fastpath import FastPath
from mrelay.control.guard import Guard
from mrelay.control.history import History
from mrelay.control.links import LinkTable, LinkWatcher
from mrelay.control.notice import InterfaceWatch, Noticer
from mrelay.control.observe import Observe
from mrelay.control.peers import Access, UnixDoor
from mrelay.control.proc import open_statm, start_time
from mrelay.control.procnet import ProcNet
from mrelay.control.reconcile import Reconciler
from mrelay.control.relay import Host, Relay
from mrelay.control.routes import NextHops
from mrelay.control.rulebook import Rulebook, merge
from mrelay.control.sampler import Sample, Sampler
from mrelay.control.segments import Segments
from mrelay.control.server import Server, UnixProtocol
from mrelay.control.settings import choose_cores, idle_xdp, override
from mrelay.control.state import State, StateFile
from mrelay.control.stats import Stats
from mrelay.control.streams import Streams
from mrelay.control.supervisor import Event, RequestFailed, Supervisor
from mrelay.control.tcp import TcpListener
from mrelay.control.want import Settings
from mrelay.control.why import Sources, Why
from mrelay.control.workers import Workers
from mrelay.ebpf.carry import CHOSEN
from mrelay.ebpf.maps import Maps, sizes_of
from mrelay.messages import FastPath as FastPathMessage
from mrelay.messages import Held, OpenEgress, Reload, Resource, Setup, Stop, WorkerDown, WorkerUp, XdpTargets
from mrelay.model.config import Config, RelaySettings, load_config
from mrelay.model.issue import ConfigError
from mrelay.pulse import INTERVAL, Pulse
from mrelay.wire import BadMessage

log = logging.getLogger(__name__)

WORKERS_DEADLINE = 10.0  # seconds for all workers to come up before we go on with those that did
EX_CONFIG = 78  # sysexits.h


class Control:
    """Everything there is one of. `serve` is the life of the process.

    `lock_in` is told the state directory's descriptor and confines the process to it; it returns the Landlock
    ABI version in use.
    """

    def __init__(self, sock: socket.socket, lock_in: Callable[[int], int]) -> None:
        self._lock_in, self._landlock = lock_in, 0
        self._supervisor_started = start_time(os.getppid())
        self._statm = open_statm(os.getpid()), open_statm(os.getppid())
        self._procnet = ProcNet()
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = loop.create_future()
        self._setup: asyncio.Future[tuple[Setup, list[int]]] = loop.create_future()
        self._held: list[Resource] = []
        self._all_held = asyncio.Event()
        self._worker_up = asyncio.Event()
        self._setup_message: Setup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._reconciler: Reconciler | None = None
        self._maps: Maps | None = None
        self._pinned = False
        self._no_fast_path = CHOSEN
        self._fast: FastPath | None = None
        self._targets: frozenset[int] = frozenset()
        self._relay: Relay | None = None
        self._server: Server | None = None
        self._tcp: TcpListener | None = None
        self.events = EventLog()
        self.workers = Workers(self._on_worker_up, self._on_end)
        self.supervisor = Supervisor(sock, self._on_event, self._on_end)
        self._segments = Segments(self.supervisor)

    # ---- events -----------------------------------------------------------------------------------

    def _on_event(self, event: Event, fds: list[int]) -> None:
        match event:
            case Setup():
                self._on_setup(event, fds)
            case Held():
                self._held += event.what
                self._check_held()
            case WorkerUp():
                self._on_worker(event)
                self.workers.up(event, fds)
            case WorkerDown():
                self.events.add(
                    WorkerDied(
                        worker=event.worker, reason=event.reason, restarts=event.restarts, retry=event.delay
                    )
                )
                self.workers.down(event)
            case FastPathMessage():
                self._maps = Maps(fds, sizes_of(event)) if fds else None
                self._no_fast_path, self._pinned = event.problem, event.pinned
            case XdpTargets(ifindexes):
                self._targets = frozenset(ifindexes)
                if self._fast is not None:
                    self._fast.set_targets(self._targets)
            case Reload():
                self._spawn(self._reload(event, fds))
            case Stop():
                self._end(0)

    def _on_setup(self, setup: Setup, fds: list[int]) -> None:
        if self._setup.done() or len(fds) != (1 if setup.config is None else 2):
            raise BadMessage(f"Setup with {len(fds)} descriptors, or a second one")
        self._landlock = self._lock_in(fds[0])
        self._setup_message = setup
        self._setup.set_result((setup, fds))
        self._check_held()

    def _on_worker(self, event: WorkerUp) -> None:
        if self._relay is None and self._setup_message and self._setup_message.restarted:
            return  # it has been there for longer than we have
        self.events.add(WorkerStarted(worker=event.worker, pid=event.pid, restarts=event.restarts))

    def _check_held(self) -> None:
        if self._setup_message and len(self._held) >= self._setup_message.have:
            self._all_held.set()

    def _on_worker_up(self) -> None:
        self._worker_up.set()
        if self._reconciler:
            self._reconciler.trigger()

    def _on_hops(self) -> None:
        if self._reconciler:
            self._reconciler.hops_changed()

    def _on_end(self, error: BadMessage | None) -> None:
        log.error("the supervisor is gone" if error is None else f"bad message: {error}")
        self._end(1)

    def _end(self, status: int) -> None:
        if not self._ended.done():
            self._ended.set_result(status)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """A task whose failure ends the process; the supervisor starts another."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.critical("control failed", exc_info=error)
            self._end(1)

    # ---- life ---------------------------------------------------------------------------------------

    async def serve(self) -> int:
        """Bring up, serve, and return the exit status."""
        self._spawn(self._bring_up())
        status = await self._ended
        self.events.close()
        if status == 0:
            await asyncio.gather(*(server.stop() for server in (self._server, self._tcp) if server))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        return status

    async def _bring_up(self) -> None:
        try:
            await self._start()
        except ConfigError as error:
            log.error("the config can't be used:\n%s", _lines(error))
            self._end(EX_CONFIG)
        except (RequestFailed, OSError) as error:
            log.critical("cannot start: %s", error)
            self._end(1)

    async def _start(self) -> None:
        setup, fds = await self._setup
        self.events.add(ControlStarted(version=__version__, took_over=setup.restarted))
        await self._all_held.wait()
        book = await self._load(setup, StateFile(fds[0]), fds[1:])
        relay = book.relay
        file = "command line" if setup.workers is not None else setup.config or ""
        cores = choose_cores(relay.workers, os.sched_getaffinity(0), file)
        links = LinkTable(what for what in self._held if isinstance(what, OpenEgress))
        hops = NextHops(self._on_hops, self.supervisor.probe)
        await self._start_workers(cores, relay, restarted=setup.restarted)
        fast = self._fast_path(links, hops, relay.engine)
        settings = Settings(relay.gro, relay.ring_slots, fast is not None, relay.xdp)
        for problem in idle_xdp(relay.xdp, {rule.from_.interface for rule in book.rules}, fast is not None):
            log.warning("%s", problem)
        self._reconciler = Reconciler(
            self.supervisor,
            self.workers,
            links,
            book,
            hops,
            settings=settings,
            events=self.events,
            held=self._held,
            fast=fast,
        )
        await self._watch(links, self._reconciler, book)
        await self._wait_for_workers(len(cores))
        self._spawn(self._reconciler.run())
        self._spawn(hops.run())
        noticer, history = Noticer(self.events, links.name, fast), History(self.workers, book)

        async def sampled(sample: Sample) -> None:
            history.sampled(sample)
            await noticer.sampled(sample)

        sampler = Sampler(self.workers, sampled)
        self._spawn(sampler.run())
        self._spawn(_flush_logs())
        streams = Streams(self.supervisor, book, links, self._reconciler, self.events)
        self._spawn(streams.run())
        stats = Stats(self.workers, book, links, self._reconciler, sampler, fast, streams)
        host = Host(self._supervisor_started, *self._statm, self._landlock)
        observe = Observe(self.supervisor, links, stats, streams, book)
        self._relay = Relay(
            book,
            self._reconciler,
            self.workers,
            stats,
            host,
            self.supervisor,
            self.events,
            observe,
            history,
            self._why(book, links, stats, sampler, self._reconciler),
            self._no_fast_path if fast is None else "",
        )
        await self._reconciler.settled()
        await self._serve_api(self._relay, relay, fds[0], setup.state_dir)
        self._relay.ready = True
        self._reconciler.after_pass = self._after_pass
        self._said = self._status()
        self.supervisor.ready(self._said)
        self._after_pass()

    def _why(
        self, book: Rulebook, links: LinkTable, stats: Stats, sampler: Sampler, reconciler: Reconciler
    ) -> Why:
        segments, procnet = self._segments, self._procnet
        self._spawn(segments.run())
        return Why(
            Sources(book, reconciler, self.workers, links, stats, sampler, segments, self.supervisor, procnet)
        )

    async def _load(self, setup: Setup, file: StateFile, config_fds: list[int]) -> Rulebook:
        """The rules and settings to start with: what ran last, merged with the config file's edits."""
        saved = await asyncio.to_thread(file.load)
        config = await self._first_config(setup, saved, config_fds)
        old = saved or State()
        # A restarted control goes on with the slots and settings that the relay runs with.
        relay = override(config.relay, setup.engine, setup.workers)
        kept = old if setup.restarted and saved else State(old.rules, old.file_rules, relay=relay)
        book = Rulebook(kept, file, self.workers.read_rules, self.workers.read_links, self.events)
        # Without a config file nothing was edited, so nothing changes.
        edited = kept.file_rules if setup.config is None else config.rules
        rules = merge(kept.rules, kept.file_rules, edited)
        state = book.checked(rules, edited, setup.config or "")
        try:
            await book.change(state)
        except OSError as error:
            log.error("cannot write the state file: %s; rules can't be changed until that is cured", error)
            book.adopt(state)
        return book

    async def _first_config(self, setup: Setup, saved: State | None, fds: list[int]) -> Config:
        """The config file; a restarted control, whose relay forwards, does without a file that went bad."""
        try:
            return await _read_config(setup.config, fds)
        except ConfigError as error:
            if not setup.restarted or saved is None:
                raise
            _log_issues(error)
            return Config(relay=saved.relay, rules=saved.file_rules)

    async def _watch(self, links: LinkTable, reconciler: Reconciler, book: Rulebook) -> None:
        filled = asyncio.Event()
        interfaces = InterfaceWatch(links, self.events)

        def changed() -> None:
            interfaces.look(book.interfaces() if filled.is_set() else frozenset())
            reconciler.links_changed()

        self._spawn(LinkWatcher(links, changed).run(filled))
        await filled.wait()

    async def _start_workers(self, cores: tuple[int, ...], relay: RelaySettings, *, restarted: bool) -> None:
        try:
            fast = relay.engine != "uring"
            await self.supervisor.start_workers(cores, relay.flow_limit, relay.busy_poll, fast=fast)
        except RequestFailed as error:
            if not restarted:
                raise
            log.error("going on with the workers that run: %s", error)

    def _fast_path(self, links: LinkTable, hops: NextHops, engine: str) -> FastPath | None:
        """The fast path, if there is one. RequestFailed when there is none and the engine must be it."""
        if self._maps is None:
            if engine == "ebpf":
                raise RequestFailed(
                    0, f'engine = "ebpf": {self._no_fast_path}', 'set engine = "auto" to do without'
                )
            if engine == "auto":
                log.warning("no kernel fast path: %s; forwarding in user space", self._no_fast_path)
            return None
        self._fast = fast = FastPath(self._maps, links, hops.reached, pinned=self._pinned)
        fast.set_targets(self._targets)
        self._spawn(fast.run())
        return fast

    async def _wait_for_workers(self, count: int) -> None:
        try:
            async with asyncio.timeout(WORKERS_DEADLINE):
                while len(self.workers.live()) < count:
                    self._worker_up.clear()
                    await self._worker_up.wait()
        except TimeoutError:
            log.error("only %d of %d workers came up; going on", len(self.workers.live()), count)

    async def _serve_api(self, relay: Relay, settings: RelaySettings, directory: int, state_dir: str) -> None:
        app = create_app(relay)
        if settings.listen is not None:
            self._tcp = TcpListener(settings, self.supervisor, directory, state_dir)
            await self._tcp.open()
            self._spawn(self._tcp.run(app))
        mode = int(settings.socket_mode, 8) & 0o666  # nobody executes a socket
        listening, fd = await self.supervisor.listen(mode, settings.socket_group)
        door = UnixDoor(Access(listening.uid, listening.gid))
        self._server = Server(Guard(app, door, settings.listen_names), socket.socket(fileno=fd), UnixProtocol)
        self._spawn(self._server.run_here())

    def _status(self) -> str:
        up, rules = self._reconciler.rules_up() if self._reconciler else (0, 0)
        return f"{up} of {rules} rules up, {len(self.workers.live())} workers"

    def _after_pass(self) -> None:
        self._tell_status()
        if self._reconciler is not None:
            self._segments.follow(self._reconciler.plans)

    def _tell_status(self) -> None:
        if self._said != self._status():
            self._said = self._status()
            self.supervisor.status(self._said)

    async def _reload(self, event: Reload, fds: list[int]) -> None:
        await self._read_again(event, fds)
        if self._tcp is not None:
            await self._tcp.read_tokens()
        if self._relay is not None and self._relay.ready:
            self.supervisor.ready(self._status())

    async def _read_again(self, event: Reload, fds: list[int]) -> None:
        if self._relay is None or self._setup_message is None:
            for fd in fds:
                os.close(fd)
            log.warning("reload: still starting, nothing changed")
        elif event.problem or not fds:
            log.error("reload: %s; nothing changed", event.problem or "there is no config file")
        else:
            name = self._setup_message.config or ""
            try:
                config = await _read_config(name, fds)
                await self._relay.reload(config.rules, name)
                log.info("reload: %s", self._status())
            except ConfigError as error:
                _log_issues(error)
            except OSError as error:
                log.error("reload: cannot read the file or write the state: %s; nothing changed", error)


async def _flush_logs() -> None:
    while True:
        await asyncio.sleep(logs.WINDOW)
        logs.flush()


async def _read_config(name: str | None, fds: list[int]) -> Config:
    """The config in an open file; an empty one when there is no file."""
    if name is None or not fds:
        return Config()
    text = await asyncio.to_thread(_read_all, fds[0])
    return await asyncio.to_thread(load_config, text, name)


def _read_all(fd: int) -> str:
    with os.fdopen(fd, "rb") as file:
        return file.read().decode(errors="replace")


def _log_issues(error: ConfigError) -> None:
    log.error("config not taken, nothing changed:\n%s", _lines(error))


def _lines(error: ConfigError) -> str:
    """All issues in one message: none of them may be folded away."""
    return "\n".join(map(str, error.issues))


def _lock_in(state_dir: int) -> int:
    """Confine this process: from here on it may read what others wrote."""
    version = confine("control", directory=state_dir)
    if version == 0:
        log.warning("no Landlock here: seccomp and their users alone keep control and workers from files")
    return version


async def _run(sock: socket.socket, pulse: Pulse) -> int:
    beating = asyncio.create_task(_beat(pulse))
    status = await Control(sock, _lock_in).serve()
    beating.cancel()
    return status


async def _beat(pulse: Pulse) -> None:
    """Show the supervisor that the loop turns, until cancelled."""
    while True:
        pulse.beat()
        await asyncio.sleep(INTERVAL)


def main() -> int:
    """Run until told to stop; the exit status."""
    channel, pulse = settle("control")
    collect_less()
    return asyncio.run(_run(channel.sock, pulse))
