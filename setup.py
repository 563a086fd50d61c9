"""Copies ``recipes/`` into the wheel as ``securetune/_recipes``; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithRecipes(build_py):
    """Adds the recipes and their configs to the files of the package ``securetune``."""

    def run(self) -> None:
        """Build the packages, then copy the recipes beside them."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "securetune" / "_recipes"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "recipes", target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


setup(cmdclass={"build_py": BuildWithRecipes})
