"""The privileged side: starts workers by exec, opens sockets for them and passes them on.

Owns the network (a source and the relay's namespace, two links) and the workers' processes, which end with
it. `Host.ask` blocks until the worker answers, ten seconds at most.
"""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final, Self

from privdrop_worker import MARKER

from mrelay.demo.topology import End, Namespace, connect
from mrelay.kernel import packet
from mrelay.messages import Granted, Message, OpenIngress
from mrelay.wire import Channel, channel_pair

WORKER: Final = Path(__file__).resolve().with_name("privdrop_worker.py")
SLOTS: Final = 256
COUNT: Final = 50  # datagrams
TO: Final = ("239.1.1.1", 5000)
ANSWER: Final = 10.0  # seconds


class Network:
    """A source, and the relay's namespace with the interfaces in0 and other0. A context manager."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as on_failure:
            self.source, self.relay = (on_failure.enter_context(Namespace()) for _ in range(2))
            for namespace in (self.source, self.relay):
                namespace.bring_up("lo")
            connect(End(self.source, "s0", "10.77.1.1"), End(self.relay, "in0", "10.77.1.2"))
            connect(End(self.source, "o0", "10.77.2.1"), End(self.relay, "other0", "10.77.2.2"))
            with self.relay.inside():
                self.other = socket.if_nametoindex("other0")
            self._stack = on_failure.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def send(self) -> None:
        """`COUNT` datagrams and the marker, into in0."""
        with self.source.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("10.77.1.1"))
            for _ in range(COUNT):
                sock.sendto(b"data", TO)
            sock.sendto(MARKER, TO)

    def open_ring(self) -> tuple[Granted, socket.socket]:
        """The relay's own ring on in0, and the message that goes with it."""
        with self.relay.inside():
            index = socket.if_nametoindex("in0")
            ring, _ = packet.open_ring(index, SLOTS, packet.SLOT, None, shared=False)
        return Granted((OpenIngress(index, SLOTS),), used=False), ring

    def open_bare(self) -> socket.socket:
        """A packet socket that is bound to in0 and nothing else."""
        with self.relay.inside():
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            sock.bind(("in0", packet.ETH_P_ALL))
            return sock


class Host:
    """One worker in the relay's namespace, and our end of its channel. A context manager.

    `keep_theirs`: the mistake of keeping the worker's end too.
    """

    def __init__(self, network: Network, how: str, *, keep_theirs: bool = False) -> None:
        start = time.perf_counter()
        ours, theirs = channel_pair()
        with network.relay.inside():
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER), str(theirs.fileno()), how],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                bufsize=0,
            )
        self.worker_fd = theirs.fileno()
        self.theirs = theirs if keep_theirs else None
        if not keep_theirs:
            theirs.close()
        self.channel = Channel(ours)
        self.drop_ms: float = self._answer()["drop_ms"]
        self.start_ms = (time.perf_counter() - start) * 1e3

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self.channel.close()
        if self.theirs is not None:
            self.theirs.close()

    def end(self) -> None:
        """Kill it, and wait until all it had open is closed."""
        self.process.kill()
        self.process.communicate()

    def tell(self, *words: str) -> None:
        """Give orders without waiting for the answers."""
        assert self.process.stdin is not None
        self.process.stdin.write("".join(word + "\n" for word in words).encode())

    def ask(self, *words: str) -> Any:
        """Give an order; the answer."""
        self.tell(*words)
        return self._answer()

    def answer(self) -> Any:
        """The next answer to what was told before."""
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        ready = select.select([self.process.stdout], [], [], ANSWER)[0]
        line = self.process.stdout.readline() if ready else b""
        if not line:
            self.end()
            raise RuntimeError("the worker gave no answer; what it wrote to standard error is above")
        return json.loads(line)

    def grant(self, message: Message, sock: socket.socket) -> None:
        """Pass the socket and close our copy of it."""
        with sock:
            self.channel.send(message, [sock.fileno()])

    def hung_up(self) -> bool:
        """Whether our end says that the other is gone; not when somebody still has it open."""
        self.channel.sock.setblocking(False)
        try:
            return self.channel.receive() is None
        except BlockingIOError:
            return False

    def descriptors(self) -> set[int]:
        """What the worker has open (/proc/PID/fd)."""
        return {int(name) for name in os.listdir(f"/proc/{self.process.pid}/fd")}
