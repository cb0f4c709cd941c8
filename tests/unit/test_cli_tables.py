"""What `mrelay flows` prints."""

from typing import Any

import pytest

from mrelay.cli import output, tables


def flow(outputs: list[str]) -> dict[str, Any]:
    numbers = dict.fromkeys(("port", "packets", "pps", "bps", "worker"), 1)
    words = {
        "interface": "eth0",
        "source": "10.0.0.1",
        "group": "239.1.1.1",
        "engine": "ebpf",
        "why": "",
        "health": "",
    }
    return {**numbers, **words, "vlan": None, "rules": ["studio"], "outputs": outputs}


@pytest.mark.parametrize(("count", "lines"), [(0, 1), (16, 16), (17, 17), (18, 17), (10_000, 17)])
def test_a_flow_with_many_outputs(count: int, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    """As many lines as one can look at; how many are left out, and where they are, is said."""
    outputs = [f"eth1:10.1.{n // 250}.{n % 250 + 1}:5000" for n in range(count)]
    output.print_view(tables._flows_table({"flows": [flow(outputs)]}))
    head, *shown = capsys.readouterr().out.splitlines()
    assert head.startswith("INTERFACE")
    assert len(shown) == lines
    assert all(each in line for each, line in zip(outputs[:16], shown, strict=False))
    left = count - 16
    assert (f"and {left:,} more (all: --json)" in shown[-1]) == (left > 1)
