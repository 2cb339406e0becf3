"""Silent faults that users reported, each with its figure before and now.

``python -m tests.tools.silent`` runs the cases and prints a table in Markdown.
With ``--before CHECKOUT`` it also runs them, in another process, on the
package in a checkout of an earlier version, such as of
``git worktree add CHECKOUT 49aeec4``; without it, on Chainer's hook where that
has the same fault.  :mod:`tests.test_tools.test_silent` asserts the outcomes.
"""
from tests.tools.silent import vectors
from tests.tools.silent.cases import CASES as ALL
from tests.tools.silent.cases import Case, outcome_now, outcome_of_chainer

__all__ = ['ALL', 'Case', 'outcome_now', 'outcome_of_chainer', 'vectors']
