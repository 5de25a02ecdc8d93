"""Compiles the Triton kernels ahead of time, for GPUs that are not there: ``python -m tests.triton_proof``.

What is compiled is what a launch would compile: the ops run on CPU tensors by every plan for the GPU, up to
each launch, whose arguments are specialised as Triton does. Registers, stack (where spills go) and shared
memory are read from the binaries. The version of Triton is that of the first on ``PYTHONPATH``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

ARCHITECTURES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # and the shared memory of a program there
MULTIPROCESSORS = 108  # of the smallest of them that is sold whole
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
DTYPES = ("bf16", "fp16", "tf32", "fp32")
# Of H, and whether every plan is compiled or one of each kind. Weights on chip in several programs, in one,
# and read from L2; what is not a multiple of 16 is loaded element by element.
SIZES = {512: False, 256: True, 128: False, 64: False, 1040: True, 1041: True, 509: False}
ODD = ("bf16", "tf32")  # what such sizes are compiled for
ONE_OF_A_KIND = ("fp16",)  # it differs from bf16 by a word in an instruction
Row = dict[str, Any]
KERNELS = ("persistent_forward", "persistent_backward", "step_forward", "step_backward", "previous_rows")


def rows(*options: str, version: Path | None = None) -> list[Row]:
    """One row for each kernel, plan and architecture.

    Keys: triton, kernel (``persistent_inference`` is the forward that keeps nothing), cell, dtype, H, plan,
    kind (of exchange, and where weights are), architecture, registers, stack, shared; acquires and releases:
    how many of them order what programs hand over.

    Args:
        options: those of the command.
        version: a folder that another Triton is installed in.

    Raises:
        subprocess.CalledProcessError: a kernel did not compile; what was printed says why.
    """
    # In a process of its own: Triton's interpreter, once chosen, takes the place of the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns that the default will change
    if version is not None:
        environment["PYTHONPATH"] = str(version)
    command = [sys.executable, "-m", "tests.triton_proof", *options]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def compiled(
    architectures: Sequence[int], cells: Sequence[str], dtypes: Sequence[str], sizes: dict[int, bool]
) -> Iterator[Row]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fusedrnn.cells import CELLS as REGISTERED

    seen = set()
    for architecture, cell, dtype in product(architectures, cells, dtypes):
        for H, plan, kernel, arguments in launches(architecture, cell, dtype, sizes):
            signature, constants, attributes, options = specialised(kernel, arguments)
            name = kernel.fn.__name__
            key = (architecture, name, *map(repr, (signature, constants, attributes, options)))
            if key in seen:
                continue
            seen.add(key)
            source = ASTSource(kernel, signature, constants, attributes)
            target = GPUTarget("cuda", architecture, 32)
            bounds = plan.bounds if plan else (0,)
            found = []
            for bound in bounds:  # as calls do, one after the other
                binary = triton.compile(source, target=target, options={**options, "maxnreg": bound or None})
                found.append((resources(binary.asm["cubin"]), binary))
                if not found[-1][0]["stack"]:
                    break
            used, binary = min(found, key=lambda each: each[0]["stack"])
            # Cells of one state keep nothing: theirs is one kernel.
            inference = name.endswith("_forward") and not constants["KEEP"] and REGISTERED[cell].states > 1
            yield {
                "triton": triton.__version__,
                "kernel": name.replace("forward", "inference") if inference else name,
                "cell": cell,
                "dtype": dtype,
                "H": H,
                "plan": str(plan or "stepwise"),
                "kind": kind_of(plan),
                "architecture": architecture,
                **used,
                "shared": binary.metadata.shared,
                "acquires": binary.asm["ptx"].count(".gpu.acquire"),
                "releases": binary.asm["ptx"].count(".gpu.release"),
            }


def kind_of(plan: Any) -> str:
    if plan is None:
        return "stepwise"
    return plan.exchange if plan.exchange == "block" else f"grid, {'on chip' if plan.chunks else 'from L2'}"


def launches(
    architecture: int, cell: str, dtype: str, sizes: dict[int, bool]
) -> Iterator[tuple[int, Any, Any, dict[str, Any]]]:
    """Size, plan, kernel and arguments of every launch of inference and of a training step."""
    import torch

    from fusedrnn.cells import CELLS
    from fusedrnn.triton import call, launch, ops, schedule
    from fusedrnn.triton.plan import Device, persistent_plans

    from .problems import Shape, make_problem

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
    device = Device(MULTIPROCESSORS, ARCHITECTURES[architecture])
    launched: list[tuple[Any, dict[str, Any]]] = []
    plans: list[Any] = []
    met = set()

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            def record(*args: Any, **kwargs: Any) -> None:
                named = dict(zip(self.kernel.arg_names, args, strict=False))
                launched.append((self.kernel, named | kwargs))

            return record

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(call, "interpreted", return_value=True))
        stack.enter_context(mock.patch.object(schedule, "_candidates", return_value=plans))
        for name in KERNELS:
            stack.enter_context(mock.patch.object(launch, name, Recorder(getattr(launch, name))))
        for H, every in sizes.items():
            odd = H % 16 > 0
            if odd and dtype not in ODD:
                continue
            problem = make_problem(cell, Shape(2, 16, 16, H), dtype=dtypes[dtype])
            weights = map(list, problem.weights)
            layer = (CELLS[cell].id, problem.x, problem.state, *weights, [False], None, dtype == "tf32")
            plans[:] = [None]
            y, final, saved = ops.sequence_forward(*layer)
            launched.clear()
            for backward in (False, True):
                pass_ = schedule._problem(call.Call.of(*layer), backward)
                for plan in [*persistent_plans(pass_, device), None]:
                    kind = (backward, odd, kind_of(plan))
                    one = (*kind, plan and plan.block_u)
                    if (one if every and dtype not in ONE_OF_A_KIND else kind) in met or (odd and not plan):
                        continue
                    met |= {kind, one}
                    plans[:] = [plan]
                    if backward:
                        ops.sequence_backward(*layer, y, saved, y, final, True, True)
                    else:
                        ops.sequence(*layer)
                        ops.sequence_forward(*layer)
                    for kernel, arguments in launched:
                        persistent = kernel.fn.__name__.startswith("persistent")
                        yield H, plan if persistent else None, kernel, arguments
                    launched.clear()


def specialised(kernel: Any, arguments: dict[str, Any]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Signature, constants, attributes and options of a launch, as Triton derives them from its arguments."""
    import torch

    pointers = {
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.float32: "*fp32",
        torch.float64: "*fp64",
        torch.int32: "*i32",
        torch.int64: "*i64",
    }
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    aligned = [["tt.divisibility", 16]]
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if isinstance(value, tuple):
            signature[name] = tuple(pointers[t.dtype] for t in value)
            attributes |= {(i, j): aligned for j in range(len(value))}
        elif isinstance(value, torch.Tensor):
            signature[name] = pointers[value.dtype]
            attributes[i,] = aligned
        elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            signature[name] = "constexpr"
            constants[name] = value
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[i,] = aligned
    return signature, constants, attributes, {k: v for k, v in arguments.items() if k not in signature}


def resources(cubin: bytes) -> dict[str, int]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]) + int(found["LOCAL"])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", nargs="*", type=int, default=tuple(ARCHITECTURES))
    parser.add_argument("--cells", nargs="*", default=CELLS)
    parser.add_argument("--dtypes", nargs="*", default=DTYPES)
    parser.add_argument("--sizes", nargs="*", type=int, default=tuple(SIZES))
    parser.add_argument("--brief", action="store_true", help="one plan of each kind")
    options = parser.parse_args()
    sizes = {H: SIZES[H] and not options.brief for H in options.sizes}
    for row in compiled(options.architectures, options.cells, options.dtypes, sizes):
        print(json.dumps(row), flush=True)
