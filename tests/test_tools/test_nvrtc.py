"""Every CUDA kernel compiles for the devices of today; none is needed."""
import itertools
import types

import numpy as np
import pytest
from chainer.backends import cuda

from sn_function._arithmetic import device, kernels
from sn_function._arithmetic.interface import Backward, Forward, Settings
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


def problems_of(body, bounds=''):
    return nvrtc.compile_one(case(kernels.Raw('sn_trial', f"""
        extern "C" __global__ void {bounds} sn_trial(double* x, int n) {{
          {body}
        }}
        """))).problems


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
            'sn_trial', 'T x', 'T y', 'y = missing(x)', ''))).problems
        assert 'identifier "missing" is undefined' in problem

    def test_error_reduction(self):
        problem, = nvrtc.compile_one(case(kernels.Reduction(
            'sn_trial', 'T x', 'A y', 'missing(x)', 'y = a'))).problems
        assert 'identifier "missing" is undefined' in problem

    def test_number_of_unknown_type(self, monkeypatch):
        """CuPy infers a type of one letter from arrays alone."""
        monkeypatch.setitem(nvrtc._NUMBERS, 'sn_trial', ('x',))
        trial = kernels.Elementwise(
            'sn_trial', 'T x', 'A y', 'y = x', '')
        problem, = nvrtc.compile_one(case(trial)).problems
        assert "KeyError: 'T'" in problem

    def test_warning(self):
        problem, = problems_of('int unused;')
        assert 'declared but never referenced' in problem

    def test_spills(self):
        problem, = problems_of(hungry(90), '__launch_bounds__(1024)')
        assert 'bytes of spills' in problem

    def test_registers(self):
        problem, = problems_of(hungry(60))
        assert 'registers, of 512 threads' in problem

    def test_clean(self):
        assert not problems_of('x[n] = 0;')


class Array(np.ndarray):
    """An entry of it is an array, too, as in CuPy."""

    def __getitem__(self, index):
        return np.asarray(super().__getitem__(index)).view(Array)


def kinds(kernel, args):
    """Returns the dtypes of a call, as a signature has them."""
    dtypes, numbers = {}, []
    for (kind, name), x in zip(nvrtc.parameters(kernel), args):
        if len(kind) > 1:
            assert getattr(x, 'dtype', kind) == kind
        elif isinstance(x, np.ndarray):
            assert dtypes.setdefault(kind, x.dtype.char) == x.dtype.char
        else:
            numbers.append(name)
    return nvrtc.Signature(kernel, tuple(sorted(dtypes.items())),
                           tuple(numbers))


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

    monkeypatch.setattr(cuda, 'cupy', types.SimpleNamespace(
        empty=lambda *args: np.empty(*args).view(Array),
        ascontiguousarray=np.ascontiguousarray,
        cublas=types.SimpleNamespace(gemv=lambda *args: None)))
    monkeypatch.setattr(kernels.Elementwise, '__call__', elementwise)
    monkeypatch.setattr(
        kernels.Reduction, '__call__',
        lambda kernel, *args, axis, out: found.add(
            kinds(kernel, (*args, out))))
    for kind in (kernels.Raw, kernels.Fused):
        monkeypatch.setattr(
            kind, '__call__',
            lambda kernel, T, U, *args: found.add(nvrtc.Signature(
                kernel, (('T', T.char), ('U', U.char)))))
    return found


@pytest.mark.filterwarnings('ignore::RuntimeWarning')  # nothing is computed
def test_signatures_are_those_called(calls, monkeypatch):
    for size in (0, kernels.FUSED_SIZE):
        monkeypatch.setattr(kernels, 'FUSED_SIZE', size)
        for pair, shape, axis, detach, has_gY in itertools.product(
                nvrtc._PAIRS, [(3, 4), (3, 4, 2), (2, 3, 4)], (0, 1),
                (False, True), (False, True)):
            T, U = map(np.dtype, pair)
            A = accumulator_dtype(T)
            settings = Settings(2, axis, detach)
            arguments = (
                np.ones(shape, T), np.ones(shape[axis], U), np.ones((), T))
            (_, iterations), = device.normalize_all([Forward(
                settings, *arguments, ('Y', 'sigma'), update_u=True)])
            device.gradients_all([Backward(
                settings, iterations, ('W', 'u', 'gamma'), *arguments,
                np.ones(shape, T) if has_gY else None, np.ones((), A))])
    known = {s for k in kernels.ALL for s in nvrtc.signatures(k)}
    assert calls <= known
    assert {s.kernel for s in calls} == set(kernels.ALL)
