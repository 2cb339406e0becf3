"""One mutant of each part; ``python -m tests.tools.mutants`` tries all."""
import pytest

from sn_function._arithmetic import kernels
from tests import cuda_on_host
from tests.tools import mutants

ALL = frozenset(kernel.name for kernel in kernels.ALL)

pytestmark = pytest.mark.skipif(
    not cuda_on_host.available(), reason='no C++ compiler')


@pytest.mark.slow
@pytest.mark.parametrize('name', mutants.parts())
def test_a_changed_operator_is_noticed(name):
    text = mutants.parts()[name]
    candidates = list(mutants.mutants_of(text))
    # A kernel may do no arithmetic of its own.
    _, operator, mutant = (
        [m for m in candidates if m[1] in '+*-/!='] or candidates)[0]
    assert mutant != text, operator
    # As if each test launched everything.
    launches = dict.fromkeys(mutants.jobs(), ALL)
    with mutants.quick_compilation():
        job, failed = mutants.run_mutant(name, mutant, launches)
    assert job in launches
    assert failed not in (None, 'compiler')


def test_what_is_no_operator_is_left_alone():
    text = """
// a + b
#include <x/y.h>
template <typename X>
__device__ A f(const A* x, Weight& W, double* shared) {
  if (!*x) *shared = g<h<X>(), 2>(reinterpret_cast<Pack<X, 2>*>(x));
  return static_cast<A>(x[0]) * W[&state[0]] - f<A>(x);
}
"""
    found = [(operator, mutants.line_of(mutant, position))
             for position, operator, mutant in mutants.mutants_of(text)]
    assert found == [
        ('!', 'f: if (*x) *shared = g<h<X>(), 2>('
              'reinterpret_cast<Pack<X, 2>*>(x));'),
        ('*', 'f: return static_cast<A>(x[0]) / W[&state[0]] - f<A>(x);'),
        ('-', 'f: return static_cast<A>(x[0]) * W[&state[0]] + f<A>(x);')]


def users(name):
    piece, = [piece for text in kernels.SHARED.values()
              for piece in mutants._pieces(text)
              if name in mutants._defined(piece)]
    return {kernel.name for kernel in mutants.users_of(piece)}


def test_kernels_that_use_a_function():
    raw = {k.name for k in kernels.ALL if isinstance(k, kernels.Raw)}
    several = {k.name for k in kernels.ALL
               if isinstance(k, kernels.Raw) and k.has_several}
    assert raw - several < users('block_sum')
    assert users('gram') < users('Space') == several
    assert users('go_back') == {'sn_fused_bwd'}
    assert users('largest_of') == {'sn_finish_fwd'}
    assert users('store_all') == {'sn_fused_subspace', 'sn_finish_subspace'}
    # A type, a macro, and a function of functions.
    assert {'sn_correct_bwd', 'sn_fused_bwd'} == users('Pairs')
    assert {'sn_dot_bwd', 'sn_finish_fwd'} < users('WIDE') < raw
    assert {'sn_product', 'sn_fused_bwd'} < users('add_batch') < raw
    for text in kernels.SHARED.values():
        assert '\n'.join(
            p.strip() for p in mutants._pieces(text)).split() == text.split()


def test_a_part_nobody_uses_survives(monkeypatch):
    monkeypatch.setitem(
        kernels.SHARED, 'grid', kernels.SHARED['grid'] + """
__device__ int unused(int x) {
  return x + 1;
}
""")
    text = kernels.SHARED['grid']
    _, _, mutant = list(mutants.mutants_of(text))[-1]
    launches = dict.fromkeys(mutants.jobs(), ALL)
    assert mutants.run_mutant('grid', mutant, launches) == (None, None)


def test_what_is_equivalent_is_one_mutant_each():
    lines = [(name, mutants.line_of(mutant, position))
             for name, text in mutants.parts().items()
             for position, _, mutant in mutants.mutants_of(text)]
    assert {key: lines.count(key) for key in mutants.EQUIVALENT} == (
        dict.fromkeys(mutants.EQUIVALENT, 1))
