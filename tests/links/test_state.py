"""What a link keeps for a hook."""
import copy
import pickle

import chainer
import chainer.links as L
import numpy as np
import pytest

from sn_function import SpectralNormalization
from sn_function._links.state import LinkState
from tests import cuda_on_host
from tests.cuda_on_host import array


class Iterations:
    """Counts how often its vectors are asked for."""

    def __init__(self, number):
        self.number = number
        self.count = 0

    @property
    def start(self):
        self.count += 1
        return np.full(2, self.number)

    v = start


def test_vectors_are_made_on_demand():
    state, iterations = LinkState('W', None), Iterations(1.)
    assert state.v is None
    assert state.start is None
    state.keep(iterations, is_second_run=False)
    assert iterations.count == 0
    np.testing.assert_array_equal(state.v, [1, 1])
    np.testing.assert_array_equal(state.start, [1, 1])


def test_a_second_run_leaves_the_start():
    state = LinkState('W', None)
    state.keep(Iterations(1.), is_second_run=False)
    state.keep(Iterations(2.), is_second_run=True)
    np.testing.assert_array_equal(state.v, [2, 2])
    np.testing.assert_array_equal(state.start, [1, 1])
    state.forget_start()
    assert state.start is None
    np.testing.assert_array_equal(state.v, [2, 2])


@pytest.mark.parametrize('copy_of', [
    copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_the_start_alone(copy_of):
    link = L.Linear(2, 2)
    state = LinkState('W', 'gamma')
    state.put(link)
    state.keep(Iterations(1.), is_second_run=False)
    other = LinkState.of(copy_of(link), 'W')
    assert other.gamma_name == 'gamma'
    assert other.v is None
    np.testing.assert_array_equal(other.start, [1, 1])
    other.forget_start()
    assert other.start is None


@pytest.mark.skipif(
    not cuda_on_host.available(), reason='no C++ compiler')
def test_a_copy_of_what_a_device_computed():
    """Also where no device can be asked any more."""
    link = L.Linear(3, 4).add_hook(SpectralNormalization())
    with array.installed():
        link.to_device('@cupy:0')
        link(chainer.get_device('@cupy:0').send(np.ones((2, 3), 'f')))
        link.to_device('@numpy')
    copied = copy.deepcopy(link)
    np.testing.assert_array_equal(copied.W.array, link.W.array)
