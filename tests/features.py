"""What the package can do, and where: ``docs/features.md``, made of the marks of the tests.

A test that shows a feature is marked ``@pytest.mark.feature(name, nn=..., backends=[...])``. The mark says on
which backends the test shows it, and the test fails unless they served it (``tests/conftest.py``). ``nn``, in
at least one test of every feature, is what the test shows of ``torch.nn``. ``python -m tests.features``
collects the tests and writes the page; ``--check`` only says whether it is up to date.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "features.md"
# Backends that tests force, and what they are in the table: the emulator runs the kernels of cuda.
COLUMNS = {"cpu": "cpu", "emulator": "cuda", "triton": "triton", "torch": "torch", "reference": "reference"}
# By section, the features, and the line that the page has for each.
FEATURES: dict[str, dict[str, str]] = {
    "Derivatives": {
        "double backward": "gradients of gradients, of any order: gradient penalties",
        "backward in eval mode": "`eval()` changes dropout, not whether there are gradients",
        "vectorized gradients": "`jacobian(vectorize=True)`, `is_grads_batched`",
        "forward mode": "`torch.func.jvp` and everything made of it",
        "vmap over inputs": "`torch.func.vmap`: the examples are sequences of one batch",
        "ensembles": "`stack_module_state` and `vmap(functional_call)`: N recurrences of one launch",
        "per-sample gradients": "`vmap(grad(loss))`, in one launch forward and one backward",
    },
    "Compilers": {
        "torch.compile": "`fullgraph=True`, dynamic shapes, packed input, training; no setting changed",
        "torch.export": "one program for every batch and length, which can be trained",
        "AOTInductor": "`torch._inductor.aoti_compile_and_package`",
        "ONNX": "`torch.onnx.export`: one standard operator a layer, checked in onnxruntime",
    },
    "Precision": {
        "autocast": "bf16 and fp16, with the built-in's dtypes in and out",
        "GradScaler": "fp16 gradients that overflow are inf, and the step is skipped",
        "fp32 precision": "`allow_tf32` and `fp32_precision` decide whether products take tf32 operands",
    },
    "Training": {
        "DDP and FSDP2": "on two ranks, the gradients of one process",
        "activation checkpointing": "`torch.utils.checkpoint`, reentrant or not",
        "gradient accumulation": "several backward passes add up; optimizers step in place",
        "offloaded activations": "saved-tensor hooks, as `torch.autograd.graph.save_on_cpu`",
        "inference mode": "`torch.inference_mode`",
        "hooks": "forward and full backward hooks of modules",
        "pruning": "`torch.nn.utils.prune`",
        "weight drop": "another tensor in the place of a weight, at every call",
        "spectral and weight norm": "`torch.nn.utils.parametrizations`, and `parametrize` for one's own",
    },
    "Models": {
        "convert and revert": "`fusedrnn.convert(model)`: every recurrent module, in place",
        "checkpoints": "a `state_dict` of either loads into the other, and of its optimizer",
        "copies": "`copy.deepcopy`, `pickle`, `torch.save`",
        "shared memory": "`share_memory()`: one module for several processes",
        "meta device": '`torch.device("meta")` and `to_empty`',
        "dynamic quantization": "`torch.ao.quantization.quantize_dynamic`, after `fusedrnn.revert`",
    },
    "Sequences": {
        "lengths": "`lengths=`: sequences of different lengths without packing",
        "reset": "`reset=`: the state set before any step of any sequence",
        "all states": "`return_all_states=True`: h and c of every step, with gradients",
    },
    "Options": {
        "peephole": "`LSTM(peephole=True)`: gates that see the cell state",
        "reset_after": "`GRU(reset_after=False)`: the original paper's",
        "recurrent_dropout": "`recurrent_dropout=p`: variational, one mask of h for a sequence",
        "zoneout": "`zoneout=p`: units that keep their state",
        "layer_norm": "`layer_norm=True`: of gates and cell",
        "forget_bias": "`LSTM(forget_bias=b)`",
        "num_heads": "`num_heads=n`: a block-diagonal W_hh, n recurrences in one launch",
        "residual": "`residual=True`: connections between layers",
        "variational_dropout": "`variational_dropout=True`: one mask for all steps between layers",
        "learn_initial_state": "`learn_initial_state=True`",
    },
}
_HEAD = """\
# Features

Made by `python -m tests.features` from the marks of the tests, which fail unless what they say is so.

**torch.nn**: whether `torch.nn` has it, as a test shows by its values or by its error. The other columns are
the backends of fusedrnn: ● a test shows it there; empty: no test does. `cuda` is shown in the emulator and
`triton` in its interpreter, both on a CPU ([neither has been run on a GPU](proof.md)); `torch` is the
built-in as a backend, `reference` what serves a call that the kernels cannot.
"""


def declared(item: pytest.Item) -> list[tuple[str, str | None, tuple[str, ...]]]:
    """The marks of a test: feature, what it shows of torch.nn, and the backends it shows it on."""
    result = []
    for mark in item.iter_markers("feature"):
        unknown = mark.kwargs.keys() - {"nn", "backends"}
        if len(mark.args) != 1 or unknown:
            raise pytest.UsageError(f"{item.nodeid}: feature(name, nn=..., backends=[...]), got {mark}")
        name = mark.args[0]
        if not any(name in names for names in FEATURES.values()):
            raise pytest.UsageError(f"{item.nodeid}: tests/features.py has no feature {name!r}")
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        backends = mark.kwargs.get("backends")
        if backends is None:
            backends = [parameters["backend"]] if "backend" in parameters else ["cpu"]
        result.append((name, mark.kwargs.get("nn"), tuple(backends)))
    return result


def page(items: Iterable[pytest.Item]) -> str:
    """The text of ``docs/features.md``.

    Raises:
        pytest.UsageError: a feature that no test shows, or of whose place in torch.nn tests say nothing or
            different things.
    """
    builtin: dict[str, set[str]] = {}
    backends: dict[str, set[str]] = {}
    for item in items:
        for name, nn, served in declared(item):
            builtin.setdefault(name, set()).update([nn] if nn else [])
            backends.setdefault(name, set()).update(served)
    lines = [_HEAD.rstrip()]
    for section, features in FEATURES.items():
        columns = list(COLUMNS.values())
        lines += ["", f"## {section}", "", f"| | | torch.nn | {' | '.join(columns)} |"]
        lines += [f"|---|---|{':-:|' * (1 + len(columns))}"]
        for name, text in features.items():
            if name not in builtin:
                raise pytest.UsageError(f"{name!r}: no test shows it")
            if len(builtin[name]) != 1:
                said = ", ".join(sorted(builtin[name])) or "nothing"
                raise pytest.UsageError(f"{name!r}: tests say of torch.nn {said}")
            cells = ["●" if b in backends[name] else "" for b in COLUMNS]
            lines.append(f"| **{name}** | {text} | {' | '.join([*builtin[name], *cells])} |")
    return "\n".join(lines) + "\n"


class _Collector:
    items: list[pytest.Item]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def main(arguments: list[str]) -> int:
    """Writes the page, or with ``--check`` returns 1 if it is not as it would be written."""
    collector, said = _Collector(), io.StringIO()
    with contextlib.redirect_stdout(said):
        failed = pytest.main(["--collect-only", "-qq", str(Path(__file__).parent)], plugins=[collector])
    if failed:
        print(said.getvalue(), file=sys.stderr)
        return int(failed)
    text = page(collector.items)
    if "--check" not in arguments:
        PAGE.write_text(text)
    return int(PAGE.read_text() != text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
