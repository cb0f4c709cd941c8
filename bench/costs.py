"""What forwarding costs: time of the relay's processes and receiving thread, its core's use, its memory.

Reads /proc. A thread's time is exact (schedstat, ns); how a process's time splits into user and system is what the
kernel makes of its samples, and so are a core's shares. Called by measure.py; nothing blocks.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import lab as labs

_TICK: Final = 1 / os.sysconf("SC_CLK_TCK")  # seconds
_MB: Final = 1e6
_CORE: Final = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")  # proc_stat(5), ticks


@dataclass(frozen=True)
class Snapshot:
    """Seconds so far: of the relay's processes and its receiving thread; of cores, by kind."""

    user: float
    system: float
    processes: float
    network: float
    core: dict[str, float]
    sink_core: dict[str, float]

    @classmethod
    def of(cls, pids: Sequence[int], lab: labs.Lab, cores: labs.Cores) -> Self:
        """Now."""
        times = [_times(pid) for pid in pids]
        network = _ran(Path(f"/proc/{lab.napi['r0']}")) if "r0" in lab.napi else 0.0
        processes = sum(_process_ran(pid) for pid in pids)
        core, sink_core = (_core(number) for number in (cores.relay, cores.sink))
        return cls(sum(u for u, _ in times), sum(s for _, s in times), processes, network, core, sink_core)


def spent(before: Snapshot, after: Snapshot, seconds: float, packets: int) -> dict[str, float]:
    """Between two: nanoseconds for each of `packets`, and shares of a core in percent.

    cpu: all that the relay took, its processes and its receiving thread (what a NIC's softirq would do). user and
    system split the former. core_*: of the relay's core, as the kernel accounts for it.
    """
    each = 1e9 / packets if packets else float("nan")
    processes, network = after.processes - before.processes, after.network - before.network
    sampled = (after.user - before.user) + (after.system - before.system)
    user = processes * (after.user - before.user) / sampled if sampled else 0.0
    shares = {f"core_{kind}": 100 * (after.core[kind] - before.core[kind]) / seconds for kind in _CORE}
    idle = after.sink_core["idle"] - before.sink_core["idle"]
    return {
        "cpu": (processes + network) * each,
        "cpu_user": user * each,
        "cpu_system": (processes - user) * each,
        "cpu_network": network * each,
        "sink_idle": 100 * idle / seconds,
        **shares,
    }


def memory(pids: Sequence[int]) -> dict[str, float]:
    """MB: the processes' proportional set sizes, and what their BPF maps take in the kernel."""
    pss = 0.0
    maps: dict[str, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            lines = dict(_fields(Path(f"/proc/{pid}/smaps_rollup"), skip=1))
            pss += int(lines["Pss"].split()[0]) * 1024 / _MB
            for descriptor in Path(f"/proc/{pid}/fdinfo").iterdir():
                fields = dict(_fields(descriptor))
                if "map_id" in fields:
                    maps[fields["map_id"]] = int(fields["memlock"])
    return {"pss": pss, "maps": sum(maps.values()) / _MB}


def _fields(file: Path, skip: int = 0) -> list[tuple[str, str]]:
    lines = file.read_text().splitlines()[skip:]
    return [(key, value.strip()) for key, colon, value in (line.partition(":") for line in lines) if colon]


def _times(pid: int) -> tuple[float, float]:
    """User and system seconds of a process; none when it has ended."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) * _TICK, int(fields[12]) * _TICK
    return 0.0, 0.0


def _ran(task: Path) -> float:
    """Seconds that a thread has run."""
    with contextlib.suppress(OSError):
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    return 0.0


def _process_ran(pid: int) -> float:
    with contextlib.suppress(OSError):
        return sum(_ran(task) for task in Path(f"/proc/{pid}/task").iterdir())
    return 0.0


def _core(number: int) -> dict[str, float]:
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name == f"cpu{number}":
            return {kind: int(n) * _TICK for kind, n in zip(_CORE, ticks, strict=False)}
    raise RuntimeError(f"/proc/stat has no cpu{number}")
