"""A running relay, if there is one: how it is, and on which cores its workers run.

Called by the package. Blocks for the client's timeout at most.
"""

import os
from collections.abc import Iterator
from typing import Any

from mrelay.cli.client import Client
from mrelay.cli.doctor.fastpath import NO_FAST_PATH
from mrelay.cli.doctor.finding import Finding
from mrelay.cli.failure import NOT_PERMITTED, Failure
from mrelay.control.settings import choose_cores
from mrelay.ebpf.carry import CHOSEN


def worker_cores(client: Client) -> frozenset[int]:
    """Those of the relay that runs, else those that one started here would take by itself."""
    try:
        return frozenset(worker["core"] for worker in client.get("/v1/workers")["workers"])
    except Failure:
        return frozenset(choose_cores("auto", os.sched_getaffinity(0), ""))


def findings(client: Client) -> Iterator[Finding]:
    """What it says of itself."""
    try:
        answer: dict[str, Any] = client.get("/v1/health")
    except Failure as failure:
        denied = failure.status == NOT_PERMITTED
        yield Finding("relay", "warn" if denied else "ok", "not asked", "; ".join(failure.lines))
        return
    yield _health(answer)
    if answer["engine"] != "ebpf":
        yield _no_fast_path(answer["no_fast_path"])


def _health(answer: dict[str, Any]) -> Finding:
    egress, state = answer["egress"], "ready" if answer["ready"] else "starting"
    landlock = f"Landlock ABI {answer['landlock']}" if answer["landlock"] else "no Landlock"
    said = f"{answer['version']} is {state}, engine {answer['engine']}, egress {egress}, seccomp and {landlock}"
    if egress == "sendmmsg":
        why = "its workers send without io_uring: works, costs more CPU"
        return Finding("relay", "warn", said, why, "see io_uring above, then systemctl restart mrelay")
    return Finding("relay", "ok", said)


def _no_fast_path(problem: str) -> Finding:
    if problem == CHOSEN:
        remedy = 'engine = "auto" under [relay], then systemctl restart mrelay'
        return Finding("relay's fast path", "ok", f"none: {problem}", "as it was told", remedy)
    remedy = "mend what the checks above say of it, then systemctl restart mrelay"
    return Finding("relay's fast path", "warn", f"none: {problem}", NO_FAST_PATH, remedy)
