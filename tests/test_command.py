"""What the command says while it works, what it imports, and how it ends."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch

from dnw import cli
from dnw.cli import _commands
from dnw.cli._arguments import COMMANDS, LOGS, TABLES, make_parser
from dnw.recipes import RECIPES
from dnw.train import _log, _published
from dnw.train._log import Log, _clock
from dnw.train._loggers import LOGGERS


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return action.choices


def test_sigterm_ends_like_ctrl_c(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(_commands, "_say", lambda text: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["recipes"]) == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_in_a_file_has_a_line_now_and_then_with_the_time_left(monkeypatch, capsys):
    now = iter(range(0, 1_000_000, 7))
    monkeypatch.setattr(_log.time, "monotonic", lambda: float(next(now)))
    with Log().progress(10, epoch=1, epochs=4) as advance:
        for _ in range(10):
            advance()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "epoch 2/4  step 5/10  about 2 min left"  # 35 s for 5 of 30 steps
    assert 1 <= len(said) <= 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.6, "10 s"), (59, "59 s"), (61, "1 min"), (3700, "1 h 01 min"), (90_000, "25 h 00 min")]
)
def test_times_are_said_in_words(seconds, text):
    assert _clock(seconds) == text


def test_training_nothing_says_how_to_start(capsys):
    assert cli.main(["train"]) == 1
    assert "give a recipe first: dnw train digits takes about a minute" in capsys.readouterr().err


def test_a_run_alone_needs_neither_fabric_nor_the_compiler_to_begin():
    """Their imports take three times as long as that of torch."""
    heavy = ("lightning_fabric", "torch._dynamo", "torchdiffeq", "matplotlib", "scipy")
    loads = "import sys, dnw.train._loop, dnw.cli._commands; dnw.cli._commands._quiet()"
    code = f"{loads}; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_completes_commands_recipes_and_networks(shell, capsys, tmp_path):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("resume", "cifar10_mobilenet_rigl_x225", "digits_static", "tensorboard", "data-dir"):
        assert word in script
    if shell == "bash":
        asked = 'COMP_WORDS=(dnw train cifar10_mobilenet_ri); COMP_CWORD=2; _shtab_dnw; printf "%s\\n" "${COMPREPLY[@]}"'
        (tmp_path / "dnw.bash").write_text(f"{script}\n{asked}\n")
        done = subprocess.run(["bash", tmp_path / "dnw.bash"], capture_output=True, text=True)
        assert done.stdout.split() == ["cifar10_mobilenet_rigl_x225"], done.stderr


def test_every_command_shows_examples_that_parse(capsys):
    for name, command in subcommands().items():
        examples = [line.partition("  #")[0].strip() for line in command.epilog.splitlines()[1:]]
        assert examples
        for example in examples:
            words = shlex.split(example.partition(" > ")[0].removeprefix('eval "$(').removesuffix(')"'))
            assert words[:2] == ["dnw", name]
            parsed, rest = make_parser().parse_known_args(words[1:])
            assert not any(word.startswith("-") for word in rest), example
            assert parsed.run


def test_words_that_are_nearly_right(capsys):
    assert tuple(subcommands()) == COMMANDS
    assert tuple(_published.TABLES) == TABLES
    assert tuple(LOGGERS) == LOGS
    for words, message in (
        (["trian", "digits"], "no command 'trian'; did you mean 'train'? There are 'train', 'resume', 'sweep'"),
        (
            ["train", "digits", "--epochs", "2"],
            "unrecognized arguments: --epochs 2; settings are written key=value, such as epochs=2",
        ),
        (["recipes", "--all"], "unrecognized arguments: --all\n"),
    ):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert message in capsys.readouterr().err


def test_a_sweep_without_matplotlib_trains_and_says_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["sweep", "digits", "--over", "num_edges=50,100", "epochs=1", "baseline=null", "--out", str(tmp_path / "sweep")]
    assert cli.main(words) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "| `digits` `num_edges=50` | dnw |" in printed
    assert "no plot: matplotlib is not installed; install the plot extra: pip install 'dnw[plot]'" in printed
    assert cli.main([*words[:3], "num_edgs=50,100"]) == 1
    assert "num_edgs: no such setting; did you mean 'num_edges'" in capsys.readouterr().err


def test_a_recipe_is_counted_beside_a_folder_of_its_name_and_a_config_may_lie_anywhere(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert cli.main(["count", "digits"]) == 0
    (tmp_path / "lr=1.json").write_text(RECIPES["digits"]().to_json())
    assert cli.main(["train", "lr=1.json", "--print-config"]) == 0
    capsys.readouterr()
    assert cli.main(["results", "runs", "--plot", "a.svg", "--save", "kept"]) == 1
    assert "one after the other" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory")],
)
def test_too_little_memory_is_one_line(error, monkeypatch, capsys):
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(_commands, "_say", fails)
    assert cli.main(["recipes"]) == 1
    assert capsys.readouterr().err == (
        "dnw: there is not memory enough; a smaller batch_size takes less, and --traceback says how much was asked for\n"
    )
