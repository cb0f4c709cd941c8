"""peers.toml: what is shipped is sound, a relay can be added without code, mistakes are named."""

import tomllib
from pathlib import Path

import pytest

import peers
from cases import SECTIONS, Case, prefix
from peers import PeersError, context, load, render

SECTION = {section.name: section for section in SECTIONS}
MINIMAL = """
[[peer]]
name = "mine"
title = "my relay"
command = "myrelay --in {{ iif }} --out {{ oifs | join(',') }} --group {{ flows[0].group }}"
ready = "true"
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "peers.toml"
    file.write_text(text)
    return file


def test_shipped() -> None:
    found = {peer.name: peer for peer in load()}
    assert set(found) >= {
        "mrelay-tc",
        "mrelay-uring",
        "mrelay-poll",
        "smcroute",
        "smcroute-gro",
        "socat",
        "igmpproxy",
    }
    assert found["mrelay-uring"].ours, "what `like` names is taken over"
    assert not found["mrelay-poll"].io_uring
    assert found["mrelay-poll"].settings == found["mrelay-uring"].settings


def test_a_relay_of_ones_own(tmp_path: Path) -> None:
    (mine,) = load(written(tmp_path, MINIMAL))
    variables = context(mine, Case(outputs=1), tmp_path, [1])
    assert mine.command_line(variables) == ["myrelay", "--in", "r0", "--out", "r1", "--group", "239.1.1.1"]
    assert mine.can(SECTION["fan-out"], Case())
    assert not mine.can(SECTION["fan-out"], Case(outputs=4)), "one output unless it says more"
    assert not mine.can(SECTION["changes"], Case()), "it says no way to reload"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ('title = "my relay"', "title"),
        ('ready = "true"', "ready"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, change: str, says: str) -> None:
    with pytest.raises(PeersError, match=says):
        load(written(tmp_path, MINIMAL.replace(change, "")))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("colour = 1", "colour"),
        ('sections = ["nowhere"]', "nowhere.*fan-out"),
        ('like = "nobody"', "nobody.*no such peer"),
        ("most_outputs = 0", "most_outputs"),
        ('reload = "{{ nonsense }}"', "mine: reload.*nonsense.*variables: .*oifs"),
        (MINIMAL, "two peers are called 'mine'"),
        ("not toml", "peers.toml"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, more: str, says: str) -> None:
    with pytest.raises(PeersError, match=says):
        load(written(tmp_path, MINIMAL + more + "\n"))


def test_who_can_what() -> None:
    found = {peer.name: peer for peer in load()}
    no_df = Case(df=False)
    assert found["smcroute-gro"].can(SECTION["no-df"], no_df)
    assert not found["smcroute-gro"].can(SECTION["no-df"], Case()), "it drops merged frames with DF"
    assert not found["smcroute"].can(SECTION["no-df"], no_df)
    assert not found["smcroute"].can(SECTION["fan-out"], Case(outputs=64)), "the kernel has 32 interfaces for it"
    assert not found["socat"].can(SECTION["interleaved"], Case(flows=200))
    assert found["mrelay-tc"].can(SECTION["hosts"], Case(hosts=1000))
    assert not found["smcroute"].can(SECTION["hosts"], Case(hosts=1000))


@pytest.mark.parametrize(
    "case", [Case(outputs=4), Case(flows=200), Case(rules=3), Case(hosts=20), Case(merge=False)]
)
def test_relay_toml_is_valid(case: Case, tmp_path: Path) -> None:
    from mrelay.model.config import load_config

    peer = next(peer for peer in load() if peer.name == "mrelay-tc")
    text = render(peer.files["relay.toml"], context(peer, case, tmp_path, [1]))
    tables = tomllib.loads(text)
    assert len(tables["rule"]) == case.rules
    assert len(tables["rule"][-1]["to"]) == case.copies
    assert (tables["relay"]["gro"] == "auto") is case.merge
    assert len(load_config(text, "relay.toml").rules) == case.rules


def test_prefix_has_all_groups_and_no_more_than_it_must() -> None:
    assert prefix(Case().traffic()) == "239.1.1.1/32"
    assert prefix(Case(flows=200).traffic()) == "239.1.0.0/24"
    assert prefix(Case(flows=100_000).traffic()) == "239.0.0.0/14"


def test_missing_says_how_to_get_it() -> None:
    peer = peers.Peer(
        name="x", title="x", command="x", ready="true", needs=("no-such-command",), package="some-package"
    )
    assert "no-such-command" in peer.missing()
    assert "apt-get install some-package" in peer.missing()
