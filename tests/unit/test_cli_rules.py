"""`mrelay apply`, `mrelay save` and `mrelay check`: files against a running relay and this host."""

import json
import os
import stat
from pathlib import Path

import pytest

from fake_relay import FakeRelay, Run
from mrelay.cli import host
from mrelay.cli.client import TIMEOUT, Client
from mrelay.ebpf import load

FILE = """\
# the studio's relay
[relay]
workers = 1  # small box

[[rule]]
name = "a"  # the main feed
from = "eth0:239.1.1.1:5000"
to = ["eth1:239.2.2.2:6000"]

[[rule]]
name = "new"
from = "eth0:239.1.1.3:5000"
to = ["eth1:239.2.2.4:6000"]
"""
PLAIN = FILE.replace("[relay]\nworkers = 1  # small box\n", "")
BAD = FILE.replace("239.1.1.1:5000", "10.0.0.0/8:5000").replace("239.2.2.4:6000", "239.2.2.4:99999")


def running(name: str, origin: str, *to: str) -> dict[str, object]:
    """A rule as GET /v1/rules lists it."""
    outputs = [{"to": each, "state": "up"} for each in to]
    flags = {"link_local": False, "allow_loop": False, "rate": None}
    return {"name": name, "from": origin, "to": list(to), **flags, "state": "up", "outputs": outputs}


RUNNING = [
    running("a", "eth0:239.1.1.1:5000", "eth1:239.9.9.9:6000"),
    running("old", "eth0:239.1.1.9:5000", "eth1:239.2.2.9:6000"),
]
DIFFERENCE = {"added": ["new"], "removed": ["old"], "changed": ["a"], "unchanged": []}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A good config file without settings."""
    path = tmp_path / "relay.toml"
    path.write_text(PLAIN)
    return path


# ---- apply -------------------------------------------------------------------------------------


def test_apply_shows_the_difference(run: Run, relay: FakeRelay, file: Path) -> None:
    relay.answer("GET /v1/rules", {"rules": RUNNING})
    relay.answer("PUT /v1/rules?dry_run=false", DIFFERENCE)
    status, out, err = run("apply", str(file))
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "+ new  eth0:239.1.1.3:5000 -> eth1:239.2.2.4:6000",
        "- old  eth0:239.1.1.9:5000 -> eth1:239.2.2.9:6000",
        "~ a  eth0:239.1.1.1:5000 -> eth1:239.2.2.2:6000",
        "    was  eth0:239.1.1.1:5000 -> eth1:239.9.9.9:6000",
        "1 added, 1 removed, 1 changed, 0 unchanged",
    ]
    _, _, body = relay.requests[-1]
    assert [rule["name"] for rule in body["rules"]] == ["a", "new"]
    assert body["rules"][1]["to"] == ["eth1:239.2.2.4:6000"]


def test_apply_waits_longer_for_more_rules(
    run: Run, relay: FakeRelay, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    exchange = Client._exchange

    def noted(self: Client, method: str, target: str, body: object, patience: float) -> tuple[int, bytes]:
        waits.append(patience)
        return exchange(self, method, target, body, patience)

    monkeypatch.setattr(Client, "_exchange", noted)
    for count in (1, 10_000):
        rules = [{**RUNNING[0], "name": f"r{number}"} for number in range(count)]
        relay.answer("GET /v1/rules", {"rules": rules})
        relay.answer("PUT /v1/rules?dry_run=false", DIFFERENCE)
        assert run("apply", str(file)).status == 0
    assert waits[0] == waits[2] == TIMEOUT
    assert waits[1] < TIMEOUT + 1
    assert waits[3] > 5 * TIMEOUT


def test_apply_dry_run_asks_for_one_and_says_so(run: Run, relay: FakeRelay, file: Path) -> None:
    relay.answer("GET /v1/rules", {"rules": RUNNING})
    relay.answer("PUT /v1/rules?dry_run=true", DIFFERENCE)
    status, out, _ = run("apply", "--dry-run", str(file))
    assert status == 0
    assert out.splitlines()[-1].startswith("dry run, nothing changed: 1 added")


def test_apply_json(run: Run, relay: FakeRelay, file: Path) -> None:
    relay.answer("GET /v1/rules", {"rules": RUNNING})
    relay.answer("PUT /v1/rules?dry_run=false", DIFFERENCE)
    assert json.loads(run("apply", str(file), "--json").out) == DIFFERENCE


def test_apply_says_that_settings_wait_for_a_restart(run: Run, relay: FakeRelay, file: Path) -> None:
    file.write_text(FILE)
    relay.answer("GET /v1/rules", {"rules": RUNNING})
    relay.answer("PUT /v1/rules?dry_run=false", DIFFERENCE)
    assert "[relay] take effect when the relay next starts" in run("apply", str(file)).err


def test_apply_sends_nothing_of_a_wrong_file(run: Run, relay: FakeRelay, file: Path) -> None:
    file.write_text(BAD)
    status, out, err = run("apply", str(file))
    assert (status, out, relay.requests) == (78, "", [])
    assert len(err.splitlines()) == 2
    assert all(line.startswith(f"mrelay: {file}: rule '") for line in err.splitlines())


def test_apply_without_the_file(run: Run, tmp_path: Path) -> None:
    status, _, err = run("apply", str(tmp_path / "none.toml"))
    assert status == 78
    assert err.startswith(f"mrelay: no file {tmp_path}/none.toml")


# ---- save --------------------------------------------------------------------------------------


def test_save_prints_without_a_file(run: Run, relay: FakeRelay) -> None:
    relay.answer("GET /v1/rules", {"rules": RUNNING})
    status, out, _ = run("save")
    assert status == 0
    assert out.count("[[rule]]") == 2
    assert "eth1:239.9.9.9:6000" in out


def test_save_keeps_comments_mode_and_link(run: Run, relay: FakeRelay, tmp_path: Path) -> None:
    real = tmp_path / "real.toml"
    real.write_text(FILE)
    real.chmod(0o640)
    link = tmp_path / "link.toml"
    link.symlink_to(real)
    relay.answer("GET /v1/rules", {"rules": RUNNING})
    status, out, _ = run("save", str(link))
    assert (status, out) == (0, f"saved 2 rules to {link}\n")
    text = real.read_text()
    assert "# the studio's relay" in text
    assert "# small box" in text
    assert "eth1:239.9.9.9:6000" in text
    assert '"new"' not in text
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["control.sock", "link.toml", "real.toml"]


def test_save_makes_a_new_file(run: Run, relay: FakeRelay, tmp_path: Path) -> None:
    relay.answer("GET /v1/rules", {"rules": RUNNING[:1]})
    path = tmp_path / "new.toml"
    assert run("save", str(path)).out == f"saved 1 rule to {path}\n"
    assert run("check", str(path)).status == 0


def test_save_leaves_a_wrong_file_alone(run: Run, relay: FakeRelay, file: Path) -> None:
    file.write_text(BAD)
    relay.answer("GET /v1/rules", {"rules": RUNNING})
    assert run("save", str(file)).status == 78
    assert file.read_text() == BAD


def test_save_to_where_there_is_no_folder(run: Run, relay: FakeRelay, tmp_path: Path) -> None:
    relay.answer("GET /v1/rules", {"rules": RUNNING})
    status, _, err = run("save", str(tmp_path / "none" / "relay.toml"))
    assert status == 1
    assert "cannot write" in err
    assert "nothing was changed" in err


# ---- check -------------------------------------------------------------------------------------


@pytest.fixture
def two_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with eth0 and eth1, both up, and without wg0."""
    flags = {"eth0": host.IFF_UP | host.IFF_MULTICAST, "eth1": host.IFF_UP}
    monkeypatch.setattr(host, "interface_flags", flags.get)
    monkeypatch.setattr(host, "interfaces", lambda: sorted(flags))


def test_check_of_a_good_file(run: Run, file: Path, two_interfaces: None) -> None:
    status, out, err = run("check", str(file))
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[1] == ["a", "eth0:239.1.1.1:5000", "join", "eth1:239.2.2.2:6000"]
    assert out.splitlines()[-1] == f"{file}: valid, 2 rules, no warnings"


def test_check_lists_every_error(run: Run, file: Path) -> None:
    file.write_text(BAD)
    status, out, err = run("check", str(file))
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == f"mrelay: {file}: 2 errors"
    assert len(err.splitlines()) == 3


def test_check_json_of_a_wrong_file(run: Run, file: Path) -> None:
    file.write_text(BAD)
    status, out, _ = run("check", "--json", str(file))
    answer = json.loads(out)
    assert (status, answer["ok"]) == (1, False)
    assert [error["rule"] for error in answer["errors"]] == ["a", "new"]
    assert all(error["remedy"] for error in answer["errors"])


def test_check_without_the_file(run: Run, tmp_path: Path) -> None:
    assert run("check", str(tmp_path / "none.toml")).status == 1


@pytest.mark.parametrize(
    ("origin", "to", "how", "warning"),
    [
        ("eth0:239.1.1.1:5000", "wg0:10.0.0.2:6000", "join", "no interface wg0 on this host"),
        ("eth0:10.1.1.9@232.1.1.1:5000", "eth1:*:*", "join from 10.1.1.9", None),
        ("eth0:239.1.1.0/30:5000", "eth1:*:*", "join 4 groups", None),
        ("eth0:239.0.0.0/8:5000", "eth1:*:*", "none", "more than 256 groups"),
        ("eth0:239.1.1.1:5000,vlan=20", "eth1:*:*", "join", "ip link add link eth0 name eth0.20 type vlan"),
        ("eth0:192.0.2.77:5000", "eth1:239.2.2.2:*", "hold 1 port", "192.0.2.77 is not an address of this"),
        ("eth1:239.1.1.1:5000", "eth0:*:*", "join", "eth1 does not do multicast"),
    ],
)
def test_check_warns_of_what_would_not_work_here(
    run: Run, file: Path, two_interfaces: None, origin: str, to: str, how: str, warning: str | None
) -> None:
    file.write_text(f'[[rule]]\nname = "a"\nfrom = "{origin}"\nto = ["{to}"]\n')
    status, out, _ = run("check", "--json", str(file))
    answer = json.loads(out)
    assert status == 0
    assert [join["how"] for join in answer["joins"]] == [how]
    said = [f"{each['problem']} — {each['remedy']}" for each in answer["warnings"]]
    assert len(said) == (warning is not None)
    assert warning is None or warning in said[0]


def test_check_warns_of_a_limit_of_nought(
    run: Run, file: Path, two_interfaces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "sysctl", lambda _: 0)
    out = run("check", str(file)).out
    assert "sysctl -w net.ipv4.igmp_max_memberships=20" in out


def test_check_warns_of_an_engine_that_is_not_to_be_had(
    run: Run, file: Path, two_interfaces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "outdated", lambda: "Linux 5.4 is older than 5.19")
    for engine, warned in (("ebpf", True), ("auto", False)):
        file.write_text(f'[relay]\nengine = "{engine}"\n')
        assert ("would not start: Linux 5.4" in run("check", str(file)).out) == warned


def test_a_rate_is_sent_listed_and_saved(run: Run, relay: FakeRelay) -> None:
    limited = running("a", "eth0:239.1.1.1:5000", "eth1:239.9.9.9:6000") | {"rate": "10kpps"}
    relay.answer("POST /v1/rules", limited, status=201)
    relay.answer("GET /v1/rules", {"rules": [limited]})
    assert (
        run(
            "rule", "add", "a", "--from", "eth0:239.1.1.1:5000", "--to", "eth1:239.9.9.9:6000", "--rate", "10kpps"
        )[0]
        == 0
    )
    assert relay.requests[-1][2]["rate"] == "10kpps"
    assert "at most 10kpps" in run("rule", "list")[1]
    assert 'rate = "10kpps"' in run("save")[1]
