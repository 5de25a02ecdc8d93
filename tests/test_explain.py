"""What explain says of a layer is what serves it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
from fusedrnn import explain


class Model(nn.Module):
    """Ours, the built-in's and a cell, of which one is called twice."""

    def __init__(self):
        super().__init__()
        self.encoder = fusedrnn.GRU(4, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.middle = nn.LSTM(16, 4)
        self.cell = fusedrnn.LSTMCell(4, 6)

    def forward(self, x):
        y, _ = self.middle(self.encoder(x)[0])
        state = self.cell(y[0])
        return self.cell(y[1], state)


def test_every_layer_of_a_model_is_named():
    found = explain(Model(), torch.randn(3, 5, 4))
    layers = [(p.module, p.layer, p.cell, p.backend) for p in found.layers]
    assert layers == [
        ("encoder", 0, "gru", "cpu"),
        ("encoder", 1, "gru", "cpu"),
        ("cell", 0, "lstm", "torch"),
        ("cell", 0, "lstm", "torch"),
    ]
    assert found.builtin == ("middle",)
    assert found.layers[0].sizes == {"T": 5, "B": 3, "I": 4, "H": 8, "P": 0, "N": 2}
    assert found.layers[1].sizes["I"] == 16
    assert [p.direction for p in found.layers[0].passes] == ["forward", "backward"]
    assert "middle: torch.nn's own" in str(found)
    assert json.loads(json.dumps(found.as_dict()))["layers"][2]["module"] == "cell"


def test_nothing_of_it_stays():
    model, x = Model(), torch.randn(3, 5, 4)
    plan = fusedrnn.functional.plan_layer
    explain(model, x)
    assert fusedrnn.functional.plan_layer is plan
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match=r"input\.size"):
        explain(model, torch.randn(3, 5, 9))
    assert fusedrnn.functional.plan_layer is plan
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_inference_has_one_pass():
    with torch.no_grad():
        (layer,) = explain(fusedrnn.GRU(4, 8), torch.randn(5, 3, 4)).layers
    assert [p.direction for p in layer.passes] == ["forward"]
    assert layer.passes[0].schedule == "resident"
    assert layer.passes[0].on_chip == {"cache": 3 * 8 * 8 * 4}


def test_the_builtin_is_chosen_with_a_reason():
    with torch.no_grad():
        (layer,) = explain(fusedrnn.LSTM(4, 8), torch.randn(1, 16, 4)).layers
    assert layer.backend == "torch"
    assert "torch's own kernels" in layer.because
    assert layer.passes[0].schedule == "builtin"


@pytest.mark.parametrize(
    ("H", "exchange"), [(16, "block"), (64, "block"), (160, "cluster"), (300, "grid"), (600, "")]
)
def test_persistent_plans_and_why_not_the_others(H, exchange):
    """On the emulator's device, which has 8 multiprocessors and clusters of 4."""
    layer = fusedrnn.LSTM(4, H).bfloat16()
    x = torch.randn(3, 2, 4, dtype=torch.bfloat16)
    with fusedrnn.use_backend("emulator"), torch.no_grad():
        (plan,) = explain(layer, x).layers[0].passes
    assert plan.exchange == exchange
    assert plan.schedule == ("persistent" if exchange else "stepwise")
    everything = {"block", "cluster", "grid", "stepwise"}
    assert plan.rejected.keys() == everything - {exchange or "stepwise"}
    assert all(plan.rejected.values())
    if exchange:
        tiles = plan.tiles
        assert tiles["blocks"] * tiles["units"] >= H
        assert tiles["blocks"] == 1 or exchange != "block"
        weights = 4 * H * H * 2
        assert tiles["blocks"] * (plan.on_chip["registers"] + plan.on_chip["shared"]) >= weights


@pytest.mark.parametrize("schedule", ["stepwise", "grid", "cluster:2,1,2,1"])
def test_a_demanded_schedule_is_what_is_explained(monkeypatch, schedule):
    monkeypatch.setenv("FUSEDRNN_SCHEDULE", schedule)
    with fusedrnn.use_backend("emulator"), torch.no_grad():
        (layer,) = explain(fusedrnn.GRU(4, 20), torch.randn(3, 2, 4)).layers
    (plan,) = layer.passes
    if schedule == "stepwise":
        assert plan.schedule == "stepwise"
        assert plan.rejected["grid"] == "FUSEDRNN_SCHEDULE=stepwise"
    else:
        assert plan.exchange == schedule.partition(":")[0]
        assert "demands another" in plan.rejected["block"]
    if ":" in schedule:
        names = ("blocks", "units", "k_splits", "sequences")
        assert [plan.tiles[name] for name in names] == [2, 16, 2, 8]
    assert "forced" in layer.because


@pytest.mark.parametrize(
    ("options", "T", "dtype", "why"),
    [
        ({"proj_size": 3}, 4, torch.float32, "a projection"),
        ({}, 4, torch.float64, "float64"),
        ({}, 1, torch.float32, "a single step"),
    ],
)
def test_what_runs_step_by_step_says_why(options, T, dtype, why):
    layer = fusedrnn.LSTM(4, 8, **options).to(dtype)
    with fusedrnn.use_backend("emulator"):
        (found,) = explain(layer, torch.randn(T, 2, 4, dtype=dtype)).layers
    for plan in found.passes:
        assert plan.schedule == "stepwise"
        assert all(reason.startswith(why) for reason in plan.rejected.values())
        assert plan.rejected.keys() == {"block", "cluster", "grid"}


def test_triton_plans():
    with fusedrnn.use_backend("triton"), torch.no_grad():
        (layer,) = explain(fusedrnn.GRU(4, 20).bfloat16(), torch.randn(3, 2, 4).bfloat16()).layers
    (plan,) = layer.passes
    assert plan.schedule == "persistent"
    assert plan.exchange in ("block", "grid")
    assert plan.tiles["slices"] * plan.tiles["block_u"] >= 20
    assert "stepwise" in plan.rejected


def test_packed_input_and_a_layer():
    x = pack_sequence([torch.randn(5, 4), torch.randn(3, 4)])
    (layer,) = explain(fusedrnn.Layer("gru", 4, 8), x).layers
    assert layer.packed
    assert layer.sizes == {"T": 5, "B": 2, "I": 4, "H": 8, "P": 0, "N": 1}
    assert "packed" in str(layer)


def test_autocast_and_transforms():
    layer, x = fusedrnn.LSTM(4, 8), torch.randn(3, 2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert explain(layer, x).layers[0].dtype == "bfloat16"
    with fusedrnn.use_backend("reference"):
        (found,) = explain(layer, x).layers
    assert found.passes[0].schedule == "loop"


def test_a_compiled_module_is_explained_as_what_was_compiled():
    layer = fusedrnn.LSTM(4, 8)
    found = explain(torch.compile(layer), torch.randn(3, 2, 4))
    assert [p.cell for p in found.layers] == ["lstm"]


def test_no_recurrent_module():
    assert str(explain(nn.Linear(2, 3), torch.randn(1, 2))) == "no recurrent modules"
