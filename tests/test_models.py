"""The classifiers, and what they give on the fixtures recorded from the authors' code."""

import lzma
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import reference

import dnw
from dnw.models import (
    GraphChain,
    Stage,
    load_original,
    mobilenet_v1,
    original_num_edges,
    read_original,
    tiny_cifar10,
    tiny_cifar10_continuous,
    tiny_cifar10_discrete,
    tiny_digits,
    tiny_mnist,
)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.detach() - theirs).norm() / theirs.norm()).item()


def recorded(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and everything else of a fixture."""
    with np.load(reference(f"{name}.npz"), allow_pickle=False) as archive:
        values = {k: archive[k] for k in archive.files}
    tensors = {k: torch.from_numpy(v) for k, v in values.items() if v.dtype.kind != "U"}
    tensors = {k: v.float() if v.dtype == torch.float16 else v for k, v in tensors.items()}
    weights = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    return weights, {k: v for k, v in tensors.items() if not k.startswith("state.")}


@pytest.mark.parametrize(("make", "shape"), [(tiny_digits, (1, 8, 8)), (tiny_mnist, (1, 28, 28)), (tiny_cifar10, (3, 32, 32))])
def test_classifiers_give_logits(make, shape):
    assert make()(torch.randn(2, *shape)).shape == (2, 10)


def test_published_number_of_parameters():
    model = tiny_cifar10()
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), num_edges=32_000)
    assert wiring.num_candidates == 264_960
    graph = wiring.num_active + sum(p.numel() for p in model.graph.nodes.parameters())
    assert graph == 40_800
    rest = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("graph."))
    assert graph + rest == 43_058


@pytest.mark.data
@pytest.mark.parametrize("name", ["static_dnw", "static_random_graph"])
def test_reproduces_the_original(name):
    weights, expected = recorded(name)
    model = tiny_cifar10(rank_all_entries=True)
    edges = load_original(model, weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if edges:
        wiring = dnw.wire(model, optimizer, rule=dnw.Frozen(edges))
    else:
        wiring = dnw.wire(model, optimizer, num_edges=original_num_edges(0.95, 640_000))
    assert wiring.num_active == 32_000
    model.eval()
    assert relative(model(expected["x"]), expected["logits_eval"]) < 1e-4
    model.train()
    logits = model(expected["x"])
    assert relative(logits, expected["logits_train"]) < 1e-4
    loss = F.cross_entropy(logits, expected["y"])
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-4)
    loss.backward()
    check_gradients(model, expected, wiring["graph.weight"].active if edges else None)


def check_gradients(model, expected, active):
    """The sampled gradients, by the original's names; its random graph masks the gradient of dormant edges."""
    grads = {n: p.grad for n, p in model.named_parameters()}
    edges = grads["graph.weight"] if active is None else grads["graph.weight"] * active
    ours = {"conv.weight": torch.cat([grads[f"graph.nodes.{i}.conv.weight"] for i in range(5)]), "graph.weight": edges}
    for name, grad in grads.items():
        room, _, rest = name.partition(".")
        if room == "stem":
            ours[f"downsample.{rest}"] = grad
        elif room == "classifier":
            ours[f"fc.{rest}"] = grad
        elif ".norm." in name:
            ours["norm." + name.removeprefix("graph.nodes.").replace(".norm", "")] = grad
    check_sampled_gradients(ours, expected)


def check_sampled_gradients(ours, expected):
    checked = 0
    for key in (k for k in expected if k.endswith(".norm") and k.startswith("grad.")):
        name = key.removeprefix("grad.").removesuffix(".norm")
        grad, norm = ours[name].flatten(), expected[key].item()
        if norm < 1e-5:  # a bias before a norm: rounding noise in both
            assert grad.norm() < 1e-5
            continue
        assert grad.norm().item() == pytest.approx(norm, rel=1e-4), name
        sample = expected[f"grad.{name}.value"]
        error = (grad[expected[f"grad.{name}.index"]] - sample).norm() / sample.norm().clamp_min(norm * 1e-3)
        assert error < 1e-4, name
        checked += 1
    assert checked >= 12


def chain(**options) -> GraphChain:
    return GraphChain(rank_all_entries=True, **options)


RECORDED = {
    "discrete_time_dnw": (tiny_cifar10_discrete, {}),
    "continuous_time_dnw": (lambda: tiny_cifar10_continuous(rectify_in_place=True), {}),
    "cifar_mobilenetv1_dnw_x225": (lambda: chain(num_classes=10, image_stride=1), {}),
    "imagenet_mobilenetv1_dnw_small_x225": (lambda: chain(learned_classifier=True), {"classifier.weight": 230_400}),
}


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_reproduces_the_other_networks_of_the_original(name):
    make, more = RECORDED[name]
    if name == "continuous_time_dnw":
        pytest.importorskip("torchdiffeq")
    weights, expected = recorded(name)
    model = make()
    assert load_original(model, weights) == {}
    budget = {**model.num_edges(0.225), **more} if isinstance(model, GraphChain) else {"graph.weight": 32_000}
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), num_edges=budget, include=list(budget))
    assert [p.num_active for p in wiring.values()] == expected["edges_per_graph"].tolist()
    model.eval()
    with torch.no_grad():
        assert relative(model(expected["x"]), expected["logits_eval"]) < 1e-4
    model.train()
    logits = model(expected["x"])
    assert relative(logits, expected["logits_train"]) < 1e-4
    loss = F.cross_entropy(logits, expected["y"])
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-4)
    loss.backward()
    check_sampled_gradients(original_gradients(model), expected)


def original_gradients(model) -> dict[str, torch.Tensor]:
    """Our gradients by the original's names."""
    ours = {}
    for name, parameter in model.named_parameters():
        room, _, rest = name.partition(".")
        if room == "graph":
            theirs = "graph.weight" if rest == "weight" else rest
            ours[theirs] = ours[f"odesolve.odefunc.{theirs}"] = parameter.grad
        elif room != "graphs":
            rooms = {"stem": "downsample", "conv": "conv1", "norm": "bn", "classifier": "linear"}
            ours[f"{rooms[room]}.{rest}"] = parameter.grad
    if isinstance(model, GraphChain):
        ours["linear.graph.weight"] = model.classifier.weight.grad
        for i, graph in enumerate(model.graphs):
            ours[f"layers.{i}.graph.weight"] = graph.weight.grad
            ours[f"layers.{i}.downsample.0.weight"] = graph.nodes[0].conv.weight.grad
            for j, node in enumerate(graph.nodes):
                ours[f"layers.{i}.norm.{j}.weight"], ours[f"layers.{i}.norm.{j}.bias"] = (
                    node.norm.weight.grad,
                    node.norm.bias.grad,
                )
            if len(graph.nodes) > 1:
                ours[f"layers.{i}.conv.weight"] = torch.cat([node.conv.weight.grad for node in graph.nodes[1:]])
    else:
        ours["fc.weight"], ours["fc.bias"] = model.classifier.weight.grad, model.classifier.bias.grad
    return ours


def test_chains_have_the_published_candidates_and_budgets():
    model = GraphChain()
    wiring = dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), num_edges=model.num_edges(0.225))
    assert [p.num_candidates for p in wiring.values()] == [2048, 32_768, 131_072, 4_718_592, 2_097_152]
    assert wiring.num_candidates == 6_981_632
    assert list(model.num_edges(0.225).values()) == [104, 1245, 4977, 72_991, 79_627]
    assert list(model.num_edges(0.51).values()) == [533, 6393, 25_569, 375_011, 409_102]
    for graph, sources in zip(model.graphs, (32, 192, 384, 2816, 1536), strict=True):
        bound = sources**-0.5
        assert 0.99 * bound < wiring_latent(wiring, graph).abs().max() <= bound


def wiring_latent(wiring: dnw.Wiring, graph) -> torch.Tensor:
    return next(p.latent for p in wiring.values() if p.latent.shape == graph.weight.shape)


@pytest.mark.parametrize(("width", "parameters"), [(0.25, 0.470), (0.5, 1.332), (1.0, 4.232)])
def test_plain_mobilenet_has_the_known_number_of_parameters(width, parameters):
    with torch.device("meta"):
        model = mobilenet_v1(width=width)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=6e-4)


def test_chains_at_both_image_sizes_and_bad_ones():
    for size, stride in ((32, 1), (64, 2)):
        assert GraphChain(10, image_stride=stride)(torch.randn(2, 3, size, size)).shape == (2, 10)
        assert mobilenet_v1(10, width=0.25, image_stride=stride)(torch.randn(2, 3, size, size)).shape == (2, 10)
    with pytest.raises(ValueError, match="which has 4 outputs; they must be its inputs"):
        GraphChain(10, stages=(Stage(3, 4, 1, 1), Stage(5, 6, 1, 2)))
    with pytest.raises(ValueError, match=r"width=1.5: a width multiplier lies in \(0, 1\]"):
        GraphChain(10, stages=(Stage(3, 4, 1, 1),)).num_edges(1.5)
    with pytest.raises(ValueError, match="leaves no channel"):
        mobilenet_v1(width=0.01)
    model = GraphChain(10, stages=(Stage(3, 4, 1, 2),))
    with pytest.raises(ValueError, match="num_edges=99 for 'graphs.0.weight': allowed is a whole number from 1 to 40"):
        dnw.wire(model, torch.optim.SGD(model.parameters(), lr=0.1), num_edges={"graphs.0.weight": 99})


# The recording starts from half-precision weights, 568 of which tie for the last 23 places. The original ranks with a sort
# that is not stable; these are the ones it took.
TIES = [
    11420, 46916, 56421, 62223, 111453, 132398, 144949, 150812, 161861, 208456, 247334, 290487,
    319727, 330227, 347614, 411558, 499559, 521170, 529053, 562505, 585829, 618107, 623685,
]  # fmt: skip


@pytest.mark.data
@pytest.mark.slow
def test_follows_the_originals_trajectory():
    weights, expected = recorded("static_dnw_trajectory")
    flat = weights["graph.weight"].flatten()
    flat[TIES] = torch.nextafter(flat[TIES], 2 * flat[TIES])
    model = tiny_cifar10(rank_all_entries=True)
    load_original(model, weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    wiring = dnw.wire(model, optimizer, num_edges=original_num_edges(0.95, 640_000))
    read = model.graph.levels.candidates()
    for step in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(expected["x"][step]), expected["y"][step])
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(expected["loss"][step].item(), abs=1e-3)
        bits = np.unpackbits(expected[f"edges_after_step_{step}"].numpy())[:640_000]
        theirs, ours = torch.from_numpy(bits).bool().view(800, 800), wiring["graph.weight"].active
        assert int(theirs.sum()) == int(ours.sum()) == 32_000
        shared = int((ours & theirs & read).sum())
        assert shared >= 0.999 * int((theirs & read).sum())
        assert shared >= 0.999 * int((ours & read).sum())
        # Entries that are never read keep their ties for ever, so among them the unstable sort goes on to decide.
        assert int((ours & theirs).sum()) >= 0.998 * 32_000
    latent = wiring["graph.weight"].latent.flatten()[expected["latent_index"]]
    torch.testing.assert_close(latent, expected["latent_value"], atol=1e-5, rtol=1e-4)
    model.eval()
    torch.testing.assert_close(model(expected["x_test"]), expected["logits_test"], atol=1e-3, rtol=1e-3)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "epoch_9.pt"
    path.write_bytes(lzma.decompress(reference("static_dnw_epoch_9.pt.xz").read_bytes()))
    return path


@pytest.mark.data
def test_opens_a_checkpoint_of_the_original(checkpoint):
    content = read_original(checkpoint)
    assert content.epoch == 9
    weights, _ = recorded("static_dnw")
    assert all(torch.equal(content.weights[name], tensor) for name, tensor in weights.items())
    load_original(tiny_cifar10(), content.weights)


def test_old_file_form(tmp_path):
    path = tmp_path / "best.pt"
    model = OrderedDict({"module.fc.weight": torch.ones(2, 3)})
    torch.save({"model": model}, path, _use_new_zipfile_serialization=False)
    content = read_original(path)
    assert content.epoch is None
    assert torch.equal(content.weights["fc.weight"], torch.ones(2, 3))


class Hostile:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("form", ["zip", "old", "pickle", "fake_meter"])
def test_a_hostile_checkpoint_is_refused_and_nothing_runs(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"model": {"fc.weight": torch.ones(2)}, "meters": Hostile()}
    if form == "pickle":
        (tmp_path / "bad.pt").write_bytes(pickle.dumps(Hostile()))
    elif form == "fake_meter":  # calls the class that is let in, with arguments, and sets its state
        with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
            code = b"\x80\x02ctrain\nScalarMeter\nX\x03\x00\x00\x00abc\x85R."
            archive.writestr("bad/data.pkl", code)
            archive.writestr("bad/version", "3")
            archive.writestr("bad/byteorder", "little")
    else:
        torch.save(content, tmp_path / "bad.pt", _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"bad.pt: (refused: its pickle|not a readable PyTorch file)"):
        read_original(tmp_path / "bad.pt")
    assert not (tmp_path / "executed").exists()


def test_a_refusal_names_what_was_refused(tmp_path):
    torch.save({"model": {}, "meters": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"its pickle names (io|_io|builtins)\.open, which could run code"):
        read_original(tmp_path / "bad.pt")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut off", b"\x80\x02}."])
def test_a_damaged_checkpoint_is_one_clear_error(content, tmp_path):
    path = tmp_path / "bad.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad.pt: "):
        read_original(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_original(tmp_path / "none.pt")


@pytest.mark.data
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("fc.bias"), "has nothing for 'classifier.bias'"),
        (
            lambda w: w.update({"fc.weight": torch.ones(3, 3)}),
            r"'classifier.weight' has shape \(3, 3\), the model's has \(10, 100\)",
        ),
        (lambda w: w.update({"surprise": torch.ones(1)}), "holds 'surprise'"),
        (
            lambda w: w.update({"norm.9.weight": torch.ones(1)}),
            "'graph.nodes.9.norm.weight', which the model does not have",
        ),
    ],
)
def test_weights_that_do_not_fit_change_nothing(change, message):
    weights, _ = recorded("static_dnw")
    change(weights)
    model = tiny_cifar10()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        load_original(model, weights)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_original_rounding():
    assert original_num_edges(0.95, 640_000) == 32_000
    assert original_num_edges(0.3, 10) == 7
    assert original_num_edges(0.9, 7) == 1
    assert original_num_edges(1 - 0.145, 100) == 15
