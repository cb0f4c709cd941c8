"""What the relay refuses, in a file (exit 78) and over the API (422), and the options that allow it."""

from typing import Any

import pytest

from netns.lab import Lab
from netns.relay import Relay, rule
from netns.traffic import Capture, Sender

pytestmark = pytest.mark.netns
EX_CONFIG = 78  # sysexits.h
GROUP = "239.1.1.1"

REFUSED = {
    "link-local group": ("in0:224.0.0.251:5353", "out0:224.0.0.251:5353", "link_local"),
    "link-local IPv6 group": ("in0:[ff02::fb]:5353", "out0:[ff3e::1]:5353", "link_local"),
    "output that is its own input": (f"in0:{GROUP}:5000", f"in0:{GROUP}:5000", "allow_loop"),
}


def refusal(relay: Relay, name: str, from_: str, to: str) -> dict[str, Any]:
    """The first error of a rule that must be refused."""
    status, body = relay.request("POST", "/v1/rules", {"name": name, "from": from_, "to": [to]})
    assert status == 422, f"{status} {body}"
    assert body["errors"], "an error body names what is wrong"
    return dict(body["errors"][0])


@pytest.mark.parametrize(("from_", "to", "option"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_a_file(lab: Lab, from_: str, to: str, option: str) -> None:
    star = lab.star()
    relay = Relay(star.relay, rule("bad", from_, to))
    assert relay.run() == EX_CONFIG, relay.stderr
    assert "bad" in relay.stderr, "the message names the rule"
    assert option in relay.stderr, "and the option that allows it"


def test_refused_and_allowed_over_the_api(lab: Lab, subtests: pytest.Subtests) -> None:
    star = lab.star()
    with Relay(star.relay) as relay:
        for name, (from_, to, option) in REFUSED.items():
            with subtests.test(name):
                error = refusal(relay, "bad", from_, to)
                assert error["rule"] == "bad"
                assert option in error["remedy"]
                assert relay.rules() == {}
                relay.add_rule("bad", from_, to, **{option: True})
                relay.await_rule("bad", "up")
                relay.remove_rule("bad")


def test_rules_that_form_a_loop(lab: Lab) -> None:
    star = lab.star()
    config = rule("there", f"in0:{GROUP}:5000", f"out0:{GROUP}:6000")
    back = rule("back", f"out0:{GROUP}:6000", f"in0:{GROUP}:5000")
    relay = Relay(star.relay, config + back)
    assert relay.run() == EX_CONFIG, relay.stderr
    assert "allow_loop" in relay.stderr
    assert "there" in relay.stderr and "back" in relay.stderr, "the message names the rules"
    with Relay(star.relay, config) as running:
        assert "allow_loop" in refusal(running, "back", f"out0:{GROUP}:6000", f"in0:{GROUP}:5000")["remedy"]
        assert list(running.rules()) == ["there"]


def test_allowed_link_local_group_is_forwarded(lab: Lab) -> None:
    star = lab.star()
    config = rule("mdns", "in0:224.0.0.251:5399", "out0:224.0.0.251:5399,ttl=255", link_local=True)
    with Capture(star.sink, "k0") as wire, Sender(star.source, ttl=255) as sender, Relay(star.relay, config):
        sender.send("224.0.0.251", 5399, [b"discovery"])
        packet = wire.until(b"discovery")[-1]
        assert (packet.destination, packet.ttl) == ("224.0.0.251", 255)


INVALID: list[object] = [
    {"name": "a"},
    {"name": "a", "from": f"in0:{GROUP}:5000", "to": []},
    {"name": "a", "from": f"in0:{GROUP}:5000", "to": ["out0:239.2.2.2:6000"], "colour": "red"},
    {"name": "a b", "from": f"in0:{GROUP}:5000", "to": ["out0:239.2.2.2:6000"]},
    {"name": "a", "from": "in0:300.1.1.1:5000", "to": ["out0:239.2.2.2:6000"]},
    {"name": "a", "from": f"in0:{GROUP}:0", "to": ["out0:239.2.2.2:6000"]},
    {"name": "a", "from": f"in0:{GROUP}:5000", "to": ["out0:239.2.2.2:70000"]},
    {"name": "a", "from": f"in0:{GROUP}:5000", "to": ["a-name-that-is-too-long:239.2.2.2:6000"]},
    {"name": "a", "from": f"in0:{GROUP}:5000", "to": ["out0:239.2.2.2:6000,ttl=0"]},
    {"name": "a", "from": f"in0:{GROUP}:5000", "to": ["out0:239.2.2.2:6000,dscp=64"]},
    [],
    "rule",
]


def test_invalid_rules_over_the_api(lab: Lab, subtests: pytest.Subtests) -> None:
    star = lab.star()
    with Relay(star.relay) as relay:
        for body in INVALID:
            with subtests.test(body=body):
                status, answer = relay.request("POST", "/v1/rules", body)
                assert status == 422, answer
                assert {"rule", "key", "problem", "remedy"} <= set(answer["errors"][0])
                assert relay.rules() == {}
