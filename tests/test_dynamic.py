"""Graphs in discrete and in continuous time: from the definition, differentiable, with learned wiring, on sequences."""

from __future__ import annotations

import copy
import functools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dnw
from dnw.graphs import INSTANCE_NORM, ContinuousTimeGraph, DiscreteTimeGraph, DynamicGraph, SequenceGraph

EQUAL_STEPS = ("euler", "midpoint", "rk4")
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


def filled(graph: DynamicGraph, seed: int = 0) -> DynamicGraph:
    """Every parameter away from its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return graph


def slow_discrete(graph: DiscreteTimeGraph, mask: Tensor, x: Tensor) -> Tensor:
    """Node by node and edge by edge."""
    states = [x[:, v] if v < graph.num_inputs else torch.zeros_like(x[:, 0]) for v in range(graph.num_nodes)]
    for _ in range(graph.steps):
        sent = []
        for v, state in enumerate(states):
            z = graph.activation(state)
            sent.append(F.conv2d(z[:, None], graph.conv.weight[v : v + 1], padding=1)[:, 0] if graph.maps else z)
        reached = []
        for v in range(graph.num_nodes):
            total = torch.zeros_like(sent[0]) + (0 if graph.bias is None else graph.bias[v])
            for u in range(graph.num_nodes):
                if mask[v, u]:
                    total = total + graph.weight[v, u] * sent[u]
            reached.append(total)
        states = list(graph.norm(torch.stack(reached, dim=1)).unbind(1))
    return torch.stack(states[-graph.num_outputs :], dim=1)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("maps", [True, False])
def test_discrete_time_from_the_definition(maps, steps):
    graph = filled(DiscreteTimeGraph(7, 2, 3, steps=steps, maps=maps, norm=INSTANCE_NORM if maps else None))
    wiring = dnw.wire(graph, torch.optim.SGD(graph.parameters(), lr=0.1), density=0.4)
    x = torch.randn(2, 2, 5, 5) if maps else torch.randn(2, 2)
    torch.testing.assert_close(graph(x), slow_discrete(graph, wiring["weight"].active, x), rtol=1e-4, atol=1e-5)


def test_every_edge_may_exist_and_cycles_and_self_edges_count():
    graph = DiscreteTimeGraph(5, 1, 1, steps=3, maps=False, activation=torch.tanh)
    wiring = dnw.wire(graph, torch.optim.SGD(graph.parameters(), lr=0.1), num_edges=25)
    assert wiring["weight"].num_candidates == 25
    assert wiring["weight"].edges().is_graph
    with torch.no_grad():
        graph.weight.zero_()
        graph.weight[0, 0] = 1.0  # the input keeps itself
        graph.weight[4, 0] = 2.0
    x = torch.tensor([[0.5]])
    kept = math.tanh(math.tanh(0.5))
    assert graph(x).item() == pytest.approx(2 * math.tanh(kept), rel=1e-6)


def slow_euler(graph: ContinuousTimeGraph, x: Tensor, steps: int) -> Tensor:
    """Step by step, in equal steps."""
    state = torch.cat([x, torch.zeros(x.shape[0], graph.num_nodes - graph.num_inputs, *x.shape[2:], dtype=x.dtype)], 1)
    for _ in range(steps):
        change = F.linear(graph.activation(state), graph.weight, graph.bias) - graph.leak * state
        state = state + graph.duration / steps * change
    return state[:, -graph.num_outputs :]


def leaking(solver: str, leak: float) -> ContinuousTimeGraph:
    options = {"solver": solver, "solver_steps": 400, "rtol": 1e-6, "atol": 1e-6, "leak": leak, "duration": 0.8}
    graph = ContinuousTimeGraph(6, 2, 2, maps=False, activation=torch.tanh, **options)
    filled(graph)
    return graph


INPUTS = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))


@functools.cache
def tiny_steps(leak: float) -> Tensor:
    """What a graph gives, whatever its solver, after 20,000 steps."""
    with torch.no_grad():
        return slow_euler(leaking("euler", leak), INPUTS, 20_000)


@pytest.mark.parametrize("solver", [*EQUAL_STEPS, *ADAPTIVE])
@pytest.mark.parametrize("leak", [0.0, 0.7])
def test_continuous_time_approaches_tiny_steps(solver, leak):
    pytest.importorskip("torchdiffeq")
    graph = leaking(solver, leak)
    torch.testing.assert_close(graph(INPUTS), tiny_steps(leak), rtol=5e-3, atol=5e-3)
    assert graph.num_solves == 1
    if solver in EQUAL_STEPS:
        assert graph.num_evaluations == 400 * {"euler": 1, "midpoint": 2, "rk4": 4}[solver]
    else:
        assert 5 < graph.num_evaluations < 4000


@pytest.mark.parametrize("solver", EQUAL_STEPS)
def test_order_of_the_solvers_with_equal_steps(solver):
    """The error against exp(-1) falls with the order of the method."""
    errors = []
    for steps in (8, 16):
        graph = ContinuousTimeGraph(2, 1, 1, solver=solver, solver_steps=steps, maps=False, activation=nn.Identity()).double()
        with torch.no_grad():
            graph.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))  # the input decays into the output
        errors.append(abs(graph(torch.ones(1, 1, dtype=torch.float64)).item() - (1 - math.exp(-1))))
    order = math.log2(errors[0] / errors[1])
    assert order == pytest.approx({"euler": 1, "midpoint": 2, "rk4": 4}[solver], abs=0.2)


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize("kind", ["discrete", "rk4", "dopri5"])
def test_gradcheck(kind, maps):
    options = {"maps": maps, "activation": torch.tanh, "norm": INSTANCE_NORM if maps else None}
    if kind == "discrete":
        graph: DynamicGraph = DiscreteTimeGraph(4, 1, 2, steps=3, **options)
    else:
        pytest.importorskip("torchdiffeq")
        graph = ContinuousTimeGraph(4, 1, 2, solver=kind, solver_steps=3, rtol=1e-8, atol=1e-8, **options)
    filled(graph).double()
    x = torch.randn(1, 1, *([3, 3] if maps else []), dtype=torch.float64, requires_grad=True)
    parameters = dict(graph.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(graph, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), atol=1e-4)


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_adjoint_agrees_with_backpropagation(solver):
    pytest.importorskip("torchdiffeq")
    grads = []
    for adjoint in (False, True):
        graph = ContinuousTimeGraph(
            6, 2, 2, solver=solver, solver_steps=60, adjoint=adjoint, rtol=1e-7, atol=1e-7, maps=False, activation=torch.tanh
        )
        filled(graph).double()
        x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2).requires_grad_()
        graph(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in graph.parameters())])
        evaluations = graph.num_evaluations
    for plain, other in zip(*grads, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-3, atol=1e-5)
    assert evaluations == graph.num_evaluations  # the backward equation is not counted


def test_an_ode_whose_step_underflows_is_one_clear_error():
    pytest.importorskip("torchdiffeq")
    graph = ContinuousTimeGraph(2, 1, 1, maps=False, activation=lambda s: s**3, duration=10.0)
    with torch.no_grad():
        graph.weight.copy_(torch.tensor([[5.0, 0.0], [1.0, 0.0]]))  # explodes in finite time
    with pytest.raises(FloatingPointError, match="dopri5 could not go on .*underflow.*use a smaller learning rate, a leak"):
        graph(torch.ones(1, 1))


def test_without_torchdiffeq(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    assert ContinuousTimeGraph(3, 1, 1, maps=False, solver="rk4")(torch.ones(1, 1)).shape == (1, 1)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dnw\[ode\]', or choose 'euler', 'midpoint', 'rk4'"):
        ContinuousTimeGraph(3, 1, 1, maps=False)(torch.ones(1, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiscreteTimeGraph(3, 2, 2), "num_nodes=3, num_inputs=2, num_outputs=2: a dynamic graph needs"),
        (lambda: DiscreteTimeGraph(3, 0, 1), "at least one of each"),
        (lambda: DiscreteTimeGraph(3, 1, 1, steps=0), "steps=0: a whole number from 1 on"),
        (lambda: ContinuousTimeGraph(3, 1, 1, solver="dopri4"), "solver='dopri4': no such solver; did you mean 'dopri8'"),
        (lambda: ContinuousTimeGraph(3, 1, 1, solver_steps=0), "solver_steps=0"),
        (lambda: ContinuousTimeGraph(3, 1, 1, rtol=0.0), "tolerances are above 0"),
        (lambda: ContinuousTimeGraph(3, 1, 1, duration=-1.0), "duration=-1.0"),
        (lambda: ContinuousTimeGraph(3, 1, 1, duration=math.inf), "duration=inf"),
        (lambda: ContinuousTimeGraph(3, 1, 1, leak=math.nan), "leak=nan"),
        (lambda: ContinuousTimeGraph(3, 1, 1, rtol=math.inf), "tolerances are above 0 and finite"),
        (lambda: DiscreteTimeGraph(3, True, 1), "num_inputs=True"),
        (lambda: DiscreteTimeGraph(3.0, 1, 1), "num_nodes=3.0"),
        (
            lambda: SequenceGraph(DiscreteTimeGraph(4, 1, 1, maps=False))(torch.zeros(2, 3, 1), torch.zeros(2, 5)),
            r"expected a state of shape \(2, 4\), got one of \(2, 5\)",
        ),
        (lambda: ContinuousTimeGraph(3, 1, 1, adjoint=True, rectify_in_place=True), "use one of them"),
        (lambda: DiscreteTimeGraph(3, 1, 1)(torch.ones(1, 2, 4, 4)), r"expected maps \[batch, 1, height, width\]"),
        (lambda: DiscreteTimeGraph(3, 1, 1, maps=False)(torch.ones(1, 2)), r"expected numbers \[batch, 1\]"),
        (lambda: SequenceGraph(DiscreteTimeGraph(3, 1, 1, maps=False))(torch.ones(1, 1)), r"\[batch, length, inputs\]"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_trains_wired_copies_and_resumes(kind):
    torch.manual_seed(0)
    graph: DynamicGraph
    if kind == "discrete":
        graph = DiscreteTimeGraph(30, 4, 3, steps=3, maps=False, activation=torch.tanh)
    else:
        graph = ContinuousTimeGraph(30, 4, 3, solver="rk4", solver_steps=3, maps=False, activation=torch.tanh)
    optimizer = torch.optim.Adam(graph.parameters(), lr=0.02)
    wiring = dnw.wire(graph, optimizer, density=0.1)
    x = torch.randn(64, 4)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(graph(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert wiring["weight"].num_active == 90
    for other in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert torch.equal(other(x), graph(x))


# --- sequences ---


@pytest.mark.parametrize("maps", [True, False])
def test_a_sequence_goes_on_from_its_state(maps):
    graph = filled(DiscreteTimeGraph(6, 2, 2, steps=2, maps=maps, activation=torch.tanh))
    sequence = SequenceGraph(graph)
    x = torch.randn(3, 5, 2, *([4, 4] if maps else []))
    outputs, state = sequence(x)
    assert outputs.shape == (3, 5, 2, *x.shape[3:])
    first, middle = sequence(x[:, :2])
    rest, last = sequence(x[:, 2:], middle)
    assert torch.equal(torch.cat([first, rest], 1), outputs)
    assert torch.equal(last, state)
    by_hand = torch.zeros_like(state)
    for i in range(5):
        by_hand = torch.cat([by_hand[:, :2] + x[:, i], by_hand[:, 2:]], 1)
        for _ in range(2):
            by_hand = graph.rate(by_hand)
        torch.testing.assert_close(outputs[:, i], by_hand[:, -2:])
