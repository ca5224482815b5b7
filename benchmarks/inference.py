"""One image after the other through MobileNetV1 x0.225 as graphs: python benchmarks/inference.py

Compares, in one run and in turn, the network compiled by us with the same network in PyTorch (eager, and with its edges as
sparse matrices) and in ONNX Runtime (dense, with zeros for the edges that are not there), and with plain MobileNetV1 of widths
0.25 and 0.5 in ONNX Runtime, which is what one would use instead. The wiring is a random one of the published number of edges;
its counts are printed. ONNX Runtime is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import io
import logging
import warnings
from collections.abc import Callable

import torch
from _timing import in_turn, machine, report
from torch import nn

import dnw
from dnw.compile import Runtime, plan
from dnw.models import GraphChain, mobilenet_v1


def in_onnx_runtime(model: nn.Module, images: torch.Tensor, threads: int) -> Callable[[], None] | None:
    """A run of a network in ONNX Runtime; None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), file, dynamo=True, external_data=False, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=float, default=0.225)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = GraphChain(1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dnw.wire(model, optimizer, num_edges=model.num_edges(arguments.width), rule=dnw.RandomGraph()).remove()
    model.eval()
    found = plan(model, (3, 224, 224))
    program = found.apply(model)
    runtime = Runtime(program, threads=arguments.threads)
    print(f"MobileNetV1 x{arguments.width:g} as graphs, batch {arguments.batch} at 224 px; {machine()}")
    active, kept = found.multiply_adds / 1e6, found.kept_multiply_adds / 1e6
    print(f"multiply-adds: {active:.1f}M active, {kept:.1f}M compiled; {runtime.kind}")
    images = torch.randn(arguments.batch, 3, 224, 224)
    steps: dict[str, Callable[[], None] | None] = {
        "compiled by us": lambda: runtime(images),
        "PyTorch, sparse matrices": lambda: program(images),
        "PyTorch, eager": torch.no_grad()(lambda: model(images)),
        "ONNX Runtime, dense": in_onnx_runtime(model, images, arguments.threads),
    }
    for width in (0.25, 0.5):
        plain = mobilenet_v1(1000, width=width).eval()
        steps[f"MobileNetV1 x{width:g}, ONNX Runtime"] = in_onnx_runtime(plain, images, arguments.threads)
    report(in_turn({name: step for name, step in steps.items() if step}, arguments.rounds), "compiled by us")


if __name__ == "__main__":
    main()
