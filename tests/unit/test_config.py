"""The config file: read with every error at once, and rules written back with the comments kept."""

import tomllib
from typing import Any

import pytest
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st

from model_strategies import configs
from mrelay.model.config import Config, ConfigError, Issue, RelaySettings, load_config, parse_rules, save_rules
from mrelay.model.rule import Rule

COMMENTED = """\
# The relay of studio 7.
[relay]
workers = 2   # one a socket

# Camera one.
[[rule]]
name = "cam-1"  # left
from = "eth0:239.1.1.1:5000"
to = ["eth1:*:*"]  # to the mixer

# Camera two.
[[rule]]
name = "cam-2"
to = [
    "eth1:*:*",  # mixer
    "eth2:*:*",  # monitor
]
[rule.from]  # as a table
interface = "eth0"
address = "239.1.1.2"
port = 5000

# Camera three.
[[rule]]
name = "cam-3"
from = "eth0:239.1.1.3:5000"
to = ["eth1:*:*"]
# The end.
"""


def rule(name: str, origin: str, *to: str, **allowed: bool) -> Rule:
    return Rule.model_validate({"name": name, "from": origin, "to": list(to), **allowed})


def rules_in(text: str) -> tuple[Rule, ...]:
    return parse_rules(tomllib.loads(text).get("rule", []), "saved.toml")


def comments(text: str) -> list[str]:
    return [line.partition("#")[2] for line in text.splitlines() if "#" in line]


def issues_in(text: str) -> list[Issue]:
    with pytest.raises(ConfigError) as caught:
        load_config(text, "relay.toml")
    assert all(issue.file == "relay.toml" and issue.problem and issue.remedy for issue in caught.value.issues)
    return caught.value.issues


def test_the_design_example() -> None:
    config = load_config(
        """
        [relay]
        engine = "auto"
        workers = [0, 2, 3]
        [[rule]]
        name = "studio-a"
        from = "eth0:239.1.1.1:5000"
        to = ["eth1:239.2.2.2:6000", "wg0:10.100.0.2:6000,ttl=8"]
        """,
        "relay.toml",
    )
    assert config.relay.workers == [0, 2, 3]
    outputs = ("eth1:239.2.2.2:6000", "wg0:10.100.0.2:6000,ttl=8")
    assert config.rules == (rule("studio-a", "eth0:239.1.1.1:5000", *outputs),)


def test_an_empty_file_is_all_defaults() -> None:
    assert load_config("", "relay.toml") == Config()


@pytest.mark.parametrize(
    ("line", "key", "problem", "remedy"),
    [
        ('engine = "turbo"', "engine", "'turbo'", '"uring"'),
        ("workers = 0", "workers", "0", '"auto"'),
        ("workers = []", "workers", "no core", "[0, 2]"),
        ("workers = [1, 1]", "workers", "twice", "[0, 2]"),
        ("workers = [-1]", "workers", "-1", "core"),
        ("workers = true", "workers", "true", '"auto"'),
        ('gro = "yes"', "gro", "'yes'", "true or false"),
        ("gro = 1", "gro", "1", "true or false"),
        ('xdp = "auto"', "xdp", "'auto'", '["eth0"]'),
        ("xdp = []", "xdp", "no interface", '["eth0"]'),
        ('xdp = ["eth 0"]', "xdp", "'eth 0'", "ip link"),
        ("xdp = [1]", "xdp", "1", "eth0"),
        ('socket_mode = "rw"', "socket_mode", "'rw'", '"0660"'),
        ("socket_mode = 0o660", "socket_mode", "432", '"0660"'),
        ('socket_group = "a b"', "socket_group", "'a b'", "getent"),
        *(
            (f'listen = "{text}"', "listen", f"'{text}'", "127.0.0.1:8080")
            for text in ("8080", "eth0:8080", "::1:80")
        ),
        *(
            (f'listen = "{text}"', "listen", f"'{text}'", "[::1]:8080")
            for text in ("[10.0.0.1]:8080", "999.0.0.1:1")
        ),
        ('listen = "239.1.1.1:8080"', "listen", "'239.1.1.1:8080'", "127.0.0.1:8080"),
        ("listen = 8080", "listen", "8080", "127.0.0.1:8080"),
        ('listen = "127.0.0.1:80"', "listen", "port 80", "proxy"),
        ('listen = "127.0.0.1:65536"', "listen", "port 65536", "proxy"),
        ('listen_names = "relay"', "listen_names", "'relay'", '["relay.example.org"]'),
        ('listen_names = ["http://relay"]', "listen_names", "'http://relay'", '["relay.example.org"]'),
        ("flow_limit = 0", "flow_limit", "0", "65536"),
        ("ring_slots = 1000", "ring_slots", "power of two", "512 or 1024"),
        ("ring_slots = 128", "ring_slots", "128", "8192"),
        ("wokers = 2", "wokers", "'wokers'", "did you mean 'workers'?"),
    ],
)
def test_a_wrong_setting_names_key_problem_and_remedy(line: str, key: str, problem: str, remedy: str) -> None:
    (issue,) = issues_in(f"[relay]\n{line}\n")
    assert (issue.rule, issue.key) == ("", f"relay.{key}")
    assert problem in issue.problem
    assert remedy in issue.remedy


@pytest.mark.parametrize(
    ("text", "problem", "remedy"),
    [
        ("[relay]\nworkers = = 2", "line 2", "correct it"),
        ("x = 0x" + "f" * 9000, "'x'", "relay"),
        ("x = " + "9" * 9000, "not TOML", "correct it"),
        ("x = " + "[" * 50_000, "not TOML", "correct it"),
        ("[relay]\nworkers = 0x" + "f" * 9000, "huge", '"auto"'),
        ("[realy]\n", "'realy'", "'relay'"),
        ("[[rules]]\n", "'rules'", "'rule'"),
        ('[rule]\nname = "a"', "a table", "[[rule]]"),
        ("relay = 3", "3", "[relay]"),
        ("[[relay]]\n", "an array", "[relay]"),
        ("rule = [3]", "3", "name ="),
    ],
)
def test_a_wrong_shape_names_problem_and_remedy(text: str, problem: str, remedy: str) -> None:
    (issue,) = issues_in(text)
    assert problem in issue.problem
    assert remedy in issue.remedy


def test_every_error_of_a_file_comes_at_once() -> None:
    issues = issues_in(
        """
        colour = "red"
        [relay]
        workers = 0
        [[rule]]
        name = "a"
        from = "eth0:239.1.1.1:0"
        to = ["eth1:*:*,ttl=0", "eth1:nohost:5"]
        [[rule]]
        from = "eth0:239.1.1.1"
        [[rule]]
        name = "a"
        from = "eth0:239.1.1.1:5"
        to = ["eth1:*:*"]
        [[rule]]
        name = "back"
        from = "eth1:239.1.1.1:5"
        to = ["eth0:*:*"]
        """
    )
    assert [(issue.rule, issue.key) for issue in issues[:-1]] == [
        ("", "relay.workers"),
        ("", "colour"),
        ("a", "from.port"),
        ("a", "to[0].ttl"),
        ("a", "to[1].address"),
        ("rule 2", "name"),
        ("rule 2", "from"),
        ("rule 2", "to"),
        ("a", "name"),
    ]
    assert "packets go round" in issues[-1].problem
    lines = [str(issue) for issue in issues]
    assert lines[2].startswith("relay.toml: rule 'a', key 'from.port': ")
    assert lines[5].startswith("relay.toml: rule 2, key 'name': ")


def test_workers_as_the_command_line_writes_them() -> None:
    assert RelaySettings.model_validate({"workers": "0,2"}).workers == [0, 2]
    assert RelaySettings.model_validate({"workers": "4"}).workers == 4


def test_parse_rules_refuses_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_rules([{"name": "a"}, 7], "request")
    assert [issue.rule for issue in caught.value.issues] == ["a", "a", "rule 2"]


def test_saving_what_the_file_says_changes_nothing() -> None:
    assert save_rules(COMMENTED, rules_in(COMMENTED)) == COMMENTED


def test_a_changed_rule_keeps_its_place_and_comments() -> None:
    one, two, three = rules_in(COMMENTED)
    changed = rule("cam-1", "eth0:239.1.1.1:5001", "eth1:*:*", allow_loop=True)
    text = save_rules(COMMENTED, [changed, two, three])
    assert rules_in(text) == (changed, two, three)
    assert comments(text) == comments(COMMENTED)
    assert text.index("allow_loop") < text.index("# Camera two.")
    assert save_rules(text, [one, two, three]) == COMMENTED


def test_a_rule_whose_endpoint_is_a_table_can_change() -> None:
    one, _, three = rules_in(COMMENTED)
    changed = rule("cam-2", "eth0:239.1.1.9:5000", "eth2:*:*")
    text = save_rules(COMMENTED, [one, changed, three])
    assert rules_in(text) == (one, changed, three)
    assert " Camera three." in comments(text)


@pytest.mark.parametrize("gone", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 1, 2}])
def test_removing_rules_keeps_the_comments_between_them(gone: set[int]) -> None:
    kept = [one for number, one in enumerate(rules_in(COMMENTED)) if number not in gone]
    text = save_rules(COMMENTED, kept)
    assert rules_in(text) == tuple(kept)
    between = [" The relay of studio 7.", " Camera one.", " Camera two.", " Camera three.", " The end."]
    assert [comment for comment in comments(text) if comment in between] == between


def test_new_rules_go_to_the_end() -> None:
    new = rule("new", "eth0:239.1.1.9:5", "eth1:*:*", "eth1:*:6", "eth1:*:7")
    text = save_rules(COMMENTED, [*rules_in(COMMENTED), new])
    assert text.startswith(COMMENTED)
    assert rules_in(text)[-1] == new
    assert save_rules(None, [new]) == save_rules("", [new])
    assert save_rules(None, [new]).startswith("[[rule]]\n")


def test_rules_as_an_inline_array_are_written_anew() -> None:
    text = '# top\nrule = [{name = "a", from = "eth0:239.1.1.1:5", to = ["eth1:*:*"]}]\n[relay]\nworkers = 2\n'
    saved = save_rules(text, rules_in(text))
    assert rules_in(saved) == rules_in(text)
    assert load_config(saved, "saved.toml").relay.workers == 2
    assert comments(saved) == [" top"]


def test_saving_over_what_is_not_toml_is_refused() -> None:
    with pytest.raises(ConfigError, match="not TOML"):
        save_rules("x = = 1", [])


def toml_of(config: Config) -> str:
    """The config as a file."""
    relay: dict[str, Any] = config.relay.model_dump(exclude_none=True)
    return tomlkit.dumps({"relay": relay, "rule": [one.to_table() for one in config.rules]})


@given(configs())
def test_config_to_toml_to_config_loses_nothing(config: Config) -> None:
    assert load_config(toml_of(config), "relay.toml") == config


@settings(max_examples=40)  # two configs take long to generate
@given(configs(), configs())
def test_saved_rules_are_the_rules(before: Config, after: Config) -> None:
    text = save_rules(toml_of(before), after.rules)
    saved = load_config(text, "relay.toml")
    assert saved.relay == before.relay
    assert {one.name: one for one in saved.rules} == {one.name: one for one in after.rules}
    assert save_rules(text, after.rules) == text


@given(st.text())
def test_no_text_is_a_surprise(text: str) -> None:
    try:
        config = load_config(text, "relay.toml")
    except ConfigError as error:
        assert error.issues
    else:
        assert load_config(save_rules(text, config.rules), "relay.toml") == config


@given(st.lists(st.none() | st.integers() | st.text() | st.dictionaries(st.text(), st.text()), min_size=1))
def test_no_table_is_a_surprise(tables: list[object]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_rules(tables, "request")
    assert all(issue.rule for issue in caught.value.issues)
