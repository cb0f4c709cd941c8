"""Rules as JSON, as the API takes them: refused by name with words that can be sent, or round trip."""

import json

from mrelay.model.config import ConfigError, parse_rules
from mrelay.model.rule import check_rules


def check(data: bytes) -> None:
    try:
        tables = json.loads(data)
    except (ValueError, RecursionError):
        return
    try:
        rules = parse_rules(tables, "")
    except ConfigError as error:
        assert error.issues
        for issue in error.issues:
            assert issue.problem
            assert issue.remedy
            json.dumps([issue.rule, issue.key, issue.problem, issue.remedy], ensure_ascii=False).encode()
        return
    assert not check_rules(rules)
    assert parse_rules([rule.to_table() for rule in rules], "") == rules
