"""Runs: equal when resumed, killed, or shared by two processes; clear when something is wrong."""

import dataclasses
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import SHARED
from pages import table
from processes import GROUP, command, commands
from test_data import write_cifar, write_mnist, write_tree

import dnw
from dnw.cli import main
from dnw.data import Streaming, list_folder
from dnw.recipes import RECIPES, digits
from dnw.train import (
    CSVLogger,
    RunDirectory,
    TensorBoardLogger,
    TrainingStoppedError,
    compile_run,
    count_config,
    count_run,
    evaluate,
    load_trained,
    override,
    results_table,
    resume,
    run_record,
    save_results,
    train,
    view_runs,
)
from dnw.train._checkpoint import read_checkpoint
from dnw.train._network import load_network
from dnw.train._run import FILES
from dnw.view import read_snapshots

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning_fabric", "ignore::FutureWarning")
SHORT = ["device=cpu", "batch_size=128"]


def short(*overrides: str):
    return override(digits(), [*SHORT, *overrides])


def checkpoints(run: Path) -> dict:
    return read_checkpoint(run / "last.pt")


def metrics(run: Path) -> list[dict]:
    return [{k: v for k, v in dataclasses.asdict(m).items() if k != "seconds"} for m in RunDirectory(run).metrics()]


def assert_same_tensors(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_tensors(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_tensors(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def assert_same_runs(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    for name in ("last.pt", "best.pt"):
        assert_same_tensors(read_checkpoint(a / name), read_checkpoint(b / name))
    first, second = list(read_snapshots(a / "snapshots")), list(read_snapshots(b / "snapshots"))
    assert [s.step for s in first] == [s.step for s in second]
    for x, y in zip(first, second, strict=True):
        assert all((x.edges[n] == y.edges[n]).all() and (x.weights[n] == y.weights[n]).all() for n in x.edges)


def started(run: Path) -> None:
    """Waits until a run has written its first snapshot."""
    deadline = time.monotonic() + 120
    while not (run / "snapshots" / "step-00000000.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A run of four epochs with its baseline, in one go."""
    return train(short("epochs=4"), data_dir=Path("data"), out=tmp_path_factory.mktemp("unbroken") / "run")


def test_what_a_run_leaves_behind(unbroken):
    assert {p.name for p in unbroken.iterdir()} == {
        "config.json", "environment.json", "metrics.jsonl", "wiring.jsonl",
        "last.pt", "best.pt", "snapshots", "baseline", "view.html",
    }  # fmt: skip
    config = RunDirectory(unbroken).config()
    assert config == short("epochs=4")
    assert RunDirectory(unbroken / "baseline").config().rule == "random"
    lines = metrics(unbroken)
    assert [m["epoch"] for m in lines] == [1, 2, 3, 4]
    assert all(m["active"] == 100 and m["nodes"] == 120 and 0 < m["live"] <= 120 for m in lines)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert lines[0]["entered"] > 0
    assert all(m["entered"] == 0 for m in metrics(unbroken / "baseline"))
    environment = json.loads((unbroken / "environment.json").read_text())
    assert {"dnw", "commit", "torch", "python", "machine", "data_dir"} <= environment.keys()
    for member in (unbroken, unbroken / "baseline"):
        assert RunDirectory(member).environment()["num_classes"] == 10


def test_the_files_of_a_run_are_those_of_the_list_and_of_the_docs(unbroken, tmp_path):
    whole = shutil.copytree(unbroken, tmp_path / "whole")
    complete = train(
        short("epochs=1", "rule=complete", "num_edges=null", "baseline=null"), data_dir=Path("data"), out=tmp_path / "complete"
    )
    ticket = ["rule=frozen", "edges=ticket", f"ticket.run={complete}", "baseline=null"]
    loggers = [CSVLogger(), TensorBoardLogger()]
    begun = train(short("epochs=1", *ticket), data_dir=Path("data"), out=tmp_path / "ticket", loggers=loggers)
    view_runs([complete, begun])
    (kept,) = save_results([complete], tmp_path / "kept", snapshots=2)
    found = {str(p.relative_to(run)) for run in (whole, complete, begun, kept) for p in run.rglob("*") if p.is_file()}
    found = {name.removeprefix("baseline/") for name in found}
    unlisted = {name for name in found if not any(fnmatch.fnmatchcase(name, pattern) for pattern in FILES)}
    assert not unlisted, f"add {unlisted} to FILES in dnw/train/_run.py"
    unseen = {pattern for pattern in FILES if pattern != "lock" and not fnmatch.filter(found, pattern)}
    assert not unseen, f"no run has left {unseen}, which FILES in dnw/train/_run.py names"
    rows = {row["file"].strip("`"): row["what it is"] for row in table("docs/runs.md", "file", "what it is")}
    assert rows == FILES, "the table of docs/runs.md is not FILES of dnw/train/_run.py"


# --- what reads a run draws nothing ---

READERS = {
    "eval": evaluate,
    "load": load_trained,
    "count": count_run,
    "count a recipe": lambda run: count_config(digits()),
    "compile": compile_run,
    "record": run_record,
    "view": lambda run: view_runs([run]),
    "results": lambda run: results_table([run]),
}


@pytest.mark.parametrize("way", READERS)
def test_reading_a_run_draws_from_no_generator_of_the_caller(way, unbroken, tmp_path):
    run = shutil.copytree(unbroken, tmp_path / "run")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    READERS[way](run)
    assert torch.equal(torch.get_rng_state(), before)


def test_decoding_images_draws_from_no_generator_of_the_caller(tmp_path):
    write_tree(tmp_path, size=12, num=2, wide=0)
    batches = Streaming(
        *list_folder(tmp_path),
        size=8,
        batch_size=2,
        seed=0,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        device=torch.device("cpu"),
        workers=0,
    )
    before = torch.get_rng_state()
    assert len([*batches.test(), *batches.train(0)]) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_has_the_classes_of_its_data(tmp_path):
    write_tree(tmp_path / "tree", size=40, num=6, wide=8)
    folder = ["data.name=folder", "data.workers=0", "batch_size=4", "epochs=1", "device=cpu"]
    run = RunDirectory(train(override(RECIPES["cifar10"](), folder), data_dir=tmp_path / "tree", out=tmp_path / "run"))
    classes = len(list_folder(tmp_path / "tree")[0].classes)
    assert classes != 10
    assert run.environment()["num_classes"] == classes
    for checkpoint in ("best", "last", None):
        network = load_network(run, run.config(), checkpoint)
        assert network.num_classes == network.model.classifier.out_features == classes
    assert (load_trained(run.path).epoch, load_network(run, run.config(), None).epoch) == (1, 0)
    assert run_record(run.path).steps[0] == 0


def test_snapshots_of_a_run(unbroken):
    snapshots = list(read_snapshots(unbroken / "snapshots"))
    epochs = [s.epoch for s in snapshots]
    assert epochs[0] == 0
    assert sum(0 < e < 1 for e in epochs) == 8
    assert epochs[-4:] == [1, 2, 3, 4]
    state = checkpoints(unbroken)["optimizer"]["state"]
    active = next(entry["active"] for entry in state.values() if "active" in entry)
    assert snapshots[-1].edges["graph.weight"].tolist() == active.flatten().nonzero().squeeze(1).tolist()
    entered = set(snapshots[-1].edges["graph.weight"].tolist()) - set(snapshots[-2].edges["graph.weight"].tolist())
    assert len(entered) == metrics(unbroken)[-1]["entered"]


def test_a_saved_model_holds_the_sparse_weights(unbroken):
    content = checkpoints(unbroken)
    assert int((content["model"]["graph.weight"] != 0).sum()) == 100


@pytest.mark.parametrize("broken_at", [0, 1, 3])
def test_a_resumed_run_equals_an_unbroken_one(unbroken, tmp_path, monkeypatch, broken_at):
    import dnw.train._network as network

    class Killed(Exception):
        pass

    real, calls = network.write_checkpoint, []

    def write(path, content):
        if path.name == "last.pt" and "baseline" not in str(path):
            calls.append(path)
            if len(calls) == broken_at + 1:
                raise Killed  # metrics, snapshot and best checkpoint of this epoch are written, the last one is not
        real(path, content)

    monkeypatch.setattr(network, "write_checkpoint", write)
    with pytest.raises(Killed):
        train(short("epochs=4"), data_dir=Path("data"), out=tmp_path / "run")
    monkeypatch.setattr(network, "write_checkpoint", real)
    resume(tmp_path / "run")
    assert_same_runs(unbroken, tmp_path / "run")
    assert_same_runs(unbroken / "baseline", tmp_path / "run" / "baseline")


def test_resuming_a_finished_run_changes_nothing(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    resume(tmp_path / "run")
    assert_same_runs(unbroken, tmp_path / "run")


@pytest.mark.slow
@GROUP
@pytest.mark.parametrize("delay", [0.0, 0.15, 0.4])
def test_sigkill_at_any_moment(unbroken, tmp_path, delay):
    process = command("train", "digits", "epochs=4", *SHORT, "--out", "run", folder=tmp_path)
    started(tmp_path / "run")
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    resume(tmp_path / "run")
    assert_same_runs(unbroken, tmp_path / "run")
    assert_same_runs(unbroken / "baseline", tmp_path / "run" / "baseline")


@pytest.mark.slow
@GROUP
def test_ctrl_c_ends_cleanly_and_can_be_resumed(unbroken, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "dnw", "train", "digits", "epochs=4", *SHORT, "--out", "run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    started(tmp_path / "run")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; continue with: dnw resume run" in out
    assert err == ""
    resume(tmp_path / "run")
    assert_same_runs(unbroken, tmp_path / "run")


def test_a_run_is_measured_on_images_that_it_holds_out_and_evaluated_on_the_test_images(tmp_path, capsys):
    run = train(short("epochs=1", "baseline=null", "data.validation=57"), data_dir=tmp_path, out=tmp_path / "run")
    printed = capsys.readouterr().out
    assert "1,200 images for training and 57 held out of them" in printed
    assert "validation accuracy" in printed
    held, tested = metrics(run)[-1]["top1"], evaluate(run)[-1].top1
    assert held * 57 == pytest.approx(round(held * 57), abs=1e-4)
    assert tested * 540 == pytest.approx(round(tested * 540), abs=1e-4)
    assert tested != held


def test_eval_repeats_the_metrics(unbroken):
    scores = evaluate(unbroken)
    assert [(s.rule, s.checkpoint) for s in scores] == [
        ("dnw", "best"),
        ("dnw", "last"),
        ("random", "best"),
        ("random", "last"),
    ]
    lines = metrics(unbroken)
    assert scores[1].top1 == lines[-1]["top1"]
    assert scores[1].top5 == lines[-1]["top5"]
    assert scores[0].top1 == max(m["top1"] for m in lines)
    assert scores[0].epoch == 1 + [m["top1"] for m in lines].index(scores[0].top1)


def test_several_seeds(tmp_path, capsys):
    train(short("epochs=2", "seeds=0,3", "baseline=null"), data_dir=Path("data"), out=tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "environment.json", "seed-0", "seed-3"}
    last = [metrics(tmp_path / "run" / f"seed-{s}")[-1] for s in (0, 3)]
    assert last[0]["train_loss"] != last[1]["train_loss"]
    tops = [row["top1"] for row in last]
    mean, deviation = (
        torch.tensor(tops, dtype=torch.float64).mean().item(),
        torch.tensor(tops, dtype=torch.float64).std().item(),
    )
    assert f"dnw: test accuracy {mean:.2%} +- {deviation:.2%} at the last epoch" in capsys.readouterr().out


def test_same_seed_same_run(unbroken, tmp_path):
    train(short("epochs=4"), data_dir=Path("data"), out=tmp_path / "run")
    assert_same_runs(unbroken, tmp_path / "run")


def test_a_stored_config_can_be_trained(unbroken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(unbroken / "config.json"), "--out", "run"]) == 0
    assert_same_runs(unbroken, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    import dnw.train._loop as loop

    real, steps = loop.F.cross_entropy, []

    def explode(logits, labels, **more):
        steps.append(None)
        loss = real(logits, labels, **more)
        return loss * torch.inf if len(steps) == 15 else loss

    monkeypatch.setattr(loop.F, "cross_entropy", explode)
    with pytest.raises(TrainingStoppedError, match=r"not finite in epoch 2 .*last good checkpoint is .*last.pt \(epoch 1\)"):
        train(short("epochs=3"), data_dir=Path("data"), out=tmp_path / "run")
    content = checkpoints(tmp_path / "run")
    assert content["epoch"] == 1
    assert all(torch.isfinite(t).all() for t in content["model"].values())


@pytest.mark.slow
@GROUP
def test_two_processes_agree_and_end_where_one_does(unbroken, tmp_path):
    # Batch norm sees half batches, so results differ from one process; after each epoch the run itself compares the
    # latent weights of its processes, and stops where they differ.
    arguments = [sys.executable, "-m", "dnw", "train", "digits", "epochs=2", "processes=2", *SHORT, "--out", "run"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/2") == 2  # the run and its baseline, each said once
    lines = metrics(tmp_path / "run")
    assert [m["active"] for m in lines] == [100, 100]
    assert lines[-1]["step"] == metrics(unbroken)[1]["step"]
    assert main(["eval", str(tmp_path / "run")]) == 0


# --- the command's errors: one line, exit code not 0, nothing half-written ---


def fails(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


def test_processes_that_disagree_stop_the_run():
    import dnw.train._loop as loop

    class TwoProcesses:
        world_size = 2

        def __init__(self, difference):
            self.difference = difference

        def all_gather(self, digest):
            return torch.stack([digest, digest + self.difference])

    model = torch.nn.Linear(3, 3)
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.5)
    loop.check_agreement(TwoProcesses(0.0), wiring, 0)
    with pytest.raises(TrainingStoppedError, match="the processes hold different wirings"):
        loop.check_agreement(TwoProcesses(1e-9), wiring, 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=tiny_cifar10"], "model=tiny_cifar10 does not take images of 1x8x8"),
        (["data.mean=0.1,0.2", "data.std=1,1"], "the images have 1 channels"),
        (["data.std=1,1"], "give one of each per channel"),
        (["num_edges=100000"], "from 1 to 5,504"),
        (["processes=2", "batch_size=1"], "2 processes need at least one image each"),
        (["device=cuda", "processes=20"], "CUDA devices; use device=cpu"),
    ],
)
def test_settings_that_do_not_fit_leave_nothing_behind(overrides, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, "train", "digits", *overrides)
    assert list(tmp_path.iterdir()) == []


def test_torchrun_without_processes_is_refused(tmp_path, monkeypatch, capsys):
    """Each process would train a run of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun has started 2 processes, but processes=1; give processes=2" in fails(capsys, "train", "digits")
    assert list(tmp_path.iterdir()) == []


def test_command_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "no recipe 'digit'; did you mean 'digits'" in fails(capsys, "train", "digit")
    assert "no such setting; did you mean 'optim.lr'" in fails(capsys, "train", "digits", "optim.lrr=1")
    assert "none.json: No such file or directory" in fails(capsys, "train", "none.json")
    assert "no MNIST file" in fails(capsys, "train", "mnist")
    assert "no CIFAR-10 in data" in fails(capsys, "train", "cifar10")
    assert "not a run directory" in fails(capsys, "resume", "nothing")
    assert "not a run directory" in fails(capsys, "eval", "nothing")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "full: exists already" in fails(capsys, "train", "digits", "--out", "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["file"]


def test_damaged_runs_are_named(unbroken, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for file, content, message in [
        ("last.pt", b"PK cut", "last.pt: not a readable PyTorch file"),
        ("config.json", b"{", "config.json: not JSON"),
        ("metrics.jsonl", b"{\n", "metrics.jsonl, line 1: damaged"),
        ("environment.json", b"", "environment.json: damaged"),
    ]:
        shutil.copytree(unbroken, "run")
        (tmp_path / "run" / file).write_bytes(content)
        assert message in fails(capsys, "resume", "run")
        shutil.rmtree("run")
    shutil.copytree(unbroken, "run")
    (tmp_path / "run" / "best.pt").unlink()
    assert "no best.pt yet" in fails(capsys, "eval", "run")


def test_data_of_every_kind_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "data", 64, 20)
    write_cifar(tmp_path / "data" / "cifar-10-batches-py")
    write_tree(tmp_path / "tree", size=40, num=6, wide=8)
    assert main(["train", "mnist", "epochs=1", "device=cpu", "batch_size=16", "--out", "a"]) == 0
    assert main(["train", "cifar10", "epochs=1", "device=cpu", "batch_size=10", "--out", "b"]) == 0
    folder = ["data.name=folder", "data.workers=0", "batch_size=4"]
    assert main(["train", "cifar10", "epochs=1", "device=cpu", *folder, "--data-dir", "tree", "--out", "c"]) == 0
    assert metrics(tmp_path / "c")[0]["step"] == 3
    assert main(["eval", "c"]) == 0


def files_of_30_kilobytes() -> None:
    """A limit on file size makes the checkpoint fail as a full disk does."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


@pytest.mark.slow
@GROUP
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path):
    arguments = "train", "digits", "epochs=2", *SHORT, "--out", "run"
    done = command(*arguments, folder=tmp_path, before=files_of_30_kilobytes).wait()
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "best.pt: File too large" in done.stderr
    assert not list((tmp_path / "run").rglob("*.part"))
    assert not (tmp_path / "run" / "last.pt").exists()
    resume(tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 2


def test_recipes_and_config_on_the_command_line(capsys):
    assert main(["recipes"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert {"digits", "cifar10_continuous_random", "imagenet_dnw_small_x225"} <= set(RECIPES)
    assert all(len(line.split()) > 5 for line in lines)
    assert main(["train", "cifar10", "rule=random", "--data-dir", "x", "epochs=7", "--print-config", "batch_size=64"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["rule"], shown["epochs"], shown["batch_size"]) == ("random", 7, 64)
    with pytest.raises(SystemExit):
        main(["train", "digits", "--epochs=7"])
    with pytest.raises(SystemExit):
        main(["eval", "run", "epochs=7"])
    capsys.readouterr()
    assert main(["train", "optim.lr=0.07", "--print-config"]) == 0  # digits where no recipe is named
    assert '"lr": 0.07' in capsys.readouterr().out


@pytest.mark.slow
@GROUP
def test_torchrun(tmp_path):
    arguments = "train", "digits", "epochs=1", "processes=2", "baseline=null", *SHORT, "--out", "run"
    done = [process.wait() for process in commands(2, *arguments, folder=tmp_path)]
    assert [one.returncode for one in done] == [0, 0], done
    assert metrics(tmp_path / "run")[0]["active"] == 100


@pytest.mark.slow
@pytest.mark.data
def test_real_mnist(tmp_path, monkeypatch):
    """The files are read whole; a sixth of the images is trained on."""
    import dnw.train._loop as loop

    def fewer(*arguments):
        parts = zip(load_data(*arguments), (10_000, 2_000), strict=True)
        return tuple(dataclasses.replace(part, images=part.images[:num], labels=part.labels[:num]) for part, num in parts)

    load_data = loop.load_data
    unpack = SHARED / "data" / "unpack"
    if not unpack.exists():
        pytest.skip("the real data sets are not at hand (set DNW_SHARED)")
    monkeypatch.setattr(loop, "load_data", fewer)
    subprocess.run([sys.executable, unpack, tmp_path, "mnist"], check=True, capture_output=True)
    config = override(RECIPES["mnist"](), ["epochs=1", "batch_size=32", "device=cpu"])
    run = train(config, data_dir=tmp_path, out=tmp_path / "run")
    assert metrics(run)[0]["active"] == 600
    assert metrics(run)[0]["top1"] > 0.8
