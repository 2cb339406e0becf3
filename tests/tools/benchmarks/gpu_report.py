"""The report of the benchmark for a device, and its tables.

A report is a dictionary, kept as JSON.  Several processes add to it, one after
the other, as PyTorch has one of its own.  Nothing here needs a device.
"""
from __future__ import annotations

import itertools
import json
import math
import pathlib
from typing import Any, Callable, Sequence

from tests.tools.benchmarks.report import (
    BUILT_IN,
    DTYPES,
    NO_HOOK,
    markdown_table,
    number,
    text_table,
)

PARTS = ('forward', 'backward', 'both')
CLOCKS = ('wall', 'device', 'graph')

PASSES = 4  # over the weight's bytes, in either direction

# What is asked of the contenders, by shape where it is not of all.
OURS = 'detached', 'exact'
BUILT_IN_GOALS = {
    '64x3x3x3': 8, '128x64x4x4': 8, '256x128x4x4': 8, '1024x1024x3x3': 2.4}
PYTORCH_GOAL = 2
FLOOR_GOALS = {'1024x1024x3x3': 1.5}


# The report

def new_report() -> dict[str, Any]:
    return {'machine': {}, 'bandwidth': None, 'weights': [],
            'models': [], 'sweep': [], 'notes': []}


def load(path: pathlib.Path | None) -> dict[str, Any]:
    """What earlier processes wrote, or an empty report."""
    report = new_report()
    if path is not None and path.exists():
        report.update(json.loads(path.read_text(encoding='utf-8')))
    return report


def entry(
        report: dict[str, Any], what: str, /, **key: Any) -> dict[str, Any]:
    """The one of these with these values; it is made where it is not."""
    for found in report[what]:
        if all(found[name] == value for name, value in key.items()):
            return found
    found = dict(key, contenders={})
    report[what].append(found)
    return found


def floor(nbytes: int, bandwidth: float | None) -> float:
    """The least microseconds of one direction, if memory were all that counts.

    Forward reads the weight for each of the two products and for Y, which it
    writes.  Backward reads W and gY for their product, and gY for gW, which
    it writes.

    Args:
        nbytes: Size of the weight.
        bandwidth: Bytes a second that a copy reads and writes.

    """
    return PASSES * nbytes / (bandwidth or math.nan) * 1e6


def over_floor(weight: dict[str, Any], contender: dict[str, Any]) -> float:
    """How many times the floor forward and backward take on the device."""
    least = weight.get('floor') or math.nan
    return (best_median(contender.get('both', {})) or math.nan) / (2 * least)


def best_median(part: dict[str, Any]) -> float | None:
    """The time that depends least on the host."""
    for clock in ('graph', 'device'):
        if clock in part:
            return part[clock]['median']
    return None


def crossing(
        sizes: Sequence[int], fused: Sequence[float],
        separate: Sequence[float]) -> int | None:
    """The largest size up to which fused kernels are never slower."""
    best = None
    for size, a, b in sorted(zip(sizes, fused, separate)):
        if a > b:
            break
        best = size
    return best


# Tables

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
          'both, 20 to 80 %', 'launches', 'extra MiB', 'over floor')


def weight_rows(weight: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table of one weight and dtype."""
    rows = []
    for name, contender in weight['contenders'].items():
        parts = [contender.get(part, {}) for part in PARTS]
        memory = contender.get('extra bytes')
        rows.append((
            name, *map(times_text, parts), spread(parts[-1]),
            launches_text(contender),
            number(None if memory is None else memory / 2 ** 20),
            number(over_floor(weight, contender))))
    return rows


def spread(part: dict[str, Any], unit: float = 1.0) -> str:
    wall = part.get('wall')
    return 'n/a' if wall is None else (
        f'{number(wall["p20"] / unit)} to {number(wall["p80"] / unit)}')


GOALS_HEADER = ('weight', 'MiB', 'contender', 'wall us', 'built-in over it',
                'PyTorch over it', 'device us', 'over floor')


def goal_text(
        value: float, goal: float | None, is_limit: bool = False) -> str:
    """A ratio, and whether it is what was asked for."""
    text = number(value)
    if goal is None:
        return text
    text += f' ({"at most" if is_limit else "at least"} {goal}'
    if math.isfinite(value):
        is_met = value <= goal if is_limit else value >= goal
        text += ': met' if is_met else ': missed'
    return text + ')'


def wall_of(weight: dict[str, Any], name: str) -> float:
    both = weight['contenders'].get(name, {}).get('both', {})
    return both.get('wall', {}).get('median', math.nan)


def goal_rows(weights: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """What is asked of ours in float32, beside what was measured."""
    rows = []
    for weight in weights:
        for name in OURS:
            contender = weight['contenders'].get(name)
            if weight['dtype'] != 'float32' or contender is None:
                continue
            shape, wall = weight['shape'], wall_of(weight, name)
            rows.append((
                shape, number(weight['nbytes'] / 2 ** 20), name, number(wall),
                goal_text(wall_of(weight, BUILT_IN) / wall,
                          BUILT_IN_GOALS.get(shape)),
                goal_text(wall_of(weight, 'PyTorch') / wall, PYTORCH_GOAL),
                number(best_median(contender.get('both', {}))),
                goal_text(over_floor(weight, contender),
                          FLOOR_GOALS.get(shape), True)))
    return rows


def goals_text(report: dict[str, Any]) -> str:
    """How many of them are met, in a line."""
    text = str(goal_rows(report['weights']))
    return (f'goals: {text.count(": met)")} met, '
            f'{text.count(": missed)")} missed')


MODEL_HEADER = ('contender', 'wall ms', '20 to 80 %', 'device ms',
                'added by it, wall ms', 'launches')


def model_rows(contenders: dict[str, Any]) -> list[tuple[str, ...]]:
    def wall(numbers: dict[str, Any]) -> float:
        return numbers.get('wall', {}).get('median', math.nan) / 1e3

    nothing = wall(contenders.get(NO_HOOK, {}))
    return [
        (name, number(wall(numbers)), spread(numbers, 1e3),
         number((best_median(numbers) or math.nan) / 1e3),
         'n/a' if name == NO_HOOK else number(wall(numbers) - nothing),
         str(numbers.get('kernels', 'n/a')))
        for name, numbers in contenders.items()]


def notes(report: dict[str, Any]) -> list[str]:
    """What could not be measured, and why; each reason once."""
    where: dict[str, list[str]] = {}
    for one in report['weights'] + report['models']:
        place = f'{one["shape"]} {one["dtype"]}' if 'shape' in one else (
            f'{one["kind"]} {one["name"]}')
        for name, contender in one['contenders'].items():
            found = dict(contender.get('notes', {}))
            for part in ('', *PARTS):
                numbers = contender.get(part, {}) if part else contender
                for key, what in (('error', part or 'all'),
                                  ('no graph', f'graph of {part or "all"}')):
                    if key in numbers:
                        found[what] = numbers[key]
            for what, error in found.items():
                where.setdefault(
                    f'{name}, {what}: {error}', []).append(place)
    lines = [f'{error} ({", ".join(places)})'
             for error, places in where.items()]
    return lines + report['notes']


def sweep_rows(sweep: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [(f'2^{int(math.log2(point["size"]))}', point['dtype'],
             times_text(point['fused']), times_text(point['separate']))
            for point in sweep]


def crossings(sweep: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each dtype and clock: up to where one block wins."""
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
                f'{dtype}, {clock}: one block is never slower up to '
                f'{"no" if size is None else size} entries')
    return lines


def render(
        report: dict[str, Any],
        table: Callable[[Sequence[str], Sequence[Sequence[str]]], str],
        title: Callable[[str], str]) -> str:
    """The report as text, with these tables and titles."""
    bandwidth = report['bandwidth'] or math.nan
    blocks = [
        title('Normalization of a weight on a CUDA device'),
        '\n'.join(f'* {key}: {value}'
                  for key, value in report['machine'].items()),
        f'K = 1. Times are medians in microseconds: wall clock, batch of '
        f'calls between two events, replay of the call as a CUDA graph. '
        f'Launches are forward + backward. "over floor" is the last of the '
        f'times of "both" over that of {PASSES} passes over the weight\'s '
        f'bytes in each direction, at the {number(bandwidth / 1e9)} GB/s, '
        f'read and written, of a large copy; what stays in the cache can be '
        f'below 1.']
    goals = goal_rows(report['weights'])
    if goals:
        blocks += [title('Goals'),
                   'Forward and backward, float32; "device" is the time that '
                   'depends least on the host.', table(GOALS_HEADER, goals)]
    for model in report['models']:
        blocks += [title(f'{model["kind"]}: {model["name"]}'),
                   table(MODEL_HEADER, model_rows(model['contenders']))]
    for weight in report['weights']:
        blocks += [
            title(f'{weight["shape"]}, {weight["dtype"]}'),
            f'A copy of it takes '
            f'{number(best_median(weight.get("copy", {})))} us, the floor of '
            f'one direction is {number(weight.get("floor"))} us.',
            table(HEADER, weight_rows(weight))]
    if report['sweep']:
        blocks += [
            title('One block or many'),
            f'Forward and backward of square weights, exact gradient. The '
            f'default is one block up to {report["fused size"]} entries.',
            table(('entries', 'dtype', 'one block us', 'many us'),
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
