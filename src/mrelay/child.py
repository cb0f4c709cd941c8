"""How a child of the supervisor settles into its role: parent's death, privileges, logging, channel.

Owns that order. Called once by control and by each worker, after their imports (which an unprivileged user
may not be able to read any more). Standard library and mrelay.kernel only.
"""

import logging
import signal
import socket
import sys

from mrelay.kernel.caps import drop_privileges, set_parent_death_signal
from mrelay.messages import Channel


def settle(role: str) -> Channel:
    """Become unprivileged for good; the channel to the supervisor. Exits when the drop fails.

    Arguments of the process: the channel's descriptor, the uid and the gid to become.
    """
    logging.basicConfig(level=logging.INFO, format=f"mrelay {role}: %(message)s", stream=sys.stderr)
    fd, uid, gid = (int(text) for text in sys.argv[1:4])
    drop_privileges(uid, gid)
    set_parent_death_signal(signal.SIGKILL)  # cleared by the change of uid, so set after it
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to the whole group; the supervisor decides
    return Channel(socket.socket(fileno=fd))
