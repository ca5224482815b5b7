"""Image classifiers around one neural graph: stem, graph, pooling, linear head (Wortsman et al., 2019, section 4.1)."""

from __future__ import annotations

from torch import Tensor, nn

from dnw.graphs import INSTANCE_NORM, ContinuousTimeGraph, DiscreteTimeGraph, StaticGraph


class Window(nn.Module):
    """The mean of a square window of each map, ``[start, stop)`` in rows and columns: ``[b, c, h, w]`` to ``[b, c]``."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def extra_repr(self) -> str:
        return f"{self.start}, {self.stop}"

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, self.start : self.stop, self.start : self.stop].mean(dim=(2, 3))


class GraphClassifier(nn.Module):
    """Images to logits: ``classifier(pool(graph(stem(images))))``.

    Args:
        stem: images ``[batch, channels, height, width]`` to the maps of the graph's inputs.
        graph: maps to maps.
        pool: maps ``[batch, outputs, h, w]`` to features ``[batch, outputs]``.
        classifier: features to logits ``[batch, classes]``.
    """

    def __init__(self, stem: nn.Module, graph: nn.Module, pool: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.stem, self.graph, self.pool, self.classifier = stem, graph, pool, classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.pool(self.graph(self.stem(images))))


def _quartering_stem(channels: int, width: int) -> nn.Sequential:
    """The paper's stem: two strided 3x3 convolutions, the second per channel, so a quarter of the height and width."""
    inner = width // 2
    return nn.Sequential(
        nn.Conv2d(channels, inner, 3, stride=2, padding=1),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Conv2d(inner, inner, 3, stride=2, padding=1, groups=inner),
        nn.Conv2d(inner, width, 1),
        nn.BatchNorm2d(width),
    )


def tiny_cifar10(num_classes: int = 10, *, rank_all_entries: bool = False) -> GraphClassifier:
    """The paper's tiny CIFAR-10 classifier with a static graph: 800 nodes on 8x8 maps, 264,960 candidate edges.

    Wired with 32,000 edges it has the published 41k parameters. As the authors run it, the 100 outputs use the weights
    of the last 100 nodes and the head reads the 2x2 window at rows and columns 2 and 3 of each 8x8 map.

    Args:
        num_classes: of the linear head.
        rank_all_entries: see :class:`dnw.graphs.StaticGraph`.
    """
    graph = StaticGraph(
        (32, 192, 192, 192, 192), 100, norm=INSTANCE_NORM, shared_outputs=True, rank_all_entries=rank_all_entries
    )
    return GraphClassifier(_quartering_stem(3, 32), graph, Window(2, 4), nn.Linear(100, num_classes))


def tiny_cifar10_discrete(num_classes: int = 10) -> GraphClassifier:
    """The paper's tiny CIFAR-10 classifier in discrete time: 800 nodes, 640,000 candidate edges, five steps."""
    graph = DiscreteTimeGraph(800, 32, 100, steps=5, norm=INSTANCE_NORM)
    return GraphClassifier(_quartering_stem(3, 32), graph, Window(2, 4), nn.Linear(100, num_classes))


def tiny_cifar10_continuous(
    num_classes: int = 10,
    *,
    solver: str = "dopri5",
    solver_steps: int = 8,
    adjoint: bool = False,
    rectify_in_place: bool = False,
) -> GraphClassifier:
    """The paper's tiny CIFAR-10 classifier in continuous time: 800 nodes, 640,000 candidate edges, an ODE on [0, 1].

    Args:
        num_classes: of the linear head.
        solver, solver_steps, adjoint, rectify_in_place: see :class:`dnw.graphs.ContinuousTimeGraph`.
    """
    graph = ContinuousTimeGraph(
        800,
        32,
        100,
        norm=INSTANCE_NORM,
        solver=solver,
        solver_steps=solver_steps,
        adjoint=adjoint,
        rectify_in_place=rectify_in_place,
    )
    return GraphClassifier(_quartering_stem(3, 32), graph, Window(2, 4), nn.Linear(100, num_classes))


def _norm_relu_mean(channels: int, size: int) -> nn.Sequential:
    """Normalised, rectified and averaged over the whole map, as at the end of a MobileNet."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), Window(0, size))


def tiny_mnist(num_classes: int = 10) -> GraphClassifier:
    """A small classifier for 28x28 grey images: 176 nodes on 7x7 maps, 11,776 candidate edges."""
    graph = StaticGraph((16, 48, 48, 48), 16)
    return GraphClassifier(_quartering_stem(1, 16), graph, _norm_relu_mean(16, 7), nn.Linear(16, num_classes))


def tiny_digits(num_classes: int = 10) -> GraphClassifier:
    """The smallest one, for 8x8 grey images: 120 nodes on 8x8 maps, 5,504 candidate edges."""
    stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8))
    graph = StaticGraph((8, 32, 32, 32), 16)
    return GraphClassifier(stem, graph, _norm_relu_mean(16, 8), nn.Linear(16, num_classes))
