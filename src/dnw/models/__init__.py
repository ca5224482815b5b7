"""Networks made of neural graphs, their peers, a decoder to look into, and the loader for the original's weights."""

from dnw._files import pretrained_names
from dnw.models._classifier import (
    GraphClassifier,
    Window,
    tiny_cifar10,
    tiny_cifar10_continuous,
    tiny_cifar10_discrete,
    tiny_digits,
    tiny_mnist,
)
from dnw.models._decoder import Decoder, Nodes
from dnw.models._lenet import lenet_300_100
from dnw.models._mobilenet import STAGES, GraphChain, Stage, mobilenet_v1
from dnw.models._original import (
    OriginalCheckpoint,
    load_original,
    original_num_edges,
    original_random_graph,
    read_original,
)
from dnw.models._peers import densenet_small, expander_edges, mnasnet_small, mobilenet_v2, shufflenet_v2
from dnw.models._pretrained import Pretrained, pretrained
from dnw.models._resnet import resnet18_cifar, resnet50
from dnw.models._shufflenet import shufflenet_v1

__all__ = [
    "STAGES",
    "Decoder",
    "GraphChain",
    "GraphClassifier",
    "Nodes",
    "OriginalCheckpoint",
    "Pretrained",
    "Stage",
    "Window",
    "densenet_small",
    "expander_edges",
    "lenet_300_100",
    "load_original",
    "mnasnet_small",
    "mobilenet_v1",
    "mobilenet_v2",
    "original_num_edges",
    "original_random_graph",
    "pretrained",
    "pretrained_names",
    "read_original",
    "resnet18_cifar",
    "resnet50",
    "shufflenet_v1",
    "shufflenet_v2",
    "tiny_cifar10",
    "tiny_cifar10_continuous",
    "tiny_cifar10_discrete",
    "tiny_digits",
    "tiny_mnist",
]
