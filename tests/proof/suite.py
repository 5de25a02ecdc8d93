"""The runs of every kernel in the emulator."""

from __future__ import annotations

from .emulator import SHAPES, Call, Kernel


def calls(kernel: Kernel) -> list[Call]:
    """Results under many schedules; bounds; races; and waits given up at any time.

    ThreadSanitizer takes a thousand times as long as the kernel: it gets the shape that is mutated.
    """
    shapes = [Call(kernel, shape) for shape in SHAPES[kernel.schedule]]
    if kernel.schedule == "stepwise":  # its threads never meet
        races = [shapes[0].with_(flavour="tsan", order="random")]
        return [*shapes, *races, *(call.with_(flavour="asan", order="random") for call in shapes)]
    plain = [call.with_(seeds=2) for call in shapes]
    bounds = [call.with_(flavour="asan") for call in shapes]
    races = [shapes[0].with_(flavour="tsan"), shapes[-1].with_(flavour="tsan", order="random")]
    impatient = [shapes[0].with_(seeds=4), shapes[-1], shapes[-1].with_(flavour="asan")]
    return [*plain, *bounds, *races, *(call.with_(impatient=True) for call in impatient)]
