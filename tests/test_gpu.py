"""What only a real CUDA device can show: streams, launches, memory.

Of the results, larger weights than in ``tests/arithmetic/test_device.py``;
they are run on the host as well where there is no device.

CuPy is imported inside of the tests alone, so that they are collected, and
skipped, where there is none.
"""
from __future__ import annotations

import contextlib
import functools
import math

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import gradient_check
from chainer.backends import cuda

from sn_function import (
    ChainSpectralNormalization,
    SpectralNormalization,
    cached,
    functions,
)
from sn_function._arithmetic import kernels
from sn_function.optimizer_hooks import (
    SpectralNormPenalty,
    SpectralNormProjection,
)
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


class Convolution(L.Convolution2D):
    """Its weight is all that it needs of cuDNN or cuBLAS: nothing."""

    def forward(self, x):
        return F.flatten(self.W * x)


class Deconvolution(L.Deconvolution2D):

    def forward(self, x):
        return F.flatten(self.W * x)


class Linear(L.Linear):

    def forward(self, x):
        return F.flatten(self.W * x)


class Model(chainer.Chain):
    """Each output axis, a link that is called twice, and a large weight."""

    def __init__(self, device=0):
        super().__init__()
        with self.init_scope():
            self.up = Deconvolution(20, 30, 3)
            self.down = Convolution(30, 20, 3)
            self.large = Convolution(80, 96, 3)
            self.out = Linear(70, 50)
        for seed, param in enumerate(self.params()):
            if param.name == 'W':
                param.array[...] = random(param.shape, seed=seed)
        self.to_device(f'@cupy:{device}')

    def forward(self, x):
        return F.concat([link(x) for link in (
            self.up, self.down, self.large, self.out, self.down)], axis=0)


def make_model(kind, device=0, **settings):
    """A model with a hook on the chain, or on each link and a scope.

    Returns it and what calls it, and returns Y and all gradients.
    """
    model = Model(device)
    if kind == 'chain':
        model.add_hook(ChainSpectralNormalization(**settings))
    else:
        for link in model.children():
            link.add_hook(SpectralNormalization(**settings))
    x, gY = (cuda.to_gpu(np.array(2, 'f'), device), cuda.to_gpu(
        random(2 * model.down.W.size + sum(
            link.W.size for link in (model.up, model.large, model.out))),
        device))

    def step():
        model.cleargrads()
        with cached(model) if kind == 'cached' else contextlib.nullcontext():
            Y = model(x)
        Y.grad = gY
        Y.backward()
        return [Y.array] + [
            param.grad for _, param in sorted(model.namedparams())
            if param.grad is not None]

    return model, step


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
                assert_equal(to_cpu(actual), wanted)


class Replays:
    """What replays of a captured step give, beside as many calls of it.

    Args:
        make: Returns a step, which returns arrays, and a function that returns
            those that steps change.  It is called twice, and both start from
            the same values.

    """

    def __init__(self, make, n=3):
        step, state = make()
        twin, twin_state = make()
        n_calls = 0

        def counted():
            nonlocal n_calls
            n_calls += 1
            return step()

        with gpu.Captured(counted) as graph:
            self.types = set(graph.types)
            for _ in range(n_calls - 1):  # the captured one was not executed
                twin()
            self.actual, self.expected, self.states = [], [], []
            for _ in range(n):
                for x in graph.value:
                    x.fill(np.nan)
                synchronize()
                graph.launch()
                self.states.append(to_cpu(state()))
                self.actual.append(to_cpu(graph.value) + self.states[-1])
                self.expected.append(
                    to_cpu(twin()) + to_cpu(twin_state()))

    def check(self, allowed=(gpu.KERNEL,)):
        """Nothing waits, and all is as calls leave it."""
        assert gpu.KERNEL in self.types
        assert self.types <= set(allowed)
        for actual, expected in zip(self.actual, self.expected):
            assert len(actual) == len(expected)
            assert all(np.isfinite(x).all() for x in expected)
            assert_equal(actual, expected)

    def check_that_it_moves(self):
        for before, after in zip(self.states, self.states[1:]):
            for x, y in zip(before, after):
                assert (x != y).any()


@pytest.mark.cuda
class TestGraphs:
    """Each replay gives what a call in its place would give."""

    @pytest.mark.parametrize('dtype', 'efd')
    @pytest.mark.parametrize('detach_uv', [False, True])
    @pytest.mark.parametrize('K', [1, 3])
    @pytest.mark.parametrize(('shape', 'axis'), [
        ((96, 80, 3, 3), 0), ((80, 96, 3, 3), 1), ((8, 96, 90), 1),
        ((720, 96), 1)])
    def test_of_the_function(
            self, shape, axis, K, detach_uv, dtype, fused_size):
        def make():
            W = chainer.Parameter(cuda.to_gpu(random(shape, dtype)))
            u = cuda.to_gpu(random(shape[axis], dtype, 1))
            gY = cuda.to_gpu(random(shape, dtype, 2))

            def step():
                W.cleargrad()
                Y = functions.spectral_normalize(
                    W, u, K, axis=axis, detach_uv=detach_uv, update_u=True)
                Y.grad = gY
                Y.backward()
                return Y.array, W.grad

            return step, lambda: [u]

        replays = Replays(make)
        replays.check()
        replays.check_that_it_moves()

    @pytest.mark.parametrize('dtype', 'efd')
    @pytest.mark.parametrize(('b', 'K'), [(3, 1), (8, 2), (16, 1)])
    @pytest.mark.parametrize(('shape', 'axis'), [
        ((96, 80, 3, 3), 0), ((80, 96, 3, 3), 1), ((720, 96), 1)])
    def test_of_several_vectors(self, shape, axis, b, K, dtype, fused_size):
        def make():
            W = chainer.Parameter(cuda.to_gpu(random(shape, dtype)))
            U = cuda.to_gpu(random((b, shape[axis]), dtype, 1))
            gY = cuda.to_gpu(random(shape, dtype, 2))

            def step():
                W.cleargrad()
                Y = functions.spectral_normalize(
                    W, U, K, axis=axis, update_u=True)
                Y.grad = gY
                Y.backward()
                return Y.array, W.grad

            return step, lambda: [U]

        replays = Replays(make)
        replays.check()
        replays.check_that_it_moves()

    @pytest.mark.parametrize('b', [None, 3])
    def test_of_a_tolerance(self, b, fused_size):
        def make():
            W = random((96, 80, 3, 3))
            u = cuda.to_gpu(random(96 if b is None else (b, 96), seed=1))
            W = cuda.to_gpu(W)

            def step():
                return [functions.spectral_norm(
                    W, u, update_u=True, rtol=1e-2).array]

            return step, lambda: [u]

        Replays(make).check()

    def test_without_update_u(self, fused_size):
        def make():
            step = make_step(random((96, 80, 3, 3)))
            return step, lambda: []

        replays = Replays(make)
        replays.check()
        assert_equal(replays.actual[0], replays.actual[-1])

    @pytest.mark.parametrize('K', [1, 3])
    def test_of_many_weights(self, K, fused_size):
        shapes = [(96, 80, 3, 3), (40, 30), (30, 40), (33, 5, 3)]

        def make():
            Ws = [chainer.Parameter(cuda.to_gpu(random(shape, 'f', seed)))
                  for seed, shape in enumerate(shapes)]
            us = [cuda.to_gpu(random(shape[0])) for shape in shapes]
            gYs = [chainer.Variable(W.array * 2 + 1) for W in Ws]

            def step():
                Ys, sigmas = functions.spectral_normalize_all(
                    Ws, us, K, update_u=True, return_sigma=True)
                gWs = chainer.grad(Ys, Ws, gYs)
                return [x.array for x in (*Ys, *sigmas, *gWs)]

            return step, lambda: us

        replays = Replays(make)
        replays.check()
        replays.check_that_it_moves()

    @pytest.mark.parametrize('detach_uv', [False, True])
    @pytest.mark.parametrize('K', [1, 3])
    @pytest.mark.parametrize('make_link', [
        lambda: L.Convolution2D(80, 96, 3),
        lambda: L.Deconvolution2D(80, 96, 3), lambda: L.EmbedID(700, 96)])
    def test_of_the_hook(self, make_link, K, detach_uv, fused_size):
        def make():
            link = make_link()
            link.W.array[...] = random(link.W.shape)
            link.to_device('@cupy:0')
            hook = SpectralNormalization(
                K, use_gamma=True, detach_uv=detach_uv)
            np.random.seed(0)
            link.add_hook(hook)
            gY = cuda.to_gpu(random(link.W.shape, seed=1))

            def step():
                link.cleargrads()
                Y = hook.normalize_weight(link)
                Y.grad = gY
                Y.backward()
                return Y.array, link.W.grad, link.gamma.grad

            return step, lambda: [link.W_u]

        replays = Replays(make)
        replays.check()
        replays.check_that_it_moves()

    # Some weights are small and one is large, or all are either.
    @pytest.mark.parametrize('fused_size', [
        *FUSED, pytest.param(kernels.FUSED_SIZE, id='both')], indirect=True)
    @pytest.mark.parametrize('settings', [
        {}, {'n_power_iteration': 3}, {'use_gamma': True},
        {'detach_uv': True}], ids=str)
    @pytest.mark.parametrize('kind', ['chain', 'cached', 'each'])
    def test_of_a_model(self, kind, settings, fused_size):
        def make():
            np.random.seed(0)
            model, step = make_model(kind, **settings)
            return step, lambda: [link.W_u for link in model.children()]

        replays = Replays(make)
        # A scope copies the vectors, on the device.
        replays.check([gpu.KERNEL, gpu.MEMCPY])
        replays.check_that_it_moves()

    @pytest.mark.parametrize('update_u', ['train', 'always'])
    def test_of_test_mode(self, update_u, fused_size):
        """The weight is normalized, and its vector stays or moves on."""
        def make():
            np.random.seed(0)
            model, step = make_model('chain', update_u=update_u)

            def in_test_mode():
                with chainer.using_config('train', False):
                    return step()

            return in_test_mode, lambda: [
                link.W_u for link in model.children()]

        replays = Replays(make)
        replays.check([gpu.KERNEL, gpu.MEMCPY])
        if update_u == 'always':
            replays.check_that_it_moves()
        else:
            assert_equal(replays.states[0], replays.states[-1])

    def test_a_step_that_waits_is_found(self):
        """The capture is able to fail, and leaves the stream usable."""
        x = cuda.to_gpu(random(5))
        with pytest.raises(Exception, match=r'[Cc]aptur'):
            gpu.Captured(lambda: float((x + 1).sum()))
        with gpu.Captured(lambda: x + 1) as graph:
            assert graph.types == [gpu.KERNEL]


@pytest.mark.cuda
class TestDevices:
    """What is on device 1 is computed there while device 0 is current."""

    @pytest.fixture(autouse=True)
    def _two_devices(self):
        if cuda.cupy.cuda.runtime.getDeviceCount() < 2:
            pytest.skip('one device')
        with cuda.cupy.cuda.Device(0):
            yield

    @contextlib.contextmanager
    def all_on_device_1(self):
        """Memory, too, is taken there only."""
        taken = set()

        class Hook(cuda.cupy.cuda.MemoryHook):
            name = 'devices'

            def malloc_preprocess(self, **kwargs):
                # Not its device_id: CuPy gives the one that was current when
                # the pools were made.
                taken.add(cuda.cupy.cuda.Device().id)

        with Hook():
            yield
        assert taken == {1}
        assert cuda.cupy.cuda.Device().id == 0
        with cuda.cupy.cuda.Device(1):
            synchronize()

    def check(self, step, expected, dtype='f'):
        with self.all_on_device_1():
            results = step()
        assert all(x.device.id == 1 for x in results)
        assert_close([cuda.to_cpu(x) for x in results], expected, dtype)

    @pytest.mark.parametrize('detach_uv', [False, True])
    @pytest.mark.parametrize('K', [1, 3])
    @pytest.mark.parametrize(('shape', 'axis', 'dtype'), [
        ((64, 3, 3, 3), 0, 'f'), ((3, 64, 3, 3), 1, 'f'), ((50, 64), 1, 'f'),
        ((64, 50), 0, 'd'), ((64, 50), 0, 'e')])
    def test_function(self, shape, axis, dtype, K, detach_uv, fused_size):
        W = random(shape, dtype)
        kwargs = {
            'n_power_iteration': K, 'axis': axis, 'detach_uv': detach_uv,
            'update_u': True}
        send = functools.partial(cuda.to_gpu, device=1)
        self.check(make_step(W, send=send, **kwargs),
                   make_step(W, send=np.copy, **kwargs)(), dtype)

    @pytest.mark.parametrize('device', [0, 1])
    def test_backward_is_called_on_another_device(self, device, fused_size):
        W, gY = (cuda.to_gpu(random((40, 30), seed=seed), 1)
                 for seed in range(2))
        u = cuda.to_gpu(random(40), 1)
        W = chainer.Parameter(W)
        with cuda.cupy.cuda.Device(device):
            Y = functions.spectral_normalize(W, u)
        Y.grad = gY
        with self.all_on_device_1():
            Y.backward()
        assert W.grad.device.id == 1
        expected = chainer.Parameter(cuda.to_cpu(W.array))
        Y = functions.spectral_normalize(expected, cuda.to_cpu(u))
        Y.grad = cuda.to_cpu(gY)
        Y.backward()
        assert_close([cuda.to_cpu(W.grad)], [expected.grad], 'f')

    def test_many_weights(self, fused_size):
        def step(device):
            send = (np.copy if device is None else
                    functools.partial(cuda.to_gpu, device=device))
            Ws = [chainer.Parameter(send(random(shape, 'f', seed)))
                  for seed, shape in enumerate([(40, 30), (30, 40), (9, 5)])]
            us = [send(random(len(W))) for W in Ws]
            gYs = [chainer.Variable(send(random(W.shape))) for W in Ws]

            def normalize():
                Ys = functions.spectral_normalize_all(Ws, us, update_u=True)
                return [x.array for x in (*Ys, *chainer.grad(Ys, Ws, gYs))] + (
                    us)

            return normalize

        self.check(step(1), step(None)())

    @pytest.mark.parametrize('make_link', [
        lambda: L.Convolution2D(3, 64, 3), lambda: L.Deconvolution2D(3, 64, 3),
        lambda: L.EmbedID(50, 64)])
    def test_hook(self, make_link, fused_size):
        def step(device):
            np.random.seed(0)
            link = make_link()
            hook = SpectralNormalization(use_gamma=True)
            link.add_hook(hook)
            gY = random(link.W.shape)
            if device is not None:
                link.to_device(f'@cupy:{device}')
                gY = cuda.to_gpu(gY, device)

            def normalize():
                link.cleargrads()
                Y = hook.normalize_weight(link)
                Y.grad = gY
                Y.backward()
                return (Y.array, link.W.grad, link.gamma.grad, link.W_u,
                        hook.v)

            return normalize

        self.check(step(1), step(None)())

    def test_a_hook_that_is_added_on_the_device(self, fused_size):
        link = L.Convolution2D(3, 64, 3)
        link.to_device('@cupy:1')
        with self.all_on_device_1():
            hook = SpectralNormalization(use_gamma=True)
            link.add_hook(hook)
            Y = hook.normalize_weight(link)
        assert {x.device.id for x in (
            link.W_u, link.gamma.array, Y.array)} == {1}

    def test_a_vector_of_another_dtype(self, fused_size):
        """As after a snapshot of a float64 model was loaded."""
        link = L.Convolution2D(3, 64, 3)
        link.to_device('@cupy:1')
        hook = SpectralNormalization()
        link.add_hook(hook)
        with cuda.cupy.cuda.Device(1):
            link.W_u = link.W_u.astype('d')
        with self.all_on_device_1():
            hook.normalize_weight(link)
        assert (link.W_u.device.id, link.W_u.dtype) == (1, 'f')

    @pytest.mark.parametrize('make_hook', [
        lambda: SpectralNormPenalty(.1), lambda: SpectralNormProjection(1)])
    def test_an_update(self, make_hook, fused_size):
        def step(device):
            np.random.seed(0)
            link = L.Linear(30, 40)
            optimizer = chainer.optimizers.SGD(.1).setup(link)
            optimizer.add_hook(make_hook())
            if device is not None:
                link.to_device(f'@cupy:{device}')

            def update():
                np.random.seed(1)
                link.cleargrads()
                for x in link.params():
                    x.grad = link.device.send(random(x.shape))
                optimizer.update()
                return [link.W.array]

            return update

        self.check(step(1), step(None)())

    @pytest.mark.parametrize('kind', ['chain', 'cached', 'each'])
    def test_model(self, kind, fused_size):
        def step(device):
            np.random.seed(0)
            return make_model(kind, device)[1]

        self.check(step(1), to_cpu(step(0)()))


@pytest.mark.cuda
class TestCosts:

    def steps(self, shape, **kwargs):
        contender = gpu.chainer_contender(
            SpectralNormalization(**kwargs), cuda.to_gpu(random(shape)),
            cuda.to_gpu(random(shape, seed=1)))
        return contender.forward, contender.backward

    def launches(self, *steps):
        counts = []
        for step in steps:
            with gpu.Captured(step) as graph:
                counts.append(graph.types.count(gpu.KERNEL))
        return counts

    @pytest.mark.parametrize('detach_uv', [False, True])
    def test_launches_fused(self, detach_uv):
        assert self.launches(*self.steps(
            (64, 3, 3, 3), detach_uv=detach_uv)) == [1, 1]

    @pytest.mark.parametrize('detach_uv', [False, True])
    @pytest.mark.parametrize('shape', [
        (512, 512, 3, 3), (256, 128, 4, 4), (1024, 1000)])
    def test_launches(self, shape, detach_uv, monkeypatch):
        monkeypatch.setattr(kernels, 'FUSED_SIZE', 0)
        assert self.launches(
            *self.steps(shape, detach_uv=detach_uv)) == [3, 2]

    @pytest.mark.parametrize('detach_uv', [False, True])
    @pytest.mark.parametrize(('is_small', 'forward', 'backward'), [
        (True, 1, 1), (False, 3, 2)])
    def test_launches_of_many_weights(
            self, is_small, forward, backward, detach_uv, monkeypatch):
        monkeypatch.setattr(kernels, 'FUSED_SIZE', is_small << 40)
        n = kernels.MAX_WEIGHTS + 2
        shared = math.ceil(n / kernels.MAX_WEIGHTS)
        Ws = [chainer.Parameter(cuda.to_gpu(random((16 + k, 40, 3, 3))))
              for k in range(n)]
        us = [cuda.to_gpu(random(len(W))) for W in Ws]
        gYs = [chainer.Variable(W.array + 1) for W in Ws]

        def normalize():
            return functions.spectral_normalize_all(
                Ws, us, detach_uv=detach_uv, update_u=True)

        Ys = normalize()
        steps = normalize, lambda: chainer.grad(Ys, Ws, gYs)
        assert self.launches(*steps) == [forward * shared, backward * shared]

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
