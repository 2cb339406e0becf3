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
    return [*rows, (part, 'all', number(len(all_times) / n_calls), '',
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


def table_of(torch: Any, make: Callable[[], Any]) -> str:
    """The table of a contender, or why there is none."""
    try:
        contender = make()
        rows = []
        for part in ('forward', 'backward'):
            rows += rows_of(
                part, profiled(torch, getattr(contender, part)), N_CALLS)
    except Exception as error:
        return text_of(error)
    return markdown_table(HEADER, rows)


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

    n_tables = 0
    with path.open('w', encoding='utf-8') as f:
        f.write(f'# Kernel times, {torch.cuda.get_device_name()}, '
                f'PyTorch {torch.__version__}\n\n'
                f'Means of {N_CALLS} calls; float32, K = 1.\n')
        for shape in gpu.GOAL_SHAPES:
            W, gY = gpu.arrays(shape, 'float32')
            to_make = {
                **gpu.makers(W, gY),
                'PyTorch': functools.partial(
                    gpu_torch.make_contender, W.get(), gY.get())}
            for name, make in to_make.items():
                text = table_of(torch, make)
                n_tables += text.startswith('|')
                f.write(f'\n## {shape}, {name}\n\n{text}\n')
                f.flush()
    print(f'{n_tables} tables')
    return 0 if n_tables else 1


if __name__ == '__main__':
    sys.exit(main(pathlib.Path(sys.argv[1])))
