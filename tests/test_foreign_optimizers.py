"""Optimizers of others: those that write to parameters beside ``step``, wrap another one, or evaluate a closure again."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from helpers import MaskInForward, batch, small_net, train_steps
from torch import nn

import dnw


class Textbook(MaskInForward):
    """Mask in the forward pass, with the edges held while a step is in progress."""

    held: dict[str, torch.Tensor] | None = None

    def mask(self, name: str) -> torch.Tensor:
        return super().mask(name) if self.held is None else self.held[name]

    def hold(self) -> None:
        self.held = None
        self.held = {name: self.mask(name) for name in self.k}

    def release(self) -> None:
        self.held = None


def pair(make) -> tuple:
    """A wired network and the textbook form of it, each with its optimizer."""
    net = small_net()
    optimizer = make(net.parameters())
    wiring = dnw.wire(net, optimizer, density=0.2)
    textbook = Textbook(small_net(), {n: wiring[n].num_active for n in wiring})
    return net, optimizer, wiring, textbook, make(textbook.net.parameters())


def is_sparse(wiring: dnw.Wiring) -> bool:
    return all(not p.weight[~p.active].any() and int(p.active.sum()) == p.num_active for p in wiring.values())


def same(wiring: dnw.Wiring, textbook: Textbook) -> bool:
    return all(
        torch.equal(wiring[n].latent, textbook.net.get_parameter(n)) and torch.equal(wiring[n].active, textbook.mask(n))
        for n in wiring
    )


def backward(net: nn.Module, step: int) -> float:
    images, labels = batch(step)
    loss = F.cross_entropy(net(images), labels)
    loss.backward()
    return loss.item()


def closure_of(net: nn.Module, optimizer: torch.optim.Optimizer, step: int):
    """What evaluates a network and its gradients anew, as often as the optimizer likes."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        images, labels = batch(step)
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        return loss

    return closure


# --- averages: eval() and train() exchange parameters and their average ---


class Averaged(torch.optim.Optimizer):
    """Steps a second sequence z, trains at a point between z and its average x, evaluates at x."""

    def __init__(self, params, lr=0.3, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "steps": 0, "train_mode": True})

    def interpolate(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] == train:
                continue
            group["train_mode"] = train
            for p in group["params"]:
                if "z" in self.state[p]:
                    weight = 1 - group["beta"] if train else 1 - 1 / group["beta"]
                    with torch.no_grad():
                        p.lerp_(self.state[p]["z"], weight)

    def eval(self):
        self.interpolate(False)

    def train(self):
        self.interpolate(True)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"]
            group["steps"] += 1
            share = 1 / group["steps"]
            for p in (p for p in group["params"] if p.grad is not None):
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, 1 - 1 / group["beta"])  # to x
                z.sub_(p.grad, alpha=group["lr"])
                p.lerp_(z, share)
                p.lerp_(z, 1 - group["beta"])  # to where the next gradient is computed


def test_an_average_takes_the_place_of_latent_weights_for_a_while():
    net, optimizer, wiring, textbook, theirs = pair(Averaged)
    for step in range(12):
        assert train_steps(net, optimizer, range(step, step + 1)) == train_steps(textbook, theirs, range(step, step + 1))
        if step % 4 == 3:
            optimizer.eval()
            theirs.eval()
            assert is_sparse(wiring)
            images, _ = batch(100)
            assert torch.equal(net(images), textbook(images))
            optimizer.train()
            theirs.train()
            assert is_sparse(wiring)
        assert same(wiring, textbook)
    assert wiring.step == 12


def test_an_average_is_saved_and_loaded_while_it_is_in_place():
    net, optimizer, wiring, *_ = pair(Averaged)
    train_steps(net, optimizer, range(5))
    optimizer.eval()
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    other, other_optimizer, other_wiring, *_ = pair(Averaged)
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    for each in (optimizer, other_optimizer):
        each.train()
    assert train_steps(net, optimizer, range(5, 9)) == train_steps(other, other_optimizer, range(5, 9))
    assert all(torch.equal(wiring[n].latent, other_wiring[n].latent) for n in wiring)


@pytest.mark.parametrize(
    "rule", [dnw.RandomGraph(), dnw.SET(every=3), dnw.ST3(), dnw.TopKAST()], ids=lambda r: type(r).__name__
)
def test_averages_under_other_rules(rule):
    net = small_net()
    optimizer = Averaged(net.parameters())
    wiring = dnw.wire(net, optimizer, density=0.2, rule=rule)
    for step in range(8):
        train_steps(net, optimizer, range(step, step + 1))
        optimizer.eval()
        assert is_sparse(wiring)
        optimizer.train()
        assert is_sparse(wiring)


# --- steps in parts, with gradients computed anew between them ---


class Sharpness(torch.optim.Optimizer):
    """Climbs along the gradient first, and steps with the gradient found there."""

    def __init__(self, params, rho=0.5, lr=0.2):
        super().__init__(params, {"rho": rho})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in found]).norm()
        for p in found:
            self.state[p]["before"] = p.clone()
            p.add_(p.grad * (self.param_groups[0]["rho"] / norm))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.data = self.state[p]["before"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        self.first_step(zero_grad=True)
        torch.enable_grad()(closure)()
        self.second_step()


@pytest.mark.parametrize("questions", [False, True])
def test_a_step_in_two_parts_equals_masks_in_the_forward_pass(questions):
    net, optimizer, wiring, textbook, theirs = pair(Sharpness)
    for step in range(10):
        losses = []
        for model, base in ((net, optimizer), (textbook, theirs)):
            base.zero_grad()
            before = backward(model, step)
            if model is textbook:
                textbook.hold()
            base.first_step(zero_grad=True)
            if model is net:
                assert is_sparse(wiring)
            if questions and model is net:
                assert wiring.step == step
                wiring.summary()
            after = backward(model, step)
            base.second_step(zero_grad=True)
            losses.append((before, after))
        assert losses[0] == losses[1]
        textbook.release()
        assert is_sparse(wiring)
        assert same(wiring, textbook)
    assert wiring.step == 10


def test_a_step_in_two_parts_through_a_closure():
    net, optimizer, wiring, textbook, theirs = pair(Sharpness)
    for step in range(10):
        for model, base in ((net, optimizer), (textbook, theirs)):
            base.zero_grad()
            backward(model, step)
            if model is textbook:
                textbook.hold()

            def closure(model=model, step=step):
                return backward(model, step)

            base.step(closure)
        textbook.release()
        assert is_sparse(wiring)
        assert same(wiring, textbook)
    assert wiring.step == 10


def test_a_step_whose_second_part_never_comes_is_forgotten():
    net, optimizer, wiring, *_ = pair(Sharpness)
    twin, its_optimizer, its_wiring, *_ = pair(Sharpness)
    for model, base in ((net, optimizer), (twin, its_optimizer)):
        backward(model, 0)
        if model is net:
            base.first_step()
        base.first_step(zero_grad=True)
        backward(model, 0)
        base.second_step(zero_grad=True)
    assert wiring.step == its_wiring.step == 1
    assert is_sparse(wiring)


# --- closures that are evaluated again, or after something was written ---


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_equals_masks_in_the_forward_pass(search):
    def make(parameters):
        return torch.optim.LBFGS(parameters, lr=0.3, max_iter=4, line_search_fn=search)

    net, optimizer, wiring, textbook, theirs = pair(make)
    for step in range(6):
        losses = []
        for model, base in ((net, optimizer), (textbook, theirs)):
            textbook.hold()
            losses.append(base.step(closure_of(model, base, step)).item())
        textbook.release()
        assert losses[0] == losses[1]
        assert is_sparse(wiring)
        assert same(wiring, textbook)


class MovesFirst(torch.optim.Optimizer):
    """Moves along its momentum before it evaluates its closure."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        found = [p for group in self.param_groups for p in group["params"]]
        for p in found:
            p.sub_(self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)), alpha=0.05)
        loss = torch.enable_grad()(closure)()
        for p in (p for p in found if p.grad is not None):
            self.state[p]["momentum_buffer"].mul_(0.9).add_(p.grad)
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
        return loss


def test_an_optimizer_that_moves_before_it_evaluates_its_closure():
    net, optimizer, wiring, textbook, theirs = pair(MovesFirst)
    for step in range(10):
        losses = []
        for model, base in ((net, optimizer), (textbook, theirs)):
            textbook.hold()
            losses.append(base.step(closure_of(model, base, step)).item())
        textbook.release()
        assert losses[0] == losses[1]
        assert same(wiring, textbook)
    assert is_sparse(wiring)


def test_a_closure_that_raises_leaves_everything_as_it_was():
    net, optimizer, wiring, *_ = pair(MovesFirst)
    train = {"loss": 0}

    def closure():
        optimizer.zero_grad()
        backward(net, 0)
        train["loss"] += 1
        if train["loss"] == 3:
            raise InterruptedError
        return torch.zeros(())

    optimizer.step(closure)
    optimizer.step(closure)
    before = wiring["5.weight"].latent
    with pytest.raises(InterruptedError):
        optimizer.step(closure)
    assert torch.equal(wiring["5.weight"].latent, before)
    assert is_sparse(wiring)
    assert wiring.step == 2


# --- optimizers around others ---


class Slow(torch.optim.Optimizer):
    """Every few steps of the optimizer inside, goes half of the way from slow copies; no constructor of the base class."""

    def __init__(self, inner, every=3):
        self.inner, self.every, self.count = inner, every, 0
        self.param_groups, self.defaults = inner.param_groups, inner.defaults
        self.slow = {p: p.detach().clone() for g in inner.param_groups for p in g["params"]}

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        self.count += 1
        if self.count % self.every == 0:
            for p, slow in self.slow.items():
                slow.lerp_(p, 0.5)
                p.copy_(slow)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    def state_dict(self):
        return {"inner": self.inner.state_dict()}


class SlowWithHooks(Slow):
    """The same with the constructor of the base class, which makes its step run hooks."""

    def __init__(self, inner):
        torch.optim.Optimizer.__init__(self, [p for g in inner.param_groups for p in g["params"]], {})
        super().__init__(inner)

    def step(self, closure=None):
        super().step()


@pytest.mark.parametrize("kind", [Slow, SlowWithHooks])
def test_an_optimizer_around_another_steps_latent_weights(kind):
    def make(parameters):
        return kind(torch.optim.SGD(parameters, lr=0.3, momentum=0.9))

    net, optimizer, wiring, textbook, theirs = pair(make)
    for step in range(12):
        assert train_steps(net, optimizer, range(step, step + 1)) == train_steps(textbook, theirs, range(step, step + 1))
        assert is_sparse(wiring)
        assert same(wiring, textbook)
    assert wiring.step == 12
    assert "latent" in optimizer.state_dict()["inner"]["state"][0]
    wiring.remove()
    assert vars(optimizer).get("_optimizer_step_pre_hooks", OrderedDict()) == OrderedDict()
    train_steps(net, optimizer, range(1))


class Loading(torch.optim.SGD):
    """Loads its state in a way of its own, which runs no hooks and casts what it finds."""

    def load_state_dict(self, state_dict):
        flat = [p for g in self.param_groups for p in g["params"]]
        for key, entry in state_dict["state"].items():
            self.state[flat[key]] = {k: v.to(flat[key].dtype) for k, v in entry.items()}
        return self


def test_a_state_loaded_without_hooks_continues():
    def make():
        net = small_net()
        optimizer = Loading(net.parameters(), lr=0.3, momentum=0.9)
        return net, optimizer, dnw.wire(net, optimizer, density=0.2)

    net, optimizer, wiring = make()
    train_steps(net, optimizer, range(3))
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    other, other_optimizer, other_wiring = make()
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    assert other_wiring.step == 3
    assert train_steps(net, optimizer, range(3, 7)) == train_steps(other, other_optimizer, range(3, 7))
    assert all(torch.equal(wiring[n].latent, other_wiring[n].latent) for n in wiring)


class Curvature(torch.optim.Optimizer):
    """Divides by the squares of Hessian-vector products, for which it differentiates through the gradient."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        ones = [torch.ones_like(p) for p in found]
        products = torch.autograd.grad([p.grad for p in found], found, grad_outputs=ones, retain_graph=True)
        with torch.no_grad():
            for p, product in zip(found, products, strict=True):
                p.sub_(p.grad / (product.abs() + 1), alpha=self.param_groups[0]["lr"])


@pytest.mark.filterwarnings("ignore:Using backward")
def test_an_optimizer_that_differentiates_through_the_gradient():
    net, optimizer, wiring, textbook, theirs = pair(Curvature)
    for step in range(6):
        losses = []
        for model, base in ((net, optimizer), (textbook, theirs)):
            base.zero_grad()
            images, labels = batch(step)
            loss = F.cross_entropy(model(images), labels)
            loss.backward(create_graph=True)
            base.step()
            losses.append(loss.item())
            for p in model.parameters():
                p.grad = None
        assert losses[0] == losses[1]
        assert is_sparse(wiring)


@pytest.mark.parametrize("method", ["fused_backward", "sampled_params"])
def test_optimizers_that_write_where_no_wiring_can_be_are_refused(method):
    net = small_net()
    optimizer = type("Odd", (torch.optim.SGD,), {method: lambda self: None})(net.parameters(), lr=0.1)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"^Odd .*; take one that"):
        dnw.wire(net, optimizer, density=0.2)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


def test_a_state_whose_entries_are_no_dictionaries_is_saved():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.state["count"] = 3
    dnw.wire(net, optimizer, density=0.2)
    train_steps(net, optimizer, range(1))
    assert optimizer.state_dict()["state"]["count"] == 3


def test_methods_are_given_back():
    net = small_net()
    optimizer = Averaged(net.parameters())
    wiring = dnw.wire(net, optimizer, density=0.2)
    assert "eval" in vars(optimizer)
    wiring.remove()
    assert not {"eval", "train", "step"} & set(vars(optimizer))
    copied = copy.deepcopy((net, optimizer))
    train_steps(*copied, range(1))
