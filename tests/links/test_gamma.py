"""gamma: its name, and its value from the weight."""
import pickle

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer.backends import cuda

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


def test_one_that_was_loaded_before_its_weight():
    link = L.Linear(None, 6)
    x = registered(link)
    x.initialize(())  # as Chainer does to load it
    x.array[...] = 3
    link.W.initialize((6, 5))
    gamma.initialize(x, link.W)
    assert x.array == 3
    assert gamma.initial(x, link.W) is None
    link.W.array = np.ones((7, 5), 'f')
    assert not gamma.fits(x, link.W)


def initialized():
    link = L.Linear(5, 6)
    x = registered(link)
    gamma.initialize(x, link.W)
    return link, x


@pytest.mark.parametrize('is_trained', [False, True])
def test_initial_value(is_trained):
    """It is told until an optimizer has updated the weight."""
    link, x = initialized()
    chainer.optimizers.SGD().setup(link)
    assert gamma.initial(x, link.W) == x.array
    if is_trained:
        link.cleargrads()
        link.W.grad = np.ones_like(link.W.array)
        link.W.update()
    assert (gamma.initial(x, link.W) is None) == is_trained
    gamma.initialize(x, link.W, is_made_anew=True)
    assert gamma.initial(x, link.W) == x.array


def test_no_initial_value_of_one_that_is_held_fixed():
    link, x = initialized()
    chainer.optimizers.SGD().setup(link)
    x.update_rule.enabled = False
    assert gamma.initial(x, link.W) is None


def test_another_hook_makes_other_weights():
    """They are no parameters, and may have any shape."""
    _, x = initialized()
    other = chainer.Variable(np.ones((3, 4), 'f'))
    assert gamma.initial(x, other) is None
    assert gamma.fits(x, other)


def test_initial_value_in_another_dtype():
    link, x = initialized()
    x.array = x.array.astype('d')
    value = gamma.initial(x, link.W)
    assert value.dtype == 'd'
    assert value == x.array


@pytest.mark.gpu
def test_initial_value_on_another_device():
    link, x = initialized()
    link.to_device('@cupy:0')
    value = gamma.initial(x, link.W)
    assert isinstance(value, cuda.ndarray)
    link.to_device('@numpy')
    assert isinstance(gamma.initial(x, link.W), np.ndarray)
    link.to_device('@cupy:0')
    gamma.initial(x, link.W)
    copied = pickle.loads(pickle.dumps(x.initializer))
    assert isinstance(copied.value, np.ndarray)


def test_a_norm_that_does_not_fit():
    link = L.Linear(5, 6)
    link.W.array[...] = 3e38
    x = registered(link)
    gamma.initialize(x, link.W)
    assert x.array == 1


def test_the_parameter_of_another_hook():
    link = L.Linear(5, 6)
    other = chainer.Parameter(np.array(2, 'f'))
    assert gamma.initial(other, link.W) is None
    assert gamma.fits(other, link.W)
