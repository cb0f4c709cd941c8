"""`mrelay doctor`: is this host fit for a relay, and what to change if not.

Called by the command line. Each area has a file of its own with a table of looks (`LOOKS`), each of which yields
Findings. Looks at the host (host.py) and asks a running relay, if there is one, which may block for the client's
timeout. Changes nothing, unless told to with --fix (fix.py).
"""

from dataclasses import asdict
from typing import Annotated, Final

from cyclopts import Parameter
from rich.console import RenderableType
from rich.text import Text

from mrelay.cli import output
from mrelay.cli.client import Client
from mrelay.cli.doctor import container, fastpath, fix, interfaces, kernel, privileges, relay, sysctls
from mrelay.cli.doctor.finding import VERDICTS, Finding
from mrelay.cli.failure import FAILED
from mrelay.cli.options import DEFAULT_SOCKET, AsJson, Socket

_COLOURS: Final = {"ok": "green", "warn": "yellow", "bad": "red"}
_AREAS: Final = (kernel, privileges, fastpath, sysctls, interfaces, container)
_PASSING: Final = "What sysctl, ethtool, mount and writes to /proc set lasts until the next boot."

ToFix = Annotated[
    bool, Parameter(name="--fix", help="Run the commands that are shown, as root (by sudo), and look again.")
]


def doctor(*, to_fix: ToFix = False, as_json: AsJson = False, socket: Socket = DEFAULT_SOCKET) -> int:
    """Print every finding; 1 when one of them is bad, or a command of --fix failed."""
    client = Client(socket)
    findings = _look(client)
    wanted = fix.fixable(findings) if to_fix else []
    if to_fix and not as_json:
        output.print_view(_view(findings))
    fixes = _fix(wanted, quiet=as_json) if wanted else []
    if wanted:
        findings = _look(client)
    if as_json:
        extra = {"fixes": [asdict(done) for done in fixes]} if to_fix else {}
        output.print_json({"verdict": _worst(findings), "checks": [asdict(each) for each in findings]} | extra)
    else:
        _print_outcome(findings, fixes, to_fix)
    return FAILED if _worst(findings) == "bad" or any(done.status for done in fixes) else 0


def _fix(wanted: list[Finding], *, quiet: bool) -> list[fix.Fix]:
    """Run the commands; say of each what it did as soon as it is over."""
    fixes: list[fix.Fix] = []
    for done in fix.run(wanted):
        fixes.append(done)
        if not quiet:
            outcome = f"failed ({done.status})" if done.status else "done"
            print(f"{outcome}: {done.command}  {done.said}".rstrip(), flush=True)
    return fixes


def _print_outcome(findings: list[Finding], fixes: list[fix.Fix], to_fix: bool) -> None:
    """All findings; after --fix only what became of those that it was to mend."""
    if not to_fix:
        output.print_view(_view(findings))
    elif not fixes:
        print("nothing to fix by a command")
    else:
        mended = {done.check for done in fixes}
        print("looked again:")
        output.print_view(_view([finding for finding in findings if finding.check in mended]))
        print(_PASSING)


def _look(client: Client) -> list[Finding]:
    found = [finding for area in _AREAS for look in area.LOOKS for finding in look()]
    return [*found, *interfaces.placement(relay.worker_cores(client)), *relay.findings(client)]


def _worst(findings: list[Finding]) -> str:
    verdicts = {finding.verdict for finding in findings}
    return next(verdict for verdict in VERDICTS if verdict in verdicts)


def _view(findings: list[Finding]) -> RenderableType:
    parts: list[RenderableType] = []
    for finding in findings:
        parts.append(
            Text.assemble(
                (f"{finding.verdict:4}", f"bold {_COLOURS[finding.verdict]}"),
                f"  {finding.check}: ",
                (finding.found, "bold"),
            )
        )
        parts += [f"      {text}" for text in (finding.consequence,) if text]
        parts += [f"      → {text}" for text in (finding.remedy, finding.command) if text]
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in _COLOURS}
    return output.stack(*parts, ", ".join(f"{number} {verdict}" for verdict, number in counts.items()))
