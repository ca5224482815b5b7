"""Networks made of neural graphs, and the loader for the original's weights."""

from dnw.models._classifier import GraphClassifier, Window, tiny_cifar10, tiny_digits, tiny_mnist
from dnw.models._original import OriginalCheckpoint, load_original, original_num_edges, read_original

__all__ = [
    "GraphClassifier",
    "OriginalCheckpoint",
    "Window",
    "load_original",
    "original_num_edges",
    "read_original",
    "tiny_cifar10",
    "tiny_digits",
    "tiny_mnist",
]
