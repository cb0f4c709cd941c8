"""Who notices the end of the other side, and what a forgotten copy of an end does to that.

Called by poc_fd_passing_privdrop.py. Nothing is timed: a process that was waited for has closed everything, so
its peer's channel says so now or never.
"""

import contextlib
import signal
import subprocess
from collections.abc import Iterator

from privdrop_host import Host, Network

from experiment import Experiment


def show_death(experiment: Experiment, host: Host) -> None:
    """Kill the worker: does its host hear of it?"""
    host.end()
    noticed = host.hung_up()
    experiment.claim(
        "The worker's death is the end of its channel: the host has closed the worker's end",
        noticed,
        f"after SIGKILL the host's end says {'end' if noticed else 'nothing'}",
    )


def show_mistakes(experiment: Experiment, network: Network) -> None:
    """The host's death as the worker sees it, and the two ways to hide a death."""
    with Host(network, "all") as host:
        host.channel.close()
        plain = host.ask("look")
    experiment.claim(
        "The host's death is the end of the worker's channel",
        plain == "end",
        f"after the host closed, the worker's end says {plain}",
    )
    with Host(network, "all", keep_theirs=True) as host:
        host.end()
        kept = host.hung_up()
        assert host.theirs is not None
        host.theirs.close()
        closed = host.hung_up()
    experiment.claim(
        "A host that keeps the worker's end never hears of its death; only a pidfd or wait() tells",
        not kept and closed,
        f"heard while it kept it: {kept}, once that is closed: {closed}",
    )
    with Host(network, "all") as host:
        with sibling(host.channel.fileno()):
            host.channel.close()
            hidden = host.ask("look")
        shown = host.ask("look")
    experiment.claim(
        "A sibling that inherited the host's end hides the host's death from the worker, until it ends itself",
        (hidden, shown) == ("nothing", "end"),
        f"the worker's end says {hidden} while the sibling lives, {shown} after",
    )


@contextlib.contextmanager
def sibling(fd: int) -> Iterator[None]:
    """Another program with a copy of `fd`, until killed; it also ends when we do, by the end of its input."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[fd]) as child:
        try:
            yield
        finally:
            child.send_signal(signal.SIGKILL)
