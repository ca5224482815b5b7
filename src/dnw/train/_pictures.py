"""What a run leaves to look at: snapshots of its wiring, and its page.

Contract: training does not depend on it. Where a picture cannot be made, that is said once, and training goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dnw.count import graphs_of
from dnw.data import Batches
from dnw.train._log import Log
from dnw.train._network import Network
from dnw.train._run import RunDirectory
from dnw.train._view import Page
from dnw.view import SnapshotWriter, inside

_IMAGES_SEEN = 3  # by the nodes


class Pictures:
    """The snapshots and the page of a run while it trains; none where the network has no graphs that they could show.

    Args:
        run: where they are written.
        network: what they show; snapshots of steps after its own are replaced.
        log: where it is said that something cannot be made.
    """

    def __init__(self, run: RunDirectory, network: Network, log: Log) -> None:
        self._network, self._log = network, log
        self._failed: set[str] = set()
        self._writer: SnapshotWriter | None = None
        self._page: Page | None = None
        if graphs_of(network.model):
            with self._unless_it_fails("snapshots"):
                self._writer = SnapshotWriter(run.snapshots, network.step)
            self._page = Page(run, network.config, network.model)

    def snapshot(self, step: int, epoch: float, batches: Batches | None = None) -> None:
        """Writes the wiring as it is now with the nodes' filters; given batches, what the first test images look like there."""
        if self._writer is None:
            return
        with self._unless_it_fails("snapshots"), self._network.wiring.settled():
            images = None if batches is None else next(iter(batches.test()))[0][:_IMAGES_SEEN]
            data = self._network.config.data
            beside = inside(self._network.model, images, data.mean, data.std)
            self._writer.write(self._network.wiring, step, epoch, beside)

    def refresh(self, *, last: bool) -> None:
        """Writes the page again, where that takes little of the time."""
        if self._page is not None:
            with self._unless_it_fails("page"):
                self._page.refresh(last=last)

    @contextmanager
    def _unless_it_fails(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of whatever kind: training does not depend on it
            if what not in self._failed:
                self._log.line(f"no {what} of this run, training goes on: {' '.join(str(error).split())}")
            self._failed.add(what)
