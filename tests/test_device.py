"""The arithmetic of devices, on arrays that refuse to come to the host.

No CUDA device is needed: NumPy computes, but a value that is asked for (by
``float``, ``bool``, ``item`` or a NumPy function) raises.  The results are
those of the path on the host.
"""
import operator
import types

import chainer
import numpy as np
import pytest

from sn_function import _power_iteration, functions
from tests.test_functions import WEIGHTS


class DeviceArray:
    """As much of an array as the package uses."""

    __array_ufunc__ = None  # NumPy leaves operators to this class

    def __init__(self, array):
        self._array = np.asarray(array)

    def _refuse(self, *args, **kwargs):
        raise AssertionError('a value of the device is waited for')

    __array__ = __float__ = __bool__ = __int__ = __iter__ = _refuse
    item = tolist = _refuse

    def __getattr__(self, name):
        if name in ('dtype', 'shape', 'ndim', 'size'):
            return getattr(self._array, name)
        if name == 'T':
            return DeviceArray(self._array.T)
        if name in ('dot', 'sum', 'max', 'reshape', 'ravel', 'astype',
                    'transpose', 'copy'):
            return lambda *args, **kwargs: call(
                getattr(self._array, name), *args, **kwargs)
        raise AttributeError(name)

    def __getitem__(self, index):
        return DeviceArray(self._array[index])

    def __setitem__(self, index, value):
        self._array[index] = value._array


def call(function, *args, **kwargs):
    args = [x._array if isinstance(x, DeviceArray) else x for x in args]
    return DeviceArray(function(*args, **kwargs))


def on_device(function):
    return lambda *args, **kwargs: call(function, *args, **kwargs)


for _f in (operator.add, operator.sub, operator.mul, operator.truediv,
           operator.matmul, operator.and_, operator.lt, operator.gt,
           operator.eq, operator.invert, operator.abs):
    _name = _f.__name__.rstrip('_')
    setattr(DeviceArray, f'__{_name}__', on_device(_f))
    setattr(DeviceArray, f'__r{_name}__', on_device(
        lambda x, y, _f=_f: _f(y, x)))

XP = types.SimpleNamespace(**{
    f.__name__: on_device(f) for f in (
        np.where, np.sqrt, np.maximum, np.asarray, np.empty, np.isfinite)})


@pytest.fixture
def _device(monkeypatch):
    monkeypatch.setattr(chainer.backend, 'get_array_module', lambda *_: XP)


def run(W, u, gamma, gY, gsigma, settings):
    """Outputs, then gradients, then what u becomes."""
    node = functions.SpectralNormalize(settings, [], {}, ('Y', 'sigma'))
    outputs = node._forward(W, u, gamma)
    wanted = ['W', 'gamma'] if settings.detach_uv else ['W', 'u', 'gamma']
    gradients = functions._gradients(
        settings, node.it, node.A, wanted, W, u, gamma, gY, gsigma)
    _power_iteration.store(u, node.it)
    return [*outputs, *gradients, u]


@pytest.mark.usefixtures('_device')
class TestDevice:

    def check(self, W, axis, dtype, *, n_power_iteration=1, detach_uv=False,
              eps=1e-6):
        W = W.astype(dtype)
        u = np.random.normal(size=W.shape[axis]).astype(dtype)
        gamma, gsigma = np.array(0.7, dtype), np.array(0.3, dtype)
        gY = np.random.normal(size=W.shape).astype(dtype)
        settings = _power_iteration.Settings(
            n_power_iteration, axis, detach_uv, 1.3, eps)
        arrays = W, u, gamma, gY, gsigma
        actual = run(*(DeviceArray(x.copy()) for x in arrays), settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chainer.backend, 'get_array_module', lambda *_: np)
            expected = run(*arrays, settings)
        assert len(actual) == len(expected)
        tolerance = {'e': 3e-3, 'f': 1e-5, 'd': 1e-12}[dtype]
        for a, b in zip(actual, expected):
            assert isinstance(a, DeviceArray)
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            np.testing.assert_allclose(
                a._array, b, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize('dtype', ['e', 'f', 'd'])
    @pytest.mark.parametrize('detach_uv', [False, True])
    @pytest.mark.parametrize('n_power_iteration', [1, 3])
    @pytest.mark.parametrize(('shape', 'axis'), WEIGHTS)
    def test_as_on_the_host(
            self, shape, axis, n_power_iteration, detach_uv, dtype):
        axis %= len(shape)
        self.check(
            np.random.normal(size=shape), axis, dtype, detach_uv=detach_uv,
            n_power_iteration=n_power_iteration)

    def test_below_the_floor(self):
        self.check(1e-3 * np.random.normal(size=(4, 3)), 0, 'd', eps=1.0)

    def test_zero_weight(self):
        self.check(np.zeros((4, 3)), 0, 'f')

    @pytest.mark.parametrize('value', [np.nan, np.inf])
    def test_a_bad_weight_does_not_reach_u(self, value):
        W = np.random.normal(size=(4, 3))
        W[1, 2] = value
        with np.errstate(all='ignore'):
            self.check(W, 0, 'd')

    @pytest.mark.parametrize('scale', [1e-18, 1e18])
    def test_squares_out_of_range(self, scale):
        W = DeviceArray((scale * np.random.normal(size=(4, 3))).astype('f'))
        A = _power_iteration.unfold(W, 0)
        it = _power_iteration.power_iteration(
            A, DeviceArray(np.ones(4, 'f')), 100)
        np.testing.assert_allclose(
            it.sigma._array, np.linalg.norm(W._array.astype('d'), 2),
            rtol=1e-3)


def test_the_stand_in_refuses():
    x = DeviceArray(np.ones(2))
    for function in (float, bool, int, list, np.asarray,
                     lambda x: x.item(), lambda x: 1 if x > 0 else 0):
        with pytest.raises((AssertionError, TypeError)):
            function(x)
