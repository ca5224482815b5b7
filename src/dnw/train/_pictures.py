"""What a run leaves to look at: what its wiring did, snapshots of it, and a page.

Contract: training does not depend on it. Where a picture cannot be made, that is said once, and training goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dnw.count import graphs_of
from dnw.data import Batches
from dnw.train._log import Log
from dnw.train._network import Network
from dnw.train._run import RunDirectory
from dnw.train._view import Page
from dnw.view import Recorder, SnapshotWriter, inside

_IMAGES_SEEN = 3  # by the nodes
_OF_LAYERS = 15
"""Snapshots after the first epoch of a network without graphs, about: those of millions of edges take time and room."""
_MOST_EDGES = 20_000_000
"""Of a network without graphs in a snapshot; with more it has none."""


class Pictures:
    """The records, the snapshots and the page of a run while it trains.

    Args:
        run: where they are written.
        network: what they show; records and snapshots of steps after its own are replaced.
        log: where it is said that something cannot be made.
    """

    def __init__(self, run: RunDirectory, network: Network, log: Log) -> None:
        self._network, self._log = network, log
        self._failed: set[str] = set()
        self._writer: SnapshotWriter | None = None
        self._page: Page | None = None
        self._recorder: Recorder | None = None
        with self._unless_it_fails("records"):
            if network.step == 0:
                run.records.unlink(missing_ok=True)
            self._recorder = Recorder(network.wiring, run.records)
        if self._recorder is not None and network.ages is not None:
            with self._unless_it_fails("ages of edges before now"):
                self._recorder.load_state_dict(network.ages)
        self._has_graphs = bool(graphs_of(network.model))
        with self._unless_it_fails("snapshots"):
            self._writer = SnapshotWriter(run.snapshots, network.step)
        self._page = Page(run, network.config, network.model)

    def snapshot(self, step: int, epoch: float, batches: Batches | None = None) -> None:
        """Writes the wiring as it is now with the nodes' filters; given batches, what the first test images look like there."""
        if self._recorder is not None:
            with self._unless_it_fails("records"):
                self._recorder.record(epoch=epoch)
        if self._writer is None or not self._is_due(epoch):
            return
        with self._unless_it_fails("snapshots"), self._network.wiring.settled():
            images = None if batches is None else next(iter(batches.test()))[0][:_IMAGES_SEEN]
            data = self._network.config.data
            beside = inside(self._network.model, images, data.mean, data.std)
            self._writer.write(self._network.wiring, step, epoch, beside)

    def _is_due(self, epoch: float) -> bool:
        epochs = self._network.config.epochs
        if not self._has_graphs and self._network.wiring.num_active > _MOST_EDGES:
            return False
        return self._has_graphs or epoch <= 1 or epoch == epochs or epoch % -(-epochs // _OF_LAYERS) == 0

    def ages(self) -> Any:
        """Since when edges are there, for the checkpoint that the run goes on from."""
        return None if self._recorder is None else self._recorder.state_dict()

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
