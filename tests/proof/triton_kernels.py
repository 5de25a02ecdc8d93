"""Compiles every Triton kernel for every architecture, by the oldest supported Triton and the newest."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

from tests import triton_proof

from .compilation import ROOT, CompilationError

OLDEST = "3.6.0"  # that fusedrnn.libraries takes
FOLDER = ROOT / "build"
Row = triton_proof.Row


class Version(NamedTuple):
    """A Triton: where it is, or None if it is the one of this Python; ``why`` it is not there, if so."""

    name: str
    folder: Path | None = None
    why: str = ""


class Part(NamedTuple):
    """What one process compiles."""

    version: Version
    architecture: int
    cell: str
    brief: bool

    def __str__(self) -> str:
        return f"triton {self.version.name}, sm_{self.architecture}, {self.cell}"


def _pip(*arguments: str) -> str:
    """Runs pip's install.

    Raises:
        subprocess.CalledProcessError: it failed; its last line says why.
    """
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", "install"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


@cache
def newest() -> str:
    """The name of the newest Triton that pip finds for this Python.

    Raises:
        subprocess.CalledProcessError: it finds none.
    """
    report = json.loads(_pip("--dry-run", "--ignore-installed", "--no-deps", "--report", "-", "triton"))
    return report["install"][0]["metadata"]["version"]


def version(name: str) -> Version:
    """A Triton of that name, installed in a folder of its own if it is not the one of this Python."""
    if name == importlib.metadata.version("triton"):
        return Version(name)
    folder = FOLDER / f"triton-{name}"
    if not (folder / f"triton-{name}.dist-info").exists():
        try:
            _pip("--target", str(folder), "--no-deps", f"triton=={name}")
        except subprocess.CalledProcessError as error:
            return Version(name, why=_last_line(error))
    return Version(name, folder)


def versions() -> list[Version]:
    """The oldest and the newest; what cannot be had says why, and the one of this Python takes its place."""
    try:
        latest = version(newest())
    except subprocess.CalledProcessError as error:
        installed = Version(importlib.metadata.version("triton"))
        return [version(OLDEST), Version("newest", why=_last_line(error)), installed]
    return [version(OLDEST), latest, *[version(importlib.metadata.version("triton"))] * bool(latest.why)]


def _last_line(error: subprocess.CalledProcessError) -> str:
    return (error.stderr.strip() or f"pip ended with {error.returncode}").splitlines()[-1]


def parts(found: list[Version]) -> list[Part]:
    """Every plan by the last of the versions, one plan of each kind by the others."""
    there = [v for v in found if not v.why]
    return [
        Part(v, architecture, cell, v != there[-1])
        for v, architecture, cell in product(there, triton_proof.ARCHITECTURES, triton_proof.CELLS)
    ]


def rows(part: Part) -> list[Row]:
    """What the part's kernels need.

    Raises:
        CompilationError: one does not compile.
    """
    options = ["--architectures", str(part.architecture), "--cells", part.cell]
    try:
        return triton_proof.rows(*options, *["--brief"] * part.brief, version=part.version.folder)
    except subprocess.CalledProcessError as error:
        raise CompilationError(f"{part}: {error}") from error


def faults(row: Row) -> str:
    """What of a kernel is not as it must be; empty if nothing is."""
    wrong = []
    if row["stack"]:
        wrong.append(f"{row['stack']} bytes of stack")
    if row["shared"] > triton_proof.ARCHITECTURES[row["architecture"]]:
        wrong.append(f"{row['shared']} bytes of shared memory")
    # Programs that wait for one another do so by one release and one acquire; the others by none.
    waits = row["kernel"].startswith("persistent") and " of 1 " not in row["plan"]
    if bool(row["acquires"]) != waits or bool(row["releases"]) != waits:
        wrong.append(f"{row['acquires']} acquires and {row['releases']} releases")
    if not wrong:
        return ""
    which = f"{row['kernel']} {row['cell']} {row['dtype']} H={row['H']}, {row['plan']}"
    return f"triton {row['triton']}, {which}, sm_{row['architecture']}: {', '.join(wrong)}"
