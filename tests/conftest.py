"""One thread per process, so that those that run side by side do not fight over the cores; one seed; torchvision, if there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # of this process and of those that tests start
import torch

torch.set_num_threads(1)

ASIDE = Path(sys.prefix) / "torchvision"
"""Where the set-up puts torchvision: aside, because other libraries import it wherever they find it, and a build for CUDA
cannot be imported beside a torch without it, for want of two operators."""
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
FROM_LIBRARIES = ("mobilenet_v2", "shufflenet_v2", "mnasnet", "densenet")
"""What is in the names of networks and recipes that come from torchvision or timm."""
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
_kept: list[torch.library.Library] = []


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whichever ran before it: a graph with few edges may be cut by chance."""
    torch.manual_seed(0)


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes torchvision importable; the test is skipped where it is not at hand."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or (spec.origin or "").startswith(str(ASIDE)):  # also where an earlier test has imported it from there
        monkeypatch.syspath_prepend(ASIDE)
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed (extra vision)")
    try:
        import torchvision
    except RuntimeError:
        _kept.append(torch.library.Library("torchvision", "FRAGMENT"))
        for definition in OPERATORS:
            _kept[-1].define(definition)
        import torchvision  # noqa: F401


@pytest.fixture
def libraries(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Of a network or recipe by its name: makes the library importable that it comes from, or skips the test."""

    def wanted(name: str) -> None:
        if any(part in name for part in FROM_LIBRARIES):
            request.getfixturevalue("torchvision")
            if "mnasnet" in name and importlib.util.find_spec("timm") is None:
                pytest.skip("timm is not installed (extra vision)")

    return wanted


@pytest.fixture
def browser() -> Iterator[Any]:
    """A browser to open pages in; the test is skipped where there is none."""
    sync = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium (set CHROMIUM to its path)")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()
