"""``python -m tests.proof``: proves what needs no GPU, and writes down what was proven."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from . import compilation, document, suite, triton_kernels
from .compilation import ROOT, CompilationError, Unit
from .document import Proof, TritonProof
from .emulator import (
    PERSISTENT_KERNELS,
    PROGRAMS,
    STEPWISE_KERNELS,
    EmulatorError,
    Kernel,
    in_parallel,
    run,
)
from .mutation import Mutant, mutants, scan, verdict

T = TypeVar("T")
R = TypeVar("R")


def do_all(what: str, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The function's results, in order; shows how far it is."""
    items = list(items)
    return list(tqdm(in_parallel(function, items), what, len(items), ncols=80))


def prove_compilation(proof: Proof, units: Iterable[Unit]) -> None:
    for found in do_all("compiled", compilation.resources, units):
        proof.resources += found
    for r in proof.resources:
        if r.spills or r.stack or r.shared:
            proof.failures.append(
                f"{r.kernel or r.name} on sm_{r.architecture}: "
                f"{r.spills} bytes of spills, {r.stack} of stack, {r.shared} of static shared memory"
            )


def prove_results(proof: Proof, kernels: Iterable[Kernel]) -> None:
    calls = [call for kernel in kernels for call in suite.calls(kernel)]
    for call, found in zip(calls, do_all("emulated", run, calls), strict=True):
        proof.schedules[call.kernel] += sum(r["ok"] for r in found.runs)
        if found.finding:
            proof.failures.append(str(found))


def prove_mutations(proof: Proof, kernels: Iterable[Kernel]) -> None:
    proof.sites = scan()

    def of(kernel: Kernel) -> list[Mutant]:
        try:
            return mutants(kernel)
        except ValueError as error:
            proof.failures.append(str(error))
            return []

    all_mutants = list(chain.from_iterable(map(of, kernels)))
    verdicts = do_all("mutated", verdict, all_mutants)
    proof.verdicts = dict(zip(all_mutants, verdicts, strict=True))
    proof.failures += [f"not caught: {mutant}" for mutant, how in proof.verdicts.items() if not how]
    run_sites = {mutant.site: mutant.operation for mutant in all_mutants}
    for site in sorted(run_sites.items() ^ proof.sites.items()):
        where = "is run and was not found in the sources" if site[0] in run_sites else "is run by no kernel"
        proof.failures.append(f"{site[1]} at {site[0]} {where}")


def prove_cuda(quick: bool) -> Proof:
    proof = Proof(compilation.compiler_version(), compilation.architectures())
    if absent := [str(program) for program in PROGRAMS.values() if not program.exists()]:
        raise EmulatorError(f"not built (FUSEDRNN_EMULATOR=1): {', '.join(absent)}")
    persistent, stepwise = list(PERSISTENT_KERNELS), list(STEPWISE_KERNELS)
    if quick:
        proof.architectures = [a for a in proof.architectures if a.startswith("90")]
        persistent, stepwise = ([k for k in ks if k[2:] == ("lstm", "bf16")] for ks in (persistent, stepwise))
    units = [unit for a in proof.architectures for unit in compilation.units(a)]
    if quick:
        units = [unit for unit in units if unit[:2] in (("Lstm", "BFloat16"), ("", ""))]
    prove_results(proof, [*persistent, *stepwise])
    prove_mutations(proof, persistent)
    prove_compilation(proof, units)
    return proof


def prove_triton(quick: bool) -> TritonProof:
    proof = TritonProof(triton_kernels.versions())
    parts = triton_kernels.parts(proof.versions)
    if quick:
        parts = [part for part in parts if part[1:] == (90, "gru", True)]
    for found in do_all("compiled by triton", triton_kernels.rows, parts):
        proof.rows += found
    proof.failures += filter(None, map(triton_kernels.faults, proof.rows))
    return proof


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proof", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one cell of each for one architecture; writes to build/"
    )
    parser.add_argument("--only", choices=("cuda", "triton"), help="of the others, keep what was written")
    parser.add_argument("--output", type=Path, help="where to write (docs/proof.md)")
    options = parser.parse_args()
    cuda = triton = None
    try:
        if options.only != "triton":
            cuda = prove_cuda(options.quick)
        if options.only != "cuda":
            triton = prove_triton(options.quick)
    except (CompilationError, EmulatorError) as error:
        print(f"proof: {error}", file=sys.stderr)
        return 2
    output = options.output or (ROOT / "build" / "proof.md" if options.quick else ROOT / "docs" / "proof.md")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(document.text(cuda, triton, output.read_text() if output.exists() else ""))
    failures = [failure for proof in (cuda, triton) if proof for failure in proof.failures]
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    if cuda:
        caught, total = sum(map(bool, cuda.verdicts.values())), len(cuda.verdicts)
        print(f"{len(cuda.resources)} CUDA kernels compiled, {cuda.schedules.total()} schedules emulated,")
        print(f"{caught} of {total} mutants caught")
    if triton:
        print(f"{len(triton.rows)} Triton kernels compiled")
    print(f"{output}: {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
