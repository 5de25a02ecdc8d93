"""The benchmark command: its gates catch what is wrong, its figures mean what they say; no speed asserted."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import gates, kernel_table, peer, shapes, timing, train_text
from benchmarks.__main__ import main

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


@pytest.mark.parametrize("cell", shapes.CELLS, ids=str)
def test_the_peer_computes_the_same(cell):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    shape = shapes.Shape(5, 3, 4, 6)
    layer = cell.layer(torch.nn, shape)
    inputs = kernel_table.make_inputs(cell, shape, torch.float32, CPU, 0)
    y, *final = peer.make_call(cell, layer, inputs.x, inputs.state)()
    expected = [*kernel_table.call(layer, inputs, "inference").values()]
    for a, b in zip((y.squeeze(1), *final), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b.detach(), rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("shape", [s for s in shapes.SHAPES if s.packed])
def test_packed_shapes_are_consistent(shape):
    sizes = shape.batch_sizes.tolist()
    assert len(sizes) == shape.T
    assert sum(sizes) == shape.rows < shape.T * shape.B
    assert sizes == sorted(sizes, reverse=True)


def test_operations_are_counted_as_by_hand():
    cell, shape = shapes.CELLS[1], shapes.Shape(T=2, B=3, I=5, H=7)
    assert flop(cell, shape) == 2 * (2 * 3) * (3 * 7) * (5 + 7)
    assert shapes.flop(cell, shape, "training") == 3 * flop(cell, shape)


def flop(cell, shape):
    return shapes.flop(cell, shape, "inference")


def test_text_of_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Python sources"):
        train_text.read_text(tmp_path)
    (tmp_path / "a.py").write_text("ab" * 200 + "c")
    text = train_text.read_text(tmp_path)
    assert text.files == 1
    assert text.vocabulary == 3  # a, b, and one id for the rare rest
    assert len(text.ids) == 401
    assert text.entropy == pytest.approx(1, abs=0.05)


def test_the_command(tmp_path, monkeypatch):
    """A small run of the table from end to end: green, and every file it names is there."""
    monkeypatch.setattr("benchmarks.__main__.QUICK_SHAPES", (shapes.Shape(6, 4, 8, 16, packed=True),))
    arguments = ["--quick", "--only", "table", "--seconds", "3", "--out", str(tmp_path)]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["environment"]["device"] == "cpu"
    assert (tmp_path / "kernels-fp32.png").stat().st_size > 10_000


def test_a_wrong_kernel_gets_no_ratio(tmp_path, monkeypatch, capsys):
    import fusedrnn

    forward = fusedrnn.GRU.forward

    def wrong(self, *args):
        y, h = forward(self, *args)
        return y * 1.001, h

    monkeypatch.setattr(fusedrnn.GRU, "forward", wrong)
    monkeypatch.setattr("benchmarks.__main__.QUICK_SHAPES", (shapes.Shape(6, 4, 8, 16),))
    arguments = ["--quick", "--only", "table", "--seconds", "3", "--out", str(tmp_path)]
    assert main(arguments) == 1
    assert "wrong" in capsys.readouterr().out
