"""Each interface that is up: its offloads, what its driver can do for XDP, and which cores its frames come in on.

Called by the package. Asks ethtool and generic netlink, reads /sys/class/net and /proc/irq.
"""

from collections.abc import Callable, Iterator
from typing import Final

from mrelay.cli import host
from mrelay.cli.doctor.finding import Finding
from mrelay.kernel import ethtool, netdev

GRO: Final = "rx-udp-gro-forwarding"
SEGMENTATION: Final = "tx-udp-segmentation"
_SHOWN: Final = (GRO, SEGMENTATION, "rx-vlan-hw-parse")
_LRO: Final = "rx-lro"


def _up() -> list[str]:
    """Those that are up, but for loopback."""
    flags = {name: host.interface_flags(name) or 0 for name in host.interfaces()}
    return [name for name, bits in flags.items() if bits & host.IFF_UP and not bits & host.IFF_LOOPBACK]


def _offloads() -> Iterator[Finding]:
    for name in _up():
        try:
            found = ethtool.features(name)
        except OSError as error:
            said, why = f"not readable: {error.strerror}", "unknown whether merged frames can be had here"
            yield Finding(f"offloads of {name}", "warn", said, why, f"ethtool -k {name}")
        else:
            yield _offload(name, found)
            lro = found.get(_LRO)
            if lro is not None and lro.active:
                why = "frames are merged so that the kernel can't take them apart again: they may leave too long"
                yield Finding(f"LRO of {name}", "warn", "on", why, command=f"ethtool -K {name} lro off")


def _offload(name: str, found: dict[str, ethtool.Feature]) -> Finding:
    gro = found.get(GRO)
    said = ", ".join(f"{feature} {_on(found.get(feature))}" for feature in _SHOWN)
    if gro is None or not (gro.active or gro.changeable):
        why = "frames come one by one: more CPU for each datagram"
        remedy = "use a kernel of 5.12 or later, or another driver"
        return Finding(f"offloads of {name}", "warn", said, why, remedy)
    segmentation = found.get(SEGMENTATION)
    why = "" if gro.active else "the relay switches GRO on for interfaces with rules, and back off at its end"
    if segmentation is not None and segmentation.changeable and not segmentation.active:
        why = "merged frames are cut up by the processor rather than by the interface: more CPU where it sends"
        command = f"ethtool -K {name} {SEGMENTATION} on"
        return Finding(f"offloads of {name}", "warn", said, why, command=command)
    return Finding(f"offloads of {name}", "ok", said, why)


def _on(feature: ethtool.Feature | None) -> str:
    return "absent" if feature is None else "on" if feature.active else "off"


# ---- XDP -----------------------------------------------------------------------------------------


def _xdp() -> Iterator[Finding]:
    """Never more than a note: XDP is the operator's choice, and tc forwards without it."""
    try:
        features = netdev.xdp_features()
    except OSError:
        yield Finding("XDP", "ok", "not shown here", "it takes Linux 6.3 to know what drivers can do")
        return
    for name in _up():
        bits = features.get(host.interface_index(name), 0)
        if not bits & netdev.NETDEV_XDP_ACT_BASIC:
            yield Finding(
                f"XDP of {name}", "ok", "not in its driver", "xdp = true has no effect here: tc forwards"
            )
        elif not bits & netdev.NETDEV_XDP_ACT_NDO_XMIT:
            why = "it can take frames by XDP, but not send them: as an output it is served by tc"
            yield Finding(f"XDP of {name}", "ok", "in its driver, receiving only", why)
        else:
            yield Finding(f"XDP of {name}", "ok", "in its driver, receiving and sending")


# ---- which cores -----------------------------------------------------------------------------------


def placement(workers: frozenset[int]) -> Iterator[Finding]:
    """Whether an interface's interrupts put its frames on the cores of `workers` when others are free; and RPS."""
    free = host.cores() - workers
    for name in _up():
        interrupts, queues = host.interrupts(name), host.receive_queues(name)
        cores = frozenset[int]().union(*interrupts.values())
        steered = {queue: mask for queue, mask in queues.items() if mask}
        said = f"{len(queues)} receive {'queue' if len(queues) == 1 else 'queues'}, "
        said += f"interrupts on {_cores(cores)}" if interrupts else "no interrupts of its own"
        said += f", RPS to {_cores(frozenset[int]().union(*steered.values()))}" if steered else ""
        check, busy = f"receiving on {name}", sorted(irq for irq, on in interrupts.items() if on <= workers)
        if busy and free:
            why = f"the kernel's part of receiving and a worker compete for core {_cores(cores & workers)}"
            numbers = " ".join(map(str, busy))
            command = f"sh -c 'for n in {numbers}; do echo {min(free)} > /proc/irq/$n/smp_affinity_list; done'"
            yield Finding(check, "warn", said, why, "where irqbalance runs, ban these cores there", command)
        else:
            yield Finding(check, "ok", said)


def _cores(cores: frozenset[int]) -> str:
    return ",".join(map(str, sorted(cores))) or "none"


LOOKS: Final[tuple[Callable[[], Iterator[Finding]], ...]] = (_offloads, _xdp)
