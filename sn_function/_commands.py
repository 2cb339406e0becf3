"""The commands of :mod:`sn_function.cli`, by click.

Exit codes: 0, all is well; 1, an error, and nothing was written; 2, wrong
arguments; 3, ``inspect`` found a vector, or a weight, that cannot be used;
130, interrupted.

What imports Chainer is imported where it is used: so help, completion and
wrong arguments do not wait for it.
"""
from __future__ import annotations

import functools
import sys
from typing import Any, Callable, Sequence

import click

from sn_function import _options, _run, doctor
from sn_function._snapshots.defaults import LAYOUTS, N_WARMUP
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
      sn-function bake result/dis.npz plain.npz
      sn-function convert result/dis.npz dis.safetensors --to torch
      sn-function repair broken.npz repaired.npz
      sn-function repair plain.npz with-u.npz --add '*'
      sn-function run --hook train.py

    \b
    Exit codes:
      0  all is well
      1  an error; nothing was written
      2  wrong arguments
      3  inspect: a vector, or a weight, cannot be used
    130  interrupted; OUT is complete, or as it was
    """


def _reports_errors(command: Callable) -> Callable:
    """Turns an error of this package into a message and exit code 1."""
    @functools.wraps(command)
    def wrapper(**kwargs: Any) -> Any:
        from sn_function import errors
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
@_options.snapshots
@_options.model
@_options.axis
@click.option('--certify', is_flag=True,
              help='Add intervals that surely hold the norm, as a map of '
                   'images of every size, also of weights without a vector.')
@click.option('--rtol', type=click.FloatRange(0, min_open=True), default=1e-3,
              show_default=True, metavar='R',
              help='Width of these intervals, relative to the norm.')
@click.option('--time-limit', type=click.FloatRange(0), default=10.0,
              show_default=True, metavar='S',
              help='The most seconds of one; when they are over, it is wider.')
@_options.map_options
@_options.json
@_reports_errors
def inspect(
        snapshots: Sequence[str], as_json: bool, certify: bool, rtol: float,
        **settings: Any) -> None:
    """Report the norms and whether the vectors can be used.

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
    model has one, as after bake. All entries are read, and their checksums
    compared. The exit code is 3 if a vector, or a weight, cannot be used; of
    several files, 1 if one is not read, and the others are reported.

    \b
    Examples:
      sn-function inspect result/dis.npz
      sn-function inspect result/snapshot_iter_2000 --model dis
      sn-function inspect result/*.npz
      sn-function inspect result/dis.npz --json | jq '.[].sigma'
      sn-function inspect result/dis.npz --certify --stride 'convs/*/W=2'
    """
    from sn_function import _terminal, errors, snapshot
    found = {}
    for path in dict.fromkeys(snapshots):
        try:
            found[path] = snapshot.inspect(
                path, certify=rtol if certify else None,
                progress=_terminal.progress('Inspecting'), **settings)
        except errors.SnapshotError as e:
            sys.stdout.flush()  # in this order in one file, too
            click.ClickException(str(e)).show()
        else:
            if not as_json:
                _terminal.print_reports(path, found[path], len(found) > 1)
    if as_json and found:
        _terminal.print_json(found, as_list=len(snapshots) > 1)
    if len(found) < len(set(snapshots)):
        sys.exit(1)
    if not all(each.healthy for reports in found.values() for each in reports):
        sys.exit(UNHEALTHY)


@cli.command()
@_options.snapshot
@_options.out
@_options.iterations
@click.option('--n-warmup', type=click.IntRange(0),
              default=N_WARMUP, show_default=True, metavar='N',
              help="That of the hook; 0 for Chainer's own hook.")
@click.option('--factor', type=float, metavar='F',
              help='That of the hook.  [default: 1]')
@click.option('--eps', type=float, default=1e-6, show_default=True,
              metavar='E', help='That of the hook, the floor on sigma.')
@click.option('--cap', type=float, metavar='C',
              help='That of the hook: only norms above C are brought down.')
@_options.model
@_options.axis
@_options.map_options
@_options.rename
@_options.output_options
@_options.json
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
      sn-function bake result/dis.npz plain.npz -k 5
      sn-function bake result/snapshot_iter_2000 plain.npz --model dis
      sn-function bake gen.npz plain.npz --axis 'deconvs/*/W=1'
      sn-function bake flow.npz plain.npz --stride 1 --pad 1
    """
    from sn_function import _terminal, snapshot
    _terminal.print_outcome(snapshot.bake(
        snapshot_, out, progress=_terminal.progress('Baking'), **settings),
        as_json)


@cli.command()
@_options.snapshot
@_options.out
@click.option('--to', 'layout', required=True,
              type=click.Choice(LAYOUTS),
              help='chainer is also the layout of this package.')
@click.option('--converge', is_flag=True,
              help='Give each weight converged vectors, instead of those '
                   'that keep its norm in test mode as it is.')
@click.option('--fill/--no-fill', default=None,
              help='Make vectors for weights that have none, or leave them '
                   'so, as of layers without a hook. Where a model of '
                   'Chainer has them for some weights only, one is needed.')
@_options.iterations
@_options.model
@_options.axis
@_options.rename
@_options.output_options
@_options.json
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
      sn-function convert result/dis.npz dis.pt --to torch-parametrized
      sn-function convert dis.safetensors dis.npz --to chainer
      sn-function convert ResNetDiscriminator_450000.npz dis.npz --to chainer
      sn-function convert old.npz dis.npz --to chainer --fill
      sn-function convert result/dis.npz dis.h5 --to chainer
      sn-function convert dis.pt dis.npz --to chainer --rename main.0=l1
    """
    from sn_function import _terminal, snapshot
    _terminal.print_outcome(snapshot.convert(
        snapshot_, out, layout, progress=_terminal.progress('Converting'),
        **settings), as_json)


@cli.command()
@_options.snapshot
@_options.out
@click.option('--all', 'all_', is_flag=True,
              help='Replace every vector, not only those that need it.')
@click.option('add_u', '--add', metavar='PATTERN', multiple=True,
              help='Give a vector to the weights that have none and whose '
                   'entry fits the pattern, such as "*". May be repeated.')
@_options.axis
@_options.output_options
@_options.json
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
      sn-function repair snapshot_iter_9 snapshot_iter_9 --overwrite
      sn-function repair plain.npz with-u.npz --add 'convs/*/W'
    """
    from sn_function import _terminal, snapshot
    _terminal.print_outcome(snapshot.repair(
        snapshot_, out, all=all_, progress=_terminal.progress('Repairing'),
        **settings), as_json)


# The command line calls these two itself; here they are for help, completion
# and programs.

@cli.command('run', add_help_option=False, context_settings={
    'ignore_unknown_options': True, 'allow_interspersed_args': False})
@click.option('--hook', is_flag=True)
@click.option('--doctor', 'with_doctor', is_flag=True)
@click.argument('args', nargs=-1, type=click.Path(readable=False))
def run_(hook: bool, with_doctor: bool, args: Sequence[str]) -> None:
    """Run a program on today's Python, with Chainer repaired."""
    sys.exit(_run.main([
        *['--hook'] * hook, *['--doctor'] * with_doctor, *args]))


@cli.command('doctor')
@_options.json
def doctor_(as_json: bool) -> None:
    """Report what this machine has and what will not work."""
    sys.exit(doctor.main(['--json'] * as_json))
