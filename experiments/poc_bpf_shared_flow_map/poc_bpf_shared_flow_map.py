"""One map of flows: read by a tc program and a packet socket's filter, written by a process without rights.

Can a flow pass from the slow path (AF_PACKET and a UDP socket) to the fast path (tc) and back, at 100,000
datagrams a second, without one lost, doubled or out of order? README.md beside this says how it is shown and
what was learned; flow_map_claims.py holds the claims.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runnable alone: the shared half is one folder up
from experiment import Experiment

PREMISES = ("one-decision", "waiting", "patience", "one-map", "capabilities")


def main() -> None:
    """Look for what it needs, then run it all."""
    experiment = Experiment("poc_bpf_shared_flow_map", __doc__ or "", PREMISES)
    experiment.need_root()
    if len(os.sched_getaffinity(0)) < 2:
        experiment.lacks("two processors: the map has to change while a packet is on its way")
    try:
        import libbpf  # noqa: F401  # the modules below import it too
    except OSError:
        experiment.lacks("libbpf.so.1 (Debian's package libbpf1)")
    from bpf_build import BuildError, compiled
    from flow_map_claims import Claims
    from flow_map_lab import HERE, RELAY_CORE

    try:
        for program in ("flow_map", "numbered"):
            compiled(HERE / f"{program}.bpf.c")
    except BuildError as error:
        experiment.lacks(str(error))
    os.sched_setaffinity(0, {RELAY_CORE})  # the other one is the load's
    experiment.finish(Claims(experiment).run())


if __name__ == "__main__":
    main()
