"""Every optimizer of torch.optim: the paper's algorithm bit for bit, resumed bit for bit; and the policy for dormant edges."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import OPTIMIZERS, MaskInForward, batch, small_net, train_steps
from torch import nn

import dnw


def matrices() -> nn.Sequential:
    """Matrices alone, which is all that Muon takes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))


def net_for(name: str) -> nn.Sequential:
    return matrices() if name == "muon" else small_net()


def test_every_optimizer_is_here():
    """SparseAdam takes sparse gradients only, which no wired parameter has; LBFGS is among those that evaluate again."""
    known = {n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)}
    assert known - {"Optimizer", "SparseAdam", "LBFGS"} == {make.func.__name__ for make in OPTIMIZERS.values()}


@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_mask_in_forward_bit_for_bit(name, closure):
    model = net_for(name)
    optimizer = OPTIMIZERS[name](model.parameters())
    wiring = dnw.wire(model, optimizer, density=0.2)
    textbook = MaskInForward(net_for(name), {n: wiring[n].num_active for n in wiring})
    theirs = OPTIMIZERS[name](textbook.parameters())

    def train(net: nn.Module, base: torch.optim.Optimizer, number: int) -> float:
        images, labels = batch(number)

        def loss() -> torch.Tensor:
            base.zero_grad()
            value = F.cross_entropy(net(images), labels)
            value.backward()
            return value

        if closure:
            return base.step(loss).item()
        value = loss()
        base.step()
        return value.item()

    for step in range(15):
        assert train(model, optimizer, step) == train(textbook, theirs, step)
    for n in wiring:
        assert torch.equal(wiring[n].latent, textbook.net.get_parameter(n))
        assert torch.equal(wiring[n].active, textbook.mask(n))


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_bit_exact(name, at):
    model = net_for(name)
    optimizer = OPTIMIZERS[name](model.parameters())
    wiring = dnw.wire(model, optimizer, density=0.2)
    train_steps(model, optimizer, range(at))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = net_for(name)
    other_optimizer = OPTIMIZERS[name](other.parameters())
    other_wiring = dnw.wire(other, other_optimizer, density=0.2)
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    assert train_steps(model, optimizer, range(at, at + 4)) == train_steps(other, other_optimizer, range(at, at + 4))
    assert all(torch.equal(wiring[n].latent, other_wiring[n].latent) for n in wiring)


# --- parameter groups ---


def test_parameters_added_later_stay_dense_until_wired():
    model, late = small_net(), nn.Linear(32, 8, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    wiring = dnw.wire(model, optimizer, density=0.2)
    train_steps(model, optimizer, range(2))
    optimizer.add_param_group({"params": late.parameters(), "lr": 0.1})
    before = late.weight.detach().clone()
    late(torch.ones(1, 32)).sum().backward()
    train_steps(model, optimizer, range(2, 4))  # zero_grad cleared it: no update yet
    assert torch.equal(late.weight, before)
    second = dnw.wire(late, optimizer, density=0.25)
    late(torch.ones(1, 32)).sum().backward()
    optimizer.step()
    assert (wiring.step, second.step, second["weight"].num_active) == (5, 1, 64)
    assert not late.weight[~second["weight"].active].any()
    state = copy.deepcopy(optimizer.state_dict())

    other, other_late = small_net(1), nn.Linear(32, 8, bias=False)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.01)
    other_wiring = dnw.wire(other, other_optimizer, density=0.2)
    other_optimizer.add_param_group({"params": other_late.parameters(), "lr": 0.1})
    other_second = dnw.wire(other_late, other_optimizer, density=0.25)
    other_optimizer.load_state_dict(state)
    assert torch.equal(second["weight"].latent, other_second["weight"].latent)
    assert torch.equal(wiring["5.weight"].latent, other_wiring["5.weight"].latent)


def test_one_parameter_in_two_optimizers():
    model = small_net()
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    second = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, first, density=0.2)
    with pytest.raises(ValueError, match=r"'0.weight' is wired already; take that wiring off"):
        dnw.wire(model, second, density=0.2)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    before, weight = wiring["5.weight"].latent, model[5].weight.detach().clone()
    with pytest.raises(RuntimeError, match="wired to another optimizer"):
        second.step()
    assert torch.equal(model[5].weight, weight)
    assert torch.equal(wiring["5.weight"].latent, before)


# --- dormant edges ---

MOMENTUM = {"momentum": "momentum_buffer", "adamw": "exp_avg", "rmsprop": "momentum_buffer", "muon": "momentum_buffer"}


def literal(dormant: dnw.Dormant | None, **options: float) -> tuple[nn.Linear, torch.optim.SGD, dnw.Wiring]:
    """One edge active, one dormant; every step sends a gradient of 1 to both."""
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[8.0, 4.0]]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, **options)
    return layer, optimizer, dnw.wire(layer, optimizer, num_edges=1, dormant=dormant)


def push(layer: nn.Linear, optimizer: torch.optim.SGD, gradient: list[float]) -> None:
    optimizer.zero_grad()
    layer(torch.tensor([gradient])).sum().backward()
    optimizer.step()


def test_weight_decay_of_dormant_edges_literally():
    for dormant, expected in ((None, [3.0, 1.0]), (dnw.Dormant(weight_decay=False), [3.0, 3.0])):
        layer, optimizer, wiring = literal(dormant, weight_decay=0.5)
        push(layer, optimizer, [1.0, 1.0])  # 8 - 1 - 4; 4 - 1 - 2 or 4 - 1
        assert wiring["weight"].latent.tolist() == [expected]
    assert wiring["weight"].active.tolist() == [[True, False]]  # a tie: the lower index


@pytest.mark.parametrize("momentum", ["update", "hold", "zero"])
def test_momentum_of_dormant_edges_literally(momentum):
    layer, optimizer, wiring = literal(dnw.Dormant(momentum=momentum), momentum=0.5)
    push(layer, optimizer, [1.0, 1.0])  # 7, 3
    push(layer, optimizer, [1.0, -1.0])  # active: 7 - 1.5; dormant: momentum 0.5 - 1, or -1
    expected = {"update": [5.5, 3.5], "hold": [5.5, 4.0], "zero": [5.5, 4.0]}[momentum]
    assert wiring["weight"].latent.tolist() == [expected]
    buffer = optimizer.state[layer.weight]["momentum_buffer"].tolist()
    assert buffer == {"update": [[1.5, -0.5]], "hold": [[1.5, 0.0]], "zero": [[1.5, 0.0]]}[momentum]
    push(layer, optimizer, [5.0, 0.0])  # 5.5 - 5.75: the edges change places
    assert wiring["weight"].active.tolist() == [[False, True]]
    buffer = optimizer.state[layer.weight]["momentum_buffer"].tolist()
    assert buffer == {"update": [[5.75, -0.25]], "hold": [[5.75, 0.0]], "zero": [[0.0, 0.0]]}[momentum]
    push(layer, optimizer, [1.0, 1.0])
    buffer = optimizer.state[layer.weight]["momentum_buffer"].tolist()
    assert buffer[0][0] == {"update": 3.875, "hold": 5.75, "zero": 0.0}[momentum]


@pytest.mark.parametrize("name", [n for n in MOMENTUM if n in OPTIMIZERS])
@pytest.mark.parametrize("momentum", ["hold", "zero"])
def test_momentum_policy_with_other_optimizers(name, momentum):
    model = net_for(name)
    optimizer = OPTIMIZERS[name](model.parameters())
    wiring = dnw.wire(model, optimizer, density=0.2, dormant=dnw.Dormant(momentum=momentum))
    for step in range(4):
        before = {n: (p.active, optimizer.state[p._layer.parameter].get(MOMENTUM[name])) for n, p in wiring.items()}
        before = {n: (active, None if m is None else m.clone()) for n, (active, m) in before.items()}
        train_steps(model, optimizer, range(step, step + 1))
        for n, parameter in wiring.items():
            now = optimizer.state[parameter._layer.parameter][MOMENTUM[name]]
            active, earlier = before[n]
            if momentum == "zero":
                assert not now[~parameter.active].any()
            else:
                held = torch.zeros_like(now) if earlier is None else earlier
                assert torch.equal(now[~active], held[~active])
            assert now[active & parameter.active].any()


@pytest.mark.parametrize("name", ["momentum", "adamw", "adam_fused", "nadam", "rmsprop"])
def test_without_decay_dormant_weights_move_by_their_update_alone(name):
    results = []
    for decay in (0.3, 0.0):
        model = small_net()
        optimizer = OPTIMIZERS[name](model.parameters(), weight_decay=decay)
        wiring = dnw.wire(model, optimizer, density=0.2, dormant=dnw.Dormant(weight_decay=False))
        active = {n: p.active for n, p in wiring.items()}
        train_steps(model, optimizer, range(1))
        results.append(wiring)
    first, second = results
    for n in first:
        dormant = ~active[n]
        torch.testing.assert_close(first[n].latent[dormant], second[n].latent[dormant], rtol=1e-6, atol=1e-7)
        assert not torch.equal(first[n].latent, second[n].latent)


def test_policies_resume_and_copy():
    policy = dnw.Dormant(weight_decay=False, momentum="hold")

    def make_one(seed: int) -> tuple:
        model = small_net(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        return model, optimizer, dnw.wire(model, optimizer, density=0.2, dormant=policy)

    model, optimizer, wiring = make_one(0)
    train_steps(model, optimizer, range(3))
    copied = copy.deepcopy((model, optimizer, wiring))
    loaded = make_one(1)
    loaded[0].load_state_dict(model.state_dict())
    loaded[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in ((model, optimizer, wiring), copied, loaded):
        train_steps(each[0], each[1], range(3, 6))
        assert each[2].dormant == policy
        assert all(torch.equal(each[2][n].latent, wiring[n].latent) for n in wiring)


def test_bad_policies():
    with pytest.raises(ValueError, match="momentum='reset'; allowed are 'update', 'hold' and 'zero'"):
        dnw.Dormant(momentum="reset")
    model = small_net()
    with pytest.raises(ValueError, match=r"dormant: expected dnw.Dormant\(...\), got 'zero'"):
        dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), 0.1, dormant="zero")


def test_a_policy_without_effect_warns():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dnw.wire(model, optimizer, 0.1, dormant=dnw.Dormant(momentum="zero"))
    with pytest.warns(UserWarning, match="momentum='zero' has no effect, because SGD keeps no momentum"):
        train_steps(model, optimizer, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_steps(model, optimizer, range(2))


# --- what surrounds a step ---


def test_gradient_clipping_counts_the_gradients_of_dormant_edges():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, optimizer, density=0.2)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    norms = [p.grad.norm() for p in model.parameters()]
    dormant = wiring["5.weight"].latent.new_tensor([model[5].weight.grad[~wiring["5.weight"].active].norm()])
    assert dormant > 0
    total = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    torch.testing.assert_close(total, torch.stack(norms).norm())
    before = wiring["5.weight"].latent
    clipped = model[5].weight.grad.clone()
    optimizer.step()
    assert torch.equal(wiring["5.weight"].latent, before - 0.1 * clipped)


def test_hooks_registered_after_wiring_see_latent_weights_and_those_before_it_effective_ones():
    model = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(int(model.weight.count_nonzero())))
    dnw.wire(model, optimizer, density=0.25)
    optimizer.register_step_pre_hook(lambda *_: seen.append(int(model.weight.count_nonzero())))
    optimizer.register_step_post_hook(lambda *_: seen.append(int(model.weight.count_nonzero())))
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    assert seen == [8, 32, 8]
