"""The stand-in for CuPy: that it is as strict as a device is."""
import copy
import operator
import pickle
import sys

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import testing
from chainer.backends import cuda

from tests import cuda_on_host
from tests.cuda_on_host import array


@pytest.fixture
def xp():
    with array.installed() as module:
        yield module


def random(*shape):
    return np.random.normal(size=shape).astype('f')


def test_everything_is_restored():
    owners = [cuda, cuda.GpuDevice, chainer,
              sys.modules['chainer.functions.activation.relu']]
    chainer.get_array_types()
    before = [dict(vars(owner)) for owner in owners]
    modules = set(sys.modules)
    with array.installed():
        assert cuda.available
        assert array.DeviceArray in chainer.get_array_types()
    with pytest.raises(KeyError), array.installed():
        raise KeyError
    for a, b in zip(before, [vars(owner) for owner in owners]):
        assert a.keys() == b.keys()
        assert all(a[name] is b[name] for name in a)
    assert set(sys.modules) == modules
    assert array.DeviceArray not in chainer.get_array_types()


def test_nested():
    with array.installed() as outer:
        with array.installed() as inner:
            assert inner is outer
        assert cuda.cupy is outer


@pytest.mark.usefixtures('xp')
def test_chainer_takes_it_for_a_device():
    x = random(2, 3)
    device = chainer.get_device('@cupy:0')
    sent = device.send(x)
    assert isinstance(sent, cuda.ndarray)
    assert not isinstance(sent, np.ndarray)
    assert device.xp is cuda.cupy
    assert device.xp is chainer.backend.get_array_module(sent)
    assert chainer.backend.get_device_from_array(sent) == device
    assert chainer.backend.get_device_from_array(x).name == '@numpy'
    assert device.is_array_supported(sent)
    assert device.send(sent) is sent
    for back in (cuda.to_cpu(sent), chainer.get_device('@numpy').send(sent)):
        assert type(back) is np.ndarray
        np.testing.assert_array_equal(back, x)
    assert cuda.to_gpu(x).device.id == 0
    with chainer.using_device(device):
        pass
    with pytest.raises(RuntimeError), chainer.using_device('@cupy:1'):
        pass


def test_it_is_a_copy_in_both_directions(xp):
    x = np.zeros(2)
    y = xp.asarray(x)
    z = y.get()
    y += 1
    assert not x.any()
    assert not z.any()


SYNCHRONIZING = {
    'float': float, 'int': int, 'complex': complex, 'bool': bool,
    'str': str, 'repr': repr, 'format': '{:.3f}'.format,
    'item': lambda x: x.item(), 'tolist': lambda x: x.tolist(),
    'get': lambda x: x.get(), 'to_cpu': cuda.to_cpu,
    'asarray': np.asarray, 'array': np.array, 'float32': np.float32,
    'asnumpy': lambda x: array.module.asnumpy(x),
    'if': lambda x: 1 if x > 0 else 2,
    'max': lambda x: max(x, 0), 'in': lambda x: 1.0 in x.reshape(1),
    'iteration': lambda x: [float(v) for v in x.reshape(1)],
    'mask': lambda x: x.reshape(1)[x.reshape(1) > 0],
    'nonzero': lambda x: x.reshape(1).nonzero(),
    'where': lambda x: array.module.where(x.reshape(1) > 0),
    'pickle': pickle.dumps,
    'stream': lambda x: cuda.Stream.null.synchronize(),
    'device': lambda x: x.device.synchronize(),
}


@pytest.mark.parametrize('name', SYNCHRONIZING)
def test_synchronization(xp, name):
    x = xp.asarray(np.array(2.0, 'f'))
    function = SYNCHRONIZING[name]
    with array.no_synchronization(), pytest.raises(
            AssertionError, match='host synchronization'):
        function(x)
    if name in ('asarray', 'array', 'float32'):  # nor without it
        with pytest.raises(TypeError, match='Implicit conversion'):
            function(x)
    else:
        function(x)


def test_no_synchronization_lets_the_device_work(xp):
    x = random(3, 2)
    with array.no_synchronization() as log:
        y = xp.asarray(x)
        z = xp.where(y > 0, y, 0).sum(axis=0).max()
        y[...] = z
        y[0, 0] = 1
        a, b = y[0]
        assert a.shape == b.shape == ()
        assert z.shape == ()
        assert len(y) == 3
        assert copy.deepcopy(y) is not y
    assert log.copies == [(3, 2)]
    assert float(z) == np.float32(np.maximum(x, 0).sum(axis=0).max())
    assert y.tolist() == [[1, float(z)]] + [[float(z)] * 2] * 2


@pytest.mark.parametrize('name', [
    'add', 'sub', 'mul', 'truediv', 'matmul', 'pow', 'iadd', 'imul'])
def test_does_not_mix_with_the_host(xp, name):
    function = getattr(operator, name)
    host, device = np.ones((2, 2)), xp.ones((2, 2))
    with pytest.raises(TypeError):
        function(device, host)
    with pytest.raises(TypeError):
        function(host, device)


@pytest.mark.parametrize('mix', [
    lambda xp, x, y: xp.where(x > 0, x, y),
    lambda xp, x, y: xp.dot(x, y),
    lambda xp, x, y: x.dot(y),
    lambda xp, x, y: xp.maximum(x, y),
    lambda xp, x, y: xp.sqrt(y),
    lambda xp, x, y: xp.sum(y),
    lambda xp, x, y: xp.concatenate([x, y]),
    lambda xp, x, y: np.concatenate([x, y]),
    lambda xp, x, y: xp.add(x, x, out=y),
    lambda xp, x, y: x + np.array(1.0),
    lambda xp, x, y: xp.copyto(x, y),
    lambda xp, x, y: cuda.elementwise('T x', 'T y', 'y = x', 'f')(y, x),
])
def test_does_not_mix_with_the_host_in_functions(xp, mix):
    with pytest.raises(TypeError):
        mix(xp, xp.ones((2, 2)), np.ones((2, 2)))


def test_does_not_take_the_host_in_assignments(xp):
    with pytest.raises(ValueError, match='non-scalar'):
        xp.ones(2)[...] = np.ones(2)


def test_scalars(xp):
    x = xp.ones(2, 'f')
    for y in (x * 2, 2.0 * x, x * np.float32(2), np.float32(2) * x,
              x < 2, np.float32(2) > x, abs(-x), x.sum(), x.sum() * 2.0,
              xp.where(x.sum() > 3, 1, x.sum()), x[0], x[0] / x[1], x ** 2):
        assert type(y) is array.DeviceArray
        assert y.dtype in ('f', '?')
    assert (x.sum() * xp.ones((), 'd')).dtype == 'd'
    assert (x * xp.ones((), 'd')).dtype == 'd'


def test_views(xp):
    x = xp.zeros((3, 4))
    x[1, 2] += 1
    x[0][1] = 2
    y = x.reshape(12)[3:]
    y[0] = 5
    x.T[0, 2:] = 7
    np.testing.assert_array_equal(
        x.get(), [[0, 2, 0, 5], [0, 0, 1, 0], [7, 0, 0, 0]])
    cell = x[2, 3]
    cell.fill(4)
    assert float(x[2, 3]) == 4
    assert not x.T.flags.c_contiguous
    assert not hasattr(x.flags, 'writeable')
    with pytest.raises(TypeError):
        iter(cell)
    with pytest.raises(ValueError, match='ambiguous'):
        bool(x)


@pytest.mark.parametrize('dtype', ['e', 'f', 'd', 'i', 'B', '?'])
def test_empty_is_garbage(xp, dtype):
    for x in (xp.empty((2, 3), dtype), xp.ndarray((2, 3), dtype),
              xp.empty_like(xp.zeros((2, 3), dtype))):
        assert x.shape == (2, 3)
        assert x.dtype == dtype
        host = x.get()
        assert (np.isnan(host) if dtype in 'efd' else host != 0).all()


def test_functions_of_numpy_are_dispatched(xp):
    x = xp.asarray(random(2, 3))
    for y in (np.sum(x), np.sqrt(x), np.concatenate([x, x]),
              np.linalg.norm(x), np.maximum(x, 0), xp.linalg.norm(x),
              xp.einsum('ij,kj', x, x), xp.isfinite(x), xp.allclose(x, x)):
        assert type(y) is array.DeviceArray
    assert all(type(y) is array.DeviceArray for y in xp.linalg.svd(x))
    assert xp.float32 is np.float32
    with pytest.raises(AttributeError):
        _ = xp.geomspace


def test_no_warnings(xp):
    x = xp.zeros(2) / 0
    assert bool(xp.isnan(x).all())
    assert bool(xp.isinf(xp.asarray(1e300) * 1e300))
    assert bool(xp.isnan(x.dot(x)))


def test_random(xp):
    xp.random.seed(3)
    x = xp.random.normal(0, 1, (2, 3), dtype='f')
    assert x.dtype == 'f'
    xp.random.seed(3)
    assert bool((x == xp.random.normal(size=(2, 3), dtype='f')).all())
    assert xp.random.RandomState(0).uniform(size=2).shape == (2,)


@pytest.mark.parametrize(('expected', 'function'), [
    ([], lambda xp, x: x.reshape(2, 8)[0]),
    ([], lambda xp, x: (xp.empty(3), x.T, x.ravel(), x[None], x.view())),
    ([], lambda xp, x: (xp.asarray(x), x.astype('f', copy=False))),
    ([], lambda xp, x: xp.broadcast_to(x, (2, 4, 4))),
    (['copy'], lambda xp, x: x.copy()),
    (['copy'], lambda xp, x: x.T.reshape(16)),
    (['copy'], lambda xp, x: x.T.ravel()),
    (['astype'], lambda xp, x: x.astype('d')),
    (['copy'], lambda xp, x: x.astype('f')),
    (['copy'], lambda xp, x: xp.ascontiguousarray(x.T)),
    (['copy'], lambda xp, x: operator.setitem(x, 0, x[1])),
    (['fill'], lambda xp, x: operator.setitem(x, 0, 1)),
    (['fill'], lambda xp, x: xp.zeros(3)),
    (['to_device'], lambda xp, x: xp.asarray(np.ones(2))),
    (['to_host'], lambda xp, x: x.get()),
    (['add'], lambda xp, x: x + 1),
    (['add'], lambda xp, x: operator.iadd(x, x)),
    (['add'], lambda xp, x: operator.setitem(
        x, 0, operator.iadd(x[0], 1))),
    (['absolute', 'max', 'greater'], lambda xp, x: abs(x).max() > 0),
    (['greater', 'where', 'isfinite'], lambda xp, x: xp.isfinite(
        xp.where(x > 0, x, 0))),
    (['multiply', 'sum'], lambda xp, x: x[0].dot(x[1])),
    (['gemv'], lambda xp, x: x.dot(x[0])),
    (['gemv'], lambda xp, x: x[0].dot(x)),
    (['gemv'], lambda xp, x: x.T @ x[0]),
    (['copy', 'gemv'], lambda xp, x: x[:, ::2].dot(x[0, :2])),
    (['gemm'], lambda xp, x: x.dot(x.T)),
    (['gemm'], lambda xp, x: xp.tensordot(x, x, (0, 0))),
    (['gemm', 'sum'], lambda xp, x: (
        x.reshape(2, 2, 4) @ x.reshape(2, 4, 2)).sum(axis=0)),
    (['gemm', 'subtract', 'fill'], lambda xp, x: (
        xp.zeros_like(x @ x - 1))),
])
def test_counted(xp, expected, function):
    x = xp.asarray(random(4, 4))
    with array.counted() as names:
        function(xp, x)
    assert names == expected


def test_a_broadcast_batch_needs_pointers(xp):
    x = xp.asarray(random(3, 2, 4))
    with array.counted() as names:
        y = x[0, 0, :2] @ x
    assert names == ['mat_ptrs'] * 3 + ['gemm']
    assert y.shape == (3, 4)


@pytest.mark.skipif(
    not cuda_on_host.available(), reason='no C++ compiler')
def test_kernels(xp):
    x = xp.asarray(random(3, 4))
    with array.counted() as names, array.no_synchronization() as log:
        y = cuda.elementwise('T x, T a', 'T y', 'y = a * x', 'scaled')(x, 2)
        z = cuda.reduce('T x', 'T y', 'x * x', 'a + b', 'y = a', '0',
                        'squares')(x, axis=1)
        out = xp.empty_like(x)
        kernel = xp.RawKernel('''
            extern "C" __global__ void raw(const float* x, float* y, int n) {
                int i = blockIdx.x * blockDim.x + threadIdx.x;
                if (i < n) y[i] = x[i] + 1;
            }''', 'raw')
        kernel((1,), (32,), (x, out, np.int32(x.size)))
    assert names == ['scaled', 'squares', 'raw']
    assert not log.copies
    host = x.get()
    for a, b in ((y, 2 * host), (z, (host * host).sum(axis=1)),
                 (out, host + 1)):
        assert type(a) is array.DeviceArray
        np.testing.assert_allclose(a.get(), b, rtol=1e-6)


LINKS = {
    'Linear': (lambda: L.Linear(4, 3), (5, 4)),
    'Convolution2D': (lambda: L.Convolution2D(2, 3, 3, pad=1), (2, 2, 5, 5)),
    'Deconvolution2D': (lambda: L.Deconvolution2D(2, 3, 3), (2, 2, 4, 4)),
    'ConvolutionND': (lambda: L.ConvolutionND(1, 2, 3, 3), (2, 2, 6)),
    'BatchNormalization': (lambda: L.BatchNormalization(4), (5, 4)),
}


@pytest.mark.gpu
@pytest.mark.parametrize('name', LINKS)
def test_links_of_chainer(name):
    make, shape = LINKS[name]
    link, x, device = make(), random(*shape), chainer.get_device('@cupy:0')
    other = copy.deepcopy(link)
    other.to_device(device)
    results = []
    for model, v in ((link, x), (other, device.send(x))):
        v = chainer.Variable(v)
        y = model(v)
        model.cleargrads()
        F.sum(F.relu(y) * y).backward()
        results.append([y.array, v.grad, *[
            p.grad for _, p in sorted(model.namedparams())]])
    for a, b in zip(*results):
        assert isinstance(a, np.ndarray)
        assert isinstance(b, cuda.ndarray)
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, cuda.to_cpu(b), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures('xp')
def test_launches_of_a_link():
    link = L.Linear(4, 3)
    link.to_device('@cupy:0')
    x = chainer.get_device('@cupy:0').send(random(5, 4))
    with array.counted() as names, array.no_synchronization() as log:
        y = link(x)
    assert names == ['gemm', 'add']
    link.cleargrads()
    with array.counted() as names, array.no_synchronization():
        y.grad = y.xp.ones_like(y.array)
        y.backward()
    assert names == ['fill', 'gemm', 'sum']
    assert not log.copies


@testing.parameterize({'dtype': np.float16}, {'dtype': np.float64})
@testing.inject_backend_tests(
    None, [{}, {'use_cuda': True, 'cuda_device': 0}])
class TestFunction(testing.FunctionTestCase):
    """The machinery of Chainer's tests, numerical gradients included."""

    def setUp(self):
        tolerance = 1e-2 if self.dtype == np.float16 else 1e-5
        for name in ('forward', 'backward', 'double_backward'):
            setattr(self, f'check_{name}_options',
                    {'atol': tolerance, 'rtol': tolerance})

    def generate_inputs(self):
        return tuple([np.random.uniform(-1, 1, s).astype(self.dtype)
                      for s in ((3, 2), (2, 4))])

    def forward(self, inputs, device):
        x, y = inputs
        assert isinstance(x.array, device.supported_array_types)
        return F.tanh(F.matmul(x, y)),

    def forward_expected(self, inputs):
        x, y = inputs
        return np.tanh(x.dot(y)),
