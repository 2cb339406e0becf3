"""What the commands print: tables and a progress bar, by rich, and JSON."""
from __future__ import annotations

import decimal
import json
import math
import sys
import time
from typing import Any, Callable, Iterable, Iterator, Sequence

import click
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from sn_function import errors
from sn_function.snapshot import Outcome, WeightReport

# Where there is no terminal to ask for its width, wide enough; also for
# intervals.
_WIDTH, _WIDE = 100, 120
_HOW_TO_ADD = (
    "For a model with hooks, sn-function repair SNAPSHOT OUT --add PATTERN "
    "makes them, or --add '*' all of them; deconvolutions need --axis.")


# Results

def print_reports(
        path: str, reports: Sequence[WeightReport], as_json: bool) -> None:
    if as_json:
        _print_json([{**report._asdict(), 'healthy': report.healthy}
                     for report in reports])
        return
    console = _console(
        _WIDE if any(report.certified for report in reports) else _WIDTH)
    console.print(_reports_table(errors.printable(path), reports))
    console.print(_reports_summary(reports), soft_wrap=True)


def print_outcome(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        _print_json({**outcome._asdict(), 'weights': [
            change._asdict() for change in outcome.weights]})
        return
    console = _console()
    console.print(_outcome_table(outcome))
    for what, keys in (
            ('Left out, as a file of this kind cannot hold them',
             outcome.left_out),
            ('Kept, though their names may differ there', outcome.unknown)):
        if keys:
            console.print(_printable(f'{what}: {", ".join(keys)}'),
                          soft_wrap=True)
    console.print(_printable(f'Written: {outcome.path}'), soft_wrap=True)


def _console(width: int | None = _WIDTH) -> Console:
    if sys.stdout.isatty():
        width = None
    return Console(width=width, highlight=False, emoji=False, markup=False)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(_strict(value), indent=2))


def _strict(value: Any) -> Any:
    """Replaces what JSON lacks: infinity and NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else 'inf'
    if isinstance(value, dict):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(each) for each in value]
    return value


# Tables

def _table(title: str, columns: str) -> Table:
    """Returns an empty table; ``>`` aligns a column to the right."""
    table = Table(title=Text(title), title_justify='left', box=box.SIMPLE)
    for name in columns.split(', '):
        if name.startswith('>'):
            table.add_column(name[1:], justify='right', no_wrap=True)
        else:
            table.add_column(name, overflow='fold')
    return table


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


def _reports_table(title: str, reports: Sequence[WeightReport]) -> Table:
    table = _table(
        title, 'weight, shape, >sigma, >estimate, >condition, >certified, '
        '>normalized, vector')
    for report in reports:
        style = {'ok': 'green', 'lags': 'yellow', 'stale': 'yellow',
                 'map': 'green', 'no vector': ''}.get(report.status, 'red')
        shape = '-' if report.shape is None else ' x '.join(
            map(str, report.shape))
        table.add_row(
            _printable(report.key), shape, _number(report.sigma),
            _number(report.estimate), _number(report.condition, '#.3g'),
            _interval(report.certified), _interval(report.normalized),
            _printable('; '.join(filter(None, (
                report.status, report.note))), style))
    _drop_empty(table, reports, 'certified', 'normalized')
    return table


def _drop_empty(table: Table, items: Sequence[Any], *names: str) -> None:
    """Removes columns that none of the items has a value for."""
    for name in names:
        if not any(getattr(item, name) for item in items):
            del table.columns[
                [column.header for column in table.columns].index(name)]


def _reports_summary(reports: Sequence[WeightReport]) -> Text:
    with_vector = [
        report for report in reports if report.status != 'no vector']
    layouts = ', '.join(sorted({report.layout for report in with_vector}))
    ill = sum(not report.healthy for report in reports)
    if not with_vector:
        return Text(f'There are no vectors. {_HOW_TO_ADD}')
    without = len(reports) - len(with_vector)
    rest = '' if not without else (
        f'\n{without} of {len(reports)} weights have no vector. '
        f'{_HOW_TO_ADD}')
    if ill:
        return Text(f'{ill} of {len(reports)} not healthy ({layouts}). '
                    f'sn-function repair makes vectors anew.{rest}', 'red')
    return Text(
        f'All {len(with_vector)} vectors can be used ({layouts}).{rest}')


def _outcome_table(outcome: Outcome) -> Table:
    table = _table('', 'weight, done, >sigma, >difference, note')
    table.title = None
    for change in outcome.weights:
        style = '' if change.action == 'kept' else 'green'
        table.add_row(
            _printable(change.key), Text(change.action, style),
            _number(change.sigma), _number(change.difference, '.1e'),
            _printable(change.note))
    _drop_empty(table, outcome.weights, 'difference', 'note')
    return table


# Progress

def progress(what: str) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """Returns what shows a bar, on a terminal, after the first second."""
    def pass_on(items: Iterable[Any]) -> Iterator[Any]:
        items, started = list(items), time.monotonic()
        bar = Progress(console=Console(stderr=True), transient=True,
                       disable=not sys.stderr.isatty())
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
