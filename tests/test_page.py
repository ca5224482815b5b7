"""The page and the still picture: one file with its scripts in it, nodes in the same positions, and that a browser shows it."""

from __future__ import annotations

import re
import sys
import tomllib
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pytest
from pictures import edges_of, opened, settle, short_run, snapshots_of

import dnw
from dnw.models import tiny_cifar10
from dnw.train import RunDirectory, run_record
from dnw.view import GraphShape, Record, read_snapshots, record, write_page, write_still
from dnw.view._layout import layout_of
from dnw.view._page import _SCRIPTS, _file
from dnw.view._still import MINUS, PLUS

FOLDER = Path(dnw.__file__).parent / "view" / "page"
SCRIPTS = _SCRIPTS["graphs"]
PARTS = {"page.html", "page.css", *(f"{kind}/main.html" for kind in _SCRIPTS), *chain.from_iterable(_SCRIPTS.values())}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return short_run(tmp_path_factory.mktemp("runs"))


# --- one file ---


def elements(page: Path) -> list[tuple[str, str]]:
    """The scripts and styles of a page, each with its text, as a parser of HTML finds them."""
    found: list[tuple[str, str]] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag in ("script", "style"):
                found.append((tag, ""))

        def handle_data(self, data: str) -> None:
            if self.cdata_elem:
                found[-1] = (found[-1][0], found[-1][1] + data)

    Parser().feed(page.read_text())
    return found


def test_a_page_is_one_file_with_its_style_and_scripts_in_it(tmp_path):
    write_page([drawn(*GRAPHS["both"])], tmp_path / "page.html")
    (style, (_, header), (_, data), (_, script)) = elements(tmp_path / "page.html")
    assert style == ("style", "\n" + _file("page.css"))
    assert script == '\n"use strict";\n' + "\n".join(map(_file, SCRIPTS))
    assert header[0] == "{"
    assert re.fullmatch("[A-Za-z0-9+/=]+", data)
    text = (tmp_path / "page.html").read_text()
    assert not re.search("@[A-Z]+@", text)
    assert not re.search(r"<link|https?://|src=|@import|import\(|url\(|fetch\(", text)


def test_the_parts_of_a_page_are_readable_and_installed():
    marks = ["@DATA@", "@HEADER@", "@MAIN@", "@SCRIPT@", "@STYLE@", "@TITLE@"]
    assert sorted(re.findall("@[A-Z]+@", _file("page.html"))) == marks
    assert {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.*")} == PARTS
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert {"view/page/*", "view/page/*/*"} <= set(settings["tool"]["setuptools"]["package-data"]["dnw"])
    for name in PARTS:
        for i, line in enumerate(_file(name).splitlines(), 1):
            assert len(line) <= 128, f"{name}, line {i}"
            assert line == line.rstrip(), f"{name}, line {i}"


HOSTILE = "</script><script>throw 1</script></SCRIPT ><!--<script></style>"


@pytest.fixture
def hostile_page(tmp_path, monkeypatch) -> Path:
    """A page whose own style and script contain what would end them."""
    added = {"page.css": f"/* {HOSTILE} */\n", "graphs/run.js": f'const hostile = "{HOSTILE}"; // {HOSTILE}\n'}
    monkeypatch.setattr("dnw.view._page._file", lambda name: _file(name) + added.get(name, ""))
    write_page([drawn(*GRAPHS["levels"])], tmp_path / "page.html")
    return tmp_path / "page.html"


def test_nothing_within_style_or_script_ends_it(hostile_page):
    found = elements(hostile_page)
    assert [tag for tag, _ in found] == ["style", "script", "script", "script"]
    assert found[0][1].count("throw 1") == 1
    assert found[3][1].count("throw 1") == 2
    assert found[3][1].endswith(_file("page.js"))


# --- where nodes lie ---

GRAPHS = {
    "levels": (GraphShape("graph", True, (3, 7, 5, 2)),),
    "ring": (GraphShape("graph", False, (5, 40, 9)),),
    "ends": (GraphShape("graph", False, (4, 0, 1)),),
    "both": (GraphShape("a", True, (3, 6, 2)), GraphShape("b", False, (3, 21, 20)), GraphShape("c", True, (4, 2))),
}


def drawn(*graphs: GraphShape, num_edges: int = 40) -> Record:
    """A record of one snapshot, all nodes live, with random edges within each graph, from nodes to themselves among them."""
    draws, ends, first = np.random.default_rng(0), [], 0
    for graph in graphs:
        ends.append(first + draws.integers(0, sum(graph.levels), (2, num_edges)))
        if not graph.static:
            ends.append(np.full((2, 1), first))
        first += sum(graph.levels)
    sources, targets = np.concatenate(ends, axis=1).astype(np.int32)
    count = len(sources)
    return Record(
        name="drawn",
        about="",
        graphs=graphs,
        steps=(0,),
        epochs=(0.0,),
        omitted=0,
        sources=sources,
        targets=targets,
        strengths=draws.choice([-31, -3, 3, 31], (1, count)).astype(np.int8),
        least=0.1,
        largest=1.0,
        active=(count,),
        came=(0,),
        went=(0,),
        live=np.ones((1, first), bool),
        metrics=(),
        filters=np.zeros((0, first, 9), np.int8),
        images=None,
        maps={},
    )


def check_positions(graphs: tuple[GraphShape, ...], x: np.ndarray, y: np.ndarray) -> None:
    """Inputs are at the left of a graph and outputs at the right, the first of both on top, all others between; y is down."""
    assert len({*zip(x.tolist(), y.tolist(), strict=True)}) == len(x) == sum(sum(graph.levels) for graph in graphs)
    first, end = 0, -np.inf
    for graph in graphs:
        own = slice(first, first + sum(graph.levels))
        inputs, outputs = slice(first, first + graph.levels[0]), slice(own.stop - graph.levels[-1], own.stop)
        middle = (x[own].min() + x[own].max()) / 2
        assert x[own].min() > end, "graphs stand beside each other"
        assert (x[inputs] < middle).all()
        assert (x[outputs] > middle).all()
        between = x[inputs.stop : outputs.start]
        assert (between > x[inputs].min()).all()
        assert (between < x[outputs].max()).all()
        assert (np.diff(y[inputs]) > 0).all()
        assert (np.diff(y[outputs]) > 0).all()
        first, end = own.stop, x[own].max()


def check_alike(found: np.ndarray, expected: np.ndarray, within: float) -> None:
    """The same but for where the picture begins and how large it is."""
    slope, offset = np.polyfit(expected, found, 1)
    assert slope > 0
    assert np.abs(slope * expected + offset - found).max() < within


@pytest.mark.parametrize("graphs", GRAPHS.values(), ids=GRAPHS)
def test_inputs_are_at_the_left_and_outputs_at_the_right(graphs):
    layout = layout_of(graphs)
    check_positions(graphs, layout.x, layout.y)
    assert min(layout.x.min(), layout.y.min()) > 0
    assert max(layout.x.max(), layout.y.max()) < 1


def test_the_positions_of_levels_and_of_a_ring():
    levels = layout_of([GraphShape("graph", True, (1, 2))])
    assert levels.x.tolist() == [0.25, 0.75, 0.75]
    assert levels.y.tolist() == [0.5, 0.25, 0.75]
    ring = layout_of([GraphShape("graph", False, (1, 2, 1))])
    assert ring.x.tolist() == pytest.approx([0.05, 0.5, 0.5, 0.95])
    assert ring.y.tolist() == pytest.approx([0.5, 0.04, 0.96, 0.5])


@pytest.mark.parametrize("graphs", GRAPHS.values(), ids=GRAPHS)
def test_a_still_picture_has_nodes_where_the_layout_has_them(graphs, tmp_path):
    pytest.importorskip("matplotlib")
    write_still(drawn(*graphs), tmp_path / "still.svg")
    dots = re.findall(r'<use [^>]*x="([0-9.]+)" y="([0-9.]+)"', (tmp_path / "still.svg").read_text())
    x, y = np.array(dots, float).T
    check_positions(graphs, x, y)
    check_alike(x, layout_of(graphs).x, within=0.01)
    check_alike(y, layout_of(graphs).y, within=0.01)


def test_many_edges_lie_where_their_nodes_are(tmp_path):
    """Drawn as a density, those between the first input and the first output are at the top as well."""
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    one = drawn(GraphShape("graph", True, (5, 5)), num_edges=3_001)
    ends = {"sources": np.zeros_like(one.sources), "targets": np.full_like(one.targets, 5)}
    one = replace(one, strengths=np.abs(one.strengths), **ends)
    write_still(one, tmp_path / "still.png")
    pixels = np.asarray(image.open(tmp_path / "still.png").convert("RGB")).astype(int)
    rows, columns = (np.ptp(pixels, axis=2) > 20).nonzero()
    height, width = pixels.shape[:2]
    assert rows.max() < 0.2 * height
    assert np.ptp(columns) > 0.5 * width


def test_a_snapshot_without_edges_has_a_still_picture(tmp_path):
    pytest.importorskip("matplotlib")
    one = drawn(*GRAPHS["both"])
    write_still(replace(one, strengths=np.zeros_like(one.strengths)), tmp_path / "still.svg")
    text = (tmp_path / "still.svg").read_text()
    assert text.count("<use ") == one.live.size
    assert PLUS not in text
    assert MINUS not in text


def test_both_pictures_have_the_same_colours():
    assert f"--plus: {PLUS}; --minus: {MINUS};" in _file("page.css")


SEEN_BY = {
    "all cones": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""What eyes make of linear red, green and blue. Source: Machado, Oliveira, Fernandes, 2009, table 1, severity 1."""


def lab(colour: str, seen: np.ndarray) -> np.ndarray:
    """A colour such as #c76a00 in CIELAB, as it is seen."""
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(seen @ linear, 0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", SEEN_BY)
@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_all_eyes_tell_the_four_kinds_of_edges_apart(scheme, eyes):
    """Ten is told apart at a glance side by side; lines are thin and apart, so twice that is asked for."""
    kinds = [re.findall(rf"--{kind}: (#\w+)", _file("page.css"))[scheme] for kind in ("plus", "minus", "came", "went")]
    found = [lab(kind, np.array(SEEN_BY[eyes])) for kind in kinds]
    for (one, a), (other, b) in combinations(zip(kinds, found, strict=True), 2):
        assert np.linalg.norm(a - b) > 20, f"{one} and {other}"


# --- in a browser ---


@pytest.mark.parametrize("graphs", GRAPHS.values(), ids=GRAPHS)
def test_a_page_has_nodes_where_the_layout_has_them(graphs, browser, tmp_path):
    write_page([drawn(*graphs)], tmp_path / "page.html")
    page = opened(browser, tmp_path / "page.html", viewport={"width": 1280, "height": 800})
    positions = page.evaluate("Array.from({ length: runs[0].nodes }, (_, n) => graphs[0].position(n))")
    x, y = np.array(positions).T
    check_positions(graphs, x, y)
    check_alike(x, layout_of(graphs).x, within=0.01)
    check_alike(y, layout_of(graphs).y, within=0.01)
    assert page.problems == []


def test_the_page_of_a_hostile_script_runs_as_any_other(hostile_page, browser):
    page = opened(browser, hostile_page)
    assert page.evaluate("hostile") == HOSTILE
    assert page.problems == []


def test_the_slider_shows_the_edges_of_each_snapshot(run, browser):
    page = opened(browser, run / "view.html", viewport={"width": 1280, "height": 800})
    one = run_record(run)
    page.focus("#time")
    page.keyboard.press("Home")
    for i, snapshot in enumerate(read_snapshots(RunDirectory(run).snapshots)):
        settle(page)
        assert page.input_value("#time") == str(i)
        drawn = page.evaluate(
            "() => { const r = runs[0], found = []; for (let e = 0; e < r.num; e++) if (r.strength(state.now, e)) "
            "found.push([r.targets[e], r.sources[e]]); return found; }"
        )
        assert set(map(tuple, drawn)) == edges_of(one, i)
        assert page.evaluate("graphs[0].drawn") == len(drawn) == len(snapshot.edges["graph.weight"])
        assert f"{len(drawn)} edges" in page.inner_text("figcaption >> nth=0")
        assert f"step {snapshot.step:,}" in page.inner_text("#when")
        page.keyboard.press("ArrowRight")
    assert page.problems == []


def test_pixels_change_with_the_slider_and_colours_tell_signs(run, browser):
    page = opened(browser, run / "view.html")
    count = """() => {
      const c = graphs[0].canvas, p = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
      let warm = 0, cold = 0;
      for (let i = 0; i < p.length; i += 4) warm += p[i] - p[i + 2] > 40, cold += p[i + 2] - p[i] > 40;
      return [warm, cold];
    }"""
    page.evaluate("show(0)")
    settle(page)
    first, shot = page.evaluate(count), page.locator("canvas.graph").first.screenshot()
    assert min(first) > 100
    page.evaluate("show(5)")
    settle(page)
    assert page.locator("canvas.graph").first.screenshot() != shot
    page.evaluate("() => { runs[0].strengths.fill(0); drawGraphs(); }")
    assert page.evaluate(count) == [0, 0]


def test_play_runs_to_the_end_and_stops(run, browser):
    page = opened(browser, run / "view.html")
    page.evaluate("show(0)")
    page.focus("body")
    page.keyboard.press("Space")
    assert page.inner_text("#play") == "Pause"
    page.wait_for_function("state.now === runs[0].snapshots - 1 && !state.playing", timeout=20_000)
    assert page.inner_text("#play") == "Play"
    assert page.problems == []


def test_pointing_at_a_node_shows_its_true_degree(run, browser):
    page = opened(browser, run / "view.html", viewport={"width": 1100, "height": 800})
    one = run_record(run)
    last = len(one.steps) - 1
    edges = edges_of(one, last)
    node = max(range(one.live.shape[1]), key=lambda n: sum(n in edge for edge in edges))
    into, out = sum(to == node for to, _ in edges), sum(of == node for _, of in edges)
    box = page.locator("canvas.graph").first.bounding_box()
    x, y = page.evaluate(f"graphs[0].position({node})")
    page.mouse.move(box["x"] + x, box["y"] + y)
    assert f"{into} in, {out} out" in page.inner_text("#tip")
    page.mouse.click(box["x"] + x, box["y"] + y)
    settle(page)
    facts = page.inner_text("#nodeFacts").replace("\n", " ")
    assert f"{into} edges in" in facts
    assert f"{out} edges out" in facts
    page.keyboard.press("Escape")
    settle(page)
    assert page.is_hidden("#node")
    assert page.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_nothing_overflows(run, browser, scheme, width):
    page = opened(browser, run / "view.html", viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 380) == (scheme == "light")
    rows = page.locator("#table tbody tr").count()
    assert rows == 2 * len(run_record(run).steps)
    assert page.problems == []


def test_hostile_names_do_nothing_in_a_browser(run, browser, tmp_path):
    name = "</script><script>state.broken = 1</script><img src=x onerror='state.broken=1'>"
    write_page([replace(run_record(run), name=name, about=name)] * 2, tmp_path / "page.html")
    page = opened(browser, tmp_path / "page.html")
    assert page.evaluate("state.broken") is None
    assert page.inner_text("h1") == name
    assert page.problems == []


def test_what_is_not_known_of_a_run_is_left_out(run, browser, tmp_path):
    one = run_record(run)
    facts = "[...document.querySelectorAll('#now th[scope=row]')].map(e => e.textContent)"
    for reload, metrics, shown in (
        (None, (), []),
        (None, ({"epoch": 1, "lr": 0.1},), []),
        (None, ({"epoch": 1, "train_loss": 2.5}, {"epoch": 2}), ["loss"]),
        (3600, (), ["accuracy", "loss"]),
    ):
        write_page([replace(one, metrics=metrics)] * 2, tmp_path / "page.html", reload=reload)
        page = opened(browser, tmp_path / "page.html", viewport={"width": 1280, "height": 800})
        for moment in range(len(one.steps)):
            page.evaluate(f"show({moment})")
            settle(page)
            assert page.evaluate(facts) == ["edges", "live", "come", "gone", *shown]
            assert page.is_visible("#accuracy") == ("accuracy" in shown)
            assert page.is_visible("#loss") == ("loss" in shown)
        numbers = [row.split("\t") for row in page.locator("#now tr").all_inner_texts()[5:]]
        none, of_both = "none yet", {0: [], 1: [["loss", "2.500", "2.500"]]}
        assert numbers == of_both.get(len(shown), [["accuracy", none, none], ["loss", none, none]])
        assert page.evaluate("document.querySelectorAll('#table th').length") == 7 + (shown == ["loss"])
        assert "NaN" not in page.evaluate("document.body.innerText + document.querySelector('#table').textContent")
        assert page.problems == []
        page.close()


def test_edges_are_summed_between_levels_until_one_zooms_in(run, browser):
    page = opened(browser, run / "view.html", viewport={"width": 1280, "height": 800})
    assert not page.is_checked("#sum"), "single edges say something where there are few"
    one = run_record(run)
    page.evaluate("show(5)")
    settle(page)
    page.check("#sum")
    found = page.evaluate("levelsOf(graphs[0]).flatMap((l, a) => [...l.bands].map(([b, n]) => [a, b, ...n]))")
    levels = [level for level, size in enumerate(one.graphs[0].levels) for _ in range(size)]
    now, before, bands = edges_of(one, 5), edges_of(one, 4), {}
    for e, (source, target) in enumerate(zip(one.sources.tolist(), one.targets.tolist(), strict=True)):
        if (target, source) not in now | before:
            continue
        band = bands.setdefault((levels[source], levels[target]), [0, 0, 0, 0])
        kind = 3 if (target, source) not in now else 2 if (target, source) not in before else int(one.strengths[5, e] < 0)
        band[kind] += 1
    assert {(a, b): n for a, b, *n in found} == bands
    box = page.locator("canvas.graph").first.bounding_box()
    point = box["x"] + page.evaluate("levelsOf(graphs[0])[1].x"), box["y"] + box["height"] / 2
    page.mouse.move(*point)
    assert page.inner_text("#tip").startswith("level 1: ")
    page.mouse.click(*point)
    assert page.evaluate("[graphs[0].zoom, graphs[0].isSummed()]") == [6, False]
    assert page.problems == []


def test_two_runs_share_their_time(run, browser, tmp_path):
    """Where one is shorter it stays as it ended, without marks."""
    one = run_record(run)
    half = replace(
        one, steps=one.steps[:4], epochs=one.epochs[:4], strengths=one.strengths[:4], live=one.live[:4], came=one.came[:4]
    )
    half = replace(half, name="half", active=one.active[:4], went=one.went[:4], filters=one.filters[:0], maps={}, images=None)
    write_page([half, one], tmp_path / "two.html")
    page = opened(browser, tmp_path / "two.html", viewport={"width": 1280, "height": 800})
    assert page.get_attribute("#time", "max") == str(len(one.steps) - 1)
    assert page.evaluate("[moment(runs[0]), moment(runs[1])]") == [3, len(one.steps) - 1]
    assert page.evaluate("[isMarked(runs[0], 3), isMarked(runs[1], moment(runs[1]))]") == [False, True]
    captions = page.locator("figcaption").all_inner_texts()
    assert "ended; " in captions[0]
    assert "ended; " not in captions[1]
    assert "curves: half" in page.inner_text("#legend"), "the same rule and seed: told apart by name"
    page.evaluate("pick(runs[1], 70)")
    assert page.is_visible("#inside")
    page.evaluate("pick(runs[0], 70)")
    assert not page.is_visible("#inside"), "this run has no pictures of its nodes, and those of the other are not its"
    assert page.problems == []


def test_numbers_of_both_runs_stand_beside_each_other(run, browser):
    page = opened(browser, run / "view.html", viewport={"width": 1280, "height": 800})
    rows = [row.inner_text().split("\t") for row in page.locator("#now tr").all()]
    records = [run_record(run), run_record(run / "baseline")]
    assert [cell.strip() for cell in rows[0][1:]] == [one.about for one in records]
    table = {cells[0]: cells[1:] for cells in rows[1:]}
    assert table["live"] == [f"{int((one.live[-1] != 0).sum())} of {one.live.shape[1]}" for one in records]
    assert table["accuracy"] == [f"{100 * one.metrics[-1]['top1']:.1f} %" for one in records]
    assert page.problems == []


def test_values_are_told_where_one_points(run, browser):
    page = opened(browser, run / "view.html", viewport={"width": 1280, "height": 1600})

    def tip(canvas: str, across: float, down: float = 0.5) -> str:
        page.locator(canvas).scroll_into_view_if_needed()
        box = page.locator(canvas).bounding_box()
        page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])
        return page.inner_text("#tip") if page.is_visible("#tip") else ""

    both = [run_record(run), run_record(run / "baseline")]
    ends = ", ".join(f"{one.about} {100 * one.metrics[-1]['top1']:.2f} %" for one in both)
    assert tip("#accuracy", 0.99) == f"epoch 3.00: {ends}"
    assert "training" in tip("#loss", 0.5)
    assert re.fullmatch(r"\d+: .* \d+, .* \d+", tip("#degrees", 0.3))
    target, source = next(iter(edges_of(both[0], -1)))
    nodes = both[0].live.shape[1]
    side = page.locator("#adjacency").bounding_box()
    left = (side["width"] - min(side["width"], side["height"])) / 2
    across = (left + (source + 0.5) / nodes * min(side["width"], side["height"])) / side["width"]
    said = tip("#adjacency", across, (target + 0.5) / nodes * min(side["width"], side["height"]) / side["height"])
    names = [page.evaluate(f"runs[0].nodeName({n})") for n in (source, target)]
    assert said == f"from {names[0]} to {names[1]}: 1 edge"
    assert page.problems == []


def test_nodes_are_chosen_by_keys_and_outputs_are_no_classes(run, browser):
    page = opened(browser, run / "view.html", viewport={"width": 1280, "height": 800})
    one = run_record(run)
    live = [n for n in range(one.live.shape[1]) if one.live[-1, n]]
    page.locator("canvas.graph").first.focus()
    chosen = []
    for key in "nnnp":
        page.keyboard.press(key)
        chosen.append(page.evaluate("state.picked.node"))
    assert chosen == [live[0], live[1], live[2], live[1]]
    assert page.inner_text("#nodeName") == page.evaluate(f"runs[0].nodeName({live[1]})")
    page.keyboard.press("p")
    page.keyboard.press("p")
    assert page.evaluate("state.picked.node") == live[-1]
    assert page.get_attribute("#nodeName", "aria-live") == "polite"
    page.keyboard.press("Escape")
    settle(page)
    box = page.locator("canvas.graph").first.bounding_box()
    x, y = page.evaluate(f"graphs[0].position({live[-1]})")
    page.mouse.move(box["x"] + x, box["y"] + y)
    assert page.inner_text("#tip").endswith("; a channel for the layers that come after, no class")
    assert page.problems == []


def test_what_one_looks_at_stays(run, browser, tmp_path):
    """When the time, the size of the window or the page itself changes."""
    write_page([run_record(run)], tmp_path / "page.html", reload=3600)
    page = opened(browser, tmp_path / "page.html", viewport={"width": 1280, "height": 800})
    one = run_record(run)
    edges = {i: edges_of(one, i) for i in range(len(one.steps))}
    degree = {i: Counter(n for edge in edges[i] for n in edge) for i in edges}
    node = max(range(one.live.shape[1]), key=lambda n: abs(degree[0][n] - degree[5][n]))
    box, (x, y) = page.locator("canvas.graph").bounding_box(), page.evaluate(f"graphs[0].position({node})")
    page.mouse.move(box["x"] + x, box["y"] + y)
    tip = page.inner_text("#tip")
    page.evaluate("show(0)")
    settle(page)
    assert page.inner_text("#tip") != tip
    assert sum(map(int, re.findall(r"(\d+) (?:in|out)", page.inner_text("#tip")))) == degree[0][node]

    page.evaluate("graphs[0].zoomBy(5, graphs[0].width, graphs[0].height)")
    page.set_viewport_size({"width": 600, "height": 500})
    page.wait_for_function("graphs[0].width < 600")
    positions = "Array.from(runs[0].x, (_, n) => graphs[0].position(n))"
    seen = f"{positions}.filter(([x, y]) => x > 0 && y > 0 && x < graphs[0].width && y < graphs[0].height).length"
    assert page.evaluate(seen) > 0

    page.evaluate("pick(runs[0], 70)")
    page.uncheck("#changes")
    page.evaluate("show(2)")
    before = page.evaluate("[state.now, state.picked.node, graphs[0].zoom, $('changes').checked]")
    page.evaluate("remember()")
    page.reload()
    page.evaluate("ready")
    assert page.evaluate("[state.now, state.picked.node, graphs[0].zoom, $('changes').checked]") == before
    assert page.problems == []


def test_a_hundred_snapshots_of_32_000_edges(browser, tmp_path):
    """How long a redraw takes is reported, not asserted."""
    model = tiny_cifar10()
    snapshots_of(model, tmp_path / "snapshots", 100, num_edges=32_000)
    write_page([record(model, read_snapshots(tmp_path / "snapshots"), name="cifar10")], tmp_path / "page.html")
    page = opened(browser, tmp_path / "page.html", viewport={"width": 1280, "height": 800})
    times = page.evaluate(
        "() => { const times = []; for (let s = 0; s < 99; s += 7) state.now = s, drawGraphs(), times.push(state.milliseconds);"
        " return times.sort((a, b) => a - b); }"
    )
    middle = times[len(times) // 2]
    sys.stderr.write(f"a redraw of 32,000 edges takes {middle:.0f} ms (median) in Chromium {browser.version}, without a GPU\n")
    assert page.evaluate("graphs[0].drawn") > 31_000
    assert page.problems == []
