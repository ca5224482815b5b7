"""How the native code is built: shared libraries with nothing of Python in them, so that one wheel serves every Python."""

from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class Libraries(build_ext):
    """Calls each library after its module alone, without the tag of a Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class Wheel(bdist_wheel):
    """Of a machine, and of any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_ext": Libraries, "bdist_wheel": Wheel})
