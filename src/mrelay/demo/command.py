"""`mrelay demo`: the promise shown on this machine, in network namespaces that only the demo sees.

Owns the order of things. Called by the command line's app. Blocks until the demo is over; everything
it made is gone when it returns, however it ends.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators
from rich.console import Console

from mrelay.cli.failure import INTERRUPTED, NOT_PERMITTED, Failure
from mrelay.cli.options import AsJson
from mrelay.cli.output import print_json
from mrelay.demo.kernel_route import KernelRoute
from mrelay.demo.processes import Relay
from mrelay.demo.report import KernelReport, Report
from mrelay.demo.stream import Plan, Stream
from mrelay.demo.topology import RP_FILTER, SOURCE, Topology
from mrelay.demo.view import Moment, View
from mrelay.traffic.stop import Stop
from mrelay.traffic.stream import HEADER_SIZE

GROUP = "239.1.1.1"
STREAM_TO = f"s0:{GROUP}:5000"
OUTPUT_GROUPS = ["239.2.2.1:6000", "239.2.2.2:6000"]
CONFIG = f"""\
[[rule]]
name = "demo"
from = "in0:{GROUP}:5000"
to = ["out1:{OUTPUT_GROUPS[0]}", "out2:{OUTPUT_GROUPS[1]}"]
"""
_KERNEL_SECONDS = 2.0  # enough to see that nothing comes
_COUNTERS_SECONDS = 3.0  # how long the relay's counters may lag behind its packets

_whole_datagram = validators.Number(gte=HEADER_SIZE, lte=1472)  # one frame of 1,500 bytes each
_above_zero = validators.Number(gt=0)


def demo(
    *,
    seconds: Annotated[float, Parameter(validator=_above_zero, help="How long the relay gets the stream.")] = 10,
    rate: Annotated[float, Parameter(metavar="PPS", validator=_above_zero, help="Datagrams a second.")] = 20000,
    size: Annotated[
        int, Parameter(metavar="BYTES", validator=_whole_datagram, help="UDP payload of each.")
    ] = 1000,
    no_kernel: Annotated[bool, Parameter(help="Leave out kernel multicast routing.")] = False,
    as_json: AsJson = False,
) -> int:
    """Run it and say what came of it: exit 0 when nothing was lost and the relay's counters add up."""
    plan = Plan(rate, size, max(1, int(rate * seconds)))
    with Stop() as stop, _permitted(), contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mrelay-demo-")))
        folder.chmod(0o755)  # the relay's control role and workers are not root
        network = stack.enter_context(Topology())
        view = stack.enter_context(View(Console(stderr=as_json, markup=False, highlight=False)))
        show = _Show(network, folder, view, stop)
        view.say(f"{SOURCE} sends to {GROUP}; the relay host has no route back to it (rp_filter={RP_FILTER})")
        kernel = None if no_kernel else show.kernel(plan)
        report = show.relay(plan, kernel)
    if as_json:
        print_json(report.to_json())
    else:
        print("\n".join(report.lines()))
    return 0 if report.ok else 1


@dataclass(frozen=True)
class _Show:
    """The two halves of the demo, over one network."""

    network: Topology
    folder: Path
    view: View
    stop: Stop

    def kernel(self, plan: Plan) -> KernelReport | None:
        """The stream with kernel multicast routing on the relay host; None where the kernel has none."""
        short = Plan(plan.rate, plan.size, min(plan.count, max(1, int(plan.rate * _KERNEL_SECONDS))))
        try:
            with self.network.relay.inside():
                route = KernelRoute(SOURCE, GROUP, "in0", ["out1", "out2"])
        except OSError as error:
            self.view.say(f"kernel multicast routing left out, this kernel has none: {error.strerror}")
            return None
        with route, Stream(self.network, [f"{GROUP}:5000"] * 2) as stream:
            sent, end = self._run(stream, short, "kernel", lambda: None)
        return KernelReport(sent, end.receivers, end.reverse_path_drops)

    def relay(self, plan: Plan, kernel: KernelReport | None) -> Report:
        """The stream with the relay on the same host."""
        with (
            Relay(self.network.relay, self.folder, CONFIG) as relay,
            Stream(self.network, OUTPUT_GROUPS) as stream,
        ):
            relay.wait_for_line("ready", self.stop)
            if self.stop.requested:
                raise Failure("interrupted before the relay was asked for anything", status=INTERRUPTED)
            sent, end = self._run(stream, plan, "mrelay", relay.stats)
            report = Report(sent, end.receivers, relay.stats(), kernel)
            deadline = time.monotonic() + _COUNTERS_SECONDS
            while not report.counters_add_up and time.monotonic() < deadline:
                time.sleep(0.05)
                report = Report(sent, end.receivers, relay.stats(), kernel)
            return report

    def _run(
        self, stream: Stream, plan: Plan, what: str, stats: Callable[[], dict[str, Any] | None]
    ) -> tuple[int, Moment]:
        """Run `stream`, showing it; how many were sent, and the last moment."""
        drops_before = self.network.relay.reverse_path_drops()

        def moment(seconds: float) -> Moment:
            drops = self.network.relay.reverse_path_drops() - drops_before
            return Moment(what, seconds, stream.readings(), drops, stats())

        log = self.folder / "send.log"
        start = time.monotonic()
        sent = stream.run(
            plan, STREAM_TO, log, self.stop, self.view.every, lambda now: self.view.show(moment(now))
        )
        return sent, moment(time.monotonic() - start)


@contextlib.contextmanager
def _permitted() -> Iterator[None]:
    """Say in one line what it needs where namespaces can't be made."""
    remedy = "run `sudo mrelay demo`" if os.geteuid() else "this root lacks CAP_SYS_ADMIN, as in most containers"
    try:
        yield
    except PermissionError as error:
        raise Failure(
            f"the demo builds network namespaces and may not ({error}): {remedy}", status=NOT_PERMITTED
        ) from error
