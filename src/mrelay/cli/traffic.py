"""`mrelay send` and `mrelay receive`: a test stream, and what became of it.

Called by the command line's app. Blocks until the stream ends, `--duration` is over or Ctrl-C.
The data goes to stdout, progress to stderr.
"""

import sys
from typing import Annotated

from cyclopts import Parameter, validators
from pydantic import ValidationError
from rich.console import Console
from rich.live import Live

from mrelay.cli.failure import USAGE, Failure
from mrelay.cli.options import AsJson
from mrelay.cli.output import print_json
from mrelay.model.endpoint import Input, Output
from mrelay.model.issue import issues_of
from mrelay.traffic.receiver import Receiver, latency_us
from mrelay.traffic.sender import Sender, SendPlan, SendResult
from mrelay.traffic.sockets import TrafficError
from mrelay.traffic.stop import Stop

_above_zero = validators.Number(gt=0)
Seconds = Annotated[
    float | None, Parameter(metavar="SECONDS", validator=_above_zero, help="Stop after this long.")
]
Count = Annotated[
    int | None, Parameter(metavar="N", validator=_above_zero, help="Stop after this many datagrams.")
]


def send(
    endpoint: Annotated[str, Parameter(help="Where to, as in a rule's 'to': eth0:[ff3e::1]:5000,ttl=8.")],
    *,
    rate: Annotated[float, Parameter(metavar="PPS", help="Datagrams a second.")] = 1000,
    size: Annotated[int, Parameter(metavar="BYTES", help="UDP payload of each.")] = 1000,
    count: Count = None,
    duration: Seconds = None,
    ttl: Annotated[
        int | None,
        Parameter(metavar="N", help="TTL or hop limit; without it a group's is 1, this link only."),
    ] = None,
    gso: Annotated[
        bool, Parameter(help="Let the kernel cut bursts into datagrams: cheaper, and they arrive in bursts.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Send until --count, --duration or Ctrl-C; then say how much that was."""
    try:
        plan = SendPlan(Output.parse(endpoint), rate, size, count, duration, ttl, gso)
        plan.check()
    except (ValidationError, TrafficError) as error:
        raise _usage(error) from error
    try:
        with Stop() as stop, _Progress() as progress, Sender(plan) as sender:
            result = sender.run(stop, 1.0, lambda so_far: progress.show(_sent_text(so_far)))
            if as_json:
                print_json(_sent_json(plan, result))
            else:
                print(_sent_text(result))
            sys.stdout.flush()  # while signals are still only noted
    except TrafficError as error:
        raise Failure(str(error)) from error


def receive(
    endpoint: Annotated[str, Parameter(help="What to receive, as in a rule's 'from': eth0:239.1.1.1:5000.")],
    *,
    source: Annotated[
        str | None, Parameter(metavar="ADDRESS", help="Take only this source (SSM): eth0:ADDRESS@GROUP:PORT.")
    ] = None,
    count: Count = None,
    duration: Seconds = None,
    interval: Annotated[
        float, Parameter(metavar="SECONDS", validator=_above_zero, help="Time between progress lines.")
    ] = 1.0,
    fail_on_loss: Annotated[bool, Parameter(help="Exit with 1 when datagrams were lost, or none came.")] = False,
    as_json: AsJson = False,
) -> int:
    """Receive until --count, --duration or Ctrl-C; then say what became of each stream.

    Latency is the kernel's receive time minus the time in the datagram: exact on one host, between two
    only as good as the synchronisation of their clocks. Loss before the first or after the last datagram
    that arrived cannot be seen.
    """
    try:
        wanted = _input(endpoint, source)
    except ValidationError as error:
        raise _usage(error) from error
    try:
        with Stop() as stop, _Progress() as progress, Receiver(wanted) as receiver:
            receiver.run(stop, duration, count, interval, lambda so_far: progress.show(_received_text(so_far)))
            if as_json:
                print_json({"endpoint": str(wanted), **receiver.summary()})
            else:
                print(_received_summary(wanted, receiver))
            sys.stdout.flush()  # while signals are still only noted
    except TrafficError as error:
        raise Failure(str(error)) from error
    return int(fail_on_loss and (receiver.lost > 0 or receiver.received == 0))


def _input(endpoint: str, source: str | None) -> Input:
    wanted = Input.parse(endpoint)
    if source is None:
        return wanted
    table = {name: value for name in ("interface", "address", "vlan") if (value := getattr(wanted, name))}
    return Input.model_validate({**table, "port": str(wanted.ports), "source": source})


def _usage(error: ValidationError | TrafficError) -> Failure:
    if isinstance(error, TrafficError):
        return Failure(str(error), status=USAGE)
    return Failure(*(str(issue) for issue in issues_of(error, key="ENDPOINT")), status=USAGE)


class _Progress:
    """One line on stderr that is rewritten on a terminal, and repeated anywhere else."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> "_Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, text: str) -> None:
        """Replace or add the line."""
        if self._console.is_terminal:
            self._live.update(text, refresh=True)
        else:
            self._console.print(text)


def _sent_text(result: SendResult) -> str:
    errors = f", {result.errors:,} sends retried" if result.errors else ""
    return f"sent {result.sent:,} in {result.seconds:.1f} s, {result.rate():,.0f}/s{errors}"


def _sent_json(plan: SendPlan, result: SendResult) -> dict[str, object]:
    return {
        "endpoint": str(plan.output),
        "stream": f"{result.stream:016x}",
        "sent": result.sent,
        "bytes": result.sent * plan.size,
        "seconds": round(result.seconds, 6),
        "pps": round(result.rate(), 1),
        "bps": round(result.rate() * plan.size * 8, 1),
        "errors": result.errors,
    }


def _received_text(receiver: Receiver) -> str:
    summary = receiver.summary()
    shown = [name for name in _SHOWN if summary[name] or name in _ALWAYS]
    return ", ".join(f"{name.replace('_', ' ')} {summary[name]:,}" for name in shown)


_ALWAYS = ("received", "lost", "reordered", "duplicates")
_SHOWN = (*_ALWAYS, "foreign", "socket_drops")


def _received_summary(wanted: Input, receiver: Receiver) -> str:
    if not receiver.received:
        return f"{_received_text(receiver)}\n{_nothing_arrived(wanted)}"
    lines = [_received_text(receiver)]
    for number, account in receiver.streams.items():
        latency = latency_us(account)
        lines.append(
            f"stream {number:016x}: received {account.received:,}, lost {account.lost:,}, latency "
            f"p50 {latency['p50']} µs, p99 {latency['p99']} µs, max {latency['max']} µs"
        )
    lines.append("(latency between two hosts is only as good as the synchronisation of their clocks)")
    return "\n".join(lines)


def _nothing_arrived(wanted: Input) -> str:
    return (
        f"Nothing arrived. `tcpdump -ni {wanted.interface} udp port {wanted.ports.low}` shows whether frames "
        "reach the interface; if they do, `nstat -az TcpExtIPReversePathFilter` shows whether the kernel "
        "drops them because there is no route back to their source."
    )
