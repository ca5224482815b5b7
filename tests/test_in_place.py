"""Rules whose dormant edges have no weights of their own: what holds after every step, whatever happens between steps."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import MaskInForward, batch, pairs, small_net, train_steps
from test_foreign_optimizers import Averaged
from torch import nn

import dnw

RULES = {
    "random": dnw.RandomGraph(),
    "set": dnw.SET(every=100),
    "rigl": dnw.RigL(every=100),
    "magnitude_pruning": dnw.MagnitudePruning(),
    "l1_anneal": dnw.L1Anneal(),
    "sparse_momentum": dnw.SparseMomentum(every=100),
}


def exactly_its_edges(wiring: dnw.Wiring) -> bool:
    """Whether the model holds nothing beside the active edges, without asking it to catch up first."""
    return all(not layer.parameter.detach()[~layer.active].any() for layer in wiring._weights.layers)


def write_model(net: nn.Sequential, optimizer: torch.optim.Optimizer, wiring: dnw.Wiring) -> None:
    net.load_state_dict(small_net(3).state_dict())


def write_latents(net: nn.Sequential, optimizer: torch.optim.Optimizer, wiring: dnw.Wiring) -> None:
    for parameter in wiring.values():
        parameter.latent = torch.randn(parameter.latent.shape, generator=torch.Generator().manual_seed(5))


def start_anew(net: nn.Sequential, optimizer: torch.optim.Optimizer, wiring: dnw.Wiring) -> None:
    with torch.no_grad():
        net[5].weight.copy_(torch.randn(16, 32))
    wiring.restart()


@pytest.mark.parametrize(
    ("name", "write", "kind"), pairs(RULES, [write_model, write_latents, start_anew], [torch.optim.SGD, torch.optim.AdamW])
)
def test_a_write_leaves_no_momentum_that_would_bring_edges_back(name, write, kind):
    net = small_net()
    optimizer = kind(net.parameters(), lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    wiring = dnw.wire(net, optimizer, density=0.2, rule=RULES[name])
    train_steps(net, optimizer, range(4))
    write(net, optimizer, wiring)
    for step in range(4, 8):
        train_steps(net, optimizer, range(step, step + 1))
        assert exactly_its_edges(wiring)


@dataclass(frozen=True)
class Own(dnw.Rule):
    """A rule of a user's own without latent weights, whose momentum policy is the default."""

    @property
    def has_latent_weights(self) -> bool:
        return False

    @property
    def needs_dormant_gradient(self) -> bool:
        return False

    def is_due(self, step: int) -> bool:
        return step % 4 == 0

    def score(self, layer: dnw.Layer) -> torch.Tensor:
        return layer.latent + 0.01 * layer.uniform()


@pytest.mark.parametrize("rule", [dnw.SET(every=3), dnw.RigL(every=3), Own()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("momentum", ["update", "hold", "zero"])
def test_every_momentum_policy_keeps_the_model_sparse(rule, momentum):
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    wiring = dnw.wire(net, optimizer, density=0.2, rule=rule, dormant=dnw.Dormant(momentum=momentum))
    for step in range(9):
        train_steps(net, optimizer, range(step, step + 1))
        assert exactly_its_edges(wiring)


@pytest.mark.parametrize("rule", [dnw.NoUpdate(), dnw.SET(every=3), dnw.DNW()], ids=lambda r: type(r).__name__)
def test_zero_clears_and_hold_holds_the_momentum_of_dormant_edges(rule):
    for policy in ("zero", "hold"):
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        wiring = dnw.wire(net, optimizer, density=0.2, rule=rule, dormant=dnw.Dormant(momentum=policy))
        train_steps(net, optimizer, range(2))
        for step in range(2, 8):
            before = {n: optimizer.state[net.get_parameter(n)]["momentum_buffer"].clone() for n in wiring}
            dormant = {n: ~p.active for n, p in wiring.items()}
            train_steps(net, optimizer, range(step, step + 1))
            for n, parameter in wiring.items():
                momentum = optimizer.state[net.get_parameter(n)]["momentum_buffer"]
                if policy == "zero":
                    assert not momentum[~parameter.active].any()
                else:
                    assert torch.equal(momentum[dormant[n]], before[n][dormant[n]])


@dataclass(frozen=True)
class Half(dnw.RandomGraph):
    def project(self, layer: dnw.Layer) -> torch.Tensor:
        return 0.5 * super().project(layer)

    def latent_of(self, layer: dnw.Layer, effective: torch.Tensor) -> torch.Tensor:
        return 2 * effective


@dataclass(frozen=True)
class Settling(dnw.SET):
    def settle(self, layer: dnw.Layer) -> torch.Tensor:
        return 3 * self.project(layer)


@dataclass(frozen=True)
class Shrinking(dnw.RigL):
    def updated(self, layer: dnw.Layer, stepped: torch.Tensor) -> torch.Tensor:
        return 0.5 * stepped


def test_a_subclass_that_projects_settles_or_updates_keeps_latent_weights():
    nets = [small_net() for _ in range(3)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    rules = (Half(), Settling(every=2), Shrinking(every=2))
    wirings = [dnw.wire(n, o, density=0.2, rule=r) for n, o, r in zip(nets, optimizers, rules, strict=True)]
    for wiring in wirings:
        before = wiring["5.weight"].weight
        wiring.project()
        with wiring.settled():
            pass
        wiring.project()
        assert torch.equal(wiring["5.weight"].weight, before)
    before = wirings[2]["5.weight"].latent
    nets[2][5].weight.grad = torch.zeros(16, 32)
    optimizers[2].step()
    assert torch.equal(wirings[2]["5.weight"].latent, 0.5 * before)


@dataclass(frozen=True)
class Slower(dnw.NoUpdate):
    def gradient(self, layer: dnw.Layer) -> torch.Tensor:
        return torch.where(layer.active, layer.grad, 0.5 * layer.grad)


class Halved:
    def gradient(self, layer: dnw.Layer) -> torch.Tensor:
        return torch.where(layer.active, layer.grad, 0.5 * layer.grad)


@dataclass(frozen=True)
class SlowerBesides(Halved, dnw.NoUpdate):
    """The same gradient from a class beside the rules."""


class WithoutDormant(dnw.Rule):
    needs_dormant_gradient = False


class WithoutDormantAsProperty(dnw.Rule):
    @property
    def needs_dormant_gradient(self) -> bool:
        return False


@pytest.mark.parametrize("base", [WithoutDormant, WithoutDormantAsProperty])
def test_a_flag_of_a_users_rule_holds_for_subclasses_of_their_own_gradient(base):
    rule = type("Mine", (base,), {"gradient": lambda self, layer: 2 * layer.grad})()
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wiring = dnw.wire(net, optimizer, density=0.2, rule=rule)
    before, active = wiring["5.weight"].latent, wiring["5.weight"].active
    train_steps(net, optimizer, range(1))
    assert torch.equal(wiring["5.weight"].latent[~active], before[~active])


@pytest.mark.parametrize("rule", [Slower(), SlowerBesides()], ids=lambda r: type(r).__name__)
def test_a_subclass_of_its_own_gradient_says_what_dormant_edges_get(rule):
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wiring = dnw.wire(net, optimizer, density=0.2, rule=rule)
    before, active = wiring["5.weight"].latent, wiring["5.weight"].active
    F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    grad = net[5].weight.grad.clone()
    optimizer.step()
    expected = before - 0.1 * torch.where(active, grad, 0.5 * grad)
    torch.testing.assert_close(wiring["5.weight"].latent, expected)


@pytest.mark.parametrize("name", ["set", "rigl", "magnitude_pruning", "l1_anneal", "sparse_momentum", "random"])
def test_half_precision_with_wider_latent_weights_has_none_on_dormant_edges(name):
    net = small_net().to(torch.bfloat16)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    wiring = dnw.wire(net, optimizer, density=0.2, rule=RULES[name], latent_dtype=torch.float32)
    for step in range(6):
        images, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(net(images.to(torch.bfloat16)).float(), labels).backward()
        optimizer.step()
        if name != "random":
            assert all(not p.latent[~p.active].any() for p in wiring.values())
        assert exactly_its_edges(wiring)


@pytest.mark.parametrize("rule", [dnw.SET(every=3), dnw.RigL(every=3)], ids=lambda r: type(r).__name__)
def test_an_average_that_comes_and_goes_changes_no_edges(rule):
    net = small_net()
    optimizer = Averaged(net.parameters())
    wiring = dnw.wire(net, optimizer, density=0.2, rule=rule)
    train_steps(net, optimizer, range(6))
    before = {n: p.active for n, p in wiring.items()}
    optimizer.eval()
    assert exactly_its_edges(wiring)
    optimizer.train()
    assert exactly_its_edges(wiring)
    assert all(torch.equal(before[n], p.active) for n, p in wiring.items())


def test_rigl_grows_nothing_where_a_gradient_is_not_a_number():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wiring = dnw.wire(net, optimizer, density=0.2, rule=dnw.RigL(every=1))
    F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    net[5].weight.grad[~wiring["5.weight"].active] = torch.nan
    with pytest.raises(FloatingPointError, match=r"5\.weight"):
        optimizer.step()


@pytest.mark.parametrize("rule", [dnw.SET(), dnw.MagnitudePruning(), dnw.DNW()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("model_first", [True, False])
def test_a_dense_checkpoint_loaded_into_a_wired_model_gives_its_largest_weights(rule, model_first):
    dense = small_net(4)
    other = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9)
    train_steps(dense, other, range(3))
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    wiring = dnw.wire(net, optimizer, density=0.2, rule=rule)
    if model_first:
        net.load_state_dict(dense.state_dict())
    with pytest.warns(UserWarning, match="no latent weights"):
        optimizer.load_state_dict(other.state_dict())
    if not model_first:
        net.load_state_dict(dense.state_dict())
    wiring.project()
    k = wiring["5.weight"].num_active
    (largest,) = dnw.top_k([dense[5].weight.detach()], k, [None])
    assert torch.equal(wiring["5.weight"].active, largest)
    train_steps(net, optimizer, range(2))
    assert exactly_its_edges(wiring)


# --- memory that does not lie in one piece, and other shapes ---


def strided(net: nn.Sequential) -> nn.Sequential:
    """The same network with a convolution in channels_last and a transposed matrix."""
    net[0].to(memory_format=torch.channels_last)
    net[5].weight = nn.Parameter(net[5].weight.detach().t().contiguous().t())
    return net


@pytest.mark.parametrize("rule", [dnw.DNW(), dnw.NoUpdate(), dnw.RandomGraph(), dnw.RigL(every=2), dnw.ST3()], ids=repr)
def test_parameters_that_are_not_contiguous_train_to_the_same(rule):
    nets = [small_net(), strided(small_net())]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9) for net in nets]
    wirings = [dnw.wire(n, o, density=0.2, rule=rule) for n, o in zip(nets, optimizers, strict=True)]
    assert not nets[1][5].weight.is_contiguous()
    for step in range(5):
        losses = [train_steps(n, o, range(step, step + 1)) for n, o in zip(nets, optimizers, strict=True)]
        torch.testing.assert_close(*losses)
    for n in wirings[0]:
        assert torch.equal(wirings[0][n].active, wirings[1][n].active)


class Turned(nn.Module):
    """A weight whose candidates are no contiguous mask."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 20))

    def edge_candidates(self) -> dict[str, torch.Tensor]:
        return {"weight": torch.ones(20, 20, dtype=torch.bool).triu(1).t()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.tril(-1).T


def test_candidates_that_are_not_contiguous():
    torch.manual_seed(0)
    net = Turned()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wiring = dnw.wire(net, optimizer, density=0.2)
    for _ in range(4):
        optimizer.zero_grad()
        net(torch.randn(3, 20)).square().sum().backward()
        optimizer.step()
    active = wiring["weight"].active
    assert not (active & ~wiring["weight"].candidates).any()
    assert int(active.sum()) == wiring["weight"].num_active == 38


@pytest.mark.parametrize("rule", [dnw.DNW(), dnw.RandomGraph()], ids=lambda r: type(r).__name__)
def test_a_parameter_without_dimensions(rule):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

    net = Scaled()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wiring = dnw.wire(net, optimizer, density=1.0, rule=rule, include="scale")
    net.scale.square().backward()
    optimizer.step()
    torch.testing.assert_close(wiring["scale"].weight, torch.tensor(1.6))


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_gradient_that_can_be_differentiated_is_masked():
    net = small_net().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wiring = dnw.wire(net, optimizer, density=0.2, rule=dnw.RandomGraph())
    for step in range(2):
        optimizer.zero_grad()
        images, labels = batch(step)
        F.cross_entropy(net(images.double()), labels).backward(create_graph=True)
        optimizer.step()
        for p in net.parameters():
            p.grad = None
    assert wiring.step == 2
    assert exactly_its_edges(wiring)


def test_sparse_momentum_keeps_an_edge_for_each_target():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    rule = dnw.SparseMomentum(every=1, fraction=0.9)
    wiring = dnw.wire(net, optimizer, density=0.07, rule=rule, floor=dnw.Floor(per_target=1))
    for step in range(5):
        train_steps(net, optimizer, range(step, step + 1))
        assert all(bool(p.active.flatten(1).any(1).all()) for p in wiring.values())


def test_a_frozen_mask_without_edges_for_a_target_is_refused_under_a_weight_norm():
    net = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    (name,) = [n for n, p in net.named_parameters() if n.endswith("original1")]
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(ValueError, match="leave a target without any"):
        dnw.wire(net, torch.optim.SGD(net.parameters(), lr=0.1), rule=dnw.Frozen({name: mask}), include=name)


# --- several optimizers and wirings ---


def test_a_second_optimizer_is_refused_after_a_step_that_failed():
    net = small_net()
    first = torch.optim.SGD(net.parameters(), lr=0.1)
    dnw.wire(net, first, density=0.2)

    def fail(*_: object) -> None:
        raise InterruptedError

    handle = first.register_step_post_hook(fail)
    first._optimizer_step_post_hooks.move_to_end(handle.id, last=False)
    F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    with pytest.raises(InterruptedError):
        first.step()
    with pytest.raises(RuntimeError, match="wired to another optimizer"):
        torch.optim.SGD(net.parameters(), lr=0.1).step()


@pytest.mark.parametrize("first_goes", [True, False])
def test_of_two_wirings_on_an_averaging_optimizer_one_comes_off(first_goes):
    net = small_net()
    optimizer = Averaged(net.parameters())
    wirings = [dnw.wire(net, optimizer, density=0.2, include=name) for name in ("0", "5")]
    train_steps(net, optimizer, range(2))
    gone, stays = wirings if first_goes else wirings[::-1]
    gone.remove()
    optimizer.eval()
    assert exactly_its_edges(stays)
    optimizer.train()
    train_steps(net, optimizer, range(2, 4))
    assert exactly_its_edges(stays)
    stays.remove()
    train_steps(net, optimizer, range(4, 5))


def test_a_network_without_latent_weights_is_the_masked_network():
    """A random graph trains as the same network with its mask in the forward pass and no gradient elsewhere."""
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-2)
    wiring = dnw.wire(net, optimizer, density=0.2, rule=dnw.RandomGraph())
    textbook = MaskInForward(copy.deepcopy(net), {n: p.num_active for n, p in wiring.items()})
    masks = {n: p.active for n, p in wiring.items()}
    textbook.mask = masks.__getitem__  # type: ignore[method-assign]
    theirs = torch.optim.SGD(textbook.net.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-2)
    for step in range(8):
        images, labels = batch(step)
        losses = []
        for model, base in ((net, optimizer), (textbook, theirs)):
            base.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            if model is textbook:
                for n, mask in masks.items():
                    textbook.net.get_parameter(n).grad.mul_(mask)
            base.step()
            losses.append(loss.item())
        assert losses[0] == losses[1]
