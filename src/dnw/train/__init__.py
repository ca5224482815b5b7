"""Training runs: one validated config, one loop, one run directory that can be resumed.

The names are loaded when first used, so that configs and recipes need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Config": "dnw.recipes._config",
    "DataConfig": "dnw.recipes._settings",
    "OptimConfig": "dnw.recipes._settings",
    "config_from_json": "dnw.recipes._config",
    "override": "dnw.recipes._config",
    "Log": "dnw.train._log",
    "Logger": "dnw.train._loggers",
    "CSVLogger": "dnw.train._loggers",
    "TensorBoardLogger": "dnw.train._loggers",
    "Network": "dnw.train._network",
    "Scores": "dnw.train._evaluate",
    "train": "dnw.train._loop",
    "resume": "dnw.train._loop",
    "TrainingStoppedError": "dnw.train._run",
    "RunDirectory": "dnw.train._run",
    "EpochMetrics": "dnw.train._run",
    "evaluate": "dnw.train._evaluate",
    "load_trained": "dnw.train._trained",
    "compile_run": "dnw.train._trained",
    "count_run": "dnw.train._counts",
    "count_config": "dnw.train._counts",
    "view_runs": "dnw.train._view",
    "run_record": "dnw.train._view",
    "results_table": "dnw.train._results",
    "save_results": "dnw.train._results",
    "plot_differences": "dnw.train._results",
    "plot_results": "dnw.train._results",
    "sweep": "dnw.train._sweep",
    "plot_sweep": "dnw.train._sweep",
    "import_original": "dnw.train._import",
}

__all__ = list(_PUBLIC)

if TYPE_CHECKING:
    from dnw.recipes._config import Config as Config
    from dnw.recipes._config import config_from_json as config_from_json
    from dnw.recipes._config import override as override
    from dnw.recipes._settings import DataConfig as DataConfig
    from dnw.recipes._settings import OptimConfig as OptimConfig
    from dnw.train._counts import count_config as count_config
    from dnw.train._counts import count_run as count_run
    from dnw.train._evaluate import Scores as Scores
    from dnw.train._evaluate import evaluate as evaluate
    from dnw.train._import import import_original as import_original
    from dnw.train._log import Log as Log
    from dnw.train._loggers import CSVLogger as CSVLogger
    from dnw.train._loggers import Logger as Logger
    from dnw.train._loggers import TensorBoardLogger as TensorBoardLogger
    from dnw.train._loop import resume as resume
    from dnw.train._loop import train as train
    from dnw.train._network import Network as Network
    from dnw.train._results import plot_differences as plot_differences
    from dnw.train._results import plot_results as plot_results
    from dnw.train._results import results_table as results_table
    from dnw.train._results import save_results as save_results
    from dnw.train._run import EpochMetrics as EpochMetrics
    from dnw.train._run import RunDirectory as RunDirectory
    from dnw.train._run import TrainingStoppedError as TrainingStoppedError
    from dnw.train._sweep import plot_sweep as plot_sweep
    from dnw.train._sweep import sweep as sweep
    from dnw.train._trained import compile_run as compile_run
    from dnw.train._trained import load_trained as load_trained
    from dnw.train._view import run_record as run_record
    from dnw.train._view import view_runs as view_runs


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'dnw.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
