"""What is measured of layers, by a float64 SVD and NumPy."""
import sn_function  # isort: skip  # before chainer, which it repairs

import functools

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks

from sn_function import SpectralNormalization
from sn_function.extensions import SpectralNormReport
from sn_function.link_hooks import output_axis
from tests import reference

LINKS = {
    'Linear': lambda: L.Linear(7, 5),
    'one output': lambda: L.Linear(7, 1),
    'EmbedID': lambda: L.EmbedID(5, 4),
    'Convolution2D': lambda: L.Convolution2D(3, 6, (2, 3)),
    'grouped': lambda: L.Convolution2D(4, 6, 3, groups=2),
    'ConvolutionND': lambda: L.ConvolutionND(1, 3, 5, 4),
    'Deconvolution2D': lambda: L.Deconvolution2D(3, 6, 3),
    'DeconvolutionND': lambda: L.DeconvolutionND(3, 2, 4, 2),
}
HOOKS = {
    'ours': SpectralNormalization,
    'K = 3': functools.partial(SpectralNormalization, 3, n_warmup=0),
    'gamma': functools.partial(SpectralNormalization, use_gamma=True),
    'factor': functools.partial(SpectralNormalization, factor=0.3),
    'floor': functools.partial(SpectralNormalization, eps=100.0),
    'cap, above': functools.partial(SpectralNormalization, cap=100.0),
    'cap, below': functools.partial(SpectralNormalization, cap=0.1),
    "Chainer's": link_hooks.SpectralNormalization,
    "Chainer's, K = 2": functools.partial(
        link_hooks.SpectralNormalization, 2, use_gamma=True, factor=2.0),
}


def measure(link, **kwargs):
    return SpectralNormReport(link, true_sigma=True, **kwargs).measure()


def expected(link):
    """sigma, residual, the true sigma and the norm, in float64."""
    hook, = link.local_link_hooks.values()
    axis = output_axis(link)
    W = link.W.array.astype(np.float64)
    K = hook.n_power_iteration
    u = link.W_u.astype(np.float64)
    if getattr(hook, 'n_warmup', 0):
        u = reference.settled(W, u, K, axis)
    u, v, sigma = reference.power_iteration(W, u, K, axis)
    A = reference.as_matrix(W, axis)
    residual = np.linalg.norm(A.T @ u - sigma * v) / sigma
    with chainer.using_config('train', False), chainer.no_backprop_mode():
        Y = hook.normalize_weight(link).array
    return (sigma, residual, reference.true_norm(W, axis),
            reference.true_norm(Y, axis))


class TestMeasure:

    @pytest.mark.parametrize('hook', HOOKS)
    @pytest.mark.parametrize('kind', LINKS)
    def test_each_link_and_hook(self, kind, hook):
        link = LINKS[kind]().add_hook(HOOKS[hook]())
        link.W_u[...] = np.random.normal(size=link.W_u.shape)
        layer, = measure(link)
        assert layer.name == 'W'
        assert layer.shape == link.W.shape
        sigma, residual, true_sigma, norm = expected(link)
        np.testing.assert_allclose(
            layer[2:6], (sigma, residual, true_sigma, norm),
            rtol=1e-5, atol=1e-6)
        # What the residual promises.
        r = layer.residual
        A = reference.as_matrix(
            link.W.array.astype(np.float64), output_axis(link))
        s = np.linalg.svd(A, compute_uv=False)
        assert s[0] * (1 + 1e-5) >= layer.sigma * np.sqrt(1 + r ** 2)
        assert abs(s - layer.sigma).min() <= (
            r * layer.sigma / np.sqrt(2) + 1e-5)

    @pytest.mark.parametrize(('dtype', 'tolerance'), [
        ('e', 2e-3), ('f', 1e-5), ('d', 1e-12)])
    @pytest.mark.parametrize('size', [1, 1e-4, 3e3])
    def test_each_dtype(self, dtype, size, tolerance):
        with chainer.using_config('dtype', np.dtype(dtype)):
            link = L.Linear(30, 20)
        link.W.array[...] *= size
        link.add_hook(SpectralNormalization(eps=0))
        layer, = measure(link)
        np.testing.assert_allclose(
            layer[2:6], expected(link), rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize('size', [1e-30, 1e30])
    def test_extreme_weights(self, size):
        link = L.Linear(30, 20)
        link.W.array[...] *= size
        link.add_hook(SpectralNormalization(eps=0))
        layer, = measure(link)
        np.testing.assert_allclose(layer[2:6], expected(link), rtol=1e-5)

    @pytest.mark.parametrize('K', [1, 2])
    @pytest.mark.parametrize('kind', LINKS)
    def test_several_vectors(self, kind, K):
        link = LINKS[kind]().add_hook(
            SpectralNormalization(K, n_vectors=3, n_warmup=0))
        A = reference.as_matrix(
            link.W.array.astype(np.float64), output_axis(link))
        if min(A.shape) == 1:
            assert measure(link)[0].singular_values is None
            return
        Q = np.array([link.W_u, *link.W_us], np.float64)
        if K == 2:
            Q = reference.moved(A, Q)
        Q = np.linalg.qr(Q.T)[0].T
        w, s, v = np.linalg.svd(Q @ A)
        u = w[:, 0] @ Q
        layer, = measure(link)
        np.testing.assert_allclose(
            layer.singular_values, s[:3], rtol=1e-4, atol=1e-4)
        assert layer.singular_values[0] == layer.sigma
        assert layer.residual == pytest.approx(
            np.linalg.norm(A @ v[0] - s[0] * u) / s[0], abs=2e-4)
        assert layer.norm == pytest.approx(
            expected(link)[2] / s[0], rel=1e-5)
        true = np.linalg.svd(A, compute_uv=False)
        r = layer.residual
        assert true[0] * (1 + 1e-5) >= layer.sigma * np.sqrt(1 + r ** 2)

    def test_several_vectors_of_which_some_are_missing(self):
        """Nothing is drawn: those that are there count."""
        link = L.Linear(7, 5).add_hook(
            SpectralNormalization(n_vectors=4, n_warmup=0))
        W = link.W.array.astype(np.float64)
        for k in (2, 0):
            link.W_us = link.W_us[:k].astype(np.float64)
            before, state = link.W_us, np.random.get_state()[1].copy()
            layer, = measure(link)
            np.testing.assert_array_equal(np.random.get_state()[1], state)
            assert link.W_us is before
            Q, _ = np.linalg.qr(np.array([link.W_u, *link.W_us]).T)
            s = np.linalg.svd(Q.T @ W)[1]
            assert layer.sigma == pytest.approx(s[0], rel=1e-5)
            assert layer.singular_values == (
                pytest.approx(tuple(s), rel=1e-4) if k else None)
        link.W_us = None
        assert measure(link)[0].sigma == layer.sigma

    def test_it_converges(self):
        link = L.Linear(20, 30).add_hook(SpectralNormalization())
        for _ in range(500):
            link(np.ones((1, 20), 'f'))
        layer, = measure(link)
        assert layer.residual < 1e-5
        np.testing.assert_allclose(layer.norm, 1, rtol=1e-5)

    def test_names(self):
        class Model(chainer.Chain):

            def __init__(self):
                super().__init__()
                with self.init_scope():
                    self.b = chainer.ChainList(
                        L.Linear(2, 2).add_hook(SpectralNormalization()))
                    self.a = L.Linear(2, 2)
                    self.c = L.Bias(shape=(2, 2))
                    self.d = self.b[0]  # the same link
                    self.lstm = L.Maxout(2, 2, 2)
                self.c.add_hook(SpectralNormalization(weight_name='b'))

        model = Model()
        names = [layer.name for layer in SpectralNormReport(model).measure()]
        assert names == ['b/0', 'c/b']
        found = {layer.name: layer.sigma for layer in measure(model)}
        assert found.keys() == {'a', 'b/0', 'c/b', 'lstm/linear'}
        assert found['a'] is None

    def test_two_hooks_on_one_link(self):
        link = L.StatefulGRU(3, 4)
        link.W.add_hook(SpectralNormalization())
        link.U.add_hook(SpectralNormalization())
        assert [layer.name for layer in SpectralNormReport(link).measure()
                ] == ['U', 'W']

    def test_a_weight_under_two_names(self):
        """Each hook has its own vector and settings."""
        link = L.Linear(4, 3)
        link.V = link.W
        link.add_hook(SpectralNormalization())
        link.add_hook(SpectralNormalization(
            weight_name='V', name='V', factor=2.))
        one, other = measure(link)
        assert (one.name, other.name) == ('W', 'V')
        assert other.true_sigma == one.true_sigma
        assert other.norm == pytest.approx(2 * one.norm, rel=1e-2)

    def test_a_snapshot_in_another_dtype_and_before_the_first_call(self):
        link = L.Linear(5, 4).add_hook(SpectralNormalization())
        before = measure(link)
        link.W_u = link.W_u.astype(np.float64)
        np.testing.assert_allclose(measure(link)[0][2:6], before[0][2:6])

    def test_in_a_call_and_in_a_scope(self):
        found = []

        class Link(L.Linear):

            def forward(self, x):
                found.append(measure(self))
                return super().forward(x)

        link = Link(3, 2).add_hook(SpectralNormalization())
        with sn_function.cached(link):
            y = link(np.ones((1, 3), 'f'))
            measure(link)
            with chainer.using_config('train', False):
                np.testing.assert_array_equal(
                    link(np.ones((1, 3), 'f')).array, y.array)
        assert found[0][0].true_sigma == pytest.approx(
            reference.true_norm(link.W.array), rel=1e-5)


@pytest.mark.parametrize('size', [3, 0])
def test_gamma_of_a_weight_that_was_replaced(size):
    """As the next call makes it; the report leaves it alone."""
    link = L.Linear(20, 30).add_hook(SpectralNormalization(use_gamma=True))
    before = link.gamma.array.copy()
    link.W.array *= size
    layer, = measure(link)
    np.testing.assert_array_equal(link.gamma.array, before)
    np.testing.assert_allclose(
        layer.norm, reference.true_norm(link.W.array), rtol=1e-5)


def test_a_weight_of_another_shape_is_left_out():
    link = L.Linear(20, 30).add_hook(SpectralNormalization())
    link.W.array = np.ones((7, 20), 'f')
    assert measure(link) == []


def test_gamma_that_the_next_call_keeps():
    """Its estimate is less while u still turns, which says nothing."""
    link = L.Linear(300, 300).add_hook(
        SpectralNormalization(use_gamma=True, n_warmup=1))
    link.W_u[...] = np.random.normal(size=300)
    layer, = measure(link)
    assert layer.sigma < 0.9 * layer.true_sigma
    *_, norm = expected(link)
    assert layer.norm == pytest.approx(norm, rel=1e-5)
