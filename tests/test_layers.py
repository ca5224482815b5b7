"""Pictures of layers: which cell an edge is in, what feeds what, how large a page is, and that a browser shows it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import opened, settle, snapshots_of
from test_data import write_mnist
from torch import nn
from torch.nn import functional

from dnw.models import resnet50
from dnw.recipes import RECIPES
from dnw.train import override, train, view_runs
from dnw.view import Grid, NothingToShowError, Snapshot, SnapshotWriter, read_snapshots, record_layers, write_page


def snapshot(step: int, **layers: dict[int, float]) -> Snapshot:
    """One with these weights, by flat index, of the layers named so with dots for double underscores."""
    named = {name.replace("__", "."): dict(sorted(edges.items())) for name, edges in layers.items()}
    edges = {name: np.array(list(found), np.int64) for name, found in named.items()}
    weights = {name: np.array(list(found.values()), np.float16) for name, found in named.items()}
    return Snapshot(step, float(step), edges, weights)


# --- cells and degrees ---


def test_edges_of_a_linear_layer_are_counted_where_they_are():
    model = nn.Sequential(nn.Linear(4, 3))
    first = snapshot(0, **{"0__weight": {0: 1.0, 5: -0.25, 7: 0.5}})  # targets 0, 1, 1; sources 0, 1, 3
    second = snapshot(1, **{"0__weight": {0: 1.0, 7: 0.5, 11: -1.0}})
    (layer,) = record_layers(model, [first, second]).layers
    assert (layer.targets, layer.sources, layer.kernel, layer.candidates) == (3, 4, 1, 12)
    assert (layer.active, layer.came, layer.went, layer.positive) == ((3, 3), (0, 1), (0, 1), (2, 2))
    assert layer.into.tolist() == [[1, 2, 0], [1, 1, 1]]
    assert layer.out.tolist() == [[1, 1, 0, 1], [1, 0, 0, 2]]
    assert layer.shares[0].tolist() == [[255, 0, 0, 0], [0, 255, 0, 255], [0, 0, 0, 0]]
    assert layer.weights[0].tolist() == [[127, 0, 0, 0], [0, -64, 0, 90], [0, 0, 0, 0]]  # 127 times 1, 1/2 and the root of 1/2
    assert layer.largest == {0: 1.0, 1: 1.0}


def test_an_edge_whose_weight_is_0_is_an_edge():
    (layer,) = record_layers(nn.Sequential(nn.Linear(4, 3)), [snapshot(0, **{"0__weight": {0: 1.0, 5: 0.0}})]).layers
    assert (layer.weights[0] != 0).astype(int).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_a_cell_of_a_convolution_is_a_target_and_a_source():
    model = nn.Sequential(nn.Conv2d(2, 2, 2, bias=False))
    # targets 0 and 1 (8 entries each), sources 0 and 1 (4 entries each)
    (layer,) = record_layers(model, [snapshot(0, **{"0__weight": {0: 1.0, 1: -2.0, 4: 1.0, 15: -1.0}})]).layers
    assert (layer.kernel, layer.into.tolist(), layer.out.tolist()) == (4, [[3, 1]], [[2, 2]])
    assert layer.shares[0].tolist() == [[128, 64], [0, 64]]
    assert layer.weights[0].tolist() == [[-127, 74], [0, -74]]
    assert layer.largest == {0: 3.0}


@pytest.mark.parametrize(
    ("module", "where"),
    [
        (nn.ConvTranspose2d(2, 3, 1, bias=False), [[1, 0], [0, 0], [0, 1]]),  # [sources, targets]: (0, 0) and (1, 2)
        (nn.Conv2d(6, 6, (1, 2), groups=6, bias=False), [[1, 0], *[[0, 0]] * 1, [0, 1], *[[0, 0]] * 3]),
    ],
    ids=["transposed", "depthwise"],
)
def test_other_layouts_are_read_the_right_way_round(module, where):
    (layer,) = record_layers(nn.Sequential(module), [snapshot(0, **{"0__weight": {0: 1.0, 5: 1.0}})]).layers
    assert (layer.shares[0] != 0).astype(int).tolist() == where
    assert layer.into[0].tolist() == np.sum(where, axis=1).tolist()


def test_blocks_hold_the_part_of_entries_that_is_active():
    grid = Grid(5, 7).within(8)
    assert (grid.side, grid.shape) == (3, (2, 3))
    assert grid.sizes().tolist() == [[9, 9, 3], [6, 6, 2]]
    assert grid.sums(np.array([0, 2, 4]), np.array([0, 2, 6])).tolist() == [[2, 0, 0], [0, 0, 1]]
    assert Grid(5, 7).within(35).side == 1


def test_snapshots_of_another_network_are_refused():
    model, right = nn.Sequential(nn.Linear(4, 3)), snapshot(0, **{"0__weight": {0: 1.0}})
    with pytest.raises(NothingToShowError, match="no snapshots to show"):
        record_layers(model, [])
    with pytest.raises(ValueError, match=r"Sequential has no parameter '7.weight', of which the snapshots are"):
        record_layers(model, [snapshot(0, **{"7__weight": {0: 1.0}})])
    with pytest.raises(ValueError, match="step 1 is of other layers than those before it"):
        record_layers(model, [right, snapshot(1, **{"0__bias": {0: 1.0}})])
    with pytest.raises(ValueError, match=r"an edge of '0.weight' beyond its 12 entries"):
        record_layers(model, [snapshot(0, **{"0__weight": {12: 1.0}})])
    with pytest.raises(ValueError, match="records of nothing: one page shows graphs, or layers"):
        write_page([], "never.html")


def test_names_of_layers_are_no_patterns():
    model = nn.ModuleDict({"a[0]": nn.Linear(4, 3)})
    shown = record_layers(model, [snapshot(0, **{"a[0]__weight": {0: 1.0}})])
    assert [layer.name for layer in shown.layers] == ["a[0].weight"]


# --- what feeds what ---


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.skip = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.head((self.body(x).relu() + self.skip(x)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(11, 12), nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def all_edges(model: nn.Module, *names: str) -> list[Snapshot]:
    sizes = {name: model.get_parameter(name).numel() for name in names}
    return [snapshot(0, **{name.replace(".", "__"): dict.fromkeys(range(size), 1.0) for name, size in sizes.items()})]


def drawn(model: nn.Module, example: torch.Tensor | None, *names: str) -> list[tuple[str, tuple[str, ...]]]:
    blocks = record_layers(model, all_edges(model, *names), example=example).blocks
    return [(block.name, tuple(blocks[i].name for i in block.reads)) for block in blocks]


def test_a_residual_block_is_drawn_as_it_is_computed():
    model, image = Residual().train(), torch.zeros(1, 3, 8, 8)
    names = ("stem.weight", "body.weight", "skip.weight")  # the head is dense, and shown all the same
    assert drawn(model, image, *names) == [
        ("x", ()),
        ("stem.weight", ("x",)),
        ("body.weight", ("stem.weight",)),
        ("skip.weight", ("stem.weight",)),
        ("add", ("body.weight", "skip.weight")),
        ("head.weight", ("add",)),
    ]
    assert model.training
    blocks = record_layers(model, all_edges(model, *names), example=image).blocks
    at = {block.name: (block.x, block.y) for block in blocks}
    assert at["body.weight"][0] == at["skip.weight"][0] < at["add"][0] < at["head.weight"][0] == 1
    assert (at["body.weight"][1], at["skip.weight"][1], at["add"][1]) == (0.25, 0.75, 0.5)


def test_heads_of_attention_are_found():
    model, names = Attention(), ("qkv.weight", "out.weight")
    blocks = record_layers(model, all_edges(model, *names), example=torch.zeros(1, 5, dtype=torch.int64)).blocks
    found = {block.name: (block.kind, block.heads, block.heads_read) for block in blocks}
    assert found["qkv.weight"] == ("layer", 9, 1)  # three heads each of queries, keys and values
    assert found["attention"][0] == "join"
    assert found["out.weight"] == ("layer", 1, 3)
    assert found["embed.weight"] == ("layer", 1, 1)
    assert {block.name: block.channels for block in blocks} == {
        "tokens": 1,
        "embed.weight": 12,
        "qkv.weight": 36,
        "attention": 12,
        "out.weight": 12,
        "add": 12,
    }
    wired = record_layers(model, all_edges(model, "embed.weight"), example=torch.zeros(1, 5, dtype=torch.int64)).blocks
    assert [block.channels for block in wired[:2]] == [1, 12]


class Unruly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x)) if x.sum() > 0 else self.one(x)


@pytest.mark.parametrize("example", [None, torch.ones(1, 6)], ids=["without an example", "not captured"])
def test_without_a_capture_layers_stand_in_a_row(example):
    chain = [("input", ()), ("one.weight", ("input",)), ("two.weight", ("one.weight",))]
    assert drawn(Unruly(), example, "one.weight", "two.weight") == chain


# --- the page ---


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> tuple[nn.Module, Path]:
    model, folder = Residual(), tmp_path_factory.mktemp("layers") / "snapshots"
    snapshots_of(model, folder, 4, density=0.3)
    return model, folder


def page_of(network: tuple[nn.Module, Path], path: Path, runs: int = 1) -> Path:
    model, folder = network
    image = torch.zeros(1, 3, 8, 8)
    records = [record_layers(model, read_snapshots(folder), example=image, name="r", about=f"run {i}") for i in range(runs)]
    write_page(records, path)
    return path


def test_the_slider_shows_the_matrix_of_each_snapshot(network, browser, tmp_path):
    page = opened(browser, page_of(network, tmp_path / "page.html"))
    model, folder = network
    found = "Array.from(graphs[1].layer.matrix(moment(runs[0]), true).values, v => v !== 0)"
    page.evaluate("choose('head.weight')")
    for s, one in enumerate(read_snapshots(folder)):
        page.evaluate(f"show({s})")
        settle(page)
        wanted = np.zeros(40, bool)
        wanted[one.edges["head.weight"]] = True
        assert page.evaluate(found) == wanted.tolist()
        assert f"{int(wanted.sum())} edges" in page.inner_text("#matrices")
        assert f"step {s}" in page.inner_text("#when")
    assert page.problems == []


def test_colours_of_a_matrix_tell_signs(browser, tmp_path):
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    write_page([record_layers(model, [snapshot(0, **{"0__weight": {0: 1.0, 3: -1.0}})])], tmp_path / "page.html")
    page = opened(browser, tmp_path / "page.html", color_scheme="light")
    pixel = """(target, source) => {
      const { x, y, wide, tall } = graphs[1].area(), scale = graphs[1].scale;
      const at = [x + (source + .5) * wide, y + (target + .5) * tall].map(v => Math.round(v * scale));
      return Array.from(graphs[1].context.getImageData(...at, 1, 1).data).slice(0, 3);
    }"""
    colours = [[page.evaluate(f"({pixel})({i}, {j})") for j in range(2)] for i in range(2)]
    plus, minus, panel = (page.evaluate(f"rgb(colour('{name}'))") for name in ("plus", "minus", "panel"))
    assert colours == [[plus, panel], [panel, minus]]


def test_a_click_on_a_layer_chooses_it(network, browser, tmp_path):
    page = opened(browser, page_of(network, tmp_path / "page.html"), viewport={"width": 1280, "height": 900})
    assert page.input_value("#layer") == "stem.weight"
    number = page.evaluate("runs[0].blocks.findIndex(block => block.name === 'body.weight')")
    box, (x, y) = page.locator("canvas.graph").bounding_box(), page.evaluate(f"graphs[0].position({number})")
    page.mouse.move(box["x"] + x, box["y"] + y)
    assert page.inner_text("#tip") == "body.weight: 173 edges, 30.0 %; 0 of 8 targets without an edge"
    page.mouse.click(box["x"] + x, box["y"] + y)
    assert page.input_value("#layer") == "body.weight" == page.inner_text("#layerName")
    assert page.inner_text("#shape") == "8 targets, 8 sources, 9 entries each"
    page.locator("canvas.graph").press("n")
    assert page.input_value("#layer") == "skip.weight"
    page.select_option("#layer", "head.weight")
    box, (x, y) = page.locator("canvas.matrix").bounding_box(), page.evaluate("[graphs[1].area().x, graphs[1].area().y]")
    page.mouse.move(box["x"] + x + 2, box["y"] + y + 2)
    into, out = page.evaluate("['into', 'out'].map(key => graphs[1].layer.degrees(key, 3)[0])")
    assert f"the target has {into} in, the source {out} out" in page.inner_text("#tip")
    page.mouse.click(box["x"] + x + 40, box["y"] + y + 40)
    assert page.evaluate("[graphs[0].zoom, graphs[1].zoom]") == [1, 4]
    page.click("#whole")
    assert page.evaluate("graphs[1].zoom") == 1
    page.click("summary")
    assert page.locator("#table tbody tr").count() == 4
    assert page.problems == []


def test_two_runs_stand_beside_each_other(network, browser, tmp_path):
    page = opened(browser, page_of(network, tmp_path / "page.html", runs=2), viewport={"width": 1280, "height": 900})
    assert page.locator("canvas.graph").count() == page.locator("canvas.matrix").count() == 2
    page.evaluate("choose('head.weight')")
    assert page.locator("#layerFacts tr").count() == 9
    assert "run 1" in page.inner_text("#now")
    page.evaluate("remember()")
    page.reload()
    page.evaluate("ready")
    assert page.input_value("#layer") == "head.weight"
    assert page.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1500])
def test_nothing_overflows(network, browser, tmp_path, scheme, width):
    page = opened(browser, page_of(network, tmp_path / "p.html"), viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def large(draws: np.random.Generator, model: nn.Module) -> list[Snapshot]:
    """24 snapshots of a network with 10 % of its weights, of which every fiftieth is another than before."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1}
    masks = {name: draws.random(size) < 0.1 for name, size in sizes.items()}
    found = []
    for step in range(24):
        for mask in masks.values():
            flips = draws.integers(0, mask.size, mask.size // 500)
            mask[flips] = mask[draws.permutation(flips)]
        edges = {name: np.flatnonzero(mask) for name, mask in masks.items()}
        weights = {name: draws.standard_normal(len(flat), np.float32).astype(np.float16) for name, flat in edges.items()}
        found.append(Snapshot(step, float(step), edges, weights))
    return found


def test_a_resnet50_with_a_tenth_of_its_weights_has_a_page_below_10_mb(browser, tmp_path):
    model = resnet50()
    one = record_layers(model, large(np.random.default_rng(0), model), example=torch.zeros(1, 3, 224, 224))
    assert [len(one.layers), len(one.steps), one.omitted] == [54, 24, 0]
    assert {tuple(layer.weights) for layer in one.layers} == {(23,)}
    assert {layer.weight_grid.side for layer in one.layers if layer.targets * layer.sources <= 1 << 20} == {1}
    size = write_page([one], tmp_path / "page.html")
    assert size < 10e6
    page = opened(browser, tmp_path / "page.html", viewport={"width": 1280, "height": 900})
    times = page.evaluate(
        "() => runs[0].steps.map((_, s) => { const t = performance.now(); show(s); render(); return performance.now() - t; })"
    )
    sys.stderr.write(f"{size / 1e6:.1f} MB; a redraw takes {np.median(times):.0f} ms (median) in Chromium, without a GPU\n")
    assert page.evaluate("[runs[0].layers.length, graphs[1].layer.name]") == [54, "conv1.weight"]
    assert page.problems == []


# --- a run ---


def test_a_run_without_graphs_has_a_page_of_its_layers(tmp_path):
    write_mnist(tmp_path, 64, 20)
    config = override(RECIPES["mnist_mlp"](), ["epochs=2", "first_epoch_snapshots=1", "batch_size=16", "baseline=null"])
    run = train(config, data_dir=tmp_path, out=tmp_path / "mlp")
    assert len(list(read_snapshots(run / "snapshots"))) == 4
    assert '"blocks"' in (run / "view.html").read_text()
    assert view_runs([run, run], tmp_path / "two.html").exists()


def test_snapshots_of_many_epochs_are_few(tmp_path):
    writer = SnapshotWriter(tmp_path)
    for step in range(40):
        writer.append(snapshot(step, **{"0__weight": {step % 12: 1.0}}))
    one = record_layers(nn.Sequential(nn.Linear(1 << 12, 1 << 11)), read_snapshots(tmp_path))
    assert (len(one.steps), one.omitted, one.steps[-1]) == (24, 16, 39)
    assert sum(one.layers[0].came) == 39
