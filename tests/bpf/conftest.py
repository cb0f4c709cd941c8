"""Fixtures of the kernel programs' tests. (Without the privileges they are skipped by tests/conftest.py.)"""

from collections.abc import Iterator

import pytest

from bpf_rig import HOP_SOURCE, FastPath, packed
from conftest import effective_capabilities
from mrelay.ebpf import load
from mrelay.kernel import libbpf
from netns.lab import Lab, Namespace

CAP_PERFMON, CAP_BPF = 38, 39  # linux/capability.h


@pytest.fixture(autouse=True)
def can_load() -> None:
    """Skips where programs can't be loaded, by name of what lacks."""
    for lacking in (libbpf.available(), load.missing()):
        if lacking:
            pytest.skip(lacking)
    mask = effective_capabilities()
    for name, bit in (("CAP_BPF", CAP_BPF), ("CAP_PERFMON", CAP_PERFMON)):
        if not mask >> bit & 1:
            pytest.skip(f"needs {name}")


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A laboratory that is cleared away after the test."""
    with Lab() as made:
        yield made


@pytest.fixture
def home(lab: Lab) -> Iterator[Namespace]:
    """A namespace without sockets, that the test is in."""
    namespace = lab.namespace("home")
    with namespace.inside():
        yield namespace


@pytest.fixture
def path(home: Namespace) -> Iterator[FastPath]:
    """A fast path whose hop 0 sends from HOP_SOURCE."""
    with FastPath() as made:
        made.set_hop(source=packed(HOP_SOURCE))
        yield made
