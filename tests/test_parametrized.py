"""Weights that are computed from other tensors: weight norms are wired, other parametrizations say what to do."""

import copy
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import dnw
from dnw._wiring.parameters import find_parameters


def old_weight_norm(module: nn.Module, dim: int | None = 0) -> nn.Module:
    """The form of it that many audio models still have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, dim=dim)


FORMS = {
    "parametrization": (parametrizations.weight_norm, "parametrizations.weight.original0", "parametrizations.weight.original1"),
    "hook": (old_weight_norm, "weight_g", "weight_v"),
}
LAYERS: dict[str, Callable[[Callable], nn.Module]] = {
    "conv": lambda norm: norm(nn.Conv1d(6, 8, 3, padding=1)),
    "grouped": lambda norm: norm(nn.Conv1d(6, 8, 3, padding=1, groups=2)),
    "transposed": lambda norm: norm(nn.ConvTranspose1d(6, 8, 3, padding=1), dim=1),
    "conv_as_a_whole": lambda norm: norm(nn.Conv1d(6, 8, 3, padding=1), dim=None),
    "linear": lambda norm: nn.Sequential(nn.Flatten(), norm(nn.Linear(30, 40)), nn.Unflatten(1, (8, 5))),
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def found(model: nn.Module, **arguments):
    """What is wired by name, and why the rest is not."""
    wirable, left = find_parameters(model, arguments.get("include"), arguments.get("exclude", ()))
    return {w.name: w for w in wirable}, {x.name: x.reason for x in left}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_weight_norm_trains_sparse(kind, form):
    torch.manual_seed(0)
    norm, _, direction = form
    model = nn.Sequential(LAYERS[kind](norm), nn.ReLU(), nn.Flatten(), nn.Linear(40, 3))
    module = model[0][1] if kind == "linear" else model[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    wiring = dnw.wire(model, optimizer, density=0.5)
    name = f"{'0.1' if kind == 'linear' else '0'}.{direction}"
    assert list(wiring) == [name, "3.weight"]
    losses, edges = [], wiring[name].active
    for step in range(12):
        generator = torch.Generator().manual_seed(step % 2)
        x, y = torch.randn(16, 6, 5, generator=generator), torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert wiring[name].num_active == dnw.num_edges(0.5, wiring[name].num_candidates)
    assert torch.tensor(losses).isfinite().all()
    assert losses[-1] < losses[0]
    assert not torch.equal(wiring[name].active, edges)
    model(x)
    assert torch.equal(module.weight != 0, wiring[name].active)


@pytest.mark.parametrize("kind", LAYERS)
def test_every_target_that_a_weight_norm_divides_needs_an_edge(kind, form):
    norm, gain, direction = form
    wired, left = found(LAYERS[kind](norm))
    prefix = "1." if kind == "linear" else ""
    assert [w.least_per_target for w in wired.values()] == [0 if kind == "conv_as_a_whole" else 1]
    assert list(wired) == [prefix + direction]
    assert left[prefix + gain] == "gain of a weight norm"


def test_patterns_under_a_weight_norm(form):
    norm, _, direction = form
    model = norm(nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for pattern in (dnw.Channels(), dnw.Blocks(2, 2)):
        message = f"{direction!r} is under a weight norm, where every target needs an edge, and {pattern!r} may take all"
        with pytest.raises(ValueError, match=re.escape(message)):
            dnw.wire(model, optimizer, density=0.5, pattern=pattern)
    wiring = dnw.wire(model, optimizer, pattern=dnw.NOfM(2, 4))
    assert wiring[direction].active.view(4, 2, 4).sum(2).eq(2).all()
    assert model(torch.randn(3, 8)).isfinite().all()


def test_other_layers_need_no_edge_of_every_target():
    wired, _ = found(nn.Sequential(nn.Linear(3, 3), nn.Conv1d(2, 2, 1)))
    assert [w.least_per_target for w in wired.values()] == [0, 0]


@pytest.mark.parametrize(
    ("layer", "dim"), [(nn.ConvTranspose1d(6, 8, 3), 0), (nn.Conv1d(6, 8, 3), 1), (nn.Conv1d(6, 8, 3), 2)], ids=str
)
def test_a_weight_norm_across_targets_stays_dense(layer, dim, form):
    norm, _, direction = form
    model = nn.Sequential(norm(copy.deepcopy(layer), dim=dim), nn.Linear(2, 2))
    wired, left = found(model)
    assert list(wired) == ["1.weight"]
    assert left[f"0.{direction}"] == f"weight norm along dimension {dim}"
    message = f"'0.{direction}' has a weight norm along dimension {dim}, which is not that of its targets"
    for include in ("0", f"0.{direction}"):
        with pytest.raises(ValueError, match=re.escape(message)):
            found(model, include=[include])


def test_a_weight_norm_is_named_as_its_module_is(form):
    norm, _, direction = form
    model = nn.Sequential(norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    for include in ("0", nn.Linear, f"0.{direction}"):
        assert f"0.{direction}" in found(model, include=[include])[0]
    assert list(found(model, exclude=["0"])[0]) == ["1.weight"]
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), {"0": 0.25, "*": 0.5})
    assert [p.num_active for p in wiring.values()] == [4, 8]


def test_recurrent_weights_under_a_norm():
    model = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    wired, left = found(model)
    assert list(wired) == ["weight_ih_l0", "parametrizations.weight_hh_l0.original1"]
    assert wired["parametrizations.weight_hh_l0.original1"].least_per_target == 1


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


def symmetric(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", Symmetric())
    return module


def both(module: nn.Module) -> nn.Module:
    return symmetric(parametrizations.spectral_norm(module))


def pruned(module: nn.Module) -> nn.Module:
    return prune.l1_unstructured(module, "weight", 0.5)


PARAMETRIZE = "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
OTHERS = {
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original", "SpectralNorm", PARAMETRIZE),
    "orthogonal": (parametrizations.orthogonal, "parametrizations.weight.original", "Orthogonal", PARAMETRIZE),
    "own": (symmetric, "parametrizations.weight.original", "Symmetric", PARAMETRIZE),
    "two": (both, "parametrizations.weight.original", "SpectralNorm, Symmetric", PARAMETRIZE),
    "hook": (nn.utils.spectral_norm, "weight_orig", "SpectralNorm", "torch.nn.utils.remove_spectral_norm(module, 'weight')"),
}


def follow(way_out: str, module: nn.Module) -> None:
    """Does what a message says."""
    exec(way_out, {"torch": torch, "module": module})


@pytest.mark.parametrize("how", OTHERS)
def test_other_parametrizations_stay_dense_and_say_what_to_do(how):
    apply, attribute, by, way_out = OTHERS[how]
    model = nn.Sequential(apply(nn.Linear(4, 4)), nn.Linear(4, 4))
    name = f"0.{attribute}"
    wired, left = found(model)
    assert list(wired) == ["1.weight"]
    assert left[name] == f"parametrized by {by}"
    assert list(found(model, include=["*"])[0]) == ["1.weight"]
    message = f"{name!r} is parametrized by {by}, and of parametrizations only weight norms can be wired; first take that off "
    for include in ([name], ["0"], [f"{name[:-1]}*"], [nn.Linear]):
        with pytest.raises(ValueError, match=re.escape(f"{message}with {way_out}, or leave it dense with exclude")):
            found(model, include=include)
    follow(way_out, model[0])
    assert list(found(model)[0]) == ["0.weight", "1.weight"]


def test_a_parametrized_embedding_is_an_embedding():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Embedding(4, 3)), nn.Linear(3, 3))
    assert found(model)[1]["0.parametrizations.weight.original"] == "embedding"
    with pytest.raises(ValueError, match="is parametrized by SpectralNorm"):
        found(model, include=["0"])


@pytest.mark.parametrize("include", [None, ["0"], ["*"], ["0.weight_orig"], [nn.Linear]])
def test_pruned_modules_are_refused(include):
    model = nn.Sequential(pruned(nn.Linear(4, 4)), nn.Linear(4, 4))
    before = model[0].weight_orig.clone()
    way_out = "torch.nn.utils.prune.remove(module, 'weight')"
    with pytest.raises(ValueError, match=re.escape("'0.weight_orig' is pruned by torch.nn.utils.prune, whose mask")) as error:
        dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.5, include=include)
    assert way_out in str(error.value)
    assert torch.equal(model[0].weight_orig, before)
    assert found(model, exclude=["0"])[1]["0.weight_orig"] == "excluded by '0'"
    follow(way_out, model[0])
    assert list(found(model)[0]) == ["0.weight", "1.weight"]


def test_modules_pruned_several_times_are_refused():
    model = pruned(pruned(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="'weight_orig' is pruned by torch.nn.utils.prune"):
        found(model)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
    optimizer.step()


def normed_net(norm: Callable, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, dnw.Wiring]:
    torch.manual_seed(seed)
    model = nn.Sequential(norm(nn.Linear(6, 6)), nn.ReLU(), norm(nn.Linear(6, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, dnw.wire(model, optimizer, density=0.5)


def test_a_weight_norm_resumes_bit_for_bit(form):
    model, optimizer, wiring = normed_net(form[0], seed=0)
    step(model, optimizer, 0)
    saved, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, other_optimizer, other_wiring = normed_net(form[0], seed=1)
    other.load_state_dict(saved)
    other_optimizer.load_state_dict(state)
    for net, base in ((model, optimizer), (other, other_optimizer)):
        step(net, base, 1)
    for name in wiring:
        assert torch.equal(wiring[name].latent, other_wiring[name].latent)
        assert torch.equal(wiring[name].active, other_wiring[name].active)
