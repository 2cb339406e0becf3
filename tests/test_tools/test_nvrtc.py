"""Every CUDA kernel compiles for the devices of today; none is needed."""
import itertools
import types

import numpy as np
import pytest
from chainer.backends import cuda

from sn_function._arithmetic import device, kernels
from sn_function._arithmetic.interface import (
    Backward,
    Forward,
    Renewal,
    Settings,
)
from sn_function._arithmetic.matrix import accumulator_dtype
from tests.tools import nvrtc

KERNELS = [pytest.param(k, id=k.name) for k in kernels.ALL]


@pytest.fixture(scope='module')
def compiler():
    try:
        return nvrtc.load()
    except nvrtc.Unavailable as e:
        reason, *_ = str(e).splitlines()
        pytest.skip(f'{reason}: pip install ".[nvrtc]" (python -m '
                    'tests.tools.nvrtc says more)')


@pytest.fixture(scope='module')
def results(compiler):
    return nvrtc.compile_all(nvrtc.cases())


@pytest.mark.slow
@pytest.mark.parametrize('kernel', KERNELS)
def test_kernel_compiles(kernel, results):
    """Everywhere, with no warning and no spill, within the registers."""
    own = [r for r in results if r.case.signature.kernel is kernel]
    assert {(r.case.signature, r.case.arch) for r in own} == set(
        itertools.product(nvrtc.signatures(kernel), nvrtc.ARCHS))
    assert not [problem for r in own for problem in r.problems]
    assert all(r.registers > 0 for r in own)


def case(kernel):
    return nvrtc.Case(nvrtc.signatures(kernel)[-1],
                      nvrtc.usual_layout(kernel), nvrtc.ONE_ARCH)


def problems_of(body, bounds='512'):
    return nvrtc.compile_one(case(kernels.Raw(
        'sn_trial', 'double* x, int n, int blocks', '', f'{{ {body} }}',
        'FUSED_BLOCK_SIZE', bounds))).problems


def hungry(n):
    """Returns the body of a kernel that needs 2 n registers and more."""
    return ''.join([
        *[f'double x{i} = ((volatile double*) x)[{i} * n];' for i in range(n)],
        '__syncthreads();',
        *[f'x[{i} * n + 1] = x{i} + x0;' for i in range(n)]])


@pytest.mark.usefixtures('compiler')
class TestProof:
    """The proof can fail."""

    def test_error(self):
        problem, = problems_of('missing();')
        assert 'identifier "missing" is undefined' in problem

    def test_error_elementwise(self):
        problem, = nvrtc.compile_one(case(kernels.Elementwise(
            'sn_trial', 'T x', 'T y', 'y = missing(x)'))).problems
        assert 'identifier "missing" is undefined' in problem

    def test_error_reduction(self):
        problem, = nvrtc.compile_one(case(kernels.Reduction(
            'sn_trial', 'T x', 'A y', 'missing(x)', 'y = a'))).problems
        assert 'identifier "missing" is undefined' in problem

    def test_warning(self):
        problem, = problems_of('int unused;')
        assert 'declared but never referenced' in problem

    def test_spills(self):
        problem, = problems_of(hungry(90), '1024')
        assert 'bytes of spills' in problem

    def test_registers(self):
        problem, = problems_of(hungry(60), '32')
        assert 'registers, of 512 threads' in problem

    def test_clean(self):
        assert not problems_of('x[n] = 0;')


class Place:
    """Of something in memory that nothing reads."""

    ptr = 0

    def __add__(self, offset):
        return self


class Array(np.ndarray):
    """An entry of it is an array, too, as in CuPy."""

    data = property(lambda self: Place())

    def __getitem__(self, index):
        return np.asarray(super().__getitem__(index)).view(Array)


def kinds(kernel, args):
    """Returns the dtypes of a call, as a signature has them."""
    dtypes = {}
    for (kind, _), x in zip(nvrtc.parameters(kernel), args):
        if len(kind) > 1:
            assert x.dtype == kind
        else:
            assert dtypes.setdefault(kind, x.dtype.char) == x.dtype.char
    return nvrtc.Signature(kernel, tuple(sorted(dtypes.items())))


@pytest.fixture
def calls(monkeypatch):
    """Collects the signatures that are called, and calls nothing."""
    found = set()

    def elementwise(kernel, *args):
        # Without an output it makes one, of a type that it knows.
        found.add(kinds(kernel, args))
        for x in args:
            if isinstance(x, np.ndarray):
                return np.zeros_like(x)
        raise AssertionError

    def empty(shape, dtype, place=None):
        return np.empty(shape, dtype).view(Array)

    monkeypatch.setattr(cuda, 'cupy', types.SimpleNamespace(
        empty=empty, ndarray=empty, ascontiguousarray=np.ascontiguousarray))
    monkeypatch.setattr(kernels.Elementwise, '__call__', elementwise)
    monkeypatch.setattr(
        kernels.Reduction, '__call__',
        lambda kernel, *args, axis, out: found.add(
            kinds(kernel, (*args, out))))
    monkeypatch.setattr(
        kernels.Raw, '__call__',
        lambda kernel, T, U, *args, n_vectors=None: found.add(nvrtc.Signature(
            kernel, (('T', T.char), ('U', U.char)), n_vectors=n_vectors)))
    return found


@pytest.mark.filterwarnings('ignore::RuntimeWarning')  # nothing is computed
def test_signatures_are_those_called(calls, monkeypatch):
    for size in (0, kernels.FUSED_SIZE):
        monkeypatch.setattr(kernels, 'FUSED_SIZE', size)
        for pair, (shape, axis, b), detach, has_gY in itertools.product(
                nvrtc._PAIRS, [
                    *itertools.product([(3, 4), (3, 4, 2), (2, 3, 4)], (0, 1),
                                       [None]),
                    ((9, 10), 0, nvrtc.VECTORS[0])],
                (False, True), (False, True)):
            T, U = map(np.dtype, pair)
            A = accumulator_dtype(T)
            settings = Settings(2, axis, detach, n_vectors=b)
            of_u = (shape[axis],) if b is None else (b, shape[axis])
            W, u, gamma, gY, gsigma, initial_gamma = [
                np.ones(*given).view(Array) for given in (
                    (shape, T), (of_u, U), ((), A), (shape, T),
                    ((), A), ((), A))]
            (_, iterations), = device.normalize_all([Forward(
                settings, W, u, gamma, ('Y', 'sigma'), update_u=True,
                renewal=Renewal(2, 0.1, initial_gamma))])
            device.gradients_all([Backward(
                settings, iterations, ('W', 'u', 'gamma') if b is None else (
                    'W', 'gamma'), W, u, gamma, gY if has_gY else None,
                gsigma)])
    known = {s for k in kernels.ALL for s in nvrtc.signatures(k)}
    assert calls <= known
    assert {s.kernel for s in calls} == set(kernels.ALL)
