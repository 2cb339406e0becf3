"""Arguments and options that several of :mod:`sn_function._commands` have."""
from __future__ import annotations

import contextlib
from typing import Any, Callable, Sequence

import click

# Completed by the shell; what is wrong with a file is found by the command.
_FILE = click.Path(readable=False)
snapshot = click.argument('snapshot_', metavar='SNAPSHOT', type=_FILE)
snapshots = click.argument(
    'snapshots', metavar='SNAPSHOT...', nargs=-1, required=True, type=_FILE)
out = click.argument('out', metavar='OUT', type=_FILE)


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


def _parse_renames(
        context: Any, parameter: Any, values: Sequence[str],
) -> dict[str, str]:
    renames = {}
    for value in values:
        old, is_there, new = value.partition('=')
        if not is_there:
            raise click.BadParameter(
                f'{value!r} is not OLD=NEW, such as "main.0=l1".')
        if old in renames:
            raise click.BadParameter(f'{old!r} is given twice.')
        renames[old] = new
    return renames


axis = click.option(
    '--axis', 'axes', metavar='PATTERN=N', multiple=True,
    callback=_parse_axes,
    help='Output axis of the weights whose entry fits the pattern: 1 for '
         'deconvolutions, else 0. Needed only where the shape and the vector '
         'leave it open. May be repeated; the first that fits counts.')


def _parse_numbers(
        context: Any, parameter: Any, values: Sequence[str],
) -> dict[str, Any] | None:
    numbers: dict[str, Any] = {}
    for value in values:
        pattern, _, text = value.rpartition('=')
        parts = text.split(',')
        if ('=' in value and not pattern) or not (
                all(part.isdecimal() for part in parts)
                or (parameter.name, text) == ('groups', 'depthwise')):
            raise click.BadParameter(
                f'{value!r} is not N or PATTERN=N, such as "convs/*/W=2".')
        numbers[pattern or '*'] = text if not text[0].isdecimal() else (
            int(text) if len(parts) == 1 else tuple(map(int, parts)))
    return numbers or None


def map_options(command: Callable) -> Callable:
    """Adds what a snapshot does not hold of convolutions."""
    for name, what in (
            ('groups', 'Their number of groups, or "depthwise".'),
            ('dilate', 'Their dilation.'),
            ('pad', "Their padding; only vectors of norm='operator' need it."),
            ('stride', 'Stride of the convolutions whose entry fits the '
             'pattern, or of all; 2,1 has one for each axis. May be '
             'repeated; the first that fits counts.')):
        command = click.option(
            f'--{name}', metavar='[PATTERN=]N', multiple=True,
            callback=_parse_numbers, help=what)(command)
    return command


rename = click.option(
    '--rename', metavar='OLD=NEW', multiple=True, callback=_parse_renames,
    help='New path for the entries below the path OLD in SNAPSHOT, in whole '
         'parts; dots and slashes are the same. May be repeated; the longest '
         'OLD that fits counts.')


def _models(context: Any, parameter: Any, incomplete: str) -> list[str]:
    """Returns the models of a trainer's snapshot, to complete a name."""
    from sn_function import errors
    from sn_function._snapshots import layouts, readers
    # An option that waits for its value ends the parser: all is in args then.
    given = context.params
    paths = [*context.args, given.get('snapshot_'),
             *(given.get('snapshots') or ())]
    path = next(filter(None, paths), '')
    with contextlib.suppress(
            errors.SnapshotError), readers.open_snapshot(path) as reader:
        return [name for name in layouts.models(reader.keys)
                if name.startswith(incomplete)]
    return []


model = click.option(
    '--model', metavar='NAME', shell_complete=_models,
    help="Only this model of a trainer's snapshot (updater/model:NAME), or "
         "what is below this path.")
iterations = click.option(
    '--n-power-iteration', '-k', type=click.IntRange(1), default=1,
    show_default=True, metavar='K',
    help='That of the hook, which a snapshot does not hold.')
json = click.option(
    '--json', 'as_json', is_flag=True, help='Print the result as JSON.')


def output_options(command: Callable) -> Callable:
    overwrite = click.option(
        '--overwrite', is_flag=True,
        help='Allow OUT to exist, or to be SNAPSHOT.')
    compress = click.option(
        '--compress/--no-compress', default=None,
        help='Of a .npz or HDF5 file.  [default: as SNAPSHOT is]')
    return compress(overwrite(command))
