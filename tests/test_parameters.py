"""Which parameters are wired, and why others are not."""

import pytest
import torch
from torch import nn

from dnw._parameters import find_parameters
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
    assert found["embedding.weight"] == "tied to an embedding (embedding.weight)"
    assert found["conv.bias"] == found["lstm.bias_ih_l0"] == found["attention.in_proj_bias"] == "bias"
    assert found["own"].startswith("no weight of a convolution")
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


def test_weight_norm_leaves_its_gains_alone():
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.utils.weight_norm(nn.Conv1d(4, 6, 3)), nn.Linear(2, 2))
    assert names(model) == ["1.weight"]
    assert reasons(model)["0.weight_g"].startswith("no weight of a convolution")
    assert names(model, include=["0.weight_v"]) == ["0.weight_v"]


def test_a_child_called_module_is_no_wrapper():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert names(model) == ["module.weight"]


def test_names_inside_checkpoint_wrappers():
    model = nn.Sequential(torch.compile(nn.Linear(2, 2)))
    assert names(model) == ["0.weight"]


def test_lazy_parameters_are_refused():
    with pytest.raises(ValueError, match=r"'weight' has no shape yet; run one batch"):
        names(nn.LazyLinear(3))
