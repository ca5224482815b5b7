"""Tables of results from run directories, and what of a run is worth keeping: docs/results.md comes from here."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dnw._checks import listing
from dnw._files import write_whole
from dnw.recipes import RECIPES
from dnw.recipes._config import Config, alike, changes
from dnw.train._run import EpochMetrics, RunDirectory, runs_inside
from dnw.train._sealed import sealed

_SHOWN = ("recipe", "rule", "edges", "baseline", "epochs", "seeds", "first_epoch_snapshots")
"""Settings that stand in columns of their own, or do not matter."""


def results_table(paths: Sequence[str | Path]) -> str:
    """A Markdown table with one row per recipe, rule and settings over the seeds of all given runs, and what is behind it.

    Runs that stopped early are left out and named. What was changed of a recipe is given in its row, or below the table if
    it was changed alike in all rows; so are data, machine and commit. Where a network was trained with DNW too, with the
    same epochs and at least two seeds in common, the last accuracies are compared seed by seed: the mean difference, in points,
    and its standard error.

    Args:
        paths: run directories, or directories of sweeps; their seeds and baselines count as runs of their own. A seed that
            was run again stands in a row of its own.

    Raises:
        ValueError: no run directory, a damaged one, or none that is finished.
    """
    rows, unfinished = _rows(paths)
    changed = {row: _changed(runs[0][1]) for row, runs in rows.items()}
    in_all = [change for change in next(iter(changed.values())) if all(change in found for found in changed.values())]
    with_graphs = any(metrics[-1].nodes for runs in rows.values() for _, _, metrics in runs)
    against = {row: _difference(pairs) for row, pairs in _pairs(rows).items() if len(pairs) > 1}
    titles = ["recipe", "rule", "epochs", "seeds", "last", "best", "against dnw", "edges", "live nodes", "s per epoch"]
    if not with_graphs:
        titles.remove("live nodes")
    if not against:
        titles.remove("against dnw")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row, runs in rows.items():
        config = runs[0][1]
        only = " ".join(change for change in changed[row] if change not in in_all)
        ends = [metrics[-1] for _, _, metrics in runs]
        evaluations = f" ({ends[0].evaluations:g} evaluations)" if ends[0].evaluations else ""
        live = f"{round(statistics.mean(end.live for end in ends))} of {ends[0].nodes}{evaluations}" if ends[0].nodes else ""
        cells = (
            f"`{config.recipe}`" + (f" `{only}`" if only else ""),
            config.method,
            str(config.epochs),
            ", ".join(map(str, sorted(one.seed for _, one, _ in runs))),
            _accuracy([end.top1 for end in ends]),
            _accuracy([max(m.top1 for m in metrics if m.active == metrics[-1].active) for _, _, metrics in runs]),
            *([against.get(row, "")] if against else []),
            f"{ends[0].active:,}",
            *([live] if with_graphs else []),
            _seconds(statistics.median(m.seconds for _, _, metrics in runs for m in metrics)),
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    if in_all:
        lines.append(f"- changed in all rows: `{' '.join(in_all)}`")
    by_source: dict[str, list[str]] = {}
    for runs in rows.values():
        for member, config, _ in runs:
            names = by_source.setdefault(_source(member, config), [])
            name = f"`{config.recipe}` {config.method}"
            if name not in names:
                names.append(name)
    for source, names in by_source.items():
        lines.append(f"- {source}" + (f": {', '.join(names)}" if len(by_source) > 1 else ""))
    if unfinished:
        lines.append(f"- not finished, left out: {', '.join(unfinished)}")
    return "\n".join(lines)


_Row = tuple[str, int]
_Rows = dict[_Row, list[tuple[RunDirectory, Config, list[EpochMetrics]]]]


def _rows(paths: Sequence[str | Path]) -> tuple[_Rows, list[str]]:
    """All finished runs, those that differ in their seed together; and what is said of those that are not finished.

    Raises:
        ValueError: no run directory, a damaged one, or none that is finished.
    """
    rows: _Rows = {}
    unfinished = []
    seen: Counter[str] = Counter()
    for run in (run for path in paths for run in _runs(path)):
        for member, config in RunDirectory(run).members():
            metrics = member.metrics()
            if not member.is_finished(config):
                unfinished.append(f"{member.path} ({len(metrics)} of {config.epochs} epochs)")
            else:
                kind, same = (_same(config, seeds).to_json() for seeds in ((0,), config.seeds))
                rows.setdefault((kind, seen[same]), []).append((member, config, metrics))
                seen[same] += 1
    if not rows:
        raise ValueError(f"no finished run among {', '.join(map(str, paths))}")
    return rows, unfinished


def _same(config: Config, seeds: tuple[int, ...]) -> Config:
    """The same run of other seeds: wherever it was computed, and whether its gradient is exact by default or by request."""
    gradient = None if config.dormant.gradient == "exact" else config.dormant.gradient
    changes = {"seeds": seeds, "dormant": config.dormant.model_copy(update={"gradient": gradient})}
    return alike(config).model_copy(update=changes)


def _pairs(rows: _Rows) -> dict[_Row, list[float]]:
    """How far each row is above the plain DNW of its network after the last epoch, in points, seed by seed."""
    found = {}
    changed = {row: len(_changed(runs[0][1])) for row, runs in rows.items()}
    last = {row: {config.seed: 100 * metrics[-1].top1 for _, config, metrics in runs} for row, runs in rows.items()}
    for row, runs in rows.items():
        others = [r for r, o in rows.items() if _network(o[0][1]) == _network(runs[0][1]) and o[0][1].method == "dnw"]
        plainest = [r for r in others if changed[r] == min(changed[other] for other in others) and not r[1]]
        if len(plainest) == 1 and plainest != [row]:
            found[row] = [last[row][seed] - last[plainest[0]][seed] for seed in last[row].keys() & last[plainest[0]].keys()]
    return {row: pairs for row, pairs in found.items() if pairs}


def _network(config: Config) -> tuple[object, ...]:
    """What runs have in common that are compared."""
    return config.model, config.width, config.density, config.num_edges, alike(config).data, config.epochs


def _error(pairs: Sequence[float]) -> float:
    """The standard error of the mean of some differences."""
    return statistics.stdev(pairs) / math.sqrt(len(pairs))


def _difference(pairs: Sequence[float]) -> str:
    return f"{statistics.mean(pairs):+.2f} +- {_error(pairs):.2f}"


def plot_results(paths: Sequence[str | Path], file: str | Path) -> None:
    """Plots test accuracy over the epochs, a curve for each row of the table with the range over its seeds, as SVG, PDF or PNG.

    Args:
        paths: as for :func:`results_table`.
        file: where to.

    Raises:
        ImportError: matplotlib is not installed (extra ``plot``).
        ValueError: no run directory, a damaged one, or none that is finished.
    """
    from dnw.train._sweep import check_plot
    from dnw.view._figure import save_figure

    check_plot()
    from matplotlib.figure import Figure

    curves: dict[str, list[list[float]]] = {}
    rows = list(_rows(paths)[0].values())
    for curve, runs in zip(_labels([runs[0][1] for runs in rows]), rows, strict=True):
        curves.setdefault(curve, []).extend([100 * m.top1 for m in metrics] for _, _, metrics in runs)
    figure = Figure(figsize=(7, 4.2 + 0.16 * len(curves)), layout="constrained")
    axes = figure.subplots()
    for name, seeds in curves.items():
        epochs = range(1, 1 + len(seeds[0]))
        (line,) = axes.plot(epochs, [statistics.mean(at) for at in zip(*seeds, strict=True)], label=name)
        if len(seeds) > 1:
            low, high = ([end(at) for at in zip(*seeds, strict=True)] for end in (min, max))
            axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower left", fontsize=7, frameon=False)
    save_figure(figure, Path(file))


def plot_differences(paths: Sequence[str | Path], file: str | Path) -> None:
    """Plots how far each row of the table is above the plain DNW of its network, as SVG, PDF or PNG.

    A dot is the mean difference of last accuracies over pairs of runs with the same seed, its line is two standard errors to
    each side. A hollow dot is a single pair, whose error is not known.

    Args:
        paths: as for :func:`results_table`.
        file: where to.

    Raises:
        ImportError: matplotlib is not installed (extra ``plot``).
        ValueError: no run directory, a damaged one, or none that can be compared with DNW.
    """
    from dnw.train._sweep import check_plot
    from dnw.view._figure import save_figure

    check_plot()
    from matplotlib.figure import Figure

    rows, _ = _rows(paths)
    pairs = _pairs(rows)
    if not pairs:
        given = ", ".join(map(str, paths))
        raise ValueError(f"no run to be compared with DNW of the same network, epochs and seed among {given}")
    networks: dict[tuple[object, ...], list[_Row]] = {}
    for row in sorted(pairs, key=lambda row: statistics.mean(pairs[row])):
        networks.setdefault(_network(rows[row][0][1]), []).append(row)
    heights = [len(members) + 1.8 for members in networks.values()]
    figure = Figure(figsize=(7, 0.42 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(networks), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (network, members) in zip(panels, networks.items(), strict=True):
        compared = [row for row, runs in rows.items() if _network(runs[0][1]) == network]
        apart = dict(zip(compared, _apart([rows[row][0][1] for row in compared]), strict=True))
        for place, row in enumerate(members):
            config, found = rows[row][0][1], pairs[row]
            error = 2 * _error(found) if len(found) > 1 else None
            face = "none" if error is None else "C0"
            axes.errorbar(statistics.mean(found), place, xerr=error, fmt="o", color="C0", markerfacecolor=face, capsize=3)
            seeds = f"{len(found)} seed{'s' * (len(found) > 1)}"
            label = axes.text(0.01, place + 0.38, f"{' '.join((config.method, *apart[row]))}, {seeds}", fontsize=7, va="center")
            label.set_transform(axes.get_yaxis_transform())
        config = rows[members[0]][0][1]
        axes.axvline(0, color="0.6", linewidth=1)
        axes.set_yticks([])
        axes.set_ylim(-0.5, len(members) - 0.2)
        density = "" if config.density is None else f", density {config.density:g}"
        axes.set_title(f"{config.model}, {config.data.name}, {config.epochs} epochs{density}", fontsize="small")
        axes.set_xlabel("points above DNW", fontsize="small")
        axes.tick_params(labelsize="small")
        axes.grid(axis="x", alpha=0.3)
    save_figure(figure, Path(file))


def _labels(configs: Sequence[Config]) -> list[str]:
    """Rows in a picture: what tells them apart of recipe, rule, changes of the recipe, and the epochs."""
    labels = []
    for config, only in zip(configs, _apart(configs), strict=True):
        recipe = [config.recipe] if any(config.recipe != other.recipe for other in configs) else []
        rule = [] if recipe and config.method in config.recipe else [config.method]
        labels.append(f"{' '.join((*recipe, *rule, *only))}, {config.epochs} epochs")
    return labels


def _apart(configs: Sequence[Config]) -> list[list[str]]:
    """What was changed of the recipe of each, but for what was changed alike in all."""
    changed = [_changed(config) for config in configs]
    return [[change for change in one if not all(change in other for other in changed)] for one in changed]


def _runs(path: str | Path) -> list[Path]:
    """The run, or those of a sweep."""
    path = Path(path)
    return [path] if RunDirectory(path).exists else runs_inside(path) or [path]


def save_results(paths: Sequence[str | Path], folder: str | Path, *, snapshots: int | None = None) -> list[Path]:
    """Keeps of finished runs what results are made of, some ten kilobytes each: settings, environment, metrics, final counts.

    What is kept is a run directory without weights; tables are made of it as of any other. It is called after the recipe, what
    was changed of it, the epochs and the seed, and does not say where data lay or where a ticket came from.

    Args:
        paths: run directories, or directories of sweeps; every seed and baseline is kept by itself.
        folder: where to.
        snapshots: keep the trained networks as well, and so many snapshots of each: what is kept is tested, counted, compiled
            and looked at like any run then. None: no networks.

    Returns:
        The directories that are kept now. A run that stopped early is left out.

    Raises:
        ValueError: no run directory, a damaged one, none that is finished, or another run of the same settings is kept there.
    """
    from dnw.models._pretrained import write_network
    from dnw.train._counts import count_run
    from dnw.train._network import load_network
    from dnw.view._snapshots import thin_snapshots

    kept = []
    for run in (run for path in paths for run in _runs(path)):
        for member, single in RunDirectory(run).members():
            config, metrics = single, member.metrics()
            if not member.is_finished(config):
                continue
            target = RunDirectory(Path(folder) / _name(config))
            if target.metrics() not in ([], metrics):
                raise ValueError(
                    f"{target.path} holds another run of the same settings; take it away first, or keep both apart"
                )
            if config.ticket.run is not None:
                ticket = config.ticket.model_copy(update={"run": Path(config.ticket.run).name})
                config = config.model_copy(update={"ticket": ticket})
            environment = {key: value for key, value in member.environment().items() if key not in ("data_dir", "check")}
            environment["config"] = config.model_dump(mode="json")
            target.path.mkdir(parents=True, exist_ok=True)
            write_whole(target.path / "environment.json", (json.dumps(sealed(environment), indent=2) + "\n").encode())
            target.write_metrics(metrics)
            if not member.last.exists() and (counted := member.path / "counts.json").exists():  # a result that was kept
                write_whole(target.path / "counts.json", counted.read_bytes())
            if member.last.exists():
                found = count_run(member.path)
                counts = {name: getattr(found, name) for name in ("parameters", "active", "dense", "nominal", "live")}
                write_whole(target.path / "counts.json", (json.dumps(counts) + "\n").encode())
            if snapshots is not None:
                network = load_network(member, single)
                edges = {name: parameter.active for name, parameter in network.wiring.items()}
                with network.wiring.settled():
                    told = {"num_classes": network.num_classes, "epoch": network.epoch, "step": network.step}
                    write_network(target.network, network.model, edges, **told)
                thin_snapshots(member.snapshots, target.snapshots, snapshots)
            write_whole(target.path / "config.json", config.to_json().encode())
            kept.append(target.path)
    if not kept:
        raise ValueError(f"no finished run among {', '.join(map(str, paths))}")
    return kept


def _name(config: Config) -> str:
    """Of a run by its settings, as files are called."""
    changed = [change.replace("=", "-") for change in _changed(config)]
    is_own = config.recipe in RECIPES and RECIPES[config.recipe]().method == config.method
    parts = [config.recipe, *changed, *([] if is_own and config.method in config.recipe else [config.method])]
    whole = "-".join([*parts, f"{config.epochs}-epochs", f"seed-{config.seed}"])
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in whole)


def insert_table(page: Path, name: str, table: str) -> None:
    """Puts a table into a Markdown page, between the lines ``<!-- table NAME -->`` and ``<!-- end -->``.

    Raises:
        ValueError: the page has no such place; those it has are named.
        OSError: the page cannot be read or written.
    """
    text = page.read_text()
    opening, closing = f"<!-- table {name} -->", "<!-- end -->"
    before, found, after = text.partition(opening + "\n")
    _, end, after = after.partition(closing)
    if not found or not end:
        names = [line.split()[2] for line in text.splitlines() if line.startswith("<!-- table ") and len(line.split()) == 4]
        raise ValueError(
            f"{page} has no place for the table {name!r}: the line {opening}, and below it the line {closing}; it has places "
            f"for {listing(names) if names else 'none'}"
        )
    write_whole(page, f"{before}{opening}\n\n{table}\n\n{closing}{after}".encode())


def _changed(config: Config) -> list[str]:
    """What differs from the recipe, as overrides; another run by its name alone."""
    if config.recipe not in RECIPES:
        return []
    pairs = (change.partition("=") for change in changes(_same(config, config.seeds), RECIPES[config.recipe]()))
    named = ((key, Path(value).name if key == "ticket.run" else value) for key, _, value in pairs)
    return [f"{key}={value}" for key, value in named if key not in _SHOWN]


def _source(member: RunDirectory, config: Config) -> str:
    environment = member.environment()
    if not environment:
        raise ValueError(f"{member.path}: environment.json is missing")
    machine = environment.get("accelerator") or environment.get("machine")
    number = None if environment.get("accelerator") else environment.get("threads")
    threads = f"{number} thread{'s' * (number != 1)}, " if number else ""
    commit = environment.get("commit") or "unknown"
    return f"data {config.data.name}, {machine}, torch {environment.get('torch')}, {threads}commit `{commit}`"


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _accuracy(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2%}"
    return f"{statistics.mean(values):.2%} +- {statistics.stdev(values):.2%}"
