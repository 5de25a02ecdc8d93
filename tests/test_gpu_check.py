"""The GPU check, run on a CPU through the emulator: what it would tell of a GPU is right."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import signal
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import fusedrnn
from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import (
    correctness,
    library,
    primitives,
    problems,
    sanitizer,
    speed,
    triton_backend,
    workers,
)
from benchmarks.gpu_check.checks import FAILED, NOT_RUN, PASSED, Check, Context, Settings, run_check
from fusedrnn import accuracy as gates
from fusedrnn import ops
from fusedrnn.bench import timing
from fusedrnn.cells import CELLS
from fusedrnn.lib import _testing
from fusedrnn.trial import Shape

from .test_plan import CLUSTERS, KIB, GpuDevice, persistent_pass

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, "emulator", quick=True, seed=0)
QUICK = ["--device", "cpu", "--backend", "emulator", "--quick"]


def run(tmp_path, *arguments):
    status = command.main([*QUICK, "--out", str(tmp_path), *arguments])
    (path,) = (tmp_path / "emulator").glob("*.json")
    return status, json.loads(path.read_text())


def stages_of(report):
    return {stage["name"]: stage for stage in report["stages"]}


@pytest.fixture
def wrong(monkeypatch):
    """The kernels' y is off by a tenth, when ``schedule`` is forced or, if that is None, always."""
    sequence = ops.sequence

    def install(schedule=None, kernels="emulator"):
        def scaled(backend, *args):
            y, *rest = sequence(backend, *args)
            off = backend == kernels and schedule in (None, os.environ.get("FUSEDRNN_SCHEDULE"))
            return y * 1.1 if off else y, *rest

        monkeypatch.setattr(ops, "sequence", scaled)

    return install


def test_the_command(tmp_path, capsys, monkeypatch):
    """Every stage, from end to end; without a repository the commit is what it was told."""
    monkeypatch.setattr("fusedrnn.bench.report._commit", lambda: None)
    status, report = run(tmp_path, "--commit", "abc")
    assert status == 0
    assert report["environment"]["commit"] == "abc"
    assert report["environment"]["backend"] == "emulator"
    stages = stages_of(report)
    needing_a_gpu = {"primitives", "graphs", "streams", "sanitizer", "plans"}
    assert stages.keys() == needing_a_gpu | {"parity", "repeats", "timing", "triton"}
    for name in needing_a_gpu:
        (record,) = stages[name]["records"]
        assert (record["verdict"], record["why"]) == (NOT_RUN, "needs a GPU")
    assert stages["triton"]["verdict"] == "passed in part"  # CUDA graphs need one
    of_triton = {r["check"]: r for r in stages["triton"]["records"]}
    assert all((r["verdict"] == NOT_RUN) == name.startswith("graph") for name, r in of_triton.items())
    met = {(r["cell"], r["schedule"], r["precision"]) for r in of_triton.values() if "allowed" in r}
    every = itertools.product(CELLS, triton_backend.SCHEDULES, ("fp32", "bf16"))
    assert met == {(c, f"triton {s}", p) for c, s, p in every if triton_backend.exists(s, p)}
    assert {r["repeats"] for r in of_triton.values() if "repeats" in r} == {correctness.QUICK_REPEATS}
    (timed,) = (r for name, r in of_triton.items() if name.startswith("time"))
    assert timed["ratios"].keys() == {
        *(f"triton {s}" for s in ("planned", *triton_backend.SCHEDULES)),
        "emulator planned",
    }
    for name in ("parity", "repeats", "timing"):
        assert stages[name]["verdict"] == PASSED

    met = {(r["cell"], r["schedule"], r["precision"]) for r in stages["parity"]["records"]}
    assert met == {(c, s, p) for c in CELLS for s in problems.SCHEDULES for p in ("fp32", "bf16")}
    for record in stages["parity"]["records"]:
        assert record["allowed"] > record["worst"] == max(e[0] for e in record["errors"].values())
        assert {"y", "final0", "dx", "dstate0", "dih0", "dhh0", "dbias_hh0"} <= record["errors"].keys()
    assert all(r["repeats"] == correctness.QUICK_REPEATS for r in stages["repeats"]["records"])
    for record in stages["timing"]["records"]:
        times = record["microseconds_per_step"]
        assert times.keys() == {"builtin", "planned", "block", "cluster", "grid"}
        assert record["ratios"].keys() == times.keys() - {"builtin"}
        assert all(len(samples) == 2 and min(samples) > 0 for samples in times.values())
    out = capsys.readouterr().out
    assert "needs a GPU" in out
    assert "they say nothing of a GPU" in out


def test_a_wrong_backend_fails(tmp_path, capsys, wrong):
    wrong()
    status, report = run(tmp_path, "--stages", "parity")
    assert status == 1
    records = stages_of(report)["parity"]["records"]
    assert all(r["verdict"] == FAILED and "y has a relative error of" in r["why"] for r in records)
    assert "FAILED fp32 stepwise lstm" in capsys.readouterr().out


def test_a_wrong_triton_schedule_fails(tmp_path, wrong, monkeypatch):
    """Its checks fail, its time is not taken, and the CUDA kernels are not blamed."""
    monkeypatch.setattr(triton_backend, "CELLS", ["rnn_tanh"])
    wrong("block", "triton")
    status, report = run(tmp_path, "--stages", "triton")
    assert status == 1
    for record in stages_of(report)["triton"]["records"]:
        if record["check"].startswith("time"):
            assert record["faults"].keys() == {"triton block"}
            assert record["ratios"].keys() >= {"triton grid", "emulator planned"}
        elif "allowed" in record:
            assert (record["verdict"] == FAILED) == (record["schedule"] == "triton block")


def test_without_triton(tmp_path, capsys, monkeypatch):
    status = fusedrnn.BackendStatus("triton", False, "triton could not be imported")
    monkeypatch.setattr(fusedrnn, "backends", lambda: {**fusedrnn.backend.backends(), "triton": status})
    assert run(tmp_path, "--stages", "triton")[0] == 0
    assert "triton could not be imported" in capsys.readouterr().out


def test_too_narrow_a_tolerance_fails(tmp_path, monkeypatch):
    narrow = {name: p._replace(cap=0.01) for name, p in gates.PRECISIONS.items()}
    monkeypatch.setattr(gates, "PRECISIONS", narrow)
    status, report = run(tmp_path, "--stages", "parity")
    assert status == 1
    assert stages_of(report)["parity"]["verdict"] == FAILED


def test_a_wrong_schedule_gets_no_ratio(tmp_path, capsys, wrong):
    wrong("cluster")
    status, report = run(tmp_path, "--stages", "timing")
    assert status == 1
    for record in stages_of(report)["timing"]["records"]:
        assert "y has a relative error" in record["faults"]["cluster"]
        assert record["ratios"].keys() == {"planned", "block", "grid"}
        assert "cluster" not in record["microseconds_per_step"]
    assert "wrong" in capsys.readouterr().out


def test_runs_that_differ_are_counted(tmp_path, monkeypatch):
    sequence, calls = ops.sequence, []

    def unsteady(backend, *args):
        calls.append(backend)
        y, *rest = sequence(backend, *args)
        return y + math.nan if len(calls) == 3 else y, *rest

    monkeypatch.setattr(ops, "sequence", unsteady)
    status, report = run(tmp_path, "--stages", "repeats")
    assert status == 1
    first, *rest = stages_of(report)["repeats"]["records"]
    assert first["wrong"] == {"y": 1}
    assert all(r["verdict"] == PASSED for r in rest)


def test_no_time_left_is_said(tmp_path, capsys):
    status, report = run(tmp_path, "--stages", "parity,timing", "--limit", "0")
    assert status == 0
    assert all(r["verdict"] == NOT_RUN for stage in report["stages"] for r in stage["records"])
    assert "share of the time is used up" in capsys.readouterr().out


def test_a_second_run_keeps_the_first(tmp_path):
    for _ in range(2):
        assert command.main([*QUICK, "--out", str(tmp_path), "--stages", "graphs"]) == 0
    assert len([*tmp_path.rglob("*.json")]) == 2
    assert not [*tmp_path.rglob("*.new")]


def test_the_file_is_whole_after_every_stage(tmp_path, monkeypatch):
    def killed(*_):
        (path,) = tmp_path.rglob("*.json")
        assert [stage["name"] for stage in json.loads(path.read_text())["stages"]] == ["repeats"]
        raise KeyboardInterrupt

    monkeypatch.setitem(command.STAGES, "graphs", replace(correctness.GRAPHS, checks=killed, needs_gpu=False))
    with pytest.raises(KeyboardInterrupt):
        command.main([*QUICK, "--out", str(tmp_path), "--stages", "repeats,graphs"])
    assert [*tmp_path.rglob("*.json")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "parity,speed"], "no stage 'speed'"),
        (["--case", "wavefront"], "no schedule 'wavefront'"),
        (["--device", "meta"], "nothing to check on meta"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit):
        command.main([*QUICK, *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_small_cases_run_alone(capsys):
    assert command.main([*QUICK, "--case", "stepwise,block,cluster,grid"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"finished: {s}" for s in problems.SCHEDULES]


def test_a_small_case_that_raises_is_said(capsys, monkeypatch):
    monkeypatch.setitem(sanitizer.TINY, "block", problems.Case("lstm", 2, 3, 4, 500))
    assert command.main([*QUICK, "--case", "block,grid"]) == 1
    out = capsys.readouterr().out
    assert "block raised RuntimeError" in out
    assert "FUSEDRNN_SCHEDULE=block cannot run lstm forward" in out
    assert "finished: grid" in out


class Pretended(Settings):
    """A CPU that is taken for a GPU: for what a check does around the kernels."""

    on_gpu = True


PRETENDED = Pretended(CPU, "emulator", quick=True, seed=0)
TWO = problems.Case("gru", 3, 4, 5, 33, correctness.BOTH), problems.Case("lstm", 2, 3, 4, 20)


class Stream:
    def __init__(self, *_, **__):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def pretend(monkeypatch):
    """torch's CUDA, as far as the checks use it, on a CPU; a graph runs its call again, or nothing."""

    def install(replays=True):
        def capture(call, warm_up=None):
            (warm_up or call)()
            results = call()

            def replay():
                for name, result in (call() if replays else {}).items():
                    with torch.inference_mode(result.is_inference()):
                        results[name].detach().copy_(result.detach())

            return SimpleNamespace(replay=replay), results

        for module in (correctness, speed, triton_backend):
            monkeypatch.setattr(module, "capture", capture)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

    return install


def record_of(check, *arguments):
    return run_check(Check("", partial(check, PRETENDED, *arguments)), Context(timing.Deadline(60)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("schedule", ["cluster", "stepwise"])
def test_a_graph_is_replayed_for_other_inputs(pretend, schedule, training):
    for replays, expected in ((True, PASSED), (False, FAILED)):
        pretend(replays)
        case = replace(TWO[0], packed=training)
        record = record_of(correctness.check_graph, case, schedule, training)
        assert record["verdict"] == expected, record
    assert "replayed and eager results: y" in record["why"]


@pytest.mark.parametrize("replays", [True, False])
def test_a_graph_of_lengths_never_seen(pretend, monkeypatch, replays):
    pretend()
    if not replays:  # what a graph returns that was captured for other lengths
        capture = triton_backend.capture
        monkeypatch.setattr(
            triton_backend, "capture", lambda call, warm_up: (capture(call)[0], {"y": torch.zeros(1)})
        )
    monkeypatch.setattr(problems.Problem, "results", lambda self: {"y": self.forward()["y"]})
    case = problems.Case("rnn_tanh", 3, 3, 4, 20, packed=True)
    check = partial(triton_backend.check_unseen_batch, PRETENDED._replace(backend="triton"), case, "grid")
    record = run_check(Check("", check), Context(timing.Deadline(60)))
    assert record["verdict"] == (PASSED if replays else FAILED), record


def test_streams_are_compared(pretend, monkeypatch):
    pretend()
    pair = [("block", TWO[0]), ("grid", TWO[1])]
    assert record_of(correctness.check_streams, pair, -1)["verdict"] == PASSED
    sequence, calls = ops.sequence, itertools.count()
    monkeypatch.setattr(ops, "sequence", lambda *args: (sequence(*args)[0] * (1 + (next(calls) > 3)), [], []))
    monkeypatch.setattr(problems.Problem, "results", problems.Problem.forward)
    record = record_of(correctness.check_streams, pair, 0)
    assert (record["verdict"], record["why"][:12]) == (FAILED, "block gru T3")
    context = Context(timing.Deadline(60), {"grid"})
    check = Check("", partial(correctness.check_streams, PRETENDED, pair, 0))
    assert run_check(check, context)["verdict"] == NOT_RUN


def test_threads_are_compared(pretend):
    pretend()
    on_cpu = PRETENDED._replace(backend="cpu")
    context = Context(timing.Deadline(60))
    assert correctness.check_threads(on_cpu, "block", TWO, context) == {"rounds": 200}
    record = record_of(correctness.check_threads, "block", [replace(TWO[0], H=999)])
    assert "cannot run gru forward" in record["why"]


def test_timing_by_graphs(pretend, monkeypatch):
    pretend()
    capture = speed.capture

    def refusing(call):
        if call.args and call.args[0] is not PRETENDED:
            raise RuntimeError("not permitted")
        return capture(call)

    monkeypatch.setattr(speed, "capture", refusing)
    record = record_of(speed.check_speed, speed.Timed("fp32", speed.LSTM, Shape(3, 2, 5, 20), "inference"))
    assert record["methods"] == {"builtin": "events, since capture raised not permitted"} | dict.fromkeys(
        ("planned", "block", "cluster", "grid"), "graph"
    )


def test_every_plan_is_timed(pretend, monkeypatch, capsys):
    """What can be forced is; of a plan that the other pass cannot have, that is said."""
    pretend()
    plans = [library.Plan("cluster", 2, 1, 2, 1, 1), library.Plan("grid", 9, 1, 1, 1, 1)]
    monkeypatch.setattr(library, "plans", lambda *_: plans)
    what = speed.Timed("bf16", speed.GRU, Shape(3, 2, 5, 20), "training")
    record = record_of(speed.check_plans, what)
    assert record["verdict"] == PASSED, record["why"]
    assert [*record["ratios"]] == ["cluster:2,1,2,1"]
    assert "cannot run" in record["refused"]["grid:9,1,1,1"]
    speed.show_plans([record], Console(width=150))
    assert "cluster:2,1,2,1" in capsys.readouterr().out


def test_latencies_are_tabled(monkeypatch, capsys):
    names = ["shared load", "L2 read", "cluster of 16", "broken"]

    def measure(index, sample):
        if index > 1:
            raise RuntimeError(primitives.NOT_RESIDENT if index == 2 else "an illegal memory access")
        return library.Sample(*((0, 6400) if index else (100, 0)), 3000 + sample, 1600 + sample)

    monkeypatch.setattr(library, "measurements", lambda: iter(names))
    monkeypatch.setattr(library, "measure", measure)
    monkeypatch.setattr(library, "clusters_at_once", lambda blocks: 132 // blocks)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132)
    )
    checks = primitives.primitive_checks(PRETENDED)
    records = [run_check(check, Context(timing.Deadline(60))) for check in checks]
    assert [r["verdict"] for r in records] == [PASSED, PASSED, PASSED, NOT_RUN, FAILED]
    assert len(records[1]["samples"]) == primitives.SAMPLES
    primitives.show_primitives(records, Console(width=150))
    out = capsys.readouterr().out
    assert "shared load 30.1" in " ".join(out.split())
    assert "8 of 16 blocks" in out


CLEAN = """\
========= COMPUTE-SANITIZER
finished: block
finished: grid
========= ERROR SUMMARY: 0 errors
"""
FOUND = """\
========= COMPUTE-SANITIZER
finished: block
========= Error: Race reported between Write access at persistent+0x10
finished: grid
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (CLEAN, ""),
        (FOUND, "2 errors; the first: Error: Race reported"),
        (CLEAN.replace("finished: grid\n", ""), "no verdict on grid"),
        (CLEAN.replace("ERROR SUMMARY: 0 errors", "Device not supported"), "no verdict on the run"),
    ],
)
def test_output_of_the_sanitizer(output, message):
    if not message:
        assert sanitizer.verdict_of(output, ["block", "grid"], "exit status 0")["errors"] == 0
        return
    with pytest.raises(sanitizer.Failed, match=message):
        sanitizer.verdict_of(output, ["block", "grid"], "exit status 0")


def test_a_sanitizer_that_was_stopped():
    with pytest.raises(sanitizer.NotRun, match="stopped after 9 s; what had finished: block"):
        sanitizer.verdict_of("finished: block\n", ["block", "grid"], "stopped after 9 s")
    with pytest.raises(sanitizer.Failed, match="2 errors"):
        sanitizer.verdict_of(FOUND, ["block", "grid"], "stopped after 9 s")


def test_without_the_sanitizer(monkeypatch):
    monkeypatch.setattr(sanitizer, "find_tool", lambda: None)
    check, *_ = sanitizer.sanitizer_checks(SETTINGS)
    record = run_check(check, Context(timing.Deadline(60)))
    assert (record["verdict"], record["why"]) == (NOT_RUN, "compute-sanitizer is not installed")


def test_a_schedule_that_hung_is_not_run_again():
    def hang(_):
        raise RuntimeError("a persistent kernel (...) waited for a block that never came; ...")

    context = Context(timing.Deadline(60))
    first, second, other = (
        run_check(Check(name, run_it, schedule), context)
        for name, run_it, schedule in (
            ("1", hang, "grid"),
            ("2", hang, "grid"),
            ("3", lambda _: {"figure": 1}, "stepwise"),
        )
    )
    assert (first["verdict"], second["verdict"]) == (FAILED, NOT_RUN)
    assert second["why"] == "a launch of grid has hung before"
    assert (other["verdict"], other["figure"]) == (PASSED, 1)


def test_a_worker_that_dies_is_replaced():
    supervisor = workers.Supervisor(command.worker_arguments(SETTINGS))
    records = []
    try:
        for record in supervisor.run(correctness.REPEATED_RUNS, Context(timing.Deadline(120))):
            records.append(record)
            if len(records) == 1:
                os.kill(supervisor._worker._process.pid, signal.SIGKILL)
    finally:
        supervisor.close()
    (died,) = (r for r in records if r["verdict"] == FAILED)
    assert "the process died; exit status -9" in died["why"]
    names = [check.name for check in correctness.repeat_checks(SETTINGS)]
    passed = [r["check"] for r in records if r["verdict"] == PASSED]
    assert passed[0] == names[0]
    assert passed[-1] == names[-1]
    assert (
        len(passed) >= len(names) - 2
    )  # it may have been at a check, and have ended one that nobody read of


class Scripted:
    """A worker that says what the test has written down; None: it dies, "": it says nothing."""

    script: tuple = ()

    def __init__(self, _):
        self.log = io.StringIO()

    def ask(self, stage, first, seconds, broken):
        self.asked.append((first, broken.copy()))
        self.events = iter(self.script.pop(0))

    def event(self, patience):
        found = next(self.events)
        if found == "":
            raise TimeoutError
        return found

    def stop(self):
        return "exit status -9"

    def output(self):
        return "said\n"


def begins(index, schedule=""):
    return {"begin": index, "name": f"check {index}", "patience": 5.0, "schedule": schedule}


def passes(index):
    return {"record": {"check": f"check {index}", "verdict": PASSED, "why": ""}, "broken": []}


@pytest.mark.parametrize(
    ("script", "expected", "asked"),
    [
        ([[begins(0), passes(0), {"end": True}]], ["check 0 passed"], [(0, set())]),
        (
            [[begins(0), ""], [begins(1), passes(1), {"end": True}]],
            ["check 0 failed hung: no answer within 5 s; exit status -9", "check 1 passed"],
            [(0, set()), (1, {"grid"})],
        ),
        (
            [[begins(0), passes(0), {"restart": 1}], [begins(1), passes(1), {"restart": None}]],
            ["check 0 passed", "check 1 passed"],
            [(0, set()), (1, set())],
        ),
        ([[None]], ["repeats, start of a worker failed the process died; exit status -9"], [(0, set())]),
        (
            [[begins(i), None] for i in range(workers.MOST_DEATHS)],
            [
                *(f"check {i} failed the process died; exit status -9" for i in range(workers.MOST_DEATHS)),
                "repeats, from check 7 on failed given up, since 6 workers have died",
            ],
            [(i, set()) for i in range(workers.MOST_DEATHS)],
        ),
    ],
    ids=["ends", "hangs", "wants a fresh process", "does not start", "always dies"],
)
def test_what_is_made_of_a_worker(monkeypatch, script, expected, asked):
    for first, *_ in script:
        if first and "begin" in first and "hung" in str(expected):
            first["schedule"] = "grid"
    Scripted.script, Scripted.asked = script, []
    monkeypatch.setattr(workers, "Worker", Scripted)
    supervisor = workers.Supervisor([])
    records = [*supervisor.run(correctness.REPEATED_RUNS, Context(timing.Deadline(60)))]
    assert [f"{r['check']} {r['verdict']} {r['why']}".strip() for r in records] == expected
    assert Scripted.asked == asked


@pytest.mark.parametrize("largest_cluster", [16, 8])
def test_an_h200_runs_every_case_that_is_forced(largest_cluster):
    """By the planner: a case that could not run would be a red check that says nothing of the kernels."""
    clusters = (*CLUSTERS[:3], CLUSTERS[3] if largest_cluster == 16 else 0)
    device = GpuDevice(multiprocessors=132, shared_bytes=227 * KIB, clusters=clusters, cooperative=True)
    cases = {(case, p, s) for _, case, p, s in correctness.parity_cases(quick=False)}
    cases |= {(case, "bf16", s) for s, case in (*correctness.REPEATED.items(), *sanitizer.TINY.items())}
    for case, precision, schedule in cases:
        if schedule == "stepwise":
            continue
        if largest_cluster == 8 and schedule == "cluster" and correctness.LARGE["cluster"][2] == case.H:
            continue  # what a cluster of 16 is for
        for backward in (False, True):
            kernel = persistent_pass(case.cell, precision, backward)
            plans = _testing.plan_persistent(kernel, len(case.reverse), case.B, case.H, device)
            exchanges = {plan.exchange.name.lower() for plan in plans}
            assert schedule in exchanges, f"{schedule} {case} {precision}"


def test_every_cell_precision_and_schedule_is_compared():
    met = {(case.cell, p, s) for _, case, p, s in correctness.parity_cases(quick=False)}
    assert met == {*itertools.product(CELLS, gates.PRECISIONS, problems.SCHEDULES)}
