"""One node is faster than a graph of small functions, also with threads."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.tools.benchmarks import cpu

# Those that compare times are slow: beside other tests they may be wrong.

ROOT = pathlib.Path(__file__).parents[1]


def run(code):
    """Runs it in a process that has the threads which BLAS takes by itself."""
    env = {name: value for name, value in os.environ.items()
           if not name.endswith('_NUM_THREADS')}
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, env=env, check=True,
        stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_small_weight_takes_less_than_half_of_the_built_in_hook():
    """A third is what the benchmark prints; this has room for noise."""
    to_make = cpu.makers(cpu.case_of((64, 3, 3, 3)))
    found = cpu.measured(
        {name: to_make[name] for name in (cpu.BUILT_IN, 'exact', 'detached')},
        0, n_rounds=10, seconds=0.01)
    base = found[cpu.BUILT_IN]['least']
    assert found['exact']['least'] < base / 2
    assert found['detached']['least'] < base / 2


@pytest.mark.slow
def test_with_the_threads_that_blas_takes_by_itself():
    """Twice as fast, as the benchmark prints, or there is a fault.

    While two BLAS libraries were called, whose threads waited for each other,
    it was slower than the built-in hook.  Where other processes take the
    cores, as other tests do, a call may take ten times as long: a fifth of
    them must be quick.
    """
    built_in, *ours = run(f'''
import json
from tests.tools.benchmarks import cpu
names = [{cpu.BUILT_IN!r}, 'detached', 'exact']
to_make = cpu.makers(cpu.case_of((256, 128, 4, 4)))
found = cpu.measured({{name: to_make[name] for name in names}}, 0, 80, 0)
print(json.dumps([found[name]['wall'] for name in names]))
''')
    for times in ours:
        assert built_in['median'] > 1.25 * times['p20']


def test_one_blas_only():
    """A training step needs no SciPy and loads no BLAS beside NumPy's."""
    libraries = run('''
import json, os, re, sys
for name in ('scipy', 'numba', 'torch'):
    sys.modules[name] = None  # importing it fails
import numpy as np
import sn_function
import chainer.functions as F
import chainer.links as L
links = [
    L.Linear(600, 700), L.EmbedID(700, 300), L.Convolution2D(64, 300, 3),
    L.Deconvolution2D(64, 300, 3), L.Convolution2D(2, 3, 3)]
inputs = [
    np.ones((2, 600), 'f'), np.arange(3), np.ones((1, 64, 3, 3), 'f'),
    np.ones((1, 64, 3, 3), 'f'), np.ones((1, 2, 3, 3), 'f')]
for K in (1, 2):
    for settings in ({}, {'detach_uv': True}, {'cap': 1e9}):
        hook = sn_function.SpectralNormalization(K, **settings)
        for link, x in zip(links, inputs):
            with link.add_hook(hook).init_scope():
                loss = F.sum(link(x) ** 2)
            loss += sn_function.spectral_norm(link.W, link.W_u, axis=hook.axis)
            link.cleargrads()
            loss.backward()
            link.delete_hook(hook.name)
found = set()
if os.path.exists('/proc/self/maps'):
    with open('/proc/self/maps') as maps:
        for line in maps:
            path = line.split(maxsplit=5)[-1].strip()
            if re.search('blas|mkl|blis|atlas', os.path.basename(path), re.I):
                found.add(os.path.realpath(path))
print(json.dumps(sorted(found)))
''')
    assert len(libraries) <= 1
