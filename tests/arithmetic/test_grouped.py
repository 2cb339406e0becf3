"""sigma as the largest norm of any group, by the functions and on a device.

The oracle decomposes, or iterates on, one group after the other in float64.
"""
import chainer
import chainer.functions as CF
import numpy as np
import pytest
from chainer import gradient_check
from chainer.backends import cuda

from sn_function import errors, functions
from tests import reference
from tests.cuda_on_host import array as on_host

DEVICE = '@cupy:0'
# (shape, axis, groups): convolutions, deconvolutions, and other axes.
WEIGHTS = [
    ((8, 3, 2, 2), 0, 4), ((6, 5), 0, 2), ((4, 3, 3), 0, 4),
    ((6, 4, 2, 2), 1, 3), ((4, 1, 3), 1, 2), ((4, 2, 3, 2), 2, 2)]
BY_DTYPE = [('e', 3e-3), ('f', 1e-5), ('d', 1e-12)]


def random(*shape):
    return np.random.normal(size=shape)


def make(shape, axis, groups, dtype='d'):
    """A weight whose groups differ in size, and a vector."""
    W = random(*shape)
    for i, part in enumerate(np.split(W, groups)):
        part *= 1 + (3 * i + 1) % groups
    length = shape[axis] * (1 if axis == 0 else groups)
    return W.astype(dtype), random(length).astype(dtype)


def of_each(W, u, groups):
    return zip(np.split(W, groups), np.split(u, groups))


def largest(W, u, K, axis, groups):
    """The sigma of the oracle, analytic in W and in u."""
    sigmas = [reference.power_iteration(part, v, K, axis)[2]
              for part, v in of_each(W, u, groups)]
    return max(sigmas, key=lambda sigma: sigma.real)


def true_norm(W, axis, groups):
    return max(reference.true_norm(part, axis)
               for part in np.split(W, groups))


@pytest.mark.parametrize(('dtype', 'tolerance'), BY_DTYPE)
@pytest.mark.parametrize(('shape', 'axis', 'groups'), WEIGHTS)
def test_the_largest_group_gets_the_norm_1(
        shape, axis, groups, dtype, tolerance):
    W, u = make(shape, axis, groups, dtype)
    Y, sigma = functions.spectral_normalize(
        W, u, 300, axis=axis, groups=groups, return_sigma=True)
    assert Y.dtype == W.dtype
    np.testing.assert_allclose(
        true_norm(Y.array, axis, groups), 1, rtol=tolerance)
    np.testing.assert_allclose(
        sigma.array, true_norm(W, axis, groups), rtol=tolerance)


@pytest.mark.parametrize('detach_uv', [False, True])
@pytest.mark.parametrize('K', [1, 3])
@pytest.mark.parametrize(('shape', 'axis', 'groups'), WEIGHTS)
def test_gradients_equal_the_complex_step(shape, axis, groups, K, detach_uv):
    (W, u), gamma = make(shape, axis, groups), np.array(0.7)
    gY, gsigma = random(*shape), 0.3
    variables = [chainer.Variable(x) for x in (W, u, gamma)]
    outputs = functions.spectral_normalize(
        variables[0], variables[1], K, variables[2], 1.3, axis=axis,
        groups=groups, detach_uv=detach_uv, return_sigma=True)
    grads = chainer.grad(outputs, variables, [
        chainer.as_variable(np.asarray(x)) for x in (gY, gsigma)])
    triples = [(*reference.power_iteration(part, v, K, axis), i)
               for i, (part, v) in enumerate(of_each(W, u, groups))]
    first, second, _, chosen = max(triples, key=lambda triple: triple[2])

    def scalar(W, u, gamma):
        if detach_uv:
            A = reference.as_matrix(np.split(W, groups)[chosen], axis)
            sigma = first @ A @ second
        else:
            sigma = largest(W, u, K, axis, groups)
        return np.sum(gamma * 1.3 * W / sigma * gY) + gsigma * sigma

    expected = [reference.complex_step(lambda z: scalar(z, u, gamma), W),
                reference.complex_step(lambda z: scalar(W, z, gamma), u),
                reference.complex_step(lambda z: scalar(W, u, z), gamma)]
    if detach_uv:
        assert grads[1] is None
        del grads[1], expected[1]
    for g, x in zip(grads, expected):
        np.testing.assert_allclose(g.array, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('detach_uv', [False, True])
@pytest.mark.parametrize(('shape', 'axis', 'groups'), WEIGHTS)
def test_double_backward(shape, axis, groups, detach_uv):
    W, u = make(shape, axis, groups)
    converged = u.copy()
    functions.spectral_norm(
        W, converged, 50, axis, update_u=True, groups=groups)

    def f(*inputs):
        if detach_uv:  # a function of W only where u does not move
            return functions.spectral_normalize(
                inputs[0], converged, 1, inputs[1], axis=axis, groups=groups,
                detach_uv=True)
        W, gamma, u = inputs
        return functions.spectral_normalize(
            W, u, 2, gamma, axis=axis, groups=groups, return_sigma=True)

    inputs = [W, np.array(0.7)]
    if detach_uv:
        check_against_the_definition(f, inputs, axis, groups, converged)
        return
    inputs.append(u)
    gradient_check.check_double_backward(
        f, tuple(inputs), (random(*shape), random()),
        tuple(random(*x.shape) for x in inputs), dtype='d', rtol=1e-5,
        atol=1e-5)


def check_against_the_definition(f, inputs, axis, groups, u):
    """In detached mode, u and v are constants in derivatives of any order."""
    W, gamma = map(chainer.Variable, inputs)
    triples = [(*reference.power_iteration(part, v, 1, axis), i)
               for i, (part, v) in enumerate(of_each(W.array, u, groups))]
    first, second, _, chosen = max(triples, key=lambda triple: triple[2])
    at = W.array.size // groups

    def definition(W, gamma):
        part = CF.get_item(
            CF.reshape(W, (-1,)), slice(chosen * at, (chosen + 1) * at))
        part = CF.reshape(part, (W.shape[0] // groups, *W.shape[1:]))
        A = CF.reshape(CF.moveaxis(part, axis, 0), (part.shape[axis], -1))
        sigma = CF.sum(first * CF.matmul(A, second[:, None])[:, 0])
        return W * CF.broadcast_to(gamma / sigma, W.shape)

    weights = random(*W.shape)
    results = []
    for function in (f, definition):
        loss = CF.sum(function(W, gamma) * weights)
        g, = chainer.grad([loss], [W], enable_double_backprop=True)
        results.append(chainer.grad([CF.sum(g * g * g)], [W, gamma]))
    for actual, expected in zip(*results):
        np.testing.assert_allclose(actual.array, expected.array, rtol=1e-8)


def test_one_group_is_the_same_to_the_last_bit():
    W, u = random(4, 3, 2), random(4)
    results = []
    for groups in ({}, {'groups': 1}):
        x = chainer.Variable(W)
        Y, sigma = functions.spectral_normalize(
            x, u, 2, return_sigma=True, **groups)
        results.append([Y, sigma, *chainer.grad([Y], [x])])
    for a, b in zip(*results):
        np.testing.assert_array_equal(a.array, b.array)


def test_the_vectors_move_on_group_by_group():
    W, u = make((6, 4, 2), 1, 3)
    expected = np.concatenate([
        reference.power_iteration(part, v, 2, 1)[0]
        for part, v in of_each(W, u, 3)])
    functions.spectral_norm(W, u, 2, 1, update_u=True, groups=3)
    np.testing.assert_allclose(u, expected, rtol=1e-12)


def test_many_weights_in_one_node():
    """Those without groups are computed together beside them."""
    groups = [1, 2, 1, 1, 3, 1]
    pairs = [make((6, 4), 0, G) for G in groups]
    Ws, us = zip(*pairs)
    x = [chainer.Variable(W) for W in Ws]
    Ys, sigmas = functions.spectral_normalize_all(
        x, us, 2, groups=groups, return_sigma=True)
    for (W, u), G, Y, sigma in zip(pairs, groups, Ys, sigmas):
        expected = largest(W, u, 2, 0, G)
        np.testing.assert_allclose(sigma.array, expected, rtol=1e-12)
        np.testing.assert_allclose(Y.array, W / expected, rtol=1e-12)
    grads = chainer.grad(sigmas, x)
    for (W, u), G, g in zip(pairs, groups, grads):
        np.testing.assert_allclose(g.array, reference.complex_step(
            lambda z: largest(z, u, 2, 0, G), W), atol=1e-10)  # NOQA: B023
    with pytest.raises(errors.CountError, match='groups'):
        functions.spectral_normalize_all(Ws, us, groups=[1, 2])


# Floor and cap

@pytest.mark.parametrize('size', [0.5, 2.0])
def test_cap(size):
    W, u = make((6, 4), 0, 3)
    W *= size / largest(W, u, 1, 0, 3)
    x = chainer.Variable(W)
    Y = functions.spectral_normalize(x, u, cap=1.0, groups=3)
    np.testing.assert_allclose(Y.array, W / max(1, size), rtol=1e-12)
    if size < 1:
        gY = random(*W.shape)
        g, = chainer.grad([Y], [x], [chainer.Variable(gY)])
        np.testing.assert_array_equal(g.array, gY)


# Weights and vectors of any size

SIZES = [('f', 1e-36), ('f', 1e-20), ('f', 1e20), ('f', 1e36), ('d', 1e-290),
         ('d', 1e290), ('e', 1e-6)]


@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize(('dtype', 'size'), SIZES)
def test_weights_of_extreme_size(dtype, size, axis):
    W = make((6, 4, 2), axis, 2)[0]
    u = make((6, 4, 2), axis, 2)[1].astype(dtype)
    small = (W * size).astype(dtype)
    W = small.astype('d') / size
    x = chainer.Variable(small)
    Y, sigma = functions.spectral_normalize(
        x, u, 2, eps=0.0, axis=axis, groups=2, return_sigma=True)
    expected = largest(W, u.astype('d'), 2, axis, 2)
    tolerance = dict(BY_DTYPE)[dtype]
    np.testing.assert_allclose(
        sigma.array.astype('d') / size, expected, rtol=tolerance)
    np.testing.assert_allclose(
        Y.array, W / expected, rtol=tolerance, atol=tolerance)
    g, = chainer.grad([sigma], [x])
    np.testing.assert_allclose(
        g.array, reference.complex_step(
            lambda z: largest(z, u.astype('d'), 2, axis, 2), W),
        rtol=tolerance, atol=tolerance)


def test_groups_of_very_different_size():
    """A small group is not lost beside a large one, nor does it disturb."""
    W, u = make((6, 3, 2), 0, 3, 'f')
    W[:2] *= np.float32(1e-30)
    W[4:] *= np.float32(1e30)
    before = u.copy()
    Y = functions.spectral_normalize(W, u, 60, groups=3, update_u=True)
    np.testing.assert_allclose(true_norm(Y.array, 0, 3), 1, rtol=1e-5)
    for part, v, old in zip(np.split(W, 3), np.split(u, 3),
                            np.split(before, 3)):
        scaled = part.astype('d') / abs(part).max()
        expected = reference.power_iteration(scaled, old.astype('d'), 60)[0]
        np.testing.assert_allclose(v, expected, rtol=1e-4)


@pytest.mark.parametrize('size', [1e-36, 1e36])
def test_vectors_of_extreme_size(size):
    W, u = make((6, 4), 0, 3, 'f')
    x, v = chainer.Variable(W), chainer.Variable(
        (u * np.float32(size)).astype('f'))
    sigma = functions.spectral_norm(x, v, groups=3)
    np.testing.assert_allclose(
        sigma.array, largest(W.astype('d'), u.astype('d'), 1, 0, 3),
        rtol=1e-5)
    sigma.backward()
    expected = reference.complex_step(
        lambda z: largest(W, z, 1, 0, 3), u.astype('d'))
    np.testing.assert_allclose(
        v.grad.astype('d') * size, expected, rtol=1e-4, atol=1e-5)


class TestDegenerate:

    @pytest.mark.parametrize('axis', [0, 1])
    def test_one_zero_group(self, axis):
        W, u = make((6, 4, 2), axis, 3)
        W[:2] = 0
        before = u.copy()
        x = chainer.Variable(W)
        Y = functions.spectral_normalize(
            x, u, 100, axis=axis, groups=3, update_u=True)
        np.testing.assert_allclose(true_norm(Y.array, axis, 3), 1, rtol=1e-9)
        np.testing.assert_array_equal(Y.array[:2], 0)
        n = len(u) // 3
        np.testing.assert_array_equal(u[:n], before[:n])
        iterations = Y.creator_node.weights[0].iterations
        np.testing.assert_array_equal(iterations.start, before)
        np.testing.assert_allclose(
            np.linalg.norm(u.reshape(3, n)[1:], axis=1), 1)
        gY = random(*W.shape)
        g, = chainer.grad([Y], [x], [chainer.Variable(gY)])
        assert np.isfinite(g.array).all()
        np.testing.assert_allclose(
            g.array[:2], gY[:2] / true_norm(W, axis, 3), rtol=1e-9)

    def test_all_zero(self):
        x, u = chainer.Variable(np.zeros((4, 3))), np.ones(4)
        Y, sigma = functions.spectral_normalize(
            x, u, groups=2, update_u=True, return_sigma=True)
        g, = chainer.grad([Y], [x], [chainer.Variable(np.ones((4, 3)))])
        np.testing.assert_array_equal(Y.array, 0)
        np.testing.assert_array_equal(sigma.array, 0)
        np.testing.assert_array_equal(u, 1)
        np.testing.assert_array_equal(g.array, 1)

    @pytest.mark.parametrize('bad', [np.nan, np.inf])
    def test_bad_weight(self, bad):
        W, u = make((4, 3), 0, 2)
        W[1, 2] = bad
        before = u.copy()
        Y, sigma = functions.spectral_normalize(
            W, u, groups=2, update_u=True, return_sigma=True)
        assert np.isnan(Y.array).all()
        assert np.isnan(sigma.array)
        np.testing.assert_array_equal(u, before)

    @pytest.mark.parametrize('u', [
        np.zeros(4), [1, 1, np.nan, 1], [np.inf, 1, 1, 1]])
    def test_bad_vector(self, u):
        u = np.array(u, 'd')
        before = u.copy()
        with pytest.raises(errors.VectorValueError):
            functions.spectral_normalize(
                random(4, 3), u, groups=2, update_u=True)
        np.testing.assert_array_equal(u, before)

    def test_a_vector_that_its_group_takes_to_zero(self):
        """As of a snapshot of a model in which that group was zero."""
        W = np.array([[3., 0], [0, 0], [0, 1], [2, 0]])
        u = chainer.Variable(np.array([0, 1., 0, 0]))
        sigma = functions.spectral_norm(W, u, 20, groups=2)
        np.testing.assert_allclose(sigma.array, 3)
        sigma.backward()
        np.testing.assert_array_equal(u.grad, 0)
        iterations = sigma.creator_node.weights[0].iterations
        np.testing.assert_array_equal(iterations.start, [1, 0, 0, 1])


# Arguments

@pytest.mark.parametrize('groups', [0, -1, 3, 1.5, True, 'each', None])
def test_bad_groups(groups):
    with pytest.raises(errors.GroupCountError, match='divides'):
        functions.spectral_normalize(random(4, 3), random(4), groups=groups)


def test_a_vector_of_the_wrong_length():
    with pytest.raises(errors.VectorShapeError, match='vector for each gr'):
        functions.spectral_norm(random(4, 3), random(3), axis=1, groups=2)


# A device

def send(x):
    return chainer.get_device(DEVICE).send(x)


@pytest.mark.gpu
@pytest.mark.parametrize('detach_uv', [False, True])
@pytest.mark.parametrize(('dtype', 'tolerance'), BY_DTYPE)
@pytest.mark.parametrize(('shape', 'axis', 'groups'), [
    *WEIGHTS[::2], WEIGHTS[3]])
def test_as_on_the_host(shape, axis, groups, dtype, tolerance, detach_uv):
    W, u = make(shape, axis, groups, dtype)
    gY, gamma = random(*shape).astype(dtype), np.array(0.7, dtype)
    results = []
    for convert in (lambda x: x, send):
        x = [chainer.Variable(convert(value)) for value in (W, u, gamma)]
        Y, sigma = functions.spectral_normalize(
            x[0], x[1], 2, x[2], 1.3, axis=axis, groups=groups,
            detach_uv=detach_uv, return_sigma=True)
        g = chainer.grad([Y, sigma], x, [
            chainer.Variable(convert(gY)),
            chainer.Variable(convert(np.array(0.3, sigma.dtype)))],
            enable_double_backprop=True)
        gg = chainer.grad([CF.sum(g[0] * g[0])], x[:1])
        results.append([Y, sigma, *g, *gg])
    for a, b in zip(*results):
        if a is None:
            assert b is None
            continue
        assert isinstance(b.array, cuda.ndarray)
        assert b.dtype == a.dtype
        np.testing.assert_allclose(
            cuda.to_cpu(b.array), a.array, rtol=tolerance,
            atol=5 * tolerance * max(1, abs(a.array).max()))


@pytest.mark.gpu
@pytest.mark.parametrize('bad', [0, np.nan, np.inf])
def test_a_device_replaces_a_bad_vector(bad):
    W, u = make((6, 4, 2), 1, 3)
    u[:4] = bad
    device_u = send(u)
    sigma = functions.spectral_norm(
        send(W), device_u, 200, 1, groups=3, update_u=True)
    np.testing.assert_allclose(
        cuda.to_cpu(sigma.array), true_norm(W, 1, 3), rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(
        cuda.to_cpu(device_u).reshape(3, 4), axis=1), 1)


@pytest.mark.gpu
@pytest.mark.parametrize(('detach_uv', 'backward'), [(False, 49), (True, 31)])
def test_launches(detach_uv, backward):
    """As many as the documentation says."""
    if cuda.ndarray is not on_host.DeviceArray:
        pytest.skip('only the stand-in for a device counts launches')
    W, gY = send(random(8, 3, 2, 2).astype('f')), send(
        random(8, 3, 2, 2).astype('f'))
    x, gamma = chainer.Variable(W), chainer.Variable(send(np.array(1, 'f')))
    u = send(random(8).astype('f'))
    with on_host.counted() as launches:
        Y = functions.spectral_normalize(
            x, u, gamma=gamma, groups=4, detach_uv=detach_uv, update_u=True)
    assert len(launches) == 81
    with on_host.counted() as launches:
        chainer.grad([Y], [x, gamma], [chainer.Variable(gY)])
    assert len(launches) == backward


@pytest.mark.gpu
@pytest.mark.parametrize('case', ['ordinary', 'zero group', 'zero', 'NaN'])
def test_the_host_does_not_wait(case):
    W, u = make((6, 4, 2), 0, 3)
    if case != 'ordinary':
        W[:2 if case == 'zero group' else 6] = (
            np.nan if case == 'NaN' else 0)
    x, v = chainer.Variable(send(W)), send(u)
    gY = chainer.Variable(send(random(*W.shape)))
    with on_host.no_synchronization():
        Y, sigma = functions.spectral_normalize(
            x, v, 2, groups=3, update_u=True, return_sigma=True)
        g, = chainer.grad([Y], [x], [gY])
    Y, sigma, g, v = map(cuda.to_cpu, (Y.array, sigma.array, g.array, v))
    if case == 'NaN':
        assert np.isnan(Y).all()
        assert np.isnan(sigma)
        np.testing.assert_array_equal(v, u)
        return
    assert np.isfinite(g).all()
    host = u.copy()
    expected = functions.spectral_normalize(
        W, host, 2, groups=3, update_u=True)
    np.testing.assert_allclose(Y, expected.array, rtol=1e-10)
    np.testing.assert_allclose(v, host, rtol=1e-10)
