"""Each kernel by itself, against its formula in NumPy; on the host where there
is no device.

How they work together is tested in :mod:`tests.arithmetic.test_device`, and
those of several vectors in :mod:`tests.arithmetic.test_subspace_kernels`.
"""
import types

import chainer
import numpy as np
import pytest
from chainer.backends import cuda

from sn_function._arithmetic import kernels
from tests import cuda_on_host, reference
from tests.cuda_on_host import array as on_host

gpu = pytest.mark.gpu
NULL = kernels.NULL
# Of vectors and of sums of products, by the dtype that they are made in.
TOLERANCE = {'e': 2e-3, 'f': 1e-5, 'd': 1e-13}
# Dtypes of the weight and of u.
TYPES = ['ee', 'ef', 'ff', 'dd']
# Of a block: here, and as it is used.
THREADS = 64
BLOCK_SIZES = {name: getattr(kernels, name)
               for name in ('BLOCK_SIZE', 'FUSED_BLOCK_SIZE')}


@pytest.fixture(autouse=True)
def _schedule(monkeypatch):
    """Small blocks, as a thread is a fiber; in an order that shows what
    depends on any, and the same at each run."""
    for name in BLOCK_SIZES:
        monkeypatch.setattr(kernels, name, THREADS)
    with cuda_on_host.schedule('random', seed=1):
        yield


class Case:
    """One weight of a launch.

    Args:
        own: Its arguments.
        check: Compares what the kernel has written.
        common: Arguments that all weights of the launch have in common.

    """

    def __init__(self, own, check, *common):
        self.own, self.check, self.common = own, check, common


def run(kernel, T, U, *cases):
    kernel(np.dtype(T), np.dtype(U), [case.own for case in cases],
           *cases[0].common)
    for case in cases:
        case.check()


def A_of(T):
    return {'e': 'f'}.get(T, T)


def send(x):
    return chainer.get_device('@cupy:0').send(x)


def get(x):
    return cuda.to_cpu(x).astype('d')


def empty(shape, dtype, is_aligned=True):
    """Garbage, with nothing else in its memory."""
    x = cuda.cupy.empty(shape, dtype)
    return x if is_aligned else misaligned(x)


def random(shape, dtype, is_aligned=True):
    """The same array on the host, in float64, and on the device."""
    x = np.random.normal(size=shape).astype(dtype)
    on_device = send(x)
    return x.astype('d'), on_device if is_aligned else misaligned(on_device)


def misaligned(x):
    """A copy that does not start at a multiple of 16 bytes."""
    y = cuda.cupy.empty(x.size + 1, x.dtype)[1:].reshape(x.shape)
    y[...] = x
    return y


def integers(*numbers):
    return tuple([np.int32(x) for x in numbers])


def check(actual, expected, tolerance, atol=None):
    expected = np.asarray(expected, 'd')
    actual = (get(actual) if isinstance(actual, cuda.ndarray)
              else np.asarray(actual))
    assert actual.shape == expected.shape
    if atol is None and expected.size:
        atol = np.nanmax([0, *abs(expected.ravel())])
    np.testing.assert_allclose(
        actual, expected, rtol=tolerance, atol=tolerance * (atol or 0))


def divided(total, n):
    """Sums of n blocks."""
    parts = np.random.uniform(1, 2, size=n)
    return parts / parts.sum() * total


def sums_of(y, e, n):
    """What a product leaves: y . y, e . y and e . e of each block."""
    return send(np.array([divided(x, n) for x in (y @ y, e @ y, e @ e)]))


class Kept:
    """What a forward or a backward keeps, in the places of kernels.py.

    Args:
        A: Dtype of the vectors.
        names: Of the numbers that come first.
        numbers: Those that are there, by name.
        norms: They come next.
        first, second: Arrays, each with a vector in each row.

    """

    def __init__(self, A, names, numbers, norms, first, second):
        self.names, self.n_norms = names, len(norms)
        self.shapes = first.shape, second.shape
        self.A = np.dtype(A)
        head = [*[numbers.get(name, np.nan) for name in names], *norms]
        gap = -first.size % 4
        # The length in bytes is a multiple of 8.
        end = (first.size + gap + second.size) % 2
        tail = np.concatenate([
            first.ravel(), np.full(gap, np.nan), second.ravel(),
            np.full(end, np.nan)]).astype(A)
        self.array = send(np.concatenate([head, tail.view('d')]))

    def numbers(self):
        return dict(zip(self.names, cuda.to_cpu(self.array)))

    def norms(self):
        start = len(self.names)
        return cuda.to_cpu(self.array)[start:start + self.n_norms]

    def vectors(self):
        """Returns the arrays first and second, in float64."""
        start = len(self.names) + self.n_norms
        x = cuda.to_cpu(self.array)[start:].view(self.A).astype('d')
        (a, b), (c, d) = self.shapes
        second = a * b + -a * b % 4
        assert np.isnan(x[a * b:second]).all()
        return (x[:a * b].reshape(a, b),
                x[second:second + c * d].reshape(c, d))


def kept_numbers(**numbers):
    """A state of which a kernel needs the numbers alone."""
    return send(np.array([
        numbers.get(name, np.nan) for name in kernels.NUMBERS]))


def matrix(W):
    return reference.as_matrix(W, 1)


# Kernels of CuPy's own kinds.

@gpu
@pytest.mark.parametrize('order', ['ascending', 'descending', 'random'])
@pytest.mark.parametrize('threads', [32, 512])
@pytest.mark.parametrize('T', 'efd')
@pytest.mark.parametrize('shape', [(1, 1, 1), (3, 5, 7), (5, 127, 9)])
def test_middle_product(shape, T, threads, order):
    l, m, r = shape  # NOQA: E741
    A = A_of(T)
    W, w = random(shape, T)
    x, device_x = random((l, 1, r), A)
    y = empty(m, A)
    with cuda_on_host.block_size(threads), cuda_on_host.schedule(order):
        kernels.middle_product(
            w, device_x, send(np.array(0.25)), axis=(0, 2), out=y)
    check(y, 0.25 * matrix(W) @ x.ravel(), TOLERANCE[A],
          (abs(W) * abs(x)).sum(axis=(0, 2)).max())


@gpu
def test_middle_product_of_float16_adds_up_in_float32():
    W = send(np.full((1, 1, 4000), 30, 'e'))
    y = empty(1, 'f')
    kernels.middle_product(
        W, W.astype('f'), send(np.array(1.0)), axis=(0, 2), out=y)
    assert float(y[0]) == 3.6e6  # 55 times what float16 can hold


@gpu
@pytest.mark.parametrize('A', 'fd')
def test_renew_gamma(A):
    for value, expected in ((0, [0.5, 2]), (3, [3, 3])):
        gamma, initial = send(np.array(0.5, A)), send(np.array(2, A))
        kernels.renew_gamma(kept_numbers(NEW_GAMMA=value), gamma, initial)
        assert [float(gamma), float(initial)] == expected


@gpu
@pytest.mark.parametrize(('A', 'U'), ['fe', 'ff', 'dd'])
def test_gradient_of_u(A, U):
    ubar, device_ubar = random(100, A)
    for restarted in (0, 1):
        gu = empty(100, U)
        kernels.gradient_of_u(
            kept_numbers(SCALE=0.25, U_NORM=3, RESTARTED=restarted),
            send(np.array([np.nan, 1.5])), device_ubar, gu)
        check(gu, (not restarted) * ubar * 1.5 / 0.25 / 3, TOLERANCE[U])


# Products.

# What threads are next to each other in, for a result of length n_out.
WAYS = {
    'W^T by rows': lambda n_out, n_in: (True, (n_out, n_in, 1)),
    'W by rows': lambda n_out, n_in: (False, (1, n_out, n_in)),
    'W^T by columns': lambda n_out, n_in: (True, (1, n_in, n_out)),
    'W^T by columns of two': lambda n_out, n_in: (
        True, (2, n_in, n_out // 2)),
    'W by columns': lambda n_out, n_in: (False, (n_in, n_out, 1)),
}
# n_out, n_in, lanes, parts, is_wide, blocks
PRODUCTS = [
    (2, 1, 1, 1, 0, 1),
    (6, 37, 8, 1, 0, 2),
    (40, 64, 4, 1, 1, 3),
    (16, 1000, 32, 3, 1, 5),
    (12, 1000, 64, 2, 0, 4),
    (130, 9, 16, 1, 0, 20),
]
ROLES = ['first', 'of a raw x', 'of a raw zero', 'with the norm of x',
         'with gY', 'divided']
NORMS = {'of a raw x': 3.0, 'of a raw zero': 0.0, 'with the norm of x': 3.0}


def product_case(
        T, U, way, n_out, n_in, lanes, parts, is_wide, blocks, role,
        scale=0.25):
    is_transposed, shape = WAYS[way](n_out, n_in)
    A = A_of(T)
    is_first, is_raw = role == 'first', 'raw' in role
    W, w = random(shape, T, is_wide)
    # u of the caller may be misaligned where it is read one by one.
    x, device_x = (random(n_in, U, is_wide and shape[2] == 1) if is_first
                   else random(n_in, A))
    if role == 'of a raw zero':
        x, device_x = 0 * x, 0 * device_x
    e, device_e = random(n_out, A)
    y = empty((parts, n_out), A)
    if is_first:
        scale, numbers = 1, kept_numbers()
        start = empty(n_in, A)
    else:
        numbers, start = kept_numbers(SCALE=scale), NULL
    sums = extras = gy = x_sums = norm = divisor = NULL
    n_x_sums, factor = 0, 1.0
    if parts == 1:
        sums = empty((3, blocks), 'd')
    if is_first or role == 'with gY':
        extras = empty(blocks, 'd')
    if role == 'with gY':
        gY, gy = random(shape, T, is_wide)
    if role in NORMS:
        n_x_sums = THREADS + 7
        x_sums = send(divided(NORMS[role] ** 2, n_x_sums))
        norm = empty(1, 'd')
    if is_raw:
        factor = 1 / (NORMS[role] or 1)
    elif role == 'divided':
        divisor, factor = send(np.array([5.0])), 1 / (5 * scale)
    e_or_not = NULL if is_first or parts > 1 else device_e

    def check_product():
        M = matrix(W).T if is_transposed else matrix(W)
        check(get(y).sum(axis=0), factor * scale * M @ x, TOLERANCE[A],
              (factor * scale * abs(M) @ abs(x)).max())
        if parts == 1:
            check_sums(sums, get(y)[0], 0 * e if is_first else e)
        if role == 'with gY':
            check(get(extras).sum(), np.vdot(gY, W), 1e-13,
                  abs(gY * W).sum())
        if is_first:
            assert get(extras).max() == abs(W).max()
            np.testing.assert_array_equal(get(start), x)
            assert get(numbers)[:3].tolist() == [1, 1, 0]
        if role in NORMS:
            check(norm, [NORMS[role]], 1e-15)

    of_x = (x_sums, norm, divisor, numbers, *integers(n_x_sums, is_raw))
    return Case((
        w, gy, device_x if is_first else NULL, NULL if is_first else device_x,
        start, y, e_or_not, sums, extras, *of_x,
        *integers(is_transposed, lanes, parts, is_wide, *shape, blocks)),
        check_product)


def check_sums(sums, y, e):
    check(get(sums).sum(axis=1), [y @ y, e @ y, e @ e], 1e-13,
          y @ y + e @ e)


@gpu
@pytest.mark.parametrize('types', TYPES)
@pytest.mark.parametrize('size', PRODUCTS)
@pytest.mark.parametrize('way', WAYS)
def test_product(way, size, types):
    T, U = types
    # The first of a forward is one of W^T.
    for role in ROLES if way.startswith('W^T') else ROLES[1:]:
        run(kernels.product, T, U, product_case(T, U, way, *size, role))


@gpu
@pytest.mark.parametrize('way', WAYS)
def test_product_of_float16_adds_up_in_float32(way):
    is_transposed, shape = WAYS[way](2, 4000)
    W, y = send(np.full(shape, 30, 'e')), empty(2, 'f')
    run(kernels.product, 'e', 'f', Case((
        W, NULL, NULL, send(np.full(4000, 30, 'f')), NULL, y, NULL, NULL,
        NULL, NULL, NULL, NULL, kept_numbers(SCALE=1),
        *integers(0, 0, is_transposed, 32, 1, 0, *shape, 1)),
        lambda: check(y, [3.6e6, 3.6e6], 0)))


def gather_case(T, n, n_parts, blocks, role='plain', in_place=False):
    A = A_of(T)
    parts, y_parts = random((n_parts, n), A)
    e, device_e = random(n, A)
    y = y_parts if in_place else empty(n, A)
    sums = empty((3, blocks), 'd')
    x_sums = norm = divisor = NULL
    factor, has_e = 1.0, role != 'first'
    is_raw = 'raw' in role
    if role in NORMS:
        x_sums = send(divided(NORMS[role] ** 2, 70))
        norm = empty(1, 'd')
    if is_raw:
        factor = 1 / (NORMS[role] or 1)
    elif role == 'divided':
        divisor, factor = send(np.array([5.0])), 1 / (5 * 0.25)

    def check_gather():
        result = get(y).reshape(n)
        check(result, factor * parts.sum(axis=0), TOLERANCE[A],
              factor * abs(parts).sum(axis=0).max())
        check_sums(sums, result, e if has_e else 0 * e)
        if role in NORMS:
            check(norm, [NORMS[role]], 1e-15)

    return Case((
        y_parts, np.int32(n_parts), y, device_e if has_e else NULL, sums,
        x_sums, norm, divisor, kept_numbers(SCALE=0.25),
        *integers(70, is_raw, n, blocks)), check_gather)


@gpu
@pytest.mark.parametrize('T', 'efd')
@pytest.mark.parametrize(('n', 'n_parts', 'blocks'), [
    (1, 1, 1), (37, 3, 2), (300, 20, 3)])
def test_gather(n, n_parts, blocks, T):
    for role in [*ROLES, 'plain']:
        run(kernels.gather, T, A_of(T), gather_case(
            T, n, n_parts, blocks, role))
    # As a product of the middle leaves it.
    run(kernels.gather, T, A_of(T), gather_case(
        T, n, 1, blocks, 'divided', in_place=True))


# The end of a forward, and all of it in one block.

def norm_of(x):
    return np.sqrt(x @ x)


def iterate(W, u, K):
    """Returns u_0 .. u_K, v_1 .. v_K, and the norms of s and t."""
    M = matrix(W)
    us, vs, s_norms, t_norms = [u], [], [], []
    for _ in range(K):
        for A, xs, ys, norms in (
                (M.T, us, vs, s_norms), (M, vs, us, t_norms)):
            y = A @ xs[-1]
            norms.append(norm_of(y) or 1.0)
            ys.append(y / norms[-1])
    # Of a zero t the norm is kept as 1.
    sigma = norm_of(M @ vs[-1])
    return types.SimpleNamespace(
        us=np.array(us), vs=np.array(vs), s_norms=np.array(s_norms),
        t_norms=np.array(t_norms), sigma=sigma)


def is_extreme(x, A):
    limit = {'f': 1e12, 'd': 1e100}[A]
    return not 1 / limit < norm_of(x) < limit


class Forward:
    """What a forward should leave.

    Args:
        W, u: In float64.
        K, n_warmup, limit, rtol: As kernels take them.
        A: Dtype of the vectors.

    """

    def __init__(self, W, u, K, n_warmup, limit, A, rtol=-1.0):
        self.u_norm, self.restarted, start = 1.0, 0, u
        self.is_finite = bool(np.isfinite(W).all())
        # All is zero whatever W = 0 starts from.
        self.is_start_of_use = W.any() or u.any()
        M = matrix(W)
        with np.errstate(all='ignore'):
            if not self.is_finite:
                W = np.full_like(W, np.nan)
            elif not np.isfinite(u).all() or not u.any() or (
                    W.any() and not (M.T @ u).any()):
                self.restarted, start = 1, np.zeros(len(u))
                start[np.linalg.norm(M, axis=1).argmax()] = 1
            elif is_extreme(u, A):
                size = abs(u).max()
                self.u_norm = norm_of(u / size) * size
                start = u / self.u_norm
            if self.is_finite and W.any() and rtol >= 0:
                for _ in range(0, n_warmup, K):
                    it = iterate(W, start, K)
                    s = M.T @ it.us[K] / it.sigma
                    if norm_of(s - it.vs[K - 1]) <= rtol:
                        break
                    start = it.us[K]
            elif self.is_finite and n_warmup and W.any():
                first = iterate(W, start, 1).us[1]
                if 1 - first @ start / norm_of(start) > limit:
                    start = reference.settled(
                        W, start, K, 1, limit, n_warmup)
            self.all = iterate(W, start, K)


def forward_case(
        kernel, types, shape, K, edit=None, gamma=0.7, initial_gamma=None,
        eps=1e-12, update=1, n_warmup=0, limit=2.0, blocks=2, is_wide=1,
        outputs='Y sigma', rtol=-1.0):
    """The same of both kernels, from what sn_product leaves for the first."""
    (T, U), A = types, A_of(types[0])
    l, m, r = shape  # NOQA: E741
    n, at_zero, factor = l * r, 0.5, 1.3
    W, u = np.random.normal(size=shape), np.random.normal(size=m)
    if edit is not None:
        W, u = edit(W, u, {'f': 1e30, 'd': 1e140}[A])
    W, u = W.astype(T), u.astype(U)
    w, device_u = send(W), misaligned(send(u))
    if not is_wide:
        w = misaligned(w)
    W, u = W.astype('d'), u.astype('d')
    expected = Forward(W, u, K, n_warmup, limit, A, rtol)
    sigma = expected.all.sigma
    gamma, initial_gamma = (
        x(sigma) if callable(x) else x for x in (gamma, initial_gamma))
    device_gamma, device_initial = (
        NULL if x is None else send(np.array(x, A))
        for x in (gamma, initial_gamma))
    Y = empty(shape, T, is_wide) if 'Y' in outputs else NULL
    sigma_out = empty((), A) if 'sigma' in outputs else NULL
    new_gamma = 0.0
    if initial_gamma is not None and initial_gamma == gamma:
        start, first = expected.all.us[:2]
        turn = 1 - start @ first / norm_of(start) if sigma else 0
        # As the interface says it.
        if abs(sigma - gamma) > 0.1 * gamma and (
                sigma > gamma or turn <= 1e-2):
            new_gamma = sigma or 1.0

    is_fused = kernel is kernels.fused_fwd
    next_s = NULL if rtol < 0 else empty(n, A)
    if is_fused:
        kept = Kept(A, kernels.NUMBERS, {}, np.full(2 * K, np.nan),
                    np.full((K + 1, m), np.nan), np.full((K, n), np.nan))
        inputs = (next_s,)
        blocks = 1
    else:
        kept, inputs = left_by_products(W, u, K, A, next_s)

    def check_forward():
        check_kept(expected, kept, A)
        numbers = kept.numbers()
        used = new_gamma or (1.0 if gamma is None else gamma)
        is_above = not (sigma < eps or sigma == 0)
        divisor = sigma if is_above else eps if sigma else at_zero
        coefficient = used * factor / divisor
        for name, value in (
                ('SIGMA', sigma), ('DIVISOR', divisor), ('ABOVE', is_above),
                ('COEF', coefficient), ('NEW_GAMMA', new_gamma)):
            check(numbers[name], value, TOLERANCE[A])
        if Y is not NULL:
            with np.errstate(all='ignore'):
                check(Y, coefficient * W, TOLERANCE[T])
        if sigma_out is not NULL:
            check(sigma_out, sigma, TOLERANCE[A])
        is_updated = update and sigma > 0
        check(device_u, expected.all.us[K] if is_updated else u,
              TOLERANCE[U] if is_updated else 0)
        # A launch of its own does this after sn_finish_fwd.
        is_renewed = new_gamma and is_fused
        for x, before in (
                (device_gamma, gamma), (device_initial, initial_gamma)):
            if x is not NULL:
                check(x, new_gamma if is_renewed else before, TOLERANCE[A])

    return Case((
        w, device_u, kept.array, *inputs, sigma_out, device_gamma,
        device_initial, Y, *integers(*shape), factor,
        *integers(is_wide, blocks)), check_forward, np.int32(K), eps,
        at_zero, *integers(update, n_warmup), limit, rtol)


def left_by_products(W, u, K, A, next_s):
    """Returns the vectors as they are before their division by norms, and
    what else sn_finish_fwd takes."""
    n_sums, n_next_sums, n_extras = THREADS + 3, THREADS + 9, 5
    with np.errstate(all='ignore'):
        raw = iterate(W, u, K)
        is_zero = raw.sigma == 0
        s_norms = raw.s_norms * (not is_zero)
        t_norms = s_norms * raw.t_norms
        us, vs = raw.us.copy(), raw.vs * s_norms[:, None]
        us[1:] *= t_norms[:, None]
        kept = Kept(
            A, kernels.NUMBERS, {'SCALE': 1, 'U_NORM': 1, 'RESTARTED': 0},
            np.full(2 * K, np.nan), us, vs)
        norms = np.concatenate([s_norms, t_norms[:-1], [np.nan]])
        t, u = us[K], us[0]
        s = matrix(W).T @ raw.us[K]
        extras = np.random.uniform(size=n_extras)
        extras *= np.nanmax(abs(W)) / extras.max()
        return kept, (
            send(norms), sums_of(t, u, n_sums), np.int32(n_sums),
            sums_of(s, s, n_next_sums), np.int32(n_next_sums), next_s,
            send(extras), np.int32(n_extras))


def check_kept(expected, kept, A):
    numbers, norms = kept.numbers(), kept.norms()
    us, vs = kept.vectors()
    K, tolerance = len(vs), TOLERANCE[A]
    check(numbers['U_NORM'], expected.u_norm, tolerance)
    if expected.is_start_of_use:
        assert numbers['RESTARTED'] == expected.restarted
        check(us[0], expected.all.us[0], tolerance)
    assert np.frexp(1 / numbers['SCALE'])[0] == 0.5  # a power of two
    check(us[1:], expected.all.us[1:], tolerance)
    check(vs, expected.all.vs, tolerance)
    if expected.is_finite:
        check(norms[:K], expected.all.s_norms, tolerance)
        check(norms[K:], expected.all.t_norms, tolerance)


FORWARDS = [kernels.finish_fwd, kernels.fused_fwd]
of_forwards = pytest.mark.parametrize(
    'kernel', FORWARDS, ids=lambda kernel: kernel.name)


@gpu
@pytest.mark.parametrize('types', TYPES)
@pytest.mark.parametrize('K', [1, 2])
@pytest.mark.parametrize('shape', [
    (1, 1, 1), (1, 5, 37), (64, 36, 1), (2, 13, 40)])
@of_forwards
def test_forward(kernel, shape, K, types):
    for kwargs in ({}, {'gamma': None, 'outputs': 'Y', 'is_wide': 0},
                   {'update': 0, 'eps': 1e3, 'blocks': 1},
                   {'outputs': 'sigma', 'blocks': 5}):
        run(kernel, *types, forward_case(kernel, types, shape, K, **kwargs))


def with_entry(x, value):
    x = x.copy()
    x.flat[-1] = value
    return x


def without_first_row(W, u):
    W, u = W.copy(), np.zeros(len(u))
    W[:, 0], u[0] = 0, 1
    return W, u


def with_equal_rows(W):
    W = W.copy()
    W[:, 1] = W[:, 4] = 3 * W[:, 2]
    return W


RARE = {
    'W is zero': lambda W, u, big: (0 * W, u),
    'W and u are zero': lambda W, u, big: (0 * W, 0 * u),
    'NaN in W': lambda W, u, big: (with_entry(W, np.nan), u),
    'infinity in W': lambda W, u, big: (with_entry(W, np.inf), u),
    'u is zero': lambda W, u, big: (W, 0 * u),
    'u is zero, and two rows are the largest': lambda W, u, big: (
        with_equal_rows(W), 0 * u),
    'NaN in u': lambda W, u, big: (W, with_entry(u, np.nan)),
    'W^T makes u zero': lambda W, u, big: without_first_row(W, u),
}
EXTREME = {
    'W is large': lambda W, u, big: (W * big, u),
    'W is small': lambda W, u, big: (W / big, u),
    'u is large': lambda W, u, big: (W, u * big),
    'u is small': lambda W, u, big: (W, u / big),
    'u and W are small': lambda W, u, big: (W / big, u / big),
    'u is small, W large': lambda W, u, big: (W * big, u / big),
}
# Norms that are ordinary, but their product is not.
SMALL_PRODUCT = {'W W^T u is small': lambda W, u, big: (W / 1e80, u)}


@gpu
@pytest.mark.parametrize('K', [1, 2])
@pytest.mark.parametrize(('types', 'name'), [
    *[(types, name) for types in TYPES for name in RARE],
    *[(types, name) for types in ('ff', 'dd') for name in EXTREME],
    ('ef', 'u is large'), ('ef', 'u is small'),
    *[('dd', name) for name in SMALL_PRODUCT]])
@of_forwards
def test_forward_of_what_is_rare(kernel, types, name, K):
    edit = {**RARE, **EXTREME, **SMALL_PRODUCT}[name]
    # No floor, which a small W is below.
    run(kernel, *types, forward_case(
        kernel, types, (3, 9, 8), K, edit, eps=0.0))


def converged(W, u, big):
    return W, 2.5 * np.linalg.svd(matrix(W))[0][:, 0]


@gpu
@pytest.mark.parametrize(('size', 'gamma'), [(3e38, 0.7), (2e-38, 1e4)])
@of_forwards
def test_forward_at_the_ends_of_the_range(kernel, size, gamma):
    for is_wide in (0, 1):
        run(kernel, 'f', 'f', forward_case(
            kernel, 'ff', (3, 9, 8), 1, lambda W, u, big: (
                size * np.sign(W), u), gamma, eps=0.0, outputs='Y',
            is_wide=is_wide))


@gpu
@pytest.mark.parametrize('types', TYPES)
@pytest.mark.parametrize('K', [1, 2])
@pytest.mark.parametrize('n_warmup', [1, 3, 30])
@of_forwards
def test_forward_with_the_u_of_another_weight(kernel, n_warmup, K, types):
    for shape in ((1, 9, 20), (20, 9, 1)):
        for limit in (1e-2, 2.0):  # the second is never exceeded
            for edit in (None, converged):
                run(kernel, *types, forward_case(
                    kernel, types, shape, K, edit, n_warmup=n_warmup,
                    limit=limit))


@gpu
@pytest.mark.parametrize('types', TYPES)
@pytest.mark.parametrize('K', [1, 2])
@pytest.mark.parametrize('n_warmup', [0, 1, 30])
@of_forwards
def test_forward_with_a_tolerance(kernel, n_warmup, K, types):
    for shape in ((1, 9, 20), (20, 9, 1), (3, 9, 8)):
        for rtol in (10.0, 0.2, 3e-3):
            for edit in (None, converged, RARE['W is zero'],
                         RARE['NaN in W'], EXTREME['u is large']):
                if types[1] == 'e' and edit is EXTREME['u is large']:
                    continue
                run(kernel, *types, forward_case(
                    kernel, types, shape, K, edit, n_warmup=n_warmup,
                    rtol=rtol, eps=0.0))


# From sigma: gamma, and the value that it was initialized with.
GAMMAS = {
    'far below': (lambda sigma: sigma / 2, lambda sigma: sigma / 2),
    'near': (lambda sigma: sigma * 1.05, lambda sigma: sigma * 1.05),
    'far above': (lambda sigma: sigma * 2, lambda sigma: sigma * 2),
    'trained': (lambda sigma: sigma / 2, lambda sigma: sigma / 3),
}


@gpu
@pytest.mark.parametrize('types', TYPES)
@pytest.mark.parametrize('name', GAMMAS)
@of_forwards
def test_gamma_is_made_anew(kernel, name, types):
    gamma, initial = GAMMAS[name]
    for edit in (None, converged):
        run(kernel, *types, forward_case(
            kernel, types, (2, 9, 10), 1, edit, gamma, initial))


@gpu
@pytest.mark.parametrize('types', TYPES)
@of_forwards
def test_gamma_of_a_zero_weight_is_made_one(kernel, types):
    run(kernel, *types, forward_case(
        kernel, types, (2, 9, 10), 1, RARE['W is zero'], 0.75, 0.75))


# Backward, in many blocks.

def dot_case(T, size, is_wide, blocks):
    W, w = random(size, T, is_wide)
    gY, gy = random(size, T, is_wide)
    extras = empty(blocks, 'd')
    return Case(
        (w, gy, extras, np.int64(size), *integers(is_wide, blocks)),
        lambda: check(get(extras).sum(), gY @ W, 1e-13, abs(gY * W).sum()))


@gpu
@pytest.mark.parametrize('T', 'efd')
@pytest.mark.parametrize('is_wide', [0, 1])
@pytest.mark.parametrize(('size', 'blocks'), [(1, 1), (77, 3), (5003, 2)])
def test_dot_bwd(size, blocks, is_wide, T):
    run(kernels.dot_bwd, T, A_of(T), dot_case(T, size, is_wide, blocks))


def project_case(T, n, n_sums, blocks):
    A = A_of(T)
    y, device_y = random(n, A)
    e, device_e = random(n, A)
    e_y = 2.5  # as the sums have it, whatever the vectors are
    sums = np.full((3, n_sums), np.nan)
    sums[1] = divided(e_y, n_sums)
    return Case((
        device_y, device_e, send(sums), np.int32(n_sums),
        send(np.array([5.0])), kept_numbers(SCALE=0.25),
        *integers(n, blocks)),
        lambda: check(device_y, (y - e * e_y) / (5 * 0.25), TOLERANCE[A]))


@gpu
@pytest.mark.parametrize('T', 'efd')
@pytest.mark.parametrize(('n', 'n_sums', 'blocks'), [
    (1, 1, 1), (37, 90, 2), (400, 3, 3)])
def test_project_bwd(n, n_sums, blocks, T):
    run(kernels.project_bwd, T, A_of(T), project_case(T, n, n_sums, blocks))


# K, detach, whether sbar is still W^T tbar
MODES = [(1, 0, 1), (1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 1, 0)]
# Shape, rows of a job, blocks: one tile; a matrix; one strip and several, of
# the columns of each matrix; and the same with r = 1.
CORRECTIONS = [
    ((1, 1, 1), 1, 1),
    ((3, 5, 7), 2, 4),
    ((2, 40, 16), 16, 3),
    ((2, 9, 520), 4, 5),
    ((1, 70, 130), 1000, 2),
    ((150, 5, 1), 8, 4),
    ((40, 64, 1), 4, 3),
    ((9, 520, 1), 4, 2),
]


def correct_case(T, shape, chunk, blocks, K, detach, is_raw, is_wide=1,
                 given='gY gsigma', wanted='gW ggamma', above=1):
    A = A_of(T)
    l, m, r = shape  # NOQA: E741
    n = l * r
    n_sums, n_extras = THREADS + 7, 5
    us, vs, tbars, sbars = (
        np.random.normal(size=size).astype(A).astype('d')
        for size in ((K + 1, m), (K, n), (K, m), (K, n)))
    numbers = {'SCALE': 0.25, 'COEF': 1.5, 'DIVISOR': 3, 'ABOVE': above}
    norms = np.random.uniform(1, 2, size=2 * K)
    state = Kept(A, kernels.NUMBERS, numbers, norms, us, vs)
    bars = Kept(A, kernels.COEFFICIENTS, {}, [], tbars, sbars)
    gY, gy = random(shape, T, is_wide)
    factor, gsigma, dot, v_s = 1.3, 0.8, 2.0, 0.3
    if 'gY' not in given:
        gY, gy = 0 * gY, NULL
    gW = empty(shape, T, is_wide) if 'gW' in wanted else NULL
    ggamma = empty((), A) if 'ggamma' in wanted else NULL
    sums = np.full((3, n_sums), np.nan)
    sums[1] = divided(v_s, n_sums)

    def check_correct():
        a = 1.5 if 'gY' in given else 0
        c = gsigma if 'gsigma' in given else 0
        quotient = dot / 3 if 'gY' in given else 0
        c -= above * 1.5 * quotient
        check(list(bars.numbers().values()), [a, c], 1e-7)
        if ggamma is not NULL:
            check(ggamma, factor * quotient, TOLERANCE[A])
        s = sbars
        if is_raw:
            s = (s - vs * v_s) / (norms[0] * 0.25)
        G = np.outer(us[K], vs[K - 1])
        if not detach:
            G += us[:K].T @ s + tbars[:K - 1].T @ vs[:K - 1]
        if gW is not NULL:
            G = G.reshape(m, l, r).transpose(1, 0, 2)
            check(gW, a * gY + c * G, TOLERANCE[T])
        for kept, before in ((state, (us, vs)), (bars, (tbars, sbars))):
            for x, y in zip(kept.vectors(), before):
                np.testing.assert_array_equal(x, y)

    return Case((
        gy, send(np.array(gsigma, A)) if 'gsigma' in given else NULL,
        state.array, bars.array, send(sums) if is_raw else NULL,
        np.int32(n_sums), send(divided(dot, n_extras)), np.int32(n_extras),
        gW, ggamma, *integers(*shape), factor,
        *integers(chunk, is_wide, blocks)), check_correct,
        *integers(K, detach))


@gpu
@pytest.mark.parametrize('T', 'efd')
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize(('shape', 'chunk', 'blocks'), CORRECTIONS)
def test_correct_bwd(shape, chunk, blocks, mode, T):
    for kwargs in ({}, {'is_wide': 0, 'above': 0}, {'given': 'gsigma'}):
        run(kernels.correct_bwd, T, A_of(T), correct_case(
            T, shape, chunk, blocks, *mode, **kwargs))


@gpu
@pytest.mark.parametrize('T', 'efd')
def test_correct_bwd_for_coefficients_alone(T):
    for given in ('gY', 'gsigma', 'gY gsigma'):
        for wanted in ('', 'ggamma', 'gW'):
            run(kernels.correct_bwd, T, A_of(T), correct_case(
                T, (3, 5, 7), 1, 1, 1, 1, 0, given=given, wanted=wanted))


@gpu
@pytest.mark.parametrize(('coefficient', 'entry'), [
    (1e-42, 1e38), (1e40, 1e-37)])
def test_a_coefficient_that_float32_does_not_hold(coefficient, entry):
    """Its product with an entry is in the range."""
    shape = 1, 2, 3
    for of_gY in (False, True):
        state = Kept('f', kernels.NUMBERS, {
            'SCALE': 1, 'COEF': coefficient, 'DIVISOR': 1,
            'ABOVE': not of_gY}, [1, 1], np.ones((2, 2)),
            np.full((1, 3), entry))
        bars = Kept('f', kernels.COEFFICIENTS, {}, [], np.ones((1, 2)),
                    np.zeros((1, 3)))
        gW, gY = empty(shape, 'f'), np.full(shape, of_gY * entry, 'f')
        kernels.correct_bwd(np.dtype('f'), np.dtype('f'), [(
            send(gY), NULL, state.array, bars.array, NULL, np.int32(0),
            send(np.ones(1)), np.int32(1), gW, NULL, *integers(*shape), 1.0,
            *integers(1, 0, 1))], *integers(1, 1))
        sign = 1 if of_gY else -1  # c = -COEF <gY, W> / DIVISOR
        check(gW, np.full(shape, sign * coefficient * entry), 1e-6)



# Backward in one block.

def fused_bwd_case(
        T, shape, K, detach=0, given='gY gsigma', wanted='gW ggamma',
        need_u=0, eps=1e-12, size=1.0, is_wide=1):
    A = A_of(T)
    l, m, r = shape  # NOQA: E741
    n, factor, gamma = l * r, 1.3, 0.7
    W, u = np.random.normal(size=shape) * size, np.random.normal(size=m)
    W, u = W.astype(T), u.astype(A)
    w = send(W) if is_wide else misaligned(send(W))
    W, u = W.astype('d'), u.astype('d')
    it = iterate(W, u, K)
    sigma, above = it.sigma, it.sigma >= eps
    divisor = sigma if above else eps
    state = Kept(A, kernels.NUMBERS, {
        'SCALE': 2.0 ** -np.round(np.log2(size)), 'SIGMA': sigma,
        'DIVISOR': divisor, 'ABOVE': above,
        'COEF': gamma * factor / divisor},
        np.concatenate([it.s_norms, it.t_norms]), it.us, it.vs)
    bars = Kept(A, kernels.COEFFICIENTS, {}, [], np.full((K, m), np.nan),
                np.full((K, n), np.nan))
    gY, gy = random(shape, T, is_wide)
    gsigma = np.array(0.8 / size, A)
    device_gsigma = send(gsigma)
    if 'gY' not in given:
        gY, gy = 0 * gY, NULL
    if 'gsigma' not in given:
        gsigma, device_gsigma = 0, NULL
    gW = empty(shape, T, is_wide) if 'gW' in wanted else NULL
    ggamma = empty((), A) if 'ggamma' in wanted else NULL

    def loss(W, u):
        Y, sigma = reference.spectral_normalize(
            W, u, K, gamma, factor, eps, 1,
            (it.us[K], it.vs[K - 1]) if detach else None)
        return np.sum(gY * Y) + float(gsigma) * sigma

    # Of what is added up: the sum may be zero.
    atol = (abs(gamma * factor / divisor * gY).max() + abs(float(gsigma))
            + abs(gamma * factor / divisor ** 2 * np.vdot(gY, W)))

    def check_backward():
        if gW is not NULL:
            check(gW, reference.complex_step(lambda W: loss(W, u), W),
                  3 * TOLERANCE[T], atol)
        if ggamma is not NULL:
            check(ggamma, factor * np.vdot(gY, W) / divisor, TOLERANCE[A])
        if need_u:
            ubar = bars.vectors()[0][K - 1]
            c = bars.numbers()['GSIGMA'] / state.numbers()['SCALE']
            check(c * ubar, reference.complex_step(
                lambda u: loss(W, u), u), 3 * TOLERANCE[A],
                atol * sigma / norm_of(u))
        for x, y in zip(state.vectors(), (it.us, it.vs)):
            np.testing.assert_array_equal(x.astype(A), y.astype(A))

    return Case((
        w, gy, device_gsigma, state.array, bars.array, gW, ggamma,
        *integers(*shape), factor, *integers(need_u, is_wide, 1)),
        check_backward, *integers(K, detach))


@gpu
@pytest.mark.parametrize('T', 'efd')
@pytest.mark.parametrize('K', [1, 2, 3])
@pytest.mark.parametrize('shape', [
    (1, 1, 1), (1, 5, 37), (64, 8, 1), (3, 13, 8)])
def test_fused_bwd(shape, K, T):
    for kwargs in ({}, {'need_u': 1, 'is_wide': 0}, {'detach': 1},
                   {'eps': 1e3}, {'given': 'gY', 'wanted': 'gW'},
                   {'given': 'gsigma', 'wanted': '', 'need_u': 1},
                   {'given': 'gY', 'wanted': 'ggamma', 'detach': 1}):
        run(kernels.fused_bwd, T, A_of(T),
            fused_bwd_case(T, shape, K, **kwargs))


@gpu
@pytest.mark.parametrize(('T', 'size'), [
    ('f', 1e30), ('f', 1e-30), ('d', 1e50), ('d', 1e-50)])
def test_fused_bwd_of_an_extreme_weight(T, size):
    for shape in ((1, 5, 37), (3, 13, 8), (20, 8, 1)):
        run(kernels.fused_bwd, T, T, fused_bwd_case(
            T, shape, 2, need_u=1, eps=0.0, size=size))


# What all raw kernels have in common.

def shape_of(k):
    return [(1, 5, 37), (20, 8, 1), (3, 6, 8), (1, 1, 1)][k]


def edit_of(k):
    """Most weights are ordinary, and others need one block alone."""
    return [None, RARE['W is zero'], RARE['NaN in W'], None][k]


# The case k, 0 to 3; those of a kernel differ in all that can.
CASES = {
    'sn_product': lambda T, U, k: product_case(T, U, *[
        ('W^T by rows', *PRODUCTS[3], 'first'),
        ('W by rows', *PRODUCTS[1], 'of a raw x'),
        ('W^T by columns of two', *PRODUCTS[2], 'with gY'),
        ('W by columns', *PRODUCTS[4], 'divided')][k]),
    'sn_gather': lambda T, U, k: gather_case(
        T, [37, 300, 1, 70][k], k + 1, k + 1, ROLES[k + 1]),
    'sn_finish_fwd': lambda T, U, k: forward_case(
        kernels.finish_fwd, T + U, shape_of(k), 2, edit_of(k),
        blocks=4 - k, outputs=['Y', 'Y sigma', 'sigma', 'Y'][k]),
    'sn_dot_bwd': lambda T, U, k: dot_case(
        T, [77, 1500, 1, 400][k], k % 2, 4 - k),
    'sn_project_bwd': lambda T, U, k: project_case(
        T, [77, 300, 1, 150][k], 5 * k + 1, 4 - k),
    'sn_correct_bwd': lambda T, U, k: correct_case(
        T, *CORRECTIONS[[1, 5, 3, 0][k]], 1, 0, k % 2),
    'sn_fused_fwd': lambda T, U, k: forward_case(
        kernels.fused_fwd, T + U, shape_of(k), 2, edit_of(k),
        initial_gamma=[None, 0.7, 0.7, 0.5][k]),
    'sn_fused_bwd': lambda T, U, k: fused_bwd_case(
        T, shape_of(k), 2, need_u=k % 2),
}
KERNELS = {kernel.name: kernel for kernel in kernels.ALL
           if isinstance(kernel, kernels.Raw) and not kernel.has_several}


def test_all_raw_kernels_are_tested():
    assert set(CASES) == set(KERNELS)


def cases_of(name, T, U):
    return KERNELS[name], T, U, *[CASES[name](T, U, k) for k in range(4)]


# Others than float32 take a while to compile.
all_raw_kernels = pytest.mark.parametrize(('name', 'types'), [
    pytest.param(name, types, marks=() if types == 'ff' else pytest.mark.slow)
    for name, kernel in KERNELS.items() for types in TYPES
    if types != 'ee' or any('U*' in parameter for parameter in kernel.own)])


@gpu
@pytest.mark.parametrize('order', ['ascending', 'descending', 'random'])
@all_raw_kernels
def test_several_weights_in_one_launch(name, types, order):
    with cuda_on_host.schedule(order):
        run(*cases_of(name, *types))


@gpu
@all_raw_kernels
def test_blocks_of_the_size_that_is_used(name, types, monkeypatch):
    for key, size in BLOCK_SIZES.items():
        monkeypatch.setattr(kernels, key, size)
    run(*cases_of(name, *types))


@gpu
@pytest.mark.parametrize('T', 'efd')
@pytest.mark.parametrize('way', WAYS)
def test_product_of_many_threads_of_a_block(way, T, monkeypatch):
    size = BLOCK_SIZES['BLOCK_SIZE']
    monkeypatch.setattr(kernels, 'BLOCK_SIZE', size)
    for sizes in ((8, 8000, size, 1, 1, 3), (1040, 16, size, 1, 1, 3),
                  (8, 4000, size // 4, 1, 1, 2)):
        run(kernels.product, T, A_of(T), product_case(
            T, A_of(T), way, *sizes, 'with gY'))


@gpu
def test_more_weights_than_fit_in_one_launch():
    n = kernels.MAX_WEIGHTS + 2
    run(kernels.dot_bwd, 'f', 'f', *[
        dot_case('f', 10 + k, 1, 1 + k % 3) for k in range(n)])


@gpu
@pytest.mark.parametrize('name', CASES)
def test_threads_and_blocks_do_not_race(name):
    if cuda.ndarray is not on_host.DeviceArray:
        pytest.skip('watched on the host only')
    with cuda_on_host.races():
        run(*cases_of(name, 'f', 'f'))


@gpu
@pytest.mark.slow
@pytest.mark.parametrize('name', EXTREME)
def test_threads_do_not_race_where_one_block_does_all(name):
    if cuda.ndarray is not on_host.DeviceArray:
        pytest.skip('watched on the host only')
    with cuda_on_host.races():
        for kernel in FORWARDS:
            run(kernel, 'f', 'f', forward_case(
                kernel, 'ff', (3, 9, 8), 1, EXTREME[name], eps=0.0,
                n_warmup=2, limit=1e-2))
