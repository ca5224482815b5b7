"""Finding the circuit of a task: which nodes may stay at their mean without the task being lost.

Contract: the network is not changed. Every node has a gate; a gate that is closed puts the node's mean over ordinary text in
its place. Gates are learned (straight-through) against a price on the edges between open ones, which rises while the task is
solved and falls while it is not; then nodes are closed one after the other, the least sure first, as long as it stays solved.
Source: Gao et al., "Weight-sparse transformers have interpretable circuits" (2025), section on pruning; the price is ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnw._checks import listing
from dnw.circuits._circuit import Circuit, CircuitEdge, CircuitNode
from dnw.circuits._tasks import ANY_OTHER, Task

Wires = Mapping[str, tuple[str, str]]
"""Of each weight the sites that it reads and writes: modules whose outputs are nodes ``[..., nodes]``."""
_BATCH = 64
_SHOWN = 6
_CONTEXT = 14
_RECENT = 16
"""Tokens of a prompt whose edges to the embedding are told."""


@dataclass(eq=False)
class _Sites:
    """The nodes of a network: gates over their activations, which are all open at first.

    Args:
        model: the network.
        names: of the modules whose outputs are nodes.
        means: of each node over ordinary text.
    """

    model: nn.Module
    names: tuple[str, ...]
    means: dict[str, Tensor]

    @contextmanager
    def gated(self, gates: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it every node is itself as far as its gate is open, and its mean as far as it is closed."""

        def hook(name: str) -> object:
            def gated(_: nn.Module, __: object, x: Tensor) -> Tensor:
                gate = gates[name].to(x.dtype)
                return gate * x + (1 - gate) * self.means[name]

            return self.model.get_submodule(name).register_forward_hook(gated)

        handles = [hook(name) for name in self.names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()  # type: ignore[attr-defined]


def task_loss(model: nn.Module, task: Task) -> Tensor:
    """Nats that the right answer costs where only right and wrong are asked, on average over the prompts."""
    return F.softplus(_margins(model, task)).mean()


def _margins(model: nn.Module, task: Task) -> Tensor:
    """By how much the wrong answer is ahead, in logits, after each prompt."""
    logits = torch.cat([model(part)[:, -1] for part in task.prompts.split(_BATCH)])
    return _logit(logits, task.wrong, task.right) - _logit(logits, task.right, task.wrong)


def _logit(logits: Tensor, answers: Tensor, others: Tensor) -> Tensor:
    """Of each answer; of any but the other one that of all those together."""
    others_out = logits.scatter(1, others.clamp(min=0)[:, None], -torch.inf)
    own = logits.gather(1, answers.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(answers == ANY_OTHER, others_out.logsumexp(1), own)


def find_circuit(
    model: nn.Module,
    task: Task,
    text: Tensor,
    *,
    wires: Wires,
    answers: str,
    tokens: str | None = None,
    loss: float = 0.15,
    steps: int = 300,
    seed: int = 0,
) -> Circuit:
    """The nodes and edges that a task needs.

    Args:
        model: the network; ``[batch, tokens]`` to logits ``[batch, tokens, vocabulary]``.
        task: half of whose pairs the circuit is found on; it is measured on the other half.
        text: ordinary text, int64 ``[windows, tokens]``, over which means are taken and examples are looked for.
        wires: of each weight ``[targets, sources]`` the modules whose outputs ``[..., nodes]`` it reads and writes, in the
            order of computing.
        answers: the weight ``[vocabulary, nodes]`` that gives the logits; in ``wires`` it writes "".
        tokens: the weight ``[vocabulary, nodes]`` of the embedding; in ``wires`` it reads "". Of its edges those are
            kept that lead from the last 16 tokens of some prompt. Tokens below 256 are shown as bytes.
        loss: of the task, in nats, that the circuit may have at most; a coin has 0.69.
        steps: over which gates are learned.
        seed: of the batches.

    Raises:
        ValueError: the whole network has a larger loss, there is no text, the task has less than two pairs, or ``wires`` names
            what the model does not have, or leaves out ``answers`` or ``tokens``.
    """
    names = _names(model, wires)
    for argument, name in (("answers", answers), ("tokens", tokens)):
        if name is not None and name not in wires:
            raise ValueError(f"{argument}={name!r}: is not among the weights of wires, {listing(wires)}")
    if len(task) < 4:
        raise ValueError(
            f"task {task.name!r} has {len(task) // 2} pairs; two or more are needed, to find a circuit and to measure it"
        )
    if text.ndim != 2 or not text.numel():
        raise ValueError(f"text: expected windows of ordinary text [windows, tokens], got {tuple(text.shape)}")
    device = next(model.parameters()).device
    task, text = task.to(device), text.to(device)
    found_on, _ = task.halves()
    training = [module for module in model.modules() if module.training]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        sites = _Sites(model, names, {})
        sites.means = _means(model, names, text)
        full = float(task_loss(model, found_on))
        if not full <= loss:  # NaN, too
            raise ValueError(
                f"task {task.name!r}: the whole network has a loss of {full:.3f} nats, above loss={loss}; train it longer, or "
                "give a larger one"
            )
        joined = {name: ends for name, ends in wires.items() if all(ends)}
        links = {name: (model.get_parameter(name).detach(), source, target) for name, (source, target) in joined.items()}
        gates = _learned(sites, links, found_on, loss, steps, torch.Generator().manual_seed(seed))
        kept = _smallest(sites, links, found_on, gates, loss)
        return _circuit(sites, wires, answers, tokens, kept, task, text)
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _names(model: nn.Module, wires: Wires) -> tuple[str, ...]:
    modules = [name for name, _ in model.named_modules()]
    parameters = dict(model.named_parameters())
    if not any(all(ends) for ends in wires.values()):
        raise ValueError(f"wires={dict(wires)}: no weight of it joins two modules")
    for weight, sites in wires.items():
        if weight not in parameters:
            raise ValueError(f"wires: {type(model).__name__} has no parameter {weight!r}")
        for site in sites:
            if site and site not in modules:
                raise ValueError(f"wires: {type(model).__name__} has no module {site!r}, which {weight!r} is said to join")
    return tuple(dict.fromkeys(site for pair in wires.values() for site in pair if site))


@torch.no_grad()
def _watched(model: nn.Module, text: Tensor, seen: Mapping[str, Callable[[Tensor], None]]) -> None:
    """Runs text through the model, and shows each site's activations ``[windows, tokens, nodes]`` to a function, in parts."""
    handles = [model.get_submodule(name).register_forward_hook(lambda _, __, x, see=see: see(x)) for name, see in seen.items()]
    try:
        for part in text.split(_BATCH):
            model(part)
    finally:
        for handle in handles:
            handle.remove()


def _means(model: nn.Module, names: tuple[str, ...], text: Tensor) -> dict[str, Tensor]:
    """Of each node of each site over all places of a text."""
    sums: dict[str, Tensor] = {}
    places: Counter[str] = Counter()

    def add(name: str, x: Tensor) -> None:
        rows = x.flatten(0, -2).double()
        sums[name] = sums.get(name, 0) + rows.sum(0)
        places[name] += len(rows)

    _watched(model, text, {name: partial(add, name) for name in names})
    dtype = next(model.parameters()).dtype
    return {name: (total / places[name]).to(dtype) for name, total in sums.items()}


def _kept_activations(model: nn.Module, kept: Mapping[str, Tensor], text: Tensor) -> dict[str, Tensor]:
    """Of each site the nodes that are kept: ``[windows, tokens, kept nodes]``."""
    found: dict[str, list[Tensor]] = {name: [] for name in kept}

    def keep(name: str, x: Tensor) -> None:
        found[name].append(x[..., kept[name].nonzero().flatten()])

    _watched(model, text, {name: partial(keep, name) for name in kept})
    return {name: torch.cat(parts) for name, parts in found.items()}


_Links = Mapping[str, tuple[Tensor, str, str]]


def _edges(links: _Links, gates: Mapping[str, Tensor]) -> Tensor:
    """How many weights that are not 0 join open gates; of gates between 0 and 1 how many are expected to."""
    return torch.stack([gates[to] @ (weight.ne(0).to(gates[to].dtype) @ gates[of]) for weight, of, to in links.values()]).sum()


def _learned(
    sites: _Sites, links: _Links, task: Task, loss: float, steps: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """How sure each gate is to be open, above 0 where it is."""
    gates = {name: torch.full_like(mean, 2.0).requires_grad_() for name, mean in sites.means.items()}
    optimizer = torch.optim.Adam(gates.values(), lr=0.1)
    total = float(_edges(links, {name: torch.ones_like(gate) for name, gate in gates.items()}))
    price, seen = 0.5, 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / steps)
        soft = {name: torch.sigmoid(gate) for name, gate in gates.items()}
        hard = {name: (gates[name] > 0).float() + soft[name] - soft[name].detach() for name in gates}
        rows = torch.randperm(len(task), generator=generator)[:_BATCH]
        batch = task.at(rows)
        with sites.gated(hard):
            of_task = task_loss(sites.model, batch)
        seen = float(of_task.detach()) if step == 0 else 0.8 * seen + 0.2 * float(of_task.detach())
        price = min(50.0, max(0.01, price * (1.05 if seen < loss else 0.93)))
        optimizer.zero_grad()
        (of_task + price * (_edges(links, soft) / total + 0.1 * _share(soft))).backward()
        optimizer.step()
    return {name: gate.detach() for name, gate in gates.items()}


def _share(soft: Mapping[str, Tensor]) -> Tensor:
    """The share of the gates that is open."""
    return torch.cat(list(soft.values())).mean()


@torch.no_grad()
def _smallest(sites: _Sites, links: _Links, task: Task, gates: Mapping[str, Tensor], loss: float) -> dict[str, Tensor]:
    """The fewest nodes, of those that are surest to be open, with which the task is solved; then without those it can spare."""
    flat = torch.cat([gates[name] for name in sites.names])
    order = flat.argsort(descending=True, stable=True)
    sizes = [len(gates[name]) for name in sites.names]

    def opened(nodes: Tensor) -> dict[str, Tensor]:
        mask = flat.new_zeros(len(flat))
        mask[nodes] = 1
        return dict(zip(sites.names, mask.split(sizes), strict=True))

    def solved(nodes: Tensor) -> bool:
        with sites.gated(opened(nodes)):
            return float(task_loss(sites.model, task)) <= loss

    low, high = 0, len(order)  # with none it may be solved, with all it is
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if solved(order[:middle]) else (middle + 1, high)
    kept = order[:high]
    step = max(1, len(kept) // 16)
    while True:  # by chunks at first, from the least sure on, then one by one
        at = len(kept)
        while at > 0:
            rest = torch.cat([kept[: max(0, at - step)], kept[at:]])
            kept, at = (rest, at - step) if solved(rest) else (kept, at - step)
        if step == 1:
            return opened(kept)
        step = max(1, step // 4)


@torch.no_grad()
def _circuit(
    sites: _Sites, wires: Wires, answers: str, tokens: str | None, kept: dict[str, Tensor], task: Task, text: Tensor
) -> Circuit:
    model = sites.model
    found_on, measured_on = task.halves()
    full, full_held_out = float(task_loss(model, found_on)), float(task_loss(model, measured_on))
    with sites.gated(kept):
        loss, margins = float(task_loss(model, found_on)), _margins(model, measured_on)
    activations = _kept_activations(model, kept, text)
    nodes: list[CircuitNode] = []
    number: dict[tuple[str, int], int] = {}
    for site in sites.names:
        heads = getattr(model.get_submodule(site.rpartition(".")[0]), "num_heads", 0) if "." in site else 0
        in_head = site.rpartition(".")[2] in ("query", "key", "value") and heads
        for column, index in enumerate(kept[site].nonzero().flatten().tolist()):
            head = index * heads // len(kept[site]) if in_head else None
            number[site, index] = len(nodes)
            examples = _examples(activations[site][..., column] - sites.means[site][index], text)
            nodes.append(CircuitNode(site, index, head, float(sites.means[site][index]), examples))
    edges, weights = [], 0
    for name, (source, target) in wires.items():
        weight = model.get_parameter(name).detach()
        if not (source and target):
            continue
        weights += int(weight.count_nonzero())
        between = weight * kept[target][:, None] * kept[source]
        for to, of in between.nonzero().tolist():
            edges.append(CircuitEdge(number[source, of], number[target, to], None, float(weight[to, of]), name))
    edges += _token_edges(
        model,
        wires,
        answers,
        [x for x in torch.cat([task.right, task.wrong]).unique().tolist() if x != ANY_OTHER],
        number,
        of_answers=True,
    )
    if tokens is not None:
        edges += _token_edges(model, wires, tokens, task.prompts[:, -_RECENT:].unique().tolist(), number, of_answers=False)
    return Circuit(
        task=task.name,
        sites=sites.names,
        nodes=tuple(nodes),
        edges=tuple(edges),
        loss=loss,
        held_out_loss=float(F.softplus(margins).mean()),
        full_loss=full,
        full_held_out_loss=full_held_out,
        accuracy=float((margins < 0).float().mean()),
        num_nodes=sum(map(len, kept.values())),
        num_weights=weights,
    )


def _token_edges(
    model: nn.Module, wires: Wires, name: str, tokens: list[int], number: Mapping[tuple[str, int], int], *, of_answers: bool
) -> list[CircuitEdge]:
    """From the answers' weights, or to those of the embedding: edges between nodes and tokens."""
    site = wires[name][0 if of_answers else 1]
    weight = model.get_parameter(name).detach()
    found = []
    for token in tokens:
        for (where, index), node in number.items():
            value = float(weight[token, index]) if where == site else 0.0
            if value:
                text = _text([token])
                found.append(CircuitEdge(node if of_answers else None, None if of_answers else node, text, value, name))
    return found


def _examples(values: Tensor, text: Tensor) -> tuple[tuple[str, float], ...]:
    """Where a node is furthest from its mean, ``[windows, tokens]``: at most one place a window."""
    furthest, places = values.abs().max(1)
    windows = furthest.topk(min(_SHOWN, len(furthest))).indices.tolist()
    found = []
    for window in windows:
        place = int(places[window])
        shown = text[window, max(0, place + 1 - _CONTEXT) : place + 1].tolist()
        found.append((_text(shown), float(values[window, place])))
    return tuple(found)


def _text(tokens: list[int]) -> str:
    """Bytes as text; what is none is escaped."""
    return bytes(tokens).decode("utf-8", "backslashreplace") if all(0 <= token < 256 for token in tokens) else repr(tokens)
