"""Config files: every fault has a remedy; what loads is saved and loads again, with other rules too."""

from fuzz.data import Data
from mrelay.model.config import ConfigError, load_config, save_rules
from mrelay.model.rule import Rule, check_rules

OTHER = Rule.model_validate(
    {"name": "fuzz-added", "from": "eth0:239.255.9.9:5", "to": ["eth1:*:*"], "allow_loop": True}
)


def check(data: bytes) -> None:
    how = Data(data[:1]).below(4)
    text = data[1:].decode(errors="replace")
    try:
        config = load_config(text, "f.toml")
    except ConfigError as error:
        assert error.issues
        str(error).encode()
        _edit(text, (OTHER,))
        return
    assert not check_rules(config.rules)
    rules = [config.rules, config.rules[1:], (OTHER, *config.rules), config.rules[::-1]][how]
    if len({rule.name for rule in rules}) == len(rules):
        _edit(text, tuple(rules))


def _edit(text: str, rules: tuple[Rule, ...]) -> None:
    """The rules in the saved text are those that were given, in any order."""
    try:
        saved = save_rules(text, rules)
    except ConfigError:
        return  # not TOML
    try:
        again = load_config(saved, "saved")
    except ConfigError as error:
        assert not any(issue.rule for issue in error.issues), "the rules are fine; [relay] never was"
        return
    assert sorted(again.rules, key=lambda rule: rule.name) == sorted(rules, key=lambda rule: rule.name)
