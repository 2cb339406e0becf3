"""Runs tests/mpi/sharded.py by mpiexec, on 1 to 4 ranks."""
import functools
import importlib.util
import json
import re

import numpy as np
import pytest

from sn_function import errors
from sn_function._graph import sharded
from tests.mpi import launch

needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec('mpi4py') is None,
    reason='mpi4py is not installed: make test-mpi')

PROGRAM = launch.ROOT / 'tests' / 'mpi' / 'sharded.py'
# It is not imported: that would start MPI in this process.
CHECKS = re.findall(
    r'(?m)^@check\ndef (\w+)', PROGRAM.read_text(encoding='utf-8'))


def run(size, *args):
    return launch.run(
        size, '-W', 'error', '-m', 'tests.mpi.sharded', *args)


@functools.lru_cache(maxsize=None)
def run_checks(size):
    try:
        done = run(size)
    except TimeoutError as error:
        return [], str(error)
    return done.text.splitlines(), done.text


@needs_mpi
@pytest.mark.parametrize('size', [1, 2, 3, 4])
@pytest.mark.parametrize('name', CHECKS)
def test_on_ranks(name, size):
    lines, text = run_checks(size)
    assert name in lines, text[-5000:]


def test_checks_are_found():
    assert len(CHECKS) >= 25


@needs_mpi
@pytest.mark.parametrize('size', [1, 2, 4])
def test_large_weight(size):
    done = run(size, '--measure', '--rounds', '1')
    assert done.code == 0, done.text
    found = json.loads(done.text)
    n, facts = 4096, 176
    forward = [facts, 4 * n, 8]
    assert found['exact']['bytes'] == [forward, [4 * (n + 1)]]
    assert found['detached']['bytes'] == [forward, [8]]
    for mode in 'exact', 'detached':
        # Of Y, gW and sigma, relative to the largest entry.
        assert max(found[mode]['errors']) < 2e-6


@pytest.mark.parametrize('comm', [None, 'world', object()])
def test_no_communicator(comm):
    with pytest.raises(errors.CommunicatorError, match='intracommunicator'):
        sharded.sharded_spectral_normalize(comm, np.ones((2, 2)), np.ones(2))
