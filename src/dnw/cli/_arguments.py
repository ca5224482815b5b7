"""What the command takes: the arguments of each of its commands."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from dnw import __version__
from dnw.cli import _commands as do

COMMANDS = (
    *("train", "resume", "sweep", "import", "eval", "view", "compile", "count"),
    *("recipes", "results", "table", "completion"),
)
"""All there are; make_parser says what each takes."""
TABLES = ("tiny", "wirings", "imagenet", "resnet50")
"""That ``dnw table`` prints."""
LOGS = ("csv", "tensorboard")
"""Loggers by name."""
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def make_parser() -> argparse.ArgumentParser:
    """Of all commands; what is parsed has in ``run`` the function of its command."""
    parser = argparse.ArgumentParser(prog="dnw", description="Learn which connections a neural network has.")
    parser.add_argument("--version", action="version", version=f"dnw {__version__}")
    parser.set_defaults(traceback=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _training(commands)
    _looking(commands)
    _tables(commands)
    for command in set(commands.choices.values()):
        command.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def _command(
    commands: Commands, run: Callable[[argparse.Namespace], None], what: str, *examples: str
) -> argparse.ArgumentParser:
    """Adds a command that is called as its function; ``--help`` shows the function's docstring and the examples."""
    shown = "examples:\n" + "\n".join(f"  {example}" for example in examples)
    command = commands.add_parser(
        run.__name__.strip("_"),
        help=what,
        description=inspect.cleandoc(run.__doc__ or ""),
        epilog=shown,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _with_recipe(command: argparse.ArgumentParser, *, optional: bool = False) -> None:
    command.add_argument(
        "recipe", nargs="?" if optional else None, help="name of a recipe (dnw recipes) or path of a stored config.json"
    )
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, such as optim.lr=0.05 seeds=0,1,2"
    )


def _with_data(command: argparse.ArgumentParser, *, stored: bool = False) -> None:
    told = f"where the data lies (default: {'where it lay' if stored else 'data'})"
    command.add_argument("--data-dir", type=Path, default=None if stored else Path("data"), help=told)


def _with_log(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--log",
        action="append",
        default=[],
        choices=LOGS,
        help="write each epoch's numbers there as well: metrics.csv, or tensorboard/ (extra tensorboard), in the run directory",
    )


def _training(commands: Commands) -> None:
    train = _command(
        commands,
        do.train,
        "train a recipe",
        "dnw train digits",
        "dnw train cifar10 --data-dir ~/data epochs=10 seeds=0,1,2",
        "dnw train cifar10 rule=rigl density=0.05 --log tensorboard --out runs/rigl",
        "dnw train runs/digits-1/config.json optim.lr=0.05",
    )
    _with_recipe(train, optional=True)
    _with_data(train)
    train.add_argument("--out", type=Path, help="run directory (default: runs/RECIPE-NUMBER)")
    _with_log(train)
    train.add_argument("--print-config", action="store_true", help="print the resolved config and stop")

    resume = _command(
        commands, do.resume, "continue or extend a run", "dnw resume runs/cifar10-1", "dnw resume runs/digits-1 epochs=120"
    )
    resume.add_argument("path", type=Path, metavar="RUN", help="run directory")
    resume.add_argument("overrides", nargs="*", metavar="epochs=N", help="of a finished run: train on to so many epochs")
    _with_data(resume, stored=True)
    _with_log(resume)

    sweeping = _command(
        commands,
        do.sweep,
        "train a recipe at several values of a setting",
        "dnw sweep cifar10 --over num_edges=8000,16000,32000 epochs=10",
        "dnw sweep digits --over rule=dnw,rigl,random seeds=0,1,2 baseline=null",
    )
    _with_recipe(sweeping)
    sweeping.add_argument("--over", required=True, metavar="key=a,b,c", help="the setting and its values: density=0.1,0.2,0.3")
    _with_data(sweeping)
    sweeping.add_argument("--out", type=Path, help="directory of the runs (default: runs/sweep-RECIPE)")

    importing = _command(
        commands, do.import_, "take over a checkpoint of the authors' code", "dnw import epoch_9.pt cifar10 --out runs/theirs"
    )
    importing.add_argument("file", type=Path, help="epoch_N.pt, best.pt or init.pt of the authors' code")
    _with_recipe(importing)
    _with_data(importing)
    importing.add_argument("--out", type=Path, help="run directory (default: runs/RECIPE-NUMBER)")


def _looking(commands: Commands) -> None:
    evaluate = _command(commands, do.eval_, "test a run's checkpoints", "dnw eval runs/digits-1", "dnw eval digits_static")
    evaluate.add_argument("path", type=do.run_named, metavar="RUN|NAME", help=do.RUN)
    _with_data(evaluate, stored=True)

    viewing = _command(
        commands,
        do.view,
        "a page in which the wiring changes",
        "dnw view runs/digits-1 --open",
        "dnw view runs/digits-1 runs/digits-2",
        "dnw view mnist_static --svg wiring.svg --snapshot 0",
        "dnw view runs/digits-1 runs/digits-2 --history churn.svg",
    )
    viewing.add_argument(
        "paths", type=do.run_named, metavar="RUN|NAME", nargs="+", help=f"{do.RUN}; two are put beside each other"
    )
    viewing.add_argument("--out", type=Path, metavar="FILE", help="where to write (default: in the first run)")
    for kind in ("svg", "png"):
        viewing.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"write one snapshot as {kind.upper()} instead")
    viewing.add_argument("--snapshot", type=int, metavar="N", help="which one, from 0 on (default: the last)")
    viewing.add_argument(
        "--history", type=Path, metavar="FILE", help="write curves of what the wirings did while they trained (SVG, PDF, PNG)"
    )
    viewing.add_argument("--open", action="store_true", help="open it in a browser")

    compiling = _command(
        commands,
        do.compile_,
        "make a trained network smaller, exactly",
        "dnw compile runs/digits-1",
        "dnw compile runs/digits-1 --checkpoint best --out net.onnx",
        "dnw compile mnist_static --out mnist.c",
    )
    compiling.add_argument("path", type=do.run_named, metavar="RUN|CHECKPOINT|NAME", help=f"{do.RUN}, or a checkpoint in one")
    compiling.add_argument("--checkpoint", choices=("last", "best"), help="which of the run's (default: last)")
    compiling.add_argument("--input", metavar="3x224x224", help="shape of one input (default: the run's)")
    compiling.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write it: NAME.dnw, .onnx or .c (default: only print)"
    )

    counting = _command(
        commands,
        do.count,
        "count parameters and multiply-adds",
        "dnw count imagenet_dnw_x225",
        "dnw count resnet50 --input 3x160x160",
        "dnw count runs/digits-1",
    )
    counting.add_argument(
        "target", metavar="MODEL|RECIPE|RUN", help="name of a network or recipe, path of a config.json, or a run"
    )
    counting.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe to change")
    counting.add_argument("--input", metavar="3x224x224", help="shape of one input (default: the recipe's or network's)")


def _tables(commands: Commands) -> None:
    recipes = _command(
        commands, do.recipes, "list the recipes", "dnw recipes", "dnw recipes random", "dnw recipes mobilenet cifar10"
    )
    recipes.add_argument("words", nargs="*", metavar="WORD", help="only those with all of these in their line")

    results = _command(
        commands,
        do.results,
        "a Markdown table of runs",
        "dnw results runs/*",
        "dnw results runs/* --plot curves.svg",
        "dnw results results/arena_tiny --plot differences.svg --differences",
        "dnw results runs/cifar10-1 --save results/cifar10 --snapshots 8",
    )
    results.add_argument("paths", nargs="+", type=Path, metavar="RUN", help="run directories")
    results.add_argument("--into", type=Path, metavar="PAGE", help="Markdown page to put the table into instead of printing it")
    results.add_argument(
        "--table", metavar="NAME", help="where in the page: between its lines <!-- table NAME --> and <!-- end -->"
    )
    results.add_argument(
        "--save", type=Path, metavar="FOLDER", help="keep what results are made of, some 10 KB a run, instead of printing them"
    )
    results.add_argument(
        "--snapshots", type=int, metavar="N", help="with --save: keep the trained networks too, and so many snapshots of each"
    )
    results.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw accuracy over the epochs as SVG, PDF or PNG instead (extra plot)"
    )
    results.add_argument(
        "--differences",
        action="store_true",
        help="with --plot: draw how far each row is above DNW, by pairs of runs with the same seed, with two standard errors",
    )

    table = _command(commands, do.table, "the paper's tables beside our counts and results", "dnw table tiny", "dnw table")
    table.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(TABLES)} (default: all)")
    table.add_argument(
        "--results", type=Path, default=Path("results"), metavar="FOLDER", help="where results are kept (default: results)"
    )

    completion = _command(
        commands,
        do.completion,
        "complete commands, options and recipes with the Tab key",
        'eval "$(dnw completion bash)"       # in ~/.bashrc',
        "dnw completion zsh > ~/.zfunc/_dnw  # a folder of fpath",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
