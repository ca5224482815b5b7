"""Pictures of a wiring over time: what they show, and that they are safe."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import SHORT, edges_of, short_run, snapshots_of, unpacked
from torch import nn

import dnw
from dnw.cli import main
from dnw.graphs import DiscreteTimeGraph
from dnw.models import GraphChain, Stage, tiny_cifar10, tiny_digits
from dnw.recipes import digits
from dnw.train import EpochMetrics, RunDirectory, load_trained, override, resume, run_record, train, view_runs
from dnw.train._images import load_data, make_batches
from dnw.train._log import Log
from dnw.train._network import make_model
from dnw.train._view import Page
from dnw.view import (
    NothingToShowError,
    Snapshot,
    SnapshotWriter,
    inside,
    read_snapshots,
    record,
    write_page,
    write_still,
)
from dnw.view._record import thinned


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return short_run(tmp_path_factory.mktemp("runs"))


# --- records ---


@pytest.mark.parametrize(
    ("make", "budget"),
    [
        (tiny_digits, {"num_edges": 80}),
        (tiny_cifar10, {"num_edges": 5_000}),  # outputs share the weights of nodes: an entry may be two edges
        (lambda: nn.Sequential(DiscreteTimeGraph(30, 5, 4, steps=2)), {"num_edges": 90}),
        (lambda: GraphChain(10, image_stride=1, stages=(Stage(6, 8, 1, 2), Stage(8, 16, 2, 3))), {"density": 0.2}),
    ],
)
def test_a_record_has_the_edges_signs_and_live_nodes_of_every_snapshot(make, budget, tmp_path):
    model = make()
    graphs = {n: m for n, m in model.named_modules() if hasattr(m, "edge_candidates")}
    budget = {**budget, "include": list(graphs)} if len(graphs) > 1 else budget
    snapshots_of(model, tmp_path, 4, **budget)
    snapshots = list(read_snapshots(tmp_path))
    one = record(model, snapshots, name="x")
    assert one.steps == (0, 1, 2, 3)
    assert one.epochs == (0, 0.5, 1, 1.5)
    assert one.strengths.shape == (4, len(one.sources))
    assert [len(shape.levels) for shape in one.graphs] == [
        len(g.levels.sizes) + 1 if hasattr(g, "levels") else 3 for g in graphs.values()
    ]
    for i, snapshot in enumerate(snapshots):
        expected, signs, first = set(), {}, 0
        active = {}
        for name, graph in graphs.items():
            weight = torch.zeros(graph.weight.numel())
            parameter = f"{name}.weight" if name else "weight"
            values = torch.from_numpy(snapshot.weights[parameter].astype(np.float32))
            weight[torch.from_numpy(snapshot.edges[parameter])] = torch.where(values == 0, 1e-9, values)
            matrix = graph.node_matrix(weight.view(graph.weight.shape))
            active[name] = weight.view(graph.weight.shape) != 0
            for to, of in matrix.nonzero().tolist():
                expected.add((to + first, of + first))
                signs[to + first, of + first] = matrix[to, of] > 0
            first += graph.num_nodes
        assert edges_of(one, i) == expected
        for to, of, strength in zip(one.targets.tolist(), one.sources.tolist(), one.strengths[i].tolist(), strict=True):
            assert not strength or (strength > 0) == signs[to, of]
        live = dnw.count.live_by_graph(model, active)
        assert one.live[i].tolist() == torch.cat([live[n] for n in graphs]).tolist()
    assert np.abs(one.strengths).max() == 31
    magnitudes = [np.abs(s.weights[p].astype(np.float32)) for s in snapshots for p in s.weights]
    assert one.largest == max(m.max() for m in magnitudes)


def test_a_record_is_made_of_the_model_within_wrappers_and_of_the_right_size(tmp_path):
    model = nn.Sequential(DiscreteTimeGraph(30, 5, 4, steps=2))
    snapshots_of(model, tmp_path, 2, num_edges=90)
    snapshots = list(read_snapshots(tmp_path))
    assert record(nn.DataParallel(model), snapshots, name="x").active == record(model, snapshots, name="x").active == (90, 90)
    with pytest.raises(ValueError, match=r"0.weight is \(12, 12\) here, and the snapshots are of a larger one"):
        record(nn.Sequential(DiscreteTimeGraph(12, 5, 4, steps=2)), snapshots, name="x")


def test_snapshots_are_thinned_where_there_are_too_many(tmp_path):
    torch.manual_seed(0)  # of some weights, so few edges make no path
    model = tiny_digits()
    snapshots_of(model, tmp_path, 40, num_edges=50)
    everything = record(model, read_snapshots(tmp_path), name="x")
    few = record(model, read_snapshots(tmp_path), name="x", most=len(everything.sources) * 12)
    assert len(few.steps) <= 12
    assert few.steps[:3] == (0, 1, 2)  # the first epoch whole
    assert few.steps[-1] == 39
    for i, step in enumerate(few.steps):
        assert edges_of(few, i) == edges_of(everything, step)
    assert few.omitted == 40 - len(few.steps)
    for most in range(2, 12):
        for epochs in ([i / 9 for i in range(10)], [float(i) for i in range(30)], [i / 4 for i in range(30)]):
            steps = [Snapshot(i, epoch, {}, {}) for i, epoch in enumerate(epochs)]
            kept = [s.step for s in thinned(steps, most)]
            assert len(kept) == min(most, len(steps))
            assert kept == sorted(set(kept))
            assert kept[-1] == len(steps) - 1


def test_snapshots_of_too_many_edges_are_left_out(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = tiny_digits()
    snapshots_of(model, tmp_path, 3, num_edges=50)
    snapshots = list(read_snapshots(tmp_path))
    dense = replace(
        snapshots[0],
        edges={n: np.arange(900) for n in snapshots[0].edges},
        weights={n: np.ones(900, np.float16) for n in snapshots[0].edges},
    )
    monkeypatch.setattr("dnw.view._record._EDGES", 500)
    one = record(model, [dense, *snapshots[1:]], name="x")
    assert (one.steps, one.omitted) == ((1, 2), 1)
    with pytest.raises(NothingToShowError, match="every snapshot has more than 500 edges, too many to show"):
        record(model, [dense], name="x")


def test_what_has_nothing_to_show(tmp_path):
    with pytest.raises(NothingToShowError, match="there are no snapshots to show"):
        record(tiny_digits(), [], name="x")
    model = nn.Sequential(nn.Linear(20, 10))
    snapshots_of(model, tmp_path, 2, density=0.5)
    with pytest.raises(NothingToShowError, match="no graphs whose nodes could be drawn; a page shows its layers"):
        record(model, read_snapshots(tmp_path), name="x")


def test_weights_filters_and_maps_beyond_all_bounds_are_shown(tmp_path):
    """Beyond half precision, and not finite: nothing of it reaches a picture as NaN."""
    model = tiny_digits()
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.3), num_edges=80)
    wiring["graph.weight"].latent = wiring["graph.weight"].latent * 1e30
    with torch.no_grad():
        for node, value in zip(model.graph.nodes, (7e4, -3e38, float("inf"), float("nan")), strict=False):
            node.conv.weight[0].fill_(value)
    seen = inside(model, torch.randn(2, 1, 8, 8), (0.0,), (1.0,))
    assert all(np.isfinite(array).all() for array in seen.values())
    assert np.abs(seen["filters/graph"]).max() == 65_504
    SnapshotWriter(tmp_path).write(wiring, 0, 0.0, seen)
    one = record(model, read_snapshots(tmp_path), name="x")
    assert one.largest == 65_504
    assert (one.strengths != 0).sum() == 80
    assert one.filters.any()
    write_page([one], tmp_path / "page.html")
    assert "NaN" not in json.dumps(unpacked(tmp_path / "page.html")[0])


@pytest.mark.parametrize(
    ("key", "array"),
    [
        ("filters/graph", np.zeros((3, 9), np.float16)),
        ("filters/graph", np.zeros(9, np.float16)),
        ("maps/graph", np.zeros((3, 5, 8, 8), np.uint8)),
        ("maps/graph", np.zeros((2, 136, 8, 8), np.uint8)),
        ("maps/graph", np.zeros((3, 136, 8, 8), np.float32)),
        ("images", np.zeros((3, 8, 8), np.uint8)),
        ("images", np.zeros((3, 1, 8, 8), np.float32)),
    ],
)
def test_pictures_of_nodes_that_this_network_does_not_have(run, key, array):
    model = make_model(RunDirectory(run).config(), 10)
    first = next(iter(read_snapshots(RunDirectory(run).snapshots)))
    beside = {**first.beside, key: array}
    with pytest.raises(ValueError, match=f"the snapshot of step 0: .*, {array.dtype} .*, is not of this network|'maps/graph'"):
        record(model, [replace(first, beside=beside)], name="x")


# --- pages ---


def test_the_page_holds_what_the_record_holds(run, tmp_path):
    one = run_record(run)
    page = tmp_path / "page.html"
    assert write_page([one], page) == page.stat().st_size < 400_000
    header, block = unpacked(page)
    (described,) = header["runs"]
    assert described["name"] == "digits-1"
    assert described["steps"] == list(one.steps)
    assert len(described["metrics"]) == 3
    at, length = described["strengths"]["at"], described["strengths"]["length"]
    differences = np.frombuffer(block, np.uint8, length, at).reshape(one.strengths.shape)
    assert np.array_equal(differences.cumsum(0, dtype=np.uint8).astype(np.int8), one.strengths)
    assert not re.search(r"https?://|src=|@import|url\(", page.read_text())  # nothing is loaded


def test_hostile_names_do_nothing(run, tmp_path):
    name = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&@DATA@"
    write_page([replace(run_record(run), name=name, about=name)], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<script") == 3
    assert "<img" not in text
    header, _ = unpacked(tmp_path / "page.html")
    assert header["runs"][0]["name"] == header["runs"][0]["about"] == name


@pytest.mark.parametrize(
    "name", ["a\x00\x07\x1b[31m\u2028\u202eb", "\ud800", "é\n\t\\", "@HEADER@@TITLE@", "<!--<script>", "]]>"]
)
def test_odd_names_come_back_as_they_were(run, name, tmp_path):
    one = run_record(run)
    graphs = tuple(replace(graph, name=name) for graph in one.graphs)
    write_page([replace(one, name=name, about=name, graphs=graphs)], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("<script") == 3
    (described,) = unpacked(tmp_path / "page.html")[0]["runs"]
    assert [described["name"], described["about"], described["graphs"][0]["name"]] == [name] * 3


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -1e300, pytest.param(10**400, id="huge"), None, "0.5", [1.0], np.float32("nan")]
)
def test_metrics_that_are_no_numbers_do_not_break_a_page(run, tmp_path, value):
    one = run_record(run)
    broken = ({"epoch": 1, "test_loss": value, "top1": np.float32(0.5)}, {"epoch": value, "top1": 0.5}, {"top1": 0.5}, {})
    write_page([replace(one, metrics=broken)], tmp_path / "page.html")
    (described,) = unpacked(tmp_path / "page.html")[0]["runs"]
    assert described["metrics"] == [{"epoch": 1, "test_loss": None, "top1": 0.5}]


def test_the_page_of_a_run_that_trains_reads_itself_again(run, tmp_path):
    one = run_record(run)
    write_page([one], tmp_path / "page.html", reload=30)
    assert unpacked(tmp_path / "page.html")[0]["reload"] == 30
    assert unpacked(run / "view.html")[0]["reload"] is None  # it has ended
    config, member = RunDirectory(run).config(), run / "view.html"
    page = Page(RunDirectory(run), config, make_model(config, 10))
    before = member.read_bytes()
    page.refresh(last=False)
    assert unpacked(member)[0]["reload"] == 30
    page._cost = 1e9
    member.write_bytes(before)
    page.refresh(last=False)  # too soon: it would take more than its share of the time
    assert member.read_bytes() == before
    page.refresh(last=True)
    assert unpacked(member)[0]["reload"] == 30  # it has a baseline, which is trained now
    Page(RunDirectory(run / "baseline"), RunDirectory(run / "baseline").config(), make_model(config, 10)).refresh(last=True)
    assert unpacked(member)[0]["reload"] is None
    assert len(unpacked(member)[0]["runs"]) == 2


@pytest.fixture
def page_of(run, tmp_path) -> tuple[Path, Page]:
    """A run of one's own that has no page yet, and what writes its page while it trains."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "view.html").unlink()
    config = RunDirectory(copy).config()
    return copy, Page(RunDirectory(copy), config, make_model(config, 10))


FAILURES = [
    OSError("no space"),
    RuntimeError("odd"),
    IndexError("9"),
    MemoryError(),
    TypeError("x"),
    KeyError("k"),
    ValueError("v"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)
def test_training_goes_on_whatever_befalls_its_page_and_says_so_once(page_of, monkeypatch, failure):
    copy, page = page_of

    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr("dnw.train._view.write_page", fail)
    reason = re.escape(str(failure) if isinstance(failure, (OSError, ValueError)) else repr(failure))
    with pytest.warns(UserWarning, match=f"^no page of this run: {reason}$") as warned:
        page.refresh(last=True)
    assert len(warned) == 1
    page.refresh(last=True)
    monkeypatch.undo()
    page.refresh(last=True)
    assert unpacked(copy / "view.html")[0]["runs"][0]["name"] == "copy"


def test_a_damaged_snapshot_is_a_warning_while_training(page_of):
    copy, page = page_of
    path = sorted((copy / "snapshots").iterdir())[2]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match=rf"^no page of this run: {path}: not a readable snapshot"):
        page.refresh(last=True)


def test_a_page_that_cannot_be_written_is_a_warning(page_of):
    copy, page = page_of
    (copy / "view.html").mkdir()
    with pytest.warns(UserWarning, match="no page of this run"):
        page.refresh(last=True)


@pytest.mark.parametrize("kind", ["no snapshots", "too many edges"])
def test_a_run_with_nothing_to_show_says_nothing(page_of, monkeypatch, kind):
    copy, page = page_of
    if kind == "no snapshots":
        shutil.rmtree(copy / "snapshots")
    else:
        monkeypatch.setattr("dnw.view._record._EDGES", 10)
    page.refresh(last=True)
    assert not (copy / "view.html").exists()
    assert main(["view", str(copy)]) == 1  # whoever asks for a page is told


class Stopping(Log):
    """Interrupts a run after its third epoch."""

    def epoch(self, metrics: EpochMetrics, epochs: int) -> None:
        if metrics.epoch == 3:
            raise KeyboardInterrupt


def test_a_run_is_resumed_past_a_damaged_snapshot(tmp_path):
    config = override(digits(), [*SHORT, "epochs=4", "baseline=null"])
    copy = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        train(config, data_dir=tmp_path, out=copy, log=Stopping())
    files = sorted((copy / "snapshots").iterdir())
    files[2].write_bytes(files[2].read_bytes()[:-9])
    with pytest.warns(
        UserWarning, match=rf"{files[2]}: not a readable snapshot .*; it and the 3 after it are set aside"
    ) as warned:
        resume(copy)
    assert len(warned) == 1
    assert len(RunDirectory(copy).metrics()) == 4
    (described,) = unpacked(copy / "view.html")[0]["runs"]
    assert described["epochs"] == [*(s.epoch for s in read_snapshots(copy / "snapshots"))]
    assert len(described["epochs"]) == 3
    assert described["epochs"][-1] == 4
    last = list(read_snapshots(copy / "snapshots"))[-1]
    active = load_trained(copy, "last").model.graph.weight.detach().flatten().numpy().nonzero()[0]
    assert np.array_equal(last.edges["graph.weight"], active)


def generators() -> tuple[object, ...]:
    """Where the generators are that others may be drawing from."""
    _, words, position, *_ = np.random.get_state()
    return bytes(torch.get_rng_state().numpy()), bytes(words), position, random.getstate()


def test_a_picture_neither_seeds_nor_draws_from_a_generator_of_the_caller(page_of, tmp_path):
    pytest.importorskip("matplotlib")
    run, page = page_of
    one, trained = run_record(run), load_trained(run)
    images = torch.randn(2, 1, 8, 8)
    torch.rand(3)
    np.random.rand(3)
    random.random()
    before = generators()
    for picture in (
        lambda: run_record(run),
        lambda: view_runs([run, run / "baseline"], tmp_path / "two.html"),
        lambda: write_page([one], tmp_path / "page.html"),
        lambda: write_still(one, tmp_path / "still.svg"),
        lambda: write_still(one, tmp_path / "still.png"),
        lambda: inside(trained.model, images, (0.0,), (1.0,)),
        lambda: page.refresh(last=True),
        lambda: main(["view", str(run), "--out", str(tmp_path / "page.html")]),
        lambda: main(["view", str(run), "--svg", str(tmp_path / "still.svg")]),
    ):
        picture()
        assert generators() == before


def test_a_training_run_leaves_its_page_and_its_baselines(run):
    header, _ = unpacked(run / "view.html")
    assert [one["about"] for one in header["runs"]] == ["dnw, seed 0", "random, seed 0"]
    assert header["runs"][0]["epochs"][-1] == 3
    assert unpacked(run / "baseline" / "view.html")[0]["runs"][0]["name"] == "digits-1"


def test_dnw_view(run, tmp_path, capsys):
    assert main(["view", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "view.html")
    assert main(["view", str(run), str(run / "baseline"), "--out", str(tmp_path / "two.html")]) == 0
    assert len(unpacked(tmp_path / "two.html")[0]["runs"]) == 2
    assert view_runs([run, run / "baseline"]) == run / "view-beside-baseline.html"
    capsys.readouterr()
    assert main(["view", str(run), str(run), str(run)]) == 1
    assert "3 runs: one is shown, or two beside each other" in capsys.readouterr().err
    assert main(["view", str(tmp_path)]) == 1
    assert "not a run directory" in capsys.readouterr().err


def test_an_older_run_is_shown_that_ended_in_its_first_epoch(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    environment = json.loads((copy / "environment.json").read_text())
    older = {key: value for key, value in environment.items() if key not in ("num_classes", "check")}
    (copy / "environment.json").write_text(json.dumps(older))
    (copy / "last.pt").unlink()
    assert view_runs([copy]) == copy / "view.html"


def test_missing_and_cut_off_snapshots_are_one_clear_error(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    snapshots = sorted((copy / "snapshots").iterdir())
    snapshots[2].write_bytes(snapshots[2].read_bytes()[:100])
    assert main(["view", str(copy)]) == 1
    assert f"{snapshots[2]}: not a readable snapshot" in capsys.readouterr().err
    snapshots[2].unlink()
    assert main(["view", str(copy)]) == 1
    assert f"{snapshots[3]}: not a readable snapshot (the snapshot of step" in capsys.readouterr().err
    shutil.rmtree(copy / "snapshots")
    assert main(["view", str(copy)]) == 1
    assert "no snapshots to show" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_still_pictures(kind, run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"still.{kind}"
    assert main(["view", str(run), f"--{kind}", str(file), "--snapshot", "0"]) == 0
    first = file.read_bytes()
    assert first.startswith(b"<?xml" if kind == "svg" else b"\x89PNG")
    assert main(["view", str(run), f"--{kind}", str(file)]) == 0
    assert file.read_bytes() != first
    if kind == "svg":
        one = run_record(run)
        drawn = re.findall(r"<path[^>]*stroke: #(?:c76a00|1769aa)", file.read_text())
        assert len(drawn) == len(edges_of(one, len(one.steps) - 1))
    capsys.readouterr()
    assert main(["view", str(run), f"--{kind}", str(file), "--snapshot", "99"]) == 1
    assert "snapshot 99: the run has 6, from 0 to 5" in capsys.readouterr().err
    wrong = file.with_suffix(".jpg")
    assert main(["view", str(run), f"--{kind}", str(wrong)]) == 1
    assert f"--{kind} {wrong}: its name must end with .{kind}" in capsys.readouterr().err
    assert main(["view", str(run), str(run), f"--{kind}", str(file)]) == 1
    assert "leave out the second run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="pictures are written as"):
        write_still(run_record(run), tmp_path / "still.xyz")


def test_many_edges_keep_their_colours_in_still_pictures(run, tmp_path):
    """Thousands of faint lines over each other add up to the two colours, not to what rounding makes of them."""
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    one = run_record(run)
    edges, ends = 6_000, np.random.default_rng(0)
    one = replace(
        one,
        sources=ends.integers(0, one.graphs[0].levels[0], edges).astype(np.int32),
        targets=ends.integers(len(one.live[0]) - one.graphs[0].levels[-1], len(one.live[0]), edges).astype(np.int32),
        strengths=np.full((len(one.steps), edges), -3, np.int8),
    )
    write_still(one, tmp_path / "blue.png")
    blue = np.asarray(image.open(tmp_path / "blue.png").convert("RGB")).astype(int)
    coloured = blue[np.ptp(blue, axis=2) > 20]
    assert len(coloured) > 10_000
    assert (coloured[:, 2] > coloured[:, 1]).all()
    assert (coloured[:, 1] > coloured[:, 0]).all()
    write_still(one, tmp_path / "again.svg")
    first = (tmp_path / "again.svg").read_bytes()
    write_still(one, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == first


def test_what_is_inside_the_nodes(run):
    """Filters of every snapshot, and maps of the first, of the end of the first epoch, and of the last."""
    one = run_record(run)
    assert sorted(one.maps) == [0, 3, 5]
    assert one.images is not None
    assert one.images.shape == (3, 1, 8, 8)
    trained = load_trained(run)
    graph = trained.model.graph
    last = len(one.steps) - 1
    filters = torch.cat([node.conv.weight.detach().flatten(1) for node in graph.nodes])
    scaled = filters / filters.abs().amax(1, keepdim=True)
    assert (torch.from_numpy(one.filters[last, : len(filters)] / 127.0) - scaled).abs().max() < 0.01
    assert not one.filters[last, len(filters) :].any()  # outputs have none
    (maps,) = one.maps[last]
    assert maps.shape[:2] == (3, graph.num_nodes)
    data = load_data(trained.config, run)
    batches = make_batches(trained.config, data, torch.device("cpu"), 0, 1)
    images = next(iter(batches.test()))[0][:3]
    sent = []
    graph.nodes[1].register_forward_hook(lambda module, inputs, output: sent.append(output))
    with torch.no_grad():
        trained.model(images)
    expected = sent[0] / sent[0].abs().amax(dim=(0, 2, 3), keepdim=True).clamp_min(1e-12)
    first, count = graph.levels.sizes[0], graph.levels.sizes[1]
    found = (torch.from_numpy(maps[:, first : first + count]).float() - 128) / 127
    assert (found - expected).abs().max() < 0.01
