"""A socket that only joins, and packets taken elsewhere: who brings a stream in, and who keeps it coming."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runnable alone: the shared half is one folder up
import helper_filters
import helper_links
import helper_ownership
import helper_rings
import helper_sockets
from helper_lab import Lab

from experiment import Experiment

PREMISES = {
    "helper": "the helper stays open",
    "report": "it is a UDP socket's membership, not a packet socket's",
    "snooping": "the switch looks at reports",
    "owner": "nobody else has a copy of the helper's descriptor",
}


def main() -> None:
    """The whole run. Without a premise only the part is run that rests on it."""
    experiment = Experiment("poc_helper_socket_igmp", __doc__ or "", tuple(PREMISES))
    experiment.need_root()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # frames stay in order when one CPU handles all
    with Lab() as lab:
        if experiment.runs("helper", "report", "snooping"):
            brought = helper_filters.show(experiment, lab)
        if experiment.runs("owner"):
            delays = helper_ownership.show(experiment, lab)
        if experiment.broken:
            experiment.finish(f"without {experiment.broken}")
        helper_sockets.show(experiment, lab)
        dearer = helper_rings.show(experiment, lab)
        limits = helper_links.show_limits(experiment, lab)
        helper_links.show_life(experiment, lab)
    experiment.finish(
        f"{brought}, none at the helpers; join/leave on the wire after {delays} ms; {limits}; "
        f"a packet socket for each of 64 groups: {dearer:.1f}x the time of one ring"
    )


if __name__ == "__main__":
    main()
