"""Each kernel by itself, against NumPy; on the host where there is no device.

Raw kernels compute a whole pass: :mod:`tests.arithmetic.test_device` has them.
"""
import chainer
import numpy as np
import pytest
from chainer.backends import cuda

from sn_function import functions
from sn_function._arithmetic import kernels
from sn_function._arithmetic.matrix import accumulator_dtype
from tests import cuda_on_host
from tests.cuda_on_host import array as on_host

pytestmark = pytest.mark.gpu

DTYPES = [('e', 2e-3), ('f', 2e-6), ('d', 1e-14)]
# Sizes that fill no block, one, and one and a bit; and axes to be reduced.
SHAPES = [(1, 1, 1), (3, 5, 7), (1, 40, 33), (33, 40, 1), (2, 16, 32),
          (5, 127, 9)]
LAYOUTS = {
    'contiguous': lambda x: x,
    'reversed': lambda x: x[::-1, :, ::-1],
    'transposed': lambda x: x.transpose(2, 1, 0).copy().transpose(2, 1, 0),
    'every other': lambda x: x.repeat(2, axis=1)[:, ::2],
}


# A random order shows what depends on any; `slow` are the two that are easier.
@pytest.fixture(autouse=True, params=[
    pytest.param('ascending', marks=pytest.mark.slow),
    pytest.param('descending', marks=pytest.mark.slow), 'random'])
def _order(request):
    """Of threads and blocks, which no result may depend on."""
    if cuda.ndarray is not on_host.DeviceArray:
        yield  # a device has its own
        return
    with cuda_on_host.schedule(request.param):
        yield


def send(x):
    return chainer.get_device('@cupy:0').send(x)


def random(shape, dtype, layout='contiguous'):
    """The same array on the host, in float64, and on the device."""
    x = np.random.normal(size=shape).astype(dtype)
    return x.astype('d'), LAYOUTS[layout](send(LAYOUTS[layout](x)))


def check(actual, expected, dtype, tolerance):
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    np.testing.assert_allclose(
        cuda.to_cpu(actual).astype('d'), expected, rtol=tolerance,
        atol=tolerance * abs(expected).max())


def numbers(names, **values):
    """The scalars that a kernel leaves, of which some are asked for."""
    return send(np.array([values.get(name, np.nan) for name in names]))


@pytest.mark.parametrize(('dtype', 'tolerance'), DTYPES)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', SHAPES)
def test_scale_fwd(shape, layout, dtype, tolerance):
    W, on_device = random(shape, dtype, layout)
    coef = numbers(kernels.NUMBERS, COEF=1.5)
    check(kernels.scale_fwd(on_device, coef), 1.5 * W, dtype, tolerance)


def test_scale_fwd_between_the_ends_of_the_range():
    W = np.array([[1e38, -3e38, 2e-38]], 'f')
    coef = numbers(kernels.NUMBERS, COEF=3 * 2.0 ** -127)
    check(kernels.scale_fwd(send(W), coef), W * 2.0 ** -127 * 3, 'f', 1e-6)


@pytest.mark.parametrize('detach', [0, 1])
@pytest.mark.parametrize('K', [1, 3])
@pytest.mark.parametrize(('dtype', 'tolerance'), DTYPES)
@pytest.mark.parametrize('layout', [*LAYOUTS, 'broadcast', 'a number'])
@pytest.mark.parametrize('shape', SHAPES[1:])
def test_correct_bwd(shape, layout, dtype, tolerance, K, detach):
    l, m, r = shape  # NOQA: E741
    n, A = l * r, accumulator_dtype(np.dtype(dtype))
    if layout == 'a number':
        gY, on_device = np.zeros(shape), 0.0
    elif layout == 'broadcast':
        gY, on_device = random((1, m, 1), dtype)
        gY = np.broadcast_to(gY, shape)
        on_device = cuda.cupy.broadcast_to(on_device, shape)
    else:
        gY, on_device = random(shape, dtype, layout)
    vectors, device_vectors = random((K + 1) * m + K * n, A)
    bars, device_bars = random(K * (m + n), A)
    coefficients = numbers(kernels.COEFFICIENTS, GY=1.5, GSIGMA=-0.3)
    us = vectors[:(K + 1) * m].reshape(K + 1, m)
    vs = vectors[(K + 1) * m:].reshape(K, n)
    tbars = bars[:K * m].reshape(K, m).copy()
    sbars = bars[K * m:].reshape(K, n)
    tbars[K - 1] = us[K]
    G = us[K][:, None] * vs[K - 1]
    if not detach:
        G = tbars.T @ vs + us[:K].T @ sbars
    G = G.reshape(m, l, r).transpose(1, 0, 2)
    gW = cuda.cupy.empty(shape, dtype)
    kernels.correct_bwd(
        on_device, coefficients, device_vectors, device_bars, m, n, r, K,
        detach, gW)
    check(gW, 1.5 * gY - 0.3 * G, dtype, 3 * tolerance)


@pytest.fixture(params=[
    pytest.param(32, marks=pytest.mark.slow), 128,
    pytest.param(512, marks=pytest.mark.slow)])
def _block_size(request):
    """Of a reduction, on the host."""
    with cuda_on_host.block_size(request.param):
        yield


@pytest.mark.usefixtures('_block_size')
@pytest.mark.parametrize(('dtype', 'x_dtype', 'tolerance'), [
    ('e', 'e', 2e-3), ('e', 'f', 1e-5), ('f', 'f', 1e-5), ('d', 'd', 1e-13)])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', SHAPES)
def test_product(shape, layout, dtype, x_dtype, tolerance):
    l, m, r = shape  # NOQA: E741
    A = accumulator_dtype(np.dtype(dtype))
    W, on_device = random(shape, dtype, layout)
    u, device_u = random((m,), x_dtype)
    v, device_v = random((l, 1, r), x_dtype)
    s, t = cuda.cupy.empty((l, r), A), cuda.cupy.empty(m, A)
    kernels.product(on_device, device_u.reshape(m, 1), axis=1, out=s)
    kernels.product(on_device, device_v, axis=(0, 2), out=t)
    check(s, np.einsum('amb,m->ab', W, u), A, tolerance)
    check(t, np.einsum('amb,ab->m', W, v[:, 0]), A, tolerance)


@pytest.mark.usefixtures('_block_size')
@pytest.mark.parametrize(('dtype', 'tolerance'), [
    ('e', 1e-13), ('f', 1e-13), ('d', 1e-13)])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', SHAPES)
def test_dot_bwd(shape, layout, dtype, tolerance):
    W, device_W = random(shape, dtype)
    gY, device_gY = random(shape, dtype, layout)
    dots = cuda.cupy.empty(shape[0], 'd')
    kernels.dot_bwd(device_gY, device_W, axis=(1, 2), out=dots)
    check(dots, (gY * W).sum(axis=(1, 2)), 'd', 10 * tolerance)


def test_float16_adds_up_in_float32():
    W = send(np.full((1, 1, 4000), 30, 'e'))
    t = cuda.cupy.empty(1, 'f')
    kernels.product(W, W, axis=(0, 2), out=t)
    assert float(t[0]) == 3.6e6  # 55 times what float16 can hold


@pytest.mark.parametrize('size', [1 << 62, 0])
@pytest.mark.parametrize(('shape', 'axis'), [
    ((40, 70), 0), ((3, 40, 5), 1), ((70, 40), 1)])
@pytest.mark.parametrize('scale', [1, 1e30, np.nan])
def test_threads_do_not_race(scale, shape, axis, size, monkeypatch):
    if cuda.ndarray is not on_host.DeviceArray:
        pytest.skip('watched on the host only')
    monkeypatch.setattr(kernels, 'FUSED_SIZE', size)
    monkeypatch.setattr(kernels, 'BLOCK_SIZE', 128)
    W = (scale * np.random.normal(size=shape)).astype('f')
    with cuda_on_host.races():
        x = chainer.Parameter(send(W))
        u = chainer.Variable(send(np.random.normal(size=40).astype('f')))
        Y = functions.spectral_normalize(x, u, 2, axis=axis)
        Y.grad = send(np.random.normal(size=shape).astype('f'))
        Y.backward()
        zero = send(np.zeros(40, 'f'))
        functions.spectral_norm(x, zero, axis=axis)
