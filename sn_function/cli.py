"""The command ``sn-function``, which is ``python -m sn_function``, too.

The commands are in :mod:`sn_function._commands`, but ``doctor`` is in
:mod:`sn_function.doctor`, and ``run`` in :mod:`sn_function._run`: these two
also run where the others cannot be imported.
"""
from __future__ import annotations

import errno
import io
import os
import sys

__all__ = ['main']

INTERRUPTED = 130


def main() -> int:
    """Runs the command line; returns or exits with its exit code."""
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):
            # Names in a file may have letters that the terminal lacks.
            stream.reconfigure(errors='backslashreplace')
    try:
        try:
            return _main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()      # so that its errors are seen here
    except KeyboardInterrupt:
        # Where eval was interrupted, as of a namedtuple, Python would end by
        # the signal in spite of the code, unless there is another one.
        eval('0')
        print('Interrupted', file=sys.stderr)
        return INTERRUPTED
    except OSError as e:
        if e.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # Nothing more is written, and Python has nothing left to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if e.errno == errno.ENOSPC:
            print(f'Error: standard output: {e.strerror}', file=sys.stderr)
        return 1


def _main() -> int:
    is_module = os.path.basename(sys.argv[0]) == '__main__.py'
    name = 'python -m sn_function' if is_module else 'sn-function'
    if sys.argv[1:2] == ['run']:
        from sn_function import _run
        return _run.main(sys.argv[2:])
    if sys.argv[1:2] == ['doctor']:
        from sn_function import doctor
        return doctor.main(sys.argv[2:], name)
    try:
        import click

        from sn_function import _commands
        try:
            return _commands.cli.main(
                prog_name=name, standalone_mode=False) or 0
        except click.ClickException as e:
            e.show()
            return e.exit_code
        except click.Abort as e:
            raise KeyboardInterrupt from e
    except ImportError as e:
        if (e.name or '').split('.')[0] not in ('click', 'rich'):
            raise
        print(f'Error: the command line needs the package {e.name}, which is '
              f'not installed. Install what it needs:\n\n'
              f'    pip install click rich', file=sys.stderr)
        return 1
