"""The command ``dnw``: parses, resolves, calls the library.

Contract: whatever a user can cause ends in one line on standard error and an exit code that is not 0. Torch is imported
only where something is trained or tested.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from dnw import __version__
from dnw._checks import did_you_mean, listing
from dnw._files import PRETRAINED, read_text

if TYPE_CHECKING:
    from dnw.train import Config

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") or not hasattr(parsed, "overrides") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides that follow an option: argparse ends a list of arguments at the first option
        parsed.overrides += rest
    try:
        with _ending_like_an_interrupt():
            parsed.run(parsed)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # of a reader such as head, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if parsed.traceback or not _is_users(error):
            raise
        if isinstance(error, ChildProcessError) and os.environ.get("LOCAL_RANK", "0") != "0":
            return 1  # the first process has said what is wrong
        print(f"dnw: {_one_line(error)}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


@contextmanager
def _ending_like_an_interrupt() -> Iterator[None]:
    """Within, SIGTERM is Ctrl-C: a run says how it goes on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dnw", description="Learn which connections a neural network has.")
    parser.add_argument("--version", action="version", version=f"dnw {__version__}")
    parser.set_defaults(traceback=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a recipe", description=_train.__doc__)
    train.add_argument("recipe", nargs="?", help="name of a recipe (dnw recipes) or path of a stored config.json")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, such as optim.lr=0.05 seeds=0,1,2"
    )
    train.add_argument("--data-dir", type=Path, default=Path("data"), help="where the data lies (default: data)")
    train.add_argument("--out", type=Path, help="run directory (default: runs/RECIPE-NUMBER)")
    train.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    train.set_defaults(run=_train)

    resume = commands.add_parser("resume", help="continue a run", description=_resume.__doc__)
    resume.add_argument("path", type=Path, metavar="RUN", help="run directory")
    resume.add_argument("--data-dir", type=Path, help="where the data lies (default: where it lay)")
    resume.set_defaults(run=_resume)

    evaluate = commands.add_parser("eval", help="test a run's checkpoints", description=_eval.__doc__)
    evaluate.add_argument("path", type=_run, metavar="RUN|NAME", help=_RUN)
    evaluate.add_argument("--data-dir", type=Path, help="where the data lies (default: where it lay)")
    evaluate.set_defaults(run=_eval)

    sweeping = commands.add_parser("sweep", help="train a recipe at several values of a setting", description=_sweep.__doc__)
    sweeping.add_argument("recipe", help="name of a recipe (dnw recipes) or path of a stored config.json")
    sweeping.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change in all runs")
    sweeping.add_argument("--over", required=True, metavar="key=a,b,c", help="the setting and its values: density=0.1,0.2,0.3")
    sweeping.add_argument("--data-dir", type=Path, default=Path("data"), help="where the data lies (default: data)")
    sweeping.add_argument("--out", type=Path, help="directory of the runs (default: runs/sweep-RECIPE)")
    sweeping.set_defaults(run=_sweep)

    results = commands.add_parser("results", help="a Markdown table of runs", description=_results.__doc__)
    results.add_argument("paths", nargs="+", type=Path, metavar="RUN", help="run directories")
    results.add_argument("--into", type=Path, metavar="PAGE", help="Markdown page to put the table into instead of printing it")
    results.add_argument(
        "--table", metavar="NAME", help="where in the page: between its lines <!-- table NAME --> and <!-- end -->"
    )
    results.add_argument(
        "--save",
        type=Path,
        metavar="FOLDER",
        help="keep what results are made of, some 10 KB a run, instead of printing them",
    )
    results.add_argument(
        "--snapshots", type=int, metavar="N", help="with --save: keep the trained networks too, and so many snapshots of each"
    )
    results.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw accuracy over the epochs as SVG, PDF or PNG instead (extra plot)"
    )
    results.set_defaults(run=_results)

    table = commands.add_parser("table", help="the paper's tables beside our counts and results", description=_table.__doc__)
    table.add_argument("names", nargs="*", metavar="NAME", help="tiny, wirings, imagenet, resnet50 (default: all)")
    table.add_argument(
        "--results", type=Path, default=Path("results"), metavar="FOLDER", help="where results are kept (default: results)"
    )
    table.set_defaults(run=_table)

    recipes = commands.add_parser("recipes", help="list the recipes", description=_recipes.__doc__)
    recipes.set_defaults(run=_recipes)

    counting = commands.add_parser("count", help="count parameters and multiply-adds", description=_count.__doc__)
    counting.add_argument(
        "target",
        metavar="MODEL|RECIPE|RUN",
        help="name of a network or recipe, path of a config.json, or a run",
    )
    counting.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe to change")
    counting.add_argument("--input", metavar="3x224x224", help="shape of one input (default: the recipe's or network's)")
    counting.set_defaults(run=_count)

    compiling = commands.add_parser("compile", help="make a trained network smaller, exactly", description=_compile.__doc__)
    compiling.add_argument("path", type=_run, metavar="RUN|CHECKPOINT|NAME", help=f"{_RUN}, or a checkpoint in one")
    compiling.add_argument("--checkpoint", choices=("last", "best"), help="which of the run's (default: last)")
    compiling.add_argument("--input", metavar="3x224x224", help="shape of one input (default: the run's)")
    compiling.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write it: NAME.dnw, .onnx or .c (default: only print)"
    )
    compiling.set_defaults(run=_compile)

    viewing = commands.add_parser("view", help="a page in which the wiring changes", description=_view.__doc__)
    viewing.add_argument("paths", type=_run, metavar="RUN|NAME", nargs="+", help=f"{_RUN}; two are put beside each other")
    viewing.add_argument("--out", type=Path, metavar="FILE", help="where to write (default: in the first run)")
    for kind in ("svg", "png"):
        viewing.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"write one snapshot as {kind.upper()} instead")
    viewing.add_argument("--snapshot", type=int, metavar="N", help="which one, from 0 on (default: the last)")
    viewing.add_argument("--open", action="store_true", help="open it in a browser")
    viewing.set_defaults(run=_view)

    importing = commands.add_parser("import", help="take over a checkpoint of the authors' code", description=_import.__doc__)
    importing.add_argument("file", type=Path, help="epoch_N.pt, best.pt or init.pt of the authors' code")
    importing.add_argument("recipe", help="the recipe of the same network (dnw recipes)")
    importing.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe to change")
    importing.add_argument("--data-dir", type=Path, default=Path("data"), help="where the data lies (default: data)")
    importing.add_argument("--out", type=Path, help="run directory (default: runs/RECIPE-NUMBER)")
    importing.set_defaults(run=_import)

    for command in (train, resume, evaluate, sweeping, results, table, recipes, counting, compiling, viewing, importing):
        command.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


_RUN = "run directory, or name of a pretrained network"


def _run(text: str) -> Path:
    """A run directory by its path, or that of a pretrained network by its name."""
    path = Path(text)
    inside = PRETRAINED / text
    return inside if re.fullmatch(r"\w+", text) and not path.exists() and inside.is_dir() else path


def _say(text: str) -> None:
    print(text)  # noqa: T201


def _train(parsed: argparse.Namespace) -> None:
    """Train a recipe, or a stored config, with some settings changed."""
    config = _resolve(parsed.recipe, parsed.overrides)
    if parsed.print_config:
        _say(config.to_json().rstrip())
        return
    _quiet()
    from dnw.train import train

    train(config, data_dir=parsed.data_dir, out=parsed.out)


def _resume(parsed: argparse.Namespace) -> None:
    """Continue a run that was stopped or killed, to exactly the result of an unbroken one."""
    _quiet()
    from dnw.train import resume

    resume(parsed.path, data_dir=parsed.data_dir)


def _eval(parsed: argparse.Namespace) -> None:
    """Test the best and the last checkpoint of a run: top-1 and top-5 accuracy."""
    _quiet()
    from dnw.train import evaluate

    for score in evaluate(parsed.path, data_dir=parsed.data_dir):
        _say(
            f"{score.run}  {score.rule}  seed {score.seed}  {score.checkpoint} (epoch {score.epoch})  "
            f"top-1 {score.top1:.2%}  top-5 {score.top5:.2%}"
        )


def _count(parsed: argparse.Namespace) -> None:
    """Count parameters and multiply-adds, per layer and in total: dense, nominal (active edges) and live.

    A network by its name is counted complete, a recipe as it starts, a run with the edges of its last checkpoint.
    """
    from dnw.train import count_config, count_run, override
    from dnw.train._counts import config_of_model
    from dnw.train._settings import ModelName

    size = _input_size(parsed.input) if parsed.input else None
    if parsed.target in get_args(ModelName):
        _say(str(count_config(override(config_of_model(parsed.target, size), parsed.overrides), size)))
    elif _run(parsed.target).is_dir():
        if parsed.overrides:
            raise ValueError(f"{parsed.overrides[0]!r}: a run is counted as it is; settings can be changed of a recipe")
        _say(str(count_run(_run(parsed.target), size)))
    else:
        _say(str(count_config(_resolve(parsed.target, parsed.overrides), size)))


def _compile(parsed: argparse.Namespace) -> None:
    """Print what compiling a trained network does: what has no effect and goes, what stays, and how each layer runs.

    Layers that are not very sparse are measured, and run dense where that is faster on this machine. With --out, write the
    compacted network: as .onnx (needs dnw[onnx]), as .c in plain C99 with a header beside it, or for our own
    runtime under any other name. What PyTorch would run a part of cannot be written; the error says which part.
    """
    from dnw.compile import Plan, measured, save_c, save_onnx, save_program
    from dnw.compile._measure import summary
    from dnw.train import compile_run

    if parsed.path.suffix == ".pt2":
        raise ValueError(
            f"{parsed.path}: such a file may hold code that PyTorch runs when it loads it, so the command does not; in Python, "
            "of a file that you trust, dnw.compile.compile(torch.export.load(path), example) compiles it"
        )
    found, program = compile_run(parsed.path, _input_size(parsed.input) if parsed.input else None, parsed.checkpoint)
    if parsed.path.is_dir():
        _say_seed(parsed.path)
    _say(str(found))
    if isinstance(found, Plan) and (parsed.out is None or parsed.out.suffix not in (".c", ".onnx")):
        program, timings = measured(program)
        _say(summary(timings))
    if parsed.out is None:
        return
    if parsed.out.suffix == ".onnx":
        _say(f"{parsed.out}: {save_onnx(program, parsed.out):,} bytes")
    elif parsed.out.suffix == ".c":
        needs = save_c(program, parsed.out)
        _say(f"{parsed.out} and {parsed.out.with_suffix('.h')}: flash {needs.flash:,} bytes, RAM {needs.ram:,} bytes")
    else:
        _say(f"{parsed.out}: {save_program(program, parsed.out):,} bytes   (dnw.compile.load_program reads it)")


def _say_seed(path: Path) -> None:
    """Of a run of several seeds: which one is taken."""
    from dnw.train import RunDirectory

    first, *others = RunDirectory(path).config().seeds
    if others:
        _say(f"{path}: seed {first}; there are also {', '.join(f'seed-{seed}' for seed in others)} in it")


def _view(parsed: argparse.Namespace) -> None:
    """Write one HTML file that shows a run's graph over time, and print its path. It needs no network.

    With --svg or --png: a still picture of one snapshot, and no page.
    """
    if len(parsed.paths) > 2:
        raise ValueError(f"{len(parsed.paths)} runs: one is shown, or two beside each other")
    from dnw.train import run_record, view_runs

    if parsed.snapshot is not None and not (parsed.svg or parsed.png):
        raise ValueError(f"--snapshot {parsed.snapshot}: the page shows all; it is for --svg and --png")
    stills = {kind: path for kind, path in (("svg", parsed.svg), ("png", parsed.png)) if path is not None}
    if stills:
        from dnw.view import write_still

        if len(parsed.paths) > 1 or parsed.out or parsed.open:
            raise ValueError("--svg and --png draw one run and write no page: leave out the second run, --out and --open")
        for kind, path in stills.items():
            if path.suffix.lower() != f".{kind}":
                raise ValueError(f"--{kind} {path}: its name must end with .{kind}")
        one = run_record(parsed.paths[0])
        _say_seed(parsed.paths[0])
        for path in stills.values():
            _say(f"{path}: {write_still(one, path, -1 if parsed.snapshot is None else parsed.snapshot):,} bytes")
        return
    out, first = parsed.out, parsed.paths[0]
    if out is None and first.is_relative_to(PRETRAINED):  # nothing is written into the package
        out = Path(f"{first.name}.html")
    page = view_runs(parsed.paths, out)
    for path in parsed.paths:
        _say_seed(path)
    _say(str(page))
    if parsed.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


def _input_size(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isdecimal() and len(p) < 6 and 0 < int(p) <= 4096 for p in parts):
        raise ValueError(f"--input {text:.40}: expected channels, height and width, such as 3x224x224, each from 1 to 4096")
    channels, height, width = map(int, parts)
    return channels, height, width


def _import(parsed: argparse.Namespace) -> None:
    """Take over a checkpoint of the authors' code as a run directory, which dnw eval and dnw count read."""
    _quiet()
    from dnw.train import import_original

    path = import_original(parsed.file, _resolve(parsed.recipe, parsed.overrides), data_dir=parsed.data_dir, out=parsed.out)
    _say(f"run: {path}   (dnw eval {path} tests it)")


def _sweep(parsed: argparse.Namespace) -> None:
    """Train a recipe at several values of a setting, each in a run directory of its own, and plot accuracy against it.

    A sweep that was stopped goes on where it was. The plot is accuracy.svg; it needs the plot extra.
    """
    config = _resolve(parsed.recipe, parsed.overrides)
    key, equals, values = parsed.over.partition("=")
    if not equals:
        raise ValueError(f"--over {parsed.over}: expected a setting and its values, such as density=0.1,0.2,0.3")
    _quiet()
    from dnw.recipes import RECIPES
    from dnw.train import plot_sweep, results_table, sweep
    from dnw.train._sweep import check_plot

    check_plot()
    out = parsed.out or Path("runs") / f"sweep-{config.recipe}"
    paths = sweep(config, key, [v for v in values.split(",") if v], data_dir=parsed.data_dir, out=out)
    _say(results_table(list(paths.values()), RECIPES))
    plot_sweep(paths, key, out / "accuracy.svg")
    _say(f"plot: {out / 'accuracy.svg'}")


def _results(parsed: argparse.Namespace) -> None:
    """Print a Markdown table of finished runs, a row per recipe and rule, with what is behind each row; or put it in a page.

    With --save, settings, environment, metrics and final counts of the runs go into a folder, as run directories without
    weights, of which tables are made as well; with --snapshots too, also the trained networks, in half precision.
    """
    from dnw.recipes import RECIPES
    from dnw.train import plot_results, results_table, save_results
    from dnw.train._results import insert_table

    if (parsed.into is None) != (parsed.table is None):
        raise ValueError("--into PAGE and --table NAME go together: the page, and the place in it")
    if parsed.snapshots is not None and (parsed.save is None or parsed.snapshots < 2):
        raise ValueError(f"--snapshots {parsed.snapshots}: a number from 2 on, together with --save FOLDER")
    if parsed.save is not None and parsed.into is not None:
        raise ValueError("--save keeps runs and --into makes a table; one after the other")
    if parsed.save is not None:
        for kept in save_results(parsed.paths, parsed.save, RECIPES, snapshots=parsed.snapshots):
            _say(f"{kept}: {sum(file.stat().st_size for file in kept.rglob('*') if file.is_file()):,} bytes")
        return
    if parsed.plot is not None:
        plot_results(parsed.paths, parsed.plot, RECIPES)
        _say(f"{parsed.plot}: {parsed.plot.stat().st_size:,} bytes")
        return
    table = results_table(parsed.paths, RECIPES)
    if parsed.into is None:
        _say(table)
    else:
        insert_table(parsed.into, parsed.table, table)
        _say(f"{parsed.into}: table {parsed.table} written")


def _table(parsed: argparse.Namespace) -> None:
    """Print the paper's tables: what is published, our own counts, our results where some are kept, and each row's command.

    Counts are of the networks as they start: multiply-adds of active edges, and of the nodes that such edges leave.
    """
    from dnw.recipes._published import tables

    for line in tables(parsed.results, parsed.names):
        _say(line)


def _recipes(parsed: argparse.Namespace) -> None:
    """List the recipes, one line each."""
    from dnw.recipes import RECIPES

    width = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        _say(f"{name:<{width}}  {(recipe.__doc__ or '').strip().splitlines()[0]}")


def _resolve(name: str | None, overrides: Sequence[str]) -> Config:
    """The config of a recipe or of a stored file, with overrides."""
    from dnw.recipes import RECIPES
    from dnw.train import config_from_json, override
    from dnw.train._config import MOST_BYTES

    if name is None:
        raise ValueError(
            "give a recipe first: dnw train digits takes about a minute and needs no data; dnw recipes lists them all"
        )
    if "=" in name:
        overrides, name = [name, *overrides], "digits"
    if name in RECIPES:
        config = RECIPES[name]()
    elif name.endswith(".json"):
        config = config_from_json(read_text(Path(name), MOST_BYTES), name)
    else:
        raise ValueError(
            f"no recipe {name!r}{did_you_mean(name, RECIPES)}; there are {listing(RECIPES)}, or give the path of a config.json"
        )
    return override(config, overrides)


def _quiet() -> None:
    """Keeps the advice that libraries give to programmers out of a user's terminal."""
    import logging

    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning_fabric|torch\.distributed")
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")


def _is_users(error: Exception) -> bool:
    """Whether an error is one that a user can cause and mend."""
    if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)):
        return True
    return type(error).__name__ == "TrainingStoppedError"


_EXTRAS = {
    "matplotlib": "plot",
    "networkx": "edges",
    "onnx": "onnx",
    "scipy": "edges",
    "torchdiffeq": "ode",
    "torchvision": "vision",
}


def _one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get((error.name or "").partition(".")[0], "train")
        return f"{error.name} is not installed; install its extra: pip install 'dnw[{extra}]'"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
