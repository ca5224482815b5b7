"""Circuits: what tasks ask, which nodes and edges are found where they are known, and what is written of them."""

from __future__ import annotations

import json

import pytest
import torch
from pictures import opened, unpacked
from torch import Tensor, nn

from dnw.circuits import ANY_OTHER, TASKS, Circuit, Pair, Task, find_circuit, python_task, task_loss, write_circuit
from dnw.circuits._find import _means
from dnw.data import read_python_source
from dnw.models import Decoder, Nodes

CODE = b"""
class Parser:
    def read(self, name="some text", other='more'):
        if name in self.names["first"]:
            return self.names[other]
        value = self.find(name, 'x y', "a_b")
        other = value
        for part in value:
            print(part)
"""


def source(text: bytes = CODE) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


# --- tasks ---


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("quotes", {b'"some text': b'"', b"'more": b"'", b'"first': b'"', b"'x y": b"'", b'"a_b': b'"'}),
        ("brackets", {b"print(part": b")", b"names[other": b"]"}),
    ],
)
def test_a_task_asks_where_the_answer_comes_next(name, wanted):
    found = {}
    for _, place, answer in TASKS[name](CODE):
        assert CODE[place] == answer
        (before,) = [text for text in wanted if CODE[:place].endswith(text)]
        found[before] = bytes([answer])
    assert found == wanted


def test_indentation_asks_whether_a_line_goes_further_in():
    found = [
        (kind, CODE[:place].rsplit(b"\n", 2)[1].strip(), place, answer) for kind, place, answer in TASKS["indentation"](CODE)
    ]
    opened_lines = {line for kind, line, *_ in found if kind}
    assert opened_lines == {
        b"class Parser:",
        b"for part in value:",
        *(line for line in opened_lines if line.startswith((b"def", b"if"))),
    }
    assert all(line.endswith(b":") == kind for kind, line, *_ in found)
    for kind, _, place, answer in found:
        assert answer == (ord(" ") if kind else ANY_OTHER)
        assert (CODE[place] == ord(" ")) == kind
        assert set(CODE[:place].rsplit(b"\n", 1)[1]) <= {ord(" ")}


def test_prompts_of_both_kinds_come_in_pairs():
    task = python_task("quotes", source(), length=12, pairs=2)
    assert task.prompts.shape == (4, 12)
    assert {chr(x) for x in task.right[::2]} == {"'"}
    assert {chr(x) for x in task.right[1::2]} == {'"'}
    assert torch.equal(task.right, task.wrong.view(2, 2).flip(1).flatten())
    for prompt, right in zip(task.prompts.tolist(), task.right.tolist(), strict=True):
        assert bytes([*prompt, right]) in CODE
    one, other = task.halves()
    assert torch.equal(torch.cat([one.prompts, other.prompts]), task.prompts)
    assert torch.equal(python_task("quotes", source(), length=12, pairs=2).prompts, task.prompts)


def test_the_standard_library_has_every_task():
    _, held_out = read_python_source()
    for name in TASKS:
        assert len(python_task(name, held_out, pairs=50)) == 100


def test_tasks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="task 'colour': there are quotes, brackets, indentation"):
        python_task("colour", source())
    with pytest.raises(ValueError, match=r"task 'brackets': the source, 5 bytes, has no example of one of its two kinds"):
        python_task("brackets", source(b"(abc)"), length=1)
    with pytest.raises(ValueError, match="no pairs; give pairs, all prompts of the same length"):
        Task.from_pairs("mine", [])
    with pytest.raises(ValueError, match="prompts of 1, 2 tokens"):
        Task.from_pairs("mine", [Pair(((1,), (1, 2)), (3, 4))])


# --- what is found ---


class Known(nn.Module):
    """Tokens 0 and 1 are told apart by node 1 of the first site and node 2 of the second alone; 3 and 4 are the answers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(5, 3), Nodes()
        self.middle, self.second = nn.Linear(3, 4), Nodes()
        self.last = nn.Linear(4, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.embed.weight[:, 0] = torch.tensor([1.0, 1.0, 3.0, -1.0, 2.0])  # the same for both prompts
            self.embed.weight[:2, 1] = torch.tensor([1.0, -1.0])
            self.embed.weight[2:, 2] = 0.5
            self.middle.weight[2, 1], self.middle.weight[0, 0], self.middle.weight[3, 2] = 2.0, 1.5, 0.5
            self.last.weight[3, 2], self.last.weight[4, 2], self.last.weight[3, 0], self.last.weight[1, 3] = 3.0, -1.0, 0.1, 1.0
            self.last.bias[4] = 0.05

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.second(self.middle(self.first(self.embed(tokens)))))


WIRES = {"embed.weight": ("", "first"), "middle.weight": ("first", "second"), "last.weight": ("second", "")}
TASK = Task.from_pairs("which", [Pair(((0,), (1,)), (3, 4))] * 6)
TEXT = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 4, 3, 2]])


def found(model: nn.Module, **settings: object) -> Circuit:
    given = {"wires": WIRES, "answers": "last.weight", "tokens": "embed.weight", "loss": 0.1, "steps": 60, **settings}
    return find_circuit(model, TASK, TEXT, **given)


def test_the_circuit_is_found_where_it_is_known():
    model = Known().train()
    circuit = found(model)
    assert [(node.site, node.index) for node in circuit.nodes] == [("first", 1), ("second", 2)]
    between = [edge for edge in circuit.edges if edge.token is None]
    assert [(edge.source, edge.target, edge.weight, edge.matrix) for edge in between] == [(0, 1, 2.0, "middle.weight")]
    assert {(e.token, e.weight) for e in circuit.edges if e.source is None} == {("\x00", 1.0), ("\x01", -1.0)}
    assert {(e.token, e.weight) for e in circuit.edges if e.target is None} == {("\x03", 3.0), ("\x04", -1.0)}
    assert (circuit.num_edges, circuit.num_weights, circuit.num_nodes) == (1, 3, 7)
    assert circuit.accuracy == 1
    assert circuit.loss <= 0.1
    assert circuit.loss == pytest.approx(circuit.held_out_loss)
    mean = TEXT.flatten()
    assert circuit.nodes[0].mean == pytest.approx(float(model.embed.weight[mean, 1].detach().mean()))
    assert circuit.nodes[0].examples[0][1] == pytest.approx(1.0, abs=0.2)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.first._forward_hooks


def test_means_are_over_whatever_a_module_gives():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.site, self.pooled = nn.Embedding(5, 3), nn.Identity(), nn.Identity()

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.site(self.site(self.embed(tokens)))
            return x + self.pooled(x.mean(1))[:, None]

    model = Twice()
    means = _means(model, ("site", "pooled"), TEXT)
    expected = model.embed(TEXT).flatten(0, 1).mean(0)
    for name in ("site", "pooled"):
        torch.testing.assert_close(means[name], expected)
    with pytest.raises(ValueError, match=r"expected windows of ordinary text \[windows, tokens\], got \(0, 5\)"):
        find_circuit(Known(), TASK, TEXT[:0], wires=WIRES, answers="last.weight", loss=0.1)


def test_the_loss_of_a_circuit_is_that_of_all_others_at_their_means():
    model, circuit = Known(), found(Known())
    means = {
        "first": model.embed(TEXT).flatten(0, 1).mean(0),
        "second": model.second(model.middle(model.embed(TEXT))).flatten(0, 1).mean(0),
    }
    kept = {"first": torch.tensor([0.0, 1, 0]), "second": torch.tensor([0.0, 0, 1, 0])}
    x = model.embed(TASK.prompts)
    x = kept["first"] * x + (1 - kept["first"]) * means["first"]
    x = model.middle(x)
    x = kept["second"] * x + (1 - kept["second"]) * means["second"]
    logits = model.last(x)[:, -1]
    rows = torch.arange(len(TASK))
    wanted = nn.functional.softplus(logits[rows, TASK.wrong] - logits[rows, TASK.right]).mean()
    assert circuit.loss == pytest.approx(wanted.item(), rel=1e-5)
    assert circuit.full_loss == pytest.approx(task_loss(model, TASK).item(), rel=1e-5)


def test_any_other_answer_is_all_others_together():
    model = Known()
    task = Task.from_pairs("which", [Pair(((0,), (1,)), (3, ANY_OTHER))])
    probability = model(task.prompts)[:, -1].softmax(1)[:, 3].detach()
    wanted = -(probability[0].log() + (1 - probability[1]).log()) / 2
    assert task_loss(model, task).item() == pytest.approx(wanted.item(), rel=1e-5)
    with pytest.raises(ValueError, match="both answers of a pair are 3"):
        Task.from_pairs("which", [Pair(((0,), (1,)), (3, 3))])


def test_a_task_that_the_network_does_not_solve_has_no_circuit():
    with pytest.raises(ValueError, match=r"the whole network has a loss of 0\.0\d+ nats, above loss=1e-09; train it longer"):
        found(Known(), loss=1e-9)
    with pytest.raises(ValueError, match="answers='head.weight': is not among the weights of wires, 'embed.weight'"):
        found(Known(), answers="head.weight")
    with pytest.raises(ValueError, match="no weight of it joins two modules"):
        found(Known(), wires={"embed.weight": ("", "first")})
    one = Task.from_pairs("which", [Pair(((0,), (1,)), (3, 4))])
    with pytest.raises(ValueError, match="'which' has 1 pairs; two or more are needed"):
        find_circuit(Known(), one, TEXT, wires=WIRES, answers="last.weight")
    broken = Known()
    with torch.no_grad():
        broken.last.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="a loss of nan nats"):
        found(broken)
    with pytest.raises(ValueError, match="Known has no parameter 'other.weight'"):
        found(Known(), wires={**WIRES, "other.weight": ("first", "second")})
    with pytest.raises(ValueError, match="Known has no module 'third', which 'middle.weight' is said to join"):
        found(Known(), wires={**WIRES, "middle.weight": ("first", "third")})


def test_circuits_of_half_precision_are_found():
    circuit = find_circuit(
        Known().to(torch.bfloat16), TASK, TEXT, wires=WIRES, answers="last.weight", tokens="embed.weight", loss=0.1, steps=60
    )
    assert [(node.site, node.index) for node in circuit.nodes] == [("first", 1), ("second", 2)]


def test_the_wires_of_a_decoder_fit_it():
    model = Decoder(20, width=8, depth=2, heads=2, context=6)
    wires = model.wires()
    sizes = {name: 32 if name.endswith("hidden") else 8 for ends in wires.values() for name in ends if name}
    for name, (source, target) in wires.items():
        matrix = model.get_parameter(name)
        assert matrix.shape == ((20, 8) if not source else (20, 8) if not target else (sizes[target], sizes[source]))
    task = Task.from_pairs("any", [Pair(((1, 2, 3), (3, 2, 1)), (4, 5))] * 2)
    text = torch.randint(20, (4, 6))
    circuit = find_circuit(model, task, text, wires=wires, answers="to_logits.weight", tokens="embed.weight", loss=5.0, steps=5)
    assert circuit.num_nodes == sum(sizes.values())
    assert circuit.nodes == ()  # a loss of 5 nats is met by nothing at all


# --- a decoder ---


def test_a_decoder_sees_no_token_that_comes_later():
    model, tokens = Decoder(20, width=8, depth=2, heads=2, context=6), torch.randint(20, (3, 6))
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 20
    one, other = model(tokens), model(changed)
    torch.testing.assert_close(one[:, :4], other[:, :4])
    assert not torch.allclose(one[:, 4:], other[:, 4:])


def test_the_largest_activations_are_kept():
    x = torch.tensor([[3.0, -4.0, 1.0, 2.0], [0.5, 0.0, -1.0, 0.25]])
    assert Nodes(0.5)(x).tolist() == [[3.0, -4.0, 0.0, 0.0], [0.5, 0.0, -1.0, 0.0]]
    assert Nodes(0.1)(x).tolist() == [[0.0, -4.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0]]
    assert torch.equal(Nodes()(x), x)


def test_settings_of_a_decoder_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="width=10 and heads=4"):
        Decoder(width=10, heads=4)
    with pytest.raises(ValueError, match="7 tokens: the decoder reads at most context=6 at a time"):
        Decoder(20, width=8, heads=2, context=6)(torch.zeros(1, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="share=0: allowed is a share of the activations above 0"):
        Decoder(share=0)


def test_python_source_is_split_by_files(tmp_path):
    for i in range(60):
        (tmp_path / f"module_{i}.py").write_bytes(b"value = %d\n" % i)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text("never")
    train, test = read_python_source(tmp_path)
    parts = [x.numpy().tobytes().split(b"\0")[:-1] for x in (train, test)]
    assert sorted(parts[0] + parts[1]) == sorted(b"value = %d\n" % i for i in range(60))
    assert 0 < len(parts[1]) < 10
    with pytest.raises(ValueError, match="has 0 Python files, too few to hold some of them out"):
        read_python_source(tmp_path / "nowhere")


# --- what is written ---


def test_a_circuit_travels_as_json():
    circuit = found(Known())
    assert Circuit.from_json(circuit.to_json()) == circuit
    for text in ("[]", "{", "{}", json.dumps({"nodes": [], "edges": [], "sites": []})):
        with pytest.raises(ValueError, match="no circuit as to_json"):
            Circuit.from_json(text)


def test_a_circuit_is_a_graph():
    pytest.importorskip("networkx")
    graph = found(Known()).to_networkx()
    assert graph.edges[("first", 1), ("second", 2)] == {"weight": 2.0, "matrix": "middle.weight"}
    assert graph.nodes["second", 2]["head"] is None
    assert set(graph.successors(("second", 2))) == {("answer", "\x03"), ("answer", "\x04")}


def test_the_page_of_a_circuit(browser, tmp_path):
    circuit = found(Known())
    assert (
        write_circuit([circuit, circuit], tmp_path / "page.html", name="a <b>name") == (tmp_path / "page.html").stat().st_size
    )
    assert unpacked(tmp_path / "page.html")[0]["circuits"][0]["task"] == "which"
    page = opened(browser, tmp_path / "page.html", viewport={"width": 1200, "height": 800})
    assert page.inner_text("#title") == "a <b>name"
    assert page.locator("svg").count() == 2
    assert page.locator("svg").first.locator(".node").count() == 2
    assert page.locator("svg").first.locator("path.edge").count() == 5
    assert "2 of 7 nodes, 1 of 3 edges" in page.inner_text("figcaption >> nth=0")
    page.locator(".node").nth(1).focus()
    assert page.inner_text("#nodeName") == "second 2"
    assert page.inner_text("#edges").split("\t")[0] == "to answer \x03"
    assert page.locator("#examples tr").count() == len(circuit.nodes[1].examples) == 2
    assert page.locator("svg").first.locator("path.edge.aside").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200
    assert page.problems == []


def test_a_page_needs_a_circuit(tmp_path):
    with pytest.raises(ValueError, match="no circuits: give one, or several"):
        write_circuit([], tmp_path / "page.html")
