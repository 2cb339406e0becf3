"""The time of each kernel, as PyTorch's profiler sees it.

``python -m tests.tools.gpu.kernel_times FILE.md`` profiles forward and
backward of this package, of Chainer's hook and of PyTorch.  It is a process of
its own, into which PyTorch is imported before CuPy.
"""
from __future__ import annotations

import functools
import pathlib
import re
import sys
from typing import Any, Callable, Iterable

from tests.tools.benchmarks.report import markdown_table, number, text_of
from tests.tools.gpu.steps import NOT_HERE

N_CALLS = 10
PARTS = 'forward', 'backward'
ALL = 'all'
HEADER = 'part', 'kernel', 'launches', 'us each', 'us'


def short(name: str) -> str:
    """The name of a kernel without its return type and most templates."""
    name = re.sub(r'^void |\(anonymous namespace\)::|at::native::', '', name)
    return name.replace('|', '/')[:70]


def rows_of(
        part: str, events: Iterable[tuple[str, float]], n_calls: int
) -> list[tuple[str, ...]]:
    """A row for each kernel, in the order of their first launches, and a sum.

    Args:
        part: What was called.
        events: Name and microseconds of each launch.
        n_calls: In all of them.

    """
    times: dict[str, list[float]] = {}
    for name, us in events:
        times.setdefault(short(name), []).append(us)
    rows = [(part, name, number(len(us) / n_calls),
             number(sum(us) / len(us)), number(sum(us) / n_calls))
            for name, us in times.items()]
    all_times = [x for us in times.values() for x in us]
    return [*rows, (part, ALL, number(len(all_times) / n_calls), '',
                    number(sum(all_times) / n_calls))]


def profiled(torch: Any, step: Callable[[], Any]) -> list[tuple[str, float]]:
    """Name and microseconds of each launch and copy of some calls."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(N_CALLS):
            step()
        # Of the device, with all its streams.
        torch.cuda.synchronize()
    events = [event for event in profile.events()
              if event.device_type == torch.autograd.DeviceType.CUDA]
    if not events:
        raise RuntimeError('the profiler saw no kernel')
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us()) for event in events]


def rows_or_reason(
        torch: Any, make: Callable[[], Any]) -> list[tuple[str, ...]] | str:
    """The rows of the table of a contender, or why there are none."""
    try:
        contender = make()
        return [row for part in PARTS for row in rows_of(
            part, profiled(torch, getattr(contender, part)), N_CALLS)]
    except Exception as error:
        return text_of(error)


def main(path: pathlib.Path) -> int:
    try:
        import torch
        if not torch.cuda.is_available():
            raise RuntimeError('it sees no device')
    except Exception as error:
        print(f'PyTorch: {text_of(error)}')
        return NOT_HERE

    # After PyTorch: this imports CuPy.
    from tests.tools.benchmarks import gpu, gpu_torch

    sums: list[tuple[str, ...]] = []
    with path.open('w', encoding='utf-8') as f:
        def write(text: str) -> None:
            f.write(text + '\n')
            f.flush()

        write(f'# Kernel times, {torch.cuda.get_device_name()}, '
              f'PyTorch {torch.__version__}\n\n'
              f'Means of {N_CALLS} calls; float32, K = 1.')
        for shape in gpu.GOAL_SHAPES:
            W, gY = gpu.arrays(shape, 'float32')
            for name, make in {
                    **gpu.makers(W, gY),
                    'PyTorch': functools.partial(
                        gpu_torch.make_contender, W.get(), gY.get())}.items():
                found = rows_or_reason(torch, make)
                write(f'\n## {shape}, {name}\n')
                if isinstance(found, str):
                    write(found)
                    continue
                write(markdown_table(HEADER, found))
                sums.append((shape, name, *(
                    row[-1] for row in found if row[1] == ALL)))
        if sums:
            write('\n## All kernels, us\n\n' + markdown_table(
                ('weight', 'contender', *PARTS), sums))
    print(f'{len(sums)} tables')
    return 0 if sums else 1


if __name__ == '__main__':
    sys.exit(main(pathlib.Path(sys.argv[1])))
