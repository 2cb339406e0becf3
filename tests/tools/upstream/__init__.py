"""``make upstream CHAINER=DIR``: Chainer's own tests, on the stack of today.

They are run as Chainer's CI runs them on the CPU, with its marks and its
filters of warnings, and with `sn_function` imported first.  What is tested is
the installed Chainer; its tests are those of DIR, a checkout of the same
version.

Some tests cannot pass: :mod:`.expected` names them, with the reason and whose
it is.  Any other failure is an error, and so is a test that is expected to
fail and passes.  :mod:`.plugin` says what is lent to the tests.  Random
numbers start from the same seed in each test, so a run can be repeated.

Without ``--stack`` the stack is that of the interpreter which runs this.
``--stack 3.8/1.17.3 3.13/newest`` makes environments of CPython and NumPy, as
``make matrix`` does, under ``.cache/matrix``.
"""
from __future__ import annotations

import re
from typing import Dict, NamedTuple, Sequence, Tuple

from sn_function._compat import pkg_resources

PASSED, FAILED, SKIPPED = 'passed', 'failed', 'skipped'

# A name of a test, an outcome, and the error.
Outcomes = Dict[str, Tuple[str, str]]


class Expected(NamedTuple):
    """Failures of one reason.

    A test matches if its name has one of `tests`, where ``*`` is any text, and
    its error has the text `error`.
    """

    whose: str                  # Chainer's, ours or the test's
    reason: str
    tests: Sequence[str]
    error: str = ''
    needs: Sequence[str] = ()   # 'numpy>=2', 'python<3.13': all of them

    def names(self, test: str) -> bool:
        return any(
            re.search('.*'.join(map(re.escape, pattern.split('*'))), test,
                      re.DOTALL)
            for pattern in self.tests)

    def applies(self, versions: dict[str, str]) -> bool:
        def fulfils(need: str) -> bool:
            name, specifier = re.fullmatch(  # type: ignore[union-attr]
                r'(\w+)(.*)', need).groups()
            return name in versions and pkg_resources._satisfies(
                versions[name], specifier)

        return all(map(fulfils, self.needs))


class Verdict(NamedTuple):
    counts: dict[str, int]      # of tests by outcome
    expected: list[tuple[Expected, int]]    # with the number of its tests
    unexpected: Outcomes        # failures
    passed: list[tuple[Expected, str]]      # though expected to fail
    unused: list[Expected]      # no test failed so

    @property
    def n_unexpected(self) -> int:
        return len(self.unexpected) + len(self.passed) + len(self.unused)


def compare(outcomes: Outcomes, versions: dict[str, str],
            expected: Sequence[Expected], complete: bool = True) -> Verdict:
    """Compares what happened on a stack with what is expected there.

    Where only some of the tests were run, the run is not `complete`, and an
    expected failure may be missing.
    """
    rules = [rule for rule in expected if rule.applies(versions)]
    found = [0] * len(rules)
    unexpected: Outcomes = {}
    passed: list[tuple[Expected, str]] = []
    for test, (outcome, error) in outcomes.items():
        named = [i for i, rule in enumerate(rules) if rule.names(test)]
        if outcome == FAILED:
            fitting = [i for i in named if rules[i].error in error]
            if fitting:
                found[fitting[0]] += 1
            else:
                unexpected[test] = outcome, error
        elif outcome == PASSED and named:
            passed.append((rules[named[0]], test))
    unused = [rule for rule, n in zip(rules, found) if n == 0
              and complete and rule not in [each for each, _ in passed]]
    counts = {kind: sum(outcome == kind for outcome, _ in outcomes.values())
              for kind in (PASSED, SKIPPED, FAILED)}
    return Verdict(counts, [each for each in zip(rules, found) if each[1]],
                   unexpected, passed, unused)
