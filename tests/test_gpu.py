"""What only a real CUDA device can show: streams, launches, memory.

Of the results, larger weights than in ``tests/arithmetic/test_device.py``;
they are run on the host as well where there is no device.

CuPy is imported inside of the tests alone, so that they are collected, and
skipped, where there is none.
"""
from __future__ import annotations

import functools

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import gradient_check
from chainer.backends import cuda

from sn_function import SpectralNormalization, functions
from sn_function._arithmetic import kernels
from tests.tools.benchmarks import gpu

TOLERANCE = {'e': 3e-3, 'f': 3e-5, 'd': 1e-11}
FUSED = [pytest.param(1 << 40, id='fused'), pytest.param(0, id='not fused')]
CASES = [
    ((6, 5), 0), ((5, 6), 1), ((1, 7), 0), ((7, 1), 0), ((64, 3, 3, 3), 0),
    ((3, 64, 3, 3), 1), ((8, 4, 5), 2), ((8, 4, 5), 1), ((130, 300), 0),
    ((300, 130), 1), ((128, 64, 4, 4), 0),
    pytest.param((64, 128, 4, 4), 1, marks=pytest.mark.slow)]


@pytest.fixture(params=FUSED)
def fused_size(request, monkeypatch):
    monkeypatch.setattr(kernels, 'FUSED_SIZE', request.param)
    return request.param


def random(shape, dtype='f', seed=0):
    """On the host."""
    return np.random.RandomState(seed).normal(size=shape).astype(dtype)


def synchronize():
    cuda.cupy.cuda.runtime.deviceSynchronize()


def make_step(W, axis=0, send=cuda.to_gpu, seed=1, **kwargs):
    """A forward and backward; returns Y and gW."""
    u = send(random(W.shape[axis], W.dtype, seed))
    gY = send(random(W.shape, W.dtype, seed + 1))
    parameter = chainer.Parameter(send(W))

    def step():
        parameter.cleargrad()
        Y = functions.spectral_normalize(parameter, u, axis=axis, **kwargs)
        Y.grad = gY
        Y.backward()
        return Y.array, parameter.grad

    return step


def to_cpu(arrays):
    synchronize()
    return [cuda.to_cpu(x) for x in arrays]


def assert_equal(actual, expected):
    """To the last bit."""
    for a, b in zip(actual, expected):
        np.testing.assert_array_equal(a, b)


def assert_close(actual, expected, dtype):
    for a, b in zip(actual, expected):
        assert a.dtype == b.dtype == dtype
        a, b = a.astype('d'), b.astype('d')
        np.testing.assert_allclose(
            a, b, rtol=0, atol=TOLERANCE[dtype] * max(1, abs(b).max()))


@pytest.mark.gpu
class TestResults:

    @pytest.mark.parametrize('dtype', [
        'e', 'f', pytest.param('d', marks=pytest.mark.slow)])
    @pytest.mark.parametrize('detach_uv', [False, True])
    @pytest.mark.parametrize(
        'K', [1, pytest.param(2, marks=pytest.mark.slow), 3])
    @pytest.mark.parametrize(('shape', 'axis'), CASES)
    def test_same_as_on_the_host(
            self, shape, axis, K, detach_uv, dtype, fused_size):
        kwargs = {'n_power_iteration': K, 'axis': axis,
                  'detach_uv': detach_uv}
        W = random(shape, dtype)
        assert_close(to_cpu(make_step(W, **kwargs)()),
                     make_step(W, send=np.copy, **kwargs)(), dtype)

    @pytest.mark.parametrize('seed', range(20))
    def test_fused_or_not(self, seed, monkeypatch):
        state = np.random.RandomState(seed)
        shape = tuple(state.randint(1, 40, size=state.randint(2, 5)))
        dtype = 'efd'[seed % 3]
        kwargs = {
            'axis': int(state.randint(len(shape))),
            'n_power_iteration': int(state.randint(1, 4)),
            'detach_uv': bool(state.randint(2))}
        results = []
        for size in (1 << 40, 0):
            monkeypatch.setattr(kernels, 'FUSED_SIZE', size)
            results.append(to_cpu(make_step(
                random(shape, dtype, seed), **kwargs)()))
        assert_close(*results, dtype)

    @pytest.mark.slow
    def test_deterministic(self, fused_size):
        step = make_step(random((256, 128, 4, 4)), n_power_iteration=2)
        expected = to_cpu(step())
        for _ in range(20):
            assert_equal(to_cpu(step()), expected)

    def test_double_backward(self, fused_size):
        W, gY, ggW = (cuda.to_gpu(random((5, 3, 2), 'd', seed))
                      for seed in range(3))
        u = cuda.to_gpu(random(3, 'd', 3))
        gradient_check.check_double_backward(
            lambda W: functions.spectral_normalize(W, u, 2, axis=1) ** 2,
            W, gY, ggW, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize('dtype', ['f', 'e'])
    def test_training_steps(self, dtype):
        with chainer.using_config('dtype', np.dtype(dtype)):
            link = L.Convolution2D(3, 8, 3, pad=1)
        link.to_device('@cupy:0')
        link.add_hook(SpectralNormalization(use_gamma=True))
        optimizer = chainer.optimizers.SGD(1e-3).setup(link)
        x = cuda.to_gpu(random((2, 3, 6, 6), dtype))
        before = cuda.to_cpu(link.W.array).copy()
        for _ in range(3):
            loss = F.mean(F.cast(link(x), 'f') ** 2)
            link.cleargrads()
            loss.backward()
            optimizer.update()
        W, gW, u, gamma = map(cuda.to_cpu, (
            link.W.array, link.W.grad, link.W_u, link.gamma.array))
        assert [W.dtype, gW.dtype] == [dtype, dtype]
        assert all(np.isfinite(x).all() for x in (W, gW, u, gamma))
        assert gW.any()
        assert (before != W).any()
        with chainer.using_config('train', False):
            Y = link.local_link_hooks[
                SpectralNormalization.name].normalize_weight(link)
        norm = np.linalg.norm(
            cuda.to_cpu(Y.array).reshape(8, -1).astype('d'), 2)
        np.testing.assert_allclose(norm, gamma, rtol=2e-2)


@pytest.mark.cuda
class TestStreams:

    def test_second_device(self, fused_size):
        if cuda.cupy.cuda.runtime.getDeviceCount() < 2:
            pytest.skip('one device')
        W = random((64, 3, 3, 3))
        send = functools.partial(cuda.to_gpu, device=1)
        with cuda.cupy.cuda.Device(0):
            arrays = make_step(W, send=send)()
            assert all(x.device.id == 1 for x in arrays)
            assert cuda.cupy.cuda.Device().id == 0
        with cuda.cupy.cuda.Device(1):
            synchronize()
        assert_close([cuda.to_cpu(x) for x in arrays],
                     make_step(W, send=np.copy)(), 'f')

    def test_two_at_once(self, fused_size):
        steps = [make_step(random((128, 64, 4, 4), seed=seed), seed=seed + 7)
                 for seed in range(2)]
        expected = [to_cpu(step()) for step in steps]
        streams = [cuda.cupy.cuda.Stream(non_blocking=True) for _ in steps]
        for _ in range(20):
            results = []
            for step, stream in zip(steps, streams):
                with stream:
                    results.append(step())
            for actual, wanted in zip(results, expected):
                # Products of cuBLAS may split otherwise beside others.
                assert_close(to_cpu(actual), wanted, 'f')

    @pytest.mark.parametrize('dtype', 'ef')
    @pytest.mark.parametrize('detach_uv', [False, True])
    @pytest.mark.parametrize('axis', [0, 1])
    def test_graph_of_the_function(self, axis, detach_uv, dtype, fused_size):
        """Nothing waits, nothing is copied from or to the host."""
        step = make_step(random((96, 80, 3, 3), dtype), axis,
                         detach_uv=detach_uv)
        expected = to_cpu(step())
        with gpu.Captured(step) as graph:
            assert gpu.KERNEL in graph.types
            assert not {gpu.MEMCPY, gpu.HOST} & set(graph.types)
            for _ in range(3):
                for x in graph.value:
                    x.fill(np.nan)
                synchronize()
                graph.launch()
                assert_close(to_cpu(graph.value), expected, dtype)

    def test_graph_of_the_hook(self, fused_size):
        link = L.Convolution2D(64, 96, 3)
        link.to_device('@cupy:0')
        hook = SpectralNormalization(use_gamma=True)
        link.add_hook(hook)
        gY = cuda.to_gpu(random(link.W.shape))
        start = link.W_u.copy()

        def step():
            link.cleargrads()
            Y = hook.normalize_weight(link)
            Y.grad = gY
            Y.backward()
            return Y.array, link.W.grad, link.gamma.grad

        expected = to_cpu(step()) + to_cpu([link.W_u])
        with gpu.Captured(step) as graph:
            link.W_u[...] = start
            synchronize()
            graph.launch()
            actual = to_cpu(graph.value) + to_cpu([link.W_u])
            assert_close(actual, expected, 'f')
            # Each replay moves the vector on.
            graph.launch()
            assert (to_cpu([link.W_u])[0] != actual[-1]).any()

    def test_a_step_that_waits_is_found(self):
        """The capture is able to fail, and leaves the stream usable."""
        x = cuda.to_gpu(random(5))
        with pytest.raises(Exception, match=r'[Cc]aptur'):
            gpu.Captured(lambda: float((x + 1).sum()))
        with gpu.Captured(lambda: x + 1) as graph:
            assert graph.types == [gpu.KERNEL]


@pytest.mark.cuda
class TestCosts:

    def contender(self, shape, **kwargs):
        return gpu.chainer_contender(
            SpectralNormalization(**kwargs), cuda.to_gpu(random(shape)),
            cuda.to_gpu(random(shape, seed=1)))

    def launches(self, contender):
        counts = []
        for step in (contender.forward, contender.backward):
            with gpu.Captured(step) as graph:
                counts.append(graph.types.count(gpu.KERNEL))
        return counts

    @pytest.mark.parametrize('detach_uv', [False, True])
    def test_launches_fused(self, detach_uv):
        assert self.launches(self.contender(
            (64, 3, 3, 3), detach_uv=detach_uv)) == [1, 1]

    @pytest.mark.parametrize('detach_uv', [False, True])
    @pytest.mark.parametrize('shape', [
        (512, 512, 3, 3), (256, 128, 4, 4), (4096, 4096)])
    def test_launches(self, shape, detach_uv, monkeypatch):
        monkeypatch.setattr(kernels, 'FUSED_SIZE', 0)
        forward, backward = self.launches(
            self.contender(shape, detach_uv=detach_uv))
        assert forward <= 6
        assert backward <= 4

    @pytest.mark.parametrize('dtype', 'ef')
    def test_memory(self, dtype):
        W = cuda.to_gpu(random((512, 512, 3, 3), dtype))
        u = cuda.to_gpu(random(512, dtype))
        parameter = chainer.Parameter(W)

        def forward():
            return functions.spectral_normalize(parameter, u)

        def both():
            Y = forward()
            Y.grad = W
            Y.backward()

        forward()  # compiles
        # Y, and vectors; no copy of the weight.
        assert gpu.peak_memory(forward) < 1.1 * W.nbytes
        both()
        parameter.cleargrad()
        # Y and gW, likewise.
        assert gpu.peak_memory(both) < 2.2 * W.nbytes
