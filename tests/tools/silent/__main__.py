from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import Sequence

from tests.tools import silent
from tests.tools.silent import ALL, outcome_now, outcome_of_chainer
from tests.tools.tables import show

ROOT = str(pathlib.Path(__file__).resolve().parents[3])
# The package is that of the checkout, and the cases are those of this one.
PROGRAM = f'''
import json, sys
sys.path.insert(0, sys.argv[1])
import sn_function
assert sn_function.__file__.startswith(sys.argv[1]), sn_function.__file__
sys.path.insert(0, {ROOT!r})
from tests.tools.silent import ALL, outcome_now
print(json.dumps([outcome_now(c)[0] for c in ALL if c.id in sys.argv[2:]]))
'''


def before(checkout: str, cases: Sequence[silent.Case]) -> list[str]:
    """What happens with the package of a checkout."""
    checkout = os.path.realpath(checkout)
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM, checkout, *(c.id for c in cases)],
        check=True, stdout=subprocess.PIPE, cwd=checkout,
        env={**os.environ, 'PYTHONPATH': checkout})
    result: list[str] = json.loads(done.stdout.decode().splitlines()[-1])
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m tests.tools.silent',
        description=silent.__doc__.splitlines()[0])
    parser.add_argument('--before', metavar='CHECKOUT')
    parser.add_argument('--only', default='', help='part of a name')
    parser.add_argument('--rst', action='store_true', help='as in the docs')
    args = parser.parse_args(argv)
    cases = [c for c in ALL if args.only in c.name or args.only in c.id]
    if args.before is None:
        title = "Chainer's hook"
        old = [outcome_of_chainer(c)[0] if c.theirs else '-' for c in cases]
    else:
        title = 'before'
        old = before(args.before, cases)
    outcomes = [outcome_now(c) for c in cases]
    show([('fault', title, 'now', 'test'), *(
        (c.name, text, now, f'`{c.id}`')
        for c, text, (now, _) in zip(cases, old, outcomes))], args.rst)
    wrong = [c.name for c, (_, ok) in zip(cases, outcomes) if not ok]
    for name in wrong:
        print(f'wrong: {name}', file=sys.stderr)
    return bool(wrong)


if __name__ == '__main__':
    sys.exit(main())
