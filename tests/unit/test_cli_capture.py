"""`mrelay capture`: what it asks for, what it writes, what it says of it."""

from pathlib import Path

import pytest

from fake_relay import FakeRelay, Run
from mrelay.cli.capture import Counted
from mrelay.protocols import pcapng

FILE = pcapng.section("test") + pcapng.interface("eth0", pcapng.LINKTYPE_ETHERNET, 65535)
FILE += b"".join(pcapng.packet(0, n, b"data", 4, comment="dropped: no_rule") for n in range(3))
FILE += pcapng.statistics(0, 9, 3, 7)


def test_the_file_is_what_the_relay_sent(relay: FakeRelay, run: Run, tmp_path: Path) -> None:
    relay.answer("POST /v1/capture", FILE)
    file = tmp_path / "a.pcapng"
    result = run("capture", "a", "-w", str(file), "--seconds", "5", "--packets", "9", "--bytes", "1000")
    assert result.status == 0, result.err
    assert relay.requests[-1][2] == {"what": "a", "side": "in", "seconds": 5.0, "packets": 9, "bytes": 1000}
    assert file.read_bytes() == FILE
    assert "3 packets" in result.err and "7 frames came too fast" in result.err


def test_without_a_file_it_makes_one(
    relay: FakeRelay, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    relay.answer("POST /v1/capture", FILE)
    assert run("capture", "eth0:10.1.1.9@239.1.1.1:5000", "--side", "out").status == 0
    assert [path.name for path in tmp_path.glob("*.pcapng")] == ["eth0-10.1.1.9-239.1.1.1-5000-out.pcapng"]


def test_drops_that_it_can_t_hold_are_counted(relay: FakeRelay, run: Run, tmp_path: Path) -> None:
    drops = iter(
        [{"no_rule": 1, "ring_full": 5, "rate_limited": 0}, {"no_rule": 9, "ring_full": 8, "rate_limited": 0}]
    )
    answers = relay.answers
    rest = dict.fromkeys(("too_big", "no_neighbour", "tx_error", "rate_limited", "miss_limited"), 0)

    class Turns(dict[str, object]):
        def __getitem__(self, key: str) -> object:
            return (200, {"drops": {**rest, **next(drops)}}) if key == "GET /v1/stats" else answers[key]

    relay.answer("POST /v1/capture", FILE)
    relay.answers = Turns()  # type: ignore[assignment]
    result = run("capture", "a", "--side", "dropped", "-w", str(tmp_path / "a"))
    assert result.status == 0, result.err
    assert "can't be told from the frame: ring_full 3 (of all rules)" in result.err


def test_what_can_t_be_written_or_captured_is_said(relay: FakeRelay, run: Run, tmp_path: Path) -> None:
    relay.answer("POST /v1/capture", FILE)
    result = run("capture", "a", "-w", str(tmp_path / "no" / "folder"))
    assert result.status == 1 and "can't write" in result.err
    relay.refuse(
        "POST /v1/capture", 404, {"rule": "b", "key": "", "problem": "there is no rule 'b'", "remedy": "see"}
    )
    result = run("capture", "b", "-w", str(tmp_path / "b"))
    assert result.status == 1 and "there is no rule 'b'" in result.err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("size", [1, 7, 8, 50, 10_000])
def test_only_whole_blocks_are_written(size: int) -> None:
    counted, written = Counted(), b""
    for at in range(0, len(FILE), size):
        written += counted.whole(FILE[at : at + size])
    assert written == FILE and (counted.packets, counted.missed) == (3, 7)
    assert Counted().whole(FILE[:-1]) == FILE[: -len(pcapng.statistics(0, 9, 3, 7))]
