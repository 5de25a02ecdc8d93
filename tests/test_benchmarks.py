"""The benchmark command: its gates catch what is wrong, its figures mean what they say; no speed asserted."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import train_text
from benchmarks.__main__ import main
from fusedrnn import accuracy as gates
from fusedrnn import trial
from fusedrnn.bench import peers, report, sets, table, timing
from fusedrnn.bench.compare import compare
from fusedrnn.bench.sets import Entry
from fusedrnn.cli import app
from fusedrnn.trial import CELLS, Shape

CPU = torch.device("cpu")


def test_equal_curves_agree():
    assert train_text.compare([3.0, 2.0, 1.0], [3.0, 2.0, 1.0]) == ""


@pytest.mark.parametrize(("step", "gap"), [(3, 1e-4), (150, 0.1), (3, math.nan)])
def test_curves_that_part_are_named(step, gap):
    builtin = [2.0] * 200
    ours = builtin.copy()
    ours[step] += gap
    assert f"part at step {step}:" in train_text.compare(builtin, ours)


def training(**changes):
    values = {
        "characters": 1000,
        "files": 1,
        "vocabulary": 10,
        "entropy": 4.0,
        "parameters": 1,
        "builtin_losses": [3.0] * 20,
        "fusedrnn_losses": [3.0] * 20,
        "builtin_times": [1.0] * 20,
        "fusedrnn_times": [1.0] * 20,
        "stopped_early": False,
    }
    return train_text.Training(**(values | changes))


def test_a_model_that_did_not_learn_fails():
    assert train_text.find_failures(training()) == []
    failures = train_text.find_failures(training(entropy=3.0))
    assert len(failures) == 2
    assert all("did not learn" in failure for failure in failures)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t, ""),
        (lambda t: t * (1 + 1e-3), "relative error"),
        (lambda t: t + 2e-7, "the built-in's is"),
        (lambda t: t.index_fill(0, torch.tensor([2]), math.nan), "relative error of nan"),
        (lambda t: t.double(), "torch.float64"),
        (lambda t: t[:5], r"[5]"),
    ],
)
def test_the_gate_of_the_table(change, fault):
    exact = torch.linspace(0.1, 1, 50, dtype=torch.float64)
    builtin = exact.float()
    verdict = gates.judge(change(builtin), builtin, exact, gates.PRECISIONS["fp32"])
    assert (fault in verdict.fault) if fault else verdict.fault == ""


def test_results_must_correspond():
    with pytest.raises(ValueError, match="do not correspond"):
        gates.judge_all({"y": torch.ones(1)}, {}, {}, gates.PRECISIONS["fp32"])


def test_interleaving_rotates_and_keeps_its_minimum():
    order: list[int] = []
    samples = timing.interleave(
        [lambda: order.append(0), lambda: order.append(1)], CPU, seconds=0, warmup=0, min_rounds=4
    )
    assert [len(s) for s in samples] == [4, 4]
    assert order == [0, 1, 1, 0, 0, 1, 1, 0]


def test_a_call_that_settles_counts_by_its_second_half(monkeypatch):
    times = iter([9.0, 1.0, 8.0, 2.0])
    monkeypatch.setattr(timing, "clock", lambda call, device: next(times))
    assert timing.interleave([lambda: None], CPU, seconds=0, warmup=0, min_rounds=2, settle=1e-9) == [
        [1.0, 2.0]
    ]


@pytest.mark.parametrize("name", ["python loop", "onnxruntime"])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_peer_computes_the_same(name, cell):
    shape, fp32 = Shape(5, 3, 4, 6), gates.PRECISIONS["fp32"]
    made = trial.make_trio(cell, shape, torch.float32, CPU, 0)
    truth = trial.call(made.referee, made.inputs.to(torch.float64), "training")
    results = peers.PEERS[name].make(cell, shape, made, "inference")()
    assert results.keys() == {"y", *(f"final{i}" for i in range(cell.states))}
    assert peers.check(results, truth, fp32) == ""
    results["y"] = results["y"] * (1 + 1e-4)
    assert "its y has a relative error of 1.0e-04" in peers.check(results, truth, fp32)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_loops_train_the_same(cell):
    shape, fp32 = Shape(4, 2, 3, 5), gates.PRECISIONS["fp32"]
    made = trial.make_trio(cell, shape, torch.float32, CPU, 0)
    truth = trial.call(made.referee, made.inputs.to(torch.float64), "training")
    results = peers.PEERS["python loop"].make(cell, shape, made, "training")()
    assert results.keys() == truth.keys()
    assert peers.check(results, truth, fp32) == ""


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_says_what_it_does_not_serve(name):
    shape = Shape(4, 2, 3, 5, packed=True)
    made = trial.make_trio(CELLS[0], shape, torch.float32, CPU, 0)
    with pytest.raises(peers.Unserved, match="one plain layer in one direction, padded"):
        peers.PEERS[name].make(CELLS[0], shape, made, "inference")


def test_a_peer_that_is_not_installed_is_left_out():
    assert peers.PEERS["flashrnn"].missing() == ["flashrnn"]
    assert [p.name for p in peers.installed(["flashrnn", "python loop"])] == ["python loop"]


def test_the_layout_of_a_peer_is_found_by_trial():
    wanted = torch.arange(1.0, 4.0)

    def forward(order, transposed):
        return wanted if (order, transposed) == ((1, 0, 2), True) else -wanted

    assert peers.first_right(forward, wanted, 3) == ((1, 0, 2), True)
    with pytest.raises(peers.Unserved, match="no order of its gates"):
        peers.first_right(lambda order, transposed: -wanted, wanted, 3)


@pytest.mark.parametrize("name", sets.SETS)
def test_sets(name):
    found = sets.entries(name)
    assert found
    assert len(set(found)) == len(found)
    assert {e.cell.name for e in sets.entries(name, ["LSTM"])} == {"LSTM"}


def test_resets_are_what_a_user_of_the_builtin_writes():
    """The built-in step by step with masked states, and our argument, agree, gradients included."""
    shape, fp32 = Shape(7, 4, 3, 5, resets=0.3), gates.PRECISIONS["fp32"]
    for cell in CELLS:
        made = trial.make_trio(cell, shape, torch.float32, CPU, 0)
        assert made.inputs.reset is not None
        assert made.inputs.reset.any()
        truth = trial.call(made.referee, made.inputs.to(torch.float64), "training")
        assert peers.check(trial.call(made.ours, made.inputs, "training"), truth, fp32) == ""


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_heads_are_zeros_of_the_builtin(cell):
    shape, fp64 = Shape(6, 3, 4, 12, heads=3), torch.float64
    made = trial.make_trio(cell, shape, fp64, CPU, 0)
    ours, builtin = (trial.call(layer, made.inputs, "training") for layer in (made.ours, made.builtin))
    assert ours["dweight_hh_l0"].shape == (cell.gates * 12, 4)
    for name, result in ours.items():
        torch.testing.assert_close(result, builtin[name], msg=name)
    assert flop(cell, shape) == 2 * 6 * 3 * cell.gates * 12 * (4 + 4)


def test_plots_of_series(tmp_path):
    """Three sizes of one dimension make a series, and a plot; two do not."""

    def row(H, B=1):
        times = {"builtin_times": [1.0], "fusedrnn_times": [0.5]}
        return table.Row("LSTM", Shape(9, B, H, H), "inference", "fp32", 1, 1, **times)

    rows = [row(32), row(16), row(64), row(64, B=2)]
    found = report._scaling(table.KernelTable(rows, ["fp32"], ""), "fp32")
    assert found.keys() == {"H"}
    assert [r.shape.H for r in found["H"][0]] == [16, 32, 64]
    environment = report.environment(CPU, 0, None)
    path = report.plot_scaling(found, "fp32", environment, tmp_path / "scaling.png")
    assert path.stat().st_size > 10_000


def test_figures_of_a_row():
    """All of them round by round."""
    row = table.Row("GRU", Shape(9, 1, 1, 1), "inference", "fp32", flop=600, step_bytes=1)
    row.builtin_times, row.fusedrnn_times = [6.0, 12.0], [3.0, 6.0]
    row.product_flop, row.product_times = 1000, [4.0, 8.0]
    row.peer_times = {"another": [4.5, 9.0]}
    assert row.ratio == (2, 2, 2)
    assert row.peer_ratio("another") == 1.5
    assert row.peer_ratio("absent") is None
    assert row.share_of_peak(row.fusedrnn_times) == pytest.approx(0.8)
    assert row.share_of_peak(row.builtin_times) == pytest.approx(0.4)
    found = table.KernelTable([row], ["fp32", "bf16"], "")
    assert found.peak("fp32") == 250
    assert found.peak("bf16") is None
    assert found.geometric_mean(peer="another") == pytest.approx(1.5)
    assert found.geometric_mean() == pytest.approx(2)


def test_cache_levels_are_in_order():
    levels = [timing.cache_level(1 << n) for n in range(10, 34)]
    assert levels == sorted(levels, key=["", "L1", "L2", "L3", "L4", "RAM"].index)


def test_statistics():
    assert timing.spread([2.0]) == (2.0, 2.0, 2.0)
    assert timing.spread(list(range(101))) == (50, 10, 90)
    assert timing.geometric_mean([1.0, 4.0]) == pytest.approx(2)


def test_peak_memory_sees_an_allocation():
    call = lambda: torch.ones(8_000_000)  # noqa: E731 - 32 MB
    call()
    assert timing.peak_memory(call, CPU) == pytest.approx(32e6, rel=0.1)


@pytest.mark.parametrize("shape", [s for s in sets.SHAPES if s.packed])
def test_packed_shapes_are_consistent(shape):
    sizes = shape.batch_sizes.tolist()
    assert len(sizes) == shape.T
    assert sum(sizes) == shape.rows < shape.T * shape.B
    assert sizes == sorted(sizes, reverse=True)


def test_operations_are_counted_as_by_hand():
    cell, shape = CELLS[1], Shape(T=2, B=3, I=5, H=7)
    assert flop(cell, shape) == 2 * (2 * 3) * (3 * 7) * (5 + 7)
    assert trial.flop(cell, shape, "training") == 3 * flop(cell, shape)
    stacked = Shape(2, 3, 5, 7, layers=2, bidirectional=True, P=4)
    by_hand = 2 * (2 * 3) * 2 * 7 * (3 * (5 + 4) + 4 + 3 * (8 + 4) + 4)
    assert flop(cell, stacked) == by_hand


def flop(cell, shape):
    return trial.flop(cell, shape, "inference")


def test_text_of_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Python sources"):
        train_text.read_text(tmp_path)
    (tmp_path / "a.py").write_text("ab" * 200 + "c")
    text = train_text.read_text(tmp_path)
    assert text.files == 1
    assert text.vocabulary == 3  # a, b, and one id for the rare rest
    assert len(text.ids) == 401
    assert text.entropy == pytest.approx(1, abs=0.05)


def small(monkeypatch, *shapes):
    entries = [Entry(cell, shape) for cell in CELLS for shape in shapes]
    monkeypatch.setitem(sets.SETS, "quick", lambda: entries)


def test_the_command(tmp_path, monkeypatch):
    """A small run of the table from end to end: green, and every file it names is there."""
    small(monkeypatch, Shape(6, 4, 8, 16, packed=True))
    arguments = ["--quick", "--only", "table", "--seconds", "3", "--out", str(tmp_path)]
    assert main(arguments) == 0
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["environment"]["device"] == "cpu"
    assert (tmp_path / "kernels-fp32.png").stat().st_size > 10_000


def test_a_wrong_kernel_gets_no_ratio(tmp_path, monkeypatch, capsys):
    import fusedrnn

    forward = fusedrnn.GRU.forward

    def wrong(self, *args):
        y, h = forward(self, *args)
        return y * 1.001, h

    monkeypatch.setattr(fusedrnn.GRU, "forward", wrong)
    small(monkeypatch, Shape(6, 4, 8, 16))
    arguments = ["--quick", "--only", "table", "--seconds", "3", "--out", str(tmp_path)]
    assert main(arguments) == 1
    assert "wrong" in capsys.readouterr().out


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)


SMALL = ("--seconds", "0", "--cell", "lstm,gru", "--mode", "inference", "--peer", "python loop")


def test_fusedrnn_bench(tmp_path):
    """From end to end, and a comparison of the file with itself."""
    sizes = [option for H in (4, 8, 16) for option in ("--shape", f"5,2,{H},{H}")]
    done = bench(*SMALL, *sizes, "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "bench.json").read_text())
    rows = written["kernels"]["rows"]
    assert len(rows) == 6
    for row in rows:
        assert row["peer_times"]["python loop"]
        assert not row["faults"]
        assert row["fusedrnn_seconds"]["median"] > 0
    lines = [*csv.DictReader((tmp_path / "bench.csv").read_text().splitlines())]
    assert [line["shape"] for line in lines[:3]] == ["T5 B2 I4 H4", "T5 B2 I8 H8", "T5 B2 I16 H16"]
    assert float(lines[0]["ratio_python loop"]) > 0
    for name in ("kernels-fp32.png", "scaling-fp32.png"):
        assert (tmp_path / name).stat().st_size > 10_000
        assert name in done.output

    file = str(tmp_path / "bench.json")
    same = bench("--compare", file, file)
    assert same.exit_code == 0
    assert "Geometric mean: 1.000×" in same.output
    assert "not the same machine" not in same.output


def test_comparison_of_two_files(tmp_path):
    def write(name, seconds, threads):
        shape = {"T": 5, "B": 2, "I": 4, "H": 4, "layers": 1, "packed": False}
        row = {"cell": "LSTM", "shape": shape, "mode": "inference", "precision": "fp32"}
        row["fusedrnn_times"] = seconds
        kernels = {"rows": [row, row | {"cell": name}]}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"environment": {"threads": threads}, "kernels": kernels}))
        return path

    found = compare(write("a", [2.0, 2.1], 2), write("b", [1.0, 1.05], 4))
    (change,) = found.changes
    assert change.name == "LSTM T5 B2 I4 H4 inference fp32"
    assert change.ratio == pytest.approx(2)
    assert change.clear
    assert found.differences == ["threads: 2 → 4"]
    assert found.only_before == ["a T5 B2 I4 H4 inference fp32"]
    assert found.only_after == ["b T5 B2 I4 H4 inference fp32"]
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(ValueError, match="is no result of fusedrnn bench"):
        compare(tmp_path / "no.json", tmp_path / "no.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "mine"), "no set 'mine'"),
        (("--shape", "1,2"), "four whole numbers"),
        (("--shape", "1,2,0,4"), "must be positive"),
        (("--cell", "elman"), "no cell 'elman'"),
        (("--precision", "tf32", "--device", "cpu"), "tf32 is a GPU's"),
        (("--peer", "flashrnn"), "needs flashrnn, not installed"),
    ],
)
def test_bench_refuses_what_it_does_not_know(arguments, message):
    done = bench(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_a_peer_that_is_wrong_or_fails_gets_no_ratio(monkeypatch):
    def wrong(cell, shape, trio, mode):
        return lambda: {"y": torch.zeros(shape.T, shape.B, shape.H)}

    def failing(cell, shape, trio, mode):
        raise OSError("its file is gone")

    beside = [peers.Peer("wrong", (), wrong), peers.Peer("failing", (), failing)]
    entries = [Entry(CELLS[1], Shape(4, 2, 3, 5))]
    found = table.run(CPU, entries, ["fp32"], seconds=0, seed=0, modes=["inference"], beside=beside)
    (row,) = found.rows
    assert "relative error of 1.0e+00" in row.peer_faults["wrong"]
    assert row.peer_faults["failing"] == "raised OSError: its file is gone"
    assert found.peers == []
    assert row.fusedrnn_times
