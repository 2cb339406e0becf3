"""Chainer repaired in other programs: ``run``, and :func:`install`.

All is in two environment variables, which children inherit.  PYTHONPATH begins
with :mod:`sn_function._children`, and SN_FUNCTION_HOOK says whether this
package's hook takes the place of Chainer's.

``run`` is then the same interpreter once more, by ``exec``: so arguments,
``__main__``, tracebacks, signals and the exit code are those of plain Python.
"""
from __future__ import annotations

import os
import sys

from sn_function import _compat

_DIRECTORY = os.path.join(
    os.path.dirname(os.path.abspath(__file__)), '_children')

_HELP = '''\
Usage: sn-function run [--hook] [--doctor] SCRIPT [ARGS]...
       sn-function run [--hook] [--doctor] -m MODULE [ARGS]...

  Run a program that uses Chainer, as python SCRIPT does, on today's Python
  and NumPy.

  Chainer is repaired before it is imported, there and in children: those of
  multiprocessing, by fork, spawn or forkserver, and others that are Python.
  SCRIPT may also be a directory, a zip file, - for standard input, or -c CODE.

Options:
  --hook      Put sn_function.SpectralNormalization in the place of
              chainer.link_hooks.SpectralNormalization.
  --doctor    First report on standard error what is repaired.
  -h, --help  Show this message and exit.

Examples:
  sn-function run train.py --gpu -1
  sn-function run --hook train.py --gpu -1
  sn-function run -m pytest tests
  python -O -m sn_function run train.py
  mpiexec -n 4 sn-function run train_mn.py'''


def install(hook: bool = False) -> None:
    """Has Chainer repaired here and in the processes that are started here.

    ``import sn_function`` repairs it in this process.  This function also has
    it repaired in those started later: workers of multiprocessing by ``spawn``
    and ``forkserver``, also where the main script does not import
    ``sn_function``, and other programs that are Python.  They inherit it in
    the environment variables ``PYTHONPATH`` and ``SN_FUNCTION_HOOK``, and
    their children from them; a process that gets another environment does not,
    nor one started with ``-E``, ``-I`` or ``-S``, nor by a server of
    ``forkserver`` that is running already.

    To call it again changes nothing, and ``install()`` does not take back
    what ``install(hook=True)`` did.  The command ``sn-function run``, in
    :doc:`cli`, does the same for a script that is not to be changed.

    Args:
        hook (bool): Put :class:`sn_function.SpectralNormalization` in the
            place of ``chainer.link_hooks.SpectralNormalization``, wherever it
            is imported from.  A hook that was added before stays as it is.

    Raises:
        HookInUseError: With ``hook``, a module has imported Chainer's hook
            already.  Nothing has been changed.

    .. admonition:: Example

        At the top of a program, before all that imports Chainer:

        .. code-block:: python

            import sn_function
            sn_function.install(hook=True)

            import chainer
            from chainer.link_hooks import SpectralNormalization    # ours

    """
    modules = _compat.replace_hook() if hook else []
    if modules:
        from sn_function import errors
        raise errors.HookInUseError(modules)
    os.environ.update(_environment(
        hook or os.environ.get('SN_FUNCTION_HOOK') == '1'))


def _environment(hook: bool) -> dict[str, str]:
    """What children find in theirs."""
    paths = os.environ.get('PYTHONPATH')
    others = paths.split(os.pathsep) if paths else []
    return {
        'PYTHONPATH': os.pathsep.join(
            [_DIRECTORY, *(path for path in others if path != _DIRECTORY)]),
        'SN_FUNCTION_HOOK': '1' if hook else '0'}


def main(args: list[str]) -> int:
    """Runs a program; returns an exit code only where it cannot.

    Args:
        args (list of str): What follows ``run`` on the command line.

    """
    args = list(args)
    options = set()
    while args and args[0] in ('--hook', '--doctor'):
        options.add(args.pop(0))
    if args and args[0] in ('-h', '--help'):
        print(_HELP)
        return 0
    trouble = _trouble(args)
    if trouble:
        print(f'Error: {trouble}', file=sys.stderr)
        return 2
    if '--doctor' in options:
        from sn_function import doctor
        print(doctor.describe(doctor.examine(['Chainer'])), file=sys.stderr,
              flush=True)
    return _execute(args, {
        **os.environ, **_environment('--hook' in options)})


def _trouble(args: list[str]) -> str | None:
    """What is wrong with the arguments, or with this interpreter."""
    if not args:
        return 'run what? Give a script, or -m and a module; see run --help.'
    if args[0].startswith('-') and args[0][:2] not in ('-', '-m', '-c'):
        return (f'run has no option {args[0]}; see run --help. One of Python '
                f'goes before -m: python -O -m sn_function run SCRIPT.')
    if sys.flags.ignore_environment or sys.flags.no_site:
        return ('with -E, -I or -S Python leaves out what run prepares. Run '
                'it without them.')
    return None


def _execute(args: list[str], environment: dict[str, str]) -> int:
    import subprocess
    flags = subprocess._args_from_interpreter_flags()  # type: ignore
    # It is for workers, and leaves out these.
    flags += [f'-X{name}' if value is True else f'-X{name}={value}'
              for name, value in sys._xoptions.items()]
    if sys.flags.interactive:
        flags.append('-i')
    if getattr(sys.stdout, 'write_through', False):
        flags.append('-u')
    command = [sys.executable, *flags, *args]
    if sys.platform == 'win32':     # its exec does not wait
        return subprocess.call(command, env=environment)
    return os.execve(sys.executable, command, environment)
