"""The code in the documentation runs. What else the pages say is held to the code by ``test_docs_facts.py``."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import block, python_blocks
from processes import on_processes
from torch import nn

import dnw

NOT_RUN: dict[str, str] = {}
"""Python blocks that no test runs, by name, each with the reason."""
RUN: set[str] = set()
"""Python blocks that a test runs."""


def runs(*names: str, by: str = "block") -> Callable[[Callable], Callable]:
    """Gives a test the Python blocks of some names as its argument ``code``: each by itself, each line, or all in a list."""
    RUN.update(names)
    codes: list[tuple[str, Any]] = [(name, block(name)) for name in names]
    if by == "line":
        codes = [(f"{name}:{i}", line) for name, text in codes for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    elif by == "page":
        codes = [(names[0].partition("#")[0], [text for _, text in codes])]
    return pytest.mark.parametrize("code", [code for _, code in codes], ids=[name for name, _ in codes])


def test_every_python_block_is_run_or_listed():
    there = {one.name: f"{one.page}, line {one.line}" for one in python_blocks()}
    missing = [f"{name} ({where})" for name, where in there.items() if name not in RUN | set(NOT_RUN)]
    assert not missing, f"no test runs {missing}: add one with @runs, or the name with a reason to NOT_RUN"
    assert not set(NOT_RUN) - set(there), f"NOT_RUN names blocks that are not there: {set(NOT_RUN) - set(there)}"


# --- models with the names that the pages use ---


def named_net() -> nn.Module:
    net = nn.Sequential()
    net.add_module("layer1", nn.Sequential(nn.Sequential(OrderedDict(conv1=nn.Conv2d(4, 16, 3, padding=1)))))
    net.add_module("layer4", nn.Sequential(nn.Conv2d(16, 16, 3)))
    net.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    net.add_module("fc", nn.Linear(16, 4))
    return net


def with_stem() -> nn.Module:
    """The same with a first convolution of three colours."""
    return nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 4, 3, padding=1), **dict(named_net().named_children())))


def fresh(model: nn.Module) -> dict[str, Any]:
    return {"torch": torch, "dnw": dnw, "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}


def step(names: dict[str, Any], x: torch.Tensor) -> None:
    names["model"](x).square().sum().backward()
    names["optimizer"].step()


# --- README.md and docs/concepts.md ---


@runs("README.md#two-lines-in-your-loop")
def test_the_snippet_of_the_readme(code, capsys):
    names: dict[str, Any] = {}
    exec(code, names)
    active = names["wiring"]["0.weight"].active
    assert int(active.sum()) == 32
    assert int(active[:, :3].sum()) >= 24  # 29 are written there; rounding differs between machines
    assert names["wiring"].step == 500
    assert "left dense" in capsys.readouterr().out


@runs("docs/speed.md#what-runs-on-kernels")
def test_which_way_a_graph_runs(code, capsys):
    exec(code, {})
    dense, sparse = capsys.readouterr().out.splitlines()
    if "C compiler" not in dense:
        assert dense == "100% of the candidate edges are active, and kernels pay up to 50%"
        assert sparse == "''"


@runs("docs/concepts.md#concepts", by="line")
def test_counting(code, capsys):
    class Masked(nn.Sequential):
        def forward(self, x, mask=None):
            return super().forward(x if mask is None else x * mask)

    names = fresh(Masked(with_stem()))
    names |= {"wiring": dnw.wire(names["model"], names["optimizer"], density=0.5)}
    names |= {"x": torch.ones(2, 3, 8, 8), "mask": torch.ones(2, 1, 8, 8)}
    exec(code, names)
    assert "total" in capsys.readouterr().out


@runs("docs/concepts.md#what-a-wiring-tells")
def test_the_mapping_by_name(code, capsys):
    pytest.importorskip("scipy")
    names = fresh(named_net())
    names["wiring"] = dnw.wire(names["model"], names["optimizer"], density=0.1)
    step(names, torch.randn(2, 4, 6, 6))
    exec(code, names)
    assert (names["parameter"].name, len(names["wiring"])) == ("layer1.0.conv1.weight", 0)


# --- docs/graphs.md: one program from top to bottom ---

GRAPHS = [
    "static",
    "edges-that-a-generator-draws",
    "discrete-time",
    "continuous-time",
    "over-a-sequence",
    "chains",
    "reading-a-graph",
    "a-graph-of-your-own",
]


@runs(*(f"docs/graphs.md#{name}" for name in GRAPHS), by="page")
def test_the_page_on_graphs(code, capsys):
    pytest.importorskip("networkx")
    static, drawn, discrete, continuous, sequence, chains, reading, own = code
    names: dict[str, Any] = {}
    exec(static, names)
    assert names["model"](torch.zeros(1, 3, 6, 6)).shape == (1, 100, 4, 4)
    assert list(names["wiring"]) == ["1.weight"]
    assert (names["wiring"].num_candidates, names["wiring"].num_active) == (90_752, 8_000)
    exec(drawn, names)
    names["wiring"].remove()
    for mask in ("small_world", "hubs"):
        frozen = dnw.wire(names["model"], names["optimizer"], rule=dnw.Frozen({"1.weight": names[mask]}))
        assert frozen.num_active == 8_000
        frozen.remove()
    exec(discrete, names)
    assert names["graph"](torch.zeros(1, 16, 4, 4)).shape == (1, 16, 4, 4)
    exec(continuous, names)
    assert names["ode"](torch.zeros(2, 8)).shape == (2, 32)
    assert names["ode"].num_evaluations == 4 * 4
    exec(sequence, names)
    assert (names["outputs"].shape, names["state"].shape) == ((4, 10, 32), (4, 100))
    exec(chains, names)
    of_first, of_second = 3 + 16 + 16 + 16, 16 + 32 + 32 + 32
    assert 0 < names["live"] <= names["nodes"] == of_first + of_second
    exec(reading, names)
    assert names["live"].shape == (of_second,)
    assert "total" in capsys.readouterr().out
    exec(own, names)
    assert list(names["wiring"]) == ["0.weight"]
    assert (names["wiring"].num_candidates, names["wiring"].num_active) == (15, 6)
    step({"model": names["own"], "optimizer": names["optimizer"]}, torch.randn(3, 6))
    assert not names["wiring"]["0.weight"].weight.triu().any()


# --- docs/rules.md ---


@runs("docs/rules.md#budgets", by="line")
def test_every_budget(code):
    model = named_net()
    if "graph.weight" in code:
        model = nn.Sequential(OrderedDict(graph=dnw.graphs.StaticGraph((32, 192, 192, 192, 192), 100)))
    names = fresh(model)
    exec(f"wiring = {code}", names)
    assert 0 < names["wiring"].num_active < names["wiring"].num_candidates


def check_wires_and_steps(code: str) -> None:
    names = fresh(with_stem())
    exec(code if "wiring =" in code else f"wiring = {code}", names)
    step(names, torch.randn(2, 3, 6, 6))
    assert names["wiring"].step == 1
    assert (names["wiring"].num_active == names["wiring"].num_candidates) == ("schedule" in code)


@runs("docs/rules.md#rules-budgets-schedules-and-patterns", "docs/rules.md#schedules")
def test_rules_and_schedules(code):
    check_wires_and_steps(code)


@runs("docs/rules.md#floors", "docs/rules.md#patterns", by="line")
def test_floors_and_patterns(code):
    check_wires_and_steps(code)


# --- docs/wiring.md, docs/compile.md, docs/extending.md ---


@runs("docs/wiring.md#what-is-wired", by="line")
def test_what_is_wired(code):
    model = nn.Module()
    model.fc1, model.fc2, model.block = nn.Linear(4, 4), nn.Linear(4, 4), nn.Module()
    model.block.experts = nn.ParameterDict({"w": torch.randn(2, 4, 4)})
    names = fresh(model)
    exec(f"wiring = {code}", names)
    found = sorted(name.removesuffix(".weight").removeprefix("block.") for name in names["wiring"])
    include = ["experts.w", "fc1"] if "include" in code else []
    assert found == (sorted({*include, "fc1", "fc2"}) if "DEFAULTS" in code else include or ["fc2"])


@runs("docs/compile.md#compiling")
def test_compiling_any_model(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, images = with_stem().eval(), torch.randn(2, 3, 12, 12)
    names = {"dnw": dnw, "model": model, "images": images, "example": images}
    exec(code, names)
    torch.testing.assert_close(names["logits"], model(images), rtol=1e-4, atol=1e-5)
    assert "layers: " in capsys.readouterr().out
    assert dnw.compile.load_program("net.dnw").output_sizes == ((4,),)


@runs("docs/compile.md#plans", "docs/compile.md#running", by="page")
def test_compiling_graphs(code, tmp_path, capsys):
    compiling, running = code
    torch.manual_seed(0)
    model = dnw.models.tiny_cifar10()
    dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), num_edges=2_000)
    images = torch.randn(2, 3, 32, 32)
    names = {"dnw": dnw, "model": model.eval(), "images": images, "path": tmp_path / "net.dnw"}
    exec(compiling, names)
    exec(running, names)
    torch.testing.assert_close(names["program"](images), model(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(names["logits"], model(images), rtol=1e-4, atol=1e-5)
    assert "graph: nodes kept by level" in capsys.readouterr().out


@runs("docs/python.md#training", "docs/python.md#loggers", "docs/python.md#longer-again-and-what-else-there-is", by="page")
def test_the_page_on_python(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for one in code:
        exec(one, names)
    run = tmp_path / "runs" / "from-python"
    printed = capsys.readouterr().out
    assert "<Edges of graph.weight: 100 among 120 nodes>" in printed
    assert names["chances"].shape == (540, 10)
    assert (run / "view.html").is_file()
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + 5
    assert re.findall(r"^(\w+) (\d) ", printed, re.MULTILINE) == [(f, e) for f in ("logged", "baseline") for e in "12"]
    assert "extended_from=5`" in printed


@runs("docs/compile.md#as-c")
def test_mnist_in_c(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(code, {"dnw": dnw})
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] in code
    assert "#define MNIST_MEAN {0.1307f}" in (tmp_path / "mnist.h").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"mnist.c", "mnist.h"}


@runs("docs/findings.md#a-rule-that-hears-every-target-alike")
def test_the_rule_of_our_own(code):
    names = fresh(nn.Linear(20, 10))
    exec(code, names)
    step(names, torch.randn(4, 20))
    assert names["wiring"]["weight"].active.any(1).all()


@runs("docs/extending.md#a-rule-in-twenty-lines")
def test_the_rule_in_twenty_lines(code):
    layer = nn.Linear(20, 10)
    names = fresh(layer)
    exec(code, names)
    step(names, torch.randn(4, 20))
    parameter = names["wiring"]["weight"]
    dormant, active = parameter.latent[~parameter.active].abs(), parameter.active
    expected = parameter.latent.sign() * (parameter.latent.abs() - dormant.max())
    assert torch.equal(layer.weight[active], expected[active])
    assert not layer.weight[~active].any()
    with names["wiring"].settled():
        assert torch.equal(layer.weight[active], parameter.latent[active])
    assert torch.equal(layer.weight[active], expected[active])


@runs("docs/extending.md#a-recipe")
def test_the_recipe(code):
    names: dict[str, Any] = {}
    exec(code, names)
    config = names["cifar10_sparser"]()
    assert (config.recipe, config.num_edges) == ("cifar10_sparser", 16_000)


# --- docs/loops.md ---


@runs("docs/loops.md#in-everybodys-loop", "docs/loops.md#timms-trainpy")
def test_the_two_lines(code):
    names = fresh(named_net())
    exec(code, names)
    step(names, torch.randn(2, 4, 6, 6))
    assert names["wiring"].step == 1


@runs("docs/loops.md#plain-pytorch")
def test_the_loop_in_plain_pytorch(code, tmp_path):
    batches = [(torch.randn(4, 4, 6, 6), torch.randint(4, (4,))) for _ in range(3)]
    names = {"torch": torch, "dnw": dnw, "resnet": named_net, "device": "cpu", "batches": batches, "path": tmp_path / "x.pt"}
    exec(code, names)
    assert names["wiring"].step == 3
    weight = names["average"].module.get_parameter("fc.weight")
    assert int((weight != 0).sum()) == names["wiring"]["fc.weight"].num_active
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    names["model"].load_state_dict(saved["model"])
    names["optimizer"].load_state_dict(saved["optimizer"])


@runs("docs/loops.md#following-a-wiring")
def test_following_a_wiring(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = fresh(named_net())
    names["wiring"] = dnw.wire(names["model"], names["optimizer"], density=0.1)
    first, second = code.splitlines()
    exec(first.replace("every=100", "every=1"), names)
    step(names, torch.randn(2, 4, 8, 8))
    exec(second, names)
    assert "'wiring/fc.weight/entered': " in capsys.readouterr().out
    assert len((tmp_path / "wiring.jsonl").read_text().splitlines()) == 1


@runs("docs/view.md#seeing-a-wiring-change")
def test_a_page_of_layers(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = fresh(named_net()) | {"Path": Path, "epoch": 0.5, "batch": torch.randn(2, 4, 8, 8), "step": 3}
    names["wiring"] = dnw.wire(names["model"], names["optimizer"], density=0.1)
    exec(code, names)
    assert '"fc.weight"' in (tmp_path / "view.html").read_text()


@runs("docs/circuits.md#the-recipe", "docs/circuits.md#circuits", by="page")
def test_the_page_on_circuits(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = dnw.models.Decoder(depth=1, heads=2, context=24)
    names = {"dnw": dnw, "Path": Path, "model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3)}
    recipe, circuits = code
    exec(recipe, names)
    exec(circuits.replace("loss=0.15", "loss=0.9").replace("pairs=200", "pairs=20"), names)  # the model is not trained
    assert names["wiring"].num_active == names["wiring"].num_candidates  # the schedule begins with all
    assert dnw.circuits.Circuit.from_json((tmp_path / "circuit.json").read_text()) == names["circuit"]
    assert (tmp_path / "circuit.html").exists()


@runs("docs/loops.md#lightning")
def test_lightning(code):
    lightning = pytest.importorskip("lightning")
    names = {"torch": torch, "dnw": dnw, "lightning": lightning}
    exec(code, names)
    module = names["Classifier"]()
    module.add_module("net", named_net())
    assert isinstance(module.configure_optimizers(), torch.optim.AdamW)
    assert "net.fc.weight" in module.wiring


@runs("docs/loops.md#hugging-face-trainer")
def test_transformers(code):
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(report_to="none", use_cpu=True)
    names = {**fresh(named_net()), "transformers": transformers, "arguments": arguments, "train": [1]}
    exec(code, names)
    assert names["trainer"].optimizer is names["optimizer"]
    assert len(names["wiring"]) == 3


def _wraps(rank: int, code: str) -> int:
    torch.manual_seed(rank)
    names = fresh(named_net())
    if "accelerator" in code:
        from accelerate import Accelerator

        names["accelerator"] = Accelerator(cpu=True)
    exec(code, names)
    step(names, torch.randn(2, 4, 6, 6))
    return names["wiring"].step


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@runs("docs/loops.md#ddp", "docs/loops.md#accelerate")
def test_wrapped_models(code):
    pytest.importorskip("accelerate")
    assert on_processes(2, _wraps, code) == [1, 1]


def _shards(rank: int, code: str) -> int:
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    names = {"torch": torch, "dnw": dnw, "fully_shard": fully_shard, "model": model, "device": "cpu"}
    names["initialize"] = lambda m: [nn.init.normal_(p) for p in m.parameters()]
    exec(code, names)
    step(names, torch.randn(2, 4))
    return names["wiring"].num_active


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@pytest.mark.filterwarnings("ignore:DTensor random operators")
@runs("docs/loops.md#fsdp2-and-torchtitan")
def test_fsdp2(code):
    assert on_processes(2, _shards, code) == [3, 3]
