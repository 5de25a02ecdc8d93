"""``make proof`` itself: that it reads rightly what it judges by."""

from __future__ import annotations

import json
import subprocess
from collections import Counter

import pytest

from .proof import compilation, document, triton_kernels
from .proof.compilation import CompilationError, Resources
from .proof.emulator import Kernel
from .proof.mutation import CUDA, Mutant, ScanError, operations, scan
from .proof.triton_kernels import Version

PERSISTENT = (
    "_ZN8fusedrnn4cuda10persistentINS0_12BackwardPassINS_4LstmENS0_15BFloat16OperandEEE"
    "NS0_12GridExchangeEEEvNT_6ParamsE"
)
HELPER = "_ZN8fusedrnn4cuda20previous_rows_kernelINS_6device4HalfEEEvNS0_18PreviousRowsParamsE"
REPORT = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{PERSISTENT}' for 'sm_90a'
ptxas info    : Function properties for {PERSISTENT}
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 234 registers, used 1 barriers, 8 bytes cumulative stack size, 64 bytes smem
ptxas info    : Compiling entry function '{HELPER}' for 'sm_90a'
ptxas info    : Function properties for {HELPER}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
"""
GRID = Kernel("backward", "grid", "lstm", "bf16")


def test_reads_what_ptxas_says():
    assert compilation.parse(REPORT) == [
        Resources("persistent", GRID, "90a", registers=234, spills=28, stack=8, shared=64),
        Resources("previous_rows_kernel<Half>", None, "90a", registers=30, spills=0, stack=0, shared=0),
    ]


@pytest.mark.parametrize(
    ("report", "why"),
    [
        ("", "names no kernel"),
        (REPORT.replace("Function properties for " + HELPER, "Function properties for _Z3f"), "not inlined"),
        (
            REPORT.replace("Used 30 registers", ""),
            "says nothing of void fusedrnn::cuda::previous_rows_kernel",
        ),
        (REPORT.replace("fusedrnn4cuda", "othername4cuda"), "no kernel of this project"),
    ],
)
def test_refuses_what_it_does_not_understand(report, why):
    with pytest.raises(CompilationError, match=why):
        compilation.parse(report)


@pytest.mark.parametrize(
    ("function", "kernel"),
    [
        (
            "void fusedrnn::cuda::step_forward<fusedrnn::RnnTanh, fusedrnn::device::Half>(int)",
            Kernel("forward", "stepwise", "rnn_tanh", "fp16"),
        ),
        (
            "void fusedrnn::cuda::step_backward<fusedrnn::Gru, double>(int)",
            Kernel("backward", "stepwise", "gru", "fp64"),
        ),
    ],
)
def test_knows_stepwise_kernels(function, kernel):
    assert compilation.identify(function)[1] == kernel


@pytest.fixture
def sources(tmp_path):
    """A copy of the primitives, beside which a test may put kernels."""
    folder = tmp_path / "primitives"
    folder.mkdir()
    for header in (CUDA / "primitives").glob("*.h"):
        (folder / header.name).write_text(header.read_text())
    return tmp_path


def test_finds_every_operation():
    found = operations(CUDA / "primitives")
    assert found >= {"sync_block", "sync_warp", "sync_cluster", "copy_async_wait", "flag_set", "flag_wait"}
    assert found >= {
        "mbarrier_init",
        "fence_mbarrier_init",
        "mbarrier_expect",
        "mbarrier_wait",
        "remote_store",
    }
    assert not found & {"copy_async", "load_fresh", "mma_bf16", "thread_index"}


def test_finds_every_call(sources):
    (sources / "kernel.cuh").write_text(
        '// sync_block();\nf("sync_block()");\n/* \n */ sync_block();\n\nsync_warp ();'
    )
    (sources / "host.cu").write_text("sync_block();")
    assert scan(sources) == {"kernel.cuh:4": "sync_block", "kernel.cuh:6": "sync_warp"}


def test_two_operations_cannot_share_a_line(sources):
    (sources / "kernel.cuh").write_text("\nsync_block(); sync_warp();")
    with pytest.raises(ScanError, match=r"two operations at kernel\.cuh:2"):
        scan(sources)


def test_an_operation_cannot_lack_its_place(sources):
    thread = sources / "primitives" / "thread.h"
    thread.write_text(
        thread.read_text().replace("sync_warp(Site site = Site::current())", "sync_warp(Site site)")
    )
    with pytest.raises(ScanError, match=r"thread.h: sync_warp calls \{'sync_warp'\} without a place"):
        scan(sources)


def test_a_gpu_has_run_what_passed_in_all_cases(tmp_path):
    folder = tmp_path / "h200"
    folder.mkdir()

    def record(schedule, verdict):
        return {"verdict": verdict, "schedule": schedule, "cell": "gru", "precision": "bf16", "seconds": 1.0}

    first = {"stages": [{"records": [record("grid", "passed"), record("block", "passed")]}, 3]}
    second = [record("grid", "passed"), record("cluster", "passed"), record("cluster", "failed")]
    (folder / "2026-01-31.json").write_text(json.dumps(first))
    (folder / "2026-02-01-check.json").write_text(json.dumps(second))
    dates = {("grid", "gru", "bf16"): "2026-02-01", ("block", "gru", "bf16"): "2026-01-31"}
    assert document.gpu_dates(tmp_path) == dates


def test_a_document_says_what_failed():
    caught, survivor = (Mutant(GRID, "exchange.h:9", "sync_block", w, False) for w in (False, True))
    spilling, helper = compilation.parse(REPORT)
    proof = document.Proof(
        "nvcc 1.2.3",
        ["80", "90a"],
        [spilling, helper],
        Counter({GRID: 1234}),
        {"exchange.h:9": "sync_block"},
        {caught: "race", survivor: ""},
        ["not caught: it\nand more"],
    )
    text = document.text(proof, None)
    assert "**Not all of it holds:**\n\n- not caught: it\n" in text
    assert "1,234 seeded schedules" in text
    assert "1 of 2 mutants were caught: 50 %" in text
    assert "| `exchange.h:9` | `sync_block` | 1 of 1: race 1 | 0 of 1 |" in text
    assert "| lstm | bf16 | – / 234 | 28 | 8 |" in text
    assert "| `previous_rows_kernel<Half>` | – / 30 | 0 | 0 | 90a |" in text


ROW = {
    "triton": "3.6.0", "kernel": "persistent_forward", "cell": "gru", "dtype": "tf32", "H": 512,
    "plan": "grid of 16 with 32 units of 16 sequences each, weights from L2", "kind": "grid, from L2",
    "architecture": 80, "registers": 180, "stack": 0, "shared": 53248, "acquires": 1, "releases": 1,
}  # fmt: skip


def test_a_document_of_triton_kernels():
    wider = ROW | {"plan": "grid of 8 with 64 units of 16 sequences each, weights from L2", "registers": 200}
    proof = document.TritonProof(
        [Version("3.6.0"), Version("newest", why="no such index")],
        [ROW, wider, ROW | {"architecture": 100, "stack": 8, "shared": 1}],
        ["it spills"],
    )
    text = document.text(None, proof)
    assert "by Triton 3.6.0, for sm_80, sm_90, sm_100" in text
    assert "Of 3 kernels 1 have a\n  stack" in text
    assert "**Not all of it holds:**\n\n- it spills\n" in text
    assert "Triton newest could not be had: no such index." in text
    assert "| `persistent_forward` | gru | tf32 | 200 / – / 180 | 8 | 52 KiB | 2 | not yet |" in text


def test_each_part_of_the_document_replaces_itself():
    cuda = document.Proof("nvcc 1.2.3", ["80"])
    triton = document.TritonProof([Version("3.6.0")], [ROW])
    both = document.text(cuda, triton)
    assert both.count("All of it holds.") == 2
    for one, other in ((cuda, None), (None, triton)):
        assert document.text(one, other, both) == both
    newer = document.text(document.Proof("nvcc 1.2.4", ["80"]), None, both)
    assert newer == both.replace("1.2.3", "1.2.4")
    newer = document.text(None, document.TritonProof([], [ROW | {"registers": 7}]), both)
    assert newer == both.replace("180 / –", "7 / –")
    alone = document.text(cuda, None)
    assert document.text(None, triton, alone) == both


def test_versions_of_triton(monkeypatch, tmp_path):
    """What is installed here serves as it is; others are installed once, in folders; what fails is said."""
    asked = []

    def pip(*arguments):
        asked.append(arguments)
        if "--dry-run" in arguments:
            return json.dumps({"install": [{"metadata": {"version": "9.9.9"}}]})
        if "triton==9.9.9" in arguments:
            raise subprocess.CalledProcessError(1, "pip", stderr="WARNING: slow\nERROR: no network\n")
        (tmp_path / "triton-3.6.0" / "triton-3.6.0.dist-info").mkdir(parents=True)
        return ""

    monkeypatch.setattr(triton_kernels, "_pip", pip)
    monkeypatch.setattr(triton_kernels, "FOLDER", tmp_path)
    triton_kernels.newest.cache_clear()
    monkeypatch.setattr("importlib.metadata.version", lambda _: "3.7.1")
    for _ in range(2):
        oldest, newest, installed = triton_kernels.versions()
        assert oldest == Version("3.6.0", tmp_path / "triton-3.6.0")
        assert newest == Version("9.9.9", why="ERROR: no network")
    assert sum("triton==3.6.0" in arguments for arguments in asked) == 1
    assert installed == Version("3.7.1")
    parts = triton_kernels.parts([oldest, newest, installed])
    assert {(part.version.name, part.brief) for part in parts} == {("3.6.0", True), ("3.7.1", False)}
    triton_kernels.newest.cache_clear()

    def offline(*_):
        raise subprocess.CalledProcessError(1, "pip", stderr="")

    monkeypatch.setattr(triton_kernels, "_pip", offline)
    oldest, newest, installed = triton_kernels.versions()
    assert (newest.name, newest.why) == ("newest", "pip ended with 1")
    assert installed == Version("3.7.1")
    triton_kernels.newest.cache_clear()
