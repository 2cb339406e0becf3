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
    gamma.initialize(x, link.W)
    assert x.shape == ()
    np.testing.assert_allclose(
        x.array, reference.true_norm(link.W.array, axis), rtol=1e-6)


def test_of_a_lazy_weight():
    link = L.Linear(None, 6)
    x = registered(link)
    assert x.array is None
    link.W.initialize((6, 5))
    gamma.initialize(x, link.W)
    np.testing.assert_allclose(
        x.array, reference.true_norm(link.W.array), rtol=1e-6)


@pytest.mark.parametrize(('dtype', 'expected'), [
    (np.float16, np.float32), (np.float32, np.float32),
    (np.float64, np.float64)])
def test_dtype(dtype, expected):
    with chainer.using_config('dtype', dtype):
        link = L.Linear(5, 6)
        x = registered(link)
    gamma.initialize(x, link.W)
    assert x.dtype == expected


def test_a_weight_that_is_not_finite():
    link = L.Linear(5, 6)
    link.W.array[0, 0] = np.nan
    x = registered(link)
    gamma.initialize(x, link.W)
    assert x.array == 1


@pytest.mark.parametrize('dtype', [np.float16, np.float32])
def test_a_zero_weight(dtype):
    with chainer.using_config('dtype', dtype):
        link = L.Linear(5, 6, initialW=0)
        x = registered(link)
    gamma.initialize(x, link.W)
    assert x.array == 1


def test_made_anew():
    link = L.Linear(5, 6)
    x = registered(link)
    gamma.initialize(x, link.W)
    assert gamma.fits(x, link.W)
    link.W.array = 3 * link.W.array[:4]
    assert not gamma.fits(x, link.W)
    gamma.initialize(x, link.W)  # was done
    assert x.array != pytest.approx(reference.true_norm(link.W.array))
    gamma.initialize(x, link.W, is_made_anew=True)
    assert x.array == pytest.approx(reference.true_norm(link.W.array))
    assert gamma.fits(x, link.W)


@pytest.mark.parametrize('name', ['', 'gamma', 'W'])
def test_initial_value(name):
    """It is told until an optimizer has updated gamma or the weight."""
    link = L.Linear(5, 6)
    x = registered(link)
    gamma.initialize(x, link.W)
    chainer.optimizers.SGD().setup(link)
    assert gamma.initial(x, link.W) == x.array
    link.cleargrads()
    for trained in link.params():
        if trained.name == name:
            trained.grad = np.ones_like(trained.array)
            trained.update()
    assert (gamma.initial(x, link.W) is None) == bool(name)


def test_the_parameter_of_another_hook():
    link = L.Linear(5, 6)
    other = chainer.Parameter(np.array(2, 'f'))
    assert gamma.initial(other, link.W) is None
    assert gamma.fits(other, link.W)
