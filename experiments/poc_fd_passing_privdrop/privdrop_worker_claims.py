"""What the worker is, what it can do with what it was given, and what it can't get back.

Called by poc_fd_passing_privdrop.py. Blocks for the worker's answers.
"""

import contextlib
import ctypes
import os
import select
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from privdrop_host import COUNT, Host, Network
from privdrop_worker import FORGED, NOBODY, attempt, forked

from experiment import Experiment
from mrelay.messages import Stop

PIDFD_GETFD: Final = 438  # asm-generic/unistd.h
CAPABILITY_SETS: Final = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_libc = ctypes.CDLL(None, use_errno=True)


def show(experiment: Experiment, network: Network, host: Host) -> str:
    """Make the claims; "received/sent" in words."""
    received = _claim_received(experiment, network, host)
    _claim_nobody(experiment, host.ask("status"))
    _claim_no_way_back(experiment, host)
    _claim_alone(experiment, host)
    _claim_misuse(experiment, network, host)
    return f"{received} of {COUNT}"


def _claim_received(experiment: Experiment, network: Network, host: Host) -> int:
    before = host.descriptors()
    message, ring = network.open_ring()
    host.tell("receive")
    host.grant(message, ring)
    ready = host.answer()
    network.send()
    got = host.answer()
    held = host.descriptors()
    experiment.claim(
        "It receives on the ring that was passed, and sets its filter itself",
        (got["received"], got["ring_full"], ready["filter"]) == (COUNT, 0, "attached"),
        f"{got['received']} of {COUNT} frames, {got['ring_full']} lost",
    )
    experiment.claim(
        "It holds standard input, output and error, its channel and the ring; nothing of its host's is inherited",
        before == {0, 1, 2, host.worker_fd} and len(held - before) == 1 and before < held,
        f"{len(before)} descriptors at its start, {len(held)} now",
    )
    return int(got["received"])


def _claim_nobody(experiment: Experiment, status: dict[str, list[str]]) -> None:
    wanted = {"Uid": [str(NOBODY)] * 4, "Gid": [str(NOBODY)] * 4, "Groups": [], "NoNewPrivs": ["1"]}
    full = {name: status[name][0] for name in CAPABILITY_SETS if int(status[name][0], 16)}
    experiment.claim(
        "It is nobody: ids, no groups, no_new_privs, and all five capability sets empty",
        all(status[name] == value for name, value in wanted.items()) and not full,
        ", ".join(f"{name} {' '.join(status[name]) or 'none'}" for name in wanted)
        + f"; capability sets that are not empty: {full or 'none'}",
    )


def _claim_no_way_back(experiment: Experiment, host: Host) -> None:
    answers = host.ask("seize")
    opened = {name: answers.pop(name) for name in list(answers) if name.startswith(("AF_PACKET", "raw", "IP_TR"))}
    experiment.claim(
        "It can open no packet socket, not even from a user namespace of its own, and no raw one",
        all(answer == "EPERM" for answer in opened.values()),
        _words(opened),
    )
    with setuid_program() as program:
        became = host.ask("setuid", program)
        without = subprocess.run(
            [program, "-u"],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            capture_output=True,
            text=True,
            check=False,
        )
    experiment.claim(
        "The drop can't be undone, also not by a setuid program",
        all(answer in ("EPERM", "EACCES", "EINVAL") for answer in answers.values()) and became == str(NOBODY),
        f"{_words(answers)}; uid in a setuid-root program {became}, without no_new_privs {without.stdout.strip()}",
    )


def _claim_alone(experiment: Experiment, host: Host) -> None:
    """PR_SET_DUMPABLE 0 guards what it holds from other programs of user nobody."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, user=NOBODY, group=NOBODY, extra_groups=[]) as other:
        worker, plain = _steal(host.process.pid, host.worker_fd), _steal(other.pid, 0)
        other.kill()
    experiment.claim(
        "Another process of the same user can't take its descriptors (pidfd_getfd)",
        worker == "EPERM",
        f"from the worker: {worker}; from a plain process of that user: {plain}",
    )


def _steal(pid: int, fd: int) -> str:
    def take() -> None:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        if _libc.syscall(PIDFD_GETFD, os.pidfd_open(pid), fd, 0) < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")

    return forked(lambda: attempt(take))


def _claim_misuse(experiment: Experiment, network: Network, host: Host) -> None:
    """What a worker that was taken over could do with the ring: this bounds what the split is worth."""
    free, forged = _misuse(network, host)
    experiment.claim(
        "A packet socket that is passed can be bound to any interface; the relay's ring, in a fanout group, can't",
        (free["bind a bare socket elsewhere"], free["bind the ring elsewhere"]) == ("allowed", "EINVAL"),
        _words(free),
    )
    confined = host.ask("confine")
    if confined == "allowed":
        bound, forged_again = _misuse(network, host)
        refused = {name: answer for name, answer in bound.items() if name != "send any frame elsewhere"}
        experiment.claim(
            "The relay's seccomp filter takes away bind and what else a packet socket can be told to do",
            set(refused.values()) == {"EPERM"},
            _words(refused),
        )
        forged = forged and forged_again
    experiment.claim(
        "Whoever has the ring can send any frame on any interface of its namespace: passing it gives that away",
        forged,
        f"a forged frame was {'' if forged else 'not '}seen on another interface's cable; "
        f"seccomp filter: {'the same' if confined == 'allowed' else confined}",
    )


def _misuse(network: Network, host: Host) -> tuple[dict[str, str], bool]:
    """The worker's answers, and whether its frame came out of other0."""
    with network.source.inside():
        witness = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        witness.bind(("o0", FORGED))
    with witness:
        host.grant(Stop(), network.open_bare())
        answers = host.ask("misuse", str(network.other))
        return answers, bool(select.select([witness], [], [], 3.0)[0])


@contextlib.contextmanager
def setuid_program() -> Iterator[str]:
    """A copy of id(1) that belongs to root and has the setuid bit."""
    source = shutil.which("id")
    assert source is not None
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        copy = Path(shutil.copy(source, folder))
        copy.chmod(0o4755)
        yield str(copy)


def _words(answers: dict[str, Any]) -> str:
    return ", ".join(f"{name} {answer}" for name, answer in answers.items())
