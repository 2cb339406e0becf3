"""The norms of a model's weights as a table, by a float64 SVD."""
import copy
import pickle

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks
from chainer.backends import cuda

from sn_function import SpectralNormalization, errors
from tests import reference


def make(hook=SpectralNormalization):
    return chainer.Chain(
        a=L.Linear(4, 3).add_hook(hook()), b=L.Convolution2D(2, 3, 2),
        c=L.BatchNormalization(3), d=L.Linear(None, 2))


@pytest.mark.parametrize('hook', [
    SpectralNormalization, link_hooks.SpectralNormalization,
    lambda: SpectralNormalization(factor=3)])
def test_numbers(hook):
    model = make(hook)
    u = model.a.W_u.copy()
    a, b = sn_function.norms(model)
    np.testing.assert_array_equal(model.a.W_u, u)  # it has not moved on
    assert (a.name, a.shape, b.name, b.shape) == (
        'a', (3, 4), 'b', (3, 2, 2, 2))
    with chainer.using_config('train', False):
        hook, = model.a.local_link_hooks.values()
        used = hook.normalize_weight(model.a).array
    for layer, W, Y in ((a, model.a.W.array, used),
                        (b, model.b.W.array, model.b.W.array)):
        np.testing.assert_allclose(
            layer.true_sigma, reference.true_norm(W), rtol=1e-6)
        np.testing.assert_allclose(
            layer.norm, reference.true_norm(Y), rtol=1e-5)
    assert (a.sigma is None, b.sigma is None) == (False, True)


def test_text():
    model = make()
    model.a.W.array[...] = np.eye(3, 4) * [2, 1, 0.5, 0]
    model.b.W.array[...] = 2
    sn_function.refresh(model.a)
    assert str(sn_function.norms(model)) == '''\
layer  shape    sigma  true sigma  norm
a      3x4      2.000  2.000       1.000
b      3x2x2x2  -      9.798       9.798
d: not initialized yet'''


def test_all_are_lazy():
    model = L.Linear(None, 2).add_hook(SpectralNormalization())
    found = sn_function.norms(model)
    assert (list(found), found.uninitialized) == ([], ('W',))
    assert str(found).splitlines()[1:] == ['W: not initialized yet']


def test_is_a_tuple_that_can_be_copied():
    found = sn_function.norms(make())
    assert isinstance(found, tuple)
    for twin in copy.deepcopy(found), pickle.loads(pickle.dumps(found)):
        assert twin == found
        assert str(twin) == str(found)
        assert twin.uninitialized == ('d',)


@pytest.mark.gpu
def test_on_a_device():
    model = make()
    expected = sn_function.norms(model)
    model.to_device('@cupy:0')
    assert isinstance(model.a.W.array, cuda.ndarray)
    for layer, other in zip(sn_function.norms(model), expected):
        np.testing.assert_allclose(layer.norm, other.norm, rtol=1e-5)


def test_no_model():
    with pytest.raises(errors.ModelTypeError, match='norms'):
        sn_function.norms(np.ones((2, 3)))
    with pytest.raises(errors.NothingToReportError, match='Linear'):
        sn_function.norms(L.BatchNormalization(3))
