"""`--fix`: runs the commands that the findings show, as root, one by one, and says what each did.

Called by the package. Blocks for as long as the commands take; sudo may ask for a password.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mrelay.cli.doctor.finding import Finding
from mrelay.cli.failure import NOT_PERMITTED, Failure


@dataclass(frozen=True)
class Fix:
    """One command that was run for `check`: its exit status, and the last line that it printed."""

    check: str
    command: str
    status: int
    said: str


def fixable(findings: Iterable[Finding]) -> list[Finding]:
    """Those that a command mends, one for each command."""
    wanted = {finding.command: finding for finding in findings if finding.command and finding.verdict != "ok"}
    return list(wanted.values())


def run(findings: Iterable[Finding]) -> Iterator[Fix]:
    """Run each finding's command; one that fails keeps none of the others from being run."""
    prefix = _as_root()
    for finding in findings:
        yield _run(finding, prefix)


def _as_root() -> list[str]:
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") is None:
        raise Failure("--fix needs root: run it as root, since there is no sudo here", status=NOT_PERMITTED)
    return ["sudo", "--"]


def _run(finding: Finding, prefix: list[str]) -> Fix:
    try:
        done = subprocess.run(
            [*prefix, *shlex.split(finding.command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
    except OSError as error:
        return Fix(finding.check, finding.command, 127, f"{error.filename}: {error.strerror}")
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    return Fix(finding.check, finding.command, done.returncode, lines[-1] if lines else "")
