from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import Dict, List, Sequence

from tests.tools import silent
from tests.tools.silent import ALL, outcome_now, outcome_of_chainer

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


def before(checkout: str, cases: Sequence[silent.Case]) -> List[str]:
    """What happens with the package of a checkout."""
    checkout = os.path.realpath(checkout)
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM, checkout, *(c.id for c in cases)],
        check=True, stdout=subprocess.PIPE, cwd=checkout,
        env={**os.environ, 'PYTHONPATH': checkout})
    result: List[str] = json.loads(done.stdout.decode().splitlines()[-1])
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m tests.tools.silent',
        description=silent.__doc__.splitlines()[0])
    parser.add_argument('--before', metavar='CHECKOUT')
    parser.add_argument('--only', default='', help='part of a name')
    args = parser.parse_args(argv)
    cases = [c for c in ALL if args.only in c.name or args.only in c.id]
    if args.before is None:
        title = "Chainer's hook"
        old = [outcome_of_chainer(c)[0] if c.theirs else '-' for c in cases]
    else:
        title = 'before'
        old = before(args.before, cases)
    print(f'| fault | {title} | now |')
    print('| --- | --- | --- |')
    wrong: Dict[str, str] = {}
    for c, text in zip(cases, old):
        now, ok = outcome_now(c)
        print(f'| {c.name} | {text} | {now} |', flush=True)
        if not ok:
            wrong[c.name] = now
    for name, now in wrong.items():
        print(f'wrong: {name}: {now}', file=sys.stderr)
    return bool(wrong)


if __name__ == '__main__':
    sys.exit(main())
