"""Statistics and tables of the benchmarks, of a device and of the CPU.

Nothing here needs a device: timers are given.
"""
from __future__ import annotations

import math
import time
from typing import Any, Callable, Sequence

import numpy as np

# The contenders that others are compared with.
BUILT_IN = 'Chainer 7.8.1'
NO_HOOK = 'no hook'
DTYPES = {'float32': np.float32, 'float16': np.float16}


class Budget:
    """The seconds that are left; measuring stops when they are used up."""

    def __init__(
            self, seconds: float,
            clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        return self._end - self._clock()

    def share(self, fraction: float) -> Budget:
        """A budget of a part of what is left."""
        return Budget(self.left * fraction, self._clock)


def shape_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split('x')))


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and 20/80 percentiles of seconds, in microseconds."""
    low, median, high = np.percentile(values, [20, 50, 80]) * 1e6
    return {'median': float(median), 'p20': float(low), 'p80': float(high)}


def measure(
        steps: dict[str, Callable[[], Any]],
        timer: Callable[[Callable[[], Any], int], tuple[float, float]],
        budget: Budget, n_rounds: int = 10, seconds: float = 0.003,
        n_warm: int = 3,
) -> dict[str, dict[str, Any]]:
    """Times the steps in turn; a step that raises has its error instead.

    Args:
        steps: What is timed, by name.
        timer: Called with a step and a number of calls; returns the seconds a
            call takes by the wall clock and on the device.
        budget: Where it is over, what has no time has an error.
        n_rounds: Number of times each.
        seconds: Time of a round.
        n_warm: Number of calls, twice, before the first round.

    Returns:
        By name, the summaries ``wall`` and ``device`` and the ``least`` of
        the wall clock and all ``walls`` in microseconds, or ``error``.

    """
    times: dict[str, list[tuple[float, float]]] = {}
    errors: dict[str, str] = {}
    counts: dict[str, int] = {}
    for name, step in steps.items():
        try:
            if budget.left <= 0:
                raise TimeoutError('not measured: the time was up')
            timer(step, n_warm)  # compiles, and fills the memory pool
            wall, _ = timer(step, n_warm)
            counts[name] = max(1, min(500, int(seconds / max(wall, 1e-9))))
            times[name] = []
        except Exception as error:
            errors[name] = text_of(error)
    for _ in range(n_rounds):
        for name in list(times):
            if budget.left <= 0 and times[name]:
                continue
            try:
                times[name].append(timer(steps[name], counts[name]))
            except Exception as error:
                errors[name] = text_of(error)
                del times[name]
    result: dict[str, dict[str, Any]] = {}
    for name in steps:
        if name in errors:
            result[name] = {'error': errors[name]}
        else:
            walls, devices = zip(*times[name])
            result[name] = {
                'wall': summary(walls), 'device': summary(devices),
                'least': min(walls) * 1e6,
                'walls': [wall * 1e6 for wall in walls],
                'rounds': len(walls), 'calls': counts[name]}
    return result


def text_of(error: BaseException) -> str:
    """An error in one line that fits in a note."""
    text = ' '.join(str(error).split())
    return f'{type(error).__name__}: {text}'[:300]


# Tables

def number(x: float | None) -> str:
    """Three digits, without an exponent."""
    if x is None or not math.isfinite(x):
        return 'n/a'
    if x == 0:
        return '0'
    return f'{x:.{max(0, 2 - math.floor(math.log10(abs(x))))}f}'


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns are aligned, the first to the left."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return '\n'.join('  '.join(
        text.rjust(width) if i else text.ljust(width)
        for i, (text, width) in enumerate(zip(line, widths))).rstrip()
        for line in lines)


def markdown_table(
        header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ['---'] + ['---:'] * (len(header) - 1), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
