"""Silent faults that users reported, each with its figure before and now.

``python -m tests.tools.silent`` runs the cases and prints a table in Markdown.
With ``--before CHECKOUT`` it also runs them, in another process, on the
package in a checkout of an earlier version, such as of
``git worktree add CHECKOUT 49aeec4``; without it, on Chainer's hook where that
has the same fault.  :mod:`tests.test_tools.test_silent` asserts the outcomes.
"""
from tests.tools.silent import layouts, models, noops, vectors
from tests.tools.silent.cases import (
    CASES,
    Case,
    outcome_now,
    outcome_of_chainer,
)

# In the order in which the table has them.
MODULES = vectors, noops, models, layouts
ALL = [each for module in MODULES for each in CASES
       if each.run.__module__ == module.__name__]

__all__ = ['ALL', 'Case', 'outcome_now', 'outcome_of_chainer']
