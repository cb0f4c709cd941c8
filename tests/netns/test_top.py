"""`mrelay top` on a terminal of its own: it draws, follows the relay and quits."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

import pytest

from netns.lab import Lab
from netns.relay import Relay, rule

pytestmark = pytest.mark.netns


def test_a_terminal_of_80_columns(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay, rule("studio-a", "in0:239.1.1.1:5000", "out0:239.2.2.2:6000")) as relay:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        command = [sys.executable, "-m", "mrelay", "top", "--socket", str(relay.socket)]
        environment = {**os.environ, "TERM": "xterm-256color"}
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
            os.close(theirs)
            read_until(ours, "studio-a")
            relay.add_rule("another", "in0:239.1.1.2:5000", "out0:239.2.2.3:6000")
            read_until(ours, "another")
            os.write(ours, b"q")
            read_until(ours, "\x1b[?1049l")  # the terminal's own screen is back
            assert process.wait(10) == 0
        os.close(ours)


def read_until(terminal: int, text: str, seconds: float = 20) -> None:
    seen, deadline = "", time.monotonic() + seconds
    while text not in re.sub(r"\x1b\[[0-9;]*m", "", seen):
        assert select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0], f"no {text}: {seen!r}"
        seen += os.read(terminal, 65536).decode(errors="replace")
