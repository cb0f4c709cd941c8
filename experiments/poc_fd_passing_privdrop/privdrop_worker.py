"""The unprivileged side: started anew by exec, it drops its privileges, then gets a ring by its channel.

Run by privdrop_host.py with the channel's descriptor and how to drop ("all", "keep CAP_NET_RAW", "nothing").
It obeys words on standard input and answers each with one line of JSON on standard output:

    status    its ids, capability sets and descriptors
    receive   take the ring from the channel, count frames up to the marker
    seize     try everything that would give it a privilege again
    setuid    run the program that the next word names; what it prints
    misuse    try what else the passed ring lets it do (the next word: another interface's index)
    confine   put on the relay's seccomp filter as well
    look      the next message of its channel, "nothing" or "end", without waiting
"""

import ctypes
import errno
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from mrelay.kernel import caps, cbpf, packet, seccomp
from mrelay.messages import Granted, OpenIngress
from mrelay.wire import Channel

NOBODY: Final = 65534
WORDS: Final = ("status", "receive", "seize", "setuid", "confine", "misuse", "look")
MARKER: Final = b"marker"
FORGED: Final = 0x88B5  # ethertype for local experiments (IEEE 802)
GROUP: Final = 0xEF010101  # 239.1.1.1
IP_TRANSPARENT: Final = 19  # linux/in.h
CLONE_NEWUSER: Final = 0x10000000  # linux/sched.h
PR_CAP_AMBIENT_RAISE: Final = 2  # linux/prctl.h
_LINUX_CAPABILITY_VERSION_3: Final = 0x20080522  # linux/capability.h
# linux/if_packet.h
PACKET_ADD_MEMBERSHIP: Final = 1
PACKET_MR_PROMISC: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)


def drop(how: str) -> None:
    """Become nobody for good; the two other ways are the mistakes that the experiment must notice."""
    if how == "all":
        caps.drop_privileges(NOBODY, NOBODY)
    elif how == "keep CAP_NET_RAW":
        os.setgroups([])
        caps.prctl(caps.PR_SET_KEEPCAPS, 1)
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        capset(1 << caps.CAP_NET_RAW)
        caps.prctl(caps.PR_SET_NO_NEW_PRIVS, 1)


def capset(mask: int) -> None:
    """Permitted and effective set to `mask` (low 32 capabilities), inheritable to nothing."""
    header = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, struct.pack("=6I", mask, mask, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "capset")


def attempt(action: Callable[..., Any], *arguments: Any) -> str:
    """The word "allowed", or the error's name."""
    try:
        action(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "allowed"


def call(name: str, *arguments: Any) -> None:
    """A libc function by its bare arguments, since Python looks an interface up by more calls."""
    if getattr(_libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


class Worker:
    """One worker; its public methods are the words that it obeys."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._ring: socket.socket | None = None

    def status(self) -> dict[str, Any]:
        names = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Threads")
        lines = Path("/proc/self/status").read_text().splitlines()
        return {name: value.split() for name, value in (line.split(":", 1) for line in lines) if name in names}

    def receive(self) -> dict[str, Any]:
        """The ring comes deaf; its filter is ours to set, and needs no privilege."""
        got = self._channel.receive()
        assert got is not None and isinstance(got[0], Granted) and isinstance(got[0].what[0], OpenIngress)
        (fd,), slots = got[1], got[0].what[0].slots
        inherited = os.get_inheritable(fd)
        self._ring = socket.socket(fileno=fd)
        memory = packet.map_ring(fd, slots, packet.SLOT)
        cbpf.attach_group_filter(self._ring, [(GROUP, GROUP)], [])
        say({"inheritable": inherited, "filter": "attached"})
        return {"received": self._count(memory, slots), "ring_full": packet.ring_drops(self._ring)}

    def _count(self, memory: Any, slots: int) -> int:
        assert self._ring is not None
        for n in range(slots):
            base = n * packet.SLOT
            while not packet.TPACKET2_HDR.unpack_from(memory, base)[0] & packet.TP_STATUS_USER:
                if not select.select([self._ring], [], [], 5.0)[0]:
                    return n
            _, _, length, link, *_ = packet.TPACKET2_HDR.unpack_from(memory, base)
            if MARKER in memory[base + packet.L3_OFFSET : base + link + length]:
                return n
        return slots

    def seize(self) -> dict[str, str]:
        return {
            "AF_PACKET socket": attempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0),
            "raw IP socket": attempt(socket.socket, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP),
            "IP_TRANSPARENT": attempt(_make_transparent),
            "another network namespace": attempt(os.open, "/proc/1/ns/net", os.O_RDONLY),
            "AF_PACKET in a user namespace": forked(lambda: attempt(_packet_socket_as_namespace_root)),
            "setuid": attempt(os.setuid, 0),
            "setresuid": attempt(os.setresuid, 0, 0, 0),
            "setgid": attempt(os.setgid, 0),
            "setgroups": attempt(os.setgroups, [0]),
            "capset": attempt(capset, 1 << caps.CAP_NET_RAW),
            "ambient capability": attempt(caps.prctl, caps.PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, caps.CAP_NET_RAW),
            "no_new_privs off": attempt(caps.prctl, caps.PR_SET_NO_NEW_PRIVS, 0),
        }

    def setuid(self) -> str:
        program = sys.stdin.readline().strip()
        return subprocess.run(
            [program, "-u"], capture_output=True, text=True, check=False, timeout=10
        ).stdout.strip()

    def confine(self) -> str:
        return attempt(seccomp.restrict, {**seccomp.WORKER, "read": ()})  # read: for our words on standard input

    def misuse(self) -> dict[str, str]:
        """`ring`: as the relay passes it; `bare`: a packet socket that only was bound, the next message's."""
        got = self._channel.receive()
        assert self._ring is not None and got is not None
        ring, bare, elsewhere = self._ring.fileno(), got[1][0], int(sys.stdin.readline())
        promisc = struct.pack("=iHH8x", elsewhere, PACKET_MR_PROMISC, 0)  # struct packet_mreq
        # behind a virtio-net header, since the ring was set up with PACKET_VNET_HDR
        frame = bytes(10) + b"\xff" * 6 + b"\x02" + bytes(5) + FORGED.to_bytes(2, "big") + b"forged".ljust(46)
        to = struct.pack("=HHiHBB8x", socket.AF_PACKET, socket.htons(FORGED), elsewhere, 0, 0, 0)  # sockaddr_ll
        return {
            "bind the ring elsewhere": attempt(call, "bind", ring, to, len(to)),
            "bind a bare socket elsewhere": attempt(call, "bind", bare, to, len(to)),
            "send any frame elsewhere": attempt(_send, ring, frame, to),
            "promiscuous mode": attempt(
                call, "setsockopt", ring, packet.SOL_PACKET, PACKET_ADD_MEMBERSHIP, promisc, len(promisc)
            ),
        }

    def look(self) -> str:
        self._channel.sock.setblocking(False)
        try:
            return "end" if self._channel.receive() is None else "message"
        except BlockingIOError:
            return "nothing"


def _send(fd: int, data: bytes, to: bytes) -> None:
    """One sendmsg(2), which a worker needs for its work."""
    text, name = ctypes.create_string_buffer(data, len(data)), ctypes.create_string_buffer(to, len(to))
    iovec = (ctypes.c_uint64 * 2)(ctypes.addressof(text), len(data))
    message = struct.pack("=QI4xQQQQi4x", ctypes.addressof(name), len(to), ctypes.addressof(iovec), 1, 0, 0, 0)
    call("sendmsg", fd, message, 0)


def _make_transparent() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)


def _packet_socket_as_namespace_root() -> None:
    """In a user namespace of one's own one has every capability, but over what belongs to that alone."""
    if _libc.unshare(CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), "unshare")
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()


def forked(action: Callable[[], str]) -> str:
    """What `action` says in a process of its own, which it may spoil."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, action().encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as answer:
        said = answer.read()
    os.waitpid(pid, 0)
    return said


def say(answer: Any) -> None:
    """One line to the host."""
    print(json.dumps(answer), flush=True)


def main() -> None:
    """Drop, then obey until standard input ends."""
    fd, how = int(sys.argv[1]), sys.argv[2]
    start = time.perf_counter()
    drop(how)
    say({"drop_ms": (time.perf_counter() - start) * 1e3})
    worker = Worker(Channel(socket.socket(fileno=fd)))
    while word := sys.stdin.readline().strip():
        assert word in WORDS
        say(getattr(worker, word)())


if __name__ == "__main__":
    main()
