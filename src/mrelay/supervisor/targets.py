"""Which interfaces take frames from XDP, for control, which may not ask the kernel.

Owns what control knows of it. Called by supervisor.main, when the kernel says that something changed and for a new
control, and by supervisor.requests, once XDP is anywhere. The kernel answers at once, nothing else blocks.
"""

import logging
import selectors

from mrelay.messages import XdpTargets
from mrelay.supervisor.children import Child
from mrelay.supervisor.fastpath import FastPath

log = logging.getLogger("mrelay.supervisor")


class Targets:
    """In `selector`, this is the data of the descriptor that is readable when it is time to `tell`."""

    def __init__(self, fast: FastPath, control: Child, selector: selectors.BaseSelector) -> None:
        self._fast, self._control, self._selector = fast, control, selector
        self._told: frozenset[int] | None = None

    def tell_afresh(self) -> None:
        """Tell a control that knows nothing yet."""
        self._told = None
        self.tell()

    def tell(self) -> None:
        """Tell control, if XDP is anywhere and it does not know."""
        watch = self._fast.targets
        if watch is None:
            return
        if watch.fileno() not in self._selector.get_map():
            self._selector.register(watch, selectors.EVENT_READ, self)
        try:
            watch.drain()
            targets = watch.targets()
        except OSError as error:  # what control knows stays; frames for what can't take them are lost meanwhile
            log.error("cannot ask which interfaces take frames from XDP: %s", error)
            return
        if targets != self._told:
            self._told = targets
            self._control.tell(XdpTargets(tuple(sorted(targets))))
