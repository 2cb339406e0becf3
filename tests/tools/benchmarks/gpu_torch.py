"""PyTorch's spectral normalization, for the benchmark for a device.

``python -m tests.tools.benchmarks.gpu_torch`` measures the parametrization,
as it is and compiled, and adds it to the report of
:mod:`tests.tools.benchmarks.gpu`.  It is a process of its own, without CuPy:
either brings its own libraries of CUDA.
"""
from __future__ import annotations

import gc
import sys
import time
from typing import Any, Callable, NamedTuple, Sequence

import numpy as np

from tests.tools.benchmarks.gpu_report import PARTS, entry
from tests.tools.benchmarks.gpu_run import GOAL_SHAPES, N_ROUNDS, Run
from tests.tools.benchmarks.report import (
    DTYPES,
    measure,
    shape_of,
    text_of,
)
from tests.tools.gpu.steps import NOT_HERE

# Compiling takes up to a minute a shape.
COMPILED_SHAPES = ('512x512x3x3', '64x3x3x3', '1024x1024x3x3')


class Contender(NamedTuple):
    """What is timed: calls without arguments."""

    forward: Callable[[], Any]
    backward: Callable[[], Any]
    both: Callable[[], Any]


def make_contender(
        W: np.ndarray, gY: np.ndarray, is_compiled: bool = False,
        device: str = 'cuda') -> Contender:
    """PyTorch's parametrization of a module that has that weight."""
    import torch

    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.from_numpy(W.copy()).to(device))
    gradient = torch.from_numpy(gY.copy()).to(device)
    torch.nn.utils.parametrizations.spectral_norm(module)
    original = module.parametrizations.weight.original
    if is_compiled:
        compiled = torch.compile(module.parametrizations.weight[0])

        def forward() -> Any:
            return compiled(original)
    else:
        def forward() -> Any:
            return module.weight

    def differentiate(Y: Any, retain_graph: bool) -> Any:
        return torch.autograd.grad(
            Y, original, gradient, retain_graph=retain_graph)

    Y = forward()
    return Contender(
        forward, lambda: differentiate(Y, True),
        lambda: differentiate(forward(), False))


def time_on_device(
        step: Callable[[], Any], n: int) -> tuple[float, float]:
    """Seconds of one of ``n`` calls: wall clock, and between two events."""
    import torch

    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before = time.perf_counter()
    start.record()
    for _ in range(n):
        step()
    stop.record()
    torch.cuda.synchronize()
    wall = time.perf_counter() - before
    return wall / n, start.elapsed_time(stop) / 1e3 / n


def extra_bytes(contender: Contender) -> int:
    """The peak of the bytes that forward and backward take, gW included."""
    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.both()
    return torch.cuda.max_memory_allocated() - before


class TorchRun(Run):

    name = 'gpu_torch'
    parts = 'eager', 'compile'

    def machine(self) -> dict[str, Any]:
        import torch

        return {'PyTorch': torch.__version__,
                'device': torch.cuda.get_device_name()}

    def clean(self) -> None:
        import torch

        gc.collect()
        torch.cuda.empty_cache()

    def eager(self) -> None:
        for dtype in DTYPES:
            for shape in GOAL_SHAPES:
                self.attempt(f'PyTorch, {shape} {dtype}', self.measure_weight,
                             shape, dtype, 'PyTorch')

    def compile(self) -> None:
        for shape in COMPILED_SHAPES:
            self.attempt(f'torch.compile, {shape}', self.measure_weight,
                         shape, 'float32', 'torch.compile')

    def measure_weight(self, shape: str, dtype: str, name: str) -> None:
        random = np.random.RandomState(0)
        W, gY = (random.normal(size=shape_of(shape)).astype(DTYPES[dtype])
                 for _ in range(2))
        weight = entry(self.report, 'weights', shape=shape, dtype=dtype)
        found = weight['contenders'][name] = {}
        try:
            contender = make_contender(
                W * DTYPES[dtype](0.05), gY, name == 'torch.compile')
        except Exception as error:
            found['error'] = text_of(error)
            return
        for part in PARTS:
            found[part] = measure(
                {'': getattr(contender, part)}, time_on_device, self.budget,
                N_ROUNDS)['']
        found['extra bytes'] = extra_bytes(contender)


def why_not() -> str | None:
    try:
        import torch
        return None if torch.cuda.is_available() else 'it sees no device'
    except Exception as error:
        return text_of(error)


def main(argv: Sequence[str] | None = None) -> None:
    args = TorchRun.parse_args(
        TorchRun.parser(__doc__.split('\n')[0]), argv)
    reason = why_not()
    if reason is not None:
        print(f'PyTorch: {reason}')
        sys.exit(NOT_HERE)
    TorchRun.main(args)


if __name__ == '__main__':
    main()
