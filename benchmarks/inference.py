"""Images through MobileNetV1 x0.225 as graphs, at 224 px: python benchmarks/inference.py

In one run, in turn, for 1 thread and for all, for 1 image and for 32: the network compiled by us against the same network in
PyTorch (eager, and with its edges as sparse matrices), in ONNX Runtime (dense, and compacted) and in OpenVINO (compacted), and
against plain MobileNetV1 of widths 0.25 and 0.5 in ONNX Runtime, which is what one would ship instead. The wirings are random
ones of the published number of edges: one in which nodes die until the nominal count is the published 42.1M, and one in which
all live. What is not installed is left out. Last, the rate of the sparse kernel as a fraction of what the machine can do.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import logging
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from _timing import in_turn, machine, report
from _wirings import lively, wire_at_random
from torch import Tensor, nn

from dnw.compile import Program, Runtime, plan, save_onnx
from dnw.compile._program import Convolution
from dnw.count import published_count
from dnw.models import GraphChain, mobilenet_v1

Run = Callable[[], object]

_PEAK = """
typedef float vec __attribute__((vector_size(64)));
float peak(long rounds, float number) {
  vec sums[12], factor = number + (vec){0};
  for (int i = 0; i < 12; i++) sums[i] = factor + (float)i;
  for (long n = 0; n < rounds; n++)
    for (int i = 0; i < 12; i++) sums[i] = sums[i] * factor + factor;
  float sum = 0;
  for (int i = 0; i < 12; i++) sum += sums[i][0];
  return sum;
}
"""


def exported(model: nn.Module, images: Tensor) -> bytes:
    """A network as ONNX, by PyTorch."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), file, dynamo=True, external_data=False, verbose=False)
    return file.getvalue()


def in_onnx_runtime(content: bytes, images: Tensor, threads: int) -> Run | None:
    """A run in ONNX Runtime; None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)


def in_openvino(content: bytes, images: Tensor, threads: int) -> Run | None:
    """A run in OpenVINO in single precision; None where it is not installed."""
    try:
        import openvino
    except ImportError:
        return None
    core = openvino.Core()
    model = core.read_model(io.BytesIO(content))
    model.reshape(list(images.shape))
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    array = images.numpy()
    return lambda: request.infer([array])


def compare(model: GraphChain, program: Program, compacted: bytes, batch: int, threads: int, rounds: int) -> None:
    """Prints what each alternative takes."""
    print(f"\n{batch} image{'s' * (batch > 1)}, {threads} thread{'s' * (threads > 1)}")
    torch.set_num_threads(threads)
    images = torch.randn(batch, 3, 224, 224)
    runtime = Runtime(program, threads=threads)
    runs: dict[str, Run | None] = {
        "compiled by us": lambda: runtime(images),
        "PyTorch, eager": torch.no_grad()(lambda: model(images)),
        "PyTorch, sparse matrices": lambda: program(images),
        "ONNX Runtime, dense": in_onnx_runtime(exported(model, images), images, threads),
        "ONNX Runtime, compacted": in_onnx_runtime(compacted, images, threads),
        "OpenVINO, compacted": in_openvino(compacted, images, threads),
    }
    for width in (0.25, 0.5):
        plain = exported(mobilenet_v1(1000, width=width).eval(), images)
        runs[f"MobileNetV1 x{width:g}, ONNX Runtime"] = in_onnx_runtime(plain, images, threads)
    report(in_turn({name: run for name, run in runs.items() if run}, rounds, rest=0.05), "compiled by us")


def peak_rate() -> float | None:
    """Multiply-adds a second that one core reaches on registers; None without a compiler."""
    if shutil.which("cc") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.c"), Path(folder, "peak.so")
        source.write_text(_PEAK)
        subprocess.run(["cc", "-O3", "-march=native", "-shared", "-fPIC", "-o", library, source], check=True)
        peak = ctypes.CDLL(str(library)).peak
        peak.argtypes, peak.restype = [ctypes.c_long, ctypes.c_float], ctypes.c_float
        rates = []
        for _ in range(10):
            started = time.perf_counter()
            peak(1_000_000, 0.5)
            rates.append(12e6 * 16 / (time.perf_counter() - started))
    return max(rates)


def edge_rate(sources: int, read: int, targets: int, degree: int, side: int) -> float:
    """Multiply-adds a second of the sparse kernel, of which each target reads some of the first so many sources."""
    weight = torch.zeros(targets, sources, 1, 1)
    for row in weight:
        row[torch.randperm(read)[:degree]] = torch.randn(degree, 1, 1)
    edges = Convolution(weight, None, (1, 1), (0, 0), 1, sparse=True)
    layout = Runtime(Program.chain((edges,), (sources, side, side)))._layout
    profile = layout.profile(torch.randn(1, sources, side, side), rounds=100)
    return targets * degree * side * side / min(seconds for record, seconds in profile if record.kind == "sparse")


def report_edges() -> None:
    """Prints the rate of the sparse kernel where its sources lie in the first-level cache, and where in the second."""
    peak = peak_rate()
    print("\nthe sparse kernel in one thread" + (f", of {peak / 1e9:.1f} G multiply-adds a second at most" if peak else ""))
    for name, sizes in {
        "14x14, 60 sources (27 KB)": (2800, 60, 512, 40, 14),
        "14x14, 300 sources (134 KB)": (2800, 300, 512, 40, 14),
        "14x14, 2800 sources (1.3 MB)": (2800, 2800, 512, 40, 14),
        "7x7, 100 sources (26 KB)": (1500, 100, 1024, 58, 7),
        "7x7, 1500 sources (384 KB)": (1500, 1500, 1024, 58, 7),
    }.items():
        rate = edge_rate(*sizes)
        print(f"{name:<32} {rate / 1e9:5.1f} G/s" + (f"   {rate / peak:.0%} of the peak" if peak else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    print(f"MobileNetV1 x0.225 as graphs at 224 px; {machine()}")
    for name, wanted in {"nodes die until the nominal count is the published one": 42.1e6, "all nodes live": None}.items():
        torch.manual_seed(0)
        model = lively(GraphChain(1000))
        active = wire_at_random(model, 0.225, wanted)
        program = plan(model, (3, 224, 224)).apply(model)
        nominal, _ = published_count(model, active, width=0.225)
        with tempfile.TemporaryDirectory() as folder:
            save_onnx(program, file := Path(folder, "net.onnx"))
            compacted = file.read_bytes()
        counts = f"{nominal / 1e6:.1f}M nominal, {program.multiply_adds / 1e6:.1f}M live multiply-adds"
        print(f"\n{name}: {counts}; {Runtime(program).kind}")
        for threads in arguments.threads:
            for batch in arguments.batches:
                compare(model, program, compacted, batch, threads, max(3, arguments.rounds // (1 if batch < 8 else 5)))
    report_edges()


if __name__ == "__main__":
    main()
