"""The command line: what it says, its exit status, and that a broken installation is explained."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fusedrnn
from fusedrnn import accuracy, diagnosis, env, libraries
from fusedrnn.cli import app

ROOT = Path(__file__).parents[1]


def run(*arguments: str):
    return CliRunner().invoke(app, [*arguments], catch_exceptions=False)


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_info_as_json():
    done = run("info", "--json")
    facts = json.loads(done.stdout)
    assert done.exit_code == 0
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["fusedrnn"] == fusedrnn.__version__
    assert facts["cpu"]["kernels"] in env.CPU_ISAS
    assert facts["backends"].keys() == fusedrnn.backends().keys()
    for name, status in facts["backends"].items():
        assert status["available"] == fusedrnn.backends()[name].available
        assert status["reason"].startswith(fusedrnn.backends()[name].reason)
        assert bool(status["remedy"]) == (not status["available"])


def test_info_as_text(monkeypatch):
    monkeypatch.setenv("FUSEDRNN_BACKEND", "nonesuch")
    monkeypatch.setenv("FUSEDRNN_SCHEDULE", "sideways")
    done = run("info")
    assert done.exit_code == 0
    assert "no such backend; choose from cuda, triton, cpu" in done.stdout
    assert "choose stepwise, block, cluster or grid" in done.stdout
    assert re.search(r"cpu +available", done.stdout)
    assert re.search(r"cuda +not available: .*CUDA", done.stdout)


def test_a_part_that_fails_leaves_its_reason(monkeypatch):
    def fails():
        raise OSError("the disk is gone")

    monkeypatch.setattr(diagnosis, "_libraries", fails)
    assert diagnosis.collect()["libraries"] == {"error": "OSError: the disk is gone"}
    done = run("info")
    assert done.exit_code == 0
    assert "OSError: the disk is gone" in done.stdout


@pytest.mark.parametrize(
    ("reason", "what"),
    [
        ("libfusedrnn_cpu.so could not be loaded: undefined symbol: aoti_torch_x", "another torch"),
        ("libfusedrnn_cpu.so could not be loaded: file too short", "damaged"),
        ("libfusedrnn_cuda.so was not built; reinstall with", "nvcc on PATH"),
        ("libfusedrnn_cpu.so is of another version of this package; build it again", "rebuild"),
        ("The NVIDIA driver on your system is too old (found version 11040)", "update the NVIDIA driver"),
        ("Found no NVIDIA driver on your system", "install the NVIDIA driver"),
        ("No CUDA GPUs are available (CUDA_VISIBLE_DEVICES='7')", "unset it"),
        ("triton could not be imported: No module named 'triton'", "fusedrnn[triton]"),
        ("it needs triton 3.6 or newer, this is 3.4.0", "triton>=3.6"),
    ],
)
def test_every_reason_has_a_remedy(reason, what):
    assert what in diagnosis.remedy(reason)


def test_a_driver_that_is_too_old_is_named(monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    gpus = diagnosis.collect()["gpus"]
    assert "too old" in gpus["error"]
    assert "update the NVIDIA driver" in gpus["remedy"]


@pytest.mark.parametrize(
    ("capability", "serving"),
    [((8, 6), "sm_80"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((12, 0), "none"), ((7, 5), "none")],
)
def test_which_architecture_serves_a_device(monkeypatch, capability, serving):
    monkeypatch.setattr(diagnosis, "_built_for", lambda: ["80", "90a", "100a"])
    assert diagnosis._serving(*capability).startswith(serving)


@pytest.fixture
def broken(tmp_path) -> Path:
    """A copy of the package whose libraries a test may damage."""
    ignored = shutil.ignore_patterns("lib", "__pycache__")
    shutil.copytree(ROOT / "fusedrnn", tmp_path / "fusedrnn", ignore=ignored)
    (tmp_path / "fusedrnn" / "lib").mkdir()
    return tmp_path


def info_of(folder: Path, **env: str) -> dict:
    """``python -m fusedrnn info --json`` with the package in ``folder``, which must not fail."""
    command = [sys.executable, "-m", "fusedrnn", "info", "--json"]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"TRITON_INTERPRET": "0"} | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


def test_a_missing_library_is_explained(broken):
    status = info_of(broken)["backends"]["cpu"]
    assert not status["available"]
    assert "was not built" in status["reason"]
    assert "pip install --no-build-isolation" in status["remedy"]


def test_a_damaged_library_and_a_damaged_triton_are_explained(broken):
    (broken / "fusedrnn" / "lib" / libraries.CPU).write_bytes(b"\x7fELF, and no more")
    (broken / "triton.py").write_text("raise OSError('a file of it is gone')")
    facts = info_of(broken, TRITON_INTERPRET="1", FUSEDRNN_CPU_ISA="mmx")
    assert "could not be loaded" in facts["backends"]["cpu"]["reason"]
    assert "damaged" in facts["backends"]["cpu"]["remedy"]
    assert "a file of it is gone" in facts["backends"]["triton"]["reason"]
    assert facts["cpu"]["kernels"].startswith("none: ")
    assert facts["environment"]["FUSEDRNN_CPU_ISA"]["fault"]


def test_a_library_of_another_version_is_set_aside(broken):
    """Of the ops, one has lost an argument: what an old build in a newer tree looks like."""
    shutil.copy(ROOT / "fusedrnn" / "lib" / libraries.CPU, broken / "fusedrnn" / "lib")
    ops = broken / "fusedrnn" / "ops.py"
    text = ops.read_text()
    assert text.count("    tf32: bool,\n    y: Tensor,") == 1
    ops.write_text(
        text.replace("    tf32: bool,\n    y: Tensor,", "    tf32: bool,\n    more: int,\n    y: Tensor,")
    )
    status = info_of(broken)["backends"]["cpu"]
    assert "is of another version of this package" in status["reason"]
    assert "rebuild" in status["remedy"]


def test_the_command_says_what_it_needs(tmp_path):
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('no typer', name='typer')")
    done = python("-m", "fusedrnn", "info", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith("needs typer; type: pip install 'fusedrnn[cli]'"), (
        done.stderr
    )


def test_verify_in_a_process_of_its_own():
    done = python("-m", "fusedrnn", "verify", "--hidden", "9", "--batch", "2", "--steps", "5", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"] == "right"
    assert {f["what"] for f in report["findings"]} == {"values", "gradients", "steps", "repeats", "modes"}


@pytest.mark.parametrize("form", [(), ("--bidirectional",), ("--packed",), ("--packed", "--bidirectional")])
def test_verify_is_right_for_every_cell_and_dtype(form):
    sizes = ("--hidden", "33", "--batch", "5", "--steps", "9", "--inputs", "7", "--layers", "2")
    done = run("verify", "--cell", "lstm,gru,rnn,rnn_relu", "--dtype", "fp32,bf16", *sizes, *form)
    assert done.exit_code == 0, done.stdout
    assert "8 cases, 0 wrong, 0 not checked" in done.stdout


def test_verify_with_a_projection_and_a_backend():
    done = run("verify", "--projection", "5", "--hidden", "12", "--steps", "6", "--backend", "reference")
    assert done.exit_code == 0, done.stdout


def test_what_cannot_be_checked_is_not_right():
    done = run("verify", "--backend", "cuda", "--hidden", "8", "--steps", "3")
    assert done.exit_code == 2
    assert "not checked: LSTM T3 B8 I8 H8 fp32: backend 'cuda' is not available" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cell", "elman"), "no cell 'elman'"),
        (("--dtype", "int8"), "no dtype 'int8'"),
        (("--dtype", "tf32", "--device", "cpu"), "tf32 is a GPU's"),
        (("--hidden", "many"), "whole numbers"),
        (("--batch", "0"), "must be positive"),
    ],
)
def test_verify_refuses_what_it_does_not_know(arguments, message):
    done = run("verify", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_verify_sees_a_wrong_result(monkeypatch):
    """Each question on its own: errors that the others could not see."""
    right = fusedrnn.functional.sequence
    for off in (1e-3, float("nan")):

        def wrong(cell, x, *args, off=off, **options):
            y, final = right(cell, x, *args, **options)
            return y * (1 + off), final

        monkeypatch.setattr(fusedrnn.functional, "sequence", wrong)
        done = run("verify", "--hidden", "8", "--steps", "4", "--json")
        findings = {f["what"]: f["fault"] for f in json.loads(done.stdout)["findings"]}
        assert done.exit_code == 1
        assert "is off by" in findings["steps"]


def test_verify_sees_a_run_that_does_not_repeat(monkeypatch):
    from fusedrnn import verification

    count = iter(range(100))
    right = verification.call

    def unsteady(layer, inputs, mode):
        results = right(layer, inputs, mode)
        if isinstance(layer, fusedrnn.LSTM):
            results["y"] = results["y"] + 1e-9 * next(count)
        return results

    monkeypatch.setattr(verification, "call", unsteady)
    done = run("verify", "--hidden", "8", "--steps", "4")
    assert done.exit_code == 1
    assert "repeats: y differ" in done.stdout


def test_a_kink_is_no_fault_and_no_excuse():
    bf16, fp32 = accuracy.PRECISIONS["bf16"], accuracy.PRECISIONS["fp32"]
    assert accuracy.across_a_kink(fp32, 1000) == fp32
    allowed = accuracy.across_a_kink(bf16, 1000)
    assert bf16.cap * bf16.unit < allowed.cap * allowed.unit < 0.5
