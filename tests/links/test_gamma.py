"""gamma: its name, and its value from the weight."""
import chainer
import chainer.links as L
import numpy as np
import pytest

from sn_function import errors
from sn_function._links import gamma
from tests import reference


def registered(link, axis=0):
    gamma.register(link, 'gamma', link.W, axis)
    return link.gamma


def test_name():
    link = L.Linear(5, 6)
    assert gamma.free_name(link, 'W') == 'gamma'
    link.gamma = 1
    assert gamma.free_name(link, 'W') == 'W_gamma'
    link.W_gamma = 1
    with pytest.raises(errors.HookCollisionError, match='W_gamma'):
        gamma.free_name(link, 'W')


@pytest.mark.parametrize(('make', 'axis'), [
    (lambda: L.Linear(5, 6), 0), (lambda: L.Deconvolution2D(3, 4, 2), 1)])
def test_value(make, axis):
    link = make()
    x = registered(link, axis)
    assert x is dict(link.namedparams())['/gamma']
    gamma.initialize(x, link.W, is_stale=False)
    assert x.shape == ()
    np.testing.assert_allclose(
        x.array, reference.true_norm(link.W.array, axis), rtol=1e-6)


def test_of_a_lazy_weight():
    link = L.Linear(None, 6)
    x = registered(link)
    assert x.array is None
    link.W.initialize((6, 5))
    gamma.initialize(x, link.W, is_stale=False)
    np.testing.assert_allclose(
        x.array, reference.true_norm(link.W.array), rtol=1e-6)


@pytest.mark.parametrize(('dtype', 'expected'), [
    (np.float16, np.float32), (np.float32, np.float32),
    (np.float64, np.float64)])
def test_dtype(dtype, expected):
    with chainer.using_config('dtype', dtype):
        link = L.Linear(5, 6)
        x = registered(link)
    gamma.initialize(x, link.W, is_stale=False)
    assert x.dtype == expected


def test_a_weight_that_is_not_finite():
    link = L.Linear(5, 6)
    link.W.array[0, 0] = np.nan
    x = registered(link)
    gamma.initialize(x, link.W, is_stale=False)
    assert x.array == 1


@pytest.mark.parametrize('is_trained', [False, True])
@pytest.mark.parametrize('is_stale', [False, True])
def test_a_weight_that_is_initialized_again(is_stale, is_trained):
    link = L.Linear(5, 6)
    x = registered(link)
    gamma.initialize(x, link.W, is_stale=False)
    if is_trained:
        x.array += 1
    before = x.array.copy()
    link.W.array *= 3
    gamma.initialize(x, link.W, is_stale)
    factor = 3 if is_stale and not is_trained else 1
    np.testing.assert_allclose(x.array, factor * before, rtol=1e-6)
