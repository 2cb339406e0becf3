"""Reports what this machine has, what is repaired, and what does not work.

.. code-block:: console

    $ python -m sn_function doctor
    $ python -m sn_function doctor --json

It needs only the standard library, and looks at each part in a process of its
own: so it also reports packages that cannot be imported, or that end the
process.  The exit code is 0 if sn_function works on the CPU, and 1 if not.
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import textwrap
from typing import Any, Dict, List, Sequence

from sn_function import _probes
from sn_function._version import __version__

__all__ = ['describe', 'examine', 'main', 'probe']

_PROBES = pathlib.Path(_probes.__file__)
_WIDTH = 79
_SECONDS = 120


def probe(name: str) -> Dict[str, Any]:
    """What one of :data:`sn_function._probes.PROBES` finds."""
    # run_path leaves sys.path as it is in the user's own interpreter.  This
    # package is appended, so that it is found wherever it is.
    code = (f'import runpy, sys\n'
            f'sys.path.append({str(_PROBES.parents[1])!r})\n'
            f'sys.argv[:] = ["", {name!r}]\n'
            f'runpy.run_path({str(_PROBES)!r}, run_name="__main__")')
    package = _probes.PACKAGES.get(name, name.lower())
    try:
        done = subprocess.run(
            [sys.executable, '-c', code], capture_output=True,
            timeout=_SECONDS, env={**os.environ, 'PYTHONWARNINGS': 'ignore'})
    except subprocess.TimeoutExpired:
        how = f'does not return within {_SECONDS} seconds'
    else:
        lines = done.stdout.decode(errors='replace').splitlines()
        try:
            found = json.loads(lines[-1])
            return {'text': found['text'], **found}
        except (IndexError, KeyError, TypeError, ValueError):
            how = f'ends the process, with {done.returncode}'
    return {'text': 'installed',
            'trouble': [(f'{package}: importing it {how}',
                         _probes.advice(package))]}


def examine(names: Sequence[str] = tuple(_probes.PROBES)) -> Dict[str, Any]:
    """What the probes of these names find: the report that `--json` prints.

    Its key `mend` is a command that repairs what does not work.
    """
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        parts = dict(zip(names, pool.map(probe, names)))
    shims = [shim for part in parts.values()
             for shim in part.pop('shims', [])]
    return {
        'sn_function': __version__,
        'works': parts['Chainer'].pop('works', False),
        'parts': {name: part['text'] for name, part in parts.items()},
        'trouble': [{'what': what, 'mend': advice} for part in parts.values()
                    for what, advice in part['trouble']],
        'shims': [{'name': name, 'fault': fault, 'needed': needed}
                  for name, fault, needed in shims],
    }


def _columns(name: str, text: str, width: int) -> List[str]:
    """A name and, to the right of it, a text in lines."""
    indent = ' ' * (width + 2)
    lines = textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False)
    if len(name) >= width:
        return [f'  {name}', *lines]
    return [f'  {name:{width}}{lines[0].strip()}', *lines[1:]]


def describe(report: Dict[str, Any]) -> str:
    """The report in words, at most 79 columns wide."""
    works = 'works' if report['works'] else 'does not work'
    lines = [f'sn_function {report["sn_function"]} {works} here on the CPU',
             '']
    there = {name: text for name, text in report['parts'].items() if text}
    absent = [name for name in report['parts'] if name not in there]
    if absent:
        there['not there'] = ', '.join(absent)
    for name, text in there.items():
        lines += _columns(name, text, 13)
    if report['trouble']:
        lines += ['', 'What does not work, and what repairs it']
    for each in report['trouble']:
        lines += ['', *_columns('', each['what'], 0)[1:],
                  *('      ' + line for line in each['mend'].splitlines())]
    if report['shims']:
        lines += ['', 'What sn_function repairs in Chainer']
    needed = None
    for each in report['shims']:
        if each['needed'] != needed:
            needed = each['needed']
            lines += ['', f'  needed {needed}:']
        lines += _columns('  ' + each['name'], each['fault'], 22)
    return '\n'.join(lines)


def main(args: List[str], program: str = 'sn-function') -> int:
    """Prints the report; returns the exit code.

    `program` is the name of the command that `doctor` belongs to.
    """
    parser = argparse.ArgumentParser(
        prog=f'{program} doctor',
        description='Report what this machine has, what is repaired in '
                    'Chainer, and what does not work.')
    parser.add_argument('--json', action='store_true',
                        help='print it as JSON')
    options = parser.parse_args(args)
    report = examine()
    print(json.dumps(report, indent=2) if options.json else describe(report))
    return 0 if report['works'] else 1
