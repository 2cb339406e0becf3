"""A tolerance: iterations until the residual is small, by the functions."""
import warnings

import chainer
import chainer.functions as CF
import numpy as np
import pytest

from sn_function import errors, functions
from sn_function._arithmetic import matrix, power_iteration
from sn_function._arithmetic.interface import Renewal
from tests import reference


def random(*shape):
    return np.random.normal(size=shape)


def residual(W, u, sigma):
    """Of the vectors that gave sigma, or of those that followed.

    The one that a u has by itself: with v and a sigma of its own.
    """
    v = W.T @ u / np.linalg.norm(u)
    length = np.linalg.norm(v)
    return np.linalg.norm(
        W @ (v / length) - length * u / np.linalg.norm(u)) / length


@pytest.mark.parametrize('rtol', [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize('dtype', 'fd')
@pytest.mark.parametrize('b', [None, 4])
@pytest.mark.parametrize('K', [1, 3])
def test_the_residual_is_below_it(b, dtype, rtol, K):
    W = random(30, 50).astype(dtype)
    u = random(*(30,) if b is None else (b, 30)).astype(dtype)
    _, sigma = functions.spectral_normalize(
        W, u, K, rtol=rtol, max_iterations=3000, update_u=True,
        return_sigma=True)
    leading = (u if b is None else u[0]).astype('d')
    assert residual(W.astype('d'), leading, sigma.array) < 1.1 * rtol
    # Some singular value is as near as that.
    values = np.linalg.svd(W.astype('d'), compute_uv=False)
    assert abs(values / sigma.array - 1).min() <= rtol


def test_residual_is_that_of_the_result():
    W, u = random(30, 50), random(30)
    iterations = power_iteration.power_iteration(
        matrix.Matrix(W, 0), u, 2, Renewal(0, 2.0, rtol=1e-3))
    u, v, sigma = reference.power_iteration(W, u, 2)
    np.testing.assert_allclose(
        iterations.residual(), np.linalg.norm(W.T @ u - sigma * v) / sigma)


@pytest.mark.parametrize('K', [1, 2])
@pytest.mark.parametrize('detach_uv', [False, True])
def test_the_gradient_is_that_of_the_last_iterations(detach_uv, K):
    W, u, gY = random(10, 14), random(10), random(10, 14)
    options = {'n_power_iteration': K, 'detach_uv': detach_uv}

    def run(u, **more):
        x, u = chainer.Variable(W), u.copy()
        Y = functions.spectral_normalize(
            x, u, update_u=True, **options, **more)
        Y.grad = gY
        Y.backward()
        return u, x.grad

    last, gW = run(u, rtol=1e-4, max_iterations=1000)
    moved, expected = run(u)
    for _ in range(1000):
        if (moved == last).all():
            break
        moved, expected = run(moved)
    np.testing.assert_allclose(gW, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('groups', [1, 2])
def test_u_gets_no_gradient(groups):
    """It is a constant, also of the second order."""
    W, u, gY = random(10, 14), random(10), random(10, 14)

    def second_order(u):
        x = chainer.Variable(W)
        Y = functions.spectral_normalize(x, u, rtol=1e-3, groups=groups)
        g, = chainer.grad([CF.sum(Y * gY)], [x], enable_double_backprop=True)
        return chainer.grad([CF.sum(g * g)], [x])[0].array

    variable = chainer.Variable(u)
    assert (second_order(variable) == second_order(u)).all()
    functions.spectral_norm(W, variable, rtol=1e-3, groups=groups).backward()
    assert variable.grad is None


def test_it_stops_at_once_where_nothing_is_to_be_done():
    """After K iterations, which are those without a tolerance."""
    W, u = random(10, 14), random(10)
    expected = functions.spectral_norm(W, u, 3)
    sigma = functions.spectral_norm(W, u, 3, rtol=10)
    assert sigma.array == expected.array


@pytest.mark.parametrize('shape', [(10,), (3, 10)])
def test_no_more_than_max_iterations_and_a_warning(shape):
    W, u = random(10, 14), random(*shape)
    expected = functions.spectral_norm(W, u.copy(), 6, update_u=True)
    with pytest.warns(errors.ToleranceWarning, match=r'shape \(10, 14\): the'):
        sigma = functions.spectral_norm(
            W, u, 2, rtol=1e-9, max_iterations=7)
    np.testing.assert_allclose(sigma.array, expected.array, rtol=1e-7)


@pytest.mark.parametrize('W', [
    np.zeros((4, 5)), np.full((4, 5), np.nan), np.eye(4, 5)])
@pytest.mark.parametrize('shape', [(4,), (2, 4)])
def test_weights_without_a_residual(W, shape):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        functions.spectral_normalize(
            W, random(*shape), rtol=1e-6, max_iterations=50)


@pytest.mark.parametrize('scale', [1e-30, 1e30])
@pytest.mark.parametrize('shape', [(10,), (3, 10)])
def test_extreme_weights(shape, scale):
    W, u = random(10, 14), random(*shape)
    sigmas = [functions.spectral_norm(
        (W * x).astype('f'), u.astype('f'), rtol=1e-4,
        max_iterations=500).array / x for x in (1, scale)]
    np.testing.assert_allclose(*sigmas, rtol=1e-6)


def test_all_weights():
    Ws, us = random(5, 6, 8), random(5, 6)
    sigmas = functions.spectral_normalize_all(
        Ws, us, rtol=1e-4, max_iterations=500, return_sigma=True)[1]
    for W, u, sigma in zip(Ws, us, sigmas):
        alone = functions.spectral_norm(W, u, rtol=1e-4, max_iterations=500)
        assert sigma.array == alone.array


@pytest.mark.parametrize('rtol', [0, -1, np.nan, np.inf, '1e-3', True])
def test_bad_tolerance(rtol):
    with pytest.raises(errors.RtolError, match='finite number above 0'):
        functions.spectral_norm(random(3, 4), random(3), rtol=rtol)


@pytest.mark.parametrize('most', [0, 4, 1.5, None])
def test_bad_maximum(most):
    with pytest.raises(errors.IterationCountError, match='max_iterations'):
        functions.spectral_norm(
            random(3, 4), random(3), 5, rtol=1e-3, max_iterations=most)
