"""The CUDA kernels on the CPU: their results under many schedules, and that nothing wrong goes unseen.

``make proof`` does the same for every kernel, and more of it: see tests/proof.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import pytest

from fusedrnn.cells import CELLS

from .proof import compilation
from .proof.emulator import (
    DTYPES,
    EXCHANGES,
    PASSES,
    PROGRAMS,
    SHAPES,
    STEPWISE_KERNELS,
    Call,
    EmulatorError,
    Kernel,
    Outcome,
    in_parallel,
    run,
    run_program,
)
from .proof.mutation import base, mutants, scan, verdict

# Each cell and dtype in some kernel, each exchange and pass with all.
MIXED = [
    Kernel(pass_, exchange, cell, dtype)
    for i, cell in enumerate(CELLS)
    for j, exchange in enumerate(EXCHANGES)
    for k, pass_ in enumerate(PASSES)
    for dtype in [DTYPES[(i + j + 2 * k) % len(DTYPES)]]
]


def run_all(calls: Iterable[Call]) -> list[Outcome]:
    """Their outcomes; every one must be right."""
    outcomes = list(in_parallel(run, calls))
    wrong = [str(outcome) for outcome in outcomes if outcome.finding]
    assert not wrong, "\n".join(wrong)
    return outcomes


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("cell", CELLS)
def test_equals_reference(cell, exchange):
    """In all dtypes, both passes and all shapes, under one schedule of each order."""
    kernels = [Kernel(pass_, exchange, cell, dtype) for pass_ in PASSES for dtype in DTYPES]
    outcomes = run_all(Call(kernel, shape) for kernel in kernels for shape in SHAPES[exchange])
    for outcome in outcomes:
        assert Counter(r["order"] for r in outcome.runs) == Counter(
            ["round_robin", "random", "starved_block", "starved_warp"]
        )


def test_stepwise_equals_reference():
    run_all(Call(kernel, shape) for kernel in STEPWISE_KERNELS for shape in SHAPES["stepwise"])


@pytest.mark.parametrize("kernel", MIXED[:12:2] + MIXED[1:12:2], ids=str)
def test_every_schedule_gives_the_same_bytes(kernel):
    run_all(Call(kernel, shape, seeds=12) for shape in SHAPES[kernel.schedule][::2])


def test_no_races():
    calls = [base(kernel).with_(flavour="tsan", order="random") for kernel in MIXED[:12]]
    run_all([*calls, Call(STEPWISE_KERNELS[0], SHAPES["stepwise"][1], "tsan", order="random")])


def test_all_accesses_are_in_bounds():
    run_all(
        Call(kernel, shape, "asan", order="random") for kernel in MIXED for shape in SHAPES[kernel.schedule]
    )
    run_all(
        Call(kernel, shape, "asan", order="random")
        for kernel in STEPWISE_KERNELS
        for shape in SHAPES["stepwise"]
    )


@pytest.mark.parametrize("flavour", ["plain", "asan"])
def test_a_wait_given_up(flavour):
    """The kernel ends, in bounds, whoever loses patience and when; and says that its results mean nothing."""
    calls = [
        Call(kernel, shape, flavour, seeds=2, impatient=True)
        for kernel in MIXED[:12]
        for shape in (SHAPES[kernel.schedule][0], SHAPES[kernel.schedule][-1])
    ]
    for call, outcome in zip(calls, run_all(calls), strict=True):
        given_up = [r["given_up"] for r in outcome.runs]
        assert any(given_up) == (call.kernel.schedule != "block")  # which waits for nobody


# fault -> how it is found, and what is said of it; by the plain program unless a flavour is named
FAULTS = {
    "unwritten": ("wrong result", r"out\[0\] is -?nan, not 1"),
    "past_shared": ("guard", "block 0 wrote past its shared memory"),
    "before_shared": ("guard", "block 0 wrote before its shared memory"),
    "past_global": ("guard", "a store outside the bounds of out"),
    "missing_threads": (
        "broken rule",
        r"block 0, thread 1: sync_block at faults.h:\d+, which 32 of 64 threads will never reach",
    ),
    "mixed_barriers": (
        "broken rule",
        r"sync_block at faults.h:\d+ while 32 of 64 threads are in sync_block at faults.h:\d+",
    ),
    "crossed_barriers": (
        "deadlock",
        r"sync_cluster at .* has 64 of 128 threads .* sync_block at .* has 32 of 64 threads of block 0",
    ),
    "partial_product": ("deadlock", "a product has 31 lanes of a warp of block 0"),
    "lost_flag": (
        "endless wait",
        r"flag_wait at faults.h:\d+ was given up in block 0 by thread 0 and 63 more: the flag is 0, not 1",
    ),
    "departed_peer": ("broken rule", r"remote_store at faults.h:\d+ to block 1, which has ended"),
    "unknown_barrier": ("broken rule", "the mbarrier's init need not be known here yet"),
    "second_init": ("broken rule", r"mbarrier_init at faults.h:\d+: there is an mbarrier already"),
    "surplus_arrival": (
        "broken rule",
        r"mbarrier_expect at faults.h:\d+: one arrival more than the phase has",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_finds(fault):
    outcome = run_program([str(PROGRAMS["plain"]), "--fault", fault])
    finding, words = FAULTS[fault]
    assert outcome.finding == finding
    assert re.search(words, outcome.report)


@pytest.mark.parametrize(
    ("flavour", "fault", "finding", "words"),
    [
        ("tsan", "race", "race", r"data race[\s\S]*faulty"),
        ("asan", "past_shared", "sanitizer", "use-after-poison"),
        ("asan", "before_shared", "sanitizer", "use-after-poison"),
        ("asan", "past_global", "sanitizer", "use-after-poison"),
    ],
)
def test_a_sanitizer_finds(flavour, fault, finding, words):
    outcome = run_program([str(PROGRAMS[flavour]), "--fault", fault])
    assert outcome.finding == finding
    assert re.search(words, outcome.report)


@pytest.mark.parametrize("flavour", PROGRAMS)
def test_no_fault_is_found_where_none_is(flavour):
    assert not run_program([str(PROGRAMS[flavour]), "--fault", "none", "--seeds", "4"]).finding


def test_names_what_was_waited_for():
    """A flag that is never set: which one, who waits, and which value it has."""
    site = next(site for site, operation in scan().items() if operation == "flag_set")
    outcome = run(Call(Kernel("forward", "grid", "gru", "bf16"), SHAPES["grid"][2], without=site))
    assert outcome.finding == "endless wait"
    assert re.search(
        r"flag_wait at exchange.h:\d+ was given up in block 0 .*: the flag is 0, not 1", outcome.report
    )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--cell elman", "--cell cannot be elman"),
        ("--wait 1", "no such option: --wait"),
        ("--T 0", "cannot be 0"),
        ("--H 17 --slices 1", "no kernel can have this plan"),
        ("--dtype fp64", "no persistent kernel of that dtype"),
        ("--fault gremlin", "--fault cannot be gremlin"),
        ("--without exchange.h:1", "nothing that orders memory was run at exchange.h:1"),
    ],
)
def test_refuses(options, why):
    with pytest.raises(EmulatorError, match=f"ended with 2: emulate: .*{why}"):
        run_program([str(PROGRAMS["plain"]), *options.split()])


def test_what_only_orders_has_no_weaker_form():
    site = next(site for site, operation in scan().items() if operation == "fence_mbarrier_init")
    call = Call(
        Kernel("forward", "cluster", "gru", "bf16"), SHAPES["cluster"][0], without=site, weakened=True
    )
    with pytest.raises(EmulatorError, match="fence_mbarrier_init has no weaker form"):
        run(call)


def test_no_race_is_looked_for_where_waits_are_given_up():
    with pytest.raises(EmulatorError, match="a wait that was given up orders nothing"):
        run(base(MIXED[0]).with_(flavour="tsan", impatient=True))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_no_operation_is_needless(exchange):
    """Of two cells; ``make proof`` takes all of them."""
    kernels = (Kernel("forward", exchange, "lstm", "bf16"), Kernel("backward", exchange, "gru", "fp32"))
    changed = [mutant for kernel in kernels for mutant in mutants(kernel)]
    survivors = [str(m) for m, how in zip(changed, in_parallel(verdict, changed), strict=True) if not how]
    assert len(changed) > 10
    assert not survivors


def test_every_operation_is_run():
    kernels = [Kernel(pass_, exchange, "lstm", "bf16") for pass_ in PASSES for exchange in EXCHANGES]
    assert {m.site: m.operation for kernel in kernels for m in mutants(kernel)} == scan()


def test_ptxas_spills_nothing():
    """The instantiation that needs the most registers; ``make proof`` takes all of them."""
    try:
        compilation.compiler()
    except compilation.CompilationError as error:
        pytest.skip(str(error))
    found = compilation.resources(compilation.Unit("Lstm", "BFloat16", "90a"))
    assert len(found) == len(PASSES) * len(EXCHANGES)
    assert [r for r in found if r.spills or r.stack or r.shared] == []
    assert max(r.registers for r in found) <= 255
