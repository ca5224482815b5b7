"""Several processes: the same wiring everywhere, whole (DDP and its kin) or sharded (FSDP2, tensor parallel)."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import OPTIMIZERS, Dropping, pairs
from processes import GROUP, needs, on_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dnw

pytestmark = [pytest.mark.slow, GROUP]


def net(seed: int) -> nn.Sequential:
    """Sizes that divide unevenly: 7 rows over two processes, 3 over four."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


def exact_batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range, rank: int) -> None:
    for step in numbers:
        x, y = exact_batch(step, rank)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def state_of(wiring: dnw.Wiring) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    return {n: tuple(whole(x).clone() for x in (p.latent, p.active, p.weight)) for n, p in wiring.items()}


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def assert_equal(a: dict, b: dict) -> None:
    assert list(a) == list(b)
    for name in a:
        for x, y in zip(a[name], b[name], strict=True):
            assert torch.equal(x, y), name


# --- whole on every process ---


def _ddp(rank: int, rule: dnw.Rule, budget: dict) -> dict:
    model = DistributedDataParallel(net(seed=rank))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    wiring = dnw.wire(model, optimizer, rule=rule, **budget)
    before = state_of(wiring)
    steps(model, optimizer, range(50), rank)
    assert wiring.step == 50
    assert not torch.equal(before["0.weight"][0], wiring["0.weight"].latent)
    return state_of(wiring)


FALLING = dnw.DensitySchedule(end=20, every=3)
OF_EVERY_KIND = {
    "dnw": (dnw.DNW(), {"density": 0.3}),
    "random": (dnw.RandomGraph(), {"density": 0.3}),
    "dropping": (Dropping(), {"density": 0.3}),
    "no_update": (dnw.NoUpdate(), {"density": 0.3}),
    "targeted_dropout": (dnw.TargetedDropout(), {"density": 0.3}),
    "l1_anneal": (dnw.L1Anneal(), {"density": 0.3, "schedule": FALLING}),
    "iht": (dnw.IHT(), {"density": 0.3}),
    "set": (dnw.SET(every=5), {"density": 0.3}),
    "rigl": (dnw.RigL(every=5), {"density": 0.3}),
    "rigl_falling": (dnw.RigL(every=5), {"density": dnw.Global(0.3), "schedule": FALLING}),
    "sparse_momentum": (dnw.SparseMomentum(every=5), {"density": 0.3}),
    "sr_ste": (dnw.SRSTE(), {"density": 0.3}),
    "norm_ste": (dnw.NormSTE(), {"density": 0.3, "floor": dnw.Floor(per_target=1)}),
    "st3": (dnw.ST3(), {"density": dnw.Global(0.3), "schedule": FALLING}),
    "feather": (dnw.Feather(power=2), {"density": 0.3}),  # its square roots are exact wherever an entry lies in memory
    "top_kast": (dnw.TopKAST(), {"density": 0.3}),
}


@pytest.mark.parametrize("name", list(OF_EVERY_KIND))
def test_ddp_ranks_seeded_differently_hold_the_same_wiring_after_50_steps(name):
    assert_equal(*on_processes(2, _ddp, *OF_EVERY_KIND[name]))


def test_ddp_with_a_pattern():
    assert_equal(*on_processes(2, _ddp, dnw.SRSTE(), {"pattern": dnw.NOfM(1, 2), "include": "0.weight"}))


def _graph_on_kernels(rank: int, mode: str) -> dict:
    dnw.graphs.set_graph_kernels(mode)
    torch.manual_seed(0)
    model = DistributedDataParallel(dnw.models.tiny_digits())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wiring = dnw.wire(model, optimizer, density=0.1)
    for step in range(5):
        generator = torch.Generator().manual_seed(100 * step + rank)
        optimizer.zero_grad()
        images, labels = torch.randn(12, 1, 8, 8, generator=generator), torch.randint(10, (12,), generator=generator)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return state_of(wiring)


def test_ddp_with_a_graph_on_kernels():
    one, other = on_processes(2, _graph_on_kernels, "always")
    assert_equal(one, other)
    layers, _ = on_processes(2, _graph_on_kernels, "never")
    for name, (latent, active, _) in layers.items():
        assert torch.allclose(one[name][0], latent, atol=1e-5)
        assert float((one[name][1] == active).float().mean()) > 0.999


def _wired_before_ddp(rank: int, check: bool) -> str:
    model = net(seed=rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, optimizer, density=0.3, check_ranks=check)
    wrapped = DistributedDataParallel(model)
    try:
        steps(wrapped, optimizer, range(1), rank)
    except RuntimeError as error:
        assert wiring.step == 0
        return str(error)
    return ""


def test_wiring_before_ddp_wraps_is_refused_on_every_rank():
    for message in on_processes(2, _wired_before_ddp, True):
        assert "different latent weights or edges for '0.weight', '2.weight', '4.weight'" in message
        assert "Wire after the model is wrapped" in message
    assert on_processes(2, _wired_before_ddp, False) == ["", ""]


def _synchronized(rank: int, rule: dnw.Rule, seed: int) -> dict:
    model = net(seed=rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wiring = dnw.wire(model, optimizer, density=0.3, rule=rule, seed=seed + rank)
    wrapped = DistributedDataParallel(model)
    wiring.synchronize()
    first = state_of(wiring)
    steps(wrapped, optimizer, range(20), rank)
    return {**first, **{f"after {n}": x for n, x in state_of(wiring).items()}}


@pytest.mark.parametrize("rule", [dnw.DNW(), dnw.RandomGraph(), Dropping()], ids=["dnw", "random", "dropping"])
def test_a_wiring_made_before_ddp_wraps_can_be_synchronized(rule):
    first, second = on_processes(2, _synchronized, rule, 3)
    assert_equal(first, second)
    model = net(seed=0)
    alone = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.3, rule=rule, seed=3)
    assert_equal(state_of(alone), {n: first[n] for n in alone})  # rank 0's, exactly


def _loaded_then_synchronized(rank: int) -> dict:
    model = net(seed=rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, optimizer, density=0.3)
    model.load_state_dict(net(seed=7).state_dict())
    DistributedDataParallel(model)
    wiring.synchronize()
    return state_of(wiring)


def test_synchronize_keeps_what_was_loaded_before():
    model = net(seed=7)
    alone = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.3)
    for found in on_processes(2, _loaded_then_synchronized):
        assert_equal(found, state_of(alone))


def test_synchronize_needs_a_group():
    model = net(0)
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.3)
    with pytest.raises(RuntimeError, match="there is no process group"):
        wiring.synchronize()


def _zero(rank: int, folder: str) -> list[dict]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, plain = net(0), net(0)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    plain_wiring = dnw.wire(plain, plain_optimizer, density=0.3)
    wrapped, plain_wrapped = DistributedDataParallel(model), DistributedDataParallel(plain)
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.AdamW, lr=0.01)
    wiring = dnw.wire(wrapped, optimizer, density=0.3)
    steps(plain_wrapped, plain_optimizer, range(20), rank)
    steps(wrapped, optimizer, range(20), rank)
    assert_equal(state_of(wiring), state_of(plain_wiring))
    optimizer.consolidate_state_dict(to=0)
    if rank == 0:
        torch.save((model.state_dict(), optimizer.state_dict()), Path(folder) / "zero")
    dist.barrier()
    weights, state = torch.load(Path(folder) / "zero", weights_only=True)
    other = net(3)
    other.load_state_dict(weights)
    other_wrapped = DistributedDataParallel(other)
    other_optimizer = ZeroRedundancyOptimizer(other_wrapped.parameters(), torch.optim.AdamW, lr=0.01)
    other_wiring = dnw.wire(other_wrapped, other_optimizer, density=0.3)
    other_optimizer.load_state_dict(state)
    assert_equal(state_of(wiring), state_of(other_wiring))
    steps(wrapped, optimizer, range(20, 30), rank)
    steps(other_wrapped, other_optimizer, range(20, 30), rank)
    assert other_wiring.step == 30
    assert_equal(state_of(wiring), state_of(other_wiring))
    return [state_of(wiring)]


def test_zero_redundancy_optimizer(tmp_path):
    (first,), (second,) = on_processes(2, _zero, str(tmp_path))
    assert_equal(first, second)


def _fabric(rank: int) -> dict:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
    fabric.launch()
    model, optimizer = net(rank), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = fabric.setup(model, optimizer)
    wiring = dnw.wire(model, optimizer, density=0.3)
    for step in range(50):
        x, y = exact_batch(step, rank)
        optimizer.zero_grad()
        fabric.backward(F.cross_entropy(model(x), y))
        optimizer.step()
    assert wiring.step == 50
    return state_of(wiring)


@needs("lightning_fabric")
def test_fabric():
    assert_equal(*on_processes(2, _fabric))


def _accelerate(rank: int) -> dict:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = net(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    wiring = dnw.wire(model, optimizer, density=0.3)
    for step in range(50):
        x, y = exact_batch(step, rank)
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    assert wiring.step == 50
    return state_of(wiring)


@needs("accelerate")
def test_accelerate():
    assert_equal(*on_processes(2, _accelerate))


# --- sharded: which edges are chosen ---


def _scores(kind: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(len(kind) * math.prod(shape))
    normal = torch.randn(shape, generator=generator)
    return {
        "normal": normal,
        "ties": torch.randint(-3, 4, shape, generator=generator).float(),
        "equal": torch.full(shape, 0.5),
        "zero": torch.zeros(shape),
        "denormal": torch.randint(-5, 6, shape, generator=generator) * 1e-45,
        "bfloat16": normal.bfloat16(),
        "half": (normal * 1e-7).half(),
        "double": normal.double(),
    }[kind]


KINDS = ("normal", "ties", "equal", "zero", "denormal", "bfloat16", "half", "double")
SHAPES = ((7, 5), (2, 3), (1, 9), (16, 4, 3, 3))


class Weights(nn.Module):
    def __init__(self, values: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(v) for v in values])


def _selections(rank: int, mesh_shape: tuple[int, ...], placements: list, cases: list[tuple[str, object]]) -> int:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("a", "b")[: len(mesh_shape)])
    seen = 0
    for kind, budget in cases:
        values = [_scores(kind, shape) for shape in SHAPES]
        plain = Weights([v.clone() for v in values])
        sharded = Weights([distribute_tensor(v.clone(), mesh, placements) for v in values])
        wirings = []
        for model in (plain, sharded):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            wirings.append(dnw.wire(model, optimizer, budget, include="*", check_ranks=False))
        for name, one in wirings[0].items():
            other = wirings[1][name]
            assert other.num_active == one.num_active  # asked on one process after another: no messages
            assert other.num_candidates == one.num_candidates
            assert torch.equal(whole(other.active), one.active), (kind, budget, name)
            assert torch.equal(whole(other.weight), one.weight)
            assert other.edges().to_list() == one.edges().to_list()
            seen += 1
        assert str(wirings[0].summary()) == str(wirings[1].summary())
    return seen


def _placements(names: str) -> list:
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate() if n == "r" else Shard(int(n)) for n in names]


MESHES = [(2, (2,), "0"), (3, (3,), "0"), (2, (2,), "1"), (4, (2, 2), "r0"), (4, (2, 2), "01"), (4, (2, 2), "00")]
SELECTIONS = pairs(MESHES, KINDS, [0.3, dnw.Global(0.2)])


@pytest.mark.parametrize("place", MESHES, ids=lambda place: f"{place[0]}-{place[2]}")
def test_sharded_selection_equals_that_of_one_process(place):
    world, mesh, placements = place
    cases = [(kind, budget) for where, kind, budget in SELECTIONS if where == place]
    assert {kind for kind, _ in cases} == set(KINDS)
    seen = on_processes(world, _selections, mesh, _placements(placements), cases)
    assert seen == [len(cases) * len(SHAPES)] * world


# --- sharded: training ---


def _sharded(model: nn.Sequential) -> nn.Sequential:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _fsdp(rank: int, optimizer: str, rule: dnw.Rule, budget: dict, dormant: dnw.Dormant | None) -> None:
    """Two processes, each with the same batch: sums and means over two are exact, so everything stays bit-equal."""
    plain, model = net(0), _sharded(net(0))
    plain_optimizer, sharded_optimizer = OPTIMIZERS[optimizer](plain.parameters()), OPTIMIZERS[optimizer](model.parameters())
    plain_wiring = dnw.wire(plain, plain_optimizer, rule=rule, dormant=dormant, **budget)
    wiring = dnw.wire(model, sharded_optimizer, rule=rule, dormant=dormant, **budget)
    for step in range(21):  # one after the last step of the schedules below
        steps(plain, plain_optimizer, range(step, step + 1), rank=0)
        steps(model, sharded_optimizer, range(step, step + 1), rank=0)
        assert_equal(state_of(wiring), state_of(plain_wiring))
    entered = {n: whole(wiring[n].entered) for n in wiring}
    assert all(torch.equal(entered[n], plain_wiring[n].entered) for n in wiring)
    assert wiring.to_json() == plain_wiring.to_json()
    new = torch.randn(7, 6, generator=torch.Generator().manual_seed(5))
    for each in (wiring, plain_wiring):
        each["0.weight"].latent = new
    with torch.no_grad():  # a write to the model, taken over on every process
        for each in (model, plain):
            each[2].weight.mul_(2.0)
    for each in (wiring, plain_wiring):
        each.project()
    assert_equal(state_of(wiring), state_of(plain_wiring))
    with wiring.settled(), plain_wiring.settled():
        assert torch.equal(whole(model[0].weight), plain[0].weight)
    if rank == 0:  # questions take no messages
        assert wiring.num_active == plain_wiring.num_active
        str(wiring.summary())
    with pytest.raises(TypeError, match="wiring of sharded parameters cannot be copied"):
        copy.deepcopy(wiring)


PAPER = dnw.Dormant()


@pytest.mark.parametrize(
    ("optimizer", "rule", "budget", "dormant"),
    [
        ("sgd", dnw.DNW(), {"density": 0.3}, PAPER),
        ("momentum", dnw.DNW(), {"density": dnw.Global(0.3)}, PAPER),
        ("adamw", dnw.DNW(), {"density": 0.3}, dnw.Dormant(weight_decay=False, momentum="zero")),
        ("momentum", dnw.RandomGraph(), {"density": 0.3}, PAPER),
        ("adamw", Dropping(), {"density": 0.3}, dnw.Dormant(momentum="hold")),
        *[("momentum", rule, budget, None) for rule, budget in list(OF_EVERY_KIND.values())[3:]],
    ],
    ids=["sgd", "momentum-global", "adamw-policy", "random", "dropping", *list(OF_EVERY_KIND)[3:]],
)
def test_fsdp2_training_equals_that_of_one_process(optimizer, rule, budget, dormant):
    """Each process compares itself with one that trains alone, after every step; a difference on any of them fails here."""
    on_processes(2, _fsdp, optimizer, rule, budget, dormant)


def _fsdp_resume(rank: int, folder: str, optimizer: str, flatten: bool, full: bool, at: int) -> dict:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd

    warnings.simplefilter("ignore")
    options = sd.StateDictOptions(flatten_optimizer_state_dict=flatten, full_state_dict=full, broadcast_from_rank0=full)
    model = _sharded(net(0))
    base = OPTIMIZERS[optimizer](model.parameters())
    wiring = dnw.wire(model, base, density=0.3)
    steps(model, base, range(at), rank)
    weights, state = sd.get_state_dict(model, base, options=options)
    assert wiring.step == at
    other = _sharded(net(9))
    other_base = OPTIMIZERS[optimizer](other.parameters())
    other_wiring = dnw.wire(other, other_base, density=0.3)
    if full:
        weights, state = copy.deepcopy((weights, state))
    else:
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
        weights, state = sd.get_state_dict(other, other_base, options=options)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    sd.set_state_dict(other, other_base, model_state_dict=weights, optim_state_dict=state, options=options)
    assert other_wiring.step == at
    assert_equal(state_of(wiring), state_of(other_wiring))
    steps(model, base, range(at, at + 5), rank)
    steps(other, other_base, range(at, at + 5), rank)
    assert other_wiring.step == at + 5
    assert_equal(state_of(wiring), state_of(other_wiring))
    return state_of(wiring)


@pytest.mark.parametrize(("optimizer", "form", "at"), pairs(["sgd", "momentum", "adamw"], ["nested", "flat", "whole"], [0, 3]))
def test_fsdp2_resumes_through_distributed_checkpoint(optimizer, form, at, tmp_path):
    assert_equal(*on_processes(2, _fsdp_resume, str(tmp_path / "x"), optimizer, form == "flat", form == "whole", at))


def _reshard(rank: int, folder: str, world: int) -> dict:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd

    warnings.simplefilter("ignore")
    model = _sharded(net(dist.get_world_size()))
    base = OPTIMIZERS["momentum"](model.parameters())
    wiring = dnw.wire(model, base, density=0.3)
    if dist.get_world_size() == world:
        steps(model, base, range(3), rank=0)
    weights, state = sd.get_state_dict(model, base)
    if dist.get_world_size() == world:
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    else:
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
        sd.set_state_dict(model, base, model_state_dict=weights, optim_state_dict=state)
    assert wiring.step == 3
    return state_of(wiring)


def test_a_sharded_checkpoint_is_resumed_on_another_number_of_processes(tmp_path):
    saved = on_processes(2, _reshard, str(tmp_path / "x"), 2)[0]
    assert_equal(saved, on_processes(3, _reshard, str(tmp_path / "x"), 2)[0])


def _mixed_budget(rank: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    model = Weights([torch.randn(4, 4), distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)])])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="sharded: keep sharded parameters in that dtype"):
        dnw.wire(model, optimizer, 0.5, include="weights.1", latent_dtype=torch.float64)
    with pytest.raises(ValueError) as raised:
        dnw.wire(model, optimizer, dnw.Global(0.5), include="*")
    return str(raised.value)


def test_what_sharded_parameters_cannot_do_is_said():
    assert all("share one budget but are spread over different processes" in m for m in on_processes(2, _mixed_budget))


class Shrinking(dnw.DNW):
    """Projects by a number that all processes have to add up."""

    def project(self, layer: dnw.Layer) -> Tensor:
        total = layer.latent.abs().sum()
        return super().project(layer) / (total if layer.shard is None else layer.shard.sum(total))


def _asked_on_one(rank: int) -> int:
    model = _sharded(net(0))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    wiring = dnw.wire(model, optimizer, density=0.3, rule=Shrinking())
    steps(model, optimizer, range(2), rank)
    if rank == 0:
        assert wiring["0.weight"].active.to_local().any()
        assert wiring["0.weight"].density == pytest.approx(0.3, abs=0.02)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    if rank == 0:  # what was written is taken over later, by all together
        assert "total" in str(wiring.summary())
        assert wiring.num_active == wiring["0.weight"].num_active + wiring["2.weight"].num_active + 5
    wiring.project()
    return wiring.num_active


def test_one_process_alone_may_ask_a_sharded_wiring():
    first, second = on_processes(2, _asked_on_one)
    assert first == second


def _replicated(rank: int) -> tuple[dict, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    plain = nn.Linear(6, 4, bias=False)
    model = nn.Linear(6, 4, bias=False)
    model.weight = nn.Parameter(distribute_tensor(plain.weight.detach().clone(), mesh, [Replicate()]))
    x = torch.randn(8, 6)
    results = []
    for net_, data in ((plain, x), (model, distribute_tensor(x, mesh, [Shard(0)]))):
        optimizer = torch.optim.SGD(net_.parameters(), lr=0.1)
        wiring = dnw.wire(net_, optimizer, density=0.5, rule=dnw.RandomGraph())
        net_(data).square().sum().backward()
        optimizer.step()
        results.append(whole(wiring["weight"].latent))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    return state_of(wiring)


def test_gradients_that_are_partial_sums():
    assert_equal(*on_processes(2, _replicated))


def _not_finite(rank: int) -> str:
    model = _sharded(net(0))
    with torch.no_grad():
        if rank == 0:
            model[0].weight.to_local()[0, 0] = torch.nan
    with pytest.raises(ValueError) as raised:
        dnw.wire(model, OPTIMIZERS["sgd"](model.parameters()), density=0.3)
    return str(raised.value)


def test_what_one_process_cannot_rank_all_refuse():
    assert all("'0.weight' has weights that are not finite" in m for m in on_processes(2, _not_finite))
