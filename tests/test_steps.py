"""What may go on around a step: questions of other threads, gradients that are not finite, other optimizers, other layers."""

import copy
import io
import sys
import threading
from pathlib import Path
from types import FrameType

import pytest
import torch
import torch.nn.functional as F
from helpers import batch, small_net, train_steps
from torch import nn

import dnw
from dnw._wiring.step import OpenStep

# --- other threads ---


def test_questions_of_other_threads_do_not_disturb_training():
    alone, asked = small_net(), small_net()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9) for net in (alone, asked)]
    wirings = [dnw.wire(net, base, density=0.2) for net, base in zip((alone, asked), optimizers, strict=True)]
    done, errors, questions = threading.Event(), [], []

    def ask() -> None:
        try:
            while not done.is_set():
                for parameter in wirings[1].values():
                    assert int(parameter.active.sum()) == parameter.num_active
                    assert torch.isfinite(parameter.latent).all()
                    assert int(parameter.weight.count_nonzero()) <= parameter.num_active
                assert wirings[1].summary().active == wirings[1].num_active
                questions.append(1)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        losses = train_steps(asked, optimizers[1], range(60))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert questions
    assert losses == train_steps(alone, optimizers[0], range(60))
    assert wirings[1].step == 60


class Waiting(torch.optim.SGD):
    """Waits in the middle of its step, after it has written to the parameters."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.inside, self.go_on = threading.Event(), threading.Event()

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        self.inside.set()
        assert self.go_on.wait(20)


def test_answers_in_the_middle_of_another_threads_step_are_those_before_it():
    net = small_net()
    optimizer = Waiting(net.parameters(), lr=0.3)
    wiring = dnw.wire(net, optimizer, density=0.2)
    before = {n: (p.latent, p.active, p.weight) for n, p in wiring.items()}
    F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    assert optimizer.inside.wait(20)
    for name, values in before.items():
        now = wiring[name].latent, wiring[name].active, wiring[name].weight
        assert all(torch.equal(a, b) for a, b in zip(values, now, strict=True))
    with pytest.raises(RuntimeError, match=r"in the middle of optimizer\.step\(\)"):
        wiring.project()
    with pytest.raises(RuntimeError, match="two threads at once"):
        optimizer.step()
    optimizer.go_on.set()
    thread.join()
    assert wiring.step == 1
    assert not torch.equal(wiring["0.weight"].latent, before["0.weight"][0])


def test_a_step_that_failed_in_another_thread_is_rolled_back():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    wiring = dnw.wire(net, optimizer, density=0.2)
    before = wiring["0.weight"].latent
    F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()

    def fail(*_: object) -> None:
        raise InterruptedError

    handle = optimizer.register_step_post_hook(fail)
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # before the wiring's own
    failed = []

    def step() -> None:
        try:
            optimizer.step()
        except InterruptedError as error:
            failed.append(error)

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    handle.remove()
    assert failed
    assert torch.equal(wiring["0.weight"].latent, before)
    assert int(net[0].weight.count_nonzero()) == wiring["0.weight"].num_active


# --- numbers that are not finite ---


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rule", [dnw.DNW(), dnw.RandomGraph(), dnw.RigL(every=1)], ids=lambda r: type(r).__name__)
def test_a_gradient_that_is_not_finite_is_refused_and_nothing_changes(bad, rule):
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    wiring = dnw.wire(net, optimizer, density=0.2, rule=rule)
    train_steps(net, optimizer, range(2))
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    net[5].weight.grad[3, 4] = bad
    with pytest.raises(FloatingPointError, match=r"gradient of '5\.weight' has 1 entries that are NaN or infinite"):
        optimizer.step()
    after = net.state_dict(), optimizer.state_dict()
    buffers = [io.BytesIO(), io.BytesIO()]
    for state, buffer in zip((before, after), buffers, strict=True):
        torch.save(state, buffer)
    assert wiring.step == 2
    for ours, theirs in zip(before[1]["state"].values(), after[1]["state"].values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True))
    train_steps(net, optimizer, range(2, 4))
    assert wiring.step == 4


def test_large_finite_gradients_pass():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-38)
    wiring = dnw.wire(net, optimizer, density=0.2)
    train_steps(net, optimizer, range(1))
    net[5].weight.grad.fill_(3e38)  # their sum is infinite
    optimizer.step()
    assert wiring.step == 2


def test_latents_that_are_not_finite_are_not_saved():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    dnw.wire(net, optimizer, density=0.2, check_finite=False)
    train_steps(net, optimizer, range(1))
    net[5].weight.grad[0, 0] = torch.nan
    optimizer.step()
    with pytest.raises(ValueError, match=r"5\.weight \(latent\).*not finite"):
        optimizer.state_dict()


# --- other layers, other optimizers ---


def test_a_layer_replaced_after_wiring_is_noticed():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wiring = dnw.wire(net, optimizer, density=0.2)
    net[7] = nn.Linear(16, 4)
    with pytest.warns(UserWarning, match=r"other parameters in the place of '7\.weight'"):
        wiring.summary()
    with pytest.warns(UserWarning, match="train dense"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match=r"'7\.weight'.*wiring\.remove\(\) and wire again"):
        train_steps(net, optimizer, range(1))
    wiring.remove()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    again = dnw.wire(net, optimizer, density=0.2)
    train_steps(net, optimizer, range(1))
    assert int(net[7].weight.count_nonzero()) == again["7.weight"].num_active


def test_a_parameter_replaced_in_its_layer_is_noticed():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    dnw.wire(net, optimizer, density=0.2)
    net[5].weight = nn.Parameter(torch.zeros(16, 32))
    with pytest.raises(RuntimeError, match=r"other parameters in the place of '5\.weight'"):
        train_steps(net, optimizer, range(1))


class Adapted(nn.Module):
    """A layer inside another, as adapters are put around one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_a_layer_that_moved_within_its_model_stays_wired():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wiring = dnw.wire(net, optimizer, density=0.2)
    net[7] = Adapted(net[7])
    train_steps(net, optimizer, range(2))
    assert (wiring.step, int(net[7].inner.weight.count_nonzero())) == (2, wiring["7.weight"].num_active)


def test_another_optimizer_that_steps_wired_parameters_is_refused():
    net = small_net()
    first = torch.optim.SGD(net.parameters(), lr=0.1)
    wiring = dnw.wire(net, first, density=0.2, include=["0", "5"])
    second = torch.optim.Adam(net.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="this Adam steps 2 parameters that are wired to another optimizer"):
        train_steps(net, second, range(1))
    assert int(net[0].weight.count_nonzero()) == wiring["0.weight"].num_active
    others = torch.optim.Adam(net[7].parameters(), lr=0.1)  # of parameters that are not wired
    train_steps(net, others, range(1))
    wiring.remove()
    train_steps(net, second, range(1))


def test_another_optimizer_may_follow_one_that_is_gone():
    net = small_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    dnw.wire(net, optimizer, density=0.2)
    train_steps(net, optimizer, range(1))
    del optimizer
    train_steps(net, torch.optim.Adam(net.parameters(), lr=0.1), range(1))
    assert net[5].weight.count_nonzero() > dnw.num_edges(0.2, net[5].weight.numel())


def test_another_optimizer_may_be_compiled_beside_a_wiring():
    net, other = small_net(), nn.Linear(4, 4)
    dnw.wire(net, torch.optim.SGD(net.parameters(), lr=0.1), density=0.2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 4)).sum().backward()
    before = other.weight.detach().clone()
    torch.compile(optimizer.step, backend="eager")()
    torch.testing.assert_close(other.weight.detach(), before - 0.1)


# --- interrupts ---


class Interrupting:
    """Interrupts at the n-th line of the core that is run while a step is taken over; counts them."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.lines = at, 0

    def __enter__(self) -> "Interrupting":
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def trace(self, frame: FrameType, event: str, _: object) -> object:
        code = frame.f_code
        if event == "call":
            inside = Path(code.co_filename).parent.name in ("_wiring", "_selection", "_rules")
            return self.trace if inside and (code.co_name == "after_step" or is_taken_over(frame)) else None
        if event == "line" and (code.co_name != "after_step" or is_finished(frame)):
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self.trace


def is_taken_over(frame: FrameType | None) -> bool:
    """Whether a frame is in the taking over of a step."""
    while frame is not None:
        if frame.f_code is OpenStep.finish.__code__:
            return True
        frame = frame.f_back
    return False


def is_finished(frame: FrameType) -> bool:
    """Whether a frame of the hook after a step knows what the optimizer has made."""
    return bool(getattr(frame.f_locals.get("step"), "results", ()))


BROKEN = {
    "dnw": (dnw.DNW(), 0.2),
    "global": (dnw.DNW(), dnw.Global(0.2)),
    "candidates of a common budget": (dnw.NoUpdate(), dnw.Global(0.3)),
    "random": (dnw.RandomGraph(), 0.2),
    "rigl": (dnw.RigL(every=2), 0.2),
    "st3": (dnw.ST3(), 0.2),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_interrupt_anywhere_while_a_step_is_taken_over_finishes_it_later(name):
    rule, density = BROKEN[name]

    def make() -> tuple:
        net = small_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
        wiring = dnw.wire(net, optimizer, density, rule=rule)
        train_steps(net, optimizer, range(3))
        return net, optimizer, wiring

    whole = make()
    with Interrupting() as counted:
        train_steps(*whole[:2], range(3, 4))
    assert counted.lines > 50
    for at in sorted({1 + round(i * (counted.lines - 1) / 24) for i in range(25)}):
        net, optimizer, wiring = make()
        with pytest.raises(KeyboardInterrupt), Interrupting(at):
            train_steps(net, optimizer, range(3, 4))
        optimizer.state_dict()
        assert wiring.step == 4, at
        for n in wiring:
            for what in ("latent", "active", "entered", "weight"):
                assert torch.equal(getattr(wiring[n], what), getattr(whole[2][n], what)), (at, n, what)
