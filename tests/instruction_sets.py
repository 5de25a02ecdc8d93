"""The instruction sets of the CPU kernels: which this processor has, and one that it may be made to have."""

from __future__ import annotations

import ctypes

from fusedrnn import env, libraries
from fusedrnn.lib import _testing

FLAGS = dict(zip(env.CPU_ISAS, ("sse2", "avx2", "avx512vl", "avx512_bf16"), strict=True))


def supported() -> list[str]:
    with open("/proc/cpuinfo") as file:
        flags = next(line for line in file if line.startswith("flags")).split()
    return [isa for isa, flag in FLAGS.items() if flag in flags]


def executable() -> list[str]:
    """Those that run here if a process calls :func:`emulate_bf16_dot` where AVX512-BF16 is missing."""
    return [*env.CPU_ISAS] if "avx512" in supported() else supported()


def emulate_bf16_dot() -> None:
    """The kernels of AVX512-BF16 run in this process, which has called none yet; by emulation if need be."""
    if "avx512bf16" in supported():
        return
    _testing.emulate_bf16_dot()
    for library in (str(libraries.FOLDER / libraries.CPU), _testing.__file__):  # each has the kernels
        ctypes.CDLL(library).fusedrnn_cpu_bf16_dot_is_emulated()
