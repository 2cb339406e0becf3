"""The commands of :mod:`sn_function.cli`, by click, and their tables.

Exit codes: 0, all is well; 1, an error, and nothing was written; 2, wrong
arguments; 3, ``inspect`` found something that ``repair`` is for.
"""
from __future__ import annotations

import functools
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

from sn_function import doctor, errors, snapshot
from sn_function._version import __version__

UNHEALTHY = 3
# Where there is no terminal to ask for its width, wide enough.
_WIDTH = 100
_LAYOUT_HELP = ', '.join(snapshot.LAYOUTS)


@click.group(context_settings={'help_option_names': ['-h', '--help']})
@click.version_option(__version__, prog_name='sn-function')
def cli() -> None:
    """Work on snapshots of models with spectral normalization.

    A SNAPSHOT is a file by Chainer's save_npz or save_hdf5, of a model or of
    a trainer, or a state dict of PyTorch in .npz, .safetensors or .pt.

    \b
    Examples:
      sn-function inspect result/dis.npz
      sn-function bake result/dis.npz dis-plain.npz
      sn-function convert dis.npz dis.safetensors --to torch
      sn-function repair broken.npz mended.npz

    \b
    Exit codes:
      0  all is well
      1  an error; nothing was written
      2  wrong arguments
      3  inspect: a vector or a weight is not healthy
    """


# Options of several commands

def _parse_axes(
        context: Any, parameter: Any, values: Sequence[str],
) -> dict[str, int]:
    axes = {}
    for value in values:
        pattern, _, axis = value.rpartition('=')
        if not pattern or not axis.isdecimal():
            raise click.BadParameter(
                f'{value!r} is not PATTERN=N, such as "deconv*/W=1".')
        axes[pattern] = int(axis)
    return axes


_axis = click.option(
    '--axis', 'axes', metavar='PATTERN=N', multiple=True,
    callback=_parse_axes,
    help='Output axis of the weights whose entry fits the pattern: 1 for '
         'deconvolutions, else 0. Needed only where the shape and the vector '
         'leave it open. May be repeated; the first that fits counts.')
_model = click.option(
    '--model', metavar='NAME',
    help="Only this model of a trainer's snapshot (updater/model:NAME), or "
         "what is below this path.")
_iterations = click.option(
    '--n-power-iteration', '-k', type=click.IntRange(1), default=1,
    show_default=True, metavar='K',
    help='That of the hook, which a snapshot does not hold.')
_json = click.option(
    '--json', 'as_json', is_flag=True, help='Print the result as JSON.')


def _output_options(command: Callable) -> Callable:
    for option in (
            click.option('--overwrite', is_flag=True,
                         help='Allow OUT to exist, or to be SNAPSHOT.'),
            click.option('--compress/--no-compress', default=None,
                         help='Of a .npz or HDF5 file.  [default: as '
                              'SNAPSHOT is]')):
        command = option(command)
    return command


def _tells_errors(command: Callable) -> Callable:
    """Turns an error of this package into a message and exit code 1."""
    @functools.wraps(command)
    def wrapper(**kwargs: Any) -> Any:
        try:
            return command(**kwargs)
        except errors.SpectralNormalizationError as e:
            raise click.ClickException(str(e)) from e
        except MemoryError as e:
            raise click.ClickException(
                'there is not enough memory for the largest weight. Nothing '
                'was written.') from e
    return wrapper


def _progress(what: str) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """A bar, on a terminal, if it takes longer than a second."""
    def progress(items: Iterable[Any]) -> Iterator[Any]:
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
    return progress


# Commands

@cli.command()
@click.argument('snapshot_', metavar='SNAPSHOT')
@_model
@_axis
@_json
@_tells_errors
def inspect(
        snapshot_: str, model: str | None, axes: dict[str, int],
        as_json: bool) -> None:
    """Tell the norm of each weight, and if its vector can be used.

    sigma is the largest singular value of the weight, in float64; estimate is
    what its vector u gives for it, which is what the weight is divided by.
    condition is sigma over the smallest singular value. The vector is

    \b
      ok              usable, and its estimate within 10% of sigma
      lags            usable; training, or repair --all, brings it up
      NaN, zero, ...  not usable: see repair

    All entries are read, and their checksums compared. The exit code is 3 if
    a vector is not usable.

    \b
    Examples:
      sn-function inspect dis.npz
      sn-function inspect result/snapshot_iter_2000 --model dis
      sn-function inspect dis.npz --json | jq '.[].sigma'
    """
    reports = snapshot.inspect(
        snapshot_, model=model, axes=axes, progress=_progress('Inspecting'))
    if as_json:
        _print_json([{**report._asdict(), 'healthy': report.healthy}
                     for report in reports])
    else:
        _print_reports(snapshot_, reports)
    if not all(report.healthy for report in reports):
        sys.exit(UNHEALTHY)


@cli.command()
@click.argument('snapshot_', metavar='SNAPSHOT')
@click.argument('out', metavar='OUT')
@_iterations
@click.option('--factor', type=float, metavar='F',
              help='That of the hook.  [default: 1]')
@click.option('--eps', type=float, default=1e-6, show_default=True,
              metavar='E', help='That of the hook, the floor on sigma.')
@click.option('--cap', type=float, metavar='C',
              help='That of the hook: only norms above C are brought down.')
@_model
@_axis
@_output_options
@_json
@_tells_errors
def bake(
        snapshot_: str, out: str, as_json: bool, **settings: Any) -> None:
    """Write the normalized weights, for a model without hooks.

    OUT has the weights that the model with the hook uses in test mode, bit
    for bit. Vectors and gammas are dropped, also from the state of an
    optimizer; all other entries are copied.

    \b
    Examples:
      sn-function bake dis.npz dis-plain.npz -k 5
      sn-function bake snapshot_iter_2000 gen.npz --model gen
      sn-function bake gen.npz plain.npz --axis 'deconvs/*/W=1'
    """
    _print_outcome(snapshot.bake(
        snapshot_, out, progress=_progress('Baking'), **settings), as_json)


@cli.command()
@click.argument('snapshot_', metavar='SNAPSHOT')
@click.argument('out', metavar='OUT')
@click.option('--to', 'layout', required=True,
              type=click.Choice(snapshot.LAYOUTS),
              help='chainer is also the layout of this package.')
@click.option('--converge', is_flag=True,
              help='Give each weight converged vectors, instead of those '
                   'that keep its norm in test mode as it is.')
@_iterations
@_model
@_axis
@_output_options
@_json
@_tells_errors
def convert(
        snapshot_: str, out: str, layout: str, as_json: bool,
        **settings: Any) -> None:
    """Convert between Chainer, sngan_projection and PyTorch.

    The kind of OUT is that of its extension: .npz, .h5, .safetensors or .pt;
    without one, that of SNAPSHOT. The other entries of a layer are renamed
    as well; those whose name is not known are told.

    \b
    Examples:
      sn-function convert dis.npz dis.pt --to torch-parametrized
      sn-function convert dis.safetensors dis.npz --to chainer
      sn-function convert ResNetDiscriminator_450000.npz dis.npz --to chainer
      sn-function convert dis.npz dis.h5 --to chainer
    """
    _print_outcome(snapshot.convert(
        snapshot_, out, layout, progress=_progress('Converting'),
        **settings), as_json)


@cli.command()
@click.argument('snapshot_', metavar='SNAPSHOT')
@click.argument('out', metavar='OUT')
@click.option('--all', 'all_', is_flag=True,
              help='Replace every vector, not only those that need it.')
@_axis
@_output_options
@_json
@_tells_errors
def repair(
        snapshot_: str, out: str, as_json: bool, all_: bool,
        **settings: Any) -> None:
    """Replace vectors that are NaN or zero by converged ones.

    So are those of the wrong length, and missing ones. A weight that holds
    NaN itself is lost: then nothing is written.

    \b
    Examples:
      sn-function repair broken.npz mended.npz
      sn-function repair snapshot_iter_2000 snapshot_iter_2000 --overwrite
    """
    _print_outcome(snapshot.repair(
        snapshot_, out, all=all_, progress=_progress('Repairing'),
        **settings), as_json)


@cli.command('doctor')
@_json
def doctor_(as_json: bool) -> None:
    """Tell what this machine has, and what will not work."""
    sys.exit(doctor.main(['doctor', *['--json'] * as_json]))


# Output

def _print_json(value: Any) -> None:
    click.echo(json.dumps(_strict(value), indent=2))


def _strict(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else 'inf'
    if isinstance(value, dict):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(each) for each in value]
    return value


def make_console(**kwargs: Any) -> Console:
    is_terminal = sys.stdout.isatty()
    return Console(width=None if is_terminal else _WIDTH, highlight=False,
                   emoji=False, markup=False, **kwargs)


def _table(title: str, columns: str) -> Table:
    """A table with the columns named; ``>`` aligns to the right."""
    table = Table(title=Text(title), title_justify='left', box=box.SIMPLE)
    for name in columns.split(', '):
        if name.startswith('>'):
            table.add_column(name[1:], justify='right', no_wrap=True)
        else:
            table.add_column(name, overflow='fold')
    return table


def _number(x: float | None, form: str = '#.6g') -> str:
    return '-' if x is None else format(x, form)


def _printable(text: str, style: str = '') -> Text:
    return Text(errors.printable(text), style)


def reports_table(
        title: str, reports: Sequence[snapshot.WeightReport]) -> Table:
    table = _table(
        title, 'weight, shape, >sigma, >estimate, >condition, vector')
    for report in reports:
        style = {'ok': 'green', 'lags': 'yellow'}.get(report.status, 'red')
        shape = '-' if report.shape is None else ' x '.join(
            map(str, report.shape))
        table.add_row(
            _printable(report.key), shape, _number(report.sigma),
            _number(report.estimate), _number(report.condition, '#.3g'),
            _printable('; '.join(filter(None, (
                report.status, report.note))), style))
    return table


def reports_summary(reports: Sequence[snapshot.WeightReport]) -> Text:
    layouts = ', '.join(sorted({report.layout for report in reports}))
    ill = sum(not report.healthy for report in reports)
    if ill:
        return Text(f'{ill} of {len(reports)} not healthy ({layouts}). '
                    f'sn-function repair makes vectors anew.', 'red')
    return Text(f'All {len(reports)} vectors can be used ({layouts}).')


def _print_reports(
        path: str, reports: Sequence[snapshot.WeightReport]) -> None:
    console = make_console()
    console.print(reports_table(errors.printable(path), reports))
    console.print(reports_summary(reports), soft_wrap=True)


def outcome_table(outcome: snapshot.Outcome) -> Table:
    table = _table('', 'weight, done, >sigma, >difference, note')
    table.title = None
    for change in outcome.weights:
        style = '' if change.action == 'kept' else 'green'
        table.add_row(
            _printable(change.key), Text(change.action, style),
            _number(change.sigma), _number(change.difference, '.1e'),
            _printable(change.note))
    for column, values in (('difference', 'difference'), ('note', 'note')):
        if not any(getattr(change, values) for change in outcome.weights):
            index = [each.header for each in table.columns].index(column)
            del table.columns[index]
    return table


def _print_outcome(outcome: snapshot.Outcome, as_json: bool) -> None:
    if as_json:
        _print_json({**outcome._asdict(), 'weights': [
            change._asdict() for change in outcome.weights]})
        return
    console = make_console()
    console.print(outcome_table(outcome))
    for what, keys in (
            ('Left out, as a file of this kind cannot hold them',
             outcome.left_out),
            ('Kept, though their names may differ there', outcome.unknown)):
        if keys:
            console.print(_printable(f'{what}: {", ".join(keys)}'),
                          soft_wrap=True)
    console.print(_printable(f'Written: {outcome.path}'), soft_wrap=True)
