"""Checkpoints of the authors' code as runs; counts and tables of runs."""

from __future__ import annotations

import json
import lzma
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import reference

from dnw.cli import main
from dnw.recipes import RECIPES
from dnw.train import (
    RunDirectory,
    count_config,
    count_run,
    import_original,
    load_trained,
    override,
    results_table,
    save_results,
    train,
)
from dnw.train._results import _name, insert_table


def stored(name: str, tmp_path, masks: bool = False):
    """A recorded fixture in the form that the authors' training writes, without its meters."""
    with np.load(reference(f"{name}.npz"), allow_pickle=False) as archive:
        state = {k: torch.from_numpy(archive[k]) for k in archive.files if k.startswith("state.")}
        rest = {k: torch.from_numpy(archive[k]) for k in ("x", "logits_eval")}
    weights = OrderedDict(
        ("module." + k.removeprefix("state."), v.float() if v.is_floating_point() else v) for k, v in state.items()
    )
    path = tmp_path / "best.pt"
    torch.save({"model": weights}, path)
    return path, rest


IMPORTS = {
    "static_dnw": ("cifar10", 10),
    "static_random_graph": ("cifar10_random_original", 10),
    "discrete_time_dnw": ("cifar10_discrete", 10),
    "continuous_time_dnw": ("cifar10_continuous", 10),
    "cifar_mobilenetv1_dnw_x225": ("cifar10_mobilenet_dnw_x225", 10),
    "imagenet_mobilenetv1_dnw_small_x225": ("imagenet_dnw_small_x225", 1000),
}

STORED = Path(__file__).parents[1] / "results"


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", IMPORTS)
def test_an_imported_run_gives_the_recorded_logits(name, tmp_path):
    recipe, classes = IMPORTS[name]
    if "continuous" in name:
        pytest.importorskip("torchdiffeq")
    file, recorded = stored(name, tmp_path)
    run = RunDirectory(import_original(file, RECIPES[recipe](), data_dir=tmp_path, out=tmp_path / "run"))
    network = load_trained(run.path)
    assert network.num_classes == run.environment()["num_classes"] == classes
    with torch.no_grad(), network.wiring.settled():
        found = network.model(recorded["x"])
    assert (found - recorded["logits_eval"]).norm() / recorded["logits_eval"].norm() < 1e-4
    assert count_run(run.path).active < count_run(run.path).parameters


@pytest.mark.data
def test_import_on_the_command_line(tmp_path, capsys):
    file = tmp_path / "epoch_9.pt"
    file.write_bytes(lzma.decompress(reference("static_dnw_epoch_9.pt.xz").read_bytes()))
    assert main(["import", str(file), "cifar10", "--out", str(tmp_path / "run")]) == 0
    assert "dnw eval" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["epoch"] == 9
    assert main(["count", str(tmp_path / "run")]) == 0
    assert "43,058" in capsys.readouterr().out
    for recipe, message in (
        ("cifar10_discrete", "does not fit recipe cifar10_discrete: the checkpoint has nothing for 'graph.norm.weight'"),
        ("cifar10_random", "it holds no fixed edge set, so choose the recipe of the learned wiring"),
        ("mnist", "does not fit recipe mnist: the checkpoint"),
        ("cifar10_mobilenet_x25", "model=mobilenet_v1: the authors' code has no checkpoints of it"),
    ):
        assert main(["import", str(file), recipe, "--out", str(tmp_path / "other")]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


@pytest.mark.data
def test_an_imported_edge_set_must_have_the_budget_of_the_recipe(tmp_path):
    file, _ = stored("static_random_graph", tmp_path)
    config = RECIPES["cifar10_random_original"]().model_copy(update={"num_edges": 31_000})
    with pytest.raises(ValueError, match="32,000 active edges, this wiring keeps 31,000"):
        import_original(file, config, data_dir=tmp_path, out=tmp_path / "run")
    with pytest.raises(ValueError, match="it holds a fixed edge set, so choose the recipe of a random graph"):
        import_original(file, RECIPES["cifar10"](), data_dir=tmp_path, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["digits"], "graph.weight"),
        (["cifar10_mobilenet_x25", "--input", "3x32x32"], "total, with norms and biases"),
        (["digits", "num_edges=50"], "total, with norms and biases"),
        (["mobilenet_v1", "width=0.25"], "41,030,272"),
        (["mobilenet_v1_graphs"], "924,844,032"),
        (["tiny_cifar10", "--input", "3x32x32"], "16,957,440"),
        (["cifar10_continuous"], "graph: 14 evaluations per forward pass"),
    ],
)
def test_counts_on_the_command_line(arguments, expected, capsys):
    assert main(["count", *arguments]) == 0
    assert expected in capsys.readouterr().out


def test_bad_counts_on_the_command_line(capsys, tmp_path):
    for arguments, message in (
        (["digits", "--input", "3x32"], "--input 3x32: expected channels, height and width, such as 3x224x224"),
        (["digits", "--input", "3x32x32"], "the model does not take an input of 3x32x32"),
        (["digitz"], "no recipe 'digitz'; did you mean 'digits'"),
        ([str(tmp_path)], "not a run directory"),
    ):
        assert main(["count", *arguments]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds_and_counts(recipe, libraries):
    libraries(recipe)
    found = count_config(RECIPES[recipe]())
    assert 0 < found.live <= found.nominal <= found.dense
    assert found.active <= found.parameters


@pytest.mark.filterwarnings("ignore:no path of active edges")
def test_edges_that_reach_no_output_are_refused_where_they_never_change(tmp_path, capsys):
    assert main(["train", "digits", "rule=random", "baseline=null", "num_edges=2", "--out", str(tmp_path / "run")]) == 1
    assert "with its 2 edges nothing can reach an output of the graph" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_evaluations_of_an_ode_are_reported_per_epoch(tmp_path, capsys, monkeypatch):
    from dnw.graphs import ContinuousTimeGraph
    from dnw.models import GraphClassifier, Window
    from dnw.train import _network

    def small(config, classes):
        graph = ContinuousTimeGraph(20, 4, 4, solver=config.solver, solver_steps=config.solver_steps)
        stem, head = torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Linear(4, classes)
        return GraphClassifier(stem, graph, Window(0, 8), head)

    monkeypatch.setitem(_network.MODELS, "tiny_digits", small)
    config = RECIPES["digits"]().model_copy(
        update={"epochs": 1, "baseline": None, "num_edges": 60, "solver": "rk4", "solver_steps": 3}
    )
    run = RunDirectory(train(config, data_dir=tmp_path, out=tmp_path / "run"))
    assert run.metrics()[0].evaluations == 12
    assert "evaluations 12.0" in capsys.readouterr().out
    assert "(12 evaluations)" in results_table([run.path])


def test_an_ode_that_cannot_go_on_is_one_line(tmp_path, capsys, monkeypatch):
    from dnw.train import _loop

    def explode(*_, **__):
        raise FloatingPointError("the solver dopri5 could not go on")

    monkeypatch.setattr(_loop, "_train_one", explode)
    assert main(["train", "digits", "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.strip() == "dnw: the solver dopri5 could not go on"


def test_the_table_of_results(tmp_path, capsys):
    config = RECIPES["digits"]().model_copy(update={"epochs": 2, "seeds": (0, 1)})
    run = train(config, data_dir=tmp_path, out=tmp_path / "run")
    capsys.readouterr()
    assert main(["results", str(run)]) == 0
    table = capsys.readouterr().out
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[:4] for row in rows] == [["| `digits`", rule, "2", "0, 1"] for rule in ("dnw", "random")]
    lasts = [RunDirectory(run / f"seed-{s}").metrics()[-1].top1 for s in (0, 1)]
    assert f"{sum(lasts) / 2:.2%} +- " in rows[0]
    others = [RunDirectory(run / f"seed-{s}" / "baseline").metrics()[-1].top1 for s in (0, 1)]
    differences = [100 * (b - a) for a, b in zip(lasts, others, strict=True)]
    error = abs(differences[0] - differences[1]) / 2  # the standard error of a mean of two
    assert f"| {sum(differences) / 2:+.2f} +- {error:.2f} |" in rows[1]
    assert "|  |" in rows[0]
    environment = json.loads((run / "seed-0" / "environment.json").read_text())
    assert f"- data digits, {environment['machine']}, torch {torch.__version__}" in table
    assert f"commit `{environment['commit']}`" in table
    lines = (run / "seed-1" / "metrics.jsonl").read_text().splitlines()
    (run / "seed-1" / "metrics.jsonl").write_text(lines[0] + "\n")
    table = results_table([run])
    assert "| `digits` | dnw | 2 | 0 |" in table
    assert "against dnw" not in table  # one pair says nothing of its uncertainty
    assert f"- not finished, left out: {run / 'seed-1'} (1 of 2 epochs)" in table
    with pytest.raises(ValueError, match="not a run directory"):
        results_table([tmp_path / "nothing"])


def test_settings_that_differ_from_the_recipe_stand_in_the_table(tmp_path):
    base = override(RECIPES["digits"](), ["epochs=1", "baseline=null", "batch_size=64"])
    runs = [
        train(override(base, [f"optim.lr={lr}", "num_edges=150"]), data_dir=tmp_path, out=tmp_path / str(lr))
        for lr in (0.1, 0.05)
    ]
    table = results_table(runs)
    assert "| `digits` | dnw | 1 | 0 |" in table
    assert "| `digits` `optim.lr=0.05` | dnw | 1 | 0 |" in table
    assert "- changed in all rows: `num_edges=150 batch_size=64`" in table
    again = shutil.copytree(runs[0], tmp_path / "again")  # the same seed again is no second seed
    assert results_table([*runs, again]).count("| `digits` | dnw | 1 | 0 |") == 2


def test_what_is_kept_of_a_run_gives_the_same_table(tmp_path, capsys):
    """Of every seed and baseline a few kilobytes, without weights, and without where anything lay."""
    config = RECIPES["digits"]().model_copy(update={"epochs": 2, "seeds": (0, 1)})
    run = train(override(config, ["num_edges=150"]), data_dir=tmp_path / "data", out=tmp_path / "run")
    capsys.readouterr()
    for _ in range(2):  # the same run again changes nothing
        assert main(["results", str(run), "--save", str(tmp_path / "kept")]) == 0
    kept = sorted((tmp_path / "kept").iterdir())
    assert [path.name for path in kept] == [
        f"digits-num_edges-150-{rule}-2-epochs-seed-{seed}" for rule in ("dnw", "random") for seed in (0, 1)
    ]
    for path in kept:
        files = {file.name: file for file in path.iterdir()}
        assert files.keys() == {"config.json", "environment.json", "metrics.jsonl", "counts.json"}
        assert sum(file.stat().st_size for file in files.values()) < 10_000
        assert not any(str(tmp_path) in file.read_text() for file in files.values())
        assert json.loads(files["counts.json"].read_text())["active"] < 2_000
    assert results_table([tmp_path / "kept"]) == results_table([run])
    other = train(override(config, ["num_edges=150", "seeds=1", "baseline=null"]), data_dir=tmp_path, out=tmp_path / "other")
    metrics = RunDirectory(other).metrics()
    RunDirectory(other).write_metrics(metrics[:1])
    with pytest.raises(ValueError, match="no finished run"):
        save_results([other], tmp_path / "kept")
    lines = RunDirectory(kept[0]).metrics()
    RunDirectory(kept[0]).write_metrics(lines[:1])
    with pytest.raises(ValueError, match="holds another run of the same settings"):
        save_results([run], tmp_path / "kept")


def test_learning_curves_are_drawn_of_what_is_kept(tmp_path, capsys):
    """Those of the docs as well, as the same release of matplotlib draws them: make results."""
    matplotlib = pytest.importorskip("matplotlib")
    assert main(["results", str(STORED / "chain_20"), "--plot", str(tmp_path / "curves.svg")]) == 0
    assert "curves.svg: " in capsys.readouterr().out
    drawn, stored = (tmp_path / "curves.svg").read_text(), (STORED.parent / "docs" / "learning_curves.svg").read_text()
    assert drawn.count("20 epochs") == 5
    assert drawn == stored or f"Matplotlib v{matplotlib.__version__}" not in stored
    assert main(["results", str(STORED / "chain_5"), "--plot", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert main(["results", str(tmp_path), "--plot", str(tmp_path / "none.svg")]) == 1
    assert not (tmp_path / "none.svg").exists()


ARENA = [STORED / name for name in ("arena_tiny", "chain_5", "chain_20")]


def test_differences_are_drawn_by_pairs_of_runs_with_the_same_seed(tmp_path, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    assert main(["results", *map(str, ARENA), "--plot", str(tmp_path / "differences.svg"), "--differences"]) == 0
    drawn, stored = (tmp_path / "differences.svg").read_text(), (STORED.parent / "docs" / "arena.svg").read_text()
    assert ">norm_ste floor.per_target=1, 3 seeds<" in drawn
    assert drawn == stored or f"Matplotlib v{matplotlib.__version__}" not in stored, "make results"
    capsys.readouterr()
    assert main(["results", str(STORED / "cifar10_160"), "--plot", str(tmp_path / "none.svg"), "--differences"]) == 1
    assert "no run to be compared with DNW of the same network, epochs and seed" in capsys.readouterr().err
    assert main(["results", *map(str, ARENA), "--differences"]) == 1
    assert "it goes with --plot FILE" in capsys.readouterr().err
    assert not (tmp_path / "none.svg").exists()


def test_where_a_run_was_computed_makes_no_row_and_a_seed_again_takes_no_comparison(tmp_path):
    base = override(RECIPES["digits"](), ["epochs=1", "baseline=null"])
    kinds = [["seeds=0"], ["seeds=1", "device=cpu", "data.workers=1"], ["rule=random"], ["rule=random", "seeds=1"], ["seeds=0"]]
    runs = [train(override(base, kind), data_dir=tmp_path, out=tmp_path / str(i)) for i, kind in enumerate(kinds)]
    table = results_table(runs[:4])
    assert "| `digits` | dnw | 1 | 0, 1 |" in table
    assert "against dnw" in table
    again = results_table(runs)
    assert "| `digits` | random | 1 | 0, 1 |" in again
    assert next(line for line in table.splitlines() if "| random |" in line) in again
    dense = [override(base, ["num_edges=null", f"density={density}"]) for density in (0.1, 0.2)]
    others = [train(config, data_dir=tmp_path, out=tmp_path / f"dense-{i}") for i, config in enumerate(dense)]
    assert "against dnw" not in results_table([*others, runs[0]])  # of other budgets


def test_names_of_what_is_kept_tell_ways_of_finding_a_wiring_apart():
    original = RECIPES["cifar10_random_original"]()
    names = {_name(original), _name(override(original, ["rule=random", "edges=null"]))}
    assert len(names) == 2


def test_a_gradient_that_is_exact_by_default_or_because_it_was_asked_for_is_one_row(tmp_path):
    base = override(RECIPES["digits"](), ["epochs=1", "baseline=null"])
    asked = override(base, ["seeds=1", "dormant.gradient=exact"])
    runs = [train(config, data_dir=tmp_path, out=tmp_path / str(config.seed)) for config in (base, asked)]
    assert "| `digits` | dnw | 1 | 0, 1 |" in results_table(runs)


@pytest.mark.parametrize("name", sorted(path.name for path in STORED.iterdir()))
def test_the_tables_of_the_docs_are_made_of_what_is_kept(name, tmp_path):
    page = STORED.parent / "docs" / "results.md"
    again = tmp_path / "page.md"
    again.write_text(page.read_text())
    insert_table(again, name, results_table([STORED / name]))
    assert again.read_text() == page.read_text(), "make results"


def test_a_table_is_put_into_its_place_in_a_page(tmp_path, capsys):
    run = train(override(RECIPES["digits"](), ["epochs=1", "baseline=null"]), data_dir=tmp_path, out=tmp_path / "run")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table one -->\nold\n<!-- end -->\nbetween\n<!-- table two -->\nkept\n<!-- end -->\nafter\n")
    for _ in range(2):
        assert main(["results", str(run), "--into", str(page), "--table", "one"]) == 0
        table = results_table([run])
        assert page.read_text() == (
            f"before\n<!-- table one -->\n\n{table}\n\n<!-- end -->\nbetween\n<!-- table two -->\nkept\n<!-- end -->\nafter\n"
        )
    written = page.read_text()
    capsys.readouterr()
    assert main(["results", str(run), "--into", str(page), "--table", "three"]) == 1
    error = capsys.readouterr().err
    assert "no place for the table 'three'" in error
    assert "it has places for 'one', 'two'" in error
    assert main(["results", str(run), "--into", str(page)]) == 1
    assert page.read_text() == written
