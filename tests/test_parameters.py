"""Which parameters are wired, and why others are not."""

import re

import pytest
import torch
from torch import nn

import dnw
from dnw._wiring.parameters import find_parameters
from dnw.graphs import StaticGraph


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.up = nn.ConvTranspose1d(4, 6, 2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.layer_norm = nn.LayerNorm((2, 4))
        self.embedding = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10)
        self.head.weight = self.embedding.weight
        self.lstm = nn.LSTM(4, 5, proj_size=2)
        self.cell = nn.GRUCell(4, 5)
        self.attention = nn.MultiheadAttention(8, 2)
        self.other_attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        self.own = nn.Parameter(torch.randn(3, 3))
        self.frozen = nn.Linear(2, 2)
        self.frozen.weight.requires_grad_(False)


def names(model, include=None, exclude=()):
    return [w.name for w in find_parameters(model, include, exclude)[0]]


def reasons(model, include=None, exclude=()):
    return {x.name: x.reason for x in find_parameters(model, include, exclude)[1]}


def test_defaults():
    assert names(Everything()) == [
        "conv.weight",
        "up.weight",
        "grouped.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "lstm.weight_hr_l0",
        "cell.weight_ih",
        "cell.weight_hh",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "other_attention.q_proj_weight",
        "other_attention.k_proj_weight",
        "other_attention.v_proj_weight",
        "other_attention.out_proj.weight",
    ]


def test_reasons():
    found = reasons(Everything())
    assert found["depthwise.weight"] == "depthwise convolution"
    assert found["norm.weight"] == found["layer_norm.weight"] == "norm"
    assert found["embedding.weight"] == "embedding, tied to head.weight"
    assert found["conv.bias"] == found["lstm.bias_ih_l0"] == found["attention.in_proj_bias"] == "bias"
    assert found["own"] == "parameter of Everything: name it with include to wire it"
    assert found["frozen.weight"] == "requires_grad=False"
    assert "head.weight" not in found  # met once, under its first name


def test_embedding_found_through_the_head_first():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.embedding, self.fc = nn.Linear(8, 10), nn.Embedding(10, 8), nn.Linear(2, 2)
            self.head.weight = self.embedding.weight

    assert names(Head()) == ["fc.weight"]
    assert reasons(Head())["head.weight"] == "tied to an embedding (embedding.weight)"


def test_an_embedding_used_in_two_places_is_tied_to_nothing():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.Embedding(4, 3))
    model[2].weight = model[0].weight
    assert reasons(model)["0.weight"] == "embedding"


def test_a_weight_held_elsewhere_too_counts_as_what_uses_it():
    class Keeper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(4, 6, 2)
            self.kept = nn.ParameterList([self.up.weight])

    class Before(Keeper):
        def __init__(self) -> None:
            super().__init__()
            self.kept, self.up = self._modules.pop("kept"), self._modules.pop("up")

    for model in (Keeper(), Before()):
        (found,), _ = find_parameters(model, None, ())
        assert (found.parameter is model.up.weight, found.module, found.layout.transposed) == (True, model.up, True)
    assert names(Before()) == ["kept.0"]
    assert names(Before(), include=["up"]) == ["kept.0"]


def test_members_of_lists_and_dictionaries_of_parameters():
    model = nn.Module()
    model.fc = nn.Linear(2, 2)
    model.several = nn.ParameterList([nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(2))])
    model.named = nn.ParameterDict({"left": nn.Parameter(torch.randn(2, 2))})
    assert names(model) == ["fc.weight"]
    found = reasons(model)
    assert found["several.0"] == "parameter of ParameterList: name it with include to wire it"
    assert found["several.1"] == "one-dimensional"
    assert found["named.left"] == "parameter of ParameterDict: name it with include to wire it"
    assert names(model, include=["several.0", "named"]) == ["several.0", "named.left"]


def test_a_parameter_without_embedding_tied_to_itself_is_met_once():
    a = nn.Linear(3, 3)
    model = nn.Sequential(a, nn.ReLU(), a)
    assert names(model) == ["0.weight"]


def test_include_and_exclude():
    model = Everything()
    assert names(model, include=["attention.*"]) == ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert names(model, include=[nn.Conv2d]) == ["conv.weight", "depthwise.weight", "grouped.weight"]
    assert names(model, include=["depthwise"]) == ["depthwise.weight"]
    assert names(model, include=["own"]) == ["own"]
    assert names(model, include=["embedding.weight"]) == ["embedding.weight"]
    assert names(model, include=["norm.weight"]) == ["norm.weight"]
    assert "depthwise.weight" not in names(model, include=["*"])
    assert "embedding.weight" not in names(model, include=["*"])
    assert "conv.weight" not in names(model, exclude=["conv"])
    assert reasons(model, exclude=["conv"])["conv.weight"] == "excluded by 'conv'"
    assert reasons(model, exclude=[nn.LSTM])["lstm.weight_ih_l0"] == "excluded by LSTM"
    assert reasons(model, include=["own"])["conv.weight"] == "not included"


def test_the_defaults_and_more():
    model = Everything()
    defaults = names(model)
    assert names(model, include=[dnw.DEFAULTS]) == defaults
    assert set(names(model, include=[dnw.DEFAULTS, "own", "depthwise"])) == {*defaults, "own", "depthwise.weight"}
    assert set(names(model, include=["own", dnw.DEFAULTS], exclude=["conv"])) == {*defaults, "own"} - {"conv.weight"}
    graphs = nn.Sequential(nn.Conv2d(3, 2, 1), StaticGraph((2, 3), 4), nn.Flatten(), nn.Linear(16, 2))
    assert names(graphs, include=[dnw.DEFAULTS, "3"]) == ["1.weight", "3.weight"]
    assert reasons(graphs, include=[dnw.DEFAULTS, "3"])["0.weight"] == "outside the graphs"
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.5, include=dnw.DEFAULTS)
    assert list(wiring) == defaults
    with pytest.raises(ValueError, match="exclude: dnw.DEFAULTS is neither a name pattern nor a module type"):
        names(model, exclude=[dnw.DEFAULTS])


def test_a_parameter_that_is_not_trained_is_wired_only_by_name():
    model = Everything()
    assert names(model, include=["frozen.weight"]) == names(model, include=["frozen"]) == ["frozen.weight"]
    assert "frozen.weight" not in names(model, include=["*weight"])
    assert reasons(model, include=[nn.Linear, "conv"])["frozen.weight"] == "requires_grad=False"
    for selector in ("frozen.*", nn.Bilinear):
        model.bilinear = nn.Bilinear(2, 2, 2).requires_grad_(False)
        with pytest.raises(
            ValueError, match=r"matches only parameters that are not trained \('\w+.weight': requires_grad=False"
        ):
            names(model, include=[selector])


def test_edges_of_a_weight_that_is_not_trained_are_chosen_once():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    trained = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="the optimizer does not hold '0.weight'; give it these parameters"):
        dnw.wire(model, trained, density=0.5, include=[dnw.DEFAULTS, "0.weight"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wiring = dnw.wire(model, optimizer, density=0.5, include=[dnw.DEFAULTS, "0.weight"])
    largest = before.abs() >= before.abs().flatten().sort().values[-12]
    for _ in range(2):
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        assert torch.equal(wiring["0.weight"].active, largest)
        assert torch.equal(model[0].weight, before * largest)
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(wiring["0.weight"].latent, before)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_or_type_that_matches_nothing_is_an_error(argument):
    with pytest.raises(ValueError, match=rf"{argument}='convv.weight' matches no parameter.*did you mean 'conv.weight'"):
        names(Everything(), **{argument: ["convv.weight"]})
    with pytest.raises(ValueError, match=rf"{argument}=Conv3d matches no parameter"):
        names(Everything(), **{argument: [nn.Conv3d]})
    with pytest.raises(ValueError, match="neither a name pattern nor a module type"):
        names(Everything(), **{argument: [3]})


def test_a_pattern_that_matches_only_what_stays_dense():
    with pytest.raises(ValueError, match=r"include='norm\.\*' matches only parameters that stay dense by their kind"):
        names(Everything(), include=["norm.*"])


def test_in_a_model_with_graphs_only_their_edges_are_wired_unless_asked():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), StaticGraph((2, 3), 4), nn.Flatten(), nn.Linear(16, 2))
    assert names(model) == ["1.weight"]
    found = reasons(model)
    assert found["0.weight"] == found["3.weight"] == "outside the graphs"
    assert found["1.nodes.0.conv.weight"] == "depthwise convolution"
    assert names(model, include=["1", "3"]) == ["1.weight", "3.weight"]
    (edges, _), _ = find_parameters(model, ["1", "3"], ())
    assert torch.equal(edges.candidates, model[1].edge_candidates()["weight"])


def test_nothing_to_wire():
    with pytest.raises(ValueError, match=r"nothing to wire \(norm\)"):
        names(nn.BatchNorm2d(3))


def test_names_without_wrappers():
    inner = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert names(nn.DataParallel(inner)) == ["0.weight", "1.weight"]
    assert names(torch.compile(inner)) == ["0.weight", "1.weight"]


def test_a_child_called_module_is_no_wrapper():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert names(model) == ["module.weight"]


def test_names_inside_checkpoint_wrappers():
    model = nn.Sequential(torch.compile(nn.Linear(2, 2)))
    assert names(model) == ["0.weight"]


def test_the_model_itself_as_a_selector():
    assert reasons(nn.ModuleList([nn.Linear(2, 2)]), exclude=["0.bias"])["0.bias"] == "excluded by '0.bias'"
    model = StaticGraph((2, 3), 4)
    with pytest.raises(ValueError, match=r"excluded by '' \(the model's own parameters\)"):
        names(model, exclude=[""])


def converted(dtype: torch.dtype) -> nn.Module:
    """A linear layer between two others, its weight in some dtype."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(4, 4), nn.Linear(2, 2))
    weight = torch.zeros(4, 4, dtype=dtype)
    model[1].weight = nn.Parameter(weight, requires_grad=dtype.is_floating_point or dtype.is_complex)
    return model


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (
            torch.float8_e4m3fn,
            "is quantized (torch.float8_e4m3fn); wire it before quantizing it, or leave it dense with exclude",
        ),
        (torch.uint8, "is quantized (torch.uint8); wire it before"),
        (torch.complex64, "is torch.complex64, and complex weights cannot be wired; leave it dense with exclude"),
    ],
)
def test_what_cannot_be_ranked_is_refused_by_name(dtype, message):
    model = converted(dtype)
    for include in (None, ["1"]) if model[1].weight.requires_grad else (["1.weight"], ["1"]):
        with pytest.raises(ValueError, match=re.escape(f"'1.weight' {message}")):
            dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.5, include=include)
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.5, exclude="1")
    assert list(wiring) == ["0.weight", "2.weight"]


def test_packed_weights_are_refused_by_name():
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(TwoTensor(torch.zeros(2, 2), torch.zeros(2, 2)))
    with pytest.raises(ValueError, match=r"'1.weight' is quantized \(TwoTensor\); wire it before"):
        names(model)


def test_meta_parameters_are_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"'1.weight' is on the meta device and has no values yet; give it some \(to_empty"):
        dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.5)
    with torch.device("meta"):
        graph = StaticGraph((2, 3), 4)
    with pytest.raises(ValueError, match="'weight' is on the meta device"):
        names(graph)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_that_are_wired(dtype):
    assert names(converted(dtype)) == ["0.weight", "1.weight", "2.weight"]


def test_lazy_parameters_are_refused():
    with pytest.raises(ValueError, match=r"'weight' has no shape yet; run one batch"):
        names(nn.LazyLinear(3))
