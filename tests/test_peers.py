"""Networks beside DNW in the paper's tables: their counts, small images, wiring and compiling, and the tables themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dnw.cli import main
from dnw.compile import compile
from dnw.models import expander_edges, mobilenet_v1, shufflenet_v1, shufflenet_v2
from dnw.recipes import RECIPES
from dnw.train import EpochMetrics, RunDirectory, override
from dnw.train._network import make_model, make_network
from dnw.train._published import TABLES, Published, tables

COUNTS = {
    "imagenet_mobilenet_x25": (0.470, 41.0),
    "imagenet_mobilenet_x50": (1.332, 149.5),
    "imagenet_mobilenet_v2_x15": (1.415, 30.6),
    "imagenet_mobilenet_v2_x40": (1.771, 41.8),
    "imagenet_mobilenet_v2_x60": (2.217, 151.0),
    "imagenet_mobilenet_v2_x75": (2.636, 153.9),
    "imagenet_shufflenet_v1_x50": (0.718, 37.6),
    "imagenet_shufflenet_v1_x100": (1.866, 137.5),
    "imagenet_shufflenet_v2_x50": (1.367, 40.5),
    "imagenet_shufflenet_v2_x100": (2.279, 144.9),
    "imagenet_mnasnet": (2.030, 68.3),
}
"""Millions of parameters and multiply-adds of the originals, by a count of the reference implementations."""
ROWS = {row.recipe: row for rows in TABLES.values() for row in rows if not row.changes}


def counted(recipe: str) -> tuple[float, float]:
    config = RECIPES[recipe]()
    model = make_model(config, 1000).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *config.data.input_size))
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e6


@pytest.mark.parametrize("recipe", COUNTS)
def test_counts_are_those_of_the_originals(recipe, libraries):
    libraries(recipe)
    assert counted(recipe) == pytest.approx(COUNTS[recipe], rel=2e-3)


@pytest.mark.parametrize(
    "recipe", [f"imagenet_{name}" for name in ("densenet_x50", "densenet_x100", "xception_x50", "xception_x100")]
)
def test_networks_that_are_known_by_their_counts_alone(recipe, libraries):
    """The DenseNets are built to the published counts; the Xception-like ones are what the ShuffleNet paper says they are."""
    libraries(recipe)
    published = ROWS[recipe].multiply_adds
    assert published is not None
    assert counted(recipe)[1] == pytest.approx(published, rel=0.02 if "densenet" in recipe else 0.04)


SMALL = ["data.name=cifar10", "data.image_size=32", "epochs=1", "batch_size=4"]
PEERS = ("expander_x50", "mobilenet_v2_x15", "shufflenet_v1_x50", "shufflenet_v2_x50", "mnasnet", "xception_x50")
PEERS += ("densenet_x50",)


@pytest.mark.parametrize("peer", PEERS)
def test_peers_train_on_small_images_are_wired_and_compiled(peer, libraries):
    libraries(peer)
    config = override(RECIPES[f"imagenet_{peer}"](), SMALL)
    if "expander" not in peer:
        config = override(config, ["rule=dnw", "density=0.2"])
    network = make_network(config, 10)
    model = network.model
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert first.stride == (1, 1)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = {name: parameter.active.clone() for name, parameter in network.wiring.items()}
    for _ in range(2):
        network.optimizer.zero_grad()
        F.cross_entropy(model(images), torch.arange(4)).backward()
        network.optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    changed = any(not torch.equal(mask, network.wiring[name].active) for name, mask in before.items())
    assert changed == ("expander" not in peer)
    compiled = compile(model.eval(), images, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-3, atol=1e-4)


def test_an_expander_reads_so_many_sources_of_each_target():
    model = mobilenet_v1(10, width=0.5)
    edges = expander_edges(model, 0.25, seed=3)
    assert len(edges) == 13
    for name, mask in edges.items():
        weight = model.get_parameter(name)
        assert mask.shape == weight.shape
        assert (mask.flatten(1).sum(1) == round(0.25 * weight.shape[1])).all()
    assert any(not torch.equal(mask, expander_edges(model, 0.25, seed=4)[name]) for name, mask in edges.items())
    with pytest.raises(ValueError, match="a Linear has no 1x1 convolutions"):
        expander_edges(nn.Linear(2, 2), 0.5, 0)
    wiring = make_network(override(RECIPES["imagenet_expander_x50"](), SMALL), 10).wiring
    assert set(wiring) == set(edges)


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("imagenet_expander_x50", ["density=null"], "edges=expander: give density"),
        ("imagenet_expander_x50", ["pattern=4x4"], "chooses no edges; leave the pattern out"),
        ("imagenet_mnasnet", ["width=0.5"], "model=mnasnet_small has no width"),
    ],
)
def test_settings_that_do_not_fit_a_peer(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        override(RECIPES[recipe](), changes)


def test_widths_that_there_are_not():
    with pytest.raises(ValueError, match=r"width=0\.305: stages of \[73, 146, 292\] channels; they must be more than 7"):
        shufflenet_v1(width=0.305)
    with pytest.raises(ValueError, match="groups=2: allowed are 1 and 3"):
        shufflenet_v1(groups=2)
    with pytest.raises(ValueError, match=r"width=0\.4: a ShuffleNetV2 has one of the widths"):
        shufflenet_v2(width=0.4)


# --- the tables ---


def test_every_row_is_a_recipe_whose_docstring_has_its_accuracy():
    for row in (row for rows in TABLES.values() for row in rows):
        config = row.config()
        assert config.recipe == row.recipe
        if not row.changes:
            text = (RECIPES[row.recipe].__doc__ or "").replace("%", "")
            assert f"published: {row.accuracy:.1f}" in text or "resnet50_dnw" in row.recipe, row.recipe


def test_the_tables_have_counts_results_and_commands(tmp_path, monkeypatch):
    own = Published("static, DNW", "cifar10", 80.9, 0.6)
    rows = (own, ROWS["cifar10_mobilenet_x25"], ROWS["imagenet_mobilenet_x25"])
    monkeypatch.setattr("dnw.train._published.TABLES", {"few": rows})
    assert not any("seed" in line for line in tables(tmp_path / "nothing"))
    for seed, top1 in ((0, 0.5), (1, 0.52)):
        stored(
            tmp_path / "results" / "name" / f"seed-{seed}", override(RECIPES["cifar10"](), [f"seeds={seed}", "epochs=2"]), top1
        )
    stored(tmp_path / "results" / "short", override(RECIPES["cifar10"](), ["epochs=1"]), 0.9)
    head, rule, *lines = [line for line in tables(tmp_path / "results") if line.startswith("|")]
    assert head.count("|") == rule.count("|") == 9
    static, plain, imagenet = ([cell.strip() for cell in row.strip("|").split("|")] for row in lines)
    assert static[1] == "80.9 +- 0.6 %"
    assert static[6] == "51.0 +- 1.4 % (2 epochs, 2 seeds)"
    assert static[7] == "`dnw train cifar10`"
    assert (plain[4], plain[6]) == ("0.22M", "")
    assert imagenet[2:6] == ["0.5M", "41M", "0.47M", "41.0M"]


def stored(path, config, top1):
    """A run directory without weights, as results are kept."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(config.to_json())
    metrics = [EpochMetrics(i + 1, i + 1, 0.1, 1.0, 0.5, 1.0, top1, 1.0, 1, 0, 1, 1, 1.0) for i in range(config.epochs)]
    RunDirectory(path).write_metrics(metrics)


def test_the_command_prints_one_of_the_tables(capsys, monkeypatch):
    monkeypatch.setattr("dnw.train._published.TABLES", {"few": (ROWS["cifar10_mobilenet_x25"],), "more": ()})
    assert main(["table", "few"]) == 0
    printed = capsys.readouterr().out
    assert "MobileNetV1 x0.25" in printed
    assert "more" not in printed
    assert main(["table", "fewer"]) == 1
    assert "no table 'fewer'; did you mean 'few'" in capsys.readouterr().err
