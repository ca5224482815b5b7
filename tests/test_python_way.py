"""Training from Python: by a recipe's name, with loggers, extended, and what comes out of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

import dnw
from dnw.cli import main
from dnw.recipes import config_of, digits
from dnw.train import (
    CSVLogger,
    EpochMetrics,
    Log,
    OptimConfig,
    RunDirectory,
    TensorBoardLogger,
    load_trained,
    override,
    results_table,
    resume,
    save_results,
    sweep,
    train,
)

QUICK = {"baseline": None, "first_epoch_snapshots": 0}


def numbers(run: Path) -> list[dict]:
    """The metrics of a run without its times."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in ("seconds", "check")} for line in lines]


def test_a_recipe_is_trained_by_its_name_with_settings_as_values(tmp_path, capsys):
    run = train(
        "digits", out=tmp_path / "run", epochs=2, num_edges=None, density=0.05, optim={"lr": 0.05, "momentum": 0.8}, **QUICK
    )
    config = RunDirectory(run).config()
    assert (config.epochs, config.num_edges, config.density, config.baseline) == (2, None, 0.05, None)
    assert (config.optim.lr, config.optim.momentum, config.optim.schedule) == (0.05, 0.8, "cosine")
    assert config == override(
        digits(),
        ["epochs=2", "density=0.05", "optim.lr=0.05", "optim.momentum=0.8", "baseline=null", "first_epoch_snapshots=0"],
    )
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "digits: 1,257 images for training and 540 for testing, of 10 classes"
    assert f"look at it:  {run}/view.html" in printed
    assert f"dnw eval {run}" in printed
    assert f"dnw compile {run}" in printed


def test_a_config_a_stored_one_and_its_path_are_the_same(tmp_path, capsys):
    config = override(digits(), {"epochs": 1, **QUICK, "optim.lr": 0.05})
    first = train(config, out=tmp_path / "first", log=Log(quiet=True))
    again = train(str(first / "config.json"), out=str(tmp_path / "again"), log=Log(quiet=True))
    assert numbers(first) == numbers(again)
    assert capsys.readouterr().out == ""
    assert config_of(first / "config.json") == config_of(config) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "epoch: no such setting; did you mean 'epochs'"),
        ({"optim": {"rate": 3}}, "optim.rate: no such setting"),
        ({"lr": 3}, "lr: no such setting; did you mean 'optim.lr'"),
        ({"epochs": "many"}, "epochs: Input should be a valid integer"),
        ({"seeds": [1, 1]}, "seeds are one or more different whole numbers"),
    ],
)
def test_wrong_settings_are_named(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train("digits", out=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_names_that_are_near_are_suggested_and_all_are_listed():
    with pytest.raises(ValueError, match=r"no recipe 'digit'; did you mean 'digits'\? There are 'digits', 'mnist'"):
        train("digit")
    with pytest.raises(
        ValueError, match=r"digit_static: not a run directory .*; did you mean the pretrained network 'digits_static'\?"
    ):
        load_trained("digit_static")


# --- loggers ---


def test_loggers_get_every_epoch_of_every_single_run(tmp_path):
    seen: list[tuple[Path, EpochMetrics]] = []
    run = train(
        "digits",
        out=tmp_path / "run",
        log=Log(quiet=True),
        loggers=[lambda *of: seen.append(of), CSVLogger()],
        epochs=2,
        seeds=[0, 1],
        **QUICK,
    )
    assert [(path, metrics.epoch) for path, metrics in seen] == [(run / f"seed-{s}", e) for s in (0, 1) for e in (1, 2)]
    for seed in (0, 1):
        one = run / f"seed-{seed}"
        with (one / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [float(row["top1"]) for row in rows] == [line["top1"] for line in numbers(one)]
        assert [metrics.top1 for path, metrics in seen if path == one] == [line["top1"] for line in numbers(one)]


def test_a_resumed_run_goes_on_in_the_same_table_and_the_same_curves(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train("digits", out=run, log=Log(quiet=True), loggers=[CSVLogger(), TensorBoardLogger()], epochs=2, **QUICK)
    assert main(["resume", str(run), "epochs=3", "--log", "csv", "--log", "tensorboard"]) == 0, capsys.readouterr().err
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + 3
    curves = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [(point.step, round(point.value, 6)) for point in curves.Scalars("top1")] == [
        (line["epoch"], round(line["top1"], 6)) for line in numbers(run)
    ]
    assert "live" in curves.Tags()["scalars"]


def test_a_logger_that_fails_stops_the_run_and_nothing_is_lost(tmp_path):
    def fails(path: Path, metrics: EpochMetrics) -> None:
        if metrics.epoch == 2:
            raise OSError("no network")

    run = tmp_path / "run"
    with pytest.raises(OSError, match="no network"):
        train("digits", out=run, log=Log(quiet=True), loggers=[fails], epochs=3, **QUICK)
    resume(run, log=Log(quiet=True))
    whole = train("digits", out=tmp_path / "whole", log=Log(quiet=True), epochs=3, **QUICK)
    assert numbers(run) == numbers(whole)


# --- extending ---


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim.schedule": "steps", "seeds": [0, 1], "baseline": "random"},
        {"rule": "rigl", "rule_settings.every": 10, "rule_settings.until": 0.5},
        {"density_schedule.end": 0.75},
    ],
    ids=["cosine", "seeds and baseline", "updates until half", "falling density"],
)
def test_an_extended_run_is_one_that_was_given_both_lengths(settings, tmp_path):
    quiet = Log(quiet=True)
    extended = train("digits", out=tmp_path / "extended", log=quiet, **{**QUICK, **settings, "epochs": 2})
    resume(extended, epochs=4, log=quiet)
    resume(extended, epochs=4, log=quiet)  # has them
    resume(extended, epochs=5, log=quiet)
    whole = train("digits", out=tmp_path / "whole", log=quiet, **{**QUICK, **settings, "epochs": 5, "extended_from": [2, 4]})
    assert RunDirectory(extended).config() == RunDirectory(whole).config()
    assert RunDirectory(extended).config().extended_from == (2, 4)
    for (one, _), (other, _) in zip(RunDirectory(extended).members(), RunDirectory(whole).members(), strict=True):
        assert numbers(one.path) == numbers(other.path)
        assert one.config() == other.config()
        assert {line["active"] for line in numbers(one.path)[2:]} == {numbers(one.path)[-1]["active"]}


def test_a_run_that_was_killed_while_it_was_extended_goes_on(tmp_path, capsys):
    class Killed(Exception):
        pass

    def killer(path: Path, metrics: EpochMetrics) -> None:
        if metrics.epoch == 4:
            raise Killed

    run = train("digits", out=tmp_path / "run", log=Log(quiet=True), epochs=2, seeds=[0, 1], **QUICK)
    with pytest.raises(Killed):
        resume(run, epochs=5, log=Log(quiet=True), loggers=[killer])
    assert [len(member.metrics()) for member, _ in RunDirectory(run).members()] == [4, 2]
    with pytest.raises(
        ValueError, match=r"seed-0: is at epoch 4 of 5, and only a finished run is extended; dnw resume .* finishes it"
    ):
        resume(run, epochs=9, log=Log(quiet=True))
    resume(run, log=Log(quiet=True))
    whole = train("digits", out=tmp_path / "whole", log=Log(quiet=True), epochs=5, seeds=[0, 1], extended_from=[2], **QUICK)
    for seed in ("seed-0", "seed-1"):
        assert numbers(run / seed) == numbers(whole / seed)


def test_what_no_extension_is_says_so(tmp_path, capsys):
    run = train("digits", out=tmp_path / "run", log=Log(quiet=True), epochs=2, **QUICK)
    for given, message in (
        ("epochs=1", "epochs=1: the run has 2 epochs; give more to extend it"),
        ("epochs=more", "epochs=more: expected a whole number"),
        (
            "optim.lr=1",
            f"optim.lr: of a run only epochs can be raised; train a new one with dnw train {run}/config.json optim.lr=1",
        ),
    ):
        assert main(["resume", str(run), given]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="extended_from=3,2: expected increasing numbers below epochs=5"):
        override(digits(), ["epochs=5", "extended_from=3,2"])
    edited = (run / "config.json").read_text().replace('"epochs": 2', '"epochs": 5')
    (run / "config.json").write_text(edited)
    with pytest.raises(ValueError, match="the run was started with epochs=2, not 5"):
        resume(run, log=Log(quiet=True))


# --- what comes out ---


def test_a_trained_network_predicts_as_it_was_tested(tmp_path):
    run = train("digits", out=tmp_path / "run", log=Log(quiet=True), epochs=3, rule="targeted_dropout", **QUICK)
    network = load_trained(run)
    _, test = dnw.data.read_digits()
    network.model.train()
    chances = network.predict(test.images)
    assert network.model.training, "training goes on as it was"
    assert chances.shape == (540, 10)
    assert torch.allclose(chances.sum(1), torch.ones(540))
    right = (chances.argmax(1) == test.labels).float().mean()
    assert float(right) == pytest.approx(numbers(run)[-1]["top1"], abs=1e-6)
    assert torch.equal(network.predict(test.images.double() / 255).argmax(1), chances.argmax(1))
    assert network.predict(test.images[:0]).shape == (0, 10)
    for wrong in (test.images[0], test.images[:, :, :7], test.images.long()):
        with pytest.raises(ValueError, match=r"expected \[batch, 1x8x8\], uint8, or floating-point from 0 to 1"):
            network.predict(wrong)


def test_recipes_are_found_by_words_and_grouped(capsys):
    assert main(["recipes"]) == 0
    everything = capsys.readouterr().out
    assert main(["recipes", "CIFAR10", "rigl"]) == 0
    found = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in found[1:]] == ["cifar10_mobilenet_rigl_x225"]
    assert found[0] in everything.splitlines()
    assert all(f"\n  {name} " in everything for name in dnw.recipes.RECIPES)
    assert main(["recipes", "nonsense"]) == 1
    assert "no recipe with 'nonsense' in its line" in capsys.readouterr().err


# --- what a second reading found ---


def test_a_part_of_a_run_is_not_extended_by_itself(tmp_path):
    run = train("digits", out=tmp_path / "run", log=Log(quiet=True), epochs=1, seeds=[0, 1], first_epoch_snapshots=0)
    for part in ("seed-0", "seed-1/baseline"):
        before = (run / part / "config.json").read_text()
        with pytest.raises(ValueError, match=r"is a part of the run .*run; dnw resume .*run epochs=2 extends it all"):
            resume(run / part, epochs=2, log=Log(quiet=True))
        assert (run / part / "config.json").read_text() == before
    single = train("digits", out=tmp_path / "single", log=Log(quiet=True), epochs=1, baseline="random", first_epoch_snapshots=0)
    with pytest.raises(ValueError, match=r"is a part of the run .*single; dnw resume .*single epochs=2 extends it all"):
        resume(single / "baseline", epochs=2, log=Log(quiet=True))
    (run / "lone").mkdir()
    (run / "config.json").write_text('{"a": 1}')  # somebody else's
    lone = train("digits", out=run / "lone", log=Log(quiet=True), epochs=1, **QUICK)
    resume(lone, epochs=2, log=Log(quiet=True))
    assert len(RunDirectory(lone).metrics()) == 2
    shorter = RunDirectory(lone).config().model_copy(update={"epochs": 1, "extended_from": ()})
    with pytest.raises(ValueError, match="the run was stored with epochs=2, not 1, extended_from=1, not "):
        RunDirectory(lone).extend(shorter)
    with pytest.raises(ValueError, match=r"lone: has 2 epochs of 1"):
        RunDirectory(lone).is_finished(shorter)


def test_a_checkpoint_without_metrics_is_not_extended(tmp_path):
    run = train("digits", out=tmp_path / "run", log=Log(quiet=True), epochs=1, **QUICK)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="has a checkpoint and no metrics, as what was imported, so it is not extended"):
        resume(run, epochs=2, log=Log(quiet=True))


def test_a_run_whose_checkpoint_is_gone_is_not_trained_over(tmp_path):
    run = train("digits", out=tmp_path / "run", log=Log(quiet=True), epochs=2, **QUICK)
    (run / "last.pt").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"has 2 epochs and no last.pt to go on from; put best.pt in its place, or train anew"):
        resume(run, log=Log(quiet=True))
    assert (run / "metrics.jsonl").read_bytes() == before
    (kept,) = save_results([run], tmp_path / "kept")  # what is there can be kept, and kept again
    (again,) = save_results([kept], tmp_path / "again")
    with pytest.raises(ValueError, match="no last.pt to go on from: train anew elsewhere"):
        resume(again, data_dir=tmp_path, log=Log(quiet=True))


def test_what_was_imported_is_not_trained_over(tmp_path):
    run = train("digits", out=tmp_path / "run", log=Log(quiet=True), epochs=2, **QUICK)
    network = load_trained(run)
    for file in ("last.pt", "best.pt"):
        network.save(run / file, 1, step=0)
    (run / "metrics.jsonl").unlink()
    before = (run / "last.pt").read_bytes()
    with pytest.raises(ValueError, match="was imported at epoch 1, without what training goes on with"):
        resume(run, log=Log(quiet=True))
    assert (run / "last.pt").read_bytes() == before


def test_a_result_that_was_kept_is_not_trained_over(tmp_path):
    run = train("digits", out=tmp_path / "run", log=Log(quiet=True), epochs=2, **QUICK)
    (kept,) = save_results([str(run)], str(tmp_path / "kept"), snapshots=2)
    before = {file: file.read_bytes() for file in kept.rglob("*") if file.is_file()}
    for epochs in (None, 4):
        with pytest.raises(ValueError, match="is a result that was kept, without the checkpoint that training goes on from"):
            resume(kept, epochs=epochs, data_dir=tmp_path, log=Log(quiet=True))
    assert {file: file.read_bytes() for file in kept.rglob("*") if file.is_file()} == before


def test_a_finished_run_gives_a_new_logger_all_its_epochs(tmp_path, capsys):
    run = train("digits", out=tmp_path / "run", log=Log(quiet=True), epochs=2, **QUICK)
    assert main(["resume", str(run), "--log", "csv"]) == 0
    assert f"finished already; dnw resume {run} epochs=4 trains on" in capsys.readouterr().out
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + 2


@pytest.mark.parametrize("out", ["run", "../run"], ids=["below", "elsewhere"])
def test_curves_of_all_runs_lie_in_one_folder(out, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (out, tmp_path / f"other-{len(out)}"):
        train("digits", out=path, log=Log(quiet=True), loggers=[TensorBoardLogger("curves")], epochs=1)
    found = list(tmp_path.rglob("events*"))
    assert len(found) == 4
    assert all(path.is_relative_to(tmp_path / "here" / "curves") for path in found)


def test_what_rank_the_environment_speaks_of_silences_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    train("digits", out=tmp_path / "run", epochs=1, **QUICK)
    assert "1,257 images for training" in capsys.readouterr().out


def test_predicting_leaves_a_model_as_it_was(tmp_path):
    run = train("digits", out=tmp_path / "run", log=Log(quiet=True), epochs=1, **QUICK)
    network = load_trained(run)
    modules = list(network.model.modules())
    network.model.train()
    modules[-1].eval()
    modes = [module.training for module in modules]
    _, test = dnw.data.read_digits()
    assert torch.equal(network.predict(test.images.numpy()), network.predict(test.images))
    assert [module.training for module in modules] == modes


def test_settings_come_in_whatever_kind_they_are(tmp_path):
    quiet = Log(quiet=True)
    first = train("digits", rule="complete", out=tmp_path / "first", log=quiet, epochs=1, **QUICK)
    optim = OptimConfig(lr=0.05, schedule="cosine")
    ticket = {"rule": "frozen", "edges": "ticket", "ticket": {"run": first}}
    second = train("digits", **ticket, optim=optim, out=tmp_path / "second", log=quiet, epochs=1, **QUICK)
    assert RunDirectory(second).config().optim == optim
    assert "| `digits`" in results_table([str(second)])
    group = "optim: is a part of the settings; give what is in it, 'optim.lr'"
    for wrong, message in (({"optim": None}, group), ({1: 1}, "1: no such setting")):
        with pytest.raises(ValueError, match=message):
            override(digits(), wrong)
    with pytest.raises(TypeError, match="expected a list of texts key=value, or a mapping"):
        override(digits(), "epochs=5")
    assert digits().lr_at(60) == pytest.approx(0, abs=1e-9)


def test_a_sweep_from_python(tmp_path):
    paths = sweep("digits", "epochs", [1, 2], out=str(tmp_path / "sweep"), log=Log(quiet=True), loggers=[CSVLogger()])
    assert list(paths) == ["1", "2"]
    assert all((path / "metrics.csv").exists() for path in paths.values())
