"""What a recorder says of a wiring is what happened, in any loop, and goes on where a run was resumed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import batch, small_net
from torch import nn

import dnw
from dnw.cli import main
from dnw.graphs import StaticGraph
from dnw.train import Log, RunDirectory, resume, train
from dnw.view import Recorder, read_records, write_history


def wired(seed: int = 0, **options: object) -> tuple[nn.Module, torch.optim.Optimizer, dnw.Wiring]:
    net = small_net(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    return net, optimizer, dnw.wire(net, optimizer, **{"density": 0.2, **options})


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        images, labels = batch(number)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "options", [{}, {"rule": dnw.SET(every=3)}, {"schedule": dnw.DensitySchedule(15)}], ids=["DNW", "SET", "falling"]
)
def test_records_say_what_happened(options, tmp_path):
    """Against the masks of every step, kept whole."""
    net, optimizer, wiring = wired(**options)
    recorder = Recorder(wiring, tmp_path / "wiring.jsonl")
    found, masks = [recorder.record(loss=2)], [{name: wiring[name].active for name in wiring}]
    for number in range(20):
        steps(net, optimizer, range(number, number + 1))
        found.append(recorder.record(loss=0.5))
        masks.append({name: wiring[name].active for name in wiring})
    assert found == list(read_records(tmp_path / "wiring.jsonl"))
    assert [one["step"] for one in found] == list(range(21))
    assert found[0]["values"] == {"loss": 2}
    assert any(one["total"]["entered"] for one in found)
    for now, one in enumerate(found):
        for name, row in one["layers"].items():
            active = masks[now][name]
            before = masks[max(0, now - 1)][name]
            assert row["active"] == int(active.sum())
            assert row["density"] == pytest.approx(row["active"] / wiring[name].num_candidates)
            assert row["entered"] == int((active & ~before).sum())
            assert row["left"] == int((before & ~active).sum())
            ever = torch.stack([mask[name] for mask in masks[: now + 1]]).any(0)
            assert row["ever_active"] == pytest.approx(int(ever.sum()) / wiring[name].num_candidates)
            since = [
                next(k for k in range(now, -1, -1) if k == 0 or not masks[k - 1][name][at])
                for at in map(tuple, active.nonzero())
            ]
            ages = torch.tensor([float(now - k) for k in since])
            assert row["age"] == pytest.approx(ages.quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1])).tolist())
        assert one["total"]["active"] == sum(row["active"] for row in one["layers"].values())
    weight = wiring["5.weight"]
    values = weight.weight[weight.active].abs().quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    assert found[-1]["layers"]["5.weight"]["magnitude"] == pytest.approx(values.tolist())
    stats = wiring.stats()["layers"]
    assert {n: (r["dead_targets"], r["dead_sources"]) for n, r in stats.items()} == {
        n: (r["dead_targets"], r["dead_sources"]) for n, r in found[-1]["layers"].items()
    }


def test_it_records_by_itself_and_changes_nothing(tmp_path):
    net, optimizer, wiring = wired()
    other, its_optimizer, its_wiring = wired()
    with Recorder(wiring, tmp_path / "new" / "wiring.jsonl", every=4) as recorder:
        steps(net, optimizer, range(10))
    steps(net, optimizer, range(10, 14))
    steps(other, its_optimizer, range(14))
    assert [one["step"] for one in read_records(tmp_path / "new" / "wiring.jsonl")] == [4, 8]
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))
    assert all(torch.equal(wiring[n].latent, its_wiring[n].latent) for n in wiring)
    scalars = recorder.scalars()
    assert scalars["wiring/density"] == pytest.approx(wiring.num_active / wiring.num_candidates)
    assert {
        "wiring/5.weight/entered",
        "wiring/5.weight/age/0.5",
        "wiring/5.weight/magnitude/1",
        "wiring/ever_active",
    } <= scalars.keys()
    assert all(type(value) is float for value in scalars.values())
    recorder.record(loss=0.25)
    assert recorder.scalars()["wiring/loss"] == 0.25


def test_a_checkpoint_may_be_loaded_after_the_recorder_was_made(tmp_path):
    path = tmp_path / "wiring.jsonl"
    net, optimizer, wiring = wired()
    with Recorder(wiring, path, every=2) as recorder:
        steps(net, optimizer, range(5))
        kept = copy.deepcopy((net.state_dict(), optimizer.state_dict())), recorder.state_dict()
        before = [tensor.clone() for tensor in kept[1]["since"].values()]
        steps(net, optimizer, range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(before, kept[1]["since"].values(), strict=True))  # it is a copy
    net, optimizer, wiring = wired()
    with Recorder(wiring, path, every=2) as recorder:
        net.load_state_dict(kept[0][0])
        optimizer.load_state_dict(kept[0][1])
        recorder.load_state_dict(kept[1])
        assert [one["step"] for one in read_records(path)] == [2, 4, 6, 8]  # until it is clear where this goes on
        steps(net, optimizer, range(5, 6))
        assert [one["step"] for one in read_records(path)] == [2, 4, 6]
    with pytest.raises(ValueError, match="no state of a recorder: it has no 'since'"):
        recorder.load_state_dict({})


def test_a_resumed_loop_continues_ages_and_lines(tmp_path):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    net, optimizer, wiring = wired()
    with Recorder(wiring, whole, every=2):
        steps(net, optimizer, range(12))
    net, optimizer, wiring = wired()
    with Recorder(wiring, part, every=2) as recorder:
        steps(net, optimizer, range(6))
        kept = copy.deepcopy((net.state_dict(), optimizer.state_dict(), recorder.state_dict()))
        steps(net, optimizer, range(6, 9))  # of which nothing is kept but a line
    with part.open("a") as file:
        file.write('{"step": 10, "val')  # killed while it wrote
    net, optimizer, wiring = wired(seed=1)
    net.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    with Recorder(wiring, part, every=2) as recorder:
        recorder.load_state_dict(kept[2])
        steps(net, optimizer, range(6, 12))
    assert part.read_text() == whole.read_text()


def test_what_it_refuses(tmp_path):
    _, _, wiring = wired()
    for every in (-1, 1.5, True):
        with pytest.raises(ValueError, match="allowed is a number of steps from 1 on, or 0"):
            Recorder(wiring, every=every)
    with pytest.raises(ValueError, match=r"loss=tensor\(1.\): expected a number, such as float\(loss\)"):
        Recorder(wiring).record(loss=torch.tensor(1.0))
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1: no record of a wiring"):
        Recorder(wiring, tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_text().count("step") == 2
    recorder = Recorder(wiring)
    recorder.record()
    state = recorder.state_dict()
    state["since"]["5.weight"] = state["since"]["5.weight"][:3]
    with pytest.raises(ValueError, match=r"the state knows '5.weight' as \(3, 32\), which is not wired like that here"):
        Recorder(wiring).load_state_dict(state)
    assert Recorder(wiring).scalars() == {}


def test_a_run_keeps_the_same_records_however_often_it_was_stopped(tmp_path):
    class Killed(Exception):
        pass

    def killer(path: Path, metrics: dnw.train.EpochMetrics) -> None:
        if metrics.epoch == 3:
            raise Killed

    settings = {"epochs": 4, "baseline": None, "first_epoch_snapshots": 2}
    whole = train("digits", out=tmp_path / "whole", log=Log(quiet=True), **settings)
    part = tmp_path / "part"
    with pytest.raises(Killed):
        train("digits", out=part, log=Log(quiet=True), loggers=[killer], **settings)
    assert len(RunDirectory(part).records.read_text().splitlines()) == 1 + 2 + 3
    resume(part, log=Log(quiet=True))
    assert RunDirectory(part).records.read_text() == RunDirectory(whole).records.read_text()
    lines = list(read_records(RunDirectory(whole).records))
    metrics = RunDirectory(whole).metrics()
    assert [one["values"]["epoch"] for one in lines][3:] == [1, 2, 3, 4]
    assert [one["total"]["active"] for one in lines][3:] == [m.active for m in metrics]
    assert [one["total"]["entered"] for one in lines][4:] == [m.entered for m in metrics][1:]


def test_ages_that_do_not_fit_are_said_once_and_training_goes_on(tmp_path, capsys):
    run = train("digits", out=tmp_path / "run", log=Log(quiet=True), epochs=1, baseline=None, first_epoch_snapshots=0)
    content = torch.load(run / "last.pt", weights_only=True)
    content["ages"]["since"]["graph.weight"] = torch.zeros(3, dtype=torch.int32)
    torch.save(content, run / "last.pt")
    resume(run, epochs=2)
    assert "no ages of edges before now of this run, training goes on: the state knows" in capsys.readouterr().out
    assert len(RunDirectory(run).metrics()) == 2
    json.loads(RunDirectory(run).records.read_text().splitlines()[-1])


def test_nodes_that_can_have_no_edge_are_not_dead():
    graph = StaticGraph([4, 4, 4], 3, shared_outputs=True)  # the rows of its inputs are never read
    wiring = dnw.wire(graph, torch.optim.SGD(graph.parameters(), lr=0.1), rule=dnw.Complete())
    found = Recorder(wiring).record()["total"]
    assert (found["dead_targets"], found["dead_sources"]) == (0, 0)
    assert wiring.stats()["total"]["dead_targets"] == 0


def test_curves_take_several_records_of_a_step_as_one(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    net, optimizer, wiring = wired()
    with Recorder(wiring, tmp_path / "wiring.jsonl", every=2) as recorder:
        for step in range(8):
            steps(net, optimizer, range(step, step + 1))
            if step % 2:
                recorder.record(loss=1.0)
    drawn: list[list[float]] = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda it, *_, **__: drawn.append(list(it.axes[0].lines[0].get_ydata())))
    monkeypatch.setattr("dnw.view._history.save_figure", lambda it, path: it.savefig(path))
    write_history({"a": tmp_path / "wiring.jsonl"}, tmp_path / "curves.svg")
    records = [one["total"] for one in read_records(tmp_path / "wiring.jsonl")][::2]
    assert drawn == [[pytest.approx(one["entered"] / one["active"] / 2) for one in records[1:]]]


def test_curves_of_records(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    net, optimizer, wiring = wired()
    recorder = Recorder(wiring, tmp_path / "wiring.jsonl", every=2)
    recorder.record()
    with pytest.raises(ValueError, match="wiring.jsonl: 1 records; curves need two or more"):
        write_history({"a": tmp_path / "wiring.jsonl"}, tmp_path / "curves.svg")
    steps(net, optimizer, range(6))
    size = write_history({"ours & <theirs>": tmp_path / "wiring.jsonl"}, tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    assert len(drawn.encode()) == size
    assert "ours &amp; &lt;theirs&gt;" in drawn
    assert all(title in drawn for title in ("candidates ever active, share", "targets and sources without an edge"))
    with pytest.raises(ValueError, match="pictures are written as"):
        write_history({"a": tmp_path / "wiring.jsonl"}, tmp_path / "curves.xyz")
    run = train("digits", epochs=1, out=tmp_path / "run", log=Log(quiet=True))
    assert main(["view", str(run), "--history", str(tmp_path / "run.svg")]) == 0
    drawn = (tmp_path / "run.svg").read_text()
    assert str(run) in drawn
    assert str(run / "baseline") in drawn
    assert main(["view", str(run), "--history", str(tmp_path / "run.svg"), "--open"]) == 1
    (run / "wiring.jsonl").unlink()
    (run / "baseline" / "wiring.jsonl").unlink()
    assert main(["view", str(run), "--history", str(tmp_path / "run.svg")]) == 1
    assert "has no wiring.jsonl; a run writes it while it trains" in capsys.readouterr().err
