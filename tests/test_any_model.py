"""Any model, trained in any way: two lines, and nothing else changes."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import MaskInForward, pairs, small_net
from processes import GROUP, on_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

import dnw

DENSITY = 0.25


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = cell(5, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Transformer(nn.Module):
    """Attention holds query, key and value in one packed parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.downsample(x))


def resnet() -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(stem, Block(4, 6, 1), Block(6, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def audio() -> nn.Sequential:
    """Convolutions under weight norms, one of them transposed."""
    down, up = weight_norm(nn.Conv1d(6, 8, 3, padding=1)), weight_norm(nn.ConvTranspose1d(8, 6, 3, stride=2), dim=1)
    return nn.Sequential(down, nn.LeakyReLU(0.1), up, nn.Flatten(), nn.Linear(66, 4))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(30, 16), nn.GELU(), nn.Linear(16, 4))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "conv": small_net,
    "mlp": mlp,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "transformer": Transformer,
    "resnet": resnet,
    "audio": audio,
}
WIRED = {
    "conv": {"0.weight", "5.weight", "7.weight"},
    "mlp": {"1.weight", "3.weight"},
    "lstm": {f"rnn.weight_{w}_l{i}{r}" for w in ("ih", "hh") for i in (0, 1) for r in ("", "_reverse")} | {"head.weight"},
    "transformer": {
        *(f"encoder.layers.{i}.{w}" for i in (0, 1) for w in ("self_attn.in_proj_weight", "self_attn.out_proj.weight")),
        *(f"encoder.layers.{i}.linear{j}.weight" for i in (0, 1) for j in (1, 2)),
        *("embed.weight", "head.weight"),
    },
    "resnet": {
        "0.0.weight",
        *(f"{i}.{w}.weight" for i in (1, 2) for w in ("conv1", "conv2", "downsample.0")),
        "5.weight",
    },
    "audio": {"0.parametrizations.weight.original1", "2.parametrizations.weight.original1", "4.weight"},
}
WIRED["gru"] = WIRED["lstm"]


def make(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[kind]()
    for name, parameter in model.named_parameters():  # biases and norms away from 0 and 1, so that they matter
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5) if "weight" in name else nn.init.uniform_(parameter, -0.2, 0.2)
    return model


def data(kind: str, step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    shape = (8, 3, 8, 8) if kind in ("conv", "resnet") else (8, 6, 5)
    return torch.randn(shape, generator=generator), torch.randint(4, (8,), generator=generator)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, kind: str, steps: range, rank: int = 0, amp: bool = False
) -> list:
    losses = []
    for step in steps:
        x, y = data(kind, step, rank)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_sparse(kind: str, model: nn.Module, wiring: dnw.Wiring) -> None:
    assert set(wiring) == WIRED[kind]
    for name, parameter in wiring.items():
        weight = model.get_parameter(name)
        assert parameter.num_active == dnw.num_edges(DENSITY, weight.numel())
        assert torch.equal(weight, parameter.latent * parameter.active)


def same(a: dnw.Wiring, b: dnw.Wiring) -> bool:
    return list(a) == list(b) and all(
        torch.equal(a[n].latent, b[n].latent) and torch.equal(a[n].active, b[n].active) for n in a
    )


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


@pytest.mark.parametrize(("kind", "optimizer", "amp"), pairs(MODELS, [sgd, adamw], [False, True]))
def test_sgd_adamw_and_autocast_equal_mask_in_forward(kind, optimizer, amp):
    model, textbook = make(kind), make(kind)
    base = optimizer(model)
    wiring = dnw.wire(model, base, density=DENSITY)
    masked = MaskInForward(textbook, {n: wiring[n].num_active for n in wiring})
    theirs = optimizer(textbook)
    losses, expected = train(model, base, kind, range(6), amp=amp), train(masked, theirs, kind, range(6), amp=amp)
    check_sparse(kind, model, wiring)
    if amp and kind == "gru":
        # Autocast casts a parameter once and adds up the gradients of all time steps in bfloat16; the masked weight of the
        # textbook form is no parameter, is cast in every time step, and its gradients are added up in float32.
        assert losses == pytest.approx(expected, rel=1e-2)
        return
    assert losses == expected
    assert all(torch.equal(wiring[n].latent, textbook.get_parameter(n)) for n in wiring)


@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw-fused"])
def test_grad_scaler(kind, optimizer):
    model, plain = make(kind), make(kind)
    base, plain_base = optimizer(model), optimizer(plain)
    wiring, plain_wiring = (dnw.wire(m, o, density=DENSITY) for m, o in ((model, base), (plain, plain_base)))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        x, y = data(kind, step)
        base.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if step == 2:  # this step overflows and must not count
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = torch.nan
            plain(x)
        scaler.step(base)
        scaler.update()
        if step != 2:
            train(plain, plain_base, kind, range(step, step + 1))
    assert (wiring.step, plain_wiring.step) == (4, 4)
    check_sparse(kind, model, wiring)
    for n in wiring:
        torch.testing.assert_close(wiring[n].latent, plain_wiring[n].latent, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw-fused"])
def test_compile(kind, optimizer):
    """Graphs are traced whole; recurrent cells are what the compiler itself steps around."""
    torch._dynamo.reset()
    model, plain = make(kind), make(kind)
    base, plain_base = optimizer(model), optimizer(plain)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=kind not in ("lstm", "gru"))
    wiring = dnw.wire(compiled, base, density=DENSITY)
    plain_wiring = dnw.wire(plain, plain_base, density=DENSITY)
    losses = train(compiled, base, kind, range(5))
    assert losses == pytest.approx(train(plain, plain_base, kind, range(5)), rel=1e-4)
    check_sparse(kind, model, wiring)
    for n in wiring:
        torch.testing.assert_close(wiring[n].latent, plain_wiring[n].latent, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compile_by_inductor():
    torch._dynamo.reset()
    model, plain = make("mlp"), make("mlp")
    base, plain_base = adamw(model), adamw(plain)
    compiled = torch.compile(model, fullgraph=True)
    wiring = dnw.wire(model, base, density=DENSITY)
    dnw.wire(plain, plain_base, density=DENSITY)
    try:
        losses = train(compiled, base, "mlp", range(5))
    except Exception as error:
        if "compiler" in str(error).lower():
            pytest.skip("inductor needs a C++ compiler")
        raise
    assert losses == pytest.approx(train(plain, plain_base, "mlp", range(5)), rel=1e-4)
    check_sparse("mlp", model, wiring)


def _ddp(rank: int, kind: str) -> dict:
    model = DistributedDataParallel(make(kind, seed=rank))
    base = adamw(model)
    wiring = dnw.wire(model, base, density=DENSITY)
    train(model, base, kind, range(5), rank)
    check_sparse(kind, model.module, wiring)
    return {n: (p.latent, p.active) for n, p in wiring.items()}


@pytest.mark.slow
@GROUP
def test_ddp(kind):
    first, second = on_processes(2, _ddp, kind)
    assert set(first) == set(second) == WIRED[kind]
    assert all(torch.equal(a, b) for n in first for a, b in zip(first[n], second[n], strict=True))


def test_ema(kind):
    model = make(kind)
    base = sgd(model)
    wiring = dnw.wire(model, base, density=DENSITY)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for step in range(6):
        train(model, base, kind, range(step, step + 1))
        average.update_parameters(model)
    check_sparse(kind, model, wiring)
    wiring.project(average)
    for n, parameter in wiring.items():
        kept = average.module.get_parameter(n) != 0
        assert int(kept.sum()) == parameter.num_active
    assert average(data(kind, 0)[0]).isfinite().all()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_deepcopy_and_pickle(kind, how):
    if (kind, how) == ("audio", "pickle"):
        pytest.skip("PyTorch does not pickle parametrized modules")
    model = make(kind)
    base = adamw(model)
    wiring = dnw.wire(model, base, density=DENSITY)
    train(model, base, kind, range(3))
    things = (model, base, wiring)
    other, other_base, other_wiring = copy.deepcopy(things) if how == "deepcopy" else pickle.loads(pickle.dumps(things))
    assert train(model, base, kind, range(3, 6)) == train(other, other_base, kind, range(3, 6))
    assert same(wiring, other_wiring)
    check_sparse(kind, other, other_wiring)


def test_resume(kind):
    model = make(kind)
    base = adamw(model)
    wiring = dnw.wire(model, base, density=DENSITY)
    train(model, base, kind, range(3))
    assert set(model.state_dict()) == set(make(kind).state_dict())
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": base.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = make(kind, seed=1)
    other_base = adamw(other)
    other_wiring = dnw.wire(other, other_base, density=DENSITY)
    other.load_state_dict(state["model"])
    other_base.load_state_dict(state["optimizer"])
    assert train(model, base, kind, range(3, 6)) == train(other, other_base, kind, range(3, 6))
    assert same(wiring, other_wiring)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")
def test_onnx_has_the_nodes_of_the_dense_model_and_the_weights_of_the_sparse_one(kind):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model = make(kind)
    base = sgd(model)
    wiring = dnw.wire(model, base, density=DENSITY)
    train(model, base, kind, range(3))
    x = data(kind, 0)[0]
    protos = []
    for net in (model, make(kind)):
        program = torch.onnx.export(net.eval(), (x,), dynamo=True, verbose=False)
        protos.append(program.model_proto)
    sparse, dense = (Counter(node.op_type for node in proto.graph.node) for proto in protos)
    assert sparse == dense
    zeros = [sum(int((onnx.numpy_helper.to_array(i) == 0).sum()) for i in proto.graph.initializer) for proto in protos]
    assert zeros[0] - zeros[1] == wiring.num_candidates - wiring.num_active > 0
    session = onnxruntime.InferenceSession(protos[0].SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.tensor(found), model(x).detach(), rtol=1e-4, atol=1e-5)
