"""A rule's `health`: what may be written, and what is said of what may not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrelay.model.config import load_config, save_rules
from mrelay.model.health import Health, read_health
from mrelay.model.issue import ConfigError

RULE = '[[rule]]\nname = "a"\nfrom = "eth0:239.1.1.1:5000"\nto = ["eth1:239.2.2.2:6000"]\nhealth = '


@pytest.mark.parametrize(
    ("written", "want"),
    [
        ("rtp", Health("rtp")),
        ("auto", Health()),
        ("rtp, loss=0.5%, jitter=30ms, silence=2s", Health("rtp", loss=0.005, jitter=0.03, silence=2)),
        ("mpegts,loss=off,silence=off,sample=10", Health("mpegts", loss=0, silence=0, sample=10)),
        ("rtp,clock=48000,jitter=250us", Health("rtp", clock=48000, jitter=0.00025)),
        ("sequence,offset=8,size=4,endian=little", Health("sequence", offset=8, size=4, endian="little")),
        ({"offset": 0, "size": 8}, Health("sequence", size=8)),
        ({"format": "rtp", "loss": "1%"}, Health("rtp", loss=0.01)),
        ({"loss": "1%"}, Health(loss=0.01)),
    ],
)
def test_what_is_written_is_read(written: object, want: Health) -> None:
    assert read_health(written) == want


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("rtpp", "did you mean 'rtp'?"),
        ("", "no format"),
        ("rtp,loss=5", "write for example loss=0.1%"),
        ("rtp,loss=0%", "loss=off"),
        ("rtp,jitter=30", "write for example jitter=30ms"),
        ("rtp,silence=5s,silence=6s", "stands twice"),
        ("rtp,quiet", "not an option"),
        ("rtp,los=1%", "did you mean 'loss'?"),
        ("rtp,offset=3", "offset is for"),
        ("sequence,offset=3", "size is not given"),
        ("sequence,size=9", "up to 8"),
        ("mpegts,clock=48000", "clock is for RTP"),
        ("rtp,sample=0", "hears nothing"),
        ("sequence,size=4,count_offset=4", "count_size"),
        (5, "does not say how"),
    ],
)
def test_what_is_wrong_says_what_to_write(written: object, says: str) -> None:
    text = RULE + (f'"{written}"' if isinstance(written, str) else str(written))
    with pytest.raises(ConfigError) as refused:
        load_config(text, "relay.toml")
    (issue,) = refused.value.issues
    assert issue.key == "health" and says in str(issue)


HEALTHS = st.builds(
    Health,
    format=st.sampled_from(["auto", "rtp"]),
    loss=st.sampled_from([0.0, 0.001, 0.0005, 1.0, 1e-6]),
    jitter=st.sampled_from([0.0, 0.03, 0.00025, 2.0]),
    silence=st.sampled_from([0.0, 5.0, 0.5, 3600.0]),
    sample=st.integers(1, 3600),
    clock=st.sampled_from([0, 48_000, 90_000]),
)
FIELDS = st.builds(
    Health,
    format=st.just("sequence"),
    offset=st.integers(0, 1400),
    size=st.integers(1, 8),
    endian=st.sampled_from(["big", "little"]),
    count_offset=st.integers(0, 1400),
    count_size=st.integers(1, 8),
)


@given(HEALTHS | FIELDS)
def test_what_is_shown_is_read_again(health: Health) -> None:
    assert read_health(str(health)) == health


def test_a_table_in_a_file_becomes_text_when_it_is_saved() -> None:
    config = load_config(RULE + '{ format = "rtp", loss = "1%" }\n', "relay.toml")
    assert config.rules[0].health == Health("rtp", loss=0.01)
    assert config.rules[0].to_table()["health"] == "rtp,loss=1%"
    assert load_config(save_rules(None, config.rules), "again.toml").rules == config.rules
