"""`python -m mrelay.supervisor OPTIONS`, as `mrelay run` starts it: one JSON object.

Owns which privileges are kept, and that a relay without them does not start. Exit statuses: 77 without the
privileges that it needs (EX_NOPERM), 78 when control finds the config bad (EX_CONFIG), 1 when start-up fails
otherwise.
"""

import json
import logging
import os
import resource
import sys
from typing import Final

from mrelay import logs
from mrelay.child import collect_less
from mrelay.kernel import caps
from mrelay.supervisor.host import clear_path
from mrelay.supervisor.main import Supervisor
from mrelay.supervisor.resources import Refused

log = logging.getLogger("mrelay.supervisor")

EX_NOPERM: Final = 77  # sysexits.h
_NEEDED: Final = (caps.CAP_NET_RAW, caps.CAP_NET_ADMIN, caps.CAP_SETUID, caps.CAP_SETGID, caps.CAP_KILL)
# Kept if we have them: for unicast inputs below port 1024, paths and groups that are not ours, and so that
# children can empty their bounding sets.
_USEFUL: Final = (
    *(caps.CAP_NET_BIND_SERVICE, caps.CAP_CHOWN, caps.CAP_DAC_OVERRIDE, caps.CAP_SETPCAP),
    *(caps.CAP_BPF, caps.CAP_PERFMON),  # for the kernel's fast path
)


def _raise_descriptor_limit() -> None:
    """Every worker's sockets are ours too, and descriptors on their way to a worker count as well."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> int:
    """Until the relay ends; its exit status."""
    options = json.loads(sys.argv[1])
    logs.configure(options["log_format"], options["log_level"])
    logs.set_up("supervisor")
    lacking = caps.missing(_NEEDED)
    if lacking:
        log.error("mrelay run lacks %s: run it as root (sudo mrelay run …)", ", ".join(lacking))
        return EX_NOPERM
    try:
        caps.keep_only(_NEEDED + _USEFUL)
    except caps.PrivilegeError as error:
        log.error("cannot start: %s", error)
        return EX_NOPERM
    _raise_descriptor_limit()
    collect_less()
    os.chdir("/")
    try:
        clear_path(options["socket"])  # before a second relay sends anything twice
    except (Refused, OSError) as error:
        log.error("cannot start: %s: %s", error, getattr(error, "remedy", "choose another path with --socket"))
        return 1
    return Supervisor(options).main()


if __name__ == "__main__":
    sys.exit(main())
