"""Tables of results from run directories: what stands in docs/results.md comes from here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from dnw.train._config import Config
from dnw.train._run import EpochMetrics, RunDirectory


def results_table(paths: Sequence[Path]) -> str:
    """A Markdown table with one row per recipe and rule over all given runs, and what is behind it.

    Runs that stopped early are left out and named. Settings in which rows differ are a column; data, machine and commit of
    every row are given below the table.

    Args:
        paths: run directories; their seeds and baselines count as runs of their own.

    Raises:
        ValueError: no run directory, a damaged one, or none that is finished.
    """
    rows: dict[tuple[str, str, int], list[list[EpochMetrics]]] = {}
    seeds: dict[tuple[str, str, int], list[int]] = {}
    sources: dict[tuple[str, str, int], set[str]] = {}
    unfinished = []
    for path in paths:
        for member, config in RunDirectory(path).members():
            metrics = member.metrics()
            if len(metrics) < config.epochs:
                unfinished.append(f"{member.path} ({len(metrics)} of {config.epochs} epochs)")
                continue
            key = (config.recipe, config.rule, config.epochs)
            rows.setdefault(key, []).append(metrics)
            seeds.setdefault(key, []).append(config.seeds[0])
            sources.setdefault(key, set()).add(_source(member, config))
    if not rows:
        raise ValueError(f"no finished run among {', '.join(map(str, paths))}")
    lines = [
        "| recipe | rule | epochs | seeds | last | best | edges | live nodes | s per epoch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (recipe, rule, epochs), runs in rows.items():
        ends = [metrics[-1] for metrics in runs]
        evaluations = f" ({ends[0].evaluations:g} evaluations)" if ends[0].evaluations else ""
        cells = (
            f"`{recipe}`",
            rule,
            str(epochs),
            ", ".join(map(str, sorted(seeds[recipe, rule, epochs]))),
            _accuracy([end.top1 for end in ends]),
            _accuracy([max(m.top1 for m in metrics) for metrics in runs]),
            f"{ends[0].active:,}",
            f"{round(statistics.mean(end.live for end in ends))} of {ends[0].nodes}{evaluations}",
            f"{statistics.median(m.seconds for metrics in runs for m in metrics):.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for source in dict.fromkeys(s for found in sources.values() for s in sorted(found)):
        lines.append(f"- {source}")
    if unfinished:
        lines.append(f"- not finished, left out: {', '.join(unfinished)}")
    return "\n".join(lines)


def _source(member: RunDirectory, config: Config) -> str:
    try:
        environment = json.loads((member.path / "environment.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"{member.path}: environment.json is missing or damaged") from None
    machine = environment.get("accelerator") or environment.get("machine")
    return (
        f"`{config.recipe}`, {config.rule}: data {config.data.name}, {machine}, torch {environment.get('torch')}, commit "
        f"`{environment.get('commit')}`"
    )


def _accuracy(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2%}"
    return f"{statistics.mean(values):.2%} +- {statistics.stdev(values):.2%}"
