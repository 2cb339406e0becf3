"""One mutant of each kernel; ``python -m tests.tools.mutants`` tries all."""
import pytest

from tests import cuda_on_host
from tests.tools import mutants

pytestmark = pytest.mark.skipif(
    not cuda_on_host.available(), reason='no C++ compiler')


@pytest.mark.slow
@pytest.mark.parametrize('name', mutants.parts())
def test_a_changed_operator_is_noticed(name):
    text = mutants.parts()[name]
    _, operator, mutant = next(
        m for m in mutants.mutants_of(text) if m[1] in '+*-/')
    assert mutant != text, operator
    assert mutants.run_mutant(name, mutant) not in (None, 'compiler')


def test_what_is_no_operator_is_left_alone():
    text = """
// a + b
template <typename X>
__device__ A f(const A* x, Weight& W, double* shared) {
  return static_cast<A>(x[0]) * W[&state[0]] - f<A>(x);
}
"""
    found = [(operator, mutants.line_of(text, position))
             for position, operator, _ in mutants.mutants_of(text)]
    line = 'f: return static_cast<A>(x[0]) * W[&state[0]] - f<A>(x);'
    assert found == [('*', line), ('-', line)]
