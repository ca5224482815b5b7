"""What tests of pictures share: a short run, snapshots of a wiring that changes, and what a record and a page hold."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path

import torch
from torch import nn

import dnw
from dnw.recipes import digits
from dnw.train import override, train
from dnw.view import Record, SnapshotWriter

SHORT = ["epochs=3", "first_epoch_snapshots=2"]


def short_run(folder: Path) -> Path:
    """A run on the digits of a few seconds, with a baseline."""
    return train(override(digits(), SHORT), data_dir=folder, out=folder / "digits-1")


def snapshots_of(model: nn.Module, folder: Path, count: int, **budget: object) -> list[dnw.Wiring]:
    """Snapshots of a wiring that changes by random steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    wiring = dnw.wire(model, optimizer, **budget)
    writer = SnapshotWriter(folder)
    for step in range(count):
        writer.write(wiring, step, step / 2)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return [wiring]


def edges_of(one: Record, snapshot: int) -> set[tuple[int, int]]:
    active = one.strengths[snapshot] != 0
    return set(zip(one.targets[active].tolist(), one.sources[active].tolist(), strict=True))


def unpacked(page: Path) -> tuple[dict[str, object], bytes]:
    text = page.read_text()
    header = re.search(r'<script type="application/json" id="header">(.*?)</script>', text, re.DOTALL)
    data = re.search(r'<script type="text/plain" id="data">(.*?)</script>', text, re.DOTALL)
    assert header
    assert data
    return json.loads(header[1]), gzip.decompress(base64.b64decode(data[1]))


def opened(browser, path: Path, **settings: object):
    """A page without errors, drawn."""
    page = browser.new_page(**settings)
    page.problems = []
    page.on("console", lambda m: page.problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith("file:") else page.problems.append(r.url))
    page.goto(path.resolve().as_uri())
    page.evaluate("ready")
    page.wait_for_function("state.milliseconds > 0")
    return page


def settle(page) -> None:
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
