"""Attacks on runs that take longer than a test may: ``python tests/soak.py --minutes 30 --seed 0``.

Runs are killed and interrupted at random moments and must end where an unbroken one does; bits of their files are flipped,
files are cut, checkpoints are crafted and settings drawn at random, and whatever reads them must refuse in one line or read
what was written. Prints a table of what was tried and what happened; exits 1 when something went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dnw.recipes import digits
from dnw.train import (
    RunDirectory,
    TrainingStoppedError,
    count_run,
    evaluate,
    load_trained,
    override,
    results_table,
    resume,
    train,
)
from dnw.train._checkpoint import read_checkpoint, write_checkpoint

SETTINGS = ("epochs=3", "baseline=null", "device=cpu", "first_epoch_snapshots=2", "batch_size=64")
FILES = ("config.json", "environment.json", "metrics.jsonl", "last.pt", "best.pt")
REFUSED = (ValueError, OSError, TrainingStoppedError, FloatingPointError)
MOST_SECONDS = 120


class TookTooLongError(Exception):
    pass


class Soak:
    """One soak: an unbroken run to compare with, and a count of what happened to the others."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.happened: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []
        self.whole = train(override(digits(), SETTINGS), data_dir=folder, out=folder / "whole")
        self.expected = {name: way(self.whole) for name, way in WAYS.items()}

    def attack(self, name: str) -> None:
        """Tries one attack and notes what happened."""
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                what = ATTACKS[name](self, run)
        except Exception:
            what = "WRONG: an error that is none of ours"
            self.wrong.append(traceback.format_exc())
        if what.startswith("WRONG"):
            kept = self.folder / f"wrong-{len(self.wrong)}"
            if run.exists():
                shutil.copytree(run, kept, dirs_exist_ok=True)
            self.wrong.append(f"{name}: {what} (kept in {kept})")
        self.happened[name, what] += 1

    def ends_like_the_whole_one(self, run: Path) -> str:
        for name in ("last.pt", "best.pt"):
            if not same(read_checkpoint(run / name), read_checkpoint(self.whole / name)):
                return f"WRONG: another {name}"
        if [m.top1 for m in RunDirectory(run).metrics()] != [m.top1 for m in RunDirectory(self.whole).metrics()]:
            return "WRONG: other metrics"
        left = [p.name for p in run.rglob("*") if p.name == "lock" or p.name.endswith(".part")]
        return f"WRONG: {left[0]} is left" if left else "ended like the unbroken one"

    def read_in_every_way(self, run: Path) -> str:
        """What reading a changed run comes to; the worst of all ways."""
        outcomes = set()
        for name, way in WAYS.items():
            try:
                found = way(run)
            except REFUSED as error:
                outcomes.add("refused" if len(str(error).splitlines()) == 1 else "WRONG: refused in several lines")
            else:
                outcomes.add("read as it was" if same(found, self.expected[name]) else f"WRONG: {name} reads something else")
        return max(outcomes, key=lambda what: (what.startswith("WRONG"), what == "refused"))


def same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return isinstance(b, torch.Tensor) and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def accuracies(path: Path) -> list[float]:
    return [score.top1 for score in evaluate(path)]


def weights(path: Path) -> dict[str, torch.Tensor]:
    found = load_trained(path)
    return {**found.model.state_dict(), **{f"latent of {n}": p.latent for n, p in found.wiring.items()}}


def trained_on(path: Path) -> dict[str, Any]:
    resume(path)
    return read_checkpoint(path / "last.pt")


WAYS: dict[str, Callable[[Path], object]] = {
    "eval": accuracies,
    "load": weights,
    "count": lambda path: str(count_run(path)),
    "results": lambda path: results_table([path]),
    "resume": trained_on,
}


def limited(function: Callable[[], object]) -> object:
    def late(*_: object) -> None:
        raise TookTooLongError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(MOST_SECONDS)
    try:
        return function()
    finally:
        signal.alarm(0)


# --- the attacks ---


def kill(soak: Soak, run: Path) -> str:
    """SIGKILL at random moments, until a process gets through."""
    kills = 0
    while True:
        verb = ["resume", str(run)] if (run / "config.json").exists() else ["train", "digits", *SETTINGS, "--out", str(run)]
        process = subprocess.Popen(
            [sys.executable, "-m", "dnw", *verb],
            cwd=soak.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        before, deadline = written(run), time.monotonic() + soak.random.uniform(5, 40)
        while kills < 3 and process.poll() is None and written(run) == before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(soak.random.uniform(0, 1.5) if kills < 3 else 0)
        if kills < 3:
            process.kill()
            kills += 1
        _, error = process.communicate(timeout=300)
        if process.returncode == 0:
            return soak.ends_like_the_whole_one(run)
        if process.returncode != -signal.SIGKILL:
            return f"WRONG: exit {process.returncode}: {error.strip()[-200:]}"


def written(run: Path) -> int:
    return (run / "metrics.jsonl").stat().st_mtime_ns if (run / "metrics.jsonl").exists() else int((run / "lock").exists())


def interrupt(soak: Soak, run: Path) -> str:
    """An exception at a random moment within an optimizer's step, of a random step, twice."""
    from torch.optim import SGD

    real = SGD.step

    for _ in range(2):
        steps = soak.random.randrange(1, 66)

        def step(self: SGD, *arguments: object, **more: object) -> object:
            nonlocal steps
            steps -= 1
            if steps == 0:
                signal.setitimer(signal.ITIMER_REAL, soak.random.uniform(1e-5, 2e-3))
            return real(self, *arguments, **more)

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, interrupted)
        SGD.step = step  # type: ignore[method-assign]
        try:
            if (run / "config.json").exists():
                resume(run)
            else:
                shutil.rmtree(run, ignore_errors=True)
                train(override(digits(), SETTINGS), data_dir=soak.folder, out=run)
        except KeyboardInterrupt:
            pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            SGD.step = real  # type: ignore[method-assign]
    if not (run / "config.json").exists():
        return "interrupted before it began"
    resume(run)
    return soak.ends_like_the_whole_one(run)


def flip(soak: Soak, run: Path) -> str:
    """One bit of one file."""
    shutil.copytree(soak.whole, run)
    file = run / soak.random.choice(FILES)
    content = bytearray(file.read_bytes())
    content[soak.random.randrange(len(content))] ^= 1 << soak.random.randrange(8)
    file.write_bytes(content)
    return soak.read_in_every_way(run)


def cut(soak: Soak, run: Path) -> str:
    """One file ends early."""
    shutil.copytree(soak.whole, run)
    file = run / soak.random.choice(FILES)
    content = file.read_bytes()
    file.write_bytes(content[: soak.random.randrange(len(content))])
    what = soak.read_in_every_way(run)
    if file.name == "metrics.jsonl" and what == "WRONG: results reads something else":
        return "results leaves out what is not finished"  # a cut at the end of a line
    return what


def edit(soak: Soak, run: Path) -> str:
    """A setting of config.json is another."""
    shutil.copytree(soak.whole, run)
    values = json.loads((run / "config.json").read_text())
    key, value = soak.random.choice(
        [
            ("seeds", [5]),
            ("rule", "random"),
            ("epochs", 2),
            ("epochs", 4),
            ("batch_size", 32),
            ("num_edges", 101),
            ("recipe", "x"),
        ]
    )
    values[key] = value
    (run / "config.json").write_text(json.dumps(values))
    if soak.random.random() < 0.5:
        return soak.read_in_every_way(run)
    (run / "environment.json").unlink()
    try:
        evaluate(run, data_dir=soak.folder)
    except ValueError:
        return "refused"
    return "WRONG: eval takes another config"


VALUES: list[Callable[[random.Random], Any]] = [
    lambda r: None,
    lambda r: "text",
    lambda r: -1,
    lambda r: r.randrange(10**20),
    lambda r: 1e308,
    lambda r: float("nan"),
    lambda r: [],
    lambda r: {},
    lambda r: {"a": [1]},
    lambda r: True,
    lambda r: torch.zeros(r.randrange(4), r.randrange(4)),
    lambda r: torch.full((3,), float("nan")),
    lambda r: torch.tensor(r.randrange(5)),
    lambda r: torch.zeros(2, dtype=torch.complex64),
    lambda r: torch.eye(3).to_sparse(),
]


def craft(soak: Soak, run: Path) -> str:
    """An entry of a checkpoint, however deep, is another, gone, or one more; tensors of the right shape hold NaN."""
    shutil.copytree(soak.whole, run)
    file = run / soak.random.choice(["last.pt", "best.pt"])
    content = read_checkpoint(file)
    place: Any = content
    while True:
        key = soak.random.choice(list(place) if isinstance(place, dict) else range(len(place)))
        below = place[key]
        if not isinstance(below, (dict, list)) or not below or soak.random.random() < 0.15:
            break
        place = below
    how = soak.random.choice(["another", "another", "gone", "more", "NaN"])
    if how == "NaN" and isinstance(place[key], torch.Tensor) and place[key].is_floating_point() and place[key].numel():
        place[key].view(-1)[soak.random.randrange(place[key].numel())] = float("nan")
    elif how == "gone":
        del place[key]
    elif how == "more" and isinstance(place, dict):
        place[soak.random.choice(["more", 17, key])] = soak.random.choice(VALUES)(soak.random)
    else:
        place[key] = soak.random.choice(VALUES)(soak.random)
    write_checkpoint(file, content)
    outcome = "read"
    for name in ("eval", "load", "resume"):
        try:
            WAYS[name](run)
        except REFUSED as error:
            outcome = "refused" if len(str(error).splitlines()) == 1 else "WRONG: refused in several lines"
    return outcome


def settings(soak: Soak, run: Path) -> str:
    """Two settings drawn at random, and an epoch trained where they are allowed."""
    keys = [
        "optim.lr",
        "optim.momentum",
        "optim.weight_decay",
        "optim.label_smoothing",
        "optim.factor",
        "num_edges",
        "batch_size",
    ]
    keys += [
        "density_schedule.end",
        "density_schedule.power",
        "data.crop_padding",
        "first_epoch_snapshots",
        "seeds",
        "data.std",
    ]
    keys += ["rule_settings.rate", "rule_settings.every", "rule_settings.fraction", "rule_settings.penalty", "data.mean"]
    values = [
        "0",
        "1",
        "-1",
        "0.5",
        "0.999",
        "1e-30",
        "1e30",
        "1e308",
        "7",
        "100",
        "5504",
        "1000",
        "1e6",
        "true",
        "x",
        "[[",
        "",
    ]
    rules = ["dnw", "rigl", "set", "targeted_dropout", "sparse_momentum", "l1_anneal", "top_kast", "random"]
    drawn = [f"{key}={soak.random.choice(values)}" for key in soak.random.sample(keys, 2)]
    try:
        config = override(digits(), [*SETTINGS, "epochs=1", f"rule={soak.random.choice(rules)}", *drawn])
        limited(lambda: train(config, data_dir=soak.folder, out=run))
    except TookTooLongError:
        return f"WRONG: more than {MOST_SECONDS} s with {' '.join(drawn)}"
    except REFUSED as error:
        return "refused" if len(str(error).splitlines()) == 1 else f"WRONG: refused in several lines: {error}"
    return "trained"


ATTACKS: dict[str, Callable[[Soak, Path], str]] = {
    one.__name__: one for one in (kill, interrupt, flip, cut, edit, craft, settings)
}
WEIGHTS = {"kill": 1, "interrupt": 2, "flip": 30, "cut": 8, "edit": 5, "craft": 30, "settings": 6}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * parsed.minutes
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(folder, parsed.seed)
    for name in ATTACKS:  # each at least once
        soak.attack(name)
    while time.monotonic() < end:
        soak.attack(soak.random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0])
    print(f"\n{'attack':<10} {'times':>6}  what happened")
    for (name, what), times in sorted(soak.happened.items()):
        print(f"{name:<10} {times:>6}  {what}")
    for text in soak.wrong:
        print(f"\n{text}")
    if not soak.wrong:
        shutil.rmtree(folder)
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
