"""Statistics and tables of the benchmarks, of a device and of the CPU.

Nothing here needs a device: timers are given, and reports are dictionaries.
"""
from __future__ import annotations

import itertools
import json
import math
import time
from typing import Any, Callable, Sequence

import numpy as np

DTYPES = {'float32': np.float32, 'float16': np.float16}
PARTS = ('forward', 'backward', 'both')
CLOCKS = ('wall', 'device', 'graph')


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


def floors(nbytes: int, bandwidth: float) -> dict[str, float]:
    """The least times in microseconds, if memory were all that counts.

    Forward reads the weight for each of the two products and for Y, which it
    writes.  Backward reads W and gY for their product, and gY for gW, which
    it writes; the exact gradient takes one more product.

    Args:
        nbytes: Size of the weight.
        bandwidth: Bytes a second that a copy reads and writes.

    """
    one = nbytes / bandwidth * 1e6
    return {'forward': 4 * one, 'backward, detached': 4 * one,
            'backward, exact': 5 * one}


def floor_of(
        name: str, part: str, least: dict[str, float]) -> float:
    """The floor of a part of what a contender does."""
    backward = least['backward, exact' if 'exact' in name
                     else 'backward, detached']
    return {'forward': least['forward'], 'backward': backward,
            'both': least['forward'] + backward}[part]


def best_median(part: dict[str, Any]) -> float | None:
    """The time that depends least on the host."""
    for clock in ('graph', 'device'):
        if clock in part:
            return part[clock]['median']
    return None


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


def crossing(
        sizes: Sequence[int], fused: Sequence[float],
        separate: Sequence[float]) -> int | None:
    """The largest size up to which the fused kernels are never slower."""
    best = None
    for size, a, b in sorted(zip(sizes, fused, separate)):
        if a > b:
            break
        best = size
    return best


# Tables

def number(x: float | None) -> str:
    """Three digits, without an exponent."""
    if x is None or not math.isfinite(x):
        return 'n/a'
    if x == 0:
        return '0'
    return f'{x:.{max(0, 2 - math.floor(math.log10(abs(x))))}f}'


def times_text(part: dict[str, Any]) -> str:
    """``wall / device / graph``, medians."""
    if 'wall' not in part:
        return 'n/a'
    return ' / '.join(
        number(part.get(clock, {}).get('median')) for clock in CLOCKS)


def launches_text(contender: dict[str, Any]) -> str:
    counts = [contender.get(part, {}).get('kernels')
              for part in ('forward', 'backward')]
    return ' + '.join('n/a' if n is None else str(n) for n in counts)


HEADER = ('contender', 'forward us', 'backward us', 'both us',
          'both, 20 to 80 %', 'launches', 'extra MiB', 'of floor')


def weight_rows(weight: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table of one weight and dtype."""
    rows = []
    for name, contender in weight['contenders'].items():
        parts = [contender.get(part, {}) for part in PARTS]
        wall = parts[-1].get('wall')
        time_us = best_median(parts[-1])
        least = floor_of(name, 'both', weight['floors'])
        memory = contender.get('extra bytes')
        rows.append((
            name, *map(times_text, parts),
            f'{number(wall["p20"])} to {number(wall["p80"])}' if wall
            else 'n/a',
            launches_text(contender),
            number(None if memory is None else memory / 2 ** 20),
            f'{number(100 * least / time_us)} %'
            if time_us and math.isfinite(least) else 'n/a'))
    return rows


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


def notes(report: dict[str, Any]) -> list[str]:
    """What could not be measured, and why; each reason once."""
    where: dict[str, list[str]] = {}
    for weight in report['weights']:
        for name, contender in weight['contenders'].items():
            found = dict(contender.get('notes', {}))
            for part in PARTS:
                error = contender.get(part, {}).get('error')
                if error:
                    found[part] = error
            if 'error' in contender:
                found['setup'] = contender['error']
            for what, error in found.items():
                places = where.setdefault(f'{name}, {what}: {error}', [])
                places.append(f'{weight["shape"]} {weight["dtype"]}')
    lines = [f'{error} ({", ".join(places)})'
             for error, places in where.items()]
    return lines + report.get('notes', [])


def sweep_rows(sweep: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [(f'2^{int(math.log2(point["size"]))}', point['dtype'],
             times_text(point['fused']), times_text(point['separate']))
            for point in sweep]


def crossings(sweep: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each dtype and clock: up to where fused kernels win."""
    lines = []
    for dtype, clock in itertools.product(DTYPES, CLOCKS):
        points = [point for point in sweep if point['dtype'] == dtype
                  and all(clock in point[how] for how in (
                      'fused', 'separate'))]
        if points:
            size = crossing(
                [point['size'] for point in points],
                *([point[how][clock]['median'] for point in points]
                  for how in ('fused', 'separate')))
            lines.append(
                f'{dtype}, {clock}: fused kernels are never slower up to '
                f'{"no" if size is None else size} entries')
    return lines


def render(
        report: dict[str, Any],
        table: Callable[[Sequence[str], Sequence[Sequence[str]]], str],
        title: Callable[[str], str]) -> str:
    """The report as text, with these tables and titles."""
    bandwidth = report['bandwidth']
    blocks = [
        title('Normalization of a weight on a CUDA device'),
        '\n'.join(f'* {key}: {value}'
                  for key, value in report['machine'].items()),
        f'K = 1. Times are medians in microseconds: wall clock, batch of '
        f'calls between two events, replay of the call as a CUDA graph. '
        f'Launches are forward + backward. "of floor" is the least time that '
        f'its traffic takes at the {number(bandwidth / 1e9)} GB/s, read and '
        f'written, of a large copy, over the last of the times of "both"; '
        f'what stays in the cache can be above 100 %. fused: one block for '
        f'each direction; the default up to '
        f'{report["fused size"]} entries.']
    for weight in report['weights']:
        copy = best_median(weight['copy'])
        blocks += [
            title(f'{weight["shape"]}, {weight["dtype"]}'),
            f'A copy of it takes {number(copy)} us; the floors are '
            + ', '.join(f'{number(value)} us ({name})'
                        for name, value in weight['floors'].items()) + '.',
            table(HEADER, weight_rows(weight))]
    if report['sweep']:
        blocks += [
            title('Fused kernels or not'),
            'Forward and backward of square weights, exact gradient.',
            table(('entries', 'dtype', 'fused us', 'not fused us'),
                  sweep_rows(report['sweep'])),
            '\n'.join(f'* {line}' for line in crossings(report['sweep']))]
    lines = notes(report)
    if lines:
        blocks += [title('Not measured'),
                   '\n'.join(f'* {line}' for line in lines)]
    return '\n\n'.join(blocks) + '\n'


def as_text(report: dict[str, Any]) -> str:
    return render(report, text_table, lambda text: f'== {text}')


def as_markdown(report: dict[str, Any]) -> str:
    titles = itertools.chain('#', itertools.repeat('##'))
    return render(
        report, markdown_table, lambda text: f'{next(titles)} {text}')


def as_json(report: dict[str, Any]) -> str:
    def strict(x: Any) -> Any:
        # NaN is not JSON.
        if isinstance(x, dict):
            return {key: strict(value) for key, value in x.items()}
        if isinstance(x, (list, tuple)):
            return [strict(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(strict(report), indent=1, default=str) + '\n'
