"""Networks in the package: what they score, what commands do with their names, and the files that hold them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dnw
from dnw.cli import main
from dnw.compile import Runtime, plan
from dnw.models import GraphClassifier, Pretrained, pretrained, pretrained_names
from dnw.models._pretrained import PRETRAINED, read_network, write_network
from dnw.recipes import RECIPES
from dnw.train import evaluate, load_trained, override, save_results, train
from dnw.view import read_snapshots

SHARED = Path(os.environ.get("DNW_SHARED", Path(__file__).parents[2] / "shared"))
NAMES = pretrained_names()


def test_there_are_some_and_they_are_small():
    assert {"digits_static", "mnist_static"} <= set(NAMES)
    files = [file for file in PRETRAINED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 1_500_000
    assert {file.name for file in files if not file.name.startswith("step-")} == {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "network.pt",
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_network_has_the_wiring_of_its_config(name):
    found = pretrained(name)
    assert isinstance(found, Pretrained)
    assert isinstance(found.model, GraphClassifier)
    assert not found.model.training
    ((parameter, wired),) = found.wiring.items()
    assert int(wired.active.count_nonzero()) == found.config["num_edges"]
    assert torch.equal(found.model.get_parameter(parameter) != 0, wired.active)
    assert f"Pretrained('{name}': {found.config['num_edges']:,} edges" in repr(found)
    assert found.config == json.loads((PRETRAINED / name / "environment.json").read_text())["config"]


def test_the_digits_are_told_apart_as_well_as_after_training(capsys):
    (score,) = evaluate(PRETRAINED / "digits_static")
    found = pretrained("digits_static")
    assert abs(score.top1 - found.top1) < 0.004
    _, test = dnw.data.load("digits", "", 8)
    told = found.config["data"]
    images = (test.images.float() / 255 - torch.tensor(told["mean"])[:, None, None]) / torch.tensor(told["std"])[:, None, None]
    with torch.no_grad():
        right = (found.model(images).argmax(1) == test.labels).float().mean()
    assert float(right) == pytest.approx(score.top1, abs=1e-6)
    assert main(["eval", "digits_static"]) == 0
    assert f"top-1 {score.top1:.2%}" in capsys.readouterr().out


@pytest.mark.data
@pytest.mark.parametrize(("name", "data", "least"), [("mnist_static", "mnist", 0.98), ("cifar10_static", "cifar10", 0.79)])
def test_real_images_are_told_apart_as_well_as_after_training(name, data, least, tmp_path):
    unpack = SHARED / "data" / "unpack"
    if not unpack.exists():
        pytest.skip("the real data sets are not at hand (set DNW_SHARED)")
    subprocess.run([sys.executable, unpack, tmp_path, data], check=True, capture_output=True)
    (score,) = evaluate(PRETRAINED / name, data_dir=tmp_path)
    assert score.top1 > least
    assert abs(score.top1 - pretrained(name).top1) < 0.002


def test_names_stand_where_runs_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(PRETRAINED.rglob("*"))
    assert main(["count", "digits_static"]) == 0
    assert "graph.weight" in capsys.readouterr().out
    assert main(["view", "digits_static"]) == 0
    assert capsys.readouterr().out.strip() == "digits_static.html"
    assert main(["compile", "digits_static", "--out", "net.dnw"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"digits_static.html", "net.dnw"}
    assert sorted(PRETRAINED.rglob("*")) == before
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        expected = pretrained("digits_static").model(images)
    torch.testing.assert_close(dnw.compile.load_program("net.dnw")(images), expected, rtol=1e-4, atol=1e-4)
    (tmp_path / "digits_static").mkdir()  # a directory of that name comes first
    assert main(["view", "digits_static"]) == 1
    assert "not a run directory" in capsys.readouterr().err
    assert main(["eval", "mnist_static"]) == 1
    assert "give --data-dir" in capsys.readouterr().err


def test_a_name_that_there_is_not():
    with pytest.raises(ValueError, match="no pretrained network 'digit_static'; did you mean 'digits_static'"):
        pretrained("digit_static")


def test_a_network_goes_on_training():
    found = pretrained("digits_static")
    before = found.wiring["graph.weight"].active.clone()
    found.wiring.remove()
    optimizer = torch.optim.SGD(found.model.parameters(), lr=0.1)
    wiring = dnw.wire(found.model, optimizer, num_edges=100)
    assert torch.equal(wiring["graph.weight"].active, before)
    found.model.train()(torch.randn(4, 1, 8, 8)).square().mean().backward()
    optimizer.step()
    assert int(wiring["graph.weight"].active.count_nonzero()) == 100


def test_any_run_can_be_kept_with_its_network(tmp_path):
    run = train(override(RECIPES["digits"](), ["epochs=2", "baseline=null"]), data_dir=tmp_path, out=tmp_path / "run")
    for _ in range(2):  # again changes nothing
        (kept,) = save_results([run], tmp_path / "kept", snapshots=3)
    assert [s.step for s in read_snapshots(kept / "snapshots")] == [0, 8, 80]
    assert len(list((kept / "snapshots").iterdir())) == 3
    own, again = load_trained(run), load_trained(kept)
    with pytest.raises(ValueError, match="of which the last weights are there, not the best ones"):
        load_trained(kept, "best")
    assert (again.epoch, again.step) == (own.epoch, own.step)
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(again.model(images), own.model(images), rtol=2e-2, atol=2e-2)
    assert torch.equal(again.wiring["graph.weight"].active, own.wiring["graph.weight"].active)
    assert main(["view", str(kept), "--out", str(tmp_path / "page.html")]) == 0
    assert main(["results", str(run), "--snapshots", "3"]) == 1
    other = override(RECIPES["digits"](), ["epochs=2", "baseline=null", "num_edges=90"])
    (kept / "config.json").write_text(other.to_json())
    (kept / "environment.json").unlink()
    (kept / "network.pt").write_bytes((PRETRAINED / "mnist_static" / "network.pt").read_bytes())
    with pytest.raises(ValueError, match=r"network\.pt: .* are those of another network"):
        load_trained(kept)


def test_files_of_weights(tmp_path):
    model = dnw.models.tiny_digits()
    mask = torch.zeros(model.graph.weight.shape, dtype=torch.bool)
    mask[-1, -1] = mask[5, 3] = True
    with torch.no_grad():
        model.graph.weight[~mask] = 0
    size = write_network(tmp_path / "a.pt", model, {"graph.weight": mask}, num_classes=10, epoch=3, step=9)
    assert size == (tmp_path / "a.pt").stat().st_size < 30_000
    found = read_network(tmp_path / "a.pt")
    assert torch.equal(found.edges["graph.weight"], mask)
    assert (found.num_classes, found.epoch, found.step) == (10, 3, 9)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found.weights[name], tensor, rtol=1e-3, atol=1e-6)
    whole = (tmp_path / "a.pt").read_bytes()
    for at in range(100, len(whole), len(whole) // 30):
        (tmp_path / "a.pt").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with contextlib.suppress(ValueError):  # where it is not refused, the byte means nothing
            again = read_network(tmp_path / "a.pt")
            assert all(torch.equal(again.weights[name], found.weights[name]) for name in found.weights)
    beyond = {"shape": [2], "gaps": torch.tensor([9]), "weights": torch.ones(1)}
    torch.save({"format": 1, "network": {"w": beyond}}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt: damaged"):
        read_network(tmp_path / "b.pt")
    torch.save([1], tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt: not a stored network"):
        read_network(tmp_path / "c.pt")


def test_a_compiled_network_of_the_package_is_the_same():
    found = pretrained("mnist_static")
    program = plan(found.model, (1, 28, 28)).apply(found.model)
    images = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(Runtime(program)(images), found.model(images), rtol=1e-4, atol=1e-4)
