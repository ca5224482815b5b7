"""Rules in runs: settings, schedules over a run, tickets of two stages, ResNets, sweeps."""

from __future__ import annotations

import shutil

import pytest
import torch
from compiled import lively
from test_data import write_tree

import dnw
from dnw.cli import main
from dnw.compile import Report, Runtime, load_program
from dnw.models import resnet18_cifar, resnet50
from dnw.recipes import RECIPES, digits
from dnw.train import (
    OptimConfig,
    RunDirectory,
    _loop,
    compile_run,
    count_config,
    count_run,
    evaluate,
    load_trained,
    override,
    plot_sweep,
    results_table,
    resume,
    save_results,
    sweep,
    train,
)
from dnw.train._checkpoint import read_checkpoint
from dnw.train._network import make_network
from dnw.train._sweep import accuracies_of
from dnw.train._ticket import draw_ticket

SHORT = ("epochs=3", "baseline=null", "first_epoch_snapshots=0", "batch_size=128")
TICKET = ("rule=frozen", "edges=ticket")
OTHERS = [name for name in dnw.RULES if name not in ("dnw", "random", "complete", "frozen")]
"""Rules that have no run in other tests."""
VARIANTS = {
    "targeted_dropout": ("rule_settings.rate=0.8",),
    "magnitude_pruning": ("density_schedule.end=0.7",),
    "l1_anneal": ("density_schedule.end=0.7", "rule_settings.penalty=0.001"),
    "set": ("rule_settings.every=5",),
    "rigl": ("rule_settings.every=5", "rule_settings.until=0.75"),
    "sparse_momentum": ("rule_settings.every=10",),
    "st3": ("density_schedule.end=0.5",),
    "feather": ("density_schedule.end=0.5", "rule_settings.power=2"),
    "top_kast": ("rule_settings.backward=3",),
}


def same_tensors(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# --- settings ---


@pytest.mark.parametrize("rule", OTHERS)
def test_a_run_of_every_rule_ends_with_its_budget_and_resumes_exactly(rule, tmp_path, monkeypatch):
    config = override(digits(), [*SHORT, f"rule={rule}", *VARIANTS.get(rule, ())])
    whole = RunDirectory(train(config, data_dir=tmp_path, out=tmp_path / "whole"))
    metrics = whole.metrics()
    assert metrics[-1].active == 100
    if config.density_schedule.end is not None:
        assert metrics[0].active > 100
    assert read_checkpoint(whole.best)["epoch"] in [m.epoch for m in metrics if m.active == 100]
    part = RunDirectory(tmp_path / "part")
    with monkeypatch.context() as patch:
        patch.setattr(_loop, "check_agreement", stop_in_the_third_epoch)
        with pytest.raises(KeyboardInterrupt):
            train(config, data_dir=tmp_path, out=part.path)
    begun = part.metrics()
    assert len(begun) == read_checkpoint(part.last)["epoch"] == 2
    resume(part.path)
    assert part.metrics()[:2] == begun  # to the millisecond: these epochs were not trained again
    assert same_tensors(read_checkpoint(part.last), read_checkpoint(whole.last))
    assert evaluate(whole.path)[1].top1 == metrics[-1].top1
    complete = count_config(override(digits(), ["rule=complete", "num_edges=null", "baseline=null"]))
    assert count_run(whole.path).active == complete.active - 5_504 + 100


def stop_in_the_third_epoch(fabric: object, wiring: object, epoch: int) -> None:
    if epoch == 2:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["density_schedule.end=1.5"], "density_schedule: end=1.5: the schedule ends after training does"),
        (["density_schedule.end=0.5", "density_schedule.begin=0.6"], "begin=0.6 is not before end=0.5"),
        (["rule=rigl", "rule_settings.rate=0.5"], "rule_settings.rate=0.5: rule=rigl has no such setting; it has every, frac"),
        (["rule=dnw", "rule_settings.every=5"], "rule=dnw has no such setting; it has none"),
        (["rule=random", "baseline=null", "density_schedule.end=0.5"], "rule=random never changes its edges"),
        (["ticket.run=x"], "rule=dnw takes no ticket"),
        (["pattern=2-4"], "pattern: .*2-4"),
        (["pattern=2:4"], "pattern=2:4 fixes the number of edges"),
        (["shared_budget=true"], "shared_budget=true: needs density"),
        (["density_schedule.initial=0.5"], "density_schedule: give end, too"),
        (["rule=l1_anneal"], "rule=l1_anneal prunes on a schedule: give density_schedule.end"),
        (["rule=complete", "num_edges=null", "baseline=null", "pattern=channels"], "rule=complete chooses no edges"),
        (["optim.warmup_epochs=60"], "optim.warmup_epochs=60: the run has 60 epochs"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        override(digits(), changes)


def test_a_pattern_that_does_not_fit_is_one_line(tmp_path, capsys):
    assert main(["train", "digits", "baseline=null", "pattern=2:4", "num_edges=null", "--out", str(tmp_path / "run")]) == 1
    assert "entries that are no candidate edges" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_learning_rates_of_the_resnet_recipe():
    optim = RECIPES["imagenet_resnet50"]().optim
    rates = [optim.lr_at(epoch + 0.5, 100) for epoch in range(100)]
    assert rates[:5] == pytest.approx([0.256 * (e + 1) / 5 for e in range(5)])
    assert rates[5] == pytest.approx(0.256)
    assert rates[52] == pytest.approx(0.256 / 2, rel=0.03)
    assert rates[99] < 1e-3
    assert OptimConfig(lr=1, warmup_epochs=2, schedule="constant").lr_at(0.5, 10) == 0.25


# --- tickets ---


def test_lottery_ticket_and_fine_tuning_take_the_run_of_the_first_stage(tmp_path, capsys):
    first = override(digits(), [*SHORT, "rule=complete", "num_edges=null"])
    stage_one = RunDirectory(train(first, data_dir=tmp_path, out=tmp_path / "complete"))
    begun, ended = torch.load(stage_one.first, weights_only=True)["model"], read_checkpoint(stage_one.last)["model"]
    for rewind, expected in ((True, begun), (False, ended)):
        config = override(digits(), [*SHORT, *TICKET, f"ticket.run={stage_one.path}", f"ticket.rewind={str(rewind).lower()}"])
        run = RunDirectory(train(config, data_dir=tmp_path, out=tmp_path / f"ticket-{rewind}"))
        ticket = torch.load(run.path / "ticket.pt", weights_only=True)
        (mask,) = ticket["edges"].values()
        assert same_tensors(ticket["model"], expected)
        assert [m.active for m in run.metrics()] == [100] * 3
        assert [m.entered for m in run.metrics()] == [0] * 3
        weight = ended["graph.weight"].abs()
        candidates = dnw.models.tiny_digits().graph.edge_candidates()["weight"]
        assert weight[mask].min() >= weight[candidates & ~mask].max()
    table = results_table([run.path])
    assert "ticket.run=complete" in table
    assert str(tmp_path) not in table
    shutil.rmtree(stage_one.path)  # the second stage does not need the first any more
    assert evaluate(run.path)[1].top1 == run.metrics()[-1].top1
    assert count_run(run.path).active > 100
    (kept,) = save_results([run.path], tmp_path / "kept", snapshots=2)
    assert evaluate(kept)[0].top1 == pytest.approx(run.metrics()[-1].top1, abs=0.01)  # in half precision
    assert count_run(kept).active == count_run(run.path).active
    capsys.readouterr()
    assert main(["train", "digits", *TICKET, "baseline=null", "--out", str(tmp_path / "none")]) == 1
    assert "edges=ticket needs the run directory of its first stage" in capsys.readouterr().err
    two = override(digits(), [*SHORT, "rule=complete", "num_edges=null", "epochs=1"])
    first = train(two, data_dir=tmp_path, out=tmp_path / "one-seed")
    with pytest.raises(ValueError, match=r"it has no run of seed 1, but of '0'; each seed needs a first stage of its own"):
        train(override(config, [f"ticket.run={first}", "seeds=0,1"]), data_dir=tmp_path, out=tmp_path / "none")
    with pytest.raises(ValueError, match="it trained tiny_digits on digits, not mobilenet_v1 on digits"):
        draw_ticket(override(config, [f"ticket.run={first}", "model=mobilenet_v1", "num_edges=null", "density=0.5"]), 10)
    with pytest.raises(ValueError, match="it tells 10 classes apart, and the data has 7"):
        draw_ticket(override(config, [f"ticket.run={first}"]), 7)
    config = override(digits(), [*SHORT, *TICKET, f"ticket.run={run.path}"])
    with pytest.raises(ValueError, match="a ticket is drawn from a run of rule=complete, and there is none in it"):
        train(config, data_dir=tmp_path, out=tmp_path / "none")
    with pytest.raises(ValueError, match="not a run directory"):
        train(override(config, ["ticket.run=nowhere"]), data_dir=tmp_path, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


# --- ResNets ---


@pytest.mark.parametrize(("make", "size", "stem"), [(resnet18_cifar, 32, 1_728), (resnet50, 64, 9_408)])
def test_resnets_with_every_weight_sparse(make, size, stem):
    torch.manual_seed(0)
    model = make(10).eval()
    assert model.fc.bias is None
    with torch.no_grad():
        assert model(torch.randn(2, 3, size, size)).shape == (2, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, optimizer, density=0.1)
    convolutions = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    assert list(wiring) == [f"{n}.weight" for n in [*convolutions, "fc"]]
    assert wiring["conv1.weight"].num_candidates == stem
    assert all(p.num_active == dnw.num_edges(0.1, p.num_candidates) for p in wiring.values())
    wiring.remove("latent")
    fan_in = model.layer2[0].conv1.weight[0].numel()
    assert model.layer2[0].conv1.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)


def test_a_width_multiplies_the_channels_of_a_resnet18():
    whole, half = (count_config(override(RECIPES["cifar10_resnet18"](), changes)) for changes in ([], ["width=0.5"]))
    assert half.parameters == pytest.approx(whole.parameters / 4, rel=0.01)
    assert resnet18_cifar(width=0.25).layer4[1].conv2.weight.shape == (128, 128, 3, 3)
    with pytest.raises(ValueError, match="at least one"):
        resnet18_cifar(width=0.001)


def test_the_resnet_recipes():
    assert 25.5e6 < count_config(RECIPES["imagenet_resnet50"]()).parameters < 25.6e6
    config = RECIPES["imagenet_resnet50_dnw_first_dense"]()
    wiring = make_network(config, 1000).wiring
    assert "conv1.weight" not in wiring
    assert len(wiring) == 53
    found = count_config(override(RECIPES["cifar10_resnet18_dnw"](), ["density=0.05", "shared_budget=true"]))
    assert found.active < 0.06 * found.parameters


def test_a_run_of_a_sparse_resnet_is_compiled(tmp_path, capsys):
    write_tree(tmp_path / "tree", size=40, num=4, wide=4)
    settings = ["data.name=folder", "data.workers=0", "batch_size=4", "epochs=1", "device=cpu", "density=0.05", "baseline=null"]
    run = train(override(RECIPES["cifar10_resnet18_dnw"](), settings), data_dir=tmp_path / "tree", out=tmp_path / "run")
    report, program = compile_run(run)
    assert isinstance(report, Report)
    assert report.multiply_adds[1] < report.multiply_adds[0] < 0.1 * 560e6
    assert not report.way("PyTorch")
    assert len(report.way("sparse")) > 10
    network, images = load_trained(run), torch.rand(3, 3, 32, 32)
    with torch.no_grad(), network.wiring.settled():
        expected = network.model.eval()(images)
    torch.testing.assert_close(Runtime(program)(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    main(["compile", str(run), "--out", str(tmp_path / "net.dnw")])
    said = capsys.readouterr().out
    assert "sparse" in said
    assert "load_program reads it" in said
    assert torch.equal(Runtime(load_program(tmp_path / "net.dnw"))(images), Runtime(program)(images))


def test_without_torchvision_the_extra_is_named(monkeypatch, capsys):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["count", "mobilenet_v2"]) == 1
    said = capsys.readouterr().err
    assert "torchvision is not installed" in said
    assert "pip install -c keep.txt '.[vision]'" in said


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("make", [resnet50, resnet18_cifar])
def test_weights_of_torchvisions_resnets_fit(make):
    import torchvision

    torch.manual_seed(0)
    other = torchvision.models.resnet50(num_classes=7) if make is resnet50 else torchvision.models.resnet18(num_classes=7)
    if make is resnet18_cifar:
        other.conv1, other.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    other.fc = torch.nn.Linear(other.fc.in_features, 7, bias=False)
    own, images = make(7).eval(), torch.randn(2, 3, 64, 64)
    assert list(own.state_dict()) == list(other.state_dict())
    own.load_state_dict(lively(other).state_dict())
    with torch.no_grad():
        torch.testing.assert_close(own(images), other(images), rtol=1e-4, atol=1e-4)


# --- sweeps ---


def test_sweep_trains_side_by_side_goes_on_and_plots(tmp_path, capsys):
    arguments = ["sweep", "digits", *SHORT[1:], "epochs=1", "num_edges=null", "density=0.5", "--out", str(tmp_path / "sweep")]
    assert main([*arguments, "--over", "density=0.01,0.1"]) == 0
    table = capsys.readouterr().out
    assert "`density=0.01`" in table
    first = (tmp_path / "sweep" / "density-0.1" / "last.pt").stat().st_mtime_ns
    plot = tmp_path / "sweep" / "accuracy.svg"
    assert plot.read_text().lstrip().startswith("<?xml")
    assert main([*arguments, "--over", "density=0.01,0.1,0.2"]) == 0
    assert (tmp_path / "sweep" / "density-0.1" / "last.pt").stat().st_mtime_ns == first  # it was finished
    assert RunDirectory(tmp_path / "sweep" / "density-0.2").metrics()
    capsys.readouterr()
    assert main(["results", str(tmp_path / "sweep")]) == 0  # as dnw results runs/* meets it
    assert capsys.readouterr().out.count("| `digits` `density=0.") == 3
    assert main(["view", str(tmp_path / "sweep")]) == 1
    assert f"; {tmp_path / 'sweep' / 'density-0.01'} is one" in capsys.readouterr().err
    assert main([*arguments, "batch_size=64", "--over", "density=0.1"]) == 1
    assert "a run with other settings is there already" in capsys.readouterr().err
    assert main([*arguments, "batch_size=64", "--over", "density=0.3"]) == 1  # beside those that would be in the plot
    assert "a run with other settings is there already" in capsys.readouterr().err
    assert main([*arguments, "device=cpu", "--over", "density=0.1"]) == 0  # which may be changed at any time
    assert main([*arguments, "--over", "density=0.1,2"]) == 1
    assert "density" in capsys.readouterr().err
    assert main([*arguments, "--over", "density"]) == 1
    assert main([*arguments, "--over", "density=0.1,0.1"]) == 1


def test_sweep_over_rules(tmp_path):
    config = override(digits(), ["epochs=1"])
    paths = sweep(
        override(config, ["baseline=complete", "num_edges=null", "density=0.1"]),
        "rule",
        ["dnw"],
        data_dir=tmp_path,
        out=tmp_path,
    )
    (found,) = accuracies_of(paths, "rule").values()
    assert found == {"dnw": [100 * RunDirectory(tmp_path / "rule-dnw").metrics()[-1].top1]}  # without the baseline's
    config = override(config, ["baseline=null"])
    paths = sweep(config, "rule", ["dnw", "random"], data_dir=tmp_path, out=tmp_path / "rules")
    plot_sweep(paths, "rule", tmp_path / "rules.png")
    assert (tmp_path / "rules.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_goes_on_after_a_run_that_diverges(tmp_path, capsys):
    arguments = ["sweep", "digits", "baseline=null", "epochs=1", "--out", str(tmp_path / "sweep")]
    assert main([*arguments, "--over", "optim.lr=1e6,0.1"]) == 0
    out = capsys.readouterr().out
    assert "optim.lr=1e6: a gradient is not finite" in out
    assert RunDirectory(tmp_path / "sweep" / "optim.lr-0.1").metrics()
    for wrong in ("optim.lr=../x", "optim.lr=a/b"):
        assert main([*arguments, "--over", wrong]) == 1
        assert "only letters, digits" in capsys.readouterr().err


def test_a_run_that_was_killed_before_its_config_was_written_can_be_started_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "environment.json").write_text("{")
    config = override(digits(), ["epochs=1", "baseline=null"])
    assert RunDirectory(train(config, data_dir=tmp_path, out=tmp_path / "run")).metrics()


def test_a_baseline_is_a_run_of_its_own(tmp_path, capsys):
    changes = ["epochs=1", "rule=rigl", "rule_settings.every=5", "density_schedule.end=0.5", "baseline=random"]
    run = train(override(digits(), changes), data_dir=tmp_path, out=tmp_path / "run")
    capsys.readouterr()
    for command in ("eval", "count", "results"):
        assert main([command, str(run / "baseline")]) == 0
    assert "random" in capsys.readouterr().out
