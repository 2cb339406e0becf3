"""The commands of :mod:`sn_function.cli`, by click.

Exit codes: 0, all is well; 1, an error, and nothing was written; 2, wrong
arguments; 3, ``inspect`` found something that ``repair`` is for.
"""
from __future__ import annotations

import functools
import sys
from typing import Any, Callable, Sequence

import click

from sn_function import _run, doctor, errors, snapshot
from sn_function._terminal import print_outcome, print_reports, progress
from sn_function._version import __version__

UNHEALTHY = 3


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
      sn-function repair broken.npz repaired.npz
      sn-function repair plain.npz with-u.npz --add '*'
      sn-function run --hook train.py

    \b
    Exit codes:
      0  all is well
      1  an error; nothing was written
      2  wrong arguments
      3  inspect: a vector or a weight is not healthy, or there is no vector
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


_axis = click.option(
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


def _map_options(command: Callable) -> Callable:
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


_rename = click.option(
    '--rename', metavar='OLD=NEW', multiple=True, callback=_parse_renames,
    help='New path for the entries below the path OLD in SNAPSHOT, in whole '
         'parts; dots and slashes are the same. May be repeated; the longest '
         'OLD that fits counts.')
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
    overwrite = click.option(
        '--overwrite', is_flag=True,
        help='Allow OUT to exist, or to be SNAPSHOT.')
    compress = click.option(
        '--compress/--no-compress', default=None,
        help='Of a .npz or HDF5 file.  [default: as SNAPSHOT is]')
    return compress(overwrite(command))


def _reports_errors(command: Callable) -> Callable:
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


# Commands

@cli.command()
@click.argument('snapshot_', metavar='SNAPSHOT')
@_model
@_axis
@click.option('--certify', is_flag=True,
              help='Add intervals that surely hold the norm, as a map of '
                   'images of every size, also of weights without a vector.')
@click.option('--rtol', type=click.FloatRange(0, min_open=True), default=1e-3,
              show_default=True, metavar='R',
              help='Width of these intervals, relative to the norm.')
@click.option('--time-limit', type=click.FloatRange(0), default=10.0,
              show_default=True, metavar='S',
              help='The most seconds of one; when they are over, it is wider.')
@_map_options
@_json
@_reports_errors
def inspect(
        snapshot_: str, as_json: bool, certify: bool, rtol: float,
        **settings: Any) -> None:
    """Report the norm of each weight and whether its vector can be used.

    sigma is the largest singular value of the weight, in float64; estimate is
    what its vector u gives for it, which is what the weight is divided by in
    test mode, by a hook with the default settings. condition is sigma over
    the smallest singular value. The vector is

    \b
      ok              usable, and its estimate within 10% of sigma
      lags            usable; training, or repair --all, brings it up
      stale           of another weight: the hook iterates first, in each
                      call, unless n_warmup is 0; repair --all ends that
      map             of norm='operator'; its estimate needs --stride, --pad
      no vector       there is none: see repair --add
      NaN, zero, ...  not usable: see repair

    With --certify, certified is an interval that surely holds the norm of
    the weight as a map of images of every size, and normalized that of the
    weight as test mode uses it. Its upper end also holds for any stride,
    dilation and groups; give them for a tight one.

    Weights of a model without any vector are listed with --certify, or if no
    model has one. All entries are read, and their checksums compared. The
    exit code is 3 if a vector is not usable, or if there is none and
    --certify is not given.

    \b
    Examples:
      sn-function inspect dis.npz
      sn-function inspect result/snapshot_iter_2000 --model dis
      sn-function inspect dis.npz --json | jq '.[].sigma'
      sn-function inspect dis.npz --certify --stride 'convs/*/W=2'
    """
    reports = snapshot.inspect(
        snapshot_, certify=rtol if certify else None,
        progress=progress('Inspecting'), **settings)
    print_reports(snapshot_, reports, as_json)
    have_none = all(report.status == 'no vector' for report in reports)
    if (have_none and not certify) or not all(
            report.healthy for report in reports):
        sys.exit(UNHEALTHY)


@cli.command()
@click.argument('snapshot_', metavar='SNAPSHOT')
@click.argument('out', metavar='OUT')
@_iterations
@click.option('--n-warmup', type=click.IntRange(0),
              default=snapshot.N_WARMUP, show_default=True, metavar='N',
              help="That of the hook; 0 for Chainer's own hook.")
@click.option('--factor', type=float, metavar='F',
              help='That of the hook.  [default: 1]')
@click.option('--eps', type=float, default=1e-6, show_default=True,
              metavar='E', help='That of the hook, the floor on sigma.')
@click.option('--cap', type=float, metavar='C',
              help='That of the hook: only norms above C are brought down.')
@_model
@_axis
@_map_options
@_rename
@_output_options
@_json
@_reports_errors
def bake(
        snapshot_: str, out: str, as_json: bool, **settings: Any) -> None:
    """Write the normalized weights, for a model without hooks.

    OUT has the weights that the model with the hook uses in test mode, bit
    for bit. Vectors and gammas are dropped, also from the state of an
    optimizer; all other entries are copied. Weights with a vector of
    norm='operator' need --stride and --pad, as their layers have them.

    \b
    Examples:
      sn-function bake dis.npz dis-plain.npz -k 5
      sn-function bake snapshot_iter_2000 gen.npz --model gen
      sn-function bake gen.npz plain.npz --axis 'deconvs/*/W=1'
      sn-function bake flow.npz plain.npz --stride 1 --pad 1
    """
    print_outcome(snapshot.bake(
        snapshot_, out, progress=progress('Baking'), **settings), as_json)


@cli.command()
@click.argument('snapshot_', metavar='SNAPSHOT')
@click.argument('out', metavar='OUT')
@click.option('--to', 'layout', required=True,
              type=click.Choice(snapshot.LAYOUTS),
              help='chainer is also the layout of this package.')
@click.option('--converge', is_flag=True,
              help='Give each weight converged vectors, instead of those '
                   'that keep its norm in test mode as it is.')
@click.option('--fill/--no-fill', default=None,
              help='Make vectors for weights that have none, or leave them '
                   'so, as of layers without a hook. Where a model of '
                   'Chainer has them for some weights only, one is needed.')
@_iterations
@_model
@_axis
@_rename
@_output_options
@_json
@_reports_errors
def convert(
        snapshot_: str, out: str, layout: str, as_json: bool,
        **settings: Any) -> None:
    """Convert between Chainer, sngan_projection and PyTorch.

    The kind of OUT is that of its extension: .npz, .h5, .safetensors or .pt;
    without one, that of SNAPSHOT. The other entries of a layer are renamed
    as well; those whose name is not known are listed. Weights with a vector
    of norm='operator' stay as they are, and have no place but in chainer.

    \b
    Examples:
      sn-function convert dis.npz dis.pt --to torch-parametrized
      sn-function convert dis.safetensors dis.npz --to chainer
      sn-function convert ResNetDiscriminator_450000.npz dis.npz --to chainer
      sn-function convert old.npz dis.npz --to chainer --fill
      sn-function convert dis.npz dis.h5 --to chainer
      sn-function convert dis.pt dis.npz --to chainer --rename main.0=l1
    """
    print_outcome(snapshot.convert(
        snapshot_, out, layout, progress=progress('Converting'),
        **settings), as_json)


@cli.command()
@click.argument('snapshot_', metavar='SNAPSHOT')
@click.argument('out', metavar='OUT')
@click.option('--all', 'all_', is_flag=True,
              help='Replace every vector, not only those that need it.')
@click.option('add_u', '--add', metavar='PATTERN', multiple=True,
              help='Give a vector to the weights that have none and whose '
                   'entry fits the pattern, such as "*". May be repeated.')
@_axis
@_output_options
@_json
@_reports_errors
def repair(
        snapshot_: str, out: str, as_json: bool, all_: bool,
        **settings: Any) -> None:
    """Replace vectors that are NaN or zero by converged ones.

    So are those of the wrong length, and missing ones. A weight that holds
    NaN itself is lost: then nothing is written. A vector of norm='operator'
    is left out instead: the hook makes it in its next call.

    A snapshot of a model without hooks has no vectors, so it does not load
    into one with hooks; --add makes them.

    \b
    Examples:
      sn-function repair broken.npz repaired.npz
      sn-function repair snapshot_iter_2000 snapshot_iter_2000 --overwrite
      sn-function repair plain.npz with-u.npz --add 'convs/*/W'
    """
    print_outcome(snapshot.repair(
        snapshot_, out, all=all_, progress=progress('Repairing'),
        **settings), as_json)


@cli.command('run', add_help_option=False, context_settings={
    'ignore_unknown_options': True, 'allow_interspersed_args': False})
@click.argument('args', nargs=-1, type=click.UNPROCESSED)
def run_(args: Sequence[str]) -> None:
    """Run a program on today's Python, with Chainer repaired."""
    sys.exit(_run.main(list(args)))


@cli.command('doctor')
@_json
def doctor_(as_json: bool) -> None:
    """Report what this machine has and what will not work."""
    sys.exit(doctor.main(['doctor', *['--json'] * as_json]))
