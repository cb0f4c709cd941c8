"""What every test gets: tests that lack a privilege are skipped by name; Hypothesis has no deadlines.

Tests may run beside each other (pytest-xdist), except those marked `alone`: they come last, in one process, and
each waits until no other test runs. What a test says by `figures` is printed at the end.
"""

import contextlib
import fcntl
import logging
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

# linux/capability.h
CAP_NET_ADMIN = 12
CAP_NET_RAW = 13
CAP_SYS_ADMIN = 21

NETNS_CAPABILITIES = {
    "CAP_NET_ADMIN": CAP_NET_ADMIN,
    "CAP_NET_RAW": CAP_NET_RAW,
    "CAP_SYS_ADMIN": CAP_SYS_ADMIN,
}

# A shared machine stalls at will, so no example has a deadline; a build machine repeats the same examples.
settings.register_profile("mrelay", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("mrelay")

# A shell's job in the background ignores Ctrl-C, and so would all that is started here and told to end by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """A control process inside a test may be told another level, which is this process's, too."""
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


def effective_capabilities() -> int:
    """This process's effective capability mask (proc(5), /proc/pid/status)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("CapEff:")[2].split()[0], 16)


def why_no_netns() -> str | None:
    """What keeps this process from building network namespaces, or None."""
    if os.geteuid() != 0:
        return "needs root to build network namespaces (run: make test)"
    mask = effective_capabilities()
    missing = [name for name, bit in NETNS_CAPABILITIES.items() if not mask >> bit & 1]
    return f"needs {', '.join(missing)}, which this root lacks (a container?)" if missing else None


def pytest_xdist_auto_num_workers() -> int:
    """How many tests run at a time: more than processors, since most wait for something most of the time.

    No more than six: every relay has a worker for each processor.
    """
    return min(6, (os.cpu_count() or 1) * 3 // 2 + 1)


def is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `netns` where namespaces cannot be built; put what is marked `alone` last."""
    items.sort(key=is_alone)
    for item in filter(is_alone, items):
        item.add_marker(pytest.mark.xdist_group("alone"))
    reason = why_no_netns()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("netns"):
            item.add_marker(pytest.mark.skip(reason=reason))


@contextlib.contextmanager
def the_machine(*, alone: bool) -> Iterator[None]:
    """Share the machine with the other tests of this tree, or have it without them."""
    lock = os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)  # a child that the test forked may still have it
        os.close(lock)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Around everything, so that waiting takes no test's time."""
    with the_machine(alone=is_alone(item)):
        return (yield)


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Keeps a text for the end of the run; a test that runs beside others has no terminal."""
    return partial(record_property, "figures")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print them."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    calls = [report for report in reports if isinstance(report, pytest.TestReport) and report.when == "call"]
    said = {call.nodeid: [text for name, text in call.user_properties if name == "figures"] for call in calls}
    if any(said.values()):
        terminalreporter.section("figures")
    for nodeid, texts in said.items():
        for line in [nodeid, *(f"  {text}" for text in texts)] if texts else []:
            terminalreporter.write_line(line)
