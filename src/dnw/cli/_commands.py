"""What each command does: it resolves what was given, calls the library, and prints."""

from __future__ import annotations

import argparse
import platform
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dnw._files import PRETRAINED, pretrained_names

if TYPE_CHECKING:
    from dnw.train import Config, Logger

RUN = "run directory, or name of a pretrained network"


def run_named(text: str) -> Path:
    """A run directory by its path, or that of a pretrained network by its name."""
    path = Path(text)
    return PRETRAINED / text if text in pretrained_names() and not path.exists() else path


def _say(text: str) -> None:
    print(text)  # noqa: T201


def train(parsed: argparse.Namespace) -> None:
    """Train a recipe, or a stored config, with some settings changed."""
    config = _resolve(parsed.recipe, parsed.overrides)
    if parsed.print_config:
        _say(config.to_json().rstrip())
        return
    from dnw.data._places import check_there

    check_there(config.data.name, parsed.data_dir)
    _quiet()
    from dnw.train import train

    train(config, data_dir=parsed.data_dir, out=parsed.out, loggers=_loggers(parsed))


def resume(parsed: argparse.Namespace) -> None:
    """Continue a run that was stopped or killed, to exactly the result of an unbroken one; or extend a finished one."""
    epochs = None
    for key, _, value in (item.partition("=") for item in parsed.overrides):
        if key != "epochs":
            anew = f"dnw train {parsed.path}/config.json {key}={value}"
            raise ValueError(f"{key}: of a run only epochs can be raised; train a new one with {anew}")
        if not re.fullmatch(r"[1-9]\d{0,5}", value):
            raise ValueError(f"epochs={value}: expected a whole number, such as epochs=120")
        epochs = int(value)
    _quiet()
    from dnw.train import resume

    resume(parsed.path, epochs=epochs, data_dir=parsed.data_dir, loggers=_loggers(parsed))


def _loggers(parsed: argparse.Namespace) -> list[Logger]:
    from dnw.train._loggers import LOGGERS

    return [LOGGERS[name]() for name in dict.fromkeys(parsed.log)]


def eval_(parsed: argparse.Namespace) -> None:
    """Test the best and the last checkpoint of a run: top-1 and top-5 accuracy."""
    _quiet()
    from dnw.train import evaluate

    inside = parsed.path.is_relative_to(PRETRAINED)
    for score in evaluate(parsed.path, data_dir=parsed.data_dir):
        whose = parsed.path.name if inside else score.run
        _say(
            f"{whose}  {score.rule}  seed {score.seed}  {score.checkpoint} (epoch {score.epoch})  "
            f"top-1 {score.top1:.2%}  top-5 {score.top5:.2%}"
        )


def count(parsed: argparse.Namespace) -> None:
    """Count parameters and multiply-adds, per layer and in total: dense, nominal (active edges) and live.

    A network by its name is counted complete, a recipe as it starts, a run with the edges of its last checkpoint.
    """
    from dnw.recipes import RECIPES
    from dnw.recipes._settings import ModelName
    from dnw.train import count_config, count_run, override
    from dnw.train._counts import config_of_model

    size = _input_size(parsed.input) if parsed.input else None
    if parsed.target in get_args(ModelName):
        _say(str(count_config(override(config_of_model(parsed.target, size), parsed.overrides), size)))
    elif parsed.target not in RECIPES and run_named(parsed.target).is_dir():
        if parsed.overrides:
            raise ValueError(f"{parsed.overrides[0]!r}: a run is counted as it is; settings can be changed of a recipe")
        _say(str(count_run(run_named(parsed.target), size)))
    else:
        _say(str(count_config(_resolve(parsed.target, parsed.overrides), size)))


def compile_(parsed: argparse.Namespace) -> None:
    """Print what compiling a trained network does: what has no effect and goes, what stays, and how each layer runs.

    Layers that are not very sparse are measured, and run dense where that is faster on this machine. With --out, write the
    compacted network: as .dnw for dnw.compile.Runtime, as .onnx (needs dnw[onnx]), or as .c in plain C99 with a header beside
    it. What PyTorch would run a part of cannot be written; the error says which part.
    """
    from dnw.compile import Plan, code_size, measured, save_c, save_onnx, save_program
    from dnw.compile._measure import summary
    from dnw.train import RunDirectory, compile_run

    if parsed.out is not None and parsed.out.suffix not in (".dnw", ".onnx", ".c"):
        raise ValueError(f"--out {parsed.out}: allowed is a name that ends with .dnw, .onnx or .c, which says what is written")
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
        _say("nothing is written: --out NAME.dnw, NAME.onnx or NAME.c does that")
    elif parsed.out.suffix == ".onnx":
        _say(f"{parsed.out}: {save_onnx(program, parsed.out):,} bytes")
    elif parsed.out.suffix == ".c":
        data = RunDirectory(parsed.path if parsed.path.is_dir() else parsed.path.parent).config().data
        needs, code = save_c(program, parsed.out, mean=data.mean, std=data.std), code_size(parsed.out)
        _say(
            f"{parsed.out} and {parsed.out.with_suffix('.h')}: flash {needs.flash:,} bytes of numbers, RAM {needs.ram:,} bytes"
        )
        if code:
            sizes = ", ".join(f"{size:,} bytes with {flag}" for flag, size in code.items())
            _say(f"besides, code, as the C compiler of this machine makes it ({platform.machine()}): {sizes}")
    else:
        _say(f"{parsed.out}: {save_program(program, parsed.out):,} bytes   (dnw.compile.load_program reads it)")


def _say_seed(path: Path) -> None:
    """Of a run of several seeds: which one is taken."""
    from dnw.train import RunDirectory

    first, *others = RunDirectory(path).config().seeds
    if others:
        _say(f"{path}: seed {first}; there are also {', '.join(f'seed-{seed}' for seed in others)} in it")


def view(parsed: argparse.Namespace) -> None:
    """Write one HTML file that shows a run's graph over time, and print its path. It needs no network.

    With --svg or --png: a still picture of one snapshot, and no page. With --history: curves of what the wirings of runs did.
    """
    if parsed.history:
        _history(parsed)
        return
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


def _history(parsed: argparse.Namespace) -> None:
    from dnw.train import RunDirectory
    from dnw.view import write_history

    if parsed.svg or parsed.png or parsed.out or parsed.open or parsed.snapshot is not None:
        raise ValueError("--history draws curves of whole runs: leave out --svg, --png, --snapshot, --out and --open")
    files: dict[str, Path] = {}
    for path in parsed.paths:
        members = [member for member, _ in RunDirectory(path).members()]
        files |= {str(member.path): member.records for member in members if member.records.exists()}
    if not files:
        raise ValueError(f"{parsed.paths[0]}: has no wiring.jsonl; a run writes it while it trains")
    _say(f"{parsed.history}: {write_history(files, parsed.history):,} bytes")


def _input_size(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isdecimal() and len(p) < 6 and 0 < int(p) <= 4096 for p in parts):
        raise ValueError(f"--input {text:.40}: expected channels, height and width, such as 3x224x224, each from 1 to 4096")
    channels, height, width = map(int, parts)
    return channels, height, width


def import_(parsed: argparse.Namespace) -> None:
    """Take over a checkpoint of the authors' code as a run directory, which dnw eval and dnw count read."""
    _quiet()
    from dnw.train import import_original

    path = import_original(parsed.file, _resolve(parsed.recipe, parsed.overrides), data_dir=parsed.data_dir, out=parsed.out)
    _say(f"run: {path}   (dnw eval {path} tests it)")


def sweep(parsed: argparse.Namespace) -> None:
    """Train a recipe at several values of a setting, each in a run directory of its own, and plot accuracy against it.

    A sweep that was stopped goes on where it was. The plot is accuracy.svg; it needs the plot extra.
    """
    config = _resolve(parsed.recipe, parsed.overrides)
    key, equals, values = parsed.over.partition("=")
    if not equals:
        raise ValueError(f"--over {parsed.over}: expected a setting and its values, such as density=0.1,0.2,0.3")
    _quiet()
    from dnw.train import plot_sweep, results_table, sweep

    out = parsed.out or Path("runs") / f"sweep-{config.recipe}"
    paths = sweep(config, key, [v for v in values.split(",") if v], data_dir=parsed.data_dir, out=out)
    _say(results_table(list(paths.values())))
    try:
        plot_sweep(paths, key, out / "accuracy.svg")
    except ImportError as error:
        _say(f"no plot: {error}; the same command then draws it")
    else:
        _say(f"plot: {out / 'accuracy.svg'}")


def results(parsed: argparse.Namespace) -> None:
    """Print a Markdown table of finished runs, a row per recipe and rule, with what is behind each row; or put it in a page.

    With --save, settings, environment, metrics and final counts of the runs go into a folder, as run directories without
    weights, of which tables are made as well; with --snapshots too, also the trained networks, in half precision.
    """
    from dnw.train import plot_differences, plot_results, results_table, save_results
    from dnw.train._results import insert_table

    if (parsed.into is None) != (parsed.table is None):
        raise ValueError("--into PAGE and --table NAME go together: the page, and the place in it")
    if parsed.snapshots is not None and (parsed.save is None or parsed.snapshots < 2):
        raise ValueError(f"--snapshots {parsed.snapshots}: a number from 2 on, together with --save FOLDER")
    if parsed.differences and parsed.plot is None:
        raise ValueError("--differences is a plot: it goes with --plot FILE")
    if sum(option is not None for option in (parsed.save, parsed.into, parsed.plot)) > 1:
        raise ValueError("--save keeps runs, --into makes a table and --plot a picture; one after the other")
    if parsed.save is not None:
        for kept in save_results(parsed.paths, parsed.save, snapshots=parsed.snapshots):
            _say(f"{kept}: {sum(file.stat().st_size for file in kept.rglob('*') if file.is_file()):,} bytes")
        return
    if parsed.plot is not None:
        (plot_differences if parsed.differences else plot_results)(parsed.paths, parsed.plot)
        _say(f"{parsed.plot}: {parsed.plot.stat().st_size:,} bytes")
        return
    table = results_table(parsed.paths)
    if parsed.into is None:
        _say(table)
    else:
        insert_table(parsed.into, parsed.table, table)
        _say(f"{parsed.into}: table {parsed.table} written")


def table(parsed: argparse.Namespace) -> None:
    """Print the paper's tables: what is published, our own counts, our results where some are kept, and each row's command.

    Counts are of the networks as they start: multiply-adds of active edges, and of the nodes that such edges leave.
    """
    from dnw.train._published import tables

    for line in tables(parsed.results, parsed.names):
        _say(line)


def recipes(parsed: argparse.Namespace) -> None:
    """List the recipes, one line each, by what they are for; all of them, or those with certain words in their line."""
    from dnw.recipes import GROUPS, RECIPES

    width = max(map(len, RECIPES))
    found = {
        title: [
            line
            for recipe in group
            for line in [f"{recipe.__name__:<{width}}  {(recipe.__doc__ or '').strip().splitlines()[0]}"]
            if all(word.lower() in line.lower() for word in parsed.words)
        ]
        for title, group in GROUPS.items()
    }
    if not any(found.values()):
        raise ValueError(f"no recipe with {' and '.join(map(repr, parsed.words))} in its line; dnw recipes lists them all")
    _say("\n\n".join("\n".join((title, *(f"  {line}" for line in lines))) for title, lines in found.items() if lines))


def completion(parsed: argparse.Namespace) -> None:
    """Print what makes a shell complete commands, options, recipes and names of networks. Needs shtab, of the extra train."""
    import shtab

    from dnw.cli._arguments import TABLES, make_parser
    from dnw.recipes import RECIPES
    from dnw.recipes._settings import ModelName

    parser = make_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    known = {
        "recipe": [*RECIPES],
        "names": list(TABLES),
        "target": [*RECIPES, *get_args(ModelName), *pretrained_names()],
    }
    runs = {"bash": "_dnw_runs", "zsh": "_files", "tcsh": "f"}
    words = " ".join(pretrained_names())
    preamble: Any = {"bash": f'_dnw_runs() {{ compgen -W "{words}" -- "$1"; compgen -f -- "$1"; }}'}
    for command in commands.choices.values():
        for action in command._actions:
            if action.dest in known:
                action.choices = known[action.dest]
            elif action.type is run_named:
                action.complete = runs
            elif action.type is Path:
                action.complete = shtab.FILE
    _say(shtab.complete(parser, parsed.shell, preamble=preamble))


def _resolve(name: str | None, overrides: Sequence[str]) -> Config:
    """The config of a recipe or of a stored file, with overrides."""
    from dnw.recipes import config_of
    from dnw.train import override

    if name is None:
        raise ValueError(
            "give a recipe first: dnw train digits takes about a minute and needs no data; dnw recipes lists them all"
        )
    if "=" in name and not name.endswith(".json"):
        overrides, name = [name, *overrides], "digits"
    return override(config_of(name), overrides)


def _quiet() -> None:
    """Keeps the advice that libraries give to programmers out of a user's terminal."""
    import logging

    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning_fabric|torch\.distributed")
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
