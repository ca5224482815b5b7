"""What is built installs and works: the sdist, and wheels from it, with a C compiler and without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from processes import needs

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, needs("build"), pytest.mark.xdist_group("packaging")]
LOOKS = """
import json, torch, dnw, dnw.cli
from dnw.compile import Runtime, plan
from dnw.kernels._graph import library
network = dnw.models.pretrained("digits_static")
program = plan(network.model, (1, 8, 8)).apply(network.model)
runtime = Runtime(program)
images = torch.rand(4, 1, 8, 8)
with torch.no_grad():
    same = torch.allclose(runtime(images), network.model(images), atol=1e-4)
print(json.dumps([dnw.__file__, runtime.kind, library() is not None, same, dnw.cli.main(["count", "digits_static"])]))
"""


def call(*command: object, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The unpacked sdist of what git has and what is new beside it."""
    folder = tmp_path_factory.mktemp("source")
    listed = call("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=ROOT).split("\0")
    copy = folder / "copy"
    for name in filter(None, listed):
        if not name.startswith(("tests/", "results/", "docs/")) and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    call(sys.executable, "-m", "build", "--no-isolation", "--sdist", "-o", folder / "dist", ".", folder=copy)
    (archive,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return next(folder.glob("dnw-*/pyproject.toml")).parent


@pytest.mark.parametrize("compiler", [True, False], ids=["compiler", "no compiler"])
def test_a_wheel_from_the_sdist_works_by_itself(source, compiler, tmp_path):
    without = {} if compiler else {"CC": "/bin/false"}
    command = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "-o", tmp_path / "dist", ".")
    call(*command, folder=source, **without)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "-py3-none-" in wheel.name, "one wheel serves every Python"
    libraries = sorted(name.rpartition("/")[2] for name in names if name.endswith(".so"))
    assert libraries == (["_exchange_native.so", "_graph_native.so", "_kernels.so"] if compiler else [])
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", folder=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path).strip())
    zipfile.ZipFile(wheel).extractall(site)
    # everything but dnw from here, which is installed in place: its own folder must come first
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    file, kind, kernels, same, code = json.loads(call(python, "-c", LOOKS, folder=tmp_path).splitlines()[-1])
    assert Path(file).is_relative_to(site)
    assert (kind, kernels) == (("native", True) if compiler else ("torch", False))
    assert same
    assert code == 0
    shutil.rmtree(source / "build")  # nothing of it for the other case


def test_metadata_say_the_same_version():
    version = next(
        line.split('"')[1] for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version")
    )
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    assert version.removesuffix(".dev0") in (ROOT / "CHANGELOG.md").read_text()
