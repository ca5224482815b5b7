"""Timing of alternatives in turn, so that a machine whose speed drifts treats them alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch


def in_turn(runs: dict[str, Callable[[], object]], rounds: int, *, rest: float = 0.0) -> dict[str, list[float]]:
    """Seconds of each alternative, one after the other, round by round, after one round that does not count.

    With a rest, in seconds, each is preceded by it and by a run that does not count: threads of the one before, which wait for
    work in a loop for a while, have gone to sleep then, and its own are awake.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            if rest:
                time.sleep(rest)
                run()
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def report(seconds: dict[str, list[float]], base: str) -> None:
    """Prints the median of each alternative and its ratio to the base, round by round."""
    width = max(map(len, seconds))
    for name, values in seconds.items():
        ratios = sorted(v / b for v, b in zip(values, seconds[base], strict=True))
        spread = f"{statistics.median(ratios):6.3f} x   ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(f"{name:<{width}}  {statistics.median(values) * 1e3:9.1f} ms   {spread}")


def machine() -> str:
    """The machine in a line."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, {gpu}"
