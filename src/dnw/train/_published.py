"""The paper's tables (Wortsman et al., 2019) beside our own counts and results.

Contract: published figures are data, in the order of the paper. What we say beside them is counted and read when asked for.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dnw._checks import one_of
from dnw.recipes._config import changes
from dnw.recipes._recipes import RECIPES
from dnw.train import Config, RunDirectory, count_config, override
from dnw.train._run import runs_inside


@dataclass(frozen=True)
class Published:
    """One row of a table.

    Attributes:
        name: as the paper has it.
        recipe: that trains it.
        accuracy: published, in percent.
        spread: over runs, where published.
        parameters, multiply_adds: published, in millions; None where they are not, or not exactly.
        changes: of the recipe.
    """

    name: str
    recipe: str
    accuracy: float
    spread: float | None = None
    parameters: float | None = None
    multiply_adds: float | None = None
    changes: tuple[str, ...] = ()

    def config(self) -> Config:
        return override(RECIPES[self.recipe](), self.changes)

    @property
    def command(self) -> str:
        stages = "dnw train cifar10_mobilenet_complete; " if "lottery" in self.recipe else ""
        ticket = " ticket.run=RUN" if stages else ""
        return f"{stages}dnw train {' '.join((self.recipe, *self.changes))}{ticket}"


def _resnets() -> Iterator[Published]:
    kept = (90, 80, 70, 60, 50, 40, 30, 20, 10)
    all_sparse = (77.488, 77.610, 77.604, 77.536, 77.528, 77.290, 76.904, 76.158, 74.026)
    first_dense = (77.382, 77.284, 77.492, 77.564, 77.570, 77.456, 77.076, 76.600, 75.044)
    yield Published("dense", "imagenet_resnet50", 77.510)
    for name, recipe, column in (
        ("all layers sparse", "imagenet_resnet50_dnw", all_sparse),
        ("first layer dense", "imagenet_resnet50_dnw_first_dense", first_dense),
    ):
        for percent, accuracy in zip(kept, column, strict=True):
            changed = () if percent == 10 else (f"density={percent / 100:g}",)
            yield Published(f"{name}, {percent} %", recipe, accuracy, changes=changed)


TABLES: dict[str, tuple[Published, ...]] = {
    "tiny": (
        Published("static, random graph", "cifar10_random_original", 76.1, 0.5),
        Published("static, DNW", "cifar10", 80.9, 0.6),
        Published("discrete time, random graph", "cifar10_discrete_random", 77.3, 0.7),
        Published("discrete time, DNW", "cifar10_discrete", 82.3, 0.6),
        Published("continuous time, random graph", "cifar10_continuous_random", 78.5, 1.2),
        Published("continuous time, DNW", "cifar10_continuous", 83.1, 0.3),
    ),
    "wirings": (
        Published("MobileNetV1 x0.25", "cifar10_mobilenet_x25", 86.3, 0.2),
        Published("random graph x0.225", "cifar10_mobilenet_random_x225", 87.2, 0.1),
        Published("no update rule x0.225", "cifar10_mobilenet_no_update_x225", 86.7, 0.5),
        Published("L1 + anneal x0.225", "cifar10_mobilenet_l1_anneal_x225", 84.3, 0.6),
        Published("targeted dropout x0.225", "cifar10_mobilenet_targeted_dropout_x225", 89.2, 0.4),
        Published("lottery ticket, one-shot x0.225", "cifar10_mobilenet_lottery_x225", 87.9, 0.3),
        Published("DNW x0.225", "cifar10_mobilenet_dnw_x225", 89.7, 0.2),
    ),
    "imagenet": (
        Published("MobileNetV1 x0.25", "imagenet_mobilenet_x25", 50.6, None, 0.5, 41),
        Published("X-4 MobileNetV1", "imagenet_expander_x50", 54.0),
        Published("MobileNetV2 x0.15", "imagenet_mobilenet_v2_x15", 44.9, None, None, 39),
        Published("MobileNetV2 x0.4", "imagenet_mobilenet_v2_x40", 56.6, None, None, 43),
        Published("DenseNet x0.5", "imagenet_densenet_x50", 41.1, None, None, 42),
        Published("Xception x0.5", "imagenet_xception_x50", 55.1, None, None, 40),
        Published("ShuffleNetV1 x0.5, g=3", "imagenet_shufflenet_v1_x50", 56.8, None, None, 38),
        Published("ShuffleNetV2 x0.5", "imagenet_shufflenet_v2_x50", 60.3, None, 1.4, 41),
        Published("random graph x0.225", "imagenet_random_x225", 53.3, None, 1.2, 55.7),
        Published("DNW-Small x0.15", "imagenet_dnw_small_x15", 50.3, None, 0.24, 22.1),
        Published("DNW-Small x0.225", "imagenet_dnw_small_x225", 59.9, None, 0.4, 41.2),
        Published("DNW x0.225", "imagenet_dnw_x225", 60.9, None, 1.1, 42.1),
        Published("MnasNet-search1", "imagenet_mnasnet", 64.9, None, 1.9, 65),
        Published("DNW x0.3", "imagenet_dnw_x30", 65.0, None, 1.3, 66.7),
        Published("MobileNetV1 x0.5", "imagenet_mobilenet_x50", 63.7, None, 1.3, 149),
        Published("MobileNetV2 x0.6", "imagenet_mobilenet_v2_x60", 66.6, None, None, 141),
        Published("MobileNetV2 x0.75", "imagenet_mobilenet_v2_x75", 67.9, None, None, 145),
        Published("DenseNet x1", "imagenet_densenet_x100", 54.8, None, None, 142),
        Published("Xception x1", "imagenet_xception_x100", 65.9, None, None, 145),
        Published("ShuffleNetV1 x1, g=3", "imagenet_shufflenet_v1_x100", 67.4, None, None, 140),
        Published("ShuffleNetV2 x1", "imagenet_shufflenet_v2_x100", 69.4, None, 2.3, 146),
        Published("random graph x0.49", "imagenet_random_x49", 64.1, None, 1.8, 170),
        Published("DNW x0.49", "imagenet_dnw_x49", 70.4, None, 1.8, 154),
    ),
    "resnet50": tuple(_resnets()),
}
"""By their names."""
_TITLES = {
    "tiny": "Tiny classifiers, CIFAR-10 (table 1)",
    "wirings": "Ways of finding a wiring, MobileNetV1 on CIFAR-10 (table 2)",
    "imagenet": "ImageNet (table 3)",
    "resnet50": "ResNet-50 on ImageNet, by the weights kept (section 4.4)",
}


def tables(results: Path, names: Sequence[str] = ()) -> Iterator[str]:
    """The tables as Markdown, line by line: each row is counted when it is asked for.

    Args:
        results: directory in which results are kept (``dnw results --save``), in folders of it as well; it may be missing.
        names: of the tables that are wanted; all by default.

    Raises:
        ValueError: there is no such table.
    """
    for name in names:
        if name not in TABLES:
            raise ValueError(f"no table {name!r}{one_of(name, TABLES)}")
    return _tables(_own_results(results), names or list(TABLES))


def _tables(own: dict[tuple[str, tuple[str, ...]], str], names: Sequence[str]) -> Iterator[str]:
    for name in names:
        rows = TABLES[name]
        yield from ("", f"## {_TITLES.get(name, name)}", "")
        yield "| network | published | parameters | multiply-adds | ours: parameters | multiply-adds | accuracy | command |"
        yield "|---" * 8 + "|"
        for row in rows:
            spread = "" if row.spread is None else f" +- {row.spread:g}"
            cells = (
                row.name,
                f"{row.accuracy:.1f}{spread} %",
                _millions(row.parameters),
                _millions(row.multiply_adds),
                *_counted(row),
                own.get((row.recipe, row.changes), ""),
                f"`{row.command}`",
            )
            yield f"| {' | '.join(cells)} |"


def _millions(number: float | None) -> str:
    return "" if number is None else f"{number:g}M"


def _counted(row: Published) -> tuple[str, str]:
    """Our parameters and multiply-adds, those of active edges only."""
    config = row.config()
    if config.edges == "ticket":
        config = RECIPES["cifar10_mobilenet_random_x225"]()  # of as many edges; which they are is known after the first stage
    try:
        found = count_config(config)
    except ImportError as error:
        return str(error).partition(";")[0], ""
    return f"{found.active / 1e6:.2f}M", f"{found.nominal / 1e6:.1f}M"


def _own_results(folder: Path) -> dict[tuple[str, tuple[str, ...]], str]:
    """Of each recipe, with what is changed of it in a table's row, what the longest of our runs gave, with least changed."""
    runs: dict[tuple[str, tuple[str, ...]], dict[tuple[int, tuple[str, ...]], list[float]]] = {}
    known = {(row.recipe, row.changes) for rows in TABLES.values() for row in rows}
    for path in sorted({*runs_inside(folder), *(run for inner in folder.glob("*/") for run in runs_inside(inner))}):
        for member, config in RunDirectory(path).members():
            metrics = member.metrics()
            if config.recipe not in RECIPES or not member.is_finished(config):
                continue
            found = [c for c in changes(config, RECIPES[config.recipe]()) if c.partition("=")[0] not in _BESIDE]
            found = [c for c in found if c != "dormant.gradient=exact"]  # which is the default
            for recipe, changed in known:
                if recipe == config.recipe and set(changed) <= set(found):
                    more = tuple(c for c in found if c not in changed)
                    if any(c.startswith(("rule=", "edges=")) for c in more):  # another way of finding a wiring
                        continue
                    kinds = runs.setdefault((recipe, changed), {})
                    kinds.setdefault((config.epochs, more), []).append(100 * metrics[-1].top1)
    return {row: _text(kinds) for row, kinds in runs.items()}


_BESIDE = ("seeds", "epochs", "baseline", "first_epoch_snapshots", "device", "data.workers", "ticket.run")
"""Settings that do not make a result another one, or are said otherwise."""


def _text(kinds: dict[tuple[int, tuple[str, ...]], list[float]]) -> str:
    epochs, changed = max(kinds, key=lambda kind: (kind[0], -len(kind[1])))
    values = kinds[epochs, changed]
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    settings = "".join(f", `{change}`" for change in changed)
    seeds = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
    return f"{statistics.mean(values):.1f}{spread} % ({epochs} epoch{'s' if epochs > 1 else ''}, {seeds}{settings})"
