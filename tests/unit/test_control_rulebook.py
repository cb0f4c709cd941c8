"""How the running rules change: the merge with an edited file, and differences."""

from hypothesis import given
from hypothesis import strategies as st

from mrelay.control.rulebook import difference, merge
from mrelay.model.rule import Rule

# Rules of few names, each in one of three versions.
Versions = dict[str, int]
VERSIONS = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 2))


def rules(versions: Versions) -> tuple[Rule, ...]:
    return tuple(
        Rule.model_validate({"name": name, "from": f"eth0:239.1.1.{v}:5000", "to": ["eth1:239.2.2.2:6000"]})
        for name, v in versions.items()
    )


@given(VERSIONS, VERSIONS, VERSIONS)
def test_each_rule_follows_the_file_only_where_the_file_changed(
    running: Versions, old: Versions, new: Versions
) -> None:
    merged = {rule.name: rule for rule in merge(rules(running), rules(old), rules(new))}
    for name in "abcd":
        ours = new if old.get(name) != new.get(name) else running
        expected = {rule.name: rule for rule in rules(ours)}.get(name)
        assert merged.get(name) == expected


@given(VERSIONS, VERSIONS)
def test_an_unchanged_file_changes_nothing(running: Versions, file: Versions) -> None:
    assert merge(rules(running), rules(file), rules(file)) == rules(running)


@given(VERSIONS)
def test_a_first_start_runs_the_file(file: Versions) -> None:
    assert merge((), (), rules(file)) == rules(file)


@given(VERSIONS, VERSIONS)
def test_a_difference_names_each_rule_once(before: Versions, after: Versions) -> None:
    found = difference(rules(before), rules(after))
    assert set(found.added) == after.keys() - before.keys()
    assert set(found.removed) == before.keys() - after.keys()
    assert set(found.changed) == {n for n in before.keys() & after.keys() if before[n] != after[n]}
    assert set(found.unchanged) == {n for n in before.keys() & after.keys() if before[n] == after[n]}
