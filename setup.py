"""Builds the native libraries with CMake and Ninja. All other metadata is in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata, util
from pathlib import Path

import setuptools

ROOT = Path(__file__).parent.resolve()
ASK = "torch (2.10 or newer), setuptools (77 or newer), cmake (3.25 or newer) and ninja"
# The scripts folder finds cmake and ninja of a virtual environment that is not activated.
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"fusedrnn: setuptools {setuptools.__version__} is too old; install {ASK}.")

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info


def torch_root() -> Path:
    """Folder of the torch to compile against: this environment's, which no isolated build can see."""
    spec = util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            f"fusedrnn: torch is not visible to this build. Install {ASK}, then type: "
            "pip install --no-build-isolation ."
        )
    version = metadata.version("torch")
    major, minor = re.findall(r"\d+", version)[:2]
    if (int(major), int(minor)) < (2, 10):
        sys.exit(f"fusedrnn: torch {version} is too old. Install {ASK}.")
    return Path(spec.submodule_search_locations[0])


def tool(name: str) -> str:
    found = shutil.which(name, path=PATH)
    if found is None:
        sys.exit(f"fusedrnn: {name} not found. Install {ASK}.")
    return found


def run(*command: str | Path) -> None:
    sys.stdout.flush()
    if code := subprocess.call(command, env={**os.environ, "PATH": PATH}):
        sys.exit(f"fusedrnn: the native build failed with exit status {code}: see above.")


class CheckedDistInfo(dist_info):
    """The first step of an installation, before any dependency is fetched: the place to stop."""

    def run(self) -> None:
        torch_root()
        super().run()


class CMakeBuild(build_ext):
    """Builds in build/cmake, which is kept, and installs into fusedrnn/lib."""

    def run(self) -> None:
        cmake, build = tool("cmake"), ROOT / "build" / "cmake"
        run(
            *(cmake, "-S", ROOT, "-B", build, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCH_ROOT={torch_root()}",
        )
        run(cmake, "--build", build)
        # Files of a build with other settings go; a new folder spares processes that have old ones mapped.
        shutil.rmtree(self.folder, ignore_errors=True)
        for component in ["runtime", "testing"] if self.inplace else ["runtime"]:
            run(cmake, "--install", build, "--component", component, "--prefix", self.folder)

    @property
    def folder(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib).absolute()) / "fusedrnn" / "lib"

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [str(file) for file in self.folder.glob("*")]


class Wheel(bdist_wheel):
    """No library has a Python symbol: one wheel serves every CPython."""

    def run(self) -> None:
        # build/lib is not cleaned by setuptools: what an earlier build left there would travel.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Distribution(setuptools.Distribution):
    def has_ext_modules(self) -> bool:
        return True


setuptools.setup(
    distclass=Distribution,
    cmdclass={"bdist_wheel": Wheel, "build_ext": CMakeBuild, "dist_info": CheckedDistInfo},
)
