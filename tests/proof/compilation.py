"""Compiles every CUDA kernel with nvcc, for every architecture, and reads what ptxas says of each."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fusedrnn.cells import CELLS

from .emulator import Kernel

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "proof"
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-Xptxas", "-v", "-cubin")
# As C++ spells them.
CELL_TYPES = {name.title().replace("_", ""): name for name in CELLS}
OPERANDS = {"BFloat16": "bf16", "Half": "fp16", "Tf32": "tf32", "Float": "fp32"}
NUMBERS = {"BFloat16": "bf16", "Half": "fp16", "float": "fp32", "double": "fp64"}


class CompilationError(Exception):
    """There is no nvcc, a kernel does not compile, or what ptxas says is not understood."""


def compiler() -> str:
    """The nvcc that a build would take.

    Raises:
        CompilationError: there is none.
    """
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [os.path.join(home, "bin") for home in (*homes, "/usr/local/cuda") if home]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *folders])
    if found := shutil.which(os.environ.get("CUDACXX") or "nvcc", path=path):
        return found
    raise CompilationError("nvcc is needed: not found on PATH, in CUDA_HOME or by CUDACXX")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def compiler_version() -> str:
    """For example ``nvcc 13.0.88 with g++ 12.2.0``."""
    nvcc = re.search(r"V(\d[\d.]*)", _output(compiler(), "--version"))
    host = _output("g++", "-dumpfullversion").strip()
    return f"nvcc {nvcc[1] if nvcc else 'of unknown version'} with g++ {host}"


@cache
def architectures() -> tuple[str, ...]:
    """Those of the build that the toolkit knows: ``("80", "90a", "100a")``."""
    wanted = re.search(r"set\(cuda_architectures ([^)#]+)\)", (ROOT / "CMakeLists.txt").read_text())
    if not wanted:
        raise CompilationError("CMakeLists.txt sets no cuda_architectures")
    known = _output(compiler(), "--list-gpu-arch").split()
    return tuple(a for a in wanted[1].split() if f"compute_{a.rstrip('af')}" in known)


class Unit(NamedTuple):
    """One run of the compiler; ``cell`` and ``operand`` are empty for the stepwise kernels."""

    cell: str
    operand: str
    architecture: str

    def __str__(self) -> str:
        return f"{self.cell}{self.operand or 'stepwise'} sm_{self.architecture}"


def units(architecture: str) -> list[Unit]:
    pairs = [Unit(cell, operand, architecture) for cell in CELL_TYPES for operand in OPERANDS]
    return [*pairs, Unit("", "", architecture)]


@dataclass(frozen=True)
class Resources:
    """What a kernel needs on an architecture: per thread; ``shared``, bytes per block, is the static part.

    ``kernel`` is None for one that belongs to no cell; ``name`` is the function's.
    """

    name: str
    kernel: Kernel | None
    architecture: str
    registers: int
    spills: int
    stack: int
    shared: int


@cache
def _sources_digest() -> str:
    """Of all that a kernel is made of, and of how it is compiled."""
    digest = hashlib.sha256(repr((compiler_version(), FLAGS)).encode())
    csrc = ROOT / "csrc"
    for file in sorted(f for folder in ("cuda", "cells", ".") for f in (csrc / folder).glob("*")):
        if file.suffix in (".h", ".cuh", ".cu"):
            digest.update(file.read_bytes())
    for file in sorted((csrc / "cuda" / "primitives").glob("*.h")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def resources(unit: Unit) -> list[Resources]:
    """Those of a unit's kernels. What ptxas said is kept, and good until a source changes.

    Raises:
        CompilationError: the unit does not compile.
    """
    kept = CACHE / f"{unit}.txt".replace(" ", "-")
    head = f"{_sources_digest()}\n"
    if kept.exists() and (text := kept.read_text()).startswith(head):
        return parse(text)
    number = f"arch=compute_{unit.architecture},code=sm_{unit.architecture}"
    source, defines = "run.cu", []
    if unit.cell:
        source = "instantiate.cu"
        defines = [f"-DFUSEDRNN_CELL={unit.cell}", f"-DFUSEDRNN_OPERAND={unit.operand}Operand"]
    CACHE.mkdir(parents=True, exist_ok=True)
    command = [compiler(), *FLAGS, "-gencode", number, *defines, str(ROOT / "csrc" / "cuda" / source)]
    command += ["-o", str(kept.with_suffix(".cubin"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompilationError(f"{unit}: {' '.join(command)}\n{done.stderr}")
    found = parse(done.stderr)
    kept.write_text(head + done.stderr)
    return found


def parse(report: str) -> list[Resources]:
    """Reads what ``ptxas -v`` says: of each kernel, and of any function that was not inlined into one."""
    names = re.findall(r"Function properties for (\S+)", report)
    entries = dict(re.findall(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", report))
    if apart := set(names) - set(entries):
        raise CompilationError(f"not inlined into a kernel: {', '.join(sorted(apart))}")
    if not entries:
        raise CompilationError(f"ptxas names no kernel: {report}")
    plain = subprocess.run(["c++filt"], input="\n".join(entries), capture_output=True, text=True, check=True)
    found = []
    for (mangled, architecture), name in zip(entries.items(), plain.stdout.splitlines(), strict=True):
        about = report[report.index(f"Function properties for {mangled}\n") :]
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", about
        )
        used = re.search(r"Used (\d+) registers.*", about)
        if not frame or not used:
            raise CompilationError(f"ptxas says nothing of {name}")
        shared = re.search(r"(\d+) bytes smem", used[0])
        found.append(
            Resources(
                *identify(name),
                architecture,
                registers=int(used[1]),
                spills=int(frame[2]) + int(frame[3]),
                stack=int(frame[1]),
                shared=int(shared[1]) if shared else 0,
            )
        )
    return found


def identify(function: str) -> tuple[str, Kernel | None]:
    """The name of a kernel, and which instantiation it is, from its demangled signature."""
    name = re.search(r"fusedrnn::cuda::(?:\(anonymous namespace\)::)?(\w+)(?:<(.*)>)?\(", function)
    if not name:
        raise CompilationError(f"no kernel of this project: {function}")
    persistent = re.search(
        r"cuda::(Forward|Backward)Pass<fusedrnn::(\w+), fusedrnn::cuda::(\w+)Operand>.*cuda::(\w+)Exchange",
        name[2] or "",
    )
    if name[1] == "persistent" and persistent:
        pass_, cell, operand, exchange = persistent.groups()
        return name[1], Kernel(pass_.lower(), exchange.lower(), CELL_TYPES[cell], OPERANDS[operand])
    step = re.fullmatch(r"fusedrnn::(\w+), (?:fusedrnn::device::)?(\w+)", name[2] or "")
    if name[1].startswith("step_") and step:
        pass_ = name[1].removeprefix("step_")
        return name[1], Kernel(pass_, "stepwise", CELL_TYPES[step[1]], NUMBERS[step[2]])
    arguments = f"<{name[2].replace('fusedrnn::device::', '')}>" if name[2] else ""
    return name[1] + arguments, None
