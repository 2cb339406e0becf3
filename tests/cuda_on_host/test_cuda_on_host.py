"""Proves what runs kernels on the host, which other tests rely on."""

from __future__ import annotations

import contextlib
import importlib
import time

import numpy as np
import pytest

from tests import cuda_on_host as cuda

pytestmark = pytest.mark.skipif(
    not cuda.available(), reason='no C++ compiler')

SCHEDULES = 'ascending', 'descending', 'random'


def _random(shape, dtype='float32'):
    return np.random.uniform(-2, 2, shape).astype(dtype)


# ----------------------------------------------------------- elementwise

@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('order', SCHEDULES)
def test_elementwise(dtype, order):
    kernel = cuda.elementwise(
        'T x, T y, float32 a', 'T z', 'z = x * y + a', 'affine')
    x, y = _random((3, 5, 7), dtype), _random((5, 1), dtype)
    with cuda.schedule(order):
        z = kernel(x, y, 0.5)
    wide = np.float64 if dtype == 'float64' else np.float32
    expected = (x.astype(wide) * y.astype(wide) + wide(0.5)).astype(dtype)
    assert z.dtype == dtype
    np.testing.assert_array_equal(z, expected)


@pytest.mark.parametrize('view', [
    lambda x: x[::2], lambda x: x[::-1, :, ::-3], lambda x: x.T,
    lambda x: x[:, 2], lambda x: x[1, 2, 3], lambda x: x[:, :0],
    lambda x: np.broadcast_to(x[:, :, :1], (4, 5, 6)),
    lambda x: x.swapaxes(0, 1)])
@pytest.mark.parametrize('reduce_dims', [True, False])
def test_elementwise_of_views(view, reduce_dims):
    kernel = cuda.elementwise(
        'T x', 'T y, int32 k', 'y = x + 1; k = i', 'successor',
        reduce_dims=reduce_dims)
    x = np.asarray(view(_random((4, 5, 6), 'float64')))
    y, k = kernel(x)
    np.testing.assert_array_equal(y, x + 1)
    np.testing.assert_array_equal(k, np.arange(x.size).reshape(x.shape))
    if x.ndim == 3 and reduce_dims:  # and into a view
        out = np.zeros((*x.shape, 3), 'float64')[..., 1]
        kernel(x, out, k)
        np.testing.assert_array_equal(out, x + 1)


def test_elementwise_raw_arguments():
    kernel = cuda.elementwise(
        'raw T x, raw int32 k', 'raw T y',
        'const T* p = &x[0]; y[i] = p[k[i]] + x.size() + k.shape()[0]',
        'gather')
    x, k = _random(9), np.array([8, 0, 3], 'int32')
    y = np.empty(3, 'float32')
    assert kernel(x, k, y, size=3) is y
    np.testing.assert_array_equal(y, x[k] + np.float32(9) + 3)
    np.testing.assert_array_equal(kernel(x, k, size=3), y)
    x = _random((5, 4))[::-2, ::2]
    strided = cuda.elementwise(
        'raw T x, T unused', 'T y, int64 s',
        'y = x[i]; s = x.strides()[1] + _ind.get()[0] * 100', 'strided')
    y, s = strided(x, np.zeros(x.size, 'float32'))
    np.testing.assert_array_equal(y, x.ravel())
    np.testing.assert_array_equal(s, 8 + 100 * np.arange(x.size))


def test_elementwise_keywords():
    kernel = cuda.elementwise(
        'T x', 'T y', 'y = twice(x) + base', 'dressed', return_tuple=True,
        preamble='template <typename T> __device__ T twice(T x)'
                 '{ return 2 * x; }\n#ifndef BASE\n#error\n#endif',
        loop_prep='const T base = BASE', after_loop='(void)base',
        options=('-DBASE=5', '--std=c++14', '-lineinfo'))
    y, = kernel(np.arange(300.))
    np.testing.assert_array_equal(y, 2 * np.arange(300.) + 5)
    silent = cuda.elementwise(
        '', 'raw T y', 'y[i] = i', 'silent', no_return=True)
    y = np.zeros(4)
    assert silent(y, size=4) is None
    np.testing.assert_array_equal(y, np.arange(4))


def test_elementwise_functions():
    kernel = cuda.elementwise('T x', 'T y', '''
        int e;
        const T f = frexp(x, &e);
        y = ldexp(f, e) + max(x, T(0)) + min(x, T(0)) + fabs(x)
            + (isfinite(x) && !isnan(x) && !isinf(x) ? 1 : 0)
            + copysign(T(2), x) + signbit(x) + scalbn(T(1), ilogb(x))
            + floor(x) + ceil(x) + fma(x, x, T(1)) + pow(x, T(2))
        ''', 'functions')
    for dtype in 'float32', 'float64':
        x = _random(100, dtype)
        expected = (
            x + x + abs(x) + 1 + np.copysign(2, x)
            + np.signbit(x) + 2.0 ** np.floor(np.log2(abs(x))) + np.floor(x)
            + np.ceil(x) + x * x + 1 + x * x)
        np.testing.assert_allclose(
            kernel(x), expected, rtol=0,
            atol=1e-5 if dtype == 'float32' else 1e-13)
    single = cuda.elementwise(
        'T x', 'bool y', '''
        y = sizeof(sqrt(x)) == 4 && sizeof(rsqrt(x)) == 4
            && sizeof(exp(x)) == 4 && sizeof(log(x)) == 4
            && sizeof(tanh(x)) == 4 && sizeof(abs(x)) == 4
            && sizeof(fabs(x)) == 4 && sizeof(pow(x, x)) == 4
            && rsqrt(x) == 0.5f''', 'single')
    assert single(np.full(1, 4, 'float32'))[0]
    assert single(np.full(1, 4, 'float16'))[0]


def test_elementwise_errors():
    kernel = cuda.elementwise('T x, T y', 'T z', 'z = x + y', 'add')
    x = np.zeros((2, 3), 'float32')
    with pytest.raises(TypeError, match='mismatched'):
        kernel(x, x.astype('float64'))
    with pytest.raises(ValueError, match='Out shape is mismatched'):
        kernel(x, x, x[:1])
    with pytest.raises(ValueError, match='broadcast'):
        kernel(x, x.T)
    with pytest.raises(ValueError, match='Loop size is undecided'):
        kernel(1, 2)
    with pytest.raises(ValueError, match='raw'):
        kernel(x, x, size=3)
    with pytest.raises(TypeError, match='number of arguments'):
        kernel(x)
    with pytest.raises(TypeError, match='Unsupported type'):
        kernel(x, None)
    with pytest.raises(TypeError, match='Unsupported dtype'):
        kernel(x.astype('complex64'), x.astype('complex64'))
    with pytest.raises(TypeError, match='mismatched'):
        cuda.elementwise('float32 x', 'float32 y', 'y = x', 'fixed')(
            x.astype('float16'))
    with pytest.raises(cuda.CompileError, match='no_such_name'):
        cuda.elementwise('T x', 'T y', 'y = no_such_name', 'broken')(x)
    with pytest.raises(cuda.CompileError, match='INFINITY'):
        # NVRTC does not know it.
        cuda.elementwise('T x', 'T y', 'y = INFINITY', 'infinite')(x)
    with pytest.raises(cuda.CompileError):
        cuda.elementwise('raw T x', 'T y', 'x[i] = y', 'inwards')(x, x)


def test_elementwise_that_depends_on_the_order_fails():
    kernel = cuda.elementwise(
        'raw T x', 'raw T y', 'y[i] = (i ? y[i - 1] : 0) + x[i]', 'scan')
    x = np.ones(500)
    good = []
    for order in SCHEDULES:
        with cuda.schedule(order):
            good.append(np.array_equal(kernel(x, size=500), np.cumsum(x)))
    assert good == [True, False, False]


def test_elementwise_bounds():
    kernel = cuda.elementwise(
        'raw T x', 'T y', 'y = (&x[0])[i + 1]', 'reader')
    y = kernel(np.zeros(8, 'float32'), np.zeros(8, 'float32'))
    assert np.isnan(y[7])
    assert not y[:7].any()
    with pytest.raises(cuda.KernelFault, match='index 8 is out of'):
        cuda.elementwise('raw T x', 'T y', 'y = x[i + 1]', 'reader')(
            np.zeros(8), np.zeros(8))
    with pytest.raises(cuda.KernelFault, match="end of argument 'y'"):
        cuda.elementwise('', 'raw T y', '(&y[0])[i + 1] = 0', 'writer')(
            np.zeros(8), size=8)
    with pytest.raises(cuda.KernelFault, match="argument 'x' is constant"):
        cuda.elementwise(
            'raw T x', 'T y', 'const_cast<T&>(x[i]) = 1; y = 2', 'writer')(
                np.zeros(8), np.zeros(8))


def test_outputs_are_made_by_the_hook(monkeypatch):
    class Array(np.ndarray):
        pass

    def empty(shape, dtype):
        return np.zeros(shape, dtype).view(Array)

    monkeypatch.setattr(cuda, 'empty', cuda.empty)  # to be restored
    cuda.set_empty(empty)
    y = cuda.elementwise('T x', 'T y', 'y = x', 'copy')(np.zeros(3))
    assert type(y) is Array
    assert type(cuda.reduce(
        'T x', 'T y', 'x', 'a + b', 'y = a', '0', 'total')(y)) is Array


def test_launches_are_counted():
    cuda.counts.clear()
    kernel = cuda.elementwise('T x', 'T y', 'y = x', 'counted')
    kernel(np.zeros(3))
    kernel(np.zeros((2, 2)))
    kernel(np.zeros((2, 0)))  # nothing to launch
    assert cuda.counts == {'counted': 2}


# -------------------------------------------------------------- float16

def _equal(a, b):
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    nan = np.isnan(a)
    np.testing.assert_array_equal(
        a[~nan].view(f'u{a.itemsize}'),
        b[~nan].view(f'u{b.itemsize}'))


def test_float16_to_float():
    every = np.arange(1 << 16, dtype='uint16').view('float16')
    kernel = cuda.elementwise(
        'float16 x', 'float32 y, float16 z, bool nan, bool finite',
        'y = x; z = x; nan = isnan(x); finite = isfinite(x)', 'widen')
    y, z, nan, finite = kernel(every)
    _equal(y, every.astype('float32'))
    np.testing.assert_array_equal(z.view('uint16'), every.view('uint16'))
    np.testing.assert_array_equal(nan, np.isnan(every))
    np.testing.assert_array_equal(finite, np.isfinite(every))


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_float_to_float16(dtype):
    kernel = cuda.elementwise('T x', 'float16 y', 'y = x', 'narrow')
    every = np.arange(1 << 16, dtype='uint16').view('float16').astype(dtype)
    every = every[np.isfinite(every)]
    ends = np.sort(every)
    middles = (ends[1:] + ends[:-1]) / 2
    bits = np.random.randint(
        0, 1 << 32, (2, 100000), 'uint64').astype('uint32')
    x = np.concatenate([
        every, middles, np.nextafter(middles, np.inf, dtype=dtype),
        np.nextafter(middles, -np.inf, dtype=dtype),
        bits.ravel().view(dtype),
        _random(100000, dtype) * np.array(1e4, dtype),
        np.array([65504, 65519.99, 65520, 65536, 1e30, np.inf, np.nan, 0,
                  2.0 ** -25, 2.0 ** -24, 2.0 ** -14, 1e-30], dtype)])
    x = np.concatenate([x, -x])
    with np.errstate(all='ignore'):
        _equal(kernel(x), x.astype('float16'))


# ------------------------------------------------------------- reduction

@pytest.mark.parametrize('block', [32, 128, 512])
@pytest.mark.parametrize(('shape', 'axis'), [
    ((1000,), None), ((7, 33, 5), None), ((7, 33, 5), 1), ((7, 33, 5), 0),
    ((7, 33, 5), 2), ((7, 33, 5), (0, 2)), ((7, 33, 5), -1), ((700, 3), 0),
    ((3, 700), 1), ((1, 1), 0), ((4, 0), 1), ((), None), ((6, 5), ())])
@pytest.mark.parametrize('keepdims', [False, True])
def test_reduction(block, shape, axis, keepdims):
    kernel = cuda.reduce(
        'T x, T y', 'float64 z', '(double)x * y', 'a + b', 'z = 2 * a', '0',
        'dot')
    x, y = _random(shape), _random(shape)
    with cuda.block_size(block):
        z = kernel(x, y, axis=axis, keepdims=keepdims)
    expected = 2 * np.sum(
        x.astype('d') * y, axis=axis, keepdims=keepdims)
    assert z.shape == expected.shape
    np.testing.assert_allclose(z, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('view', [
    lambda x: x.T, lambda x: x[::-1, ::2], lambda x: x[:, :, 1],
    lambda x: x.transpose(1, 0, 2)])
@pytest.mark.parametrize('axis', [None, 0, 1, (0, 1)])
def test_reduction_of_views(view, axis):
    kernel = cuda.reduce('T x', 'T y', 'x', 'max(a, b)', 'y = a', '-1e30',
                         'largest')
    x = view(_random((4, 5, 6)))
    expected = x.max(axis=axis)
    np.testing.assert_array_equal(kernel(x, axis=axis), expected)
    out = np.zeros((*expected.shape, 2), 'float32')
    out = out[..., 1] if axis == 1 else out[..., 1].copy()
    assert kernel(x, axis=axis, out=out) is out
    np.testing.assert_array_equal(out, expected)


def test_reduction_of_scalars_broadcasts_and_raw_arguments():
    kernel = cuda.reduce(
        'T x, raw T w, T y, float32 s', 'T z, int32 n',
        '_J * (x + y) * w[_j] * s', 'a + b',
        'z = a, n = _out_ind.get()[0]', '0', 'mixed')
    x, y, w = _random((6, 8)), _random((6, 1)), _random((6, 8))
    z = kernel(x, w, y, 2, axis=0)
    assert z.shape == (8,)
    weights = np.arange(6)[:, None]
    np.testing.assert_allclose(
        z, (weights * (x + y) * w * 2).sum(0), rtol=2e-5, atol=1e-5)


def test_reduction_identity_and_errors():
    args = 'T x', 'T y', 'x', 'a + b', 'y = a'
    kernel = cuda.reduce(*args, '7', 'seven')
    np.testing.assert_array_equal(
        kernel(np.zeros((2, 0)), axis=1), [7, 7])
    assert kernel(np.zeros((0, 3)), axis=1).shape == (0,)
    without = cuda.reduce(*args, None, 'nothing')
    with pytest.raises(ValueError, match='no identity'):
        without(np.zeros((2, 0)), axis=1)
    assert without(np.ones(5)) == 5
    with pytest.raises(ValueError, match='Out shape'):
        kernel(np.zeros((2, 3)), axis=1, out=np.zeros(3))
    with pytest.raises(ValueError, match='duplicate'):
        kernel(np.zeros((2, 3)), axis=(1, 1))
    with pytest.raises(ValueError, match='out of bounds'):
        kernel(np.zeros((2, 3)), axis=2)
    with pytest.raises(TypeError, match='mismatched'):
        cuda.reduce('T x, T w', *args[1:], '0', 'two')(
            np.zeros(2), np.zeros(2, 'float32'))


def _cupy_half_sum(x, block, stride):
    """Add along axis 0 in the order of CuPy, and round as a half does."""
    rows = block // stride
    partial = np.zeros((rows, x.shape[1]), 'float16')
    for j in range(len(x)):
        partial[j % rows] += x[j]
    while rows > 1:
        rows //= 2
        partial = partial[:rows] + partial[rows:]
    return partial[0]


@pytest.mark.parametrize('block', [32, 128, 512])
def test_reduction_of_half_adds_up_in_half(block):
    args = 'T x', 'T y', 'x', 'a + b', 'y = a', '0'
    x = np.random.uniform(0, 1, (20000, 4)).astype('float16')
    with cuda.block_size(block):
        y = cuda.reduce(*args, 'half_sum')(x, axis=0)
        wide = cuda.reduce(
            *args, 'half_sum', reduce_type='float')(x, axis=0)
    # 4 sums beside each other, in threads a multiple of 4 apart
    np.testing.assert_array_equal(y, _cupy_half_sum(x, block, 4))
    np.testing.assert_array_equal(
        wide, x.sum(0, dtype='float64').astype('float16'))
    assert (y != wide).any()


def test_reduction_in_every_order():
    kernel = cuda.reduce('T x', 'T y', 'x', 'a + b', 'y = a', '0', 'sums')
    x = _random((50, 37))
    results = []
    for order in SCHEDULES:
        with cuda.schedule(order):
            results.append(kernel(x, axis=0))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


# ------------------------------------------------------------------- raw

_BLOCK_SUM = '''
extern "C" __global__ void __launch_bounds__(256) block_sum(
    const float* __restrict__ x, float* y, int n) {
  __shared__ float part[256];
  float sum = 0;
  for (int j = threadIdx.x; j < n; j += blockDim.x)
    sum += x[blockIdx.x * n + j];
  part[threadIdx.x] = sum;
  __syncthreads();
  #pragma unroll
  for (int d = blockDim.x / 2; d > 0; d /= 2) {
    if (threadIdx.x < d) part[threadIdx.x] += part[threadIdx.x + d];
    __syncthreads();
  }
  if (threadIdx.x == 0) y[blockIdx.x] = part[0];
}
'''


def _block_sum(code, order, seed=0):
    x = np.arange(3 * 1000, dtype='float32').reshape(3, 1000)
    y = np.zeros(3, 'float32')
    with cuda.schedule(order, seed):
        cuda.raw(code, 'block_sum')(
            (3,), (256,), (x, y, np.int32(1000)))
    return np.array_equal(y, x.sum(1))


@pytest.mark.parametrize('order', SCHEDULES)
def test_raw_block_sum(order):
    assert _block_sum(_BLOCK_SUM, order)


@pytest.mark.parametrize('which', [0, 1])
def test_a_missing_barrier_is_found(which):
    pieces = _BLOCK_SUM.split('__syncthreads();')
    assert len(pieces) == 3
    code = (pieces[0] + ('' if which == 0 else '__syncthreads();')
            + pieces[1] + ('' if which == 1 else '__syncthreads();')
            + pieces[2])
    assert not all(_block_sum(code, order) for order in SCHEDULES)
    # The random one alone finds it, too.
    assert not all(_block_sum(code, 'random', seed) for seed in range(4))


_SHARED = '''
template <typename T> __device__ T sum(T x) {
  __shared__ T part[32];
  const auto turned = [&](int k) { return part[(threadIdx.x + k) % 32]; };
  part[threadIdx.x] = x;
  __syncthreads();
  T y = 0;
  for (int k = 0; k < 32; ++k) y += turned(k);
  __syncthreads();
  return y;
}
__constant__ float factors[2] = {1, 2};
extern "C" __global__ void in_template(float* x, double* y) {
  x[threadIdx.x] = sum(x[threadIdx.x]) * factors[1];
  y[threadIdx.x] = sum(y[threadIdx.x]);
}
template <typename T> __device__ T leftover() {
  __shared__ T part[32];
  T before = part[threadIdx.x];
  part[threadIdx.x] = 1;
  return before;
}
extern "C" __global__ void unset(float* x, float* y, float* z) {
  __shared__ float part[32];
  extern __shared__ __align__(16) float dynamic[];
  const int i = blockIdx.x * 32 + threadIdx.x;
  x[i] = part[threadIdx.x];
  y[i] = dynamic[threadIdx.x];
  z[i] = leftover<float>();
  part[threadIdx.x] = dynamic[threadIdx.x] = 1;
}
'''


def test_shared_memory_of_templates():
    x, y = _random(32), _random(32, 'float64')
    expected = x.sum(dtype='float64') * 2, y.sum()
    cuda.raw(_SHARED, 'in_template')((1,), (32,), (x, y))
    np.testing.assert_allclose(x, np.full(32, expected[0]), rtol=1e-5)
    np.testing.assert_allclose(y, np.full(32, expected[1]), rtol=1e-12)


def test_shared_memory_starts_as_poison_in_each_block():
    arrays = [np.zeros(96, 'float32') for _ in range(3)]
    kernel = cuda.raw(_SHARED, 'unset')
    for _ in range(2):
        kernel((3,), (32,), tuple(arrays), shared_mem=128)
        assert all(np.isnan(x).all() for x in arrays)
    with pytest.raises(cuda.KernelFault, match='dynamic shared memory'):
        kernel((3,), (32,), tuple(arrays), shared_mem=124)
    with pytest.raises(cuda.KernelFault, match='shared memory'):
        kernel((3,), (32,), tuple(arrays), shared_mem=48 * 1024)
    kernel.max_dynamic_shared_size_bytes = 64 * 1024
    kernel((3,), (32,), tuple(arrays), shared_mem=48 * 1024)


_WARP = '''
extern "C" __global__ void warps(const double* x, double* y, int* k) {
  const unsigned all = 0xffffffffu;
  const int t = threadIdx.x + blockDim.x * threadIdx.y;
  double s = x[t];
  for (int d = 16; d; d >>= 1) s += __shfl_down_sync(all, s, d);
  y[t] = __shfl_sync(all, s, 0);
  y[64 + t] = __shfl_up_sync(all, x[t], 3, 8);
  y[128 + t] = __shfl_xor_sync(all, (float)x[t], 5);
  k[t] = __ballot_sync(all, x[t] > 0);
  k[64 + t] = __any_sync(all, x[t] > 1.9) + 2 * __all_sync(all, x[t] < 3);
  if (t % 2) {
    k[128 + t] = __shfl_sync(0xaaaaaaaau, t, 31);
  } else {
    k[128 + t] = __shfl_sync(0x55555555u, t, 30);
  }
  __syncwarp();
  k[192 + t] = __syncthreads_count(x[t] > 0);
  k[256 + t] = __syncthreads_or(t == 5) + 2 * __syncthreads_and(t < 63);
}
'''


@pytest.mark.parametrize('order', SCHEDULES)
def test_warps(order):
    x, y, k = _random(64, 'float64'), np.zeros(192), np.zeros(320, 'int32')
    with cuda.schedule(order):
        cuda.raw(_WARP, 'warps')((1,), (8, 8), (x, y, k))
    t = np.arange(64)
    np.testing.assert_allclose(
        y[:64], np.repeat(x.reshape(2, 32).sum(1), 32), rtol=1e-12)
    np.testing.assert_array_equal(
        y[64:128], x[np.where(t % 8 < 3, t, t - 3)])
    np.testing.assert_array_equal(y[128:], x[t ^ 5].astype('float32'))
    votes = (x > 0).reshape(2, 32)
    ballots = (votes * (1 << np.arange(32))).sum(1).astype('uint32')
    np.testing.assert_array_equal(
        k[:64].view('uint32'), np.repeat(ballots, 32))
    some = (x > 1.9).reshape(2, 32).any(1)
    np.testing.assert_array_equal(k[64:128], np.repeat(some + 2, 32))
    np.testing.assert_array_equal(k[128:192], t // 32 * 32 + 30 + t % 2)
    assert (k[192:256] == votes.sum()).all()
    assert (k[256:] == 1).all()


_FAULTS = {
    'returns': 'if (t == 3) return; __syncthreads(); y[t] = 1;',
    'differs': 'if (t < 32) __syncthreads(); else __syncthreads_or(1);',
    'absent': 'if (t != 7) y[t] = __shfl_sync(0xffffffffu, x[t], 0);',
    'barred': 'if (t < 16) __syncthreads();'
              'else y[t] = __shfl_sync(0xffffffffu, x[t], 0);',
    'unnamed': 'y[t] = __shfl_down_sync(0xffffu, x[t], 1);',
    'behind': 'y[t + 1] = 0;',
    'before': 'y[t - 1] = 0;',
    'reads': 'y[t] = x[t + 1];',
    'changes': 'const_cast<float*>(x)[t] = 5;',
    'wild': 'y[t] = *reinterpret_cast<float*>(16);',
    'spins': 'while (*(volatile float*)y == 0) {}',
    'divides': 'y[t] = t / n;',
    'asserts': 'assert(t < 5); y[t] = 1;',
    'overflows': 'volatile float b[100000]; b[t] = 1; y[t] = b[t];',
    'bounds': '__shared__ float part[8]; part[t] = 1; y[t] = part[n];',
    'through': '__shared__ float part[8]; float* p = part; p[t] = 1;'
               '__syncthreads(); y[t] = part[n];',
}


def _faulty(name):
    return cuda.raw(f"""
        extern "C" __global__ void {name}(const float* x, float* y, int n) {{
          const int t = threadIdx.x;
          {_FAULTS[name]}
        }}""", name)


@pytest.mark.parametrize('order', SCHEDULES)
@pytest.mark.parametrize(('name', 'message'), [
    ('returns', 'divergent barrier.* 1 of 64 threads have returned'),
    ('differs', 'divergent barrier: it waits at __syncthreads'),
    ('absent', '__shfl_sync.* lane 7 .*returned'),
    ('barred', 'waits for lanes'), ('unnamed', 'does not name'),
    ('behind', "written behind the end of argument 'y', 0 bytes off"),
    ('before', "written before the start of argument 'y', 0"),
    ('changes', "argument 'x' is constant"), ('wild', 'illegal memory'),
    ('divides', 'division by zero'), ('asserts', r'assertion failed: t < 5'),
    ('overflows', 'illegal memory access'),
    ('bounds', 'out of the bounds of an array'),
    ('through', 'behind the end of a shared variable of 32 bytes')])
def test_faults(name, message, order):
    x, y = np.ones(64, 'float32'), np.zeros(64, 'float32')
    kernel = _faulty(name)
    with cuda.schedule(order):
        with pytest.raises(cuda.KernelFault, match=message):
            kernel((1,), (64,), (x, y, np.int32(0)))
        # Nothing of it stays, in memory or in the machine.
        assert (x == 1).all()
        assert (y == 0).all()
        assert _block_sum(_BLOCK_SUM, order)


def test_a_read_out_of_bounds_gives_nan():
    x, y = np.ones((2, 64), 'float32'), np.zeros(64, 'float32')
    _faulty('reads')((1,), (64,), (x[0], y, np.int32(0)))
    assert (y[:63] == 1).all()
    assert np.isnan(y[63])


def test_a_kernel_that_does_not_end_is_stopped(monkeypatch):
    module = importlib.import_module('tests.cuda_on_host.raw')
    monkeypatch.setattr(module, 'time_limit', 0.2)
    with pytest.raises(cuda.KernelFault, match='does not end'):
        _faulty('spins')(
            (1,), (64,), (np.zeros(64, 'float32'), np.zeros(64, 'float32'),
                          np.int32(0)))


_ARGUMENTS = '''
#include <cupy/float16.cuh>
typedef float16 T;
typedef double A;
extern "C" __global__ void arguments(
    const T* t, A* a, int i, long long l, float f, double d, bool b, A* none,
    const void* any) {
  if (threadIdx.x == 0 && !none)
    a[0] = float(t[0]) + i + l + f + d + (b ? 1 : 0);
}
'''


def test_arguments():
    good = (np.ones(1, 'float16'), np.zeros(1), np.int32(10), 100,
            np.float32(1000), 1e4, True, np.intp(0), np.zeros(3, 'int8'))
    kernel = cuda.raw(_ARGUMENTS, 'arguments')
    kernel((1,), (2,), good)
    assert good[1][0] == 11112
    for at, bad, message in [
            (0, np.ones(1, 'float32'),
             "'t'.*array of float32 is given for const float16 *"),
            (1, np.ones(1, 'float32'), "'a'.*float64"),
            (2, 10, "'i'.*int64 is given for int32"),
            (2, np.float32(1), 'float32 is given for int32'),
            (3, np.int32(1), "'l'.*int32 is given for int64"),
            (4, 1.0, "'f'.*float64 is given for float32"),
            (5, 1, "'d'.*int64 is given for float64"),
            (6, 1, "'b'.*int64 is given for bool"),
            (7, None, 'no argument of a kernel'),
            (7, np.intp(1), 'given for float64 *'),
            (7, np.int32(0), 'given for float64 *'),
            (2, np.zeros(1, 'int32'), 'an array is given for int32'),
            (8, 'x', 'no argument')]:
        wrong = list(good)
        wrong[at] = bad
        with pytest.raises(TypeError, match=message):
            kernel((1,), (2,), tuple(wrong))
    with pytest.raises(TypeError, match='takes 9 arguments, 8 given'):
        kernel((1,), (2,), good[:-1])


def test_slices_of_one_array_alias_where_they_overlap():
    code = '''
    extern "C" __global__ void shift(const float* x, float* y) {
      const float v = x[threadIdx.x];
      __syncthreads();
      y[threadIdx.x] = v + 1;
      __syncthreads();
      if (threadIdx.x == 0) y[1] = x[1];
    }'''
    x = np.arange(9, dtype='float32')
    cuda.raw(code, 'shift')((1,), (8,), (x[:8], x[1:]))
    np.testing.assert_array_equal(x, [0, 1, 1, 3, 4, 5, 6, 7, 8])
    # Apart, they are guarded apart.
    state = np.zeros(64, 'float32')
    with pytest.raises(cuda.KernelFault, match="end of argument 'y'"):
        _faulty('behind')(
            (1,), (32,), (state[32:], state[:32], np.int32(0)))


def test_read_only_memory():
    x = np.ones(64, 'float32')
    y = np.zeros(64, 'float32')
    y.flags.writeable = False
    with pytest.raises(cuda.KernelFault, match='read-only'):
        _faulty('reads')((1,), (64,), (x, y, np.int32(0)))


# ---------------------------------------------------------------- vectors

_PACKS = """
#include <cupy/float16.cuh>
typedef %s T;
struct alignas(16) Pack { T x[16 / sizeof(T)]; };
enum { N = 16 / sizeof(T) };
struct Twice {
  __device__ T operator()(T v) const { return static_cast<T>(v + v); }
};
template <typename F>
__device__ __noinline__ void each(
    const T* __restrict__ p, T* __restrict__ q, const F& f) {
  const Pack a = *reinterpret_cast<const Pack*>(p);
  Pack b;
#pragma unroll 4
  for (int k = 0; k < N; ++k) b.x[k] = f(a.x[k]);
  *reinterpret_cast<Pack*>(q) = b;
}
extern "C" __global__ void __launch_bounds__(256, 2) twice(
    const T* __restrict__ x, T* __restrict__ y, int n) {
  __builtin_assume(n %% N == 0);
  const T* row = x + blockIdx.y * n;
  const auto at = [=](int i) { return y + blockIdx.y * n + i; };
  const int step = gridDim.x * blockDim.x * N;
  for (int i = N * (blockIdx.x * blockDim.x + threadIdx.x); i < n; i += step)
    each(row + i, at(i), Twice());
}
"""


def _twice(dtype, options=()):
    name = {'e': 'float16', 'f': 'float', 'd': 'double'}[dtype]
    return cuda.raw(_PACKS % name, 'twice', options)


@pytest.mark.parametrize('races', [False, True])
@pytest.mark.parametrize('options', [
    (), ('--std=c++11',), ('--std=c++14',)])
@pytest.mark.parametrize('dtype', 'efd')
def test_packs(dtype, options, races):
    x = np.arange(3 * 520).astype(dtype)
    y = np.zeros_like(x)
    with cuda.races() if races else contextlib.nullcontext():
        _twice(dtype, options)((2, 3), (32,), (x, y, np.int32(520)))
    np.testing.assert_array_equal(y, 2 * x)


def test_the_first_of_two_launch_bounds_counts():
    x, y = np.ones(8, 'f'), np.zeros(8, 'f')
    _twice('f')((1,), (256,), (x, y, np.int32(8)))
    with pytest.raises(cuda.KernelFault, match='launch bounds of 256'):
        _twice('f')((1,), (288,), (x, y, np.int32(8)))


@pytest.mark.parametrize('races', [False, True])
@pytest.mark.parametrize('off', ['x', 'y'])
@pytest.mark.parametrize('dtype', 'efd')
def test_a_misaligned_pack_is_found(dtype, off, races):
    """Memory of the host is aligned by chance; that of a device is not."""
    kernel = _twice(dtype)
    for k in range(1, 16 // np.dtype(dtype).itemsize + 1):
        x, y = np.ones(528, dtype), np.zeros(528, dtype)
        x, y = (x[k:], y) if off == 'x' else (x, y[k:])
        args = (1,), (32,), (x, y, np.int32(512))
        with cuda.races() if races else contextlib.nullcontext():
            if x[:1].strides[0] * k % 16 == 0:
                kernel(*args)
                np.testing.assert_array_equal(y[:512], 2)
            else:
                with pytest.raises(cuda.KernelFault, match=(
                        f"misaligned access: byte .* of argument '{off}' is "
                        'at no multiple of 16 bytes')):
                    kernel(*args)


def test_a_row_of_an_odd_length_is_misaligned():
    x, y = np.ones(2 * 514, 'f'), np.zeros(2 * 514, 'f')
    with pytest.raises(cuda.KernelFault, match='wrong assumption'):
        _twice('f')((1, 2), (32,), (x, y, np.int32(514)))
    code = (_PACKS % 'float').replace('__builtin_assume', '(void)')
    with pytest.raises(cuda.KernelFault, match=r'block \(0, 1, 0\).*misal'):
        cuda.raw(code, 'twice')((1, 2), (32,), (x, y, np.int32(514)))


_VECTORS = """
extern "C" __global__ void vectors(
    const float4* a, const double2* b, const uint4* c, const float2* d,
    float4* e, double2* f, uint4* g, float2* h) {
  const int t = threadIdx.x;
  const float4 p = __ldg(a + t);
  const double2 q = __ldcs(b + t);
  const uint4 r = __ldcg(c + t);
  __stcs(e + t, make_float4(p.w, p.z, p.y, p.x));
  f[t] = make_double2(q.y, q.x);
  g[t] = make_uint4(r.w, r.z, r.y, r.x);
  h[t].x = __ldg(&d[t].y);
  h[t].y = d[t].x;
}
"""


@pytest.mark.parametrize('races', [False, True])
def test_vectors(races):
    arrays = [np.arange(32 * n).astype(dtype).reshape(32, n) for dtype, n in (
        ('f', 4), ('d', 2), ('I', 4), ('f', 2))]
    results = [np.zeros_like(x) for x in arrays]
    with cuda.races() if races else contextlib.nullcontext():
        cuda.raw(_VECTORS, 'vectors')((1,), (32,), (*arrays, *results))
    for x, y in zip(arrays, results):
        np.testing.assert_array_equal(y, x[:, ::-1])


def test_no_hint_for_a_type_of_ones_own():
    """CUDA has no such load either."""
    code = (_PACKS % 'float').replace(
        '*reinterpret_cast<const Pack*>(p)',
        '__ldg(reinterpret_cast<const Pack*>(p))')
    with pytest.raises(cuda.CompileError, match='__ldg'):
        cuda.raw(code, 'twice')(
            (1,), (32,), (np.ones(8, 'f'), np.zeros(8, 'f'), np.int32(8)))


def test_limits_of_a_launch():
    kernel = cuda.raw(_BLOCK_SUM, 'block_sum')
    args = np.zeros(8, 'float32'), np.zeros(1, 'float32'), np.int32(8)
    with pytest.raises(cuda.KernelFault, match='launch bounds'):
        kernel((1,), (512,), args)
    with pytest.raises(cuda.KernelFault, match='too many threads'):
        _faulty('reads')((1,), (2048,), args)
    with pytest.raises(ValueError, match='one of ascending'):
        cuda.set_schedule('sideways')
    with pytest.raises(ValueError, match='option'):
        cuda.raw(_BLOCK_SUM, 'block_sum', ('--no-such',))(
            (1,), (8,), args)


_GRID = '''
__device__ unsigned int finished = 0;
extern "C" __global__ void grid_sum(
    const int* x, int* part, int* y, unsigned int* seen) {
  __shared__ bool last;
  const int b = blockIdx.x + gridDim.x * (blockIdx.y
                + gridDim.y * blockIdx.z);
  const int blocks = gridDim.x * gridDim.y * gridDim.z;
  if (threadIdx.x == 0) part[b] = 0;
  __syncthreads();
  atomicAdd(&part[b], x[b * blockDim.x + threadIdx.x]);
  atomicMax(seen, (unsigned int)b);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0)
    last = atomicInc(&finished, blocks - 1) == blocks - 1;
  __syncthreads();
  if (last && threadIdx.x == 0) {
    *y = 0;
    for (int k = 0; k < blocks; ++k) *y += part[k];
  }
}
'''


@pytest.mark.parametrize('order', SCHEDULES)
def test_grid_and_atomics(order):
    x = np.arange(24 * 40, dtype='int32')
    part, y = np.zeros(24, 'int32'), np.zeros((), 'int32')
    seen = np.zeros(1, 'uint32')
    with cuda.schedule(order):
        for _ in range(2):
            cuda.raw(_GRID, 'grid_sum')(
                (2, 3, 4), (40,), (x, part, y, seen))
            assert y == x.sum()
    assert seen == 23


def test_speed():
    # What makes tests with it bearable; generous, for a loaded machine.
    code = '''
    extern "C" __global__ void barriers(float* x) {
      __shared__ float s[1024];
      const int t = threadIdx.x;
      s[t] = x[t];
      for (int k = 0; k < 20; ++k) {
        __syncthreads();
        const float v = s[(t + 1) % 1024];
        __syncthreads();
        s[t] = v;
      }
      x[t] = s[t];
    }'''
    kernel = cuda.raw(code, 'barriers')
    x = np.arange(1024, dtype='float32')

    def measure(function, *args):
        best = np.inf
        for _ in range(5):
            start = time.perf_counter()
            function(*args)
            best = min(best, time.perf_counter() - start)
        return best

    assert measure(kernel, (1,), (1024,), (x,)) < 0.1
    np.testing.assert_array_equal(x, np.roll(np.arange(1024), -100))
    small = cuda.elementwise('T x', 'T y', 'y = x', 'small')
    assert measure(small, x) < 0.005


# ----------------------------------------------------------------- races

_RACES = {
    'packs': ('float4* p = reinterpret_cast<float4*>(y);'
              'if (t < 16) p[t] = make_float4(1, 1, 1, 1);'
              'if (t == 40) y[7] = 2;', "byte 28 of argument 'y'"),
    'neighbours': ('s[t] = x[t]; y[t] = s[(t + 1) % 64];', 'shared'),
    'reuse': ('s[t] = x[t]; __syncthreads(); y[t] = s[63 - t]; s[t] = 0;',
              'shared'),
    'one_place': ('if (t % 32 == 0) y[0] = t;', "byte 0 of argument 'y'"),
    'shuffled': ('s[t] = x[t]; __shfl_sync(0xffffffffu, x[t], 0);'
                 'y[t] = s[t ^ 1];', 'which thread [0-9]+ has written'),
    'beyond_a_warp': ('s[t] = x[t]; __syncwarp(); y[t] = s[63 - t];',
                      'shared'),
    'mixed': ('atomicAdd(y, 1.0f); if (t == 40) y[0] = 1;', 'argument'),
}
_NO_RACES = {
    'apart': 's[t] = x[t]; __syncthreads(); y[t] = s[(t + 1) % 64];',
    'in_a_warp': 's[t] = x[t]; __syncwarp(); const float v = s[t ^ 1];'
                 '__syncwarp(); s[t] = v; y[t] = v;',
    'atomic': 'atomicAdd(y, x[t]); __syncthreads(); if (t == 3) y[0] += 1;',
    'halves': 'short* h = reinterpret_cast<short*>(s); h[t] = t;'
              'h[t] += 1; y[t] = x[0] + x[63];',
}


def _racing(name, code):
    return cuda.raw(f"""
        extern "C" __global__ void {name}(const float* x, float* y) {{
          __shared__ float s[64];
          const int t = threadIdx.x;
          {code}
        }}""", name)


@pytest.mark.parametrize('name', _RACES)
@pytest.mark.parametrize('order', SCHEDULES)
def test_races_are_found_in_every_order(name, order):
    code, message = _RACES[name]
    x, y = np.ones(64, 'float32'), np.zeros(64, 'float32')
    with cuda.races(), cuda.schedule(order), pytest.raises(
            cuda.KernelFault, match='race: .*' + message):
        _racing(name, code)((1,), (64,), (x, y))


@pytest.mark.parametrize('order', SCHEDULES)
def test_no_races_are_found_where_there_are_none(order):
    x, y = np.ones(64, 'float32'), np.zeros(64, 'float32')
    with cuda.races(), cuda.schedule(order):
        for name, code in _NO_RACES.items():
            _racing(name, code)((1,), (64,), (x, y))
        assert _block_sum(_BLOCK_SUM, order)
        a = _random((20, 30))
        total = cuda.reduce('T x', 'T y', 'x', 'a + b', 'y = a', '0', 'sums')
        np.testing.assert_allclose(
            total(a, axis=0), a.sum(0), rtol=1e-5, atol=1e-5)
        add = cuda.elementwise('T x, T y', 'T z', 'z = x + y', 'add')
        np.testing.assert_array_equal(add(a, a), 2 * a)


_RACES_OF_BLOCKS = {
    'last_wins': ('y[0] = b;', 'writes .* written, in another block'),
    'same_value': ('y[0] = 1;', 'writes .* written, in another block'),
    'written_first': ('y[b] = 1; if (b == 1) y[3] = y[0];',
                      '(reads .* written|writes .* read), in another block'),
    'read_by_all': ('y[b + 1] = y[0]; if (b == 2) y[0] = 1;',
                    '(reads .* written|writes .* read), in another block'),
    'through_a_pack': (
        'if (b == 2) y[2] = 1;'
        'else { const float4 v = *reinterpret_cast<const float4*>(y);'
        '       y[4 + b] = v.x + v.z; }',
        "byte 8 of argument 'y', .* in another block"),
    'not_atomic': ('atomicAdd(y, 1.0f); if (b == 1) y[0] = 1;',
                   'in another block'),
    'reads_an_atomic': ('atomicAdd(y, 1.0f); y[b + 1] = y[0];',
                        'writes .* read, in another block'),
    'no_fence': ('y[b] = 1; if (atomicAdd(n, 1) == 2) y[3] = y[0] + y[1];',
                 'reads .* written, in another block'),
    'no_atomic': ('y[b] = 1; __threadfence(); y[3 + b] = y[(b + 1) % 3];',
                  '(reads .* written|writes .* read), in another block'),
    'late': ('__threadfence(); y[b] = 1;'
             'if (atomicAdd(n, 1) == 2) y[3] = y[0] + y[1] + y[2];',
             'reads .* written, in another block'),
    'elsewhere': ('y[b] = 1; __threadfence();'
                  'atomicAdd(n + b, 1); y[3 + b] = y[(b + 1) % 3];',
                  '(reads .* written|writes .* read), in another block'),
}
_NO_RACES_OF_BLOCKS = {
    'own_place': 'y[b] = x[0]; y[b] += x[0];',
    'all_read': 'y[b] = x[0] + x[1] + x[2];',
    'atomics': 'atomicAdd(y, x[b]);',
    'shared': '__shared__ float s; s = x[b]; y[b] = s;',
    'last_block': 'y[b] = x[b]; __threadfence();'
                  'if (atomicAdd(n, 1) == 2) {'
                  '  __threadfence(); y[3] = y[0] + y[1] + y[2]; }',
}


def _run_blocks(name, code):
    x, y = np.ones(8, 'float32'), np.zeros(8, 'float32')
    cuda.raw(f"""
        extern "C" __global__ void {name}(const float* x, float* y, int* n) {{
          const int b = blockIdx.x;
          {code}
        }}""", name)((3,), (1,), (x, y, np.zeros(3, 'int32')))
    return y


@pytest.mark.parametrize('order', SCHEDULES)
@pytest.mark.parametrize('name', _RACES_OF_BLOCKS)
def test_races_of_blocks(name, order):
    code, message = _RACES_OF_BLOCKS[name]
    with cuda.schedule(order):
        _run_blocks(name, code)
        with cuda.races(), pytest.raises(
                cuda.KernelFault, match='race: .*' + message):
            _run_blocks(name, code)


@pytest.mark.parametrize('order', SCHEDULES)
def test_no_races_of_blocks_are_found_where_there_are_none(order):
    with cuda.schedule(order), cuda.races():
        for name, code in _NO_RACES_OF_BLOCKS.items():
            _run_blocks(name, code)
        assert _run_blocks(
            'last_block', _NO_RACES_OF_BLOCKS['last_block'])[3] == 3
        test_grid_and_atomics(order)


@pytest.mark.parametrize('at', [-1, 8, 100])
def test_reads_of_no_argument(at):
    """What is there is not a number; whoever makes no use of it is found."""
    x, y = np.ones(8, 'float32'), np.zeros(8, 'float32')
    kernel = cuda.raw("""
        extern "C" __global__ void beyond(const float* x, float* y, int at) {
          y[0] = x[at] > 0;
        }""", 'beyond')
    kernel((1,), (1,), (x, y, np.int32(at)))
    with cuda.races():
        kernel((1,), (1,), (x, y, np.int32(7)))
        with pytest.raises(cuda.KernelFault, match='reads memory of no arg'):
            kernel((1,), (1,), (x, y, np.int32(at)))


def test_what_the_next_launch_does_is_no_race():
    x, y = np.ones(8, 'float32'), np.zeros(8, 'float32')
    kernel = cuda.raw("""
        extern "C" __global__ void in_turn(const float* x, float* y, int k) {
          if (blockIdx.x == k) y[k] = x[k]; else if (k) y[7] = y[k - 1];
        }""", 'in_turn')
    with cuda.races():
        for k in range(2):
            kernel((2,), (1,), (x, y, np.int32(k)))
    assert y[7] == 1
