"""A packet socket opened with CAP_NET_RAW, used by a process that is nobody and can never be more."""

import sys
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runnable alone: the shared half is one folder up
import privdrop_descriptors
import privdrop_ends
import privdrop_worker_claims
from privdrop_host import Host, Network

from experiment import Experiment

PREMISES: Final = {
    "capability": "the worker keeps no CAP_NET_RAW",
    "drop": "the worker drops its privileges",
    "ends": "the host closes the worker's end of the channel",
}
HOW: Final = {"capability": "keep CAP_NET_RAW", "drop": "nothing"}


def main() -> None:
    """The whole run."""
    experiment = Experiment("poc_fd_passing_privdrop", __doc__ or "", tuple(PREMISES))
    experiment.need_root()
    how = HOW.get(experiment.broken or "", "all")
    with Network() as network:
        with Host(network, how, keep_theirs=experiment.broken == "ends") as host:
            received = privdrop_worker_claims.show(experiment, network, host)
            privdrop_ends.show_death(experiment, host)
        privdrop_ends.show_mistakes(experiment, network)
        privdrop_descriptors.show(experiment)
    cost = privdrop_descriptors.pass_cost(200 if experiment.short else 2000)
    experiment.finish(
        f"nobody received {received}; started in {host.start_ms:.0f} ms, privileges dropped in "
        f"{host.drop_ms:.1f} ms, a descriptor passed in {cost:.0f} us"
    )


if __name__ == "__main__":
    main()
