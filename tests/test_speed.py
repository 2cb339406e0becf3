"""One node is faster than a graph of small functions."""
from tests.benchmarks import cpu


def test_a_small_weight_takes_less_than_half_of_the_built_in_hook():
    """A third is what the benchmark prints; this has room for noise."""
    to_make = cpu.makers(cpu.case_of((64, 3, 3, 3)))
    found = cpu.measured(
        {name: to_make[name] for name in (cpu.BUILT_IN, 'exact', 'detached')},
        0, n_rounds=10, seconds=0.01)
    base = found[cpu.BUILT_IN]['least']
    assert found['exact']['least'] < base / 2
    assert found['detached']['least'] < base / 2
