"""The stages that a rule's stream passes, in order, and what each one says of the facts.

Owns the one table of stages, `STAGES`, and `judge`, which walks it and stops at the first that fails. Pure; called
by control/why.py. Each stage says what it saw and, when it fails, the one thing to do next.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from mrelay.diagnose import arrival, departure
from mrelay.diagnose.facts import UP, Facts
from mrelay.diagnose.finding import FAILED, SKIPPED, Finding

Verdict = Literal["forwarding", "partly", "not forwarding"]

STAGES: Final[tuple[tuple[str, Callable[[Facts], Finding]], ...]] = (
    ("rule", arrival.rule),
    ("interface", arrival.interface),
    ("membership", arrival.membership),
    ("querier", arrival.querier),
    ("frames", arrival.frames),
    ("headers", arrival.headers),
    ("workers", departure.workers),
    ("loop", departure.loop),
    ("limits", departure.limits),
    ("outputs", departure.outputs),
    ("flow", departure.flow),
    ("receivers", departure.receivers),
    ("forwarding", departure.forwarding),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """`stage`: the one that failed, empty when none did. `findings`: by stage in order, also those not reached."""

    verdict: Verdict
    stage: str
    summary: str
    findings: dict[str, Finding]


def judge(facts: Facts) -> Answer:
    """Walk the stages."""
    findings: dict[str, Finding] = {}
    failed = ""
    for name, look in STAGES:
        findings[name] = Finding(SKIPPED, "not looked at") if failed else look(facts)
        if not failed and findings[name].status == FAILED:
            failed = name
    verdict = _verdict(facts, failed)
    return Answer(verdict, failed, findings[failed or STAGES[-1][0]].text, findings)


def _verdict(facts: Facts, failed: str) -> Verdict:
    if not failed:
        return "forwarding"
    return "partly" if any(output.sent and output.state == UP for output in facts.outputs) else "not forwarding"
