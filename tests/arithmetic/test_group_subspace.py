"""sigma of groups with several vectors each, by the functions.

The oracle treats one group after the other: by QR and SVD in float64, or as a
weight without groups.
"""
import chainer
import chainer.functions as CF
import numpy as np
import pytest
from chainer import gradient_check
from chainer.backends import cuda

from sn_function import errors, functions
from sn_function._arithmetic import group_subspace, host
from sn_function._arithmetic.groups import Groups
from sn_function._arithmetic.interface import Forward, Renewal, Settings
from tests import reference
from tests.arithmetic.test_grouped import send, true_norm
from tests.cuda_on_host import array as on_host

# (shape, axis, groups, vectors)
WEIGHTS = [
    ((8, 3, 2, 2), 0, 4, 2), ((6, 5), 0, 2, 3), ((6, 5), 0, 2, 1),
    ((6, 4, 2, 2), 1, 3, 4), ((4, 3, 3), 1, 2, 2), ((4, 3, 3, 2), 2, 2, 3)]
BY_DTYPE = [('e', 3e-3), ('f', 1e-5), ('d', 1e-12)]


def random(*shape):
    return np.random.normal(size=shape)


def make(shape, axis, groups, b, dtype='d'):
    """A weight whose groups differ in size, and vectors."""
    W = random(*shape)
    for i, part in enumerate(np.split(W, groups)):
        part *= 1 + (3 * i + 1) % groups
    length = shape[axis] * (1 if axis == 0 else groups)
    return W.astype(dtype), random(b, length).astype(dtype)


def of_each(W, U, groups):
    return zip(np.split(W, groups), np.split(U, groups, axis=1))


def largest(W, U, axis, groups):
    sigmas = [reference.span_norm(part, V, axis)[2]
              for part, V in of_each(W, U, groups)]
    return max(sigmas, key=lambda sigma: sigma.real)


def as_signed(U, like, groups=1):
    """U with the signs of other vectors; those are LAPACK's."""
    parts = (x.reshape(len(U), groups, -1) for x in (U, like))
    signs = np.sign(np.einsum('bgm,bgm->bg', *parts))
    return (U.reshape(len(U), groups, -1) * signs[..., None]).reshape(U.shape)


@pytest.mark.parametrize(('dtype', 'tolerance'), BY_DTYPE)
@pytest.mark.parametrize('K', [1, 3])
@pytest.mark.parametrize(('shape', 'axis', 'groups', 'b'), WEIGHTS)
def test_each_group_is_as_by_itself(
        shape, axis, groups, b, K, dtype, tolerance):
    W, U = make(shape, axis, groups, b, dtype)
    parts = list(of_each(W, U.copy(), groups))
    Y, sigma = functions.spectral_normalize(
        W, U, K, axis=axis, groups=groups, update_u=True, return_sigma=True)
    sigmas = []
    for (part, V), V_after in zip(parts, np.split(U, groups, axis=1)):
        V = V.copy()
        sigmas.append(functions.spectral_normalize(
            part, V, K, axis=axis, update_u=True,
            return_sigma=True)[1].array)
        np.testing.assert_allclose(
            as_signed(V_after.astype('d'), V), V,
            atol=1e-10 if dtype == 'd' else 20 * tolerance)
    assert (Y.dtype, sigma.dtype) == (W.dtype, sigmas[0].dtype)
    np.testing.assert_allclose(sigma.array, max(sigmas), rtol=tolerance)
    np.testing.assert_allclose(
        Y.array, W / max(sigmas), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(('shape', 'axis', 'groups', 'b'), WEIGHTS)
def test_the_largest_group_gets_the_norm_1(shape, axis, groups, b):
    W, U = make(shape, axis, groups, b)
    Y = functions.spectral_normalize(W, U, 100, axis=axis, groups=groups)
    np.testing.assert_allclose(
        true_norm(Y.array, axis, groups), 1, rtol=1e-6)


@pytest.mark.parametrize('detach_uv', [False, True])
@pytest.mark.parametrize(('shape', 'axis', 'groups', 'b'), WEIGHTS)
def test_gradients_equal_the_complex_step(shape, axis, groups, b, detach_uv):
    (W, U), gamma = make(shape, axis, groups, b), np.array(0.7)
    gY, gsigma = random(*shape), 0.3
    variables = [chainer.Variable(x) for x in (W, gamma)]
    outputs = functions.spectral_normalize(
        variables[0], U, 1, variables[1], 1.3, axis=axis, groups=groups,
        detach_uv=detach_uv, return_sigma=True)
    grads = chainer.grad(outputs, variables, [
        chainer.as_variable(np.asarray(x)) for x in (gY, gsigma)])

    def scalar(W, gamma):
        sigma = largest(W, U, axis, groups)
        return np.sum(gamma * 1.3 * W / sigma * gY) + gsigma * sigma

    for g, expected in zip(grads, [
            reference.complex_step(lambda z: scalar(z, gamma), W),
            reference.complex_step(lambda z: scalar(W, z), gamma)]):
        np.testing.assert_allclose(g.array, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(('shape', 'axis', 'groups', 'b'), WEIGHTS)
def test_double_backward(shape, axis, groups, b):
    W, U = make(shape, axis, groups, b)

    def f(W, gamma):
        return functions.spectral_normalize(
            W, U, 1, gamma, axis=axis, groups=groups, return_sigma=True)

    gradient_check.check_double_backward(
        f, (W, np.array(0.7)), (random(*shape), np.array(random())),
        (random(*shape), np.array(random())), dtype='d', rtol=1e-5, atol=1e-5)


def test_it_follows_a_cluster_that_one_vector_does_not():
    def group():
        x, _, y = np.linalg.svd(random(12, 20), full_matrices=False)
        return x * np.r_[np.linspace(1, .99, 5), np.linspace(.9, .1, 7)] @ y

    W = np.concatenate([group(), group()])
    one, several = random(24), random(8, 24)
    for _ in range(40):
        for u in one, several:
            functions.spectral_normalize(W, u, update_u=True, groups=2)
    sigmas = [1 - float(functions.spectral_norm(W, u, groups=2).array)
              for u in (one, several)]
    assert sigmas[0] > 5e-4
    assert -1e-12 < sigmas[1] < 1e-7


def test_u_gets_no_gradient():
    W, U = make((6, 5), 0, 2, 3)
    u = chainer.Variable(U)
    functions.spectral_norm(W, u, groups=2).backward()
    assert u.grad is None


# Weights and vectors of any size

@pytest.mark.parametrize(('dtype', 'size'), [
    ('f', 1e-36), ('f', 1e-20), ('f', 1e20), ('f', 1e36), ('d', 1e-290),
    ('d', 1e290), ('e', 1e-6)])
def test_weights_of_extreme_size(dtype, size):
    W, U = make((6, 4, 2), 1, 2, 2)
    U = U.astype(dtype)
    small = (W * size).astype(dtype)
    W = small.astype('d') / size
    x = chainer.Variable(small)
    Y, sigma = functions.spectral_normalize(
        x, U, eps=0.0, axis=1, groups=2, return_sigma=True)
    expected = largest(W, U.astype('d'), 1, 2)
    tolerance = dict(BY_DTYPE)[dtype]
    np.testing.assert_allclose(
        sigma.array.astype('d') / size, expected, rtol=tolerance)
    np.testing.assert_allclose(
        Y.array, W / expected, rtol=tolerance, atol=tolerance)
    of_group = Y.creator_node.weights[0].iterations.of_largest()
    np.testing.assert_allclose(
        of_group.singular_values[0], sigma.array, rtol=tolerance)
    g, = chainer.grad([sigma], [x])
    np.testing.assert_allclose(
        g.array, reference.complex_step(
            lambda z: largest(z, U.astype('d'), 1, 2), W),
        rtol=tolerance, atol=tolerance)


def test_groups_of_very_different_size():
    """A small group is not lost beside a large one, nor does it disturb."""
    W, U = make((6, 3, 2), 0, 3, 2, 'f')
    W[:2] *= np.float32(1e-30)
    W[4:] *= np.float32(1e30)
    Y = functions.spectral_normalize(W, U, 60, groups=3, update_u=True)
    np.testing.assert_allclose(true_norm(Y.array, 0, 3), 1, rtol=1e-5)
    for part, V in of_each(W, U, 3):
        u = np.linalg.svd((part.astype('d') / abs(part).max()).reshape(
            2, -1))[0][:, 0]
        np.testing.assert_allclose(abs(V[0] @ u), 1, rtol=1e-5)


@pytest.mark.parametrize(('dtype', 'lengths'), [
    ('f', (1e-30, 1)), ('f', (1e30, 1e-30)), ('f', (1e36, 1e36)),
    ('d', (1e200, 1e-200)), ('d', (1e-300, 1e-300))])
def test_lengths_of_the_vectors_do_not_matter(lengths, dtype):
    W, U = make((6, 5), 0, 2, 2, dtype)
    expected = functions.spectral_norm(W, U, groups=2).array
    U *= np.array(lengths, dtype)[:, None]
    np.testing.assert_allclose(functions.spectral_norm(
        W, U, groups=2).array, expected, rtol=1e-5)


def test_vectors_that_are_nearly_dependent():
    W, U = make((8, 9), 0, 2, 3)
    expected = functions.spectral_norm(W, U, groups=2).array
    U[1:] = U[0] + 1e-4 * U[1:]
    np.testing.assert_allclose(
        functions.spectral_norm(W, U, groups=2).array, expected, rtol=1e-7)


def test_vectors_that_are_too_nearly_dependent():
    W, U = make((8, 9), 0, 2, 3)
    U[1, :4] = U[0, :4] + 1e-7 * U[1, :4]
    for groups, V in (2, U), (1, U[:, :4]):  # by the same limit
        with pytest.raises(errors.VectorValueError, match='depends on'):
            functions.spectral_norm(W[:V.shape[1]], V, groups=groups)


@pytest.mark.parametrize('rank', [0, 1, 2])
@pytest.mark.parametrize(('dtype', 'tolerance'), BY_DTYPE)
def test_groups_of_low_rank(rank, dtype, tolerance):
    """Vectors stay independent and finite; a zero group keeps its own."""
    W, U = make((10, 6), 0, 2, 3)
    W[:5] = random(5, rank) @ random(rank, 6)
    W, U = W.astype(dtype), U.astype(dtype)
    before = U.copy()
    for _ in range(60):
        Y = functions.spectral_normalize(W, U, groups=2, update_u=True)
        for V in np.split(U.astype('d'), 2, axis=1):
            assert np.linalg.cond(V) < 1e3
    np.testing.assert_allclose(true_norm(Y.array, 0, 2), 1, atol=tolerance)
    if rank == 0:
        np.testing.assert_array_equal(U[:, :5], before[:, :5])


def test_all_zero():
    x, U = chainer.Variable(np.zeros((4, 3))), random(2, 4)
    before = U.copy()
    Y, sigma = functions.spectral_normalize(
        x, U, groups=2, update_u=True, return_sigma=True)
    g, = chainer.grad([Y], [x], [chainer.Variable(np.ones((4, 3)))])
    np.testing.assert_array_equal(Y.array, 0)
    np.testing.assert_array_equal(sigma.array, 0)
    np.testing.assert_array_equal(U, before)
    np.testing.assert_array_equal(g.array, 1)


@pytest.mark.parametrize('K', [1, 3])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_bad_weight(bad, K):
    W, U = make((12, 8), 0, 2, 6)
    W[1, 2] = bad
    before = U.copy()
    Y, sigma = functions.spectral_normalize(
        W, U, K, groups=2, update_u=True, return_sigma=True)
    assert np.isnan(Y.array).all()
    assert np.isnan(sigma.array)
    np.testing.assert_array_equal(U, before)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda U: U.__setitem__((1, slice(3)), 0), 'has a row that is zero'),
    (lambda U: U.__setitem__((1, slice(3)), 2 * U[0, :3]), 'depends on'),
    (lambda U: U.__setitem__((1, 4), np.nan), 'holds NaN or Inf'),
    (lambda U: U.__setitem__((0, 0), np.inf), 'holds NaN or Inf')])
@pytest.mark.parametrize('dtype', 'efd')
def test_bad_vectors(change, message, dtype):
    """Of one group alone."""
    W, U = make((6, 5), 0, 2, 2, dtype)
    change(U)
    before = U.copy()
    with pytest.raises(errors.VectorValueError, match=message):
        functions.spectral_normalize(W, U, groups=2, update_u=True)
    with pytest.raises(errors.VectorValueError, match=message):
        run(W, U, 2, Renewal(15, 1e-3))
    np.testing.assert_array_equal(U, before)


@pytest.mark.parametrize('dtype', 'fd')
def test_vectors_that_their_groups_take_to_next_to_nothing(dtype):
    W = np.zeros((6, 3), dtype)
    W[[0, 3]] = 1
    tiny = {'f': 1e-30, 'd': 1e-200}[dtype]
    U = np.array([[tiny, 1, 0] * 2, [0, 0, 1] * 2], dtype)
    sigma = functions.spectral_norm(W, U, groups=2, update_u=True)
    np.testing.assert_allclose(sigma.array, tiny * 3 ** .5, rtol=1e-6)
    sigma = functions.spectral_norm(W, U, groups=2)
    np.testing.assert_allclose(sigma.array, 3 ** .5, rtol=1e-3)


def test_vectors_that_their_group_takes_to_zero():
    W = np.zeros((6, 3))
    W[2], W[3:] = [3, 0, 0], random(3, 3) / 10
    U = np.concatenate([np.eye(2, 3), random(2, 3)], axis=1)
    before = U.copy()
    Y, sigma = functions.spectral_normalize(
        W, U, groups=2, update_u=True, return_sigma=True)
    np.testing.assert_allclose(sigma.array, 3)
    start = Y.creator_node.weights[0].iterations.start
    np.testing.assert_array_equal(start[0, :3], [0, 0, 1])
    np.testing.assert_allclose(start[:, :3] @ start[:, :3].T, np.eye(2))
    np.testing.assert_array_equal(start[:, 3:], before[:, 3:])


@pytest.mark.parametrize('shape', [
    (6,), (2, 4), (0, 8), (3, 8), (1, 2, 8), (8, 1)])
def test_shape_that_does_not_fit(shape):
    if shape == (6,):
        message = r'needs shape \(8,\), or \(b, 8\) with b from 1 to 2'
    else:
        message = 'from 1 to 2 for several'
    with pytest.raises(errors.VectorShapeError, match=message):
        functions.spectral_normalize(
            random(4, 1, 4), random(*shape), axis=2, groups=2)


# Renewal

def run(W, U, groups, renewal, n=1):
    ((sigma,), iterations), = host.normalize_all([Forward(
        Settings(n, 0, True, groups=Groups(groups), n_vectors=len(U)), W, U,
        1.0, ('sigma',), renewal=renewal)])
    return float(sigma), iterations


def test_stale_vectors_are_taken_on():
    """And those of a group that has settled stay."""
    W, U = make((8, 6), 0, 2, 2)
    functions.spectral_normalize(W, U, 500, groups=2, update_u=True)
    U[:, :4] = random(2, 4)
    _, alone = run(W, U, 2, Renewal(0, 1e-3))
    sigma, iterations = run(W, U, 2, Renewal(500, 1e-3))
    assert alone.vectors.turns().ravel()[0] > 1e-3
    assert iterations.vectors.turns().max() < 1e-3
    assert iterations.turn() < 1e-3
    np.testing.assert_allclose(sigma, true_norm(W, 0, 2), rtol=1e-3)
    np.testing.assert_array_equal(iterations.start[:, 4:], U[:, 4:])
    again, second = run(W, iterations.start, 2, Renewal(500, 1e-3))
    assert again == sigma
    np.testing.assert_array_equal(second.start, iterations.start)


@pytest.mark.parametrize('b', [None, 2])
@pytest.mark.parametrize('n', [1, 3])
def test_tolerance(b, n):
    W, U = make((8, 6), 0, 2, b or 1)
    u = U if b else U[0]
    Y, sigma = functions.spectral_normalize(
        W, u, n, groups=2, rtol=1e-6, max_iterations=5000, update_u=True,
        return_sigma=True)
    np.testing.assert_allclose(sigma.array, true_norm(W, 0, 2), rtol=1e-6)
    iterations = Y.creator_node.weights[0].iterations
    residuals = []
    for part, V in of_each(W, np.atleast_2d(u), 2):
        v = part.T @ V[0]
        length = np.linalg.norm(v)
        residuals.append(np.linalg.norm(
            part @ v / length - length * V[0]) / length)
    assert max(residuals) < 2e-6
    assert iterations.residual() <= 1e-6
    u[..., 4:] = random(*u[..., 4:].shape)  # of one group only
    with pytest.warns(errors.ToleranceWarning):
        functions.spectral_normalize(
            W, u, n, groups=2, rtol=1e-5, max_iterations=n)


# A device

@pytest.mark.gpu
@pytest.mark.parametrize('detach_uv', [False, True])
@pytest.mark.parametrize(('dtype', 'tolerance'), BY_DTYPE)
@pytest.mark.parametrize(('shape', 'axis', 'groups', 'b'), WEIGHTS[::2])
def test_as_on_the_host(
        shape, axis, groups, b, dtype, tolerance, detach_uv):
    W, U = make(shape, axis, groups, b, dtype)
    gY, gamma = random(*shape).astype(dtype), np.array(0.7, dtype)
    results = []
    for convert in (lambda x: x, send):
        V = convert(U.copy())
        x = [chainer.Variable(convert(value)) for value in (W, gamma)]
        Y, sigma = functions.spectral_normalize(
            x[0], V, 2, x[1], 1.3, axis=axis, groups=groups,
            detach_uv=detach_uv, update_u=True, return_sigma=True)
        g = chainer.grad([Y, sigma], x, [
            chainer.Variable(convert(gY)),
            chainer.Variable(convert(np.array(0.3, sigma.dtype)))],
            enable_double_backprop=True)
        gg = chainer.grad([CF.sum(g[0] * g[0])], x[:1])
        results.append([V, *(y.array for y in (Y, sigma, *g, *gg))])
    for a, b in zip(*results):
        assert isinstance(b, cuda.ndarray)
        assert b.dtype == a.dtype
        b = cuda.to_cpu(b)
        if a is results[0][0]:
            b = as_signed(b, a, groups)
        np.testing.assert_allclose(
            b, a, rtol=tolerance, atol=5 * tolerance * max(1, abs(a).max()))


@pytest.mark.gpu
@pytest.mark.parametrize('bad', [0, np.nan, np.inf, 'dependent'])
def test_a_device_replaces_bad_vectors(bad):
    W, U = make((6, 4, 2), 1, 3, 2)
    U[1, :4] = 2 * U[0, :4] if bad == 'dependent' else bad
    device_U = send(U)
    sigma = functions.spectral_norm(
        send(W), device_U, 200, 1, groups=3, update_u=True)
    np.testing.assert_allclose(
        cuda.to_cpu(sigma.array), true_norm(W, 1, 3), rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(
        cuda.to_cpu(device_U)[0].reshape(3, 4), axis=1), 1)


@pytest.mark.gpu
def test_a_tolerance_on_a_device():
    W, U = make((8, 6), 0, 2, 2)
    for u in U[0], U:
        sigma = functions.spectral_norm(
            send(W), send(u), groups=2, rtol=1e-4, max_iterations=400)
        np.testing.assert_allclose(
            cuda.to_cpu(sigma.array), true_norm(W, 0, 2), rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize('case', ['ordinary', 'zero group', 'zero', 'NaN'])
def test_the_host_does_not_wait(case):
    W, U = make((6, 4, 2), 0, 3, 2)
    if case != 'ordinary':
        W[:2 if case == 'zero group' else 6] = (
            np.nan if case == 'NaN' else 0)
    x, V = chainer.Variable(send(W)), send(U)
    gY = chainer.Variable(send(random(*W.shape)))
    with on_host.no_synchronization():
        Y, sigma = functions.spectral_normalize(
            x, V, 2, groups=3, update_u=True, return_sigma=True)
        g, = chainer.grad([Y], [x], [gY])
    Y, sigma, g, V = map(cuda.to_cpu, (Y.array, sigma.array, g.array, V))
    if case == 'NaN':
        assert np.isnan(Y).all()
        assert np.isnan(sigma)
        np.testing.assert_array_equal(V, U)
        return
    assert np.isfinite(g).all()
    expected = functions.spectral_normalize(
        W, U, 2, groups=3, update_u=True)
    np.testing.assert_allclose(Y, expected.array, rtol=1e-10)
    np.testing.assert_allclose(as_signed(V, U, 3), U, rtol=1e-8, atol=1e-10)


def test_products_in_the_layout_of_groups():
    U = random(3, 8)
    assert group_subspace.as_groups(U, 2).shape == (2, 1, 3, 4)
    np.testing.assert_array_equal(
        group_subspace.as_groups(U, 2)[1, 0], U[:, 4:])
    np.testing.assert_array_equal(
        group_subspace.as_rows(group_subspace.as_groups(U, 2)), U)
