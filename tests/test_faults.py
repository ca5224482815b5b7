"""What happens to runs in the world: changed files, crafted ones, two writers, processes that die, other machines."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import GROUP
from torch import nn

from dnw.cli import main
from dnw.recipes import digits
from dnw.train import (
    RunDirectory,
    TrainingStoppedError,
    _loop,
    _network,
    count_run,
    evaluate,
    load_trained,
    override,
    results_table,
    resume,
    run_record,
    sweep,
    train,
)
from dnw.train._checkpoint import read_checkpoint, write_checkpoint
from dnw.train._log import Log
from dnw.train._network import Network

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning_fabric", "ignore::FutureWarning")
SETTINGS = ("epochs=2", "baseline=null", "device=cpu", "first_epoch_snapshots=0", "batch_size=128")


def short(*overrides: str):
    return override(digits(), [*SETTINGS, *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return train(short(), data_dir=Path("data"), out=tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a finished run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def ticketed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ticketed")
    first = train(short("epochs=1", "rule=complete", "num_edges=null"), data_dir=folder, out=folder / "complete")
    return train(short("rule=frozen", "edges=ticket", f"ticket.run={first}"), data_dir=folder, out=folder / "run")


@pytest.fixture
def with_ticket(ticketed, tmp_path) -> Path:
    """A copy of a finished run of a ticket, to be damaged."""
    return shutil.copytree(ticketed, tmp_path / "run")


def same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@functools.cache
def killed() -> tempfile.TemporaryDirectory[str]:
    """Holds a run that was killed after its first epoch, made once."""
    folder = tempfile.TemporaryDirectory()
    stop_after(1, lambda: train(short(), data_dir=Path("data"), out=Path(folder.name) / "run"))
    return folder


def cut_back(run: Path) -> None:
    """Makes a finished run one that was killed after its first epoch."""
    shutil.rmtree(run)
    shutil.copytree(Path(killed().name) / "run", run)


def stop_after(epochs: int, function: Callable[[], object]) -> None:
    check = _loop.check_agreement

    def stop(fabric: object, wiring: object, epoch: int) -> None:
        if epoch == epochs:
            raise KeyboardInterrupt

    _loop.check_agreement = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            function()
    finally:
        _loop.check_agreement = check


WAYS: dict[str, Callable[[Path], object]] = {
    "resume": resume,
    "eval": evaluate,
    "count": count_run,
    "load": load_trained,
    "view": run_record,
    "results": lambda path: results_table([path]),
    "sweep": lambda path: sweep(
        short(), "epochs", ["2"], data_dir=Path("data"), out=shutil.copytree(path, path.parent / "sweep" / "epochs-2").parent
    ),
}
"""Every way in which a run is read again."""


# --- files in which something has changed ---


@pytest.mark.parametrize("name", ["config.json", "environment.json", "metrics.jsonl"])
def test_a_flipped_bit_of_a_text_file_is_refused_or_changes_nothing(run, name):
    file = run / name

    def read() -> tuple[object, ...]:
        found = RunDirectory(run)
        return found.config(), found.environment(), found.metrics()

    expected, whole = read(), bytearray(file.read_bytes())
    refused = 0
    for at in range(0, len(whole), 3):
        bit = 1 << (at // 3) % 8
        whole[at] ^= bit
        file.write_bytes(whole)
        whole[at] ^= bit
        try:
            config, *others = read()
            before = expected[0]  # of which two settings may be changed
            data = config.data.model_copy(update={"workers": before.data.workers})
            shown = {"first_epoch_snapshots": before.first_epoch_snapshots, "data": data}
            assert (config.model_copy(update=shown), *others) == expected, (at, bit)
        except ValueError as error:
            refused += name in str(error) or pytest.fail(str(error))
    assert refused > len(whole) / 3 / 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("key", ["seeds", "rule", "optim"])
def test_an_edited_config_is_noticed_wherever_a_run_is_read(way, key, run):
    values = json.loads((run / "config.json").read_text())
    values[key] = {"seeds": [7], "rule": "random", "optim": {**values["optim"], "lr": 0.2}}[key]
    (run / "config.json").write_text(json.dumps(values))
    said = {"seeds": "seeds=0, not 7", "rule": "rule=dnw, not random", "optim": "optim.lr=0.1, not 0.2"}[key]
    with pytest.raises(ValueError, match=rf"config.json: the run was started with {said}, as config.json says now; put that"):
        WAYS[way](run)
    (run / "environment.json").unlink()
    if way in ("eval", "count", "load"):  # the checkpoint knows as well
        with pytest.raises(ValueError, match=rf"\.pt: it was trained with {said}, as config.json says now"):
            evaluate(run, data_dir=Path("data")) if way == "eval" else WAYS[way](run)


def test_where_and_how_a_run_is_computed_may_be_changed(run):
    values = json.loads((run / "config.json").read_text())
    values |= {"device": "auto", "first_epoch_snapshots": 3, "data": {**values["data"], "workers": 1}}
    (run / "config.json").write_text(json.dumps(values))
    assert evaluate(run)[1].top1 == RunDirectory(run).metrics()[-1].top1


def test_settings_that_an_older_version_did_not_have_count_as_their_defaults(run):
    for file, place in (("config.json", lambda v: v), ("environment.json", lambda v: v["config"])):
        values = json.loads((run / file).read_text())
        del place(values)["rank_all_entries"]
        values.pop("check", None)
        (run / file).write_text(json.dumps(values))
    assert evaluate(run)[1].top1 == RunDirectory(run).metrics()[-1].top1


def test_runs_of_older_versions_are_read_and_resumed(run, finished):
    """Without checksums, and without config, number of classes and threads beside the rest."""
    cut_back(run)
    for name in ("last.pt", "best.pt"):
        content = read_checkpoint(run / name)
        write_checkpoint(run / name, {k: v for k, v in content.items() if k not in ("config", "num_classes")})
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(
        json.dumps({k: v for k, v in environment.items() if k not in ("threads", "num_classes", "config", "check")})
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps({k: v for k, v in m.items() if k != "check"}) + "\n" for m in lines))
    assert count_run(run).active > 100
    assert evaluate(run, data_dir=Path("data"))[1].top1 == RunDirectory(run).metrics()[-1].top1
    assert len(run_record(run).steps) == 2
    assert _network.num_classes_of_run(RunDirectory(run)) == 10
    resume(run)
    assert same(read_checkpoint(run / "last.pt"), read_checkpoint(finished / "last.pt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": "0.1"}, r"metrics.jsonl, line 2: damaged \(lr: expected a number, got '0.1'\)"),
        ({"active": 1.5}, r"line 2: damaged \(active: expected a whole number, got 1.5\)"),
        ({"step": True}, r"line 2: damaged \(step: expected a whole number, got True\)"),
        ({"epoch": 3}, r"line 2: damaged \(epoch 3 does not follow epoch 1\)"),
        ({"extra": 1}, r"line 2: damaged \(nothing is called 'extra'\)"),
        ({"check": "00000000"}, r"line 2: damaged \(its checksum is another\)"),
    ],
)
def test_metrics_that_cannot_be_are_named_by_file_and_line(change, message, run):
    first, second = (run / "metrics.jsonl").read_text().splitlines()
    values = {k: v for k, v in json.loads(second).items() if k != "check"} | change
    (run / "metrics.jsonl").write_text(f"{first}\n{json.dumps(values)}\n")
    for way in ("resume", "results"):
        with pytest.raises(ValueError, match=message):
            WAYS[way](run)


def test_metrics_that_are_gone_do_not_make_a_run_unfinished_for_ever(run):
    cut_back(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"metrics.jsonl: does not hold the 1 epochs of last.pt"):
        resume(run)


def test_the_best_checkpoint_can_take_the_place_of_a_damaged_last_one(run, finished):
    cut_back(run)
    (run / "last.pt").write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match="last.pt: not a readable PyTorch file"):
        resume(run)
    shutil.copy(run / "best.pt", run / "last.pt")
    resume(run)
    assert same(read_checkpoint(run / "last.pt"), read_checkpoint(finished / "last.pt"))


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(key)


def put(*path_and_value: Any) -> Callable[[dict[str, Any]], None]:
    *path, last, value = path_and_value

    def change(content: dict[str, Any]) -> None:
        for key in path:
            content = content[key]
        content[last] = value

    return change


def every_state(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for entry in content["optimizer"]["state"].values():
            if key in entry:
                entry[key] = value

    return change


CRAFTED: dict[str, Callable[[dict[str, Any]], None]] = {
    "no model": without("model"),
    "no step": without("step"),
    "model is a list": put("model", []),
    "model holds a text": put("model", "graph.weight", "text"),
    "model lacks a weight": lambda content: content["model"].pop("graph.weight"),
    "model has one more": put("model", "more", torch.zeros(3)),
    "model of another shape": put("model", "graph.weight", torch.zeros(3, 3)),
    "model of whole numbers": lambda content: put("model", "graph.weight", content["model"]["graph.weight"].long())(content),
    "model with NaN": lambda content: content["model"]["graph.weight"].fill_(torch.nan),
    "numbers for names": put("model", {3: torch.zeros(2)}),
    "a sparse tensor": put("model", "graph.weight", torch.zeros(3, 3).to_sparse()),
    "optimizer is none": put("optimizer", None),
    "optimizer without groups": lambda content: content["optimizer"].pop("param_groups"),
    "optimizer without state": put("optimizer", "state", {}),
    "optimizer's state is a list": put("optimizer", "state", [1, 2]),
    "groups without parameters": lambda content: content["optimizer"]["param_groups"][0].pop("params"),
    "latents with NaN": lambda content: [
        entry["latent"].fill_(torch.nan) for entry in content["optimizer"]["state"].values() if "latent" in entry
    ],
    "latents of another type": every_state("latent", torch.zeros(3, dtype=torch.float64)),
    "all edges active": lambda content: [
        entry["active"].fill_(True) for entry in content["optimizer"]["state"].values() if "active" in entry
    ],
    "wiring of another version": every_state("wiring", torch.tensor([9, 0, 0, 0, 0])),
    "momentum is a text": every_state("momentum_buffer", "text"),
    "momentum of another shape": every_state("momentum_buffer", torch.zeros(2)),
    "momentum with infinity": lambda content: [
        entry["momentum_buffer"].fill_(torch.inf)
        for entry in content["optimizer"]["state"].values()
        if entry.get("momentum_buffer") is not None
    ],
    "epoch is a text": put("epoch", "2"),
    "epoch is a tensor": put("epoch", torch.zeros(3, 3)),
    "config holds a tensor": put("config", "epochs", torch.zeros(3, 3)),
    "epoch is a truth": put("epoch", True),
    "epoch is negative": put("epoch", -1),
    "epoch after the last": lambda content: content.update(epoch=3, step=3 * content["step"] // content["epoch"]),
    "epoch is huge": put("epoch", 10**30),
    "step is a fraction": put("step", 1.5),
    "step within an epoch": lambda content: content.update(step=content["step"] + 1),
    "step of another epoch": lambda content: content.update(step=content["step"] * 2),
    "step before an epoch": put("epoch", 0),
    "classes are a text": put("num_classes", "ten"),
    "more classes": put("num_classes", 11),
    "no classes": put("num_classes", 0),
    "config is a list": put("config", []),
    "config of nothing": put("config", {}),
    "another config": put("config", "rule", "random"),
    "a newer format": put("format", 2),
    "format is a tensor": put("format", torch.tensor([1, 1])),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_checkpoint_is_one_error_that_names_the_file(name, run):
    content = read_checkpoint(run / "last.pt")
    CRAFTED[name](content)
    write_checkpoint(run / "last.pt", content)
    for way in ["resume"] if name == "step of another epoch" else ["load", "eval", "resume"]:
        with pytest.raises(ValueError, match=r"last\.pt: ") as error:
            WAYS[way](run)
        assert len(str(error.value).splitlines()) == 1


def test_what_a_checkpoint_says_of_the_optimizer_s_settings_does_not_count(run, finished):
    cut_back(run)
    content = read_checkpoint(run / "last.pt")
    for group in content["optimizer"]["param_groups"]:
        group |= {"momentum": "text", "weight_decay": 5.0, "nesterov": True, "lr": 1e9}
    write_checkpoint(run / "last.pt", content)
    resume(run)
    assert same(read_checkpoint(run / "last.pt"), read_checkpoint(finished / "last.pt"))


@pytest.mark.parametrize(
    "content",
    [
        {"model": {}},
        {"edges": {}, "model": 3},
        {"edges": {"graph.weight": torch.zeros(2)}, "model": {}},
        {"edges": {}, "model": {}},
    ],
)
def test_a_crafted_ticket_is_one_error_that_names_the_file(content, with_ticket):
    write_checkpoint(with_ticket / "ticket.pt", content)
    with pytest.raises(ValueError, match=r"ticket\.pt: "):
        load_trained(with_ticket)


def test_a_ticket_that_is_gone_is_named(with_ticket):
    (with_ticket / "ticket.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"ticket\.pt: no such file"):
        load_trained(with_ticket)


def test_runs_that_name_given_edges_as_a_rule_are_read_and_resumed(with_ticket):
    """As the first versions stored them: in config.json, in environment.json and in the checkpoints."""
    before = {name: str(WAYS[name](with_ticket)) for name in ("eval", "count", "results")}
    for file, inner in (("config.json", lambda v: v), ("environment.json", lambda v: v["config"])):
        values = json.loads((with_ticket / file).read_text())
        assert inner(values).pop("edges") == "ticket"
        inner(values)["rule"] = "ticket"
        values.pop("check", None)
        (with_ticket / file).write_text(json.dumps(values))
    for file in ("last.pt", "best.pt"):
        content = read_checkpoint(with_ticket / file)
        del content["config"]["edges"]
        write_checkpoint(with_ticket / file, content | {"config": content["config"] | {"rule": "ticket"}})
    config = RunDirectory(with_ticket).config()
    assert (config.rule, config.edges, config.method) == ("frozen", "ticket", "ticket")
    assert {name: str(WAYS[name](with_ticket)) for name in before} == before
    resume(with_ticket)


def test_other_data_than_a_run_was_trained_on_is_noticed(run, monkeypatch):
    cut_back(run)
    real = _loop.load_data

    def fewer(*arguments: Any) -> Any:
        images, test = real(*arguments)
        return dataclasses.replace(images, images=images.images[:600], labels=images.labels[:600]), test

    monkeypatch.setattr(_loop, "load_data", fewer)
    with pytest.raises(ValueError, match=r"last.pt: it was trained on 10 batches an epoch, and the data now gives 5"):
        resume(run)


def test_files_that_are_no_configs_are_named(tmp_path, capsys):
    for content, message in [
        (b"{}" + b" " * 2**20, "larger than 1,048,576 bytes"),
        (b'{"recipe": "\xff"}', "damaged (byte 12 is no text)"),
        (b"[" * 100_000, "not a config (maximum recursion depth exceeded"),
    ]:
        (tmp_path / "file.json").write_bytes(content)
        assert main(["train", str(tmp_path / "file.json")]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"dnw: {tmp_path / 'file.json'}: {message}")
        assert error.count("\n") == 1


@pytest.mark.parametrize("threads", [0, -1, 10**9])
def test_a_number_of_threads_that_cannot_be_is_refused(threads, run):
    values = json.loads((run / "environment.json").read_text()) | {"threads": threads}
    values.pop("check")
    (run / "environment.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"environment.json: damaged \(threads={threads}: allowed is a whole number from 1"):
        resume(run)


# --- pictures ---


def test_a_damaged_snapshot_does_not_stop_a_run(run, finished, capsys):
    cut_back(run)
    for snapshot in (run / "snapshots").iterdir():
        snapshot.write_bytes(snapshot.read_bytes()[:100])
    resume(run)
    assert same(read_checkpoint(run / "last.pt"), read_checkpoint(finished / "last.pt"))


def test_pictures_that_cannot_be_made_are_said_once(tmp_path, monkeypatch, capsys):
    from dnw.train import _pictures

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no ink\nleft")

    monkeypatch.setattr(_pictures.SnapshotWriter, "write", fail)
    monkeypatch.setattr(_pictures.Page, "refresh", fail)
    run = train(short(), data_dir=tmp_path, out=tmp_path / "run")
    said = [line for line in capsys.readouterr().out.splitlines() if "no ink" in line]
    assert said == [f"no {what} of this run, training goes on: no ink left" for what in ("snapshots", "page")]
    assert len(RunDirectory(run).metrics()) == 2


def test_a_network_without_graphs_has_no_live_nodes_and_a_page_of_its_layers(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        _network.MODELS,
        "tiny_digits",
        lambda c, classes: nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, classes)),
    )
    run = train(short(), data_dir=tmp_path, out=tmp_path / "run")
    assert "live nodes" not in capsys.readouterr().out
    assert '"layers"' in (run / "view.html").read_text()
    assert "live nodes" not in results_table([run])
    assert load_trained(run).model[3].out_features == 10


# --- who writes, and with what ---


def test_a_run_is_trained_by_one_process_at_a_time(run, finished):
    cut_back(run)
    code = f"""
import pathlib, time
from dnw.train._lock import held
with held(pathlib.Path({str(run)!r})):
    print(1, flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "1\n"
        with pytest.raises(ValueError, match=rf"is being trained by process {holder.pid} on host \S+; wait for it, or stop it"):
            resume(run)
        with pytest.raises(ValueError, match="exists already"):
            train(short(), data_dir=Path("data"), out=run)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert (run / "lock").exists()  # what is left of a killed process holds nothing
    resume(run)
    assert same(read_checkpoint(run / "last.pt"), read_checkpoint(finished / "last.pt"))
    assert not (run / "lock").exists()


def test_what_killed_runs_leave_half_written_is_removed_and_nothing_else(run):
    parts = [run / "last.pt.0123abcd.part", run / "metrics.jsonl.part", run / "snapshots" / "step-00000003.npz.89abcdef.part"]
    for part in [*parts, run / "notes.part"]:
        part.touch()
    resume(run)
    assert not any(part.exists() for part in parts)
    assert (run / "notes.part").exists()


def test_a_resumed_run_computes_with_the_threads_that_it_was_started_with(tmp_path, monkeypatch, capsys):
    before = torch.get_num_threads()
    used: set[int] = set()
    real = Network.is_finite

    def noting(network: Network) -> bool:
        used.add(torch.get_num_threads())
        return real(network)

    monkeypatch.setattr(Network, "is_finite", noting)
    try:
        torch.set_num_threads(2)
        stop_after(1, lambda: train(short(), data_dir=tmp_path, out=tmp_path / "run"))
        torch.set_num_threads(1)
        resume(tmp_path / "run")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert used == {2}
    assert "2 threads, as this run was started with" in capsys.readouterr().out
    assert RunDirectory(tmp_path / "run").environment()["threads"] == 2
    assert ", 2 threads, commit" in results_table([tmp_path / "run"])


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    calls: list[None] = []
    real = Network.is_finite

    def spoiled(network: Network) -> bool:
        calls.append(None)
        if len(calls) == 2:
            network.model.get_parameter("graph.weight").data.view(-1)[0] = torch.nan  # as a step leaves it, by nobody's hand
        return real(network)

    monkeypatch.setattr(Network, "is_finite", spoiled)
    with pytest.raises(TrainingStoppedError, match=r"not finite in epoch 2 .*last.pt \(epoch 1\)"):
        train(short(), data_dir=tmp_path, out=tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1


# --- processes that die ---


def test_a_decoding_process_that_dies_is_one_line(tmp_path, monkeypatch, capsys):
    from test_data import write_tree

    from dnw.data import _batches

    write_tree(tmp_path / "tree", size=12, num=6, wide=0)

    def die(self: object, item: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    arguments = [
        "data.name=folder",
        "data.image_size=8",
        "data.mean=0.5,0.5,0.5",
        "data.std=0.5,0.5,0.5",
        "data.crop_padding=0",
    ]
    arguments += ["data.workers=1", "model=mobilenet_v1_graphs", "num_edges=null", "width=0.1", *SETTINGS[1:-1], "batch_size=4"]
    real = _loop.check_fit
    monkeypatch.setattr(_loop, "check_fit", lambda *a: (real(*a), monkeypatch.setattr(_batches._Decoder, "__getitem__", die)))
    assert main(["train", "digits", *arguments, "--data-dir", str(tmp_path / "tree"), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "a process that decodes images (data.workers) has died" in error
    assert f"dnw resume {tmp_path / 'run'}" in error


@pytest.mark.slow
@GROUP
def test_a_training_process_that_dies_is_one_line_and_the_run_goes_on(tmp_path):
    arguments = ["train", "digits", "epochs=300", "processes=2", *SETTINGS[1:], "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dnw", *arguments], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    tasks = Path(f"/proc/{process.pid}/task")
    (child,) = {int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()}
    os.kill(child, signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.count("\n") == 1, error
    assert "another process of this run has died" in error
    assert len(RunDirectory(tmp_path / "run").metrics()) >= 1


def test_the_log_shows_nothing_of_a_run_without_metrics(capsys):
    Log().results([(digits(), [])])
    assert capsys.readouterr().out == ""
