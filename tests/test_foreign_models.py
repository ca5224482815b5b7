"""Layers of other libraries: known by their names and shapes, wired or left dense for a reason that says what to do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dnw
from dnw._wiring.parameters import find_parameters


def names(model: nn.Module, include=None, exclude=()) -> list[str]:
    return [w.name for w in find_parameters(model, include, exclude)[0]]


def reasons(model: nn.Module, include=None, exclude=()) -> dict[str, str]:
    return {x.name: x.reason for x in find_parameters(model, include, exclude)[1]}


def train(model: nn.Module, steps: int = 2, **arguments) -> dnw.Wiring:
    """Wires a language model, trains it on its own inputs and checks that it is as sparse as it says."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    wiring = dnw.wire(model, optimizer, density=0.25, **arguments)
    tokens = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    for name, parameter in wiring.items():
        assert parameter.num_active == dnw.num_edges(0.25, parameter.num_candidates)
        assert torch.equal(model.get_parameter(name), parameter.latent * parameter.active)
    return wiring


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def gpt2(transformers) -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=12, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


GPT2 = [f"transformer.h.0.{layer}.weight" for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


def test_gpt2(transformers):
    model = gpt2(transformers)
    assert list(train(model)) == GPT2
    found = reasons(gpt2(transformers))
    assert found["transformer.wte.weight"] == "embedding, tied to lm_head.weight"
    assert found["transformer.wpe.weight"] == "embedding"
    assert found["transformer.h.0.attn.c_attn.bias"] == "bias"


def test_gpt2_with_its_tied_head(transformers):
    assert list(train(gpt2(transformers), include=[dnw.DEFAULTS, "lm_head.weight"])) == ["transformer.wte.weight", *GPT2]
    assert list(train(gpt2(transformers), exclude="*.c_proj")) == GPT2[::2]


def test_the_targets_of_gpt2s_layers_are_their_outputs(transformers):
    model = gpt2(transformers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, optimizer, density=0.5, pattern=dnw.Channels())
    layer, weight = model.transformer.h[0].mlp.c_fc, wiring["transformer.h.0.mlp.c_fc.weight"]
    silent = layer(torch.randn(3, 8)).sub(layer.bias).abs().amax(0) < 1e-6
    assert int(silent.sum()) == 16
    assert weight.edges().shape == (32, 8)
    assert set(weight.edges().target.tolist()) == set((~silent).nonzero().flatten().tolist())


def test_a_class_that_is_only_called_conv1d_is_none():
    class Conv1D(nn.Module):
        def __init__(self, nf: int) -> None:
            super().__init__()
            self.nf, self.weight = nf, nn.Parameter(torch.zeros(4, 6))

    assert names(Conv1D(6)) == ["weight"]
    with pytest.raises(ValueError, match=r"nothing to wire \(parameter of Conv1D\); name what to wire with include"):
        names(Conv1D(4))


def test_bert(transformers):
    config = transformers.BertConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=11
    )
    wiring = train(transformers.BertForMaskedLM(config))
    layer = "bert.encoder.layer.0"
    attention = [f"{layer}.attention.{x}.weight" for x in ("self.query", "self.key", "self.value", "output.dense")]
    rest = [f"{layer}.intermediate.dense.weight", f"{layer}.output.dense.weight", "cls.predictions.transform.dense.weight"]
    assert list(wiring) == attention + rest
    assert wiring.summary().left_out[0].reason == "embedding, tied to cls.predictions.decoder.weight"


def mixture(transformers) -> nn.Module:
    config = transformers.MixtralConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        vocab_size=11,
    )
    return transformers.MixtralForCausalLM(config)


def test_experts_in_one_tensor(transformers):
    model = mixture(transformers)
    experts = [n for n, p in model.named_parameters() if p.ndim == 3]
    if not experts:
        pytest.skip("this release of transformers has a module for each expert")
    found = reasons(model)
    assert {found[n] for n in experts} == {"experts of MixtralExperts in one tensor: name it with include to wire it"}
    defaults = names(model)
    wiring = train(model, include=[dnw.DEFAULTS, "*.experts.*"])
    assert set(wiring) == {*defaults, *experts}
    down = wiring["model.layers.0.mlp.experts.down_proj"]
    edges = down.edges()
    assert edges.shape == (2 * 8, 2 * 12)
    assert torch.equal(edges.target // 8, edges.source // 12)  # no edge leads from one expert to another
    dense = torch.zeros(edges.shape)
    dense[edges.target, edges.source] = edges.weight
    assert torch.equal(torch.stack([dense[:8, :12], dense[8:, 12:]]), down.weight)


def test_experts_that_say_that_they_are_the_other_way_round():
    class GroupedExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.is_transposed, self.w1 = True, nn.Parameter(torch.randn(3, 4, 8))

    model = GroupedExperts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wiring = dnw.wire(model, optimizer, density=0.5, include="w1", pattern=dnw.Channels())
    active = wiring["w1"].active
    assert torch.equal(active.any(1), active.all(1))
    assert int(active.all(1).sum()) == 12


class Adapted(nn.Module):
    """A linear layer with an adapter beside it, in the form that peft gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, 8).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})
        self.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(torch.zeros(2, 8))})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_adapters_stay_dense_unless_named():
    model = nn.Sequential(Adapted(), nn.Linear(8, 2))
    assert names(model) == ["1.weight"]
    found = reasons(model)
    assert found["0.base_layer.weight"] == "requires_grad=False"
    adapters = ["0.lora_A.default.weight", "0.lora_B.default.weight", "0.lora_embedding_A.default"]
    assert {found[n] for n in adapters} == {"LoRA adapter: name it with include to wire it"}
    assert names(model, include=[dnw.DEFAULTS, "*.lora_A.*"]) == ["0.lora_A.default.weight", "1.weight"]
    assert names(model, include=["0.lora_B.default"]) == ["0.lora_B.default.weight"]
    with pytest.raises(ValueError, match=r"nothing to wire \(LoRA adapter, bias, requires_grad=False\); name"):
        names(Adapted())


def test_adapters_that_a_layer_holds_itself():
    class Linear(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.lora_A, self.lora_B = nn.Parameter(torch.zeros(2, 4)), nn.Parameter(torch.zeros(4, 2))

    assert names(Linear()) == ["weight"]
    assert reasons(Linear())["lora_A"] == "LoRA adapter: name it with include to wire it"


def test_attention_of_unknown_classes_is_named():
    class PackedAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj_weight, self.out = nn.Parameter(torch.zeros(12, 4)), nn.Linear(4, 4)

    assert names(PackedAttention()) == ["out.weight"]
    assert reasons(PackedAttention())["in_proj_weight"] == "parameter of PackedAttention: name it with include to wire it"
    assert names(PackedAttention(), include=[dnw.DEFAULTS, "*in_proj_weight"]) == ["in_proj_weight", "out.weight"]


def test_decoders_and_attention_between_widths():
    model = nn.ModuleList([nn.TransformerDecoderLayer(8, 2, 12), nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True)])
    attention = ["in_proj_weight", "out_proj.weight"]
    assert names(model) == [
        *(f"0.self_attn.{w}" for w in attention),
        *(f"0.multihead_attn.{w}" for w in attention),
        "0.linear1.weight",
        "0.linear2.weight",
        *(f"1.{w}_proj_weight" for w in "qkv"),
        "1.out_proj.weight",
    ]
    assert set(reasons(model).values()) == {"bias", "norm"}


def test_a_module_in_two_places_is_wired_once_under_its_first_name():
    qkv = nn.Linear(4, 12)
    model = nn.ModuleDict({"first": nn.ModuleDict({"qkv": qkv}), "second": nn.ModuleDict({"qkv": qkv})})
    assert names(model) == ["first.qkv.weight"]
    assert names(model, include=["second.qkv"]) == ["first.qkv.weight"]
    assert (
        reasons(nn.ModuleList([model, nn.Linear(2, 2)]), exclude=["0.second.*"])["0.first.qkv.weight"]
        == "excluded by '0.second.*'"
    )


def test_a_summary_has_a_line_for_every_reason(transformers):
    model = gpt2(transformers)
    summary = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.25).summary()
    lines = [line.split() for line in str(summary).splitlines()]
    assert [line[0] for line in lines[:6]] == ["wired", *GPT2, "total"]
    assert lines[7:] == [
        ["left", "dense", "tensors", "parameters", "such", "as"],
        ["embedding", "1", "96", "transformer.wpe.weight"],
        ["embedding,", "tied", "to", "lm_head.weight", "1", "88", "transformer.wte.weight"],
        ["bias", "4", "72", "transformer.h.0.attn.c_attn.bias,", "transformer.h.0.attn.c_proj.bias,", "..."],
        ["norm", "6", "48", "transformer.h.0.ln_1.weight,", "transformer.h.0.ln_1.bias,", "..."],
        ["total", "12", "304"],
    ]
    assert len(summary.left_out) == 12
