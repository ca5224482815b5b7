"""Networks made of neural graphs, and the loader for the original's weights."""

from dnw.models._classifier import (
    GraphClassifier,
    Window,
    tiny_cifar10,
    tiny_cifar10_continuous,
    tiny_cifar10_discrete,
    tiny_digits,
    tiny_mnist,
)
from dnw.models._mobilenet import STAGES, GraphChain, Stage, mobilenet_v1
from dnw.models._original import (
    OriginalCheckpoint,
    load_original,
    original_num_edges,
    original_random_graph,
    read_original,
)
from dnw.models._resnet import resnet18_cifar, resnet50

__all__ = [
    "STAGES",
    "GraphChain",
    "GraphClassifier",
    "OriginalCheckpoint",
    "Stage",
    "Window",
    "load_original",
    "mobilenet_v1",
    "original_num_edges",
    "original_random_graph",
    "read_original",
    "resnet18_cifar",
    "resnet50",
    "tiny_cifar10",
    "tiny_cifar10_continuous",
    "tiny_cifar10_discrete",
    "tiny_digits",
    "tiny_mnist",
]
