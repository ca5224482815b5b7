"""Snapshots: every edge set comes back exactly, from small files."""

import itertools

import numpy as np
import pytest
import torch
from helpers import small_net, train_steps

import dnw
from dnw.view import SnapshotWriter, read_snapshots


def run(folder, steps: int, start: int = 0):
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    wiring = dnw.wire(model, optimizer, density=0.2)
    writer = SnapshotWriter(folder)
    expected = []
    for step in range(steps):
        writer.write(wiring, step, step / 2)
        expected.append(
            {n: (wiring[n].active.flatten().numpy().nonzero()[0], wiring[n].weight.flatten().numpy()) for n in wiring}
        )
        train_steps(model, optimizer, range(step, step + 1))
    return expected


def test_round_trip(tmp_path):
    expected = run(tmp_path, 6)
    snapshots = list(read_snapshots(tmp_path))
    assert [(s.step, s.epoch) for s in snapshots] == [(i, i / 2) for i in range(6)]
    for snapshot, edges in zip(snapshots, expected, strict=True):
        for name, (active, weight) in edges.items():
            assert np.array_equal(snapshot.edges[name], active)
            assert np.array_equal(snapshot.weights[name], weight[active].astype(np.float16))
    assert any(not np.array_equal(a.edges["5.weight"], b.edges["5.weight"]) for a, b in itertools.pairwise(snapshots))


def test_a_resumed_writer_drops_what_was_lost_and_goes_on(tmp_path):
    run(tmp_path, 6)
    before = list(read_snapshots(tmp_path))
    writer = SnapshotWriter(tmp_path, step=2)
    assert [s.step for s in read_snapshots(tmp_path)] == [0, 1, 2]
    model = small_net(3)
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.2)
    writer.write(wiring, 2, 1.0)  # there already: stays
    writer.write(wiring, 9, 4.5)
    after = list(read_snapshots(tmp_path))
    assert [s.step for s in after] == [0, 1, 2, 9]
    assert np.array_equal(after[2].edges["5.weight"], before[2].edges["5.weight"])
    assert np.array_equal(after[3].edges["5.weight"], wiring["5.weight"].active.flatten().numpy().nonzero()[0])


def test_missing_and_damaged_snapshots_are_named(tmp_path):
    run(tmp_path, 4)
    path = tmp_path / "step-00000002.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    with pytest.raises(ValueError, match=r"step-00000002.npz: not a readable snapshot"):
        list(read_snapshots(tmp_path))
    (tmp_path / "step-00000000.npz").unlink()
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"step-00000001.npz: not a readable snapshot \(the snapshot of step 0, which it"):
        list(read_snapshots(tmp_path))
    assert list(read_snapshots(tmp_path / "none")) == []
