"""Live nodes, parameters and multiply-adds."""

import contextlib
import copy
import dataclasses
import threading
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.flop_counter import FlopCounterMode

import dnw
from dnw.count import count, live_by_graph, live_nodes, num_live_nodes, published_count
from dnw.graphs import StaticGraph
from dnw.models import GraphChain, mobilenet_v1, tiny_cifar10, tiny_cifar10_continuous, tiny_cifar10_discrete


def nodes(num: int, chosen: set[int]) -> torch.Tensor:
    return torch.tensor([i in chosen for i in range(num)])


def adjacency(num: int, edges: list[tuple[int, int]]) -> torch.Tensor:
    mask = torch.zeros(num, num, dtype=torch.bool)
    for source, target in edges:
        mask[target, source] = True
    return mask


def test_literal_graph():
    edges = [(0, 2), (2, 5), (3, 5), (2, 4)]  # 3 has no input, 4 leads nowhere, 1 is read by nobody
    live = live_nodes(adjacency(6, edges), nodes(6, {0, 1}), nodes(6, {5}))
    assert live.tolist() == [True, False, True, False, False, True]


def test_cycles_and_self_edges():
    edges = [(0, 1), (1, 2), (2, 1), (2, 2), (2, 3), (4, 4), (5, 4)]
    live = live_nodes(adjacency(6, edges), nodes(6, {0}), nodes(6, {3}))
    assert live.tolist() == [True, True, True, True, False, False]


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 7), st.data())
def test_equals_paths_found_by_matrix_powers(num, data):
    pairs = st.tuples(st.integers(0, num - 1), st.integers(0, num - 1))
    mask = adjacency(num, data.draw(st.lists(pairs, max_size=12)))
    inputs = nodes(num, data.draw(st.sets(st.integers(0, num - 1), min_size=1)))
    outputs = nodes(num, data.draw(st.sets(st.integers(0, num - 1), min_size=1)))
    closure = torch.eye(num)
    for _ in range(num):
        closure = ((closure + mask.float() @ closure) > 0).float()
    expected = (closure @ inputs.float() > 0) & (closure.T @ outputs.float() > 0)
    assert torch.equal(live_nodes(mask, inputs, outputs), expected)


def test_live_nodes_of_a_wired_graph():
    graph = StaticGraph((2, 2), 1)  # nodes 0 1 | 2 3 | 4
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 0] = mask[2, 2] = mask[2, 3] = True  # 0 -> 2 -> 4, and 3 -> 4 without anything into 3
    wiring = dnw.wire(graph, torch.optim.SGD(graph.parameters(), lr=0.1), rule=dnw.Frozen({"weight": mask}))
    assert num_live_nodes(graph, wiring) == (3, 5)


def test_a_model_without_graphs_has_no_nodes():
    model = torch.nn.Linear(3, 3)
    assert num_live_nodes(model, dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.5)) == (0, 0)


# --- chains of graphs, dynamic graphs ---


def test_live_nodes_of_a_chain():
    """Two graphs of two inputs, two inner nodes and two outputs each, in which most paths end."""
    chain = nn.Sequential(dnw.graphs.StaticGraph((2, 2), 2), dnw.graphs.StaticGraph((2, 2), 2))
    first = torch.zeros(4, 4, dtype=torch.bool)
    first[0, 0] = first[2, 2] = True  # input 0 -> inner 0 -> output 0
    first[3, 1] = True  # input 1 -> output 1, which the second graph does not read
    first[1, 0] = True  # input 0 -> inner 1, which leads nowhere
    second = torch.zeros(4, 4, dtype=torch.bool)
    second[0, 0] = second[3, 2] = True  # input 0 -> inner 0 -> output 1
    second[2, 3] = True  # inner 1, which nothing reaches, -> output 0
    live = live_by_graph(chain, {"0.weight": first, "1.weight": second})
    assert live["0"].tolist() == [True, False, True, False, True, False]
    assert live["1"].tolist() == [True, False, True, False, False, True]
    alone = live_by_graph(nn.ModuleList(chain), {"0.weight": first, "1.weight": second})
    assert alone["0"].tolist() == [True, True, True, False, True, True]


def test_live_nodes_of_a_dynamic_graph_with_cycles():
    graph = dnw.graphs.DiscreteTimeGraph(6, 1, 1, maps=False)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[1, 0] = mask[2, 1] = mask[1, 2] = mask[5, 2] = True  # 0 -> 1 <-> 2 -> 5
    mask[3, 3] = mask[4, 0] = True  # by itself; a dead end
    assert live_by_graph(graph, {"weight": mask})[""].tolist() == [True, True, True, False, False, True]


# --- multiply-adds ---


@pytest.mark.parametrize(("width", "parameters", "products"), [(0.25, 0.470, 41.0), (0.5, 1.332, 149.5), (1.0, 4.232, 568.7)])
def test_plain_mobilenets_have_the_known_counts(width, parameters, products):
    found = count(mobilenet_v1(width=width), (3, 224, 224))
    assert found.parameters / 1e6 == pytest.approx(parameters, abs=6e-4)
    assert found.dense / 1e6 == pytest.approx(products, abs=0.06)
    assert found.dense == found.nominal == found.live


def test_any_module_counts():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(5, 6, 2, batch_first=True)
            self.attention = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)

        def forward(self, x):
            return self.attention(self.rnn(x)[0])

    model = Mixed()
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.25)
    found = count(model, (7, 5), wiring)
    rows = {row.name: row for row in found.rows}
    assert rows["rnn.weight_ih_l0"].dense == 7 * 24 * 5
    assert rows["rnn.weight_hh_l1"].dense == 7 * 24 * 6
    assert rows["attention.self_attn.in_proj_weight"].dense == 7 * 18 * 6
    assert rows["attention.self_attn.in_proj_weight"].nominal == 7 * 27
    assert rows["attention.linear1.weight"].nominal == 7 * 18
    assert rows["attention.self_attn"].dense == 2 * 7 * 7 * 6  # scores and their use, without a parameter
    assert found.active == found.parameters - wiring.num_candidates + wiring.num_active
    assert "total, with norms and biases" in str(found)


def test_counts_of_a_static_graph_edge_by_edge():
    graph = dnw.graphs.StaticGraph((3, 4), 2)
    wiring = dnw.wire(graph, torch.optim.SGD(graph.parameters(), lr=0.1), num_edges=8)
    rows = {row.name: row for row in count(graph, (3, 5, 5), wiring).rows}
    matrix = wiring["weight"].edges()
    live = live_by_graph(graph, {"weight": wiring["weight"].active})[""]
    between = sum(bool(live[t] and live[s]) for t, s, _ in matrix.to_list())
    assert (rows["weight"].dense, rows["weight"].nominal, rows["weight"].live) == (25 * 26, 25 * 8, 25 * between)
    sending = {s for _, s, _ in matrix.to_list()}
    for level, nodes in enumerate((range(3), range(3, 7))):
        row = rows[f"nodes.{level}.conv.weight"]
        assert row.dense == 25 * 9 * len(nodes)
        assert row.nominal == 25 * 9 * sum(v in sending for v in nodes)
        assert row.live == 25 * 9 * sum(v in sending and bool(live[v]) for v in nodes)


def test_shared_outputs_count_an_entry_once():
    model = tiny_cifar10()
    assert next(r.dense for r in count(model, (3, 32, 32)).rows if r.name == "graph.weight") == 264_960 * 64
    graph = dnw.graphs.StaticGraph((2, 3), 2, shared_outputs=True)
    mask = graph.edge_candidates()["weight"]
    assert graph.levels.num_edges_between(mask, torch.ones(7, dtype=torch.bool)) == int(mask.sum())
    assert graph.levels.num_edges_between(mask, torch.arange(7) < 5) == 6  # the inner nodes' own
    only_first_output = torch.ones(7, dtype=torch.bool)
    only_first_output[[3, 4, 6]] = False  # rows 3 and 4 serve outputs 5 and 6
    assert graph.levels.num_edges_between(mask, only_first_output) == 2 + 3  # into node 2, and into output 5 from nodes 0, 1, 2


@pytest.mark.parametrize("make", [tiny_cifar10_discrete, tiny_cifar10_continuous])
def test_dynamic_graphs_count_every_evaluation(make):
    times = 5 if make is tiny_cifar10_discrete else 11
    found = count(make(), (3, 32, 32), evaluations=11)
    assert next(r.dense for r in found.rows if r.name == "graph.weight") == times * 640_000 * 64
    assert next(r.dense for r in found.rows if r.name == "graph.conv.weight") == times * 7200 * 64
    assert found.evaluations == ({} if make is tiny_cifar10_discrete else {"graph": 11})


def chain_and_wiring(width: float, seed: int = 0) -> tuple[GraphChain, dnw.Wiring]:
    model = GraphChain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, dnw.wire(model, optimizer, num_edges=model.num_edges(width), rule=dnw.RandomGraph(), seed=seed)


@pytest.mark.parametrize(("width", "products", "parameters"), [(0.225, 55.7, 1.2), (0.51, 169.6, 1.886)])
def test_random_chains_are_as_large_as_published(width, products, parameters):
    model, wiring = chain_and_wiring(width)
    found = count(model, (3, 224, 224), wiring)
    assert found.nominal / 1e6 == pytest.approx(products, rel=0.02)
    assert found.live <= found.nominal
    published = published_count(model, {n: wiring[n].active for n in wiring}, width=width)
    assert published[0] / 1e6 == pytest.approx(products, rel=0.02)
    assert published[1] / 1e6 == pytest.approx(parameters, rel=0.04)
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    assert found.active - norms == pytest.approx(published[1], rel=0.01)


@pytest.mark.data
def test_reproduces_the_originals_own_count():
    with np.load(reference("imagenet_mobilenetv1_dnw_small_x225.npz"), allow_pickle=False) as archive:
        recorded = {k: archive[k] for k in archive.files}
    model = GraphChain(learned_classifier=True, rank_all_entries=True)
    masks = {
        f"graphs.{i}.weight": torch.from_numpy(recorded[f"state.layers.{i}.graph.weight"][:, :, 0, 0]) != 0 for i in range(5)
    }
    assert published_count(model, masks, width=0.225) == (int(recorded["macs"]), int(recorded["params"]))


def test_bad_counts():
    with pytest.raises(ValueError, match="the model does not take an input of 4x32x32"):
        count(tiny_cifar10(), (4, 32, 32))
    with pytest.raises(ValueError, match=r"active edges for 'graph.w' of shape \(2,\), which fit no parameter"):
        count(tiny_cifar10(), (3, 32, 32), {"graph.w": torch.ones(2)})
    model = tiny_cifar10()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    count(model, (3, 32, 32))
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert model.training


# --- what stands around a count ---


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))  # 20 + 15 products


@contextlib.contextmanager
def with_default_double():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "around",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),
        with_default_double,
        lambda: FlopCounterMode(display=False),
        FakeTensorMode,
    ],
    ids=["inference mode", "no_grad", "autocast", "meta", "double", "flop counter", "fake tensors"],
)
def test_a_count_is_the_same_in_any_mode(around):
    model, masks = two_layers(), {"0.weight": adjacency(5, [(0, 1), (2, 4)])[:, :4]}
    attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    with around():
        found, attended = count(model, (4,), masks), count(attention, (7, 4))
    assert (found.dense, found.nominal, found.live) == (35, 2 + 15, 2 + 2 * 3)
    assert attended.dense == count(attention, (7, 4)).dense == 7 * (12 * 4 + 4 * 4 + 2 * 8 * 4) + 2 * 7 * 7 * 4


def test_a_count_inside_function_transforms():
    model, found = two_layers(), []

    def counts(x):
        found.append(count(model, (4,)).dense)
        return x.sum()

    torch.func.vmap(counts)(torch.zeros(2, 3))
    torch.func.grad(counts)(torch.zeros(3))
    assert found == [35, 35]


def test_nothing_is_left_in_the_modes_around_a_count():
    with FlopCounterMode(display=False) as around:
        count(two_layers(), (4,))
    assert around.get_total_flops() == 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_model_that_goes_into_inference_mode_itself():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = two_layers()

        @torch.inference_mode()
        def forward(self, x):
            return self.layers(x)

    assert count(Encoder(), (4,)).dense == 35


@pytest.mark.parametrize("training", [True, False])
def test_attention_counts_the_same_in_training_and_evaluation(training):
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True).train(training), torch.zeros(3, 5, 8)
    expected = 3 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8)
    assert count(attention, x, x, x).dense == count(attention, x, x, x, need_weights=False).dense == expected


# --- any call ---


class Tagger(nn.Module):
    """Tokens to numbers, called as language models are."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids, attention_mask=None, scale=1.0):
        states = self.layer(self.embedding(input_ids))
        if attention_mask is not None and not attention_mask.all():
            states = states * attention_mask[..., None]
        return {"logits": [scale * self.head(states)]}


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_examples_count_the_call_as_it_stands():
    model = two_layers()
    assert count(model, torch.zeros(7, 4)).dense == 7 * count(model, (4,)).dense == 7 * 35
    assert count(model, torch.zeros(4)).dense == count(model, input=torch.zeros(1, 4)).dense == 35
    assert count(model, input_size=(4,)).dense == count(model, [4], None).dense == 35
    assert count(model, torch.zeros(1, 4, device="meta")).dense == 35


@pytest.mark.parametrize(
    ("args", "kwargs", "live"),
    [
        ((IDS,), {}, 20),
        ((IDS, None, 2.0), {}, 20),
        ((), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, 20),
        # times an input that is not 1 everywhere: all columns depend on an input
        ((IDS,), {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]), "scale": torch.ones(())}, 40),
    ],
)
def test_tokens_keywords_numbers_and_none(args, kwargs, live):
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 1] = mask[2, 2] = True
    found = count(Tagger(), *args, active={"layer.weight": mask}, **kwargs)
    rows = {row.name: (row.dense, row.nominal, row.live) for row in found.rows}
    # a lookup is no product; the shared parameter stands in one row; its columns that read a constant have no effect
    assert rows == {"embedding.weight": (6 * 40, 6 * 40, 6 * live), "layer.weight": (6 * 16, 6 * 2, 6 * 2)}
    assert found.parameters == 40 + 16 + 4


def test_containers_of_inputs():
    @dataclasses.dataclass
    class Pair:
        left: torch.Tensor
        right: list[torch.Tensor]

    class Merge(nn.Module):
        def __init__(self):
            super().__init__()
            self.bilinear = nn.Bilinear(3, 4, 5)

        def forward(self, pair, by_name):
            return self.bilinear(pair.left, pair.right[0]) + by_name["shift"]

    inputs = Pair(torch.zeros(2, 3), [torch.zeros(2, 4)]), {"shift": torch.zeros(5, requires_grad=True) * 2}
    assert [(row.name, row.dense) for row in count(Merge(), *inputs).rows] == [("bilinear.weight", 2 * 60)]


def test_products_with_a_vector_count():
    assert count(nn.Linear(4, 3, bias=False), torch.zeros(4)).dense == 12


def test_sequences_of_several_lengths():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 5, batch_first=True)

        def forward(self, x, lengths):
            return self.rnn(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[0].data

    assert count(Packed(), torch.zeros(2, 3, 4), torch.tensor([3, 2])).dense == (3 + 2) * 20 * (4 + 5)


def test_a_shared_parameter_answers_to_each_of_its_names():
    mask = torch.arange(40).view(10, 4) % 4 == 0
    for name in ("embedding.weight", "head.weight"):
        found = count(Tagger(), IDS, active={name: mask})
        assert next((row.name, row.active, row.nominal) for row in found.rows) == ("embedding.weight", 10, 60)


def test_what_depends_on_numbers_is_run_for_real():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 4, batch_first=True)
            self.attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

        def forward(self, x):
            y = self.attention(self.rnn(x)[0]) if x.sum().item() > 0 else x
            return F.scaled_dot_product_attention(y, y, y)

    model, x = Gated(), torch.ones(2, 3, 4)
    assert count(model, -x).dense == 2 * 2 * 9 * 4
    assert count(model, x).dense == 2 * (3 * 16 * 8 + 3 * (64 + 64) + 2 * 9 * 4 + 2 * 9 * 4)
    assert torch.equal(x, torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"does not take an input of 3x4 \(.*meta.*\); on example inputs it runs for real"):
        count(model, (3, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: count(m), "count needs the size of one input, such as .*, or example inputs"),
        (lambda m: count(m, (4,), torch.zeros(1, 4)), r"an input size, \(4,\), stands for one input alone"),
        (lambda m: count(m, (4,), y=torch.zeros(1, 4)), r"an input size, \(4,\), stands for one input alone"),
        (lambda m: count(m, torch.zeros(1, 5)), r"does not take these inputs \(RuntimeError"),
        (lambda m: count(m, torch.zeros(1, 4), activ={}), "unexpected keyword argument 'activ'"),
        (lambda m: count(m, (4,), evaluations=0), "evaluations=0: a whole number from 1 on"),
        (lambda m: count(nn.LazyLinear(3), (4,)), "'weight' has no shape yet; run one batch"),
        (lambda m: count(torch.jit.trace(m, torch.zeros(1, 4)), (4,)), "the model is TorchScript"),
        (lambda m: count(m, torch.zeros(1, 4), wired(m)), "after example inputs the wiring is given by name: active=wiring"),
    ],
)
def test_calls_that_cannot_be_counted(call, message):
    with pytest.raises(ValueError, match=message):
        call(two_layers())


def wired(model: nn.Module) -> dnw.Wiring:
    return dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.5)


# --- any model ---


@pytest.mark.parametrize(
    "wrapped",
    [
        torch.compile,
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda m: torch.compile(nn.DataParallel(m)),
        lambda m: nn.Sequential(torch.compile(m[0]), m[1], checkpoint_wrapper(m[2])),
        checkpoint_wrapper,
        lambda m: m.compile() or m,
        lambda m: m.to("meta"),
        torch.fx.symbolic_trace,
    ],
    ids=["compiled", "parallel", "averaged", "both", "inside", "checkpoint", "compiled in place", "meta", "traced"],
)
def test_wrapped_models_count_as_the_model_inside(wrapped):
    model = wrapped(two_layers())
    found = count(model, (4,), {"0.weight": torch.ones(5, 4, dtype=torch.bool).tril()})
    assert [(row.name, row.dense, row.nominal) for row in found.rows] == [("0.weight", 20, 14), ("2.weight", 15, 15)]


def test_models_that_cannot_be_copied_count():
    model = two_layers()
    model.lock, model.parts, model.scale = threading.Lock(), (i for i in range(3)), torch.ones(3, requires_grad=True) * 2
    model.register_forward_hook(lambda module, inputs, out: out * module.scale)
    assert count(model, (4,)).dense == 35
    assert next(model.parts) == 0


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weights_that_are_made_of_a_parameter_count_for_it():
    mask = torch.eye(5, 4, dtype=torch.bool)
    new = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)))
    old = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 5)))
    old(torch.zeros(1, 4))  # leaves a weight that is no leaf
    for model, name in ((new, "0.parametrizations.weight.original1"), (old, "0.weight_v")):
        row = count(model, torch.zeros(3, 4), active={name: mask}).rows[0]
        assert (row.name, row.dense, row.nominal, row.live) == (name, 3 * 20, 3 * 4, 3 * 4)


def test_casts_inside_a_model_keep_its_edges():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 5)

        def forward(self, x):
            return F.linear(x.bfloat16(), self.layer.weight.bfloat16())

    found = count(Cast(), (4,), {"layer.weight": torch.eye(5, 4, dtype=torch.bool)})
    assert [(row.name, row.dense, row.nominal, row.live) for row in found.rows] == [("layer.weight", 20, 4, 4)]


def test_states_made_on_another_device_take_part():
    class Filled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 2), nn.Linear(3, 1)

        def forward(self, x):
            state = torch.zeros(x.shape[0], 3, device="cpu")
            state[:, :2] = self.first(x)
            return self.second(state)

    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 0] = True
    rows = {row.name: row.live for row in count(Filled(), (4,), {"first.weight": mask}).rows}
    assert rows == {"first.weight": 1, "second.weight": 1}


def test_a_model_that_its_wiring_guards_counts():
    model = two_layers()
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.5, rule=dnw.TargetedDropout())
    assert count(model, (4,), wiring).nominal == 10 + 8
    with pytest.raises(RuntimeError, match="evaluate inside"), torch.no_grad():
        model.eval()(torch.zeros(1, 4))


def test_counting_leaves_model_and_inputs_alone():
    model = nn.Sequential(nn.BatchNorm1d(4), two_layers())
    seen = []
    model[0].register_forward_pre_hook(lambda module, inputs: seen.append(module))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    count(model, torch.zeros(2, 4))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(m.training for m in model.modules())
    assert seen[0] is not model[0]


# --- live channels ---


def masks_of(model: nn.Module, **edges: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Masks with some edges (target, source) by the name of the layer."""
    masks = {f"{n}.weight": torch.zeros_like(model.get_submodule(n).weight, dtype=torch.bool) for n in edges}
    for name, pairs in edges.items():
        for pair in pairs:
            masks[f"{name}.weight"][pair] = True
    return masks


def live_of(model: nn.Module, size: tuple[int, ...], masks: dict[str, torch.Tensor]) -> dict[str, int]:
    return {row.name.removesuffix(".weight"): row.live for row in count(model, size, masks).rows}


def named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def test_channels_that_nothing_reaches_or_nobody_reads():
    model = named(a=nn.Linear(3, 3), relu=nn.ReLU(), b=nn.Linear(3, 3), c=nn.Linear(3, 2))
    masks = masks_of(model, a=[(0, 0), (0, 1), (1, 2)], b=[(0, 0), (0, 2), (2, 1)], c=[(1, 0)])
    # a 0 -> b 0 -> c 1 is live; a 2 is a bias, which b 0 reads; a 1 -> b 2, which nobody reads
    assert live_of(model, (3,), masks) == {"a": 2, "b": 1, "c": 1}


def test_a_channel_that_is_dead_in_its_branch_lives_by_the_sum():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch, self.head = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 1, 1)

        def forward(self, x):
            y = self.stem(x)
            return self.head(y + self.branch(y).relu())

    model = Residual()
    masks = masks_of(model, stem=[(0, 0)], branch=[(0, 0, 1, 1), (1, 1, 0, 0)], head=[(0, 0)])
    assert live_of(model, (1, 2, 2), masks) == {"stem": 4, "branch": 4, "head": 4}
    masks = masks_of(model, stem=[(0, 0)], branch=[(1, 0, 1, 1), (1, 1, 0, 0)], head=[(0, 1)])
    assert live_of(model, (1, 2, 2), masks) == {"stem": 4, "branch": 4, "head": 4}
    masks = masks_of(model, stem=[(0, 0), (1, 0)], branch=[(1, 0, 1, 1)], head=[(0, 0)])
    assert live_of(model, (1, 2, 2), masks) == {"stem": 4, "branch": 0, "head": 4}


def test_an_edge_of_a_recurrent_network_is_live_where_it_is_once():
    model = nn.RNN(1, 2, batch_first=True)
    masks = {"weight_ih_l0": torch.tensor([[True], [False]]), "weight_hh_l0": torch.tensor([[True, False], [False, True]])}
    # the state of the second node starts at 0 and reads itself alone
    rows = {row.name: (row.nominal, row.live) for row in count(model, (3, 1), masks).rows}
    assert rows == {"weight_ih_l0": (3, 3), "weight_hh_l0": (6, 3)}


def test_what_an_unknown_operation_joins_is_live():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.b(torch.fft.fft(self.a(x)).real)[:, :1]

    masks = masks_of(Sorted(), a=[(0, 0)], b=[(0, 1), (1, 0)])
    assert live_of(Sorted(), (2,), masks) == {"a": 1, "b": 1}


def test_dead_heads_of_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, bias=False, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    masks = {"attention.in_proj_weight": torch.ones(12, 4, dtype=torch.bool), "attention.out_proj.weight": torch.eye(4) > 0}
    masks["attention.out_proj.weight"][2:] = False  # nothing reads the second head
    rows = {row.name.removeprefix("attention."): row.live for row in count(Attention(), (3, 4), masks).rows}
    assert rows == {"in_proj_weight": 3 * 6 * 4, "out_proj.weight": 3 * 2, "attention": 2 * 3 * 3 * 2}


def test_graphs_feel_what_is_dead_around_them():
    graph = StaticGraph((2, 2), 2)  # nodes 0 1 | 2 3 | 4 5
    model = named(stem=nn.Conv2d(1, 2, 1), graph=graph, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(2, 1))
    masks = masks_of(model, stem=[(0, 0)], head=[(0, 1)])
    masks["graph.weight"] = graph.levels.candidates()
    # from input 0 to output 5 alone: 0 -> 2, 3, 5 and 2, 3 -> 5
    live = live_of(model, (1, 2, 2), masks)
    assert (live["stem"], live["graph"], live["head"]) == (4, 4 * 5, 1)
    assert (live["graph.nodes.0.conv"], live["graph.nodes.1.conv"]) == (4 * 9, 2 * 4 * 9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.booleans())
def test_the_run_of_a_static_graph_agrees_with_its_live_nodes(seed, shared):
    graph = StaticGraph((3, 3, 2), 2, shared_outputs=shared)
    mask = (torch.rand(graph.weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.25) & graph.levels.candidates()
    live = live_by_graph(graph, {"weight": mask})[""]
    assert count(graph, (3, 1, 1), {"weight": mask}).rows[0].live == graph.levels.num_edges_between(mask, live)


class Blocks(nn.Module):
    """Residual sum, groups, concatenation, slices, writing in place, pooling."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm, self.c, self.d = nn.BatchNorm2d(4), nn.Conv2d(8, 4, 1), nn.Linear(16, 3)

    def forward(self, x):
        y = self.a(x)
        y[:, 1:] += 1
        y = y.relu() + self.norm(self.b(y.relu()))
        y = F.avg_pool2d(self.c(torch.cat([y, 2 * y.flip(1)], 1)), 2)
        return self.d(y.flatten(1))


class Upwards(nn.Module):
    """Transposed convolution, resizing, norm by groups, gates between halves, transposition."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.ConvTranspose2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 2)
        self.norm, self.c, self.d = nn.GroupNorm(2, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("order", torch.tensor([2, 0, 1, 3]))

    def forward(self, x):
        y, z = self.norm(self.b(F.interpolate(F.gelu(self.a(x)), scale_factor=2.0))).chunk(2, 1)
        y = self.c(torch.cat([torch.sigmoid(y) + z, z], 1).permute(0, 2, 3, 1)).mean(dim=(1, 2))
        return self.d(y[:, self.order]), y[:, 0]


def seen_to_live(model: nn.Module, size: tuple[int, ...], masks: dict[str, torch.Tensor]) -> dict[str, int]:
    """Live edges by experiment: of a layer's inputs those that differ between images, of its outputs those with a gradient."""
    inputs, outputs = defaultdict(list), defaultdict(list)

    def note(name, given, out):
        out.retain_grad()
        inputs[name].append(given.detach().clone())
        outputs[name].append(out)

    layers = {n.removesuffix(".weight"): model.get_submodule(n.removesuffix(".weight")) for n in masks}
    for name, layer in layers.items():
        layer.weight.data.mul_(masks[f"{name}.weight"])
        layer.register_forward_hook(lambda _, given, out, name=name: note(name, given[0], out))
    for _ in range(3):
        found = model(torch.randn(1, *size, dtype=torch.float64))
        sum((f * torch.randn_like(f)).sum() for f in (found if isinstance(found, tuple) else (found,))).backward()
    live = {}
    for name, layer in layers.items():
        dim = -1 if isinstance(layer, nn.Linear) else 1
        first, *others = inputs[name]
        reached = (sum((x - first).abs() for x in others).movedim(dim, 0).flatten(1) > 1e-12).any(1)
        wanted = (sum(x.grad.abs() for x in outputs[name]).movedim(dim, 0).flatten(1) > 1e-12).any(1)
        groups, is_transposed = getattr(layer, "groups", 1), isinstance(layer, nn.ConvTranspose2d)
        rows, columns = (reached, wanted) if is_transposed else (wanted, reached)
        columns = columns.view(groups, -1).repeat_interleave(len(rows) // groups, 0)
        between = rows[:, None] & columns
        live[name] = int(
            (masks[f"{name}.weight"].flatten(2 if dim == 1 else 1) & between.view(*between.shape, *[1] * (dim == 1))).sum()
        )
    return live


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: named(a=nn.Linear(4, 5), b=nn.Tanh(), c=nn.Linear(5, 5), d=nn.Tanh(), e=nn.Linear(5, 3)), (4,)),
        (Blocks, (3, 4, 4)),
        (Upwards, (4, 5, 5)),
    ],
    ids=["linear", "blocks", "upwards"],
)
def test_live_edges_are_those_that_an_experiment_finds(make, size):
    for seed in range(8):
        torch.manual_seed(seed)
        model = make().double().eval()
        for parameter in model.parameters():  # away from 0, so that nothing cancels or is cut off for all images
            parameter.data = torch.rand_like(parameter).add(0.5) * (torch.rand_like(parameter) < 0.5).double().mul(2).sub(1)
        density = (0.15, 0.3, 0.5)[seed % 3]
        masks = {n: torch.rand(p.shape) < density for n, p in model.named_parameters() if p.ndim > 1}
        rows = {row.name.removesuffix(".weight"): row for row in count(model, size, masks).rows}
        expected = seen_to_live(model, size, masks)
        assert {n: rows[n].live // (rows[n].dense // rows[n].parameters) for n in expected} == expected


def test_products_of_batches_that_are_added():
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addbmm(x.new_zeros(2, 4), x, self.weight)

    assert count(Added(), torch.randn(3, 2, 5)).dense == 3 * 2 * 5 * 4
