"""What pyproject.toml cannot say: a build starts from the sources alone."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class FreshBuildPy(build_py):
    """`build/` may hold modules that have since moved or gone, and a wheel takes up all that lies there."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "sage_inductor", ignore_errors=True)
        super().run()


setup(cmdclass={"build_py": FreshBuildPy})
