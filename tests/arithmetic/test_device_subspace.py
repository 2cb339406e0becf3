"""Several vectors, and tolerances, on a CUDA device, or where there is none,
with every kernel executed on the host (:mod:`tests.cuda_on_host`).

Both ways are run: one block that does all, and many.
"""
import chainer
import chainer.functions as CF
import chainer.links as L
import numpy as np
import pytest
from chainer.backends import cuda

from sn_function import SpectralNormalization, errors, functions
from sn_function._arithmetic import (
    device,
    device_subspace,
    host,
    kernels,
    workspace,
)
from sn_function._arithmetic.interface import (
    NEVER,
    Backward,
    Forward,
    Renewal,
    Settings,
)
from tests import reference
from tests.arithmetic import test_subspace
from tests.arithmetic.test_device import (  # NOQA: F401  path is a fixture
    DEVICE,
    patch_functions,
    path,
    send,
    watched,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures('path')]
TOLERANCE = {'e': 3e-3, 'f': 2e-5, 'd': 1e-11}
NAMES = ('Y', 'sigma', 'gW', 'ggamma', 'u', 'v', 'values', 'basis', 'turn',
         'residual', 'following')


def random(*shape):
    return np.random.normal(size=shape)


def get(x):
    x = cuda.to_cpu(x) if isinstance(x, cuda.ndarray) else x
    return np.asarray(x, 'd')


def run(arithmetic, W, U, axis, K=1, update=True, renewal=NEVER, gamma=0.7):
    """Returns what a forward and a backward leave, by name, in float64."""
    to = send if arithmetic is device else np.copy
    W, U, gY = map(to, (W, U, np.cos(np.arange(W.size)).reshape(
        W.shape).astype(W.dtype)))
    gamma = to(np.array(gamma, 'd' if W.dtype == 'd' else 'f'))
    settings = Settings(K, axis, False, 1.3, 1e-12, 1.0, n_vectors=len(U))
    ((Y, sigma), it), = arithmetic.normalize_all([Forward(
        settings, W, U, gamma, ('Y', 'sigma'), update, True, renewal)])
    grads, = arithmetic.gradients_all([Backward(
        settings, it, ('W', 'gamma'), W, U, gamma, gY,
        to(np.array(0.3, sigma.dtype)))])
    found = {name: get(x) for name, x in zip(NAMES, (
        Y, sigma, *grads, it.u, it.v, it.singular_values, it.basis, it.turn(),
        it.residual(), U))}
    # What goes wrong in many blocks must not be done again by one.
    found['by many'] = arithmetic is host or it.is_small or bool(
        it.array(it.at + it.subspace.found, 2, np.dtype('d'))[1])
    return found


def gap_of(values):
    """The least distance of two, over the largest: rounding turns their
    vectors into each other, by as much more as they are closer."""
    gaps = -np.diff(np.sort(values)[::-1]) / max(values)
    return max(1e-3, min(gaps, default=1))


def compare(W, U, *args, tolerance=None, by_many=True, **kwargs):
    """The same on the host and on the device; vectors up to their signs."""
    tolerance = tolerance or TOLERANCE[W.dtype.char]
    expected, actual = [
        run(arithmetic, W, U, *args, **kwargs)
        for arithmetic in (host, device)]
    assert actual['by many'] or not by_many
    for name in NAMES:
        x, y = expected[name], actual[name]
        assert x.shape == y.shape
        if name in ('u', 'v', 'basis', 'following'):
            y = y * np.sign((x * y).sum(axis=-1, keepdims=True))
        largest = abs(x).max()
        if name in ('turn', 'residual'):
            largest = 10.0  # a small difference of what is about 1
        if name in ('basis', 'following'):
            largest *= 1 + .04 / gap_of(expected['values'])
        np.testing.assert_allclose(
            y, x, rtol=tolerance, atol=tolerance * largest, err_msg=name)


def make(shape, axis, b, dtype='f', u_dtype=None):
    return (random(*shape).astype(dtype),
            random(b, shape[axis]).astype(u_dtype or dtype))


RENEWALS = [NEVER, Renewal(0, 2.0, rtol=1e-2), Renewal(3, 1e-3),
            Renewal(20, 2.0, rtol=1e-2)]
# All ways to read a weight, by one entry at a time and by several.
SHAPES = [((40, 30), 0), ((40, 3, 4, 4), 0), ((5, 12, 7), 1),
          ((3, 12, 16), 1), ((65, 17), 1), ((30, 40), 1)]
# Others than these take a while to compile.
COMMON = [(3, 'ff'), (8, 'ff'), (3, 'dd')]


@pytest.mark.parametrize(('b', 'types'), [*COMMON, *[
    pytest.param(b, types, marks=pytest.mark.slow)
    for b in (1, 2, 3, 8, 16) for types in ('ff', 'dd', 'ef', 'ee')
    if (b, types) not in COMMON]])
@pytest.mark.parametrize(('shape', 'axis'), SHAPES)
def test_as_on_the_host(shape, axis, b, types):
    if b > min(shape[axis], np.prod(shape) // shape[axis]):
        return
    for K, update, renewal in zip((1, 1, 2, 2, 1), (1, 0, 1, 0, 0),
                                  (NEVER, *RENEWALS)):
        W, U = make(shape, axis, b, *types)
        compare(W, U, axis, K=K, update=bool(update), renewal=renewal)


def test_nothing_waits(path):  # NOQA: F811
    for K, update in ((1, True), (2, True), (2, False)):
        W, U = map(send, make((40, 30), 0, 3))
        x = chainer.Variable(W)
        with watched() as forward:
            Y = functions.spectral_normalize(x, U, K, update_u=update)
        Y.grad = Y.array
        with watched() as backward:
            Y.backward()
        if path == 'one block':
            assert list(forward) == ['sn_fused_subspace']
            assert list(backward) == ['sn_fused_bwd']
            continue
        one = [f'sn_{name}_subspace' for name in (
            'begin', 'product', 'gram', 'solve', 'product', 'follow')]
        expected = one * K if update else one * (K - 1) + one[:4]
        assert list(forward) == [*expected, 'sn_finish_subspace']
        assert list(backward) == ['sn_dot_bwd', 'sn_correct_bwd']


def test_weights_of_a_kind_share_launches(path):  # NOQA: F811
    shapes = [(40, 30), (12, 35), (16, 16, 2)]
    Ws, Us = zip(*[map(send, make(shape, 0, 3)) for shape in shapes])
    alone = [functions.spectral_normalize(W, U) for W, U in zip(Ws, Us)]
    with watched() as launches:
        Ys = functions.spectral_normalize_all(Ws, Us)
    assert len(launches) == (1 if path == 'one block' else 5)
    for Y, expected in zip(Ys, alone):
        np.testing.assert_array_equal(get(Y.array), get(expected.array))


def test_one_vector_and_several_in_one_call():
    Ws, us = [random(12, 9).astype('f') for _ in range(3)], [
        random(3, 12).astype('f'), random(12).astype('f'),
        random(8, 12).astype('f')]
    expected = functions.spectral_normalize_all(Ws, us)
    actual = functions.spectral_normalize_all(
        [*map(send, Ws)], [*map(send, us)])
    for Y, y in zip(expected, actual):
        np.testing.assert_allclose(get(y.array), Y.array, rtol=2e-5)


def test_more_vectors_than_the_kernels_have_room_for():
    W, U = map(send, make((40, 40), 0, 33))
    with pytest.raises(errors.VectorCountError, match='at most 32'):
        functions.spectral_normalize(W, U, update_u=True)


@pytest.mark.slow
def test_as_many_vectors_as_there_is_room_for():
    compare(*make((40, 50), 0, 32), 0, tolerance=1e-3)


# Weights and vectors that one block alone computes.

@pytest.mark.parametrize('dtype', ['f', pytest.param(
    'd', marks=pytest.mark.slow)])
@pytest.mark.parametrize('scale', ['huge', 'tiny'])
def test_extreme_weights(scale, dtype):
    scale = {'fhuge': 1e30, 'ftiny': 1e-30, 'dhuge': 1e140, 'dtiny': 1e-140}[
        dtype + scale]
    for K, update, renewal in ((1, True, NEVER), (2, False, RENEWALS[2])):
        W, U = make((40, 30), 0, 3, dtype)
        W *= W.dtype.type(scale)
        compare(W, U, 0, K=K, update=update, renewal=renewal, by_many=False)


@pytest.mark.parametrize('scales', [(1e25, 1, 1e-25), (1e-8, 1, 1e8)])
def test_lengths_of_the_vectors_do_not_matter(scales):
    W, U = make((40, 30), 0, 3)
    compare(W, U * np.array(scales, 'f')[:, None], 0)


@pytest.mark.parametrize(('part', 'dtype', 'tolerance'), [
    (1e-2, 'd', 1e-9), (1e-3, 'd', 1e-9), (1e-2, 'f', 2e-5),
    (1e-3, 'f', 1e-4)])
def test_vectors_that_are_nearly_dependent(part, dtype, tolerance):
    """Their span, which differences of them make."""
    W, U = make((40, 30), 0, 3, dtype)
    U[1:] = U[0] + W.dtype.type(part) * U[1:]
    compare(W, U, 0, tolerance=tolerance)


BAD_ROWS = {
    'zero': lambda U: U.__setitem__(1, 0),
    'all zero': lambda U: U.__setitem__(slice(None), 0),
    'NaN': lambda U: U.__setitem__((0, 2), np.nan),
    'Inf': lambda U: U.__setitem__((2, 2), np.inf),
    'dependent': lambda U: U.__setitem__(2, 3 * U[0] - U[1]),
    'the same': lambda U: U.__setitem__(slice(None), U[0].copy()),
}


@pytest.mark.parametrize('name', BAD_ROWS)
def test_bad_vectors_are_replaced(name):
    """By some that are independent of the others, which stay."""
    W, U = make((12, 30), 0, 3, 'd')
    good = U.copy()
    BAD_ROWS[name](U)
    is_kept = np.equal(U, good).all(axis=1)
    if name == 'dependent':
        U[2] += 1e-13 * random(12)  # what rounding leaves of others
    W, U = send(W), send(U)
    _, it = device.normalize_all([Forward(
        Settings(1, 0, False, n_vectors=3), W, U, 1.0, ('Y',), True)])[0]
    start = get(it.start)
    np.testing.assert_array_equal(start[is_kept], good[is_kept])
    assert np.linalg.cond(start) < 100
    assert float(it.restarted) == 1
    np.testing.assert_allclose(get(it.basis) @ get(it.basis).T, np.eye(3),
                               atol=1e-12)
    expected = reference.span_norm(get(W), start)[2]
    np.testing.assert_allclose(float(it.sigma), expected, rtol=1e-12)
    assert np.linalg.cond(get(U)) < 1e3


@pytest.mark.parametrize('value', [0, np.nan, np.inf])
def test_a_weight_without_a_direction_stores_nothing(value):
    W, U = make((40, 30), 0, 3)
    W[2, 3] = value
    W *= value != 0
    device_U = send(U)
    Y, sigma = functions.spectral_normalize(
        send(W), device_U, 2, update_u=True, return_sigma=True)
    np.testing.assert_array_equal(get(device_U), U)
    if value == 0:
        assert not get(Y.array).any()
        assert float(sigma.array) == 0
    else:
        assert np.isnan(get(Y.array)).all()
        assert np.isnan(get(sigma.array))
    zero = value == 0
    for renewal in RENEWALS:
        actual = run(device, W, U, 0, renewal=renewal)
        assert (actual['turn'], actual['residual']) == (0, 0)
        for name in ('v', 'gW') if zero else ('v', 'u', 'values', 'gW'):
            assert zero or np.isnan(actual[name]).all()
        assert not zero or not actual['v'].any()


def test_a_span_that_W_takes_to_zero_is_left():
    W = np.zeros((40, 30), 'f')
    W[7, 1] = 2
    U = send(np.eye(3, 40, dtype='f'))
    Y, sigma = functions.spectral_normalize(
        send(W), U, update_u=True, return_sigma=True)
    assert (float(sigma.array), float(Y.array[7, 1])) == (2, 1)
    assert abs(float(U[0, 7])) == 1


@pytest.mark.parametrize('name', test_subspace.HARD)
def test_hard_weights(name):
    for scale in (1e-37, 1, 1e37):
        W = send((test_subspace.HARD[name]() * scale).astype('f'))
        U = send(random(3, 6).astype('f'))
        for _ in range(30):
            Y = functions.spectral_normalize(W, U, eps=0, update_u=True)
            assert np.linalg.cond(get(U)) < 2e3
        np.testing.assert_allclose(
            reference.true_norm(get(Y.array)), 1, atol=2e-5)


# Gradients.

def test_100_random_gradients():
    assert max([error_of_gradient(np.random.RandomState(i))
                for i in range(100)]) < 1e-9


def error_of_gradient(rng):
    m, n = rng.randint(3, 8, size=2)
    W, U, gY = rng.randn(m, n), rng.randn(3, m), rng.randn(m, n)
    x = chainer.Variable(send(W))
    Y = functions.spectral_normalize(x, send(U))
    Y.grad = send(gY)
    Y.backward()
    expected = reference.complex_step(
        lambda W: (gY * W).sum() / reference.span_norm(W, U)[2], W)
    return abs(get(x.grad) - expected).max() / abs(expected).max()


@pytest.mark.parametrize('names', [('Y',), ('Y', 'sigma')])
@pytest.mark.parametrize(('shape', 'axis'), [((6, 9), 0), ((4, 5, 3), 1)])
def test_double_backward(shape, axis, names, monkeypatch):
    patch_functions(monkeypatch)
    test_subspace.test_double_backward(shape, axis, 3, names)


def test_detached_higher_orders_have_constant_vectors(monkeypatch):
    patch_functions(monkeypatch)
    test_subspace.test_detached_higher_orders_have_constant_vectors()


@pytest.mark.parametrize('initial', [0.9, 1.02, 30.0])
def test_gamma_is_made_anew(initial):
    W, U = make((40, 30), 0, 3)
    sigma = float(run(host, W, U, 0)['sigma'])
    gammas = []
    for convert in (np.copy, send):
        gamma, of_init = (convert(np.array(initial * sigma, 'f'))
                          for _ in range(2))
        (host if convert is np.copy else device).normalize_all([Forward(
            Settings(1, 0, False, n_vectors=3), convert(W), convert(U), gamma,
            ('Y',), renewal=Renewal(0, 2.0, of_init))])
        gammas.append([float(gamma), float(of_init)])
    np.testing.assert_allclose(*gammas, rtol=1e-5)


def test_recomputation_starts_from_the_same_vectors():
    W, U = map(send, make((40, 30), 0, 3))
    settings = Settings(1, 0, False, n_vectors=3)
    before = U.copy()
    _, it = device.normalize_all([Forward(
        settings, W, U, 1.0, ('Y',), True)])[0]
    np.testing.assert_array_equal(get(it.start), get(before))


def test_warm_up():
    W, U = make((40, 30), 0, 3)
    on_device = send(U)
    host.warm_up(W, U, 0, 3)
    device.warm_up(send(W), on_device, 0, 3)
    np.testing.assert_allclose(abs(get(on_device)), abs(U), atol=2e-4)


# How a large weight is dealt out.

DEALT_OUT = [((6, 3000), 0), ((3000, 6), 0), ((6, 3000), 1), ((3000, 6), 1),
             ((200, 4, 16), 1)]


@pytest.mark.parametrize(('few', 'long'), [(1000, 0), (1, 8)])
@pytest.mark.parametrize(('shape', 'axis'), DEALT_OUT)
def test_dealt_out_otherwise(shape, axis, few, long, monkeypatch):
    """In parts that are added up, and by few blocks."""
    monkeypatch.setattr(kernels, 'FUSED_SIZE', 0)
    # With more threads, sums of so few terms have no parts.
    monkeypatch.setattr(kernels, 'BLOCK_SIZE', 64)
    monkeypatch.setattr(workspace, 'FEW_BLOCKS', few)
    monkeypatch.setattr(workspace, 'LONG_SUM', long)
    monkeypatch.setattr(workspace, 'MAX_BLOCKS', 1024 if few > 1 else 2)
    monkeypatch.setattr(workspace, 'OF_A_GRAM', 2)
    workspace.subspace_plan.cache_clear()
    workspace.plan.cache_clear()
    try:
        W, U = make(shape, axis, 3)
        it = device_subspace.Forward(Forward(
            Settings(1, axis, False, n_vectors=3), send(W), send(U), 1.0,
            ())).subspace
        assert few == 1 or it.s.is_gathered or it.t.is_gathered
        compare(W, U, axis)
    finally:
        workspace.subspace_plan.cache_clear()
        workspace.plan.cache_clear()


# A tolerance for one vector.

@pytest.mark.parametrize('K', [1, 2])
@pytest.mark.parametrize('rtol', [10, 0.3, 1e-2, 1e-3])
@pytest.mark.parametrize(('shape', 'axis'), [((40, 30), 0), ((5, 12, 7), 1)])
def test_tolerance_of_one_vector(shape, axis, rtol, K):
    W, u = random(*shape).astype('f'), random(shape[axis]).astype('f')
    for scale in (1, 1e30):
        found = []
        for convert in (np.copy, send):
            x, v = chainer.Variable(convert(W * W.dtype.type(scale))), (
                convert(u))
            Y, sigma = functions.spectral_normalize(
                x, v, K, axis=axis, rtol=rtol, max_iterations=1000,
                update_u=True, return_sigma=True)
            Y.grad = convert(W)
            Y.backward()
            found.append([*map(get, (
                Y.array, sigma.array / scale, v, x.grad * scale))])
        for a, b in zip(*found):
            np.testing.assert_allclose(
                b, a, rtol=1e-4, atol=1e-4 * abs(a).max())


@pytest.mark.parametrize('value', [0, np.nan])
@pytest.mark.parametrize('shape', [(40,), (3, 40)])
def test_tolerance_of_a_weight_without_a_residual(shape, value):
    W = send(np.full((40, 30), value, 'f'))
    u = random(*shape).astype('f')
    device_u = send(u)
    functions.spectral_normalize(
        W, device_u, rtol=1e-3, max_iterations=5, update_u=True)
    np.testing.assert_array_equal(get(device_u), u)


# The hook.

def test_training_with_a_hook_does_not_wait(path):  # NOQA: F811
    link = L.Linear(30, 40).add_hook(SpectralNormalization(
        n_vectors=3, use_gamma=True))
    link.to_device(DEVICE)
    x = send(random(5, 30).astype('f'))
    link(x)  # makes what is made once
    before = get(link.W_us)
    with watched() as launches:
        y = link(x)
        y.grad = y.array
        y.backward()
    several = [name for name in launches if name.endswith('_subspace')]
    assert len(several) == (1 if path == 'one block' else 7)
    assert not np.array_equal(get(link.W_us), before)


def test_the_hook_is_as_on_the_host():
    weights = []
    for name in ('@numpy', DEVICE):
        np.random.seed(0)
        link = L.Linear(30, 40).add_hook(SpectralNormalization(n_vectors=3))
        link(random(5, 30).astype('f'))
        link.to_device(name)
        optimizer = chainer.optimizers.SGD(0.1).setup(link)
        x = chainer.get_device(name).send(random(5, 30).astype('f'))
        for _ in range(3):
            optimizer.update(lambda: CF.sum(link(x) ** 2))  # NOQA: B023
        with chainer.using_config('train', False):
            link(x)
        weights.append(get(link.W.array))
    np.testing.assert_allclose(*weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', 'fd')
def test_vectors_that_are_each_close_to_the_one_before(dtype):
    """No pivot is small, and still much cancels in a basis of their span."""
    U = np.eye(8, 32)
    U[1:] = .3 * U[1:] - (1 - .3 ** 2) ** .5 * U[:-1]
    U = (U @ np.linalg.qr(random(32, 32))[0]).astype(dtype)
    W = random(32, 32).astype(dtype)
    sigma = functions.spectral_norm(send(W), send(U))
    norm, expected = (np.linalg.norm(x, 2) for x in (
        W.astype('d'),
        np.linalg.qr(U.T.astype('d'))[0].T @ W.astype('d')))
    assert get(sigma.array) < norm * (1 + 1e-5)
    np.testing.assert_allclose(get(sigma.array), expected, rtol=0.05)


@pytest.mark.parametrize('dtype', 'fd')
def test_rows_that_come_back(dtype):
    """They are next to nothing in any vector, and then all that W has."""
    W, U = random(32, 48).astype(dtype), random(4, 32).astype(dtype)
    rows = [0, 1, 16, 17]
    U[:, rows] *= 1e-25
    W[[i for i in range(32) if i not in rows]] = 0
    to_W, to_U = send(W), send(U)
    for _ in range(8):
        sigma = functions.spectral_norm(to_W, to_U, update_u=True)
        assert np.isfinite(get(to_U)).all()
    np.testing.assert_allclose(
        get(sigma.array), np.linalg.norm(W.astype('d'), 2), rtol=1e-2)
