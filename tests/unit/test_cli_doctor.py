"""`mrelay doctor`: each finding from a host that is put there, and one look at the real one."""

import errno
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from fake_relay import FakeRelay, Run
from mrelay.cli import host
from mrelay.cli.doctor import fix, interfaces, sysctls
from mrelay.cli.doctor.finding import Finding
from mrelay.ebpf import load
from mrelay.ebpf.carry import CHOSEN
from mrelay.kernel import caps, ethtool, libbpf, netdev

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
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A host with nothing to find fault with; each test breaks one thing."""
    values = {
        "net.ipv4.igmp_max_memberships": 20,
        "net.ipv4.igmp_max_msf": 10,
        "net.ipv6.mld_max_msf": 64,
        "net.core.rmem_max": 1 << 25,
        "net.core.wmem_max": 212992,
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
    monkeypatch.setattr(ethtool, "features", lambda _: {interfaces.GRO: OFF, interfaces.SEGMENTATION: ON})
    monkeypatch.setattr("os.uname", lambda: Uname("6.18.1"))
    monkeypatch.setattr(netdev, "xdp_features", dict)
    monkeypatch.setattr("resource.getrlimit", lambda _: (1 << 20, 1 << 20))
    monkeypatch.setattr(host, "clock_synchronised", lambda: True)
    monkeypatch.setattr(host, "has_program", lambda _: True)
    monkeypatch.setattr(host, "cores", lambda: frozenset(range(4)))
    _fake_trees(monkeypatch, tmp_path)


def _fake_trees(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """/proc and /sys with one interface of two queues, whose interrupts are on core 0, and a control group."""
    monkeypatch.setattr(host, "PROC", root / "proc")
    monkeypatch.setattr(host, "SYS_NET", root / "sys/class/net")
    monkeypatch.setattr(host, "CLOCK_SOURCE", root / "clocksource0")
    monkeypatch.setattr(host, "CGROUPS", root / "cgroup")
    put(root, "proc/self/status", "Name:\tx\nSeccomp:\t0\n")
    put(root, "proc/self/cgroup", "0::/system.slice/mrelay.service\n")
    put(root, "clocksource0/current_clocksource", "kvm-clock\n")
    put(root, "clocksource0/available_clocksource", "kvm-clock tsc acpi_pm\n")
    for number, queue in ((24, "rx-0"), (25, "rx-1")):
        put(root, f"proc/irq/{number}/smp_affinity_list", "0-3\n")
        put(root, f"proc/irq/{number}/effective_affinity_list", "0\n")
        put(root, f"sys/class/net/eth0/device/msi_irqs/{number}", "msix\n")
        put(root, f"sys/class/net/eth0/queues/{queue}/rps_cpus", "0\n")


def at_work(relay: FakeRelay, changes: dict[str, object] | None = None, core: int = 3) -> None:
    """A relay with one worker on this core."""
    relay.answer("GET /v1/health", HEALTH | (changes or {}))
    relay.answer("GET /v1/workers", {"workers": [{"core": core}]})


def put(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def findings(run: Run, *, status: int = 0) -> dict[str, Finding]:
    """What `doctor --json` finds, by check; asserts the exit status."""
    result = run("doctor", "--json")
    assert (result.status, result.err) == (status, "")
    return {each["check"]: Finding(**each) for each in json.loads(result.out)["checks"]}


def test_a_good_host(run: Run, relay: FakeRelay) -> None:
    at_work(relay)
    found = findings(run)
    assert {each.verdict for each in found.values()} == {"ok"}
    assert found["relay"].found == "0.1.0 is ready, engine ebpf, egress io_uring, seccomp and Landlock ABI 7"
    assert "offloads of lo" not in found
    assert "switches GRO on" in found["offloads of eth0"].consequence


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
        ("libbpf.available", "libbpf.so.1 is not installed", "libbpf", "apt-get install -y libbpf1"),
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
    assert remedy in found.remedy + found.command


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
    at_work(relay, {"engine": "uring", "no_fast_path": problem})
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
    assert says in found.remedy + found.command
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
    at_work(relay, {"landlock": 0})
    found = findings(run)
    assert (found["landlock"].verdict, found["seccomp"].verdict) == ("warn", "ok")
    assert "no Landlock" in found["relay"].found


def test_a_host_without_seccomp(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "seccomp_available", lambda: False)
    assert findings(run, status=1)["seccomp"].verdict == "bad"


def test_a_user_that_is_not_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "user_exists", lambda name: name == "mrelay")
    found = findings(run)["user mrelay-worker"]
    assert (found.verdict, found.found) == ("warn", "absent")
    assert found.command == "useradd --system --shell /usr/sbin/nologin mrelay-worker"


def test_sysctls(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"net.ipv4.igmp_max_memberships": 0, "net.core.rmem_max": 212992, "net.core.bpf_jit_enable": 0}
    monkeypatch.setattr(host, "sysctl", values.get)
    found = findings(run, status=1)
    assert found["net.ipv4.igmp_max_memberships"].command == "sysctl -w net.ipv4.igmp_max_memberships=20"
    assert found["net.ipv4.igmp_max_msf"].verdict == "bad"
    assert found["net.core.rmem_max"].verdict == "warn"
    assert found["net.core.bpf_jit_enable"].command == "sysctl -w net.core.bpf_jit_enable=1"


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
    monkeypatch.setattr(ethtool, "features", lambda _: {} if missing else {interfaces.GRO: fixed})
    assert findings(run)["offloads of eth0"].verdict == "warn"


def test_a_relay_that_sends_without_io_uring(run: Run, relay: FakeRelay) -> None:
    at_work(relay, {"egress": "sendmmsg"})
    assert findings(run)["relay"].verdict == "warn"


@pytest.mark.parametrize("row", sysctls.TABLE, ids=lambda row: row.name)
def test_each_sysctl_that_is_too_low(run: Run, monkeypatch: pytest.MonkeyPatch, row: sysctls.Least) -> None:
    before = host.sysctl
    monkeypatch.setattr(host, "sysctl", lambda name: row.least - 1 if name == row.name else before(name))
    found = findings(run, status=int(row.verdict == "bad"))[row.name]
    assert (found.verdict, found.found) == (row.verdict, str(row.least - 1))
    assert found.command == f"sysctl -w {row.name}={row.set_to}"
    assert row.set_to >= row.least


def test_interrupts_on_a_workers_core(run: Run, relay: FakeRelay, tmp_path: Path) -> None:
    at_work(relay, core=0)
    found = findings(run)["receiving on eth0"]
    assert (found.verdict, found.found) == ("warn", "2 receive queues, interrupts on 0")
    assert found.command == "sh -c 'for n in 24 25; do echo 1 > /proc/irq/$n/smp_affinity_list; done'"
    for number in (24, 25):
        put(tmp_path, f"proc/irq/{number}/effective_affinity_list", "1\n")
    assert findings(run)["receiving on eth0"].verdict == "ok"


def test_interrupts_of_a_virtio_interface(run: Run, relay: FakeRelay, tmp_path: Path) -> None:
    """They are its parent's."""
    at_work(relay, core=0)
    shutil.rmtree(tmp_path / "sys/class/net/eth0/device")
    put(tmp_path, "sys/devices/pci/msi_irqs/24", "msix\n")
    (tmp_path / "sys/devices/pci/virtio1").mkdir()
    (tmp_path / "sys/class/net/eth0/device").symlink_to(tmp_path / "sys/devices/pci/virtio1")
    assert findings(run)["receiving on eth0"].command.startswith("sh -c 'for n in 24; do")


def test_receive_packet_steering_is_shown(run: Run, relay: FakeRelay, tmp_path: Path) -> None:
    at_work(relay)
    put(tmp_path, "sys/class/net/eth0/queues/rx-1/rps_cpus", "00000000,00000005\n")
    assert findings(run)["receiving on eth0"].found == "2 receive queues, interrupts on 0, RPS to 0,2"


@pytest.mark.parametrize(
    ("bits", "says"), [(0, "not in its driver"), (1, "receiving only"), (5, "receiving and sending")]
)
def test_xdp(run: Run, monkeypatch: pytest.MonkeyPatch, bits: int, says: str) -> None:
    monkeypatch.setattr(host, "interface_index", lambda _: 7)
    monkeypatch.setattr(netdev, "xdp_features", lambda: {7: bits})
    found = findings(run)["XDP of eth0"]
    assert found.verdict == "ok"
    assert says in found.found


def test_offloads_that_can_be_switched(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {interfaces.GRO: ON, interfaces.SEGMENTATION: OFF, "rx-lro": ON}
    monkeypatch.setattr(ethtool, "features", lambda _: here)
    found = findings(run)
    assert found["offloads of eth0"].command == "ethtool -K eth0 tx-udp-segmentation on"
    assert found["LRO of eth0"].command == "ethtool -K eth0 lro off"


@pytest.mark.parametrize(
    ("file", "text", "check", "says"),
    [
        ("cpu.max", "50000 100000", "processor time", "0.5 cores"),
        ("memory.max", "134217728", "memory", "bytes"),
        ("pids.max", "20", "processes and threads", "20 tasks"),
    ],
)
def test_a_control_group_that_bounds(
    run: Run, tmp_path: Path, file: str, text: str, check: str, says: str
) -> None:
    put(tmp_path, f"cgroup/system.slice/mrelay.service/{file}", "max 100000" if file == "cpu.max" else "max")
    assert findings(run)[check].verdict == "ok"
    put(tmp_path, f"cgroup/system.slice/{file}", text)  # the group above counts as well
    found = findings(run)[check]
    assert found.verdict == "warn"
    assert says in found.found
    assert found.remedy


def test_limits_of_the_process(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (64, 1024))
    found = findings(run)
    assert found["descriptors"].verdict == "warn"
    assert found["locked memory"].verdict == "ok"
    monkeypatch.setattr("os.uname", lambda: Uname("5.10.0"))
    assert findings(run)["locked memory"].verdict == "warn"


def test_a_clock_that_nobody_keeps_right(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "clock_synchronised", lambda: False)
    assert findings(run)["clock"].command == "timedatectl set-ntp true"
    monkeypatch.setattr(host, "has_program", lambda _: False)
    found = findings(run)["clock"]
    assert (found.verdict, found.command) == ("warn", "")
    assert "chrony" in found.remedy


def test_a_slow_clock_source(run: Run, tmp_path: Path) -> None:
    put(tmp_path, "clocksource0/current_clocksource", "acpi_pm\n")
    found = findings(run)["clock source"]
    assert (found.verdict, found.found) == ("warn", "acpi_pm")
    assert "echo tsc >" in found.command


def test_every_fault_says_what_follows_and_what_to_do(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "sysctl", lambda _: 0)
    monkeypatch.setattr(host, "clock_synchronised", lambda: False)
    monkeypatch.setattr(host, "user_exists", lambda _: False)
    monkeypatch.setattr("resource.getrlimit", lambda _: (64, 64))
    monkeypatch.setattr("os.uname", lambda: Uname("5.4.0"))
    faults = [each for each in findings(run, status=1).values() if each.verdict != "ok"]
    assert len(faults) > 8
    assert [each for each in faults if not each.consequence or not (each.remedy or each.command)] == []


# ---- --fix -----------------------------------------------------------------------------------------


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host that lacks both users, and root's useradd, which makes the second only."""
    users = tmp_path / "users"
    users.touch()
    monkeypatch.setattr(host, "user_exists", lambda name: name in users.read_text().splitlines())
    monkeypatch.setattr("os.geteuid", lambda: 0)
    program = tmp_path / "bin/useradd"
    put(
        tmp_path,
        "bin/useradd",
        "#!/bin/sh\nfor name; do :; done\n"
        f'[ $name = mrelay ] && {{ echo "no room"; exit 9; }}\necho $name >> {users}\n',
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return users


def test_fix_runs_what_it_shows_and_looks_again(run: Run, lacking: Path) -> None:
    result = run("doctor", "--fix")
    shown = "useradd --system --shell /usr/sbin/nologin"
    assert result.status == 1, "one of the two failed"
    assert f"→ {shown} mrelay-worker" in result.out
    assert f"failed (9): {shown} mrelay  no room" in result.out
    assert f"done: {shown} mrelay-worker" in result.out
    after = result.out.partition("looked again:")[2]
    assert "warn  user mrelay: absent" in after
    assert "ok    user mrelay-worker: there" in after
    assert lacking.read_text() == "mrelay-worker\n"


def test_fix_as_json(run: Run, lacking: Path) -> None:
    result = run("doctor", "--fix", "--json")
    answer = json.loads(result.out)
    assert [done["status"] for done in answer["fixes"]] == [9, 0]
    assert {each["check"]: each["verdict"] for each in answer["checks"]}["user mrelay-worker"] == "ok"


def test_without_fix_nothing_is_run(run: Run, lacking: Path) -> None:
    assert run("doctor").status == 0
    assert lacking.read_text() == ""


def test_fix_with_nothing_to_fix(run: Run) -> None:
    assert "nothing to fix" in run("doctor", "--fix").out


def test_fix_without_root_or_sudo(run: Run, lacking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda _: None)
    result = run("doctor", "--fix")
    assert (result.status, lacking.read_text()) == (77, "")
    assert "run it as root" in result.err


def test_fix_asks_sudo_for_root(run: Run, lacking: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    put(tmp_path, "bin/sudo", '#!/bin/sh\nshift; exec "$@"\n')
    (tmp_path / "bin/sudo").chmod(0o755)
    run("doctor", "--fix")
    assert lacking.read_text() == "mrelay-worker\n"


def test_a_command_is_run_once(run: Run) -> None:
    one = Finding("a", "warn", "", command="true")
    assert fix.fixable([one, one, Finding("b", "ok", "", command="false"), Finding("c", "bad", "")]) == [one]


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
    assert isinstance(host.clock_synchronised(), bool)
    assert host.clock_sources()[0] in ["", *host.clock_sources()[1]]
    assert all(host.interrupts(name).keys() >= set() for name in host.interfaces())
    assert host.receive_queues("lo").keys() <= {"rx-0"}
    assert host.cgroup_bound("no.such") is None
    assert host.seccomp_mode() in (0, 2)
    assert host.holds(caps.CAP_KILL) <= host.may_hold(caps.CAP_KILL)
