"""The planner of the persistent CUDA schedules: pure functions of the problem and the device, with no GPU."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedrnn.cells import CELLS
from fusedrnn.lib import _testing

Exchange, GpuDevice, PersistentPass = _testing.Exchange, _testing.GpuDevice, _testing.PersistentPass

KIB = 1024
# Of 2, 4, 8 and 16 blocks. Those of 8 and 16 as reported of an H100, the same die: its parts differ in size.
CLUSTERS, NO_CLUSTERS = (66, 33, 15, 7), (0, 0, 0, 0)
DEVICES = {
    "H200": GpuDevice(multiprocessors=132, shared_bytes=227 * KIB, clusters=CLUSTERS, cooperative=True),
    "A100": GpuDevice(multiprocessors=108, shared_bytes=163 * KIB, clusters=NO_CLUSTERS, cooperative=True),
    "MIG slice": GpuDevice(
        multiprocessors=16, shared_bytes=227 * KIB, clusters=(8, 4, 2, 0), cooperative=True
    ),
    "24 SMs": GpuDevice(multiprocessors=24, shared_bytes=99 * KIB, clusters=NO_CLUSTERS, cooperative=True),
    "no cooperative launch": GpuDevice(
        multiprocessors=108, shared_bytes=163 * KIB, clusters=NO_CLUSTERS, cooperative=False
    ),
}
DTYPES = ("bf16", "fp16", "tf32", "fp32")
MOST = 2**63 - 1


def persistent_pass(cell: str, dtype: str = "bf16", backward: bool = False) -> PersistentPass:
    """What the kernel of that cell, dtype and direction says of itself."""
    gates, tiles = CELLS[cell].gates, 1 if backward else CELLS[cell].gates
    recomputed = {"lstm": 6, "gru": 6}.get(cell, 0)  # and the states before and after the step
    return PersistentPass(
        m_tiles=tiles,
        published=gates if backward else 1,
        prefetched=recomputed if backward else gates,
        register_steps=0 if dtype == "fp32" else 24 if tiles == 1 else 8,
        element_bytes=2 if dtype in ("bf16", "fp16") else 4,
    )


def values(plan) -> tuple:
    sizes = (plan.slices, plan.unit_tiles, plan.k_splits, plan.batch_tiles, plan.groups)
    return (plan.exchange.name, *sizes)


def all_groups(plan, N: int, B: int) -> int:
    return N * -(-B // plan.rows)


passes = st.builds(persistent_pass, st.sampled_from(list(CELLS)), st.sampled_from(DTYPES), st.booleans())
sizes = st.one_of(st.integers(1, 300), st.integers(1, 5000), st.integers(1, MOST))
devices = st.one_of(
    st.sampled_from(list(DEVICES.values())),
    st.builds(
        GpuDevice,
        multiprocessors=st.integers(1, 300),
        shared_bytes=st.integers(0, 300 * KIB),
        clusters=st.tuples(*[st.integers(0, 150)] * 4),
        cooperative=st.booleans(),
    ),
)


@settings(max_examples=500)
@given(kernel=passes, N=sizes, B=sizes, H=sizes, device=devices)
def test_every_plan_fits(kernel, N, B, H, device):
    """Problem and device, in the kernel's own terms, for every plan and not only for the first."""
    plans = _testing.plan_persistent(kernel, N, B, H, device)
    for plan in plans:
        assert plan.shared_bytes(kernel) <= device.shared_bytes
        assert 1 <= plan.unit_tiles * plan.k_splits <= 8  # warps of a block
        assert 1 <= plan.batch_tiles <= plan.k_splits
        assert plan.elements <= 4
        assert plan.rows - B < 8  # no tile of the batch is empty
        assert plan.slices * plan.units >= H
        assert 1 <= plan.groups <= all_groups(plan, N, B)
        assert plan.groups * plan.slices < 2**31  # blocks of a launch
        if plan.exchange is Exchange.block:
            assert plan.slices == 1
        elif plan.exchange is Exchange.cluster:
            assert plan.slices in (2, 4, 8, 16)
            assert device.clusters_of(plan.slices) >= 1
            assert plan.slices <= device.multiprocessors
            assert plan.slices == 2 or plan.slices // 2 * plan.units < H  # half as many would not do
        else:
            assert device.cooperative
            assert plan.slices >= 2
            assert (plan.slices - 1) * plan.units < H  # no slice is empty
            assert plan.slices * plan.groups <= device.multiprocessors
            room = (plan.groups + 1) * plan.slices <= device.multiprocessors
            assert not room or plan.groups == all_groups(plan, N, B)
    kinds = [(plan.exchange, plan.slices) for plan in plans]
    assert len(set(kinds)) == len(kinds)
    again = _testing.plan_persistent(kernel, N, B, H, device)
    assert [values(p) for p in again] == [values(p) for p in plans]


@settings(max_examples=200)
@given(kernel=passes, N=st.integers(1, 64), B=st.integers(1, 300), H=st.integers(1, 3000), device=devices)
def test_a_larger_device_offers_no_fewer_exchanges(kernel, N, B, H, device):
    larger = GpuDevice(
        multiprocessors=2 * device.multiprocessors,
        shared_bytes=2 * device.shared_bytes,
        clusters=[max(1, device.clusters_of(blocks)) for blocks in (2, 4, 8, 16)],
        cooperative=True,
    )
    few, many = ({p.exchange for p in _testing.plan_persistent(kernel, N, B, H, d)} for d in (device, larger))
    assert few <= many


# device, H -> the exchange of the best plan for LSTM, bf16, forward, B=16; None: it does not fit on the chip
BEST = {
    "H200": {32: "block", 48: "block", 64: "cluster", 256: "cluster", 512: "cluster", 768: "grid"}
    | {1024: "grid", 2048: "grid", 2560: None, 4096: None},
    "A100": {64: "block", 128: "block", 256: "grid", 512: "grid", 1024: "grid", 2048: None},
    "MIG slice": {48: "block", 64: "cluster", 256: "cluster", 1024: None},
    "24 SMs": {64: "block", 512: "grid", 1024: None, 2048: None},
    "no cooperative launch": {64: "block", 128: "block", 129: None, 512: None},
}


@pytest.mark.parametrize(
    ("device", "H", "expected"),
    [(device, H, name) for device, row in BEST.items() for H, name in row.items()],
)
def test_best_exchange(device, H, expected):
    plans = _testing.plan_persistent(persistent_pass("lstm"), 1, 16, H, DEVICES[device])
    assert (plans[0].exchange.name if plans else None) == expected


# device, H -> every exchange that can be forced there, for LSTM, bf16, forward, B=16
OFFERED = {
    ("H200", 10): {"block", "cluster"},  # a grid would have an empty slice
    ("H200", 128): {"block", "cluster", "grid"},
    ("H200", 129): {"cluster", "grid"},
    ("H200", 512): {"cluster", "grid"},
    ("H200", 1024): {"grid"},
    ("A100", 128): {"block", "grid"},
    ("A100", 512): {"grid"},
    ("MIG slice", 256): {"cluster", "grid"},
    ("no cooperative launch", 128): {"block"},
}


@pytest.mark.parametrize(("device", "H"), OFFERED)
def test_every_exchange_that_fits_is_offered(device, H):
    plans = _testing.plan_persistent(persistent_pass("lstm"), 1, 16, H, DEVICES[device])
    assert {plan.exchange.name for plan in plans} == OFFERED[device, H]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_every_kernel_has_each_exchange(cell, dtype, backward):
    kernel = persistent_pass(cell, dtype, backward)
    plans = _testing.plan_persistent(kernel, 2, 5, 70, DEVICES["H200"])
    assert {plan.exchange for plan in plans} == set(Exchange)


def test_cluster_that_is_not_granted_leaves_a_smaller_one():
    plans = _testing.plan_persistent(persistent_pass("lstm"), 1, 16, 256, DEVICES["H200"])
    assert {4, 8, 16} <= {plan.slices for plan in plans if plan.exchange is Exchange.cluster}


@pytest.mark.parametrize(("backward", "in_registers"), [(False, 1), (True, 0.75)])
def test_weights_stay_in_registers(backward, in_registers):
    """LSTM, H=512, bf16 over 16 blocks: all weights or most, and 16 sequences are two groups of 8."""
    kernel = persistent_pass("lstm", backward=backward)
    plans = _testing.plan_persistent(kernel, 1, 16, 512, DEVICES["H200"])
    plan = next(plan for plan in plans if plan.exchange is Exchange.cluster)
    assert plan.slices == 16
    assert kernel.register_steps >= in_registers * plan.k_steps_of_warp(kernel)
    assert plan.groups >= 2


def test_batch_is_split_while_the_device_has_room():
    """A group of eight sequences is the fastest, until there are more than the device can run at once."""
    for H, B in ((64, 1056), (256, 64), (512, 64), (1024, 16)):
        best = _testing.plan_persistent(persistent_pass("lstm"), 1, B, H, DEVICES["H200"])[0]
        assert (best.batch_tiles, best.groups) == (1, B // 8), (H, B)
    best = _testing.plan_persistent(persistent_pass("lstm"), 1, 64, 1024, DEVICES["H200"])[0]
    assert (best.batch_tiles, best.groups) == (4, 2)


def test_no_cluster_waits_for_another_where_there_is_a_better_plan():
    """What has no room at once takes twice the time; a cluster needs more room than its blocks alone."""
    whole = GpuDevice(multiprocessors=132, shared_bytes=227 * KIB, clusters=(66, 33, 16, 8), cooperative=True)
    for H, B, slices in ((256, 64, 16), (512, 64, 16), (128, 128, 8)):
        first = _testing.plan_persistent(persistent_pass("lstm"), 1, B, H, whole)[0]
        assert (first.exchange, first.slices, first.groups) == (Exchange.cluster, slices, 128 // slices)
        first = _testing.plan_persistent(persistent_pass("lstm"), 1, B, H, DEVICES["H200"])[0]
        assert first.slices != slices or first.exchange is Exchange.grid
        assert first.exchange is Exchange.grid or first.groups <= DEVICES["H200"].clusters_of(first.slices)


def test_groups_of_a_launch():
    """Blocks and clusters queue for the device; of a grid, all groups of a launch are resident."""
    for plan in _testing.plan_persistent(persistent_pass("lstm"), 12, 1000, 100, DEVICES["H200"]):
        if plan.exchange is Exchange.grid:
            assert plan.groups == 132 // plan.slices
        else:
            assert plan.groups == all_groups(plan, 12, 1000)


@pytest.mark.parametrize("sizes", [(0, 1, 64), (1, 0, 64), (1, 1, 0), (1, 1, -1)])
def test_nothing_to_run_has_no_plan(sizes):
    assert _testing.plan_persistent(persistent_pass("gru"), *sizes, DEVICES["H200"]) == []


def test_device_that_can_run_nothing():
    for shared_bytes, multiprocessors in ((0, 132), (48 * KIB, 0)):
        device = GpuDevice(
            multiprocessors=multiprocessors, shared_bytes=shared_bytes, clusters=CLUSTERS, cooperative=True
        )
        plans = _testing.plan_persistent(persistent_pass("lstm"), 1, 8, 512, device)
        assert plans == []


@pytest.mark.parametrize("N", [1, 64, MOST])
@pytest.mark.parametrize("B", [1, 64, MOST])
@pytest.mark.parametrize("H", [1, 100, 10**6, MOST])
def test_huge_sizes(N, B, H):
    """No overflow, and no loop as long as the sizes, which would not end."""
    kernel = persistent_pass("lstm", "tf32", backward=True)
    plans = _testing.plan_persistent(kernel, N, B, H, DEVICES["H200"])
    assert bool(plans) == (H <= 100)


@pytest.mark.parametrize(
    ("H", "B", "stepwise"), [(256, 16, False), (1024, 16, False), (1024, 64, False), (2048, 256, True)]
)
def test_large_batches_of_large_cells_go_step_by_step(H, B, stepwise):
    kernel = persistent_pass("lstm")
    plan = _testing.plan_persistent(kernel, 1, B, H, DEVICES["H200"])[0]
    assert _testing.stepwise_is_faster(plan, kernel, 1, B, H, DEVICES["H200"]) == stepwise
