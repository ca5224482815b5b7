"""The code in the documentation runs."""

import dataclasses
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from processes import on_processes
from torch import nn

import dnw
from dnw.recipes import cifar10
from dnw.train import Config

ROOT = Path(__file__).parents[1]


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def named_net() -> nn.Module:
    """A model with the names that the README uses."""
    block = nn.Sequential()
    block.add_module("conv1", nn.Conv2d(4, 16, 3, padding=1))
    net = nn.Sequential()
    net.add_module("layer1", nn.Sequential(block))
    net.add_module("layer4", nn.Sequential(nn.Conv2d(16, 16, 3)))
    net.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    net.add_module("fc", nn.Linear(16, 4))
    return net


def with_stem() -> nn.Module:
    """The same with a first convolution of three colours."""
    return nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 4, 3, padding=1), **dict(named_net().named_children())))


def fresh(model: nn.Module) -> dict:
    return {"torch": torch, "dnw": dnw, "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}


def step(names: dict, x: torch.Tensor) -> None:
    names["model"](x).square().sum().backward()
    names["optimizer"].step()


def test_the_two_lines_and_the_mapping_by_name():
    two_lines, by_name = blocks("README.md")[0], blocks("README.md")[2]
    names = fresh(named_net())
    exec(two_lines, names)
    step(names, torch.randn(2, 4, 6, 6))
    exec(by_name, names)
    assert (names["parameter"].name, len(names["wiring"])) == ("layer1.0.conv1.weight", 0)


@pytest.mark.parametrize("line", [x for x in blocks("README.md")[1].splitlines() if x])
def test_every_way_to_wire(line):
    model = nn.Sequential()
    if "graph.weight" in line:
        model.add_module("graph", dnw.graphs.StaticGraph((32, 192, 192, 192, 192), 100))
    else:
        model = with_stem() if "conv1" in line else named_net()
    names = fresh(model)
    exec(f"wiring = {line}", names)
    before = names["wiring"].num_active
    assert 0 < before <= names["wiring"].num_candidates
    assert (before == names["wiring"].num_candidates) == ("schedule" in line)


RULES_AND_PATTERNS = [*blocks("docs/rules.md")[:2], *(x for x in blocks("docs/rules.md")[2].splitlines() if x)]


@pytest.mark.parametrize("block", RULES_AND_PATTERNS)
def test_rules_schedules_and_patterns(block):
    names = fresh(with_stem())
    exec(block if "wiring =" in block else f"wiring = {block}", names)
    names["model"](torch.randn(2, 3, 6, 6)).square().sum().backward()
    names["optimizer"].step()
    assert names["wiring"].step == 1


@pytest.mark.parametrize(("line", "wired"), [(0, ["experts.w", "fc1"]), (1, ["experts.w", "fc1", "fc2"]), (2, ["fc2"])])
def test_what_is_wired(line, wired):
    model = nn.Module()
    model.fc1, model.fc2, model.block = nn.Linear(4, 4), nn.Linear(4, 4), nn.Module()
    model.block.experts = nn.ParameterDict({"w": torch.randn(2, 4, 4)})
    names = fresh(model)
    (block,) = [block for block in blocks("docs/concepts.md") if "dnw.DEFAULTS" in block]
    exec(f"wiring = {block.splitlines()[line]}", names)
    assert sorted(name.removesuffix(".weight").removeprefix("block.") for name in names["wiring"]) == wired


def test_every_rule_stands_in_the_table():
    table = (ROOT / "docs/rules.md").read_text()
    for rule in dnw.RULES.values():
        settings = [f.name for f in dataclasses.fields(rule)]
        assert f"`{rule.__name__}({'masks' if 'edges' in settings else ', '.join(settings)})`" in table


def test_the_graph_of_the_readme():
    names = fresh(named_net())
    exec(blocks("README.md")[3], names)
    assert names["graph"](torch.zeros(1, 32, 4, 4)).shape == (1, 100, 4, 4)


def test_the_dynamic_graphs_of_the_readme():
    names: dict = {}
    exec(blocks("README.md")[4], names)
    assert names["maps"](torch.zeros(1, 16, 4, 4)).shape == (1, 16, 4, 4)
    assert names["ode"](torch.zeros(2, 8)).shape == (2, 32)
    outputs, state = names["recurrent"](torch.zeros(2, 5, 8))
    assert (outputs.shape, state.shape) == ((2, 5, 32), (2, 100))


def test_compiling(tmp_path, capsys):
    torch.manual_seed(0)
    model = dnw.models.tiny_cifar10()
    dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), num_edges=2_000)
    images = torch.randn(2, 3, 32, 32)
    names = {"dnw": dnw, "model": model.eval(), "images": images, "path": tmp_path / "net.dnw"}
    exec(blocks("docs/compile.md")[0], names)
    exec(blocks("docs/compile.md")[1], names)
    torch.testing.assert_close(names["program"](images), model(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(names["logits"], model(images), rtol=1e-4, atol=1e-5)
    assert "graph: nodes kept by level" in capsys.readouterr().out


def test_the_rule_in_twenty_lines():
    names = fresh(nn.Linear(20, 10))
    (layer,) = [names["model"]]
    exec(blocks("docs/extending.md")[0], names)
    step(names, torch.randn(4, 20))
    parameter = names["wiring"]["weight"]
    dormant, active = parameter.latent[~parameter.active].abs(), parameter.active
    expected = parameter.latent.sign() * (parameter.latent.abs() - dormant.max())
    assert torch.equal(layer.weight[active], expected[active])
    assert not layer.weight[~active].any()
    with names["wiring"].settled():
        assert torch.equal(layer.weight[active], parameter.latent[active])
    assert torch.equal(layer.weight[active], expected[active])


def test_the_graph_module_of_your_own():
    names = fresh(nn.Linear(1, 1))
    exec(blocks("docs/extending.md")[1], names)
    names.update(fresh(nn.Sequential(names["LowerTriangle"](6), nn.Linear(6, 2))))
    wiring = dnw.wire(names["model"], names["optimizer"], density=0.4)
    assert list(wiring) == ["0.weight"]
    assert (wiring.num_candidates, wiring.num_active) == (15, 6)
    step(names, torch.randn(3, 6))
    assert not wiring["0.weight"].weight.triu().any()


def test_the_recipe():
    names = {"cifar10": cifar10, "Config": Config}
    exec(blocks("docs/extending.md")[2], names)
    assert names["cifar10_sparser"]().num_edges == 16_000


# --- docs/loops.md ---

PLAIN, TRAINING, DDP, ACCELERATE, LIGHTNING, TRANSFORMERS, TIMM, FSDP2 = blocks("docs/loops.md")


@pytest.mark.parametrize("block", [PLAIN, TIMM], ids=["plain", "timm"])
def test_the_two_lines(block):
    names = fresh(named_net())
    exec(block, names)
    step(names, torch.randn(2, 4, 6, 6))
    assert names["wiring"].step == 1


def test_the_loop_in_plain_pytorch(tmp_path):
    batches = [(torch.randn(4, 4, 6, 6), torch.randint(4, (4,))) for _ in range(3)]
    names = {"torch": torch, "dnw": dnw, "resnet": named_net, "device": "cpu", "batches": batches, "path": tmp_path / "x.pt"}
    exec(TRAINING, names)
    assert names["wiring"].step == 3
    weight = names["average"].module.get_parameter("fc.weight")
    assert int((weight != 0).sum()) == names["wiring"]["fc.weight"].num_active
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    names["model"].load_state_dict(saved["model"])
    names["optimizer"].load_state_dict(saved["optimizer"])


def test_lightning():
    lightning = pytest.importorskip("lightning")
    names = {"torch": torch, "dnw": dnw, "lightning": lightning}
    exec(LIGHTNING, names)
    module = names["Classifier"]()
    module.add_module("net", named_net())
    assert isinstance(module.configure_optimizers(), torch.optim.AdamW)
    assert "net.fc.weight" in module.wiring


def test_transformers():
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(report_to="none", use_cpu=True)
    names = {**fresh(named_net()), "transformers": transformers, "arguments": arguments, "train": [1]}
    exec(TRANSFORMERS, names)
    assert names["trainer"].optimizer is names["optimizer"]
    assert len(names["wiring"]) == 3


def _wraps(rank: int, block: str) -> int:
    torch.manual_seed(rank)
    names = fresh(named_net())
    if block == ACCELERATE:
        from accelerate import Accelerator

        names["accelerator"] = Accelerator(cpu=True)
    exec(block, names)
    step(names, torch.randn(2, 4, 6, 6))
    return names["wiring"].step


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("block", [DDP, ACCELERATE], ids=["ddp", "accelerate"])
def test_wrapped_models(block):
    pytest.importorskip("accelerate")
    assert on_processes(2, _wraps, block) == [1, 1]


def _shards(rank: int) -> int:
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    names = {"torch": torch, "dnw": dnw, "fully_shard": fully_shard, "model": model, "device": "cpu"}
    names["initialize"] = lambda m: [nn.init.normal_(p) for p in m.parameters()]
    exec(FSDP2, names)
    step(names, torch.randn(2, 4))
    return names["wiring"].num_active


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@pytest.mark.filterwarnings("ignore:DTensor random operators")
def test_fsdp2():
    assert on_processes(2, _shards) == [3, 3]
