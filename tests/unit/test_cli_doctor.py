"""`mrelay doctor`: each finding from a host that is put there, and one look at the real one."""

import errno
import json
from pathlib import Path
from typing import NamedTuple

import pytest

from fake_relay import FakeRelay, Run
from mrelay.cli import doctor, host
from mrelay.cli.doctor import Finding
from mrelay.ebpf import load
from mrelay.ebpf.carry import CHOSEN
from mrelay.kernel import caps, ethtool, libbpf

HEALTH = {
    "ready": True,
    "version": "0.1.0",
    "pid": 1,
    "engine": "ebpf",
    "no_fast_path": "",
    "egress": "io_uring",
    "uptime": 3.0,
    "landlock": 7,
}
OFF = ethtool.Feature(available=True, requested=False, active=False, never_changed=False)
ON = ethtool.Feature(available=True, requested=True, active=True, never_changed=False)


class Uname(NamedTuple):
    """The part of os.uname() that counts."""

    release: str


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with nothing to find fault with; each test breaks one thing."""
    values = {
        "net.ipv4.igmp_max_memberships": 20,
        "net.ipv4.igmp_max_msf": 10,
        "net.core.rmem_max": 1 << 25,
        "kernel.io_uring_disabled": 0,
        "net.core.bpf_jit_enable": 1,
    }
    monkeypatch.setattr(host, "sysctl", values.get)
    monkeypatch.setattr(libbpf, "available", lambda: "")
    monkeypatch.setattr(libbpf, "is_bpffs", lambda _: True)
    monkeypatch.setattr(load, "missing", lambda: "")
    monkeypatch.setattr(host, "try_io_uring", lambda: 0)
    monkeypatch.setattr(host, "holds", lambda _: True)
    monkeypatch.setattr(host, "may_hold", lambda _: True)
    monkeypatch.setattr(host, "landlock_abi", lambda: 7)
    monkeypatch.setattr(host, "seccomp_available", lambda: True)
    monkeypatch.setattr(host, "user_exists", lambda _: True)
    monkeypatch.setattr(host, "interfaces", lambda: ["eth0", "lo"])
    monkeypatch.setattr(
        host, "interface_flags", lambda name: host.IFF_UP | (host.IFF_LOOPBACK if name == "lo" else 0)
    )
    monkeypatch.setattr(host, "reverse_path_filters", lambda: {"eth0": 2, "lo": 0})
    monkeypatch.setattr(host, "multicast_routing_interfaces", list[str])
    monkeypatch.setattr(ethtool, "features", lambda _: {doctor.GRO: OFF, doctor.SEGMENTATION: ON})
    monkeypatch.setattr("os.uname", lambda: Uname("6.18.1"))


def findings(run: Run, *, status: int = 0) -> dict[str, Finding]:
    """What `doctor --json` finds, by check; asserts the exit status."""
    result = run("doctor", "--json")
    assert (result.status, result.err) == (status, "")
    return {each["check"]: Finding(**each) for each in json.loads(result.out)["checks"]}


def test_a_good_host(run: Run, relay: FakeRelay) -> None:
    relay.answer("GET /v1/health", HEALTH)
    found = findings(run)
    assert {each.verdict for each in found.values()} == {"ok"}
    assert found["relay"].found == "0.1.0 is ready, engine ebpf, egress io_uring, seccomp and Landlock ABI 7"
    assert "offloads of lo" not in found
    assert "switches it on" in found["offloads of eth0"].consequence


def test_without_a_relay_the_host_is_still_judged(run: Run, tmp_path: Path) -> None:
    result = run("doctor", "--socket", str(tmp_path / "none.sock"))
    assert result.status == 0
    assert "no relay at" in result.out
    assert result.out.splitlines()[-1].endswith("0 bad")


@pytest.mark.parametrize(
    ("release", "verdict"), [("6.1.0-13", "ok"), ("5.15.0", "warn"), ("4.18.0-el8", "bad"), ("odd", "bad")]
)
def test_kernel(run: Run, monkeypatch: pytest.MonkeyPatch, release: str, verdict: str) -> None:
    monkeypatch.setattr("os.uname", lambda: Uname(release))
    found = findings(run, status=int(verdict == "bad"))
    assert found["kernel"].verdict == verdict
    assert found["kernel for the fast path"].verdict == ("ok" if verdict == "ok" else "warn")
    assert found["tc ingress"].found == "clsact"


@pytest.mark.parametrize(
    ("where", "says", "check", "remedy"),
    [
        ("libbpf.available", "libbpf.so.1 is not installed", "libbpf", "apt install libbpf1"),
        ("load.missing", "built without kernel programs", "kernel programs", "make"),
        ("is_bpffs", "", "BPF file system", "mount -t bpf -o mode=700 bpf /sys/fs/bpf"),
    ],
)
def test_what_the_fast_path_lacks(
    run: Run, monkeypatch: pytest.MonkeyPatch, where: str, says: str, check: str, remedy: str
) -> None:
    module = load if where.startswith("load") else libbpf
    monkeypatch.setattr(module, where.rpartition(".")[2], lambda *_: says)
    found = findings(run)[check]
    assert found.verdict == "warn"
    assert found.consequence
    assert remedy in found.remedy


@pytest.mark.parametrize(("cap", "says"), [(caps.CAP_BPF, "user space"), (caps.CAP_PERFMON, "CPU")])
def test_the_fast_paths_capabilities(run: Run, monkeypatch: pytest.MonkeyPatch, cap: int, says: str) -> None:
    monkeypatch.setattr(host, "may_hold", lambda asked: asked != cap)
    monkeypatch.setattr(host, "holds", lambda asked: asked != cap)
    found = findings(run)["capabilities for the fast path"]
    assert found.verdict == "warn"
    assert f"--cap-add {caps.NAMES[cap][4:]}" in found.remedy
    assert says in found.consequence


@pytest.mark.parametrize(("problem", "verdict"), [(CHOSEN, "ok"), ("libbpf.so.1 is not installed", "warn")])
def test_a_relay_without_the_fast_path(run: Run, relay: FakeRelay, problem: str, verdict: str) -> None:
    relay.answer("GET /v1/health", HEALTH | {"engine": "uring", "no_fast_path": problem})
    found = findings(run)["relay's fast path"]
    assert (found.verdict, found.found) == (verdict, f"none: {problem}")


@pytest.mark.parametrize(
    ("number", "disabled", "says"),
    [
        (errno.EPERM, 2, "sysctl -w kernel.io_uring_disabled=0"),
        (0, 1, "sysctl -w kernel.io_uring_disabled=0"),
        (errno.EPERM, 0, "seccomp"),
        (errno.ENOSYS, 0, "CONFIG_IO_URING"),
    ],
)
def test_io_uring(run: Run, monkeypatch: pytest.MonkeyPatch, number: int, disabled: int, says: str) -> None:
    before = host.sysctl
    monkeypatch.setattr(host, "try_io_uring", lambda: number)
    monkeypatch.setattr(
        host, "sysctl", lambda name: disabled if name == "kernel.io_uring_disabled" else before(name)
    )
    found = findings(run)["io_uring"]
    assert found.verdict == "warn"
    assert says in found.remedy
    assert "sendmmsg" in found.consequence


def test_a_withheld_capability_is_bad(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "may_hold", lambda cap: cap != caps.CAP_NET_RAW)
    found = findings(run, status=1)["capabilities"]
    assert found.verdict == "bad"
    assert "--cap-add NET_RAW" in found.remedy


def test_an_ordinary_user_is_told_to_use_sudo(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "holds", lambda _: False)
    found = findings(run)["capabilities"]
    assert found.verdict == "warn"
    assert "CAP_NET_RAW" in found.found
    assert "sudo mrelay run" in found.remedy


def test_a_host_without_landlock(run: Run, relay: FakeRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "landlock_abi", lambda: 0)
    relay.answer("GET /v1/health", HEALTH | {"landlock": 0})
    found = findings(run)
    assert (found["landlock"].verdict, found["seccomp"].verdict) == ("warn", "ok")
    assert "no Landlock" in found["relay"].found


def test_a_host_without_seccomp(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "seccomp_available", lambda: False)
    assert findings(run, status=1)["seccomp"].verdict == "bad"


def test_a_user_that_is_not_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "user_exists", lambda name: name == "mrelay")
    found = findings(run)["users"]
    assert (found.verdict, found.found) == ("warn", "no user mrelay-worker")
    assert found.remedy == "useradd --system --shell /usr/sbin/nologin mrelay-worker"


def test_sysctls(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"net.ipv4.igmp_max_memberships": 0, "net.core.rmem_max": 212992, "net.core.bpf_jit_enable": 0}
    monkeypatch.setattr(host, "sysctl", values.get)
    found = findings(run, status=1)
    assert found["net.ipv4.igmp_max_memberships"].remedy == "sysctl -w net.ipv4.igmp_max_memberships=20"
    assert found["net.ipv4.igmp_max_msf"].verdict == "bad"
    assert found["net.core.rmem_max"].verdict == "warn"
    assert found["net.core.bpf_jit_enable"].remedy == "sysctl -w net.core.bpf_jit_enable=1"


def test_strict_reverse_path_filter_is_no_matter_to_the_relay(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "reverse_path_filters", lambda: {"eth0": 1, "eth1": 2})
    found = findings(run)["rp_filter"]
    assert (found.verdict, found.found) == ("ok", "strict on eth0")


def test_kernel_multicast_routing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "multicast_routing_interfaces", lambda: ["eth0", "eth1"])
    found = findings(run)["kernel multicast routing"]
    assert (found.verdict, found.found) == ("warn", "active on eth0, eth1")


@pytest.mark.parametrize("missing", [True, False])
def test_an_interface_that_cannot_merge_frames(run: Run, monkeypatch: pytest.MonkeyPatch, missing: bool) -> None:
    fixed = ethtool.Feature(available=True, requested=False, active=False, never_changed=True)
    monkeypatch.setattr(ethtool, "features", lambda _: {} if missing else {doctor.GRO: fixed})
    assert findings(run)["offloads of eth0"].verdict == "warn"


def test_a_relay_that_sends_without_io_uring(run: Run, relay: FakeRelay) -> None:
    relay.answer("GET /v1/health", HEALTH | {"egress": "sendmmsg"})
    assert findings(run)["relay"].verdict == "warn"


def test_the_real_host_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert "lo" in host.interfaces()
    flags = host.interface_flags("lo")
    assert flags is not None
    assert flags & host.IFF_LOOPBACK
    assert host.interface_flags("no-such-if") is None
    assert (host.sysctl("net.core.rmem_max") or 0) > 0
    assert host.sysctl("net.core.no_such") is None
    assert set(host.reverse_path_filters()) == set(host.interfaces())
    assert isinstance(host.multicast_routing_interfaces(), list)
    assert host.try_io_uring() in (0, errno.EPERM, errno.ENOSYS)
    assert isinstance(host.has_btf(), bool)
    assert host.holds(caps.CAP_KILL) <= host.may_hold(caps.CAP_KILL)
