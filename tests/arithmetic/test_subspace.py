"""sigma as the norm on the span of several vectors, by the functions.

The oracle makes a basis by QR, decomposes in float64, and differentiates by a
complex step.
"""
import chainer
import chainer.functions as CF
import numpy as np
import pytest
from chainer import gradient_check

from sn_function import errors, functions
from sn_function._arithmetic import matrix, subspace
from tests import reference

# (shape, axis, number of vectors): all layouts of a weight, up to all vectors.
WEIGHTS = [
    ((6, 9), 0, 1), ((6, 9), 0, 3), ((6, 9), 0, 6), ((9, 4), 0, 4),
    ((5, 3, 2, 2), 0, 2), ((4, 5, 3), 1, 3), ((7, 4), 1, 2),
    ((2, 3, 4), 2, 4)]
BY_DTYPE = [('e', 3e-3), ('f', 1e-5), ('d', 1e-12)]


def random(*shape):
    return np.random.normal(size=shape)


def make(shape, axis, b, dtype='d'):
    return (random(*shape).astype(dtype),
            random(b, shape[axis]).astype(dtype))


@pytest.mark.parametrize(('dtype', 'tolerance'), BY_DTYPE)
@pytest.mark.parametrize('K', [1, 3])
@pytest.mark.parametrize(('shape', 'axis', 'b'), WEIGHTS)
def test_sigma_is_the_norm_on_the_span(shape, axis, b, K, dtype, tolerance):
    W, U = make(shape, axis, b, dtype)
    before = U.copy()
    Y, sigma = functions.spectral_normalize(
        W, U, K, axis=axis, return_sigma=True)
    assert (before == U).all()
    assert (Y.dtype, sigma.dtype) == (W.dtype, 'f' if dtype == 'e' else dtype)
    W, U = W.astype('d'), U.astype('d')
    for _ in range(K - 1):
        U = reference.moved(W, U, axis)
    expected = reference.span_norm(W, U, axis)[2].real
    np.testing.assert_allclose(sigma.array, expected, rtol=tolerance)
    np.testing.assert_allclose(
        Y.array, W / expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(('shape', 'axis', 'b'), WEIGHTS)
def test_update_moves_the_span_on_with_the_leading_vector_first(
        shape, axis, b):
    W, U = make(shape, axis, b)
    u, *_ = reference.span_norm(W, U, axis)
    A = reference.as_matrix(W, axis)
    Q = np.linalg.qr(U.T)[0]
    leading = A @ (A.T @ u) - reference.shift(A, Q) * u
    leading /= np.linalg.norm(leading)
    expected = reference.moved(W, U, axis)
    functions.spectral_normalize(W, U, axis=axis, update_u=True)
    assert abs(abs(U[0] @ leading) - 1) < 1e-8
    assert abs(np.linalg.norm(U[0]) - 1) < 1e-12
    Q = np.linalg.qr(U.T)[0].T
    angles = np.linalg.svd(Q @ expected.T, compute_uv=False)
    assert angles.min() > 1 - 1e-12


def test_it_follows_a_cluster_that_one_vector_does_not():
    """Ten leading singular values within 1 %, as in a trained network."""
    P, _, Q = np.linalg.svd(random(64, 128), full_matrices=False)
    values = np.r_[np.linspace(1, .99, 10), np.linspace(.9, .1, 54)]
    W = P * values @ Q
    one, several = random(64), random(16, 64)
    for _ in range(40):
        for u in one, several:
            functions.spectral_normalize(W, u, update_u=True)
    sigmas = [1 - float(functions.spectral_norm(W, u).array)
              for u in (one, several)]
    assert sigmas[0] > 1e-3
    assert -1e-12 < sigmas[1] < 1e-7


@pytest.mark.parametrize('detach_uv', [False, True])
@pytest.mark.parametrize(('shape', 'axis', 'b'), WEIGHTS)
def test_gradient_equals_complex_step(shape, axis, b, detach_uv):
    W, U = make(shape, axis, b)
    gY, gsigma = random(*shape), random()

    def loss(W):
        sigma = reference.span_norm(W, U, axis)[2]
        return (gY * W).sum() / sigma + gsigma * sigma

    x = chainer.Variable(W)
    Y, sigma = functions.spectral_normalize(
        x, U, axis=axis, detach_uv=detach_uv, return_sigma=True)
    gW, = chainer.grad([Y, sigma], [x], [
        chainer.Variable(gY), chainer.Variable(np.array(gsigma))])
    np.testing.assert_allclose(
        gW.array, reference.complex_step(loss, W), rtol=1e-9, atol=1e-10)


def test_100_random_gradients():
    """Of random sizes, numbers of vectors and upstream gradients."""
    errors_ = [error_of_gradient(np.random.RandomState(i))
               for i in range(100)]
    assert max(errors_) < 1e-9


def error_of_gradient(rng):
    m, n = rng.randint(2, 10, size=2)
    b = rng.randint(1, min(m, n) + 1)
    W, U, gY = rng.randn(m, n), rng.randn(b, m), rng.randn(m, n)
    x = chainer.Variable(W)
    Y = functions.spectral_normalize(x, U)
    Y.grad = gY
    Y.backward()
    expected = reference.complex_step(
        lambda W: (gY * W).sum() / reference.span_norm(W, U)[2], W)
    return abs(x.grad - expected).max() / abs(expected).max()


def test_u_gets_no_gradient():
    W, U = map(chainer.Variable, make((6, 9), 0, 3))
    functions.spectral_norm(W, U).backward()
    assert W.grad is not None
    assert U.grad is None


@pytest.mark.parametrize(('shape', 'axis', 'b'), WEIGHTS)
@pytest.mark.parametrize('names', [('Y',), ('sigma',), ('Y', 'sigma')])
def test_double_backward(shape, axis, b, names):
    W, U = make(shape, axis, b)

    def f(W, gamma):
        outputs = dict(zip(('Y', 'sigma'), functions.spectral_normalize(
            W, U, gamma=gamma, axis=axis, return_sigma=True)))
        return tuple(outputs[name] for name in names)

    gys = tuple(random(*(shape if name == 'Y' else ())) for name in names)
    options = {'eps': 1e-5, 'atol': 1e-6, 'rtol': 1e-6}
    gradient_check.check_backward(
        f, (W, np.array(1.5)), tuple(map(np.asarray, gys)), **options)
    gradient_check.check_double_backward(
        f, (W, np.array(1.5)), tuple(map(np.asarray, gys)),
        (random(*shape), np.array(random())), **options)


def test_third_order():
    W, U = make((5, 7), 0, 3)
    directions = random(3, 5, 7)

    def slope(W, order):
        x = chainer.Variable(W)
        y = functions.spectral_norm(x, U)
        for d in directions[:order]:
            g, = chainer.grad([y], [x], enable_double_backprop=True)
            y = CF.sum(g * d)
        return y.array

    step = 1e-5 * directions[2]
    numeric = (slope(W + step, 2) - slope(W - step, 2)) / 2e-5
    np.testing.assert_allclose(slope(W, 3), numeric, rtol=1e-6)


def test_detached_higher_orders_have_constant_vectors():
    W, U = make((5, 7), 0, 3)
    x = chainer.Variable(W)
    g, = chainer.grad([functions.spectral_norm(x, U, detach_uv=True)], [x],
                      enable_double_backprop=True)
    second, = chainer.grad([CF.sum(g * g)], [x])
    assert second is None or abs(second.array).max() < 1e-12


def test_equal_singular_values_have_a_finite_second_order():
    """Their vectors may turn in a space without a change of sigma."""
    x = chainer.Variable(np.eye(4, 6))
    Y = functions.spectral_normalize(x, random(3, 4))
    g, = chainer.grad([CF.sum(Y * random(4, 6))], [x],
                      enable_double_backprop=True)
    second, = chainer.grad([CF.sum(g * g)], [x])
    assert abs(second.array).max() < 100


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('value', [0., np.nan])
def test_second_order_of_what_has_no_direction(value, groups):
    x = chainer.Variable(np.full((8, 4), value))
    outputs = functions.spectral_normalize(
        x, random(3, 8), groups=groups, return_sigma=True)
    g, = chainer.grad([sum(CF.sum(y * y) for y in outputs)], [x],
                      enable_double_backprop=True)
    second, = chainer.grad([CF.sum(g * g)], [x])
    assert (np.isnan(second.array) if value else second.array == 0).all()


HARD = {
    'rank 1': lambda: np.outer(random(6), random(9)),
    'identity': lambda: np.eye(6, 9),
    'spectrum': lambda: np.linalg.qr(random(6, 6))[0] * (
        10. ** -np.arange(0, 12, 2)) @ np.linalg.qr(random(9, 6))[0].T,
    'one entry': lambda: np.eye(6, 9) * (np.arange(9) == 2),
}
SCALES = {'e': (1e-3, 1, 3e3), 'f': (1e-38, 1e-20, 1, 1e20, 1e37),
          'd': (1e-299, 1, 1e299)}


@pytest.mark.parametrize(('dtype', 'tolerance'), BY_DTYPE)
@pytest.mark.parametrize('name', HARD)
def test_hard_weights(name, dtype, tolerance):
    """Vectors stay independent and finite, whatever the rank of W."""
    for scale in SCALES[dtype]:
        W = (HARD[name]() * scale).astype(dtype)
        U = random(4, 6).astype(dtype)
        for _ in range(60):
            Y = functions.spectral_normalize(W, U, eps=0, update_u=True)
            assert np.linalg.cond(U.astype('d')) < 1e3
        norm = reference.true_norm(Y.array)
        np.testing.assert_allclose(norm, 1, atol=tolerance)
        assert abs(np.linalg.norm(U[0].astype('d')) - 1) < tolerance


@pytest.mark.parametrize('dtype', 'efd')
@pytest.mark.parametrize('value', [0, np.nan, np.inf])
def test_what_has_no_direction_leaves_the_vectors_alone(value, dtype):
    W, U = make((6, 9), 0, 3, dtype)
    W[2, 3] = value
    W *= value != 0
    before = U.copy()
    Y, sigma = functions.spectral_normalize(
        W, U, 2, update_u=True, return_sigma=True)
    assert (before == U).all()
    if value == 0:
        assert (Y.array == 0).all()
        assert sigma.array == 0
    else:
        assert np.isnan(Y.array).all()
        assert np.isnan(sigma.array)


def test_a_span_that_W_takes_to_zero_is_left():
    W = np.zeros((4, 5))
    W[3, 1] = 2
    U = np.eye(2, 4)
    Y, sigma = functions.spectral_normalize(
        W, U, update_u=True, return_sigma=True)
    assert (sigma.array, Y.array[3, 1]) == (2, 1)
    assert abs(U[0, 3]) == 1


def test_rank_that_grows_again_is_found():
    """What a weight of rank 1 does not touch stays as it was."""
    U = random(4, 6).astype('f')
    W = np.outer(random(6), random(9)).astype('f')
    for _ in range(50):
        functions.spectral_normalize(W, U, update_u=True)
    W = random(6, 9).astype('f')
    for _ in range(30):
        Y = functions.spectral_normalize(W, U, update_u=True)
    np.testing.assert_allclose(reference.true_norm(Y.array), 1, atol=1e-5)


@pytest.mark.parametrize('lengths', [
    (1e-8, 1, 1e8), (1e-25, 1e-30, 1e-20), (1e30, 1, 1e30)])
def test_lengths_of_the_vectors_do_not_matter(lengths):
    W, U = make((6, 9), 0, 3, 'f')
    expected = functions.spectral_norm(W, U).array
    U *= np.array(lengths, 'f')[:, None]
    np.testing.assert_allclose(
        functions.spectral_norm(W, U).array, expected, rtol=1e-5)


def test_vectors_that_are_nearly_dependent():
    """By what is left when the common part cancels."""
    W, U = make((8, 9), 0, 3, 'd')
    expected = functions.spectral_norm(W, U).array
    U[1:] = U[0] + 1e-4 * U[1:]
    np.testing.assert_allclose(
        functions.spectral_norm(W, U).array, expected, rtol=1e-9)


@pytest.mark.parametrize(('change', 'message'), [
    (lambda U: U.__setitem__(1, 0), 'has a row that is zero'),
    (lambda U: U.__setitem__(1, 2 * U[0]), 'depends on others'),
    (lambda U: U.__setitem__((1, 2), np.nan), 'holds NaN or Inf'),
    (lambda U: U.__setitem__((1, 2), np.inf), 'holds NaN or Inf'),
])
@pytest.mark.parametrize('dtype', 'efd')
def test_bad_vectors(change, message, dtype):
    W, U = make((6, 9), 0, 3, dtype)
    change(U)
    before = U.copy()
    with pytest.raises(errors.VectorValueError, match=message):
        functions.spectral_normalize(W, U, update_u=True)
    np.testing.assert_array_equal(U, before)


@pytest.mark.parametrize('shape', [
    (3, 5), (0, 6), (7, 6), (1, 1, 6), (6, 1), ()])
def test_shape_that_does_not_fit(shape):
    with pytest.raises(errors.VectorShapeError, match='from 1 to 6 for'):
        functions.spectral_normalize(random(6, 9), random(*shape))


def test_all_takes_both_kinds():
    Ws, us = [random(6, 9), random(6, 9)], [random(3, 6), random(6)]
    copies = [u.copy() for u in us]
    Ys = functions.spectral_normalize_all(Ws, us, update_u=True)
    for W, u, copy, Y in zip(Ws, us, copies, Ys):
        alone = functions.spectral_normalize(W, copy, update_u=True)
        assert (Y.array == alone.array).all()
        assert (u == copy).all()


@pytest.mark.parametrize(('shape', 'axis', 'b'), WEIGHTS)
def test_products_of_several_vectors(shape, axis, b):
    W, U = make(shape, axis, b)
    A = matrix.Matrix(W, axis)
    V = random(b, A.n)
    np.testing.assert_allclose(
        A.tdot_all(U), [A.tdot(u) for u in U], atol=1e-12)
    np.testing.assert_allclose(
        A.dot_all(V), [A.dot(v) for v in V], atol=1e-12)


@pytest.mark.parametrize('dtype', 'fd')
@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('n', [50, 100, 200, 500, 1000])
def test_rows_that_come_back_after_a_while(n, groups, dtype):
    """Zero for n calls, they are next to nothing in any vector."""
    W = random(32, 48).astype(dtype)
    U = random(4, 32).astype(dtype)
    rest = W.copy()
    rest[[0, 1, 16, 17]] = 0
    for _ in range(n):
        functions.spectral_norm(rest, U, update_u=True, groups=groups)
    W -= rest
    for _ in range(5):
        sigma = functions.spectral_norm(W, U, update_u=True, groups=groups)
        assert np.isfinite(U).all()
    expected = max(np.linalg.norm(part.astype('d'), 2)
                   for part in np.split(W, groups))
    np.testing.assert_allclose(sigma.array, expected, rtol=1e-2)


@pytest.mark.parametrize(('dtype', 'tolerance'), [('f', 1e-5), ('d', 1e-10)])
@pytest.mark.parametrize('part', [0.11, 0.2, 0.3])
def test_vectors_that_are_each_close_to_the_one_before(
        part, dtype, tolerance):
    """No pivot is small, and still much cancels in a basis of their span."""
    U = np.eye(8, 32)
    U[1:] = part * U[1:] - (1 - part ** 2) ** .5 * U[:-1]
    U = (U @ np.linalg.qr(random(32, 32))[0]).astype(dtype)
    W = random(32, 32).astype(dtype)
    sigma = functions.spectral_norm(W, U)
    assert sigma.array < np.linalg.norm(W.astype('d'), 2) * (1 + tolerance)
    # What is left of the span in the entries of U.
    expected = np.linalg.norm(
        np.linalg.qr(U.T.astype('d'))[0].T @ W.astype('d'), 2)
    np.testing.assert_allclose(
        sigma.array, expected, rtol=1e-3 if dtype == 'd' else 0.3)


def test_what_follows_has_the_ritz_values_in_order():
    W, U = make((8, 9), 0, 4)
    with np.errstate(all='ignore'):
        it = subspace.subspace_iteration(matrix.Matrix(W, 0), U, 1, True)
    Q = np.linalg.qr(U.T)[0].T
    np.testing.assert_allclose(
        it.singular_values, np.linalg.svd(Q @ W, compute_uv=False))
    np.testing.assert_allclose(
        it.basis @ it.basis.T, np.eye(4), atol=1e-12)
    residual = np.linalg.norm(W @ it.v - it.sigma * it.u) / it.sigma
    np.testing.assert_allclose(it.residual(), residual)
    following = W @ it.v / np.linalg.norm(W @ it.v)
    np.testing.assert_allclose(it.turn(), 1 - it.u @ following)
