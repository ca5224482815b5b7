"""Training runs: one validated config, one loop, one run directory that can be resumed.

The names are loaded when first used, so that configs and recipes need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Config": "dnw.train._config",
    "DataConfig": "dnw.train._config",
    "OptimConfig": "dnw.train._config",
    "MODEL_NAMES": "dnw.train._config",
    "changes": "dnw.train._config",
    "compile_run": "dnw.train._trained",
    "load_trained": "dnw.train._trained",
    "config_from_json": "dnw.train._config",
    "config_of_model": "dnw.train._config",
    "insert_table": "dnw.train._results",
    "override": "dnw.train._config",
    "RunDirectory": "dnw.train._run",
    "TrainingStoppedError": "dnw.train._run",
    "EpochMetrics": "dnw.train._run",
    "count_config": "dnw.train._counts",
    "count_run": "dnw.train._counts",
    "import_original": "dnw.train._import",
    "evaluate": "dnw.train._loop",
    "resume": "dnw.train._loop",
    "results_table": "dnw.train._results",
    "check_plot": "dnw.train._sweep",
    "plot_sweep": "dnw.train._sweep",
    "sweep": "dnw.train._sweep",
    "train": "dnw.train._loop",
    "run_record": "dnw.train._view",
    "view_runs": "dnw.train._view",
}

__all__ = list(_PUBLIC)

if TYPE_CHECKING:
    from dnw.train._config import MODEL_NAMES as MODEL_NAMES
    from dnw.train._config import Config as Config
    from dnw.train._config import DataConfig as DataConfig
    from dnw.train._config import OptimConfig as OptimConfig
    from dnw.train._config import changes as changes
    from dnw.train._config import config_from_json as config_from_json
    from dnw.train._config import config_of_model as config_of_model
    from dnw.train._config import override as override
    from dnw.train._counts import count_config as count_config
    from dnw.train._counts import count_run as count_run
    from dnw.train._import import import_original as import_original
    from dnw.train._loop import evaluate as evaluate
    from dnw.train._loop import resume as resume
    from dnw.train._loop import train as train
    from dnw.train._results import insert_table as insert_table
    from dnw.train._results import results_table as results_table
    from dnw.train._run import EpochMetrics as EpochMetrics
    from dnw.train._run import RunDirectory as RunDirectory
    from dnw.train._run import TrainingStoppedError as TrainingStoppedError
    from dnw.train._sweep import check_plot as check_plot
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
