"""What the commands print: tables and a progress bar, by rich, and JSON.

A table has one line for each weight.  Where the terminal is too narrow for
it, each weight has a few lines of its own.  Either way its entry is in one
piece, to be copied.  In a pipe a line is as long as it needs to be.
"""
from __future__ import annotations

import decimal
import json
import math
import shlex
import shutil
import sys
import time
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

from rich.box import SIMPLE, Box
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from sn_function import errors, snapshot
from sn_function._snapshots import layouts
from sn_function.snapshot import Outcome, WeightReport

# SIMPLE, for terminals that have no such lines.
_ASCII = Box('    \n    \n -- \n    \n    \n    \n    \n    \n', ascii=True)
# The last column is folded down to so many characters.
_NOTE = 16
_NO_LIMIT = 1 << 16
# In fewer columns words would be broken, and what is indented left out.
_LEAST = 20
_STYLES = {'ok': 'green', 'lags': 'yellow', 'stale': 'yellow', 'map': 'green',
           'no vector': ''}
# How far a norm may be from 1 that is said to be 1.
_NEAR_1 = 0.01
# Of so many entries a command has the names.
_FEW = 3


# Results

def print_reports(
        path: str, reports: Sequence[WeightReport], is_next: bool) -> None:
    """Prints what a file has; if it is the next of several, after a gap."""
    console = _console()
    if is_next:
        _print(console, '')
    _print(console, _printable(path))
    _print_rows(
        console, 'weight, shape, >sigma, >estimate, >condition, >certified, '
        '>normalized, vector', map(_report_cells, reports))
    _print_summary(console, path, reports)


def print_outcome(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        _print_json({**outcome._asdict(), 'weights': [
            change._asdict() for change in outcome.weights]})
        return
    console = _console()
    _print_rows(console, 'weight, done, >sigma, >difference, note', (
        (_printable(change.key),
         Text(change.action, '' if change.action == 'kept' else 'green'),
         _number(change.sigma), _number(change.difference, '.1e'),
         _printable(change.note)) for change in outcome.weights))
    for what, keys in (
            ('Left out, as a file of this kind cannot hold them',
             outcome.left_out),
            ('Kept, though their names may differ there', outcome.unknown)):
        if keys:
            _print(console, _printable(f'{what}: {", ".join(keys)}'))
    _print(console, _printable(f'Written: {outcome.path}'))


def print_json(
        found: Mapping[str, Sequence[WeightReport]], as_list: bool) -> None:
    """Prints the reports of one file, or a list with the paths of several."""
    each = [{'path': path, 'weights': [
        {**report._asdict(), 'healthy': report.healthy} for report in reports]
        } for path, reports in found.items()]
    _print_json(each if as_list else each[0]['weights'])


def _print_json(value: Any) -> None:
    print(json.dumps(_strict(value), indent=2))


def _strict(value: Any) -> Any:
    """Replaces what JSON lacks: infinity and NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else 'inf'
    if isinstance(value, dict):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(each) for each in value]
    return value


# In words

def _print_summary(
        console: Console, path: str, reports: Sequence[WeightReport]) -> None:
    """Says what it comes to, and what to do."""
    n = len(reports)
    repair = f'sn-function repair {shlex.quote(path)} OUT'
    with_vector = [each for each in reports if each.status != 'no vector']
    kinds = ', '.join(sorted({each.layout for each in with_vector}))
    lost = sum(each.status == snapshot.LOST for each in reports)
    empty = sum(each.shape is None for each in reports)
    bad = sum(not each.healthy for each in reports) - lost - empty
    if lost:
        _say(console, f'{lost} of {n} weights lost: NaN or Inf in a weight '
             f'itself is beyond repair. Take an earlier snapshot.', 'red')
    if empty:
        _say(console, f'{empty} of {n} weights not initialized: call the '
             f'model once, and save it again.', 'red')
    if bad:
        _say(console, f'{bad} of {n} vectors cannot be used ({kinds}).'
             f'{"" if lost else " Make them anew:"}', 'red')
        if not lost:
            _print_command(console, repair)
    if with_vector and not lost + empty + bad:
        which = (f'All {len(with_vector)} vectors' if len(with_vector) > 1
                 else 'The vector')
        _say(console, f'{which} can be used ({kinds}).')
    without = [each.key for each in reports if each.status == 'no vector']
    if with_vector and without and not lost:
        _say(console, f'{len(without)} of {n} weights without a vector. If '
             f'the model has a hook there, make it:')
        is_short = len(without) <= _FEW and all(map(str.isprintable, without))
        keys = without if is_short else ['PATTERN']
        _print_command(console, ' '.join([repair, *(
            f'--add {shlex.quote(key)}' for key in keys)]))
    if not with_vector:
        near = sum(abs((each.sigma or 0) - 1) < _NEAR_1 for each in reports)
        if near == n:
            _say(console, f'There are no vectors. All norms are 1 to within '
                 f'{_NEAR_1:.0%}, as bake leaves them.')
            return
        _say(console, f'There are no vectors, and {near} of {n} norms are 1 '
             f'to within {_NEAR_1:.0%}. Deconvolutions need --axis PATTERN=1. '
             f'For a model with hooks, make the vectors:')
        # Of a trainer's snapshot it may be one model that was asked for.
        models = {layouts.model_of(each.key) for each in reports}
        pattern = f'{models.pop()}*' if len(models) == 1 else '*'
        _print_command(console, f'{repair} --add {shlex.quote(pattern)}')


def _report_cells(report: WeightReport) -> Sequence[str | Text]:
    shape = '-' if report.shape is None else ' x '.join(
        map(str, report.shape))
    return (_printable(report.key), shape, _number(report.sigma),
            _number(report.estimate), _number(report.condition, '#.3g'),
            _interval(report.certified), _interval(report.normalized),
            _printable('; '.join(filter(None, (report.status, report.note))),
                       _STYLES.get(report.status, 'red')))


def _number(x: float | None, form: str = '#.6g') -> str:
    return '-' if x is None else format(x, form)


def _interval(interval: tuple[float, float] | None) -> str:
    """Returns it in 6 digits, rounded outwards: so it still holds."""
    if interval is None or not all(map(math.isfinite, interval)):
        return '-'
    lo, hi = (
        float(decimal.Context(prec=6, rounding=rounding).create_decimal(x))
        for x, rounding in zip(
            interval, (decimal.ROUND_FLOOR, decimal.ROUND_CEILING)))
    return f'{_number(lo)} - {_number(hi)}'


def _printable(text: str, style: str = '') -> Text:
    return Text(errors.printable(text), style)


# Lines

def _console() -> Console:
    # That of COLUMNS or of the terminal, if there is one.
    width = shutil.get_terminal_size((_NO_LIMIT, 1)).columns or _NO_LIMIT
    return Console(width=max(width, _LEAST), highlight=False, emoji=False,
                   markup=False)


def _print(console: Console, what: Any, is_whole: bool = True) -> None:
    """Prints lines, without the spaces that rich adds at their ends.

    What is whole is not broken into lines here, but by the terminal.
    """
    with console.capture() as capture:
        console.print(what, soft_wrap=is_whole)
    for line in capture.get().splitlines():
        print(line.rstrip())


def _say(console: Console, text: str, style: str = '') -> None:
    _print(console, _printable(text, style), is_whole=False)


def _print_command(console: Console, command: str) -> None:
    _print(console, _printable(f'  {command}'))


def _print_rows(
        console: Console, columns: str,
        rows: Iterable[Sequence[str | Text]]) -> None:
    """Prints a table; ``>`` in front of a column aligns it to the right.

    The first column has the keys.  The last one may be folded.  A column
    without any value is left out.
    """
    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row]
             for row in rows]
    kept = [i for i, _ in enumerate(columns.split(', '))
            if any(row[i].plain not in ('', '-') for row in cells)]
    names = [columns.split(', ')[i] for i in kept]
    cells = [[row[i] for i in kept] for row in cells]
    table = Table(box=_ASCII if console.options.ascii_only else SIMPLE,
                  padding=(0, 0, 0, 1))
    for i, name in enumerate(names):
        width = max(row[i].cell_len for row in cells)
        is_last = kept[i] == len(columns.split(', ')) - 1
        table.add_column(
            name.lstrip('>'), justify='right' if name[0] == '>' else 'left',
            min_width=min(width, _NOTE) if is_last else width)
    for row in cells:
        table.add_row(*row)
    if Measurement.get(
            console, console.options.update(max_width=_NO_LIMIT),
            table).minimum <= console.width:
        _print(console, table, is_whole=False)
        return
    for row in cells:
        _print_block(console, names, row)
    _print(console, '')


def _print_block(
        console: Console, names: Sequence[str], row: Sequence[Text]) -> None:
    """Prints a row as a few lines, the first with its key alone."""
    _print(console, '')
    _print(console, Text('  ') + row[0])
    lines: list[Text] = []
    for name, cell in zip(names[1:], row[1:]):
        if cell.plain not in ('', '-'):
            part = Text(f'{name[1:]} ') + cell if name[0] == '>' else cell
            if lines and 4 + lines[-1].cell_len + 3 + part.cell_len <= (
                    console.width):
                lines[-1] += Text(', ') + part
            else:
                lines.append(part)
    for line in lines:
        _print(console, Padding(line, (0, 0, 0, 4)), is_whole=False)


# Progress

def progress(what: str) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """Returns what shows a bar, on a terminal, after the first second."""
    def pass_on(items: Iterable[Any]) -> Iterator[Any]:
        items, started = list(items), time.monotonic()
        console = Console(stderr=True)
        # At its end, a terminal that shows no bar would get an empty line.
        bar = Progress(console=console, transient=True, disable=(
            sys.stderr is None or not sys.stderr.isatty()
            or console.is_dumb_terminal))
        task = bar.add_task(f'{what} ...', total=len(items))
        try:
            for item in items:
                if time.monotonic() - started > 1:
                    bar.start()
                yield item
                bar.advance(task)
        finally:
            bar.stop()
    return pass_on
