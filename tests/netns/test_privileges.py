"""Who may do what: processes that touch packets or clients hold no privilege."""

import contextlib
import os
import pwd
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mrelay.ebpf.layout import MAPS, PROGRAMS_OWN
from mrelay.kernel import caps
from netns.lab import Lab, Namespace, eventually
from netns.relay import Relay, rule
from netns.traffic import Capture, Sender, payloads

pytestmark = pytest.mark.netns
EX_NOPERM = 77  # sysexits.h
GROUP = "239.1.1.1"
CONFIG = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")
AS_USER = (sys.executable, str(Path(__file__).with_name("as_user.py")))
AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
TWO_USERS = ("--user", "nobody", "--worker-user", "daemon")
# An ordinary user's supervisor; the system has no such user, and needs none.
UNIT_UID = 61234
UNIT_CAPS = (caps.CAP_NET_RAW, caps.CAP_NET_ADMIN, caps.CAP_SETUID, caps.CAP_SETGID, caps.CAP_KILL)
ROOT_WITHOUT_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


def at_work(relay: Relay, role: str) -> list[int]:
    """The processes of a role; not the spare worker, which waits and has read nothing yet."""
    return relay.role(role) if role == "control" else [worker["pid"] for worker in relay.workers()]


def status(pid: int) -> dict[str, list[str]]:
    """/proc/PID/status: the words behind each key."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: words.split() for key, words in (line.split(":", 1) for line in lines)}


@pytest.mark.parametrize("role", ["control", "worker"])
def test_unprivileged_roles(lab: Lab, role: str) -> None:
    star = lab.star()
    with Sender(star.source) as sender, Relay(star.relay, CONFIG) as relay:
        sender.send(GROUP, 5000, payloads(5))
        relay.await_received(5)
        pids = relay.role(role)
        assert pids, f"there is a process mrelay.{role}"
        for pid in pids:
            found = status(pid)
            for key in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
                assert int(found[key][0], 16) == 0, f"{role} has {key} {found[key][0]}"
            assert "0" not in found["Uid"] + found["Gid"] + found["Groups"], "neither root nor its groups"
            assert found["NoNewPrivs"] == ["1"]


def test_workers_are_confined_by_seccomp(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay, CONFIG) as relay:
        for pid in at_work(relay, "worker"):
            assert status(pid)["Seccomp"] == ["2"], "SECCOMP_MODE_FILTER"


def packet_sockets(relay: Relay) -> set[str]:
    """Inodes of the AF_PACKET sockets in the relay's namespace (/proc/net/packet)."""
    return {line.split()[-1] for line in relay.namespace.read("packet").splitlines()[1:]}


def open_sockets(pid: int) -> set[str]:
    """Inodes of a process's sockets."""
    links = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def test_control_has_no_raw_socket(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay, CONFIG) as relay:
        raw = packet_sockets(relay)
        assert raw, "the relay receives through AF_PACKET"
        assert not raw & open_sockets(relay.role("control")[0])
        assert raw & set().union(*(open_sockets(pid) for pid in relay.role("worker")))


def test_supervisor_loads_no_parser(lab: Lab) -> None:
    """It has the privileges, so it has the standard library and mrelay.kernel and nothing else."""
    star = lab.star()
    with Relay(star.relay, CONFIG) as relay:
        supervisor = relay.role("supervisor")
        assert supervisor == [relay.pid], "`run` becomes the supervisor"
        maps = Path(f"/proc/{relay.pid}/maps").read_text()
        assert not [name for name in ("numpy", "pydantic_core", "uvloop", "httptools") if name in maps]


def test_a_client_may_not_pass_the_socket_mode(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay, CONFIG) as relay:
        assert relay.socket.stat().st_mode & 0o777 == 0o660
        assert nobody_asks(relay) != 0, "a stranger is turned away"


def nobody_asks(relay: Relay) -> int:
    """Exit status of an attempt to connect to the API as nobody."""
    program = f"import socket; socket.socket(socket.AF_UNIX).connect({str(relay.socket)!r})"
    arguments = [*AS_NOBODY, sys.executable, "-c", program]
    return subprocess.run(arguments, capture_output=True, check=False, timeout=20).returncode


def test_started_by_nobody(lab: Lab) -> None:
    star = lab.star()
    relay = Relay(star.relay, CONFIG, launcher=(*AS_USER, "65534", "65534", "none"))
    assert relay.run() == EX_NOPERM, relay.stderr
    assert "CAP_NET_RAW" in relay.stderr, "the message names what is missing"


def test_started_by_a_root_without_capabilities(lab: Lab) -> None:
    star = lab.star()
    relay = Relay(star.relay, CONFIG, launcher=ROOT_WITHOUT_CAPABILITIES)
    assert relay.run() == EX_NOPERM, relay.stderr
    assert "CAP_NET_RAW" in relay.stderr, "the message names what is missing"


def test_nothing_remains_after_stop(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay, CONFIG) as relay:
        assert GROUP in star.relay.groups("in0")
        socket = relay.socket
    assert not socket.exists(), "the API socket is removed"
    eventually(lambda: GROUP not in star.relay.groups("in0"), "left the group")
    assert packet_sockets(relay) == set()


# ---- the supervisor ----------------------------------------------------------------------------------


def capability_mask(*wanted: int) -> int:
    return sum(1 << cap for cap in wanted)


def test_a_supervisor_that_is_root_gives_up_what_it_does_not_need(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay, CONFIG) as relay:
        found = status(relay.pid)
        kept = capability_mask(
            *(*UNIT_CAPS, caps.CAP_NET_BIND_SERVICE, caps.CAP_CHOWN, caps.CAP_DAC_OVERRIDE, caps.CAP_SETPCAP),
            *(caps.CAP_BPF, caps.CAP_PERFMON),
        )
        for key in ("CapPrm", "CapEff", "CapBnd"):
            assert int(found[key][0], 16) & ~kept == 0, f"{key} {found[key][0]}"
        assert found["NoNewPrivs"] == ["1"]
        assert owner(relay.pid) == 0, "a process that may not be dumped belongs to root"
        for pid in at_work(relay, "control") + at_work(relay, "worker"):
            assert int(status(pid)["CapBnd"][0], 16) == 0


def owner(pid: int) -> int:
    """The owner of a process's files in /proc: root when it is not dumpable (proc(5))."""
    return Path(f"/proc/{pid}/environ").stat().st_uid


def test_an_ordinary_user_with_ambient_capabilities(lab: Lab, folder: Path) -> None:
    """As under systemd without root: nothing more than these five, and all works, also a restart and a stop."""
    star = lab.star()
    os.chown(folder, UNIT_UID, UNIT_UID)
    state = folder / "state"
    state.mkdir()
    os.chown(state, pwd.getpwnam("nobody").pw_uid, pwd.getpwnam("nobody").pw_gid)
    launcher = (*AS_USER, str(UNIT_UID), str(UNIT_UID), ",".join(map(str, UNIT_CAPS)))
    relay = Relay(star.relay, CONFIG, launcher=launcher, folder=folder, arguments=TWO_USERS)
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, relay:
        found = status(relay.pid)
        assert (found["Uid"], int(found["CapEff"][0], 16)) == ([str(UNIT_UID)] * 4, capability_mask(*UNIT_CAPS))
        assert star.relay.features("in0")["rx-udp-gro-forwarding"] == "on"
        (worker,) = at_work(relay, "worker")
        for pid in [*relay.role("control"), worker]:
            assert all(int(status(pid)[key][0], 16) == 0 for key in ("CapPrm", "CapEff", "CapInh", "CapAmb"))
            assert owner(pid) == 0
        sender.send(GROUP, 5000, [b"one"])
        wire.until(b"one")
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: at_work(relay, "worker") not in ([None], [worker]), "another worker")
        sender.send(GROUP, 5000, [b"two"])
        wire.until(b"two")
        relay.add_rule("b", "in0:239.1.1.2:5001", "out0:239.2.2.3:6001")
        assert (state / "state.json").stat().st_uid == pwd.getpwnam("nobody").pw_uid
    assert star.relay.features("in0")["rx-udp-gro-forwarding"] == "off", "it could put that back"


def test_the_supervisors_own_user_is_no_user_for_others(lab: Lab, folder: Path) -> None:
    star = lab.star()
    nobody = pwd.getpwnam("nobody")
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    caps_text = ",".join(map(str, UNIT_CAPS))
    launcher = (*AS_USER, str(nobody.pw_uid), str(nobody.pw_gid), caps_text)
    relay = Relay(star.relay, CONFIG, launcher=launcher, folder=folder, arguments=("--user", "nobody"))
    assert relay.run() == 1
    assert "is the user that the supervisor itself runs as" in relay.stderr


# ---- what children are left with ---------------------------------------------------------------------


def test_control_and_workers_are_different_users(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay, CONFIG, arguments=TWO_USERS) as relay:
        users = {role: {status(pid)["Uid"][0] for pid in relay.role(role)} for role in ("control", "worker")}
        assert users == {
            "control": {str(pwd.getpwnam("nobody").pw_uid)},
            "worker": {str(pwd.getpwnam("daemon").pw_uid)},
        }
        assert (relay.state_dir / "state.json").stat().st_uid == pwd.getpwnam("nobody").pw_uid


@pytest.mark.parametrize("role", ["control", "worker"])
def test_environment_and_limits(lab: Lab, role: str) -> None:
    star = lab.star()
    with Relay(star.relay, CONFIG, launcher=("env", "SECRET=1")) as relay:
        for pid in at_work(relay, role):
            names = {entry.partition("=")[0] for entry in Path(f"/proc/{pid}/environ").read_text().split("\0")}
            assert names - {""} == {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "PYTHONUNBUFFERED", "MRELAY_LOG"}
            assert os.readlink(f"/proc/{pid}/cwd") == "/"
            limits = {line[:26].strip(): line[26:].split()[:2] for line in limits_of(pid)}
            assert limits["Max core file size"] == ["0", "0"]
            assert int(limits["Max data size"][1]) <= 2 << 30
            assert int(limits["Max open files"][1]) <= (4096 if role == "control" else 1 << 17)
            assert role == "control" or limits["Max processes"] == ["0", "0"]
            assert owner(pid) == 0, "not dumpable"
            assert status(pid)["Seccomp"] == ["2"], "SECCOMP_MODE_FILTER"


def limits_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]


def test_children_have_the_descriptors_that_were_meant_for_them(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay, CONFIG) as relay:
        for pid in at_work(relay, "worker"):
            found = descriptors(star.relay, pid)
            found.pop("anon_inode:[io_uring]", None)  # where the host allows it
            # The fast path's maps without the programs' own, and the program in devmaps; two rings, each once more
            # for its mapping; its two channels.
            maps = {"anon_inode:bpf-map": len(MAPS) - len(PROGRAMS_OWN), "anon_inode:bpf-prog": 1}
            own = {"/dev/null": 2, "log": 1, "unix": 2, "packet": 4, "udp": 1, "counters": 1, "pulse": 1}
            assert found == maps | own
        (control,) = relay.role("control")
        workers = len(at_work(relay, "worker"))
        # Its channels, its listener, a pair that wakes its loop; once it has closed our own connections.
        expected = {
            "unix": 4 + workers,
            "/dev/null": 2,
            "log": 1,
            "state": 1,
            "anon_inode:[eventpoll]": 1,
            "anon_inode:bpf-map": len(MAPS) - len(PROGRAMS_OWN),
            "anon_inode:bpf-prog": 1,
            "netlink": 2,
            "counters": workers,
            "pulse": 1,
            "statm": 2 + workers,  # its own, the supervisor's
            "memberships": 4,  # of /proc/net
            "packet": 4,  # taps for IGMP and MLD, at in0 and out0
        }
        eventually(lambda: descriptors(star.relay, control) == expected, f"control has {expected}")


def descriptors(namespace: Namespace, pid: int) -> Counter[str]:
    """What a process has open, by kind."""
    sockets = {
        inode: kind
        for kind, column in (("packet", -1), ("udp", 9), ("netlink", -1), ("unix", 6))
        for line in namespace.read(kind).splitlines()[1:]
        for inode in [line.split()[column]]
    }
    found: Counter[str] = Counter()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed as we look
            found[_kind(os.readlink(link), sockets)] += 1
    return found


def _kind(target: str, sockets: dict[str, str]) -> str:
    if target.startswith("socket:["):
        return sockets.get(target[8:-1], target)
    names = {"stderr": "log", "state": "state", "statm": "statm"}
    names |= dict.fromkeys(("igmp", "igmp6", "mcfilter", "mcfilter6"), "memberships")
    names |= {f"memfd:mrelay-{name} (deleted)": name for name in ("counters", "pulse")}
    return names.get(target.rpartition("/")[2], target)


# ---- who may do what over the API --------------------------------------------------------------------

ASK = """
import http.client, socket, sys
connection = http.client.HTTPConnection("relay")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect(sys.argv[1])
connection.request(sys.argv[2], sys.argv[3])
answer = connection.getresponse()
print(answer.status, answer.read().decode())
"""


def ask_as(uid: int, groups: str, relay: Relay, method: str, path: str) -> str:
    """Status and body of a request by a client with this uid and these groups."""
    privileges = ["setpriv", f"--reuid={uid}", f"--regid={uid}", f"--groups={groups}"]
    program = ["/usr/bin/python3", "-c", ASK, str(relay.socket), method, path]
    if subprocess.run([*privileges, *program[:2], ""], capture_output=True, check=False).returncode:
        pytest.skip("needs a /usr/bin/python3 that anyone may run")
    done = subprocess.run([*privileges, *program], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout


def test_the_sockets_mode_says_who_connects_and_its_group_who_changes(lab: Lab) -> None:
    star = lab.star()
    config = '[relay]\nsocket_mode = "0666"\nsocket_group = "games"\n' + CONFIG
    with Relay(star.relay, config) as relay:
        games = str(relay.socket.stat().st_gid)
        assert ask_as(UNIT_UID, str(UNIT_UID), relay, "GET", "/v1/rules").startswith("200 ")
        for method, path in (("DELETE", "/v1/rules/a"), ("PUT", "/v1/rules"), ("POST", "/v1/nothing")):
            answer = ask_as(UNIT_UID, str(UNIT_UID), relay, method, path)
            assert answer.startswith("403 "), answer
            assert f"member of group {games}" in answer, "the remedy"
        assert list(relay.rules()) == ["a"]
        assert ask_as(UNIT_UID, f"{UNIT_UID},{games}", relay, "DELETE", "/v1/rules/a").startswith("204 ")
        assert f"rule a removed by uid {UNIT_UID}, pid " in relay.stderr
        assert f"refused to uid {UNIT_UID}, pid " in relay.stderr


def test_nothing_is_imported_from_the_folder_it_is_started_in(lab: Lab, folder: Path) -> None:
    """Or whoever may write there would be root."""
    # The supervisor imports a module of this name.
    (folder / "resource.py").write_text("raise SystemExit('hijacked')")
    star = lab.star()
    relay = Relay(star.relay, CONFIG, folder=folder)
    program = relay._arguments.index(sys.executable)
    relay._arguments[program : program + 1] = ["env", "-C", str(folder), sys.executable, "-P"]
    with relay:
        assert [os.readlink(f"/proc/{pid}/cwd") for pid in relay.family()] == ["/"] * len(relay.family())
