"""What every test gets: tests that lack a privilege are skipped by name; Hypothesis has no deadlines."""

import logging
import os
from collections.abc import Iterator
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `netns` where namespaces cannot be built."""
    reason = why_no_netns()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("netns"):
            item.add_marker(pytest.mark.skip(reason=reason))
