"""Graphs on kernels that skip absent edges give the numbers of their layers in PyTorch: outputs, gradients, statistics."""

import copy
import io
import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers import rule_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dnw
from dnw.graphs import INSTANCE_NORM, ContinuousTimeGraph, DiscreteTimeGraph, StaticGraph, set_graph_kernels
from dnw.kernels import _graph, _room

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(_graph.library() is None, reason="the package was built without a C compiler"),
]


@pytest.fixture(autouse=True)
def always():
    set_graph_kernels("always")
    yield
    set_graph_kernels("auto")


def sparse(graph: nn.Module, density: float) -> nn.Module:
    with torch.no_grad():
        graph.weight *= torch.rand(graph.weight.shape, generator=torch.Generator().manual_seed(2)) < density
    return graph


class LoggingMode(TorchDispatchMode):
    """Looks at single operations."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def off(a: Tensor, b: Tensor) -> float:
    """The largest difference as a part of the largest magnitude."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) if b.numel() else 0.0


def results_of(graph: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, running statistics, and the gradients of everything, of one batch."""
    x = x.detach().clone().requires_grad_()
    out = graph(x)
    sent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    out.backward(sent)
    gradients = {name: p.grad for name, p in graph.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **gradients, **dict(graph.named_buffers())}


def both_ways(graph: nn.Module, x: Tensor) -> None:
    """Holds outputs, gradients and statistics to PyTorch's in float64, as near as those of its layers in float32 are."""
    whole, layers = copy.deepcopy(graph).double(), copy.deepcopy(graph)
    assert not graph.why_layers(x)
    assert whole.why_layers(x.double()) == "kernels compute in float32"
    found, exact = results_of(graph, x), results_of(whole, x.double())
    set_graph_kernels("never")
    rounded = results_of(layers, x)
    set_graph_kernels("always")
    noise = 1e-6 * max(float(value.abs().max()) for value in exact.values() if value.is_floating_point() and value.numel())
    for name, expected in exact.items():
        if expected.is_floating_point():
            error = off(found[name].double(), expected)
            bound = max(1e-5, 4 * off(rounded[name].double(), expected))  # of what cancels out, only noise is left
            assert error < bound or float((found[name] - expected).abs().max()) < noise, name
        else:
            assert torch.equal(found[name], expected), name


NORMS = {
    "none": None,
    "batch": nn.BatchNorm2d,
    "instance": INSTANCE_NORM,
    "cumulative": lambda n: nn.BatchNorm2d(n, momentum=None),
}
NORMS |= {
    "plain": lambda n: nn.BatchNorm2d(n, affine=False),
    "batch alone": lambda n: nn.BatchNorm2d(n, track_running_stats=False),
}


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    outputs=st.integers(1, 5),
    shared=st.booleans(),
    stride=st.sampled_from([1, 2]),
    norm=st.sampled_from(sorted(NORMS)),
    training=st.booleans(),
    height=st.integers(3, 9),
    width=st.integers(3, 9),
    batch=st.sampled_from([1, 2, 5, 16, 19, 33]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_a_static_graph_is_that_of_its_layers(
    sizes, outputs, shared, stride, norm, training, height, width, batch, density, seed
):
    shared = shared and len(sizes) > 1 and outputs <= sizes[-1]
    torch.manual_seed(seed)
    graph = StaticGraph(sizes, outputs, shared_outputs=shared, stride=stride, norm=NORMS[norm])
    sparse(graph, density).train(training)
    x = torch.randn(batch, sizes[0], height, width) + 0.5
    both_ways(graph, x)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["discrete", "euler", "rk4"]),
    maps=st.booleans(),
    normed=st.booleans(),
    activation=st.sampled_from([F.relu, torch.tanh]),
    batch=st.sampled_from([5, 16, 19]),
    density=st.sampled_from([0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_a_dynamic_graph_is_that_of_its_layers(kind, maps, normed, activation, batch, density, seed):
    torch.manual_seed(seed)
    norm = (nn.BatchNorm2d if maps else nn.BatchNorm1d) if normed else None
    settings_ = {"maps": maps, "norm": norm, "activation": activation}
    if kind == "discrete":
        graph = DiscreteTimeGraph(11, 3, 4, steps=3, **settings_)
    else:
        graph = ContinuousTimeGraph(11, 3, 4, solver=kind, solver_steps=2, **settings_)
    x = torch.randn(batch, 3, 6, 5) if maps else torch.randn(batch, 3)
    both_ways(sparse(graph, density), x)


def test_many_nodes_whose_maps_lie_far_apart():
    torch.manual_seed(0)
    x = torch.randn(18, 40, 4, 5)
    both_ways(sparse(StaticGraph((40, 200, 100), 30), 0.05), x)
    both_ways(sparse(DiscreteTimeGraph(300, 40, 30, steps=2), 0.05), x)


def test_what_a_graph_gives_does_not_depend_on_the_number_of_threads():
    graph, x = sparse(StaticGraph((8, 30, 30), 20, stride=2), 0.3), torch.randn(37, 8, 11, 9)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            module = copy.deepcopy(graph)
            module(x).square().sum().backward()
            results.append([p.grad for p in module.parameters()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for (name, _), a, b in zip(graph.named_parameters(), results[0], other, strict=True):
            assert torch.equal(a, b) if name != "weight" else off(a, b) < 1e-5, name  # a dense product of PyTorch's


def trained(mode: str, rule: dnw.Rule, steps: int = 5, **budget: object) -> tuple[list[float], dnw.Wiring]:
    set_graph_kernels(mode)
    torch.manual_seed(0)
    model = dnw.models.tiny_digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    wiring = dnw.wire(model, optimizer, rule=rule, **budget)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x, y = torch.randn(24, 1, 8, 8, generator=generator), torch.randint(10, (24,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, wiring


RULES = ("dnw", "no_update", "targeted_dropout", "magnitude_pruning", "random", "set", "rigl", "sparse_momentum", "sr_ste")
RULES += ("st3", "feather", "top_kast")


@pytest.mark.parametrize("name", RULES)
def test_every_rule_trains_the_same_wiring(name):
    case = rule_cases(dnw.models.tiny_digits())[name]
    layers, kernels = (trained(mode, case.rule, **{"density": 0.1} | case.budget) for mode in ("never", "always"))
    assert kernels[0] == pytest.approx(layers[0], rel=1e-4)
    for one, other in zip(layers[1].values(), kernels[1].values(), strict=True):
        assert float((one.active == other.active).float().mean()) > 0.999


def test_dormant_edges_get_a_gradient_only_where_their_rule_needs_it():
    x = torch.randn(16, 1, 8, 8)

    def grads(rule: dnw.Rule, **settings_: object) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        model = dnw.models.tiny_digits()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wiring = dnw.wire(model, optimizer, density=0.05, rule=rule, **settings_)
        model(x).square().sum().backward()
        (parameter,) = wiring.values()
        return model.graph.weight.grad, parameter.active

    exact, active = grads(dnw.DNW())
    assert exact[~active].count_nonzero() > 100
    for way in ("bfloat16", "pooled", "pooled bfloat16"):
        other, _ = grads(dnw.DNW(), dormant=dnw.Dormant(gradient=way))
        assert off(other[active], exact[active]) < 1e-5, way
        both = torch.stack([other[~active], exact[~active]])
        assert float(torch.corrcoef(both)[0, 1]) > (0.9 if way == "bfloat16" else 0.3), way
        assert not torch.equal(other[~active], exact[~active]), way
    for rule in (dnw.RandomGraph(), dnw.NoUpdate(), dnw.SET(), dnw.RigL(every=100)):
        other, active = grads(rule)
        assert not other[~active].any()
        assert other[active].count_nonzero() > 0.3 * int(active.sum())
    due, active = grads(dnw.RigL(every=1))
    assert due[~active].any()


def test_dormant_gradients_have_known_ways():
    with pytest.raises(ValueError, match=r"gradient='half'; allowed are 'exact', 'bfloat16', 'pooled'"):
        dnw.Dormant(gradient="half")


def test_what_is_written_to_a_wired_graph_is_computed():
    _, wiring = trained("always", dnw.DNW(), density=0.05)
    (parameter,) = wiring.values()
    weight = parameter._layer.parameter
    graph = next(m for m in [parameter._layer.module])
    x = torch.randn(4, graph.num_inputs, 8, 8)
    with torch.no_grad():
        weight.copy_(torch.randn_like(weight))
        given = graph.eval()(x)
        set_graph_kernels("never")
        assert off(given, graph(x)) < 1e-5


# --- which way it runs ---


def test_auto_takes_layers_where_the_graph_is_dense():
    set_graph_kernels("auto")
    graph, x = StaticGraph((4, 8), 5), torch.randn(8, 4, 6, 6)
    assert graph.why_layers(x).startswith("100% of the candidate edges are active")
    assert sparse(graph, 0.1).why_layers(x) == ""
    assert graph.why_layers(x[:7]) == "the batch has fewer than 8 images"
    with torch.no_grad():
        graph.weight.fill_(1.0)
    assert graph.why_layers(x) != ""


def test_what_kernels_do_not_know_runs_as_layers():
    def why(graph: nn.Module, x: Tensor | None = None) -> str:
        x = torch.randn(3, 4, 6, 6) if x is None else x
        reason = graph.why_layers(x)
        assert torch.isfinite(graph(x).float()).all()
        return reason

    assert "GroupNorm" in why(StaticGraph((4, 8), 5, norm=lambda n: nn.GroupNorm(2, n)))
    for registered in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        hooked = StaticGraph((4, 8), 5)
        getattr(hooked.nodes[1].conv, f"register_{registered}")(lambda *_: None)
        assert "hooks" in why(hooked)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert "hooks" in why(StaticGraph((4, 8), 5))
    handle.remove()
    with torch.device("cpu"):
        assert why(StaticGraph((4, 8), 5)) == ""
    shifted = StaticGraph((4, 8), 5, norm=lambda n: nn.BatchNorm2d(n, bias=n == 4))
    assert "BatchNorm2d as it is here" in why(shifted)
    slower = StaticGraph((4, 8), 5)
    slower.nodes[1].conv.stride = (2, 2)
    assert "beyond the first level" in slower.why_layers(torch.randn(3, 4, 6, 6))
    with pytest.raises(ValueError, match=r"expected maps \[batch, 4, height, width\]"):
        slower.why_layers(torch.randn(8, 8))
    assert "float32" in why(StaticGraph((4, 8), 5).double(), torch.randn(3, 4, 6, 6).double())
    with torch.autocast("cpu", torch.bfloat16):
        assert "float32" in why(StaticGraph((4, 8), 5))
    with FlopCounterMode(display=False):
        assert "hooks" in why(StaticGraph((4, 8), 5))
    with LoggingMode():
        assert "traced" in why(StaticGraph((4, 8), 5))
    replaced = StaticGraph((4, 8), 5)
    replaced.nodes[1].conv = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)
    assert "stride 1 or 2" in why(replaced)
    set_graph_kernels("never")
    assert "turned off" in why(StaticGraph((4, 8), 5))
    with pytest.raises(ValueError, match="mode='on'; allowed|mode='on': allowed"):
        set_graph_kernels("on")


def test_batch_norms_of_one_number_are_refused_as_in_pytorch():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        StaticGraph((4, 8), 5)(torch.randn(1, 4, 1, 1))


def test_an_empty_batch():
    assert StaticGraph((4, 8), 5).eval()(torch.randn(0, 4, 6, 6)).shape == (0, 5, 6, 6)


# --- what PyTorch does around it ---


def test_gradients_that_are_switched_off():
    graph, x = sparse(StaticGraph((4, 8), 5), 0.5), torch.randn(6, 4, 7, 7)
    graph.weight.requires_grad_(False)
    graph.nodes[0].requires_grad_(False)
    graph(x).sum().backward()
    assert graph.weight.grad is None
    assert graph.nodes[0].conv.weight.grad is None
    assert graph.nodes[1].conv.weight.grad is not None
    with torch.no_grad():
        assert not graph(x).requires_grad


def test_checkpointing_and_copies():
    graph, x = sparse(StaticGraph((4, 8), 5), 0.5), torch.randn(6, 4, 7, 7, requires_grad=True)
    graph(x).square().sum().backward()
    expected, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(copy.deepcopy(graph), x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, expected)
    file = io.BytesIO()
    torch.save(graph.state_dict(), file)
    file.seek(0)
    other = StaticGraph((4, 8), 5)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.eval()(x), graph.eval()(x))


def test_what_comes_out_may_be_written_in_place():
    x = torch.randn(9, 4, 6, 6)
    for graph in (StaticGraph((4, 8), 5), DiscreteTimeGraph(9, 4, 3, steps=2)):
        model = nn.Sequential(sparse(graph, 0.5), nn.ReLU(inplace=True))
        found = results_of(model, x)
        set_graph_kernels("never")
        model.zero_grad()
        for name, expected in results_of(model, x).items():
            assert name.endswith(("running_mean", "running_var", "tracked")) or off(found[name], expected) < 1e-5, name
        set_graph_kernels("always")


@pytest.mark.parametrize("given", [{"dtype": torch.float64}, {"device": "meta"}])
def test_other_defaults_for_new_tensors(given):
    x = torch.randn(9, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    for make in (
        lambda: StaticGraph((4, 8), 5),
        lambda: StaticGraph((4, 8), 5, norm=INSTANCE_NORM),
        lambda: DiscreteTimeGraph(9, 4, 3, steps=2, norm=nn.BatchNorm2d),
    ):
        torch.manual_seed(0)
        graph = sparse(make(), 0.5)
        plain = copy.deepcopy(graph)
        plain(x).square().sum().backward()
        try:
            torch.set_default_dtype(given.get("dtype", torch.float32))
            torch.set_default_device(given.get("device"))
            graph(x.clone()).square().sum().backward()
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        for (name, p), expected in zip(graph.named_parameters(), plain.parameters(), strict=True):
            assert off(p.grad, expected.grad) < 1e-3, name  # wrong numbers are far off; rounding is held above


def test_inference_mode():
    set_graph_kernels("auto")
    with torch.inference_mode():
        graph, x = sparse(StaticGraph((4, 8), 5), 0.1).eval(), torch.randn(8, 4, 6, 6)
        assert graph.why_layers(x) == ""
        found = graph(x)
        set_graph_kernels("never")
        assert off(found, graph(x)) < 1e-5


def test_second_derivatives_in_any_layout():
    graph = sparse(StaticGraph((3, 4), 2), 0.5)
    x = torch.randn(3, 3, 4, 4, requires_grad=True)
    found = []
    for mode in ("always", "never"):
        set_graph_kernels(mode)
        (slope,) = torch.autograd.grad(graph(x).square().sum(), x, create_graph=True)
        sent = torch.randn(3, 4, 4, 3, generator=torch.Generator().manual_seed(1)).movedim(-1, 0)
        found.append(torch.autograd.grad(slope, x, sent)[0])
    assert off(*found) < 1e-4


AGAIN = {
    "static": lambda: StaticGraph((3, 4), 2),
    "static, applied twice": lambda: nn.Sequential(*[StaticGraph((3, 4), 3)] * 2),
    "discrete": lambda: DiscreteTimeGraph(7, 3, 2, steps=3, norm=nn.BatchNorm2d),
    "discrete, norm of an image": lambda: DiscreteTimeGraph(7, 3, 2, steps=3, norm=INSTANCE_NORM),
    "continuous": lambda: ContinuousTimeGraph(7, 3, 2, solver="rk4", solver_steps=2),
    "continuous, numbers": lambda: ContinuousTimeGraph(7, 3, 2, solver="midpoint", solver_steps=2, maps=False),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluated"])
@pytest.mark.parametrize("kind", AGAIN)
def test_second_derivatives(kind, training):
    """First derivatives are those of a plain backward pass, and second ones those of the layers in float64."""
    model = AGAIN[kind]().train(training)
    for graph in {module for module in model.modules() if hasattr(module, "why_layers")}:
        sparse(graph, 0.5)
    x = torch.randn(8, 3, *([] if kind.endswith("numbers") else [4, 4]))

    def derivatives(model: nn.Module, x: Tensor, again: bool = True) -> tuple[list[Tensor], list[Tensor]]:
        model.zero_grad()
        at = [x.clone().requires_grad_(), *model.parameters()]
        first = torch.autograd.grad(model(at[0]).square().sum(), at, create_graph=again)
        if again:
            sum(slope.square().sum() for slope in first).backward()
        return [slope.detach() for slope in first], [t.grad for t in at]

    first, second = derivatives(model, x)
    plain, _ = derivatives(model, x, again=False)
    set_graph_kernels("never")
    exact_first, exact_second = derivatives(copy.deepcopy(model).double(), x.double())
    assert len(second) == len(exact_second) > 2
    for found, expected in ((first, plain), (first, exact_first), (second, exact_second)):
        assert all(off(a.double(), b.double()) < 1e-3 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("part", ["norm", "activation"])
def test_hooks_on_parts_of_a_graph_in_time_are_called_at_every_step(part):
    graph, called = DiscreteTimeGraph(9, 4, 3, steps=3, norm=nn.BatchNorm2d, activation=nn.ReLU()), []
    getattr(graph, part).register_full_backward_pre_hook(lambda *_: called.append(part))
    graph(torch.randn(8, 4, 5, 5, requires_grad=True)).sum().backward()
    assert len(called) == 3


def test_an_unwired_graph_counts_the_edges_that_it_reads():
    set_graph_kernels("auto")
    graph, x = StaticGraph((8, 8, 8, 8), 2, shared_outputs=True), torch.randn(8, 8, 4, 4)
    dnw.wire(graph, torch.optim.SGD(graph.parameters(), lr=0.1), density=0.9)
    other = StaticGraph((8, 8, 8, 8), 2, shared_outputs=True)
    other.load_state_dict(graph.state_dict())
    assert other.why_layers(x) == graph.why_layers(x) == "90% of the candidate edges are active, and kernels pay up to 50%"


def test_a_compiled_graph_in_continuous_time_is_compiled_once():
    graph, compiled = sparse(ContinuousTimeGraph(9, 4, 3, solver="rk4", solver_steps=2), 0.3), []

    def backend(module, example):
        compiled.append(module)
        return module.forward

    module = torch.compile(graph, backend=backend)
    x = torch.randn(8, 4, 5, 5)
    with torch.no_grad():
        found = [module(x) for _ in range(4)]
        expected = graph(x)
    assert len(compiled) == 1
    assert off(found[-1], expected) < 1e-5


def test_memory_is_lent_once_whenever_its_last_holder_goes():
    """A buffer may die while it is looked at, by another thread or the garbage collector."""
    pool, asked = _room._Pool(), []

    class Dying:
        def __init__(self, buffer: object) -> None:
            self.buffer, self.times = buffer, 0

        def __call__(self) -> object:
            asked.append(self)
            self.times += 1
            return self.buffer if self.times == 1 else None

    held = pool.lend(1 << 16)
    (entry,) = pool._lent
    pool._lent[:] = [(Dying(held), entry[1])]
    pool.lend(1 << 16)
    places = [id(block) for _, block in pool._lent] + [id(block) for block in pool._free]
    assert len(asked) == 1
    assert len(places) == len(set(places)) == 2


def test_the_whole_model_compiles():
    graph, x = sparse(StaticGraph((4, 8), 5), 0.3), torch.randn(6, 4, 7, 7)
    compiled = torch.compile(copy.deepcopy(graph), fullgraph=True, backend="aot_eager")
    for module in (graph, compiled):
        module(x).square().sum().backward()
    for one, other in zip(graph.parameters(), compiled.parameters(), strict=True):
        assert off(other.grad, one.grad) < 1e-5


def test_the_operators_are_those_that_pytorch_expects():
    weight, filters = torch.randn(6, 7, requires_grad=True), torch.randn(7, 9, requires_grad=True)
    x, scale, shift = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(7), torch.randn(7)
    topology = [3, 4], 2, False, 1
    torch.library.opcheck(
        torch.ops.dnw.static_graph.default, (x, weight, filters, scale, shift, None, None, *topology, 2, 1e-5)
    )
    torch.library.opcheck(torch.ops.dnw.edges.default, (x, torch.randn(5, 3, requires_grad=True)))
    torch.library.opcheck(torch.ops.dnw.nodes.default, (x, torch.randn(3, 9), None, None, None, None, 0, 0.0))


def test_a_process_that_was_forked_after_the_first_use():
    graph, x = sparse(StaticGraph((4, 30), 5), 0.3), torch.randn(40, 4, 16, 16)
    expected = graph.eval()(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(graph(x), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_several_threads_that_train_at_once():
    def train(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        graph, x = graphs[seed], torch.randn(33, 6, 9, 9, generator=generator)
        optimizer = torch.optim.SGD(graph.parameters(), lr=0.01)
        for _ in range(6):
            optimizer.zero_grad()
            graph(x).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in graph.parameters()]

    graphs = [sparse(StaticGraph((6, 20, 20), 10), 0.3) for _ in range(4)]
    first = copy.deepcopy(graphs)
    alone = [train(seed) for seed in range(4)]
    graphs = first
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(train, range(4)))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_backward_pass_that_fails_leaves_nothing_behind():
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError("in the middle")

    chain = nn.Sequential(*(sparse(StaticGraph((6, 20), 6), 0.3) for _ in range(2)))
    x = torch.randn(9, 6, 8, 8)
    chain(x).square().sum().backward()
    expected = [p.grad.clone() for p in chain.parameters()]
    chain.zero_grad()
    with pytest.raises(ArithmeticError):
        chain[1](Failing.apply(chain[0](x))).square().sum().backward()
    chain.zero_grad()
    chain(x).square().sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(chain.parameters(), expected, strict=True))


# --- bad arguments ---


def test_the_native_code_refuses_what_does_not_fit():
    rows = _graph.Rows.of(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3), torch.arange(2), torch.tensor([3, 2]))
    assert rows.num_entries == 5
    assert rows.transposed().starts.tolist() == [0, 2, 4, 5]
    with pytest.raises(RuntimeError, match="dnw_count refuses its arguments .*a size"):
        _graph.Rows.of(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3), torch.arange(2), torch.tensor([3, 4]))
    with pytest.raises(RuntimeError, match="dnw_pooled refuses its arguments .*a pointer is null"):
        _graph.library().dnw_pooled(None, None, 1, 1, 1, 0, 0, 0, 1, 4)


def test_pooling_sums_and_means_over_what_is_there():
    x = torch.arange(2 * 3 * 5 * 4, dtype=torch.float32).view(2, 3, 5, 4)
    for mean in (False, True):
        settings_ = {"count_include_pad": False} if mean else {"divisor_override": 1}
        expected = F.avg_pool2d(x.permute(3, 0, 1, 2), 2, ceil_mode=True, **settings_).permute(1, 2, 3, 0)
        assert torch.allclose(_graph.pooled(x, mean=mean), expected)
    assert math.isclose(float(_graph.pooled(torch.ones(1, 1, 1, 1), mean=True)), 1.0)
