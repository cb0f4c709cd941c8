"""What Prometheus gets, read by its own library and by promtool; the dashboard and the alerts ask for no more."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from mrelay.control.metrics import OPENMETRICS, SPECS, Facts, exposition
from mrelay.control.proc import Usage
from mrelay.counters import DROP_REASONS
from mrelay.ebpf.layout import PASSED
from promtool import promtool
from unit.script import load_script

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "packaging" / "prometheus"
ODD = 'lo:"\\\n:6000'  # an interface may be called anything but a slash
RULES = [
    {
        "name": f"r{number}",
        "state": "up" if number else "waiting: no interface eth9",
        "packets": 12345678901234567,
        "bytes": 700,
        "outputs": [{"to": to, "state": "up", "packets": 6, "bytes": 600, "errors": 1}],
    }
    for number, to in enumerate(("lo:239.2.2.2:6000", ODD))
]
WORKER = {"worker": 0, "pid": None, "restarts": 1, "repairs": 0, "received": 9, "carried": 5, "flows": 2}
STREAM = {
    "rule": "r1",
    "interface": "lo",
    "vlan": None,
    "source": "10.0.0.2",
    "group": "239.1.1.1",
    "port": 5000,
    "units": 100,
    "lost": 2,
    "reordered": 0,
    "duplicates": 0,
    "missed": 0,
    "loss": 0.02,
    "silence": 0.5,
    "jitter": None,
    "alarms": ["loss"],
}
FACTS = Facts(
    health={"version": "1.2.3", "engine": "ebpf", "egress": "io_uring"},
    started=1_700_000_000.25,
    stats={
        "received": 10,
        "matched": 7,
        "carried": 5,
        "drops": dict.fromkeys(DROP_REASONS, 3),
        "passed": dict.fromkeys(PASSED, 4),
        "engines": {"ebpf": 2, "uring": 1},
        "rules": RULES,
    },
    workers=[WORKER],
    interfaces={"lo": (True, False), "eth9": (False, False)},
    processes={"control": Usage(1.5, 1 << 20), "worker-0": Usage(None, None)},
    events={"rule_up": 3},
    followers=2,
    streams=[STREAM],
)


def families(accept: str) -> dict[str, Metric]:
    text, media_type = exposition(FACTS, accept)
    parse: Any = text_string_to_metric_families
    if accept:
        assert media_type == f"{OPENMETRICS}; version=1.0.0; charset=utf-8"
        parse = openmetrics.text_string_to_metric_families
    return {family.name: family for family in parse(text.decode())}


def samples(found: Iterable[Metric]) -> dict[tuple[str, tuple[str, ...]], float]:
    return {(s.name, tuple(sorted(s.labels.values()))): s.value for family in found for s in family.samples}


@pytest.mark.parametrize("accept", ["", f"text/html, {OPENMETRICS};version=1.0.0;q=0.5,text/plain"])
def test_values_and_labels_come_through(accept: str) -> None:
    found = samples(families(accept).values())
    assert found["mrelay_build_info", ("1.2.3", "ebpf", "io_uring")] == 1
    assert found["mrelay_start_time_seconds", ()] == 1_700_000_000.25
    assert found["mrelay_dropped_datagrams_total", ("ring_full",)] == 3
    assert found["mrelay_slow_path_frames_total", ("no_flow",)] == 4
    assert found["mrelay_flows", ("ebpf",)] == 2
    assert (found["mrelay_rules", ("up",)], found["mrelay_rules", ("waiting",)]) == (1, 1)
    assert found["mrelay_rule_datagrams_total", ("r0",)] == 12345678901234567
    assert (found["mrelay_rule_up", ("r0",)], found["mrelay_rule_up", ("r1",)]) == (0, 1)
    assert found["mrelay_output_errors_total", (ODD, "r1")] == 1
    assert found["mrelay_interface_up", ("eth9",)] == 0
    assert (found["mrelay_worker_up", ("0",)], found["mrelay_worker_restarts_total", ("0",)]) == (0, 1)
    assert found["mrelay_process_cpu_seconds_total", ("control",)] == 1.5
    assert ("mrelay_process_cpu_seconds_total", ("worker-0",)) not in found
    assert found["mrelay_events_total", ("rule_up",)] == 3
    stream = ("", "10.0.0.2", "239.1.1.1", "5000", "lo", "r1")
    assert found["mrelay_stream_loss_ratio", stream] == 0.02
    assert ("mrelay_stream_jitter_seconds", stream) not in found
    assert found["mrelay_stream_alarm", tuple(sorted([*stream, "loss"]))] == 1


def test_openmetrics_says_kind_and_unit_of_each() -> None:
    found = families(OPENMETRICS)
    assert {name: family.type for name, family in found.items()} == {n: spec.kind for n, spec in SPECS.items()}
    assert all(family.documentation == SPECS[name].help for name, family in found.items())
    units = {name: family.unit for name, family in found.items() if family.unit}
    assert units == {
        "mrelay_start_time_seconds": "seconds",
        "mrelay_rule_bytes": "bytes",
        "mrelay_output_bytes": "bytes",
        "mrelay_process_cpu_seconds": "seconds",
        "mrelay_process_resident_memory_bytes": "bytes",
        "mrelay_stream_jitter_seconds": "seconds",
        "mrelay_stream_silence_seconds": "seconds",
    }


def test_samples_have_the_labels_that_the_page_says() -> None:
    for name, family in families(OPENMETRICS).items():
        assert {tuple(sample.labels) for sample in family.samples} <= {SPECS[name].labels}, name


def test_the_page_is_current() -> None:
    made = load_script("make_metrics").page()
    assert (ROOT / "docs" / "metrics.md").read_text() == made, "run: python scripts/make_metrics.py"


def test_dashboard_and_alerts_ask_for_what_there_is() -> None:
    known = {sample.name for family in families("").values() for sample in family.samples}
    dashboard = json.loads((ROOT / "packaging" / "grafana" / "mrelay.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["query"]["query"] for variable in dashboard["templating"]["list"][1:]]
    asked += [annotation["expr"] for annotation in dashboard["annotations"]["list"]]
    asked.append((PROMETHEUS / "mrelay.rules.yml").read_text().split("groups:")[1])
    for text in asked:
        names = set(re.findall(r"\bmrelay_\w+", text))
        assert names, text
        assert names <= known, text


def test_promtool_finds_no_fault_with_the_metrics() -> None:
    done = promtool("check", "metrics", text=exposition(FACTS, "")[0])
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_each_alert_is_tested_and_fires_when_it_should() -> None:
    rules, tests = PROMETHEUS / "mrelay.rules.yml", PROMETHEUS / "mrelay.test.yml"
    alerts = set(re.findall(r"- alert: (\w+)", rules.read_text()))
    fired = set(re.findall(r"- alertname: (\w+)\n", tests.read_text()))
    assert alerts == fired
    for arguments in (("check", "rules", str(rules)), ("test", "rules", str(tests))):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
