"""A child's whole life: start, watch, stop, start again with the same state, leave nothing. See README.md.

Starts and ends processes of its own, through the product's supervisor.children. Needs root.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runnable alone: the shared half is one folder up

from lifecycle_orphans import cases, dies, product_child_dies, signal_first, signal_last
from lifecycle_state import restart_often, room, time_hand_over
from lifecycle_watch import (
    STATUS,
    asyncio_threads,
    can_choose_pids,
    ends_beside_bystander,
    hands_down_ignoring,
    kill_after_reuse,
    killed_together,
    reason_when,
)

from experiment import Experiment
from mrelay.counters_size import MAX_RULES
from mrelay.messages import Stop
from mrelay.supervisor.children import end_all
from processes import Trial, all_readable, open_descriptors, readable, running, zombies

REQUESTS: Final = ("Stop message", "SIGTERM", "SIGKILL")
# Which of them each kind of child obeys.
OBEYS: Final[dict[str, tuple[bool, bool, bool]]] = {
    "in good order": (True, True, True),
    "ignores Stop": (False, True, True),
    "ignores SIGTERM too": (False, False, True),
    "stopped (SIGSTOP)": (False, False, True),
    "in a busy loop": (False, True, True),
}
_OPTIONS: Final = {"ignores Stop": "deaf", "ignores SIGTERM too": "stubborn"}
_QUIET: Final = 0.2  # seconds in which what was asked to end and did not is taken to stay
_DEADLINE: Final = 0.5  # seconds for an orderly stop
_TOGETHER: Final = 8


def main() -> None:
    """Show, claim, say. Without a premise only the part is run that rests on it."""
    parts: dict[Callable[[Experiment], dict[str, float]], str | None] = {
        _watching: None,
        _pids: "pidfd",
        _stopping: None,
        _ending: "force",
        _state: "whole-state",
        _orphans: "order",
        _leaks: "clean-up",
    }
    premises = [premise for premise in parts.values() if premise]
    experiment = Experiment("poc_supervisor_lifecycle", __doc__, premises=premises)
    experiment.need_root()
    if not can_choose_pids():
        experiment.lacks("a writable /proc/sys/kernel/ns_last_pid (CONFIG_CHECKPOINT_RESTORE)")
    figures: dict[str, float] = {"descriptors": open_descriptors()}
    for part, premise in parts.items():
        if experiment.broken in (None, premise):
            figures |= part(experiment)
    if experiment.broken:
        experiment.finish(f"without {experiment.broken}")
    _nothing_left(experiment, figures)
    experiment.finish(
        f"{_TOGETHER} ends: {figures['pidfds']} pidfds, {figures['signals']} SIGCHLD, {figures['threads']} "
        f"threads in asyncio; all stopped in {figures['deadlines']:.1f} deadlines; state identical after "
        f"{figures['same']} of {figures['kills']} kills; nothing left after {figures['restarts']} restarts"
    )


# ---- watching -----------------------------------------------------------------------------------


def _watching(experiment: Experiment) -> dict[str, float]:
    count = _TOGETHER
    together = killed_together(count)
    ends, threads, watcher = asyncio_threads(count)
    by_pidfd, kept = ends_beside_bystander(count, for_any=False)
    by_any, stolen = ends_beside_bystander(count, for_any=True)
    experiment.table(
        f"{count} children killed at once, beside a process of somebody else's that exits with {STATUS}",
        ("method", "ends seen", "threads", "the other's status"),
        (
            ("pidfd in a selector", by_pidfd, 0, kept),
            (f"asyncio, Python {sys.version_info.major}.{sys.version_info.minor} ({watcher})", ends, threads, ""),
            ("SIGCHLD, one wait for each signal", together.waited, 0, ""),
            ("SIGCHLD, waitpid(-1) until none is left", by_any, 0, stolen),
        ),
    )
    experiment.claim(
        "each child has its own event by pidfd; SIGCHLD of several children is one signal, and one wait for it "
        "leaves the others as zombies",
        together.pidfds == by_pidfd == count > together.signals and together.left == count - together.waited > 0,
        f"{together.pidfds} pidfds readable, {together.signals} signal, {together.left} zombies of {count}",
    )
    experiment.claim(
        "waitpid(-1) takes the status of processes that others wait for; waiting by pidfd does not",
        (kept, stolen) == (STATUS, 0),
        f"exit {STATUS} is reported as {stolen} after waitpid(-1), as {kept} after waitid(P_PIDFD)",
    )
    ignored, default = reason_when(signal.SIG_IGN), reason_when(signal.SIG_DFL)
    inherited = hands_down_ignoring()
    experiment.claim(
        "SIGCHLD ignored by whoever started us is inherited, and then the kernel throws the status away",
        inherited and ignored == "exit status 0" and default == "exit status 3",
        f"exit 3 is '{ignored}' with it ignored, '{default}' without; inherited: {inherited}",
    )
    return {"pidfds": together.pidfds, "signals": together.signals, "threads": threads}


def _pids(experiment: Experiment) -> dict[str, float]:
    by_pidfd = experiment.broken != "pidfd"
    said, alive = kill_after_reuse(by_pidfd=by_pidfd)
    experiment.claim(
        "a kill meant for a child that is gone reaches nobody, even when a bystander has its PID",
        alive and said != "sent",
        f"by {'pidfd' if by_pidfd else 'PID'}: {said}; the bystander is {'alive' if alive else 'gone'}",
    )
    said, alive = kill_after_reuse(by_pidfd=False)
    experiment.claim("by its PID, the same kill ends the bystander", not alive, f"{said}")
    return {}


# ---- stopping -----------------------------------------------------------------------------------


def _obeys(request: str) -> list[bool]:
    """Which kinds of children end on this request."""
    with running([Trial(_OPTIONS.get(kind, "plain")) for kind in OBEYS]) as trials:
        _prepare(dict(zip(OBEYS, trials, strict=True)))
        for trial in trials:
            if request == "Stop message":
                trial.tell(Stop())
            else:
                trial.send_signal(signal.Signals[request])
        due = [t.pidfd for t, obeys in zip(trials, OBEYS.values(), strict=True) if obeys[REQUESTS.index(request)]]
        all_readable(due)
        ended = all_readable([trial.pidfd for trial in trials], _QUIET)
        return [trial.pidfd in ended for trial in trials]


def _prepare(trials: dict[str, Trial]) -> None:
    trials["in a busy loop"].say("spin")
    stopped = trials["stopped (SIGSTOP)"]
    stopped.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PIDFD, stopped.pidfd, os.WSTOPPED)


def _stopping(experiment: Experiment) -> dict[str, float]:
    columns = [_obeys(request) for request in REQUESTS]
    rows = dict(zip(OBEYS, zip(*columns, strict=True), strict=True))
    shown = [(kind, *("ends" if ended else "-" for ended in row)) for kind, row in rows.items()]
    experiment.table("Who ends on what", ("child", *REQUESTS), shown)
    experiment.claim(
        "a request to stop ends only a child in good order; SIGKILL ends every kind, a stopped one too",
        rows == OBEYS,
        ", ".join(f"{name} {sum(column)}/{len(column)}" for name, column in zip(REQUESTS, columns, strict=True)),
    )
    with Trial() as trial:
        for number in (signal.SIGINT, signal.SIGHUP):
            trial.send_signal(number)
        trial.say("digest")
        experiment.claim(
            "what a terminal sends to its whole group ends no child: the supervisor decides",
            bool(trial.answer()),
            "answered after SIGINT and SIGHUP",
        )
    return {}


def _ending(experiment: Experiment) -> dict[str, float]:
    """One deadline for all of them together."""
    with running([Trial(_OPTIONS.get(kind, "plain")) for kind in OBEYS]) as trials:
        _prepare(dict(zip(OBEYS, trials, strict=True)))
        start = time.monotonic()
        if experiment.broken == "force":
            for trial in trials:
                trial.tell(Stop())
            ended = all_readable([trial.pidfd for trial in trials], _DEADLINE)
            statuses = [0 if trial.pidfd in ended else None for trial in trials]
        else:
            end_all(list(trials), Stop(), _DEADLINE)
            statuses = [trial.status for trial in trials]
        took = time.monotonic() - start
    experiment.claim(
        "Stop, one deadline for all, then SIGKILL: the orderly child ends by itself, and nobody is left",
        statuses == [0] + [-signal.SIGKILL] * (len(OBEYS) - 1) and took < 3 * _DEADLINE,
        f"statuses {statuses} after {took / _DEADLINE:.2f} deadlines",
    )
    return {"deadlines": took / _DEADLINE}


# ---- state --------------------------------------------------------------------------------------


def _state(experiment: Experiment) -> dict[str, float]:
    restarts = restart_often(6 if experiment.short else 20, whole=experiment.broken != "whole-state")
    experiment.claim(
        "a new worker has the parent's state, rules and socket, whatever the last one was in the middle of",
        restarts.same == restarts.kills,
        f"same hash after {restarts.same} of {restarts.kills} kills, {restarts.cut} of them inside a change",
    )
    experiment.claim(
        "a change that was half told is not in force anywhere: only Commit puts it there",
        restarts.whole == restarts.cut > 0,
        f"{restarts.whole} of {restarts.cut} looks in between showed the old state",
    )
    plain, forced, rules = room(forced=False), room(forced=True), 1000
    took = time_hand_over(rules)
    experiment.table(
        "Handing over the state",
        ("", "rules"),
        (
            ("a channel holds before its reader reads, default buffer", plain),
            ("the same, SO_SNDBUFFORCE 16 MiB", forced),
            ("in force after one second", f"{rules / took:,.0f}"),
        ),
    )
    experiment.claim(
        "the state of the most rules fits into a channel whose reader has not even started; with the default "
        "buffer it does not",
        plain < MAX_RULES < forced,
        f"{plain} rules fit by default, {forced} when forced; most: {MAX_RULES}",
    )
    return {"same": restarts.same, "kills": restarts.kills}


# ---- the parent's end, and what is left -----------------------------------------------------------


def _orphans(experiment: Experiment) -> dict[str, float]:
    order = signal_first if experiment.broken == "order" else signal_last
    rows = [(case, dies(case)) for case in cases(order)]
    experiment.table(
        "A child whose parent is killed, with PR_SET_PDEATHSIG",
        ("", "expected", "seen"),
        [(case.name, *("dies" if x else "lives on" for x in (case.dies, seen))) for case, seen in rows],
    )
    own, traps = rows[0], rows[1:]
    experiment.claim(
        "set after the change of user, the signal takes the child along when its parent is killed",
        own[1],
        "the child died" if own[1] else "the child lived on",
    )
    experiment.claim(
        "its traps: a change of user or a fork clears it, it comes when the thread ends that made the child, it "
        "does not come to a child that its parent might not kill, or that sets it too late",
        all(seen == case.dies for case, seen in traps),
        "; ".join(f"{case.name}: {'dies' if seen else 'lives on'}" for case, seen in traps),
    )
    seen = {
        (word, signalled): product_child_dies(word, death_signal=signalled)
        for word in ("wake", "block")
        for signalled in (True, False)
    }
    experiment.claim(
        "the channel's end covers what the signal misses, but not a child that hangs: both are needed",
        seen == {("wake", True): True, ("wake", False): True, ("block", True): True, ("block", False): False},
        f"without the signal: waiting child {'ends' if seen['wake', False] else 'stays'}, hung child "
        f"{'ends' if seen['block', False] else 'stays'}; with it both end",
    )
    return {}


def _leaks(experiment: Experiment) -> dict[str, float]:
    count = 50 if experiment.short else 300
    before = open_descriptors()
    trial = Trial(program=["true"])
    for _ in range(count):
        trial.start()
        readable([trial.pidfd])
        if experiment.broken != "clean-up":
            trial.ended()
    after, left, threads = open_descriptors(), zombies(), threading.active_count()
    experiment.claim(
        "restarts leave no zombie, no descriptor and no thread",
        (after, left, threads) == (before, 0, 1),
        f"{count} restarts: {after - before:+} descriptors, {left} zombies, {threads} thread",
    )
    return {"restarts": count}


def _nothing_left(experiment: Experiment, figures: dict[str, float]) -> None:
    grown, left = open_descriptors() - figures["descriptors"], zombies()
    experiment.claim(
        "all of the above together leave nothing either",
        (grown, left) == (0, 0),
        f"{grown:+} descriptors, {left} zombies",
    )


if __name__ == "__main__":
    main()
