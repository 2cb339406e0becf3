"""Each kernel of several vectors by itself, against its formula in NumPy.

How they work together is tested in
:mod:`tests.arithmetic.test_device_subspace`.
"""
import numpy as np
import pytest
from chainer.backends import cuda

from sn_function._arithmetic import kernels, subspace, workspace
from tests import cuda_on_host, reference
from tests.arithmetic import test_kernels as one
from tests.arithmetic.test_kernels import (  # NOQA: F401  used by a fixture
    NULL,
    THREADS,
    TOLERANCE,
    A_of,
    _schedule,
    check,
    divided,
    empty,
    get,
    integers,
    matrix,
    random,
    send,
)
from tests.cuda_on_host import array as on_host

gpu = pytest.mark.gpu


class Case(one.Case):
    """One weight of a launch, with ``b`` vectors."""

    def __init__(self, b, own, check, *common):
        super().__init__(own, check, *common)
        self.b = b


def run(kernel, T, U, *cases):
    kernel(np.dtype(T), np.dtype(U if kernel.has_u else A_of(T)),
           [case.own for case in cases], *cases[0].common,
           n_vectors=cases[0].b)
    for case in cases:
        case.check()


class Space:
    """What a forward keeps, in the places that its plan has for it.

    What is not given is garbage.
    """

    def __init__(self, dtype, shape, b, **contents):
        l, m, r = shape  # NOQA: E741
        n, self.A = l * r, np.dtype(A_of(dtype))
        args = l, m, r
        size = np.dtype(dtype).itemsize
        plan = workspace.subspace_plan(
            *args, b, size, True, True, THREADS)
        of_one = workspace.plan(*args, 1, size, True, True, THREADS)
        E = plan.values + 8 * (b + 2 + b % 2)
        self.places = {
            'numbers': (0, (len(kernels.NUMBERS),), 'd'),
            'u': (of_one.us + of_one.m_step, (m,), self.A),
            'v': (of_one.vs, (n,), self.A),
            'values': (plan.values, (b + 2,), 'd'),
            'E': (E, (b, b), 'd'),
            'mix': (E + 8 * (b * b + b % 2), (b, b), self.A),
            'start': (plan.start, (m, b), self.A),
            'U': (plan.basis, (m, b), self.A),
            'T': (plan.T, (m, b), self.A),
            'S': (plan.S, (n, b), self.A),
        }
        memory = np.full(plan.size, 0xff, np.uint8)  # NaN
        for name, x in contents.items():
            self._view(memory, name)[...] = x
        self.before = memory.copy()
        self.array = send(memory.view('d'))

    def _view(self, memory, name):
        place, shape, dtype = self.places[name]
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        return memory[place:place + size].view(dtype).reshape(shape)

    def __getitem__(self, name):
        return self._view(
            cuda.to_cpu(self.array).view(np.uint8), name).astype('d')

    def check_kept(self, *changed):
        """All but these is as it was."""
        after = cuda.to_cpu(self.array).view(np.uint8)
        for name in set(self.places) - set(changed):
            np.testing.assert_array_equal(
                self._view(after, name), self._view(self.before, name))


def vectors(length, b, T):
    """Random ones, as they are next to each other, in float64."""
    return np.random.normal(size=(length, b)).astype(A_of(T)).astype('d')


def begin_case(T, U, shape, b, is_first=True, edit=None, is_kept=None):
    is_kept = edit is None if is_kept is None else is_kept
    m = shape[1]
    X = vectors(m, b, T).astype(U if is_first else A_of(T)).astype('d')
    if edit is not None:
        edit(X)
    space = Space(T, shape, b, **({} if is_first else {'T': X}))
    u = send(X.T.astype(U).copy()) if is_first else NULL
    found = send(np.full(2, np.nan))

    def check_begin():
        U_, E = space['U'], space['E']
        np.testing.assert_allclose(
            E @ U_.T @ U_ @ E.T, np.eye(b), atol=30 * TOLERANCE[A_of(T)])
        # Of vectors of length 1.
        assert abs(E * np.linalg.norm(U_, axis=0)).max() < 10
        if is_kept:
            np.testing.assert_array_equal(U_, X)
        if is_first:
            check(space['numbers'][:3], [1, 1, 0], 0)
            assert get(found)[1] == 1
            np.testing.assert_array_equal(space['start'], X)
            space.check_kept('numbers', 'start', 'U', 'E')
        else:
            assert np.isnan(get(found)).all()
            space.check_kept('U', 'E')

    return Case(b, (u, space.array, found, *integers(*shape, 1)), check_begin)


def product_case(T, U, way, n_out, n_in, lanes, parts, is_wide, blocks, b):
    is_transposed, shape = one.WAYS[way](n_out, n_in)
    A = A_of(T)
    W, w = random(shape, T, is_wide)
    X = vectors(n_in, b, T)
    space = Space(T, shape, b, **{'U' if is_transposed else 'S': X})
    Y = empty((parts, n_out, b), A)

    def check_product():
        M = matrix(W).T if is_transposed else matrix(W)
        check(get(Y).sum(axis=0), M @ X, TOLERANCE[A],
              (abs(M) @ abs(X)).max())
        space.check_kept()

    return Case(b, (w, space.array, Y, *integers(
        is_transposed, lanes, parts, is_wide, *shape, blocks)),
        check_product)


def gram_case(T, U, shape, b, n_parts, blocks):
    A, n = A_of(T), shape[0] * shape[2]
    parts, device_parts = random((n_parts, n, b), A)
    S = parts.sum(axis=0)
    space = Space(T, shape, b, **({} if n_parts > 1 else {'S': S}))
    grams = empty((blocks, b, b), 'd')

    def check_gram():
        check(space['S'], S, TOLERANCE[A])
        check(get(grams).sum(axis=0), S.T @ S, 3 * TOLERANCE[A])
        space.check_kept('S')

    return Case(b, (
        space.array, device_parts, np.int32(n_parts), grams,
        *integers(*shape, blocks)), check_gram)


def solve_case(T, U, shape, b, values=None, n_grams=5):
    """With ritz values as wanted, of any H and G."""
    if values is None:
        values = np.sort(np.random.uniform(1, 2, size=b))[::-1]
    values = np.array(values)
    E = np.tril(np.random.normal(size=(b, b))) + 3 * np.eye(b)
    Q = np.linalg.qr(np.random.normal(size=(b, b)))[0]
    inverse = np.linalg.inv(E)
    H = inverse @ Q.T @ np.diag(values ** 2) @ Q @ inverse.T
    parts = np.random.uniform(1, 2, size=(n_grams, 1, 1))
    space = Space(T, shape, b, E=E)
    found = send(np.array([np.nan, 1]))

    def check_solve():
        total = (values ** 2).sum()
        sigma = get(found)[0]
        if not 0 < total < np.inf:
            nothing = np.nan if total else 0
            check(found, [nothing, 0], 0)
            check(space['values'][:b], np.full(b, nothing), 0)
        else:
            check(sigma, values[0], 1e-12)
            assert get(found)[1] == one_if_ordinary(values[0], A_of(T))
            check(space['values'][:b] ** 2, values ** 2, 1e-12)
        check(space['values'][b:], [0, 0], 0)
        space.check_kept('values', 'mix')
        if get(found)[1]:
            mix, tolerance = space['mix'], 30 * TOLERANCE[A_of(T)]
            C = mix @ inverse
            np.testing.assert_allclose(C @ C.T, np.eye(b), atol=tolerance)
            np.testing.assert_allclose(
                mix @ H @ mix.T, np.diag(values ** 2),
                atol=tolerance * values[0] ** 2)

    return Case(b, (
        space.array, send(H * parts / parts.sum()), np.int32(n_grams), found,
        *integers(*shape, 1)), check_solve)


def one_if_ordinary(sigma, A):
    return int(not one.is_extreme(np.array([sigma]), A))


def follow_case(T, U, shape, b, n_parts, blocks, is_ordinary=1.0, size=1):
    A, m = A_of(T), shape[1]
    parts = random((n_parts, m, b), A)[0] * size
    device_parts = send(parts.astype(A))
    X, mix = vectors(m, b, T), vectors(b, b, T)
    values = np.sort(np.random.uniform(1, 2, size=b))[::-1]
    space = Space(
        T, shape, b, U=X, mix=mix, values=[*values, np.nan, np.nan],
        **({'T': parts[0]} if n_parts == 1 else {}))
    sums = empty((3, blocks), 'd')
    start = {1: NULL}.get(n_parts, device_parts)
    if n_parts == 1:  # in place
        start = space.array.data + space.places['T'][0]

    def check_follow():
        if not is_ordinary:
            space.check_kept()
            return
        t, basis = parts.sum(axis=0) @ mix.T, X @ mix.T
        squares = values ** 2
        shift = (subspace.SHIFT if b > 1 else 0) * squares[-1] - (
            subspace.REGULAR * squares[0])
        T_ = ((t - shift * basis) / (squares - shift)).clip(
            -subspace.MOST, subspace.MOST)
        check(space['T'], T_, 3 * TOLERANCE[A])
        of_v = t[:, 0] / squares[0]
        off = of_v - basis[:, 0]
        check(get(sums).sum(axis=1), [
            of_v @ of_v, T_[:, 0] @ T_[:, 0], off @ off], 3 * TOLERANCE[A])
        space.check_kept('T')

    return Case(b, (
        space.array, start, np.int32(n_parts),
        send(np.array([1.5, is_ordinary])), sums, *integers(*shape, blocks)),
        check_follow)


def outputs_of(space, W, T, A, sigma, gamma, initial, turn, eps, is_fused,
               is_wide):
    """Arguments for the outputs, and what checks them."""
    new_gamma, factor, at_zero = 0.0, 1.3, 0.5
    if initial is not None and initial == gamma and abs(
            sigma - gamma) > 0.1 * gamma and (sigma > gamma or turn <= 1e-2):
        new_gamma = sigma or 1.0
    device_gamma, device_initial = (
        NULL if x is None else send(np.array(x, A)) for x in (gamma, initial))
    Y, sigma_out = empty(W.shape, T, is_wide), empty((), A)

    def check_outputs():
        used = new_gamma or gamma
        is_above = not (sigma < eps or sigma == 0)
        divisor = sigma if is_above else eps if sigma else at_zero
        expected = [sigma, divisor, is_above, used * factor / divisor,
                    new_gamma]
        check(space['numbers'][3:], expected, TOLERANCE[A])
        check(Y, used * factor / divisor * W, TOLERANCE[T])
        check(sigma_out, sigma, TOLERANCE[A])
        is_renewed = new_gamma and is_fused
        check(device_gamma, new_gamma if is_renewed else gamma, TOLERANCE[A])
        if initial is not None:
            check(device_initial, new_gamma if is_renewed else initial,
                  TOLERANCE[A])

    return (sigma_out, device_gamma, device_initial, Y), factor, at_zero, (
        check_outputs)


def finish_case(T, U, shape, b, blocks, update=1, moves=1, eps=1e-12,
                gamma=0.7, initial=None, is_wide=1):
    """Of an ordinary weight; others are tested by all that is launched."""
    A, (_, m, _) = A_of(T), shape
    n = shape[0] * shape[2]
    W, w = random(shape, T, is_wide)
    X, S, next_, mix = (vectors(k, b, T) for k in (m, n, m, b))
    sigma, n_sums = 2.5, THREADS + 7
    squares = 1.2, 4.0, 0.09  # of W v / sigma, what follows u, the residual
    space = Space(T, shape, b, U=X, S=S, T=next_, mix=mix,
                  values=[*np.arange(b) + 1.0, 0, 0],
                  numbers=[1, 1, 0, *[np.nan] * 5])
    u, device_u = random((b, m), U)
    turn = 1 - 1 / np.sqrt(squares[0]) if moves else 0
    out, factor, at_zero, check_outputs = outputs_of(
        space, W, T, A, sigma, gamma, initial, turn, eps, False, is_wide)

    def check_finish():
        check_outputs()
        basis, tolerance = X @ mix.T, 3 * TOLERANCE[A]
        check(space['U'], basis, tolerance)
        check(space['u'], basis[:, 0], tolerance)
        check(space['v'], S @ mix[0] / sigma, tolerance)
        check(space['values'][b:], [turn, 0.3 if moves else 0], 1e-12)
        stored = next_.copy()
        stored[:, 0] /= 2
        check(device_u, stored.T if update else u, TOLERANCE[U])
        space.check_kept('numbers', 'U', 'u', 'v', 'values')

    return Case(b, (
        w, device_u, space.array, send(np.array([sigma, 1])),
        send(np.array([divided(x, n_sums) for x in squares])),
        np.int32(n_sums), *out, *integers(*shape), factor,
        *integers(is_wide, blocks)), check_finish, np.int32(1), eps, at_zero,
        *integers(moves, update, 0), 2.0, -1.0)


def fused_case(T, U, shape, b, K=1, update=1, eps=1e-12, gamma=0.7,
               initial=None, is_wide=1):
    A, m = A_of(T), shape[1]
    W, w = random(shape, T, is_wide)
    X, device_u = random((b, m), U)
    space = Space(T, shape, b)
    M, V = matrix(W), X
    for _ in range(K - 1):
        V = moved(M, V)
    u, v, sigma = reference.span_norm(M, V)
    sigma, v = sigma.real, v.real
    following = M @ v
    turn = 1 - sigma / np.linalg.norm(following) if update else 0
    out, factor, at_zero, check_outputs = outputs_of(
        space, W, T, A, sigma, gamma, initial, turn, eps, True, is_wide)

    def check_fused():
        check_outputs()
        tolerance = 10 * TOLERANCE[A]
        np.testing.assert_array_equal(space['start'], X.T)
        basis = space['U'].T
        np.testing.assert_allclose(basis @ basis.T, np.eye(b), atol=tolerance)
        Q = np.linalg.qr(V.T)[0]
        check(basis @ Q @ Q.T, basis, tolerance)
        check(space['u'], basis[0], 0)
        check(M.T @ space['u'] / sigma, space['v'], tolerance)
        check(space['values'][:b], np.linalg.svd(Q.T @ M)[1], tolerance)
        if not update:
            check(device_u, X, 0)
            return
        check(space['values'][b], turn, tolerance, 1)
        check(space['values'][b + 1], np.linalg.norm(
            following / sigma - u.real), tolerance, 1)
        Q = np.linalg.qr(moved(M, V).T)[0]
        after = get(device_u)
        check(np.linalg.norm(after[0]), 1, TOLERANCE[U])
        check(after @ Q @ Q.T, after, 10 * TOLERANCE[U])

    return Case(b, (
        w, device_u, space.array, *out, *integers(*shape), factor,
        *integers(is_wide, 1)), check_fused, np.int32(K), eps, at_zero,
        *integers(update, update, 0), 2.0, -1.0)


def moved(M, V):
    """What follows the rows of V, of any length."""
    Q = np.linalg.qr(V.T)[0]
    C, values, _ = np.linalg.svd(Q.T @ M, full_matrices=False)
    Q, l = Q @ C, values ** 2  # NOQA: E741
    shift = subspace.SHIFT * l[-1] * (len(V) > 1) - subspace.REGULAR * l[0]
    return ((M @ (M.T @ Q) - shift * Q) / (l - shift)).T


# Types of W and u, and number of vectors; others take a while to compile.
KINDS = [('ff', 3), ('ff', 8), *[
    pytest.param(types, b, marks=pytest.mark.slow)
    for types, b in [('dd', 3), ('ef', 3), ('ee', 3), ('ff', 1), ('ff', 2),
                     ('dd', 8), ('ef', 8), ('ff', 16), ('dd', 16)]]]
of_kinds = pytest.mark.parametrize(('types', 'b'), KINDS)
SHAPES = [(1, 37, 65), (5, 36, 16), (64, 18, 1)]


@gpu
@of_kinds
def test_begin(types, b):
    for shape in SHAPES:
        for is_first in (True, False):
            run(kernels.begin_subspace, *types,
                begin_case(*types, shape, b, is_first))


def nearly_dependent(X):
    X[:, 1:] = X[:, :1] + 0.01 * X[:, 1:]


def one_is_zero(X):
    X[:, -1] = 0


def each_close_to_the_one_before(X):
    X /= np.linalg.norm(X, axis=0)
    X[:, 1:] = 0.2 * X[:, 1:] - 0.98 * X[:, :-1]
    X *= 10.0 ** (np.arange(X.shape[1]) % 3)


@gpu
@pytest.mark.parametrize(('edit', 'b'), [
    (nearly_dependent, 3), (one_is_zero, 3),
    (each_close_to_the_one_before, 3), (each_close_to_the_one_before, 8)])
def test_begin_makes_the_vectors_independent(edit, b):
    case = begin_case('d', 'd', SHAPES[0], b, False, edit)
    run(kernels.begin_subspace, 'd', 'd', case)


@gpu
def test_begin_leaves_vectors_of_any_length():
    """Those that are independent enough."""
    lengths = 10.0 ** -np.arange(-3, 5)
    case = begin_case('d', 'd', SHAPES[0], 8, False, lambda X: X.__imul__(
        lengths), is_kept=True)
    run(kernels.begin_subspace, 'd', 'd', case)


@gpu
@of_kinds
@pytest.mark.parametrize('way', one.WAYS)
def test_product(way, types, b):
    for size in [(36, 64, 8, 1, 1, 3), (6, 37, 8, 1, 0, 2),
                 (12, 1000, 32, 3, 1, 5), (12, 1000, 64, 2, 0, 4),
                 (130, 9, 16, 1, 0, 20), (40, 16, 8, 1, 1, 2)]:
        run(kernels.product_subspace, *types,
            product_case(*types, way, *size, b))


@gpu
@of_kinds
def test_gram(types, b):
    for n_parts, blocks in ((1, 1), (1, 3), (3, 2)):
        for shape in SHAPES:
            run(kernels.gram_subspace, *types,
                gram_case(*types, shape, b, n_parts, blocks))


@gpu
@of_kinds
def test_solve(types, b):
    shape = SHAPES[0]
    for values in (None, np.ones(b), np.r_[2.0, np.zeros(b - 1)],
                   np.zeros(b), np.full(b, np.nan), np.full(b, np.inf),
                   np.logspace(0, -9, b), np.full(b, 1e15),
                   np.r_[np.full(b // 2, 2.0), np.ones(b - b // 2)]):
        with np.errstate(invalid='ignore'):
            case = solve_case(*types, shape, b, values)
        run(kernels.solve_subspace, *types, case)


@gpu
@of_kinds
def test_follow(types, b):
    for n_parts, blocks in ((1, 1), (1, 2), (3, 2)):
        for is_ordinary in (1.0, 0.0):
            run(kernels.follow_subspace, *types, follow_case(
                *types, SHAPES[1], b, n_parts, blocks, is_ordinary))


@gpu
def test_follow_bounds_what_is_new():
    """Where the vectors have hardly anything of what W is large on."""
    case = follow_case('d', 'd', SHAPES[1], 3, 1, 2, size=1e3)
    run(kernels.follow_subspace, 'd', 'd', case)


FINISHES = [{}, {'update': 0, 'moves': 0, 'is_wide': 0}, {'eps': 1e3},
            {'update': 0, 'gamma': 1.5, 'initial': 1.5},
            {'gamma': 9.0, 'initial': 9.0}, {'gamma': 9.0, 'initial': 8.0}]


@gpu
@of_kinds
def test_finish(types, b):
    for shape in SHAPES:
        for kwargs in FINISHES:
            run(kernels.finish_subspace, *types,
                finish_case(*types, shape, b, 3, **kwargs))


@gpu
@of_kinds
def test_fused(types, b):
    for shape in SHAPES:
        for kwargs in ({}, {'K': 2}, {'update': 0, 'is_wide': 0},
                       {'eps': 1e3}, {'gamma': 0.1, 'initial': 0.1}):
            run(kernels.fused_subspace, *types,
                fused_case(*types, shape, b, **kwargs))


def shape_of(k):
    return [(1, 37, 65), (5, 18, 8), (64, 18, 1), (3, 9, 7)][k]


# The case k, 0 to 3, of 3 vectors; those of a kernel differ in all that can.
CASES = {
    'sn_begin_subspace': lambda T, U, k: begin_case(
        T, U, shape_of(k), 3, k % 2 == 0),
    'sn_product_subspace': lambda T, U, k: product_case(
        T, U, *[('W^T by rows', 12, 1000, 32, 3, 1, 5),
                ('W by rows', 6, 37, 8, 1, 0, 2),
                ('W^T by columns of two', 36, 64, 4, 1, 1, 3),
                ('W by columns', 12, 1000, 64, 2, 0, 4)][k], 3),
    'sn_gram_subspace': lambda T, U, k: gram_case(
        T, U, shape_of(k), 3, k + 1, 4 - k),
    'sn_solve_subspace': lambda T, U, k: solve_case(
        T, U, shape_of(k), 3, [None, np.ones(3), np.zeros(3), None][k], k + 1),
    'sn_follow_subspace': lambda T, U, k: follow_case(
        T, U, shape_of(k), 3, k + 1, 4 - k, float(k != 2)),
    'sn_finish_subspace': lambda T, U, k: finish_case(
        T, U, shape_of(k), 3, 4 - k, initial=[None, 0.7, 0.7, 0.5][k]),
    'sn_fused_subspace': lambda T, U, k: fused_case(
        T, U, shape_of(k), 3, initial=[None, 0.7, 0.7, 0.5][k]),
}
KERNELS = {kernel.name: kernel for kernel in kernels.ALL
           if getattr(kernel, 'has_several', False)}


def test_all_kernels_are_tested():
    assert set(CASES) == set(KERNELS)


def cases_of(name):
    return KERNELS[name], 'f', 'f', *[
        CASES[name]('f', 'f', k) for k in range(4)]


@gpu
@pytest.mark.parametrize('order', ['ascending', 'descending', 'random'])
@pytest.mark.parametrize('name', CASES)
def test_several_weights_in_one_launch(name, order):
    with cuda_on_host.schedule(order):
        run(*cases_of(name))


@gpu
@pytest.mark.parametrize('name', CASES)
def test_blocks_of_the_size_that_is_used(name, monkeypatch):
    for key, size in one.BLOCK_SIZES.items():
        monkeypatch.setattr(kernels, key, size)
    run(*cases_of(name))


@gpu
@pytest.mark.parametrize('name', CASES)
def test_threads_and_blocks_do_not_race(name):
    if cuda.ndarray is not on_host.DeviceArray:
        pytest.skip('watched on the host only')
    with cuda_on_host.races():
        run(*cases_of(name))
