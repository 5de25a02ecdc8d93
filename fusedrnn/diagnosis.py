"""What is installed, what of it works here, and what to do about what does not.

Every part is asked for by itself: one that fails leaves its reason in the place of its answer.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import backend, env, libraries
from .cells import CELLS

_REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps fusedrnn"
# What a reason says, and what to do about it; the first that fits.
_REMEDIES = (
    (r"FUSEDRNN_EMULATOR", "nothing: it is there for tests"),
    (r"of another version of this package", f"rebuild: {_REINSTALL}"),
    (r"cuda.so was not built", f"install again, with nvcc on PATH: {_REINSTALL}"),
    (r"was not built", f"install again: {_REINSTALL}"),
    (
        r"undefined symbol|symbol lookup|version `",
        f"it was built against another torch; rebuild: {_REINSTALL}",
    ),
    (r"could not be loaded", f"the file is damaged or of another machine; rebuild: {_REINSTALL}"),
    (r"driver on your system is too old", "update the NVIDIA driver, or install a torch of an older CUDA"),
    (r"CUDA_VISIBLE_DEVICES", f"unset it, or let it name a device that is there: {'nvidia-smi -L'}"),
    (r"[Nn]o NVIDIA driver", "install the NVIDIA driver; in a container, start it with access to the GPU"),
    (r"built without CUDA", "on a machine with an NVIDIA GPU, install torch's build for CUDA; else nothing"),
    (r"finds no CUDA device", "nothing, unless the machine has an NVIDIA GPU: then see what nvidia-smi says"),
    (r"triton could not be imported", "pip install 'fusedrnn[triton]'"),
    (r"needs triton", "pip install --upgrade 'triton>=3.6', as your torch allows"),
    (r"numpy older than", "pip install --upgrade triton, as your torch allows"),
    (r"was changed after", "set it before Python starts"),
)
# What each variable does, in a line.
VARIABLES = {
    env.BACKEND: "forces a backend for every call",
    env.SCHEDULE: "forces how the GPU kernels run a sequence",
    env.CPU_ISA: "forces the CPU kernels' instruction set",
    env.INTERPRET: "runs Triton's kernels in its interpreter, on the CPU",
    "CUDA_VISIBLE_DEVICES": "chooses the GPUs that CUDA sees",
    "OMP_NUM_THREADS": "sets torch's CPU threads",
}


def collect() -> dict[str, Any]:
    """Everything: versions, devices, backends, libraries and environment variables, as JSON can hold it."""
    parts: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "cpu": _cpu,
        "gpus": _gpus,
        "backends": _backends,
        "libraries": _libraries,
        "environment": _environment,
    }
    return {name: _attempt(part) for name, part in parts.items()}


def remedy(reason: str) -> str:
    """What to do about a backend's reason; empty where there is nothing to say."""
    return next((what for pattern, what in _REMEDIES if re.search(pattern, reason)), "")


def _attempt(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except Exception as error:  # of whatever kind: it is what the user needs to read
        return {"error": f"{type(error).__name__}: {error}"}


def _versions() -> dict[str, str | None]:
    def installed(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    from . import __version__

    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {
        "fusedrnn": __version__,
        "torch": str(torch.__version__),
        "cuda (of torch)": torch.version.cuda,
        "cudnn": str(cudnn) if cudnn else None,
        "triton": installed("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _cpu() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "model": models[0] if models else platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "kernels": _attempt(_cpu_kernels),
    }


def _cpu_kernels() -> str:
    """The instruction set of the CPU kernels that run here."""
    if reason := libraries.cpu_reason():
        return f"none: {reason}"
    from . import ops

    def zeros(*size: int) -> list[torch.Tensor]:
        return [torch.zeros(size)]

    try:
        call: Any = (zeros(1, 1, 1)[0], zeros(1, 1, 1), zeros(1, 1), zeros(1, 1), [], [], [], [False], None)
        *_, isa = ops.plan("cpu", CELLS["rnn_tanh"], *call, backward=False)
    except RuntimeError as error:
        return f"none: {error}"
    return env.CPU_ISAS[isa]


def _gpus() -> Any:
    if torch.version.cuda is None:
        return []
    if not torch.cuda.is_available():
        reason = _why_no_cuda()
        return {"error": reason, "remedy": remedy(reason)}
    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": p.name,
                "capability": f"{p.major}.{p.minor}",
                "multiprocessors": p.multi_processor_count,
                "memory": p.total_memory,
                "kernels": _serving(p.major, p.minor),
            }
        )
    return found


def _why_no_cuda() -> str:
    """Why torch finds no device, in the words of the driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())
        else:
            reason = "torch finds no CUDA device"
    if visible is not None and "driver" not in reason:
        reason += f" (CUDA_VISIBLE_DEVICES={visible!r})"
    return reason


def _serving(major: int, minor: int) -> str:
    """Which of the library's architectures such a GPU runs."""
    built = _built_for()
    for name in built:
        of_major, of_minor = int(name.rstrip("a")[:-1]), int(name.rstrip("a")[-1])
        if of_major == major and (of_minor == minor if name.endswith("a") else of_minor <= minor):
            return f"sm_{name}"
    return f"none of the library's ({' '.join(built) or 'it has none'}) runs on this device"


def _built_for() -> list[str]:
    """The architectures in the CUDA library; empty where there is no such library, or it is damaged."""
    path = libraries.FOLDER / libraries.CUDA
    if not path.exists():
        return []
    try:  # lazily: of a torch without CUDA, not every symbol is there
        built_for = ctypes.CDLL(str(path), mode=os.RTLD_LAZY).fusedrnn_cuda_built_for
    except (OSError, AttributeError):
        return []
    built_for.restype = ctypes.c_char_p
    return [str(name) for name in built_for().decode().split()]


def _backends() -> dict[str, dict[str, Any]]:
    found = {}
    for name, status in backend.backends().items():
        reason = status.reason
        if name in ("cuda", "triton") and "finds no CUDA device" in reason and torch.version.cuda:
            reason = f"{reason}: {_why_no_cuda()}"
        found[name] = {"available": status.available, "reason": reason, "remedy": remedy(reason)}
    return found


def _libraries() -> dict[str, dict[str, Any]]:
    found = {}
    for name in (libraries.CPU, libraries.CUDA):
        path = libraries.FOLDER / name
        size = path.stat().st_size if path.exists() else None
        built_for = _built_for() if name == libraries.CUDA else []
        found[name] = {"path": str(path), "bytes": size, "built_for": built_for}
    return found


def _environment() -> dict[str, dict[str, str]]:
    found = {}
    for name, effect in VARIABLES.items():
        if name in os.environ:
            found[name] = {"value": os.environ[name], "effect": effect, "fault": _fault(name)}
    return found


def _fault(name: str) -> str:
    """What is wrong with a variable's value; empty if nothing is."""
    value = os.environ[name]
    if not value:
        return ""
    if name == env.BACKEND:
        reasons = backend.reasons()
        if value not in reasons:
            return f"no such backend; choose from {', '.join(reasons)}"
        return f"that backend cannot be used: {reasons[value]}" if reasons[value] else ""
    if name == env.CPU_ISA:
        kernels = _cpu_kernels()
        return kernels.removeprefix("none: ") if kernels.startswith("none: ") else ""
    if name == env.SCHEDULE and not re.fullmatch(
        r"stepwise|block|cluster|grid|grid:\d+|(block|cluster|grid):\d+,\d+,\d+,\d+", value
    ):
        return "choose stepwise, block, cluster or grid, or a plan as in cluster:8,2,4,1"
    return ""
