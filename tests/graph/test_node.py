"""A node leaves out what plain arrays do not need, and nothing else."""
import contextlib
import types

import chainer
import chainer.functions as F
import numpy as np
import pytest
from chainer import function_hooks, function_node
from chainer.backends import cuda

from sn_function import functions
from sn_function._arithmetic import kernels
from sn_function._graph import node

DEVICES = ['@numpy', pytest.param('@cupy:0', marks=pytest.mark.gpu)]


class Double(node.Node):
    """``y = 2 x`` of each input; keeps what it was called with."""

    def compute(self, arithmetic, inputs):
        self.arithmetic = arithmetic
        return tuple([x * 2 for x in inputs])

    def backward(self, indexes, gys):
        return tuple([gys[i] * 2 for i in indexes])


@pytest.fixture
def chainers_way(monkeypatch):
    """The nodes that have gone it, in their order."""
    gone = []
    apply = function_node.FunctionNode.apply

    def recorded(self, inputs):
        gone.append(type(self).__name__)
        return apply(self, inputs)

    monkeypatch.setattr(function_node.FunctionNode, 'apply', recorded)
    return gone


def variable(device='@numpy', shape=(3, 4)):
    x = np.random.normal(size=shape).astype('f')
    return chainer.Variable(chainer.get_device(device).send(x))


@pytest.mark.parametrize('device', DEVICES)
class TestPlainArrays:

    def test_the_way_is_short(self, device, chainers_way):
        xs = [variable(device) for _ in range(2)]
        double = Double()
        ys = double.apply(xs)
        assert not chainers_way
        assert double.arithmetic.__name__ == (
            'sn_function._arithmetic.'
            + ('host' if device == '@numpy' else 'device'))
        for x, y in zip(xs, ys):
            np.testing.assert_array_equal(
                *map(cuda.to_cpu, (y.array, 2 * x.array)))

    def test_it_ends_in_the_same_graph(self, device, chainers_way):
        def attributes(ys):
            function, = {y.creator_node for y in ys}
            assert [y() for y in function.outputs] == [y.node for y in ys]
            for x in function.inputs:
                assert x.data is not None
            return (function.rank, function.lazy_grad_sum, [
                (y.rank, y.requires_grad, y.layout, y.dtype, y.shape)
                for y in ys])

        def inputs():
            x = F.identity(variable(device))
            return [x, variable(device, (2, 2)).array]

        short = attributes(Double().apply(inputs()))
        chainers_way.clear()
        with function_hooks.TimerHook():
            assert attributes(Double().apply(inputs())) == short
        assert 'Double' in chainers_way

    def test_without_a_graph(self, device):
        with chainer.no_backprop_mode():
            y, = Double().apply([variable(device)])
        assert y.creator_node is None

    def test_weights(self, device, chainers_way):
        W, u = variable(device), variable(device, (3,)).array
        Y = functions.spectral_normalize(W, u)
        Y.grad = Y.array
        Y.backward()
        assert not chainers_way
        assert W.grad.shape == W.shape


class TestWhatIsLeftToChainer:

    @pytest.fixture(autouse=True)
    def _nothing_computed(self, monkeypatch):
        monkeypatch.setattr(
            function_node.FunctionNode, 'apply', lambda self, inputs: inputs)

    @pytest.mark.parametrize('config', [
        {'debug': True}, {'schedule_func': object()}])
    @pytest.mark.parametrize('device', DEVICES)
    def test_config(self, device, config):
        inputs = [variable(device)]
        with contextlib.ExitStack() as stack:
            for item in config.items():
                stack.enter_context(chainer.using_config(*item))
            assert Double().apply(inputs) is inputs

    @pytest.mark.parametrize('device', DEVICES)
    def test_hooks(self, device):
        inputs = [variable(device)]
        with function_hooks.TimerHook():
            assert Double().apply(inputs) is inputs
        double = Double()
        double.add_hook(function_hooks.TimerHook())
        assert double.apply(inputs) is inputs

    @pytest.mark.parametrize('device', DEVICES)
    def test_a_layout(self, device):
        inputs = [variable(device), chainer.Variable(
            variable(device, (2, 3, 3, 2)).array,
            layout=chainer.memory_layouts.CUDNN_CHANNEL_LAST_X)]
        with chainer.variable._AllowArrayAccessWithNonstandardLayout():
            assert Double().apply(inputs) is inputs

    @pytest.mark.gpu
    def test_arrays_of_two_kinds(self):
        inputs = [variable(), variable('@cupy:0')]
        assert Double().apply(inputs) is inputs

    def test_a_subclass_of_an_array(self):
        class Array(np.ndarray):
            pass

        inputs = [node.variable(np.zeros(2).view(Array))]
        assert Double().apply(inputs) is inputs

    def test_arrays_of_two_devices(self, devices):
        inputs = [node.variable(devices.array(i)) for i in (0, 1)]
        assert Double().apply(inputs) is inputs


@pytest.mark.parametrize('device', DEVICES)
def test_chainer_checks_and_calls_hooks(device):
    x = variable(device)
    with function_hooks.TimerHook() as hook:
        Double().apply([x])
    assert [name for name, _ in hook.call_history] == ['Double']
    x.array[...] = np.nan
    with chainer.using_config('debug', True), pytest.raises(
            RuntimeError, match='NaN is detected on forward'):
        Double().apply([x])


@pytest.fixture
def devices(monkeypatch):
    """Two devices, and arrays on them; ``current`` is the device in use."""
    class Device:

        def __init__(self, i):
            self.id = i

        def __eq__(self, other):
            return self.id == other.id

        def __enter__(self):
            self.outer = found.current
            found.current = self.id

        def __exit__(self, *_):
            found.current = self.outer

    class Array:
        dtype, shape, size = np.dtype('f'), (), 1

        def __init__(self, i):
            self.device = Device(i)

    found = types.SimpleNamespace(array=Array, current=0)
    monkeypatch.setattr(cuda, 'ndarray', Array)
    return found


class TestDevice:
    """That of the arrays is the current one while a node computes."""

    @pytest.mark.parametrize('i', [0, 1])
    def test_it_is_current(self, devices, i):
        class Where(Double):

            def compute(self, arithmetic, inputs):
                return devices.array(devices.current),

        y, = Where().apply([node.variable(devices.array(i))] * 2)
        assert y.array.device.id == i
        assert devices.current == 0

    def test_after_an_error(self, devices):
        class Failing(Double):

            def compute(self, arithmetic, inputs):
                raise RuntimeError('no memory')

        with pytest.raises(RuntimeError, match='no memory'):
            Failing().apply([node.variable(devices.array(1))])
        assert devices.current == 0

    @pytest.mark.cuda
    @pytest.mark.parametrize('size', [0, 1 << 40])
    def test_weights(self, size, monkeypatch):
        runtime = cuda.cupy.cuda.runtime
        if runtime.getDeviceCount() < 2:
            pytest.skip('one device')
        monkeypatch.setattr(kernels, 'FUSED_SIZE', size)
        results = []
        for device in ('@numpy', '@cupy:1'):
            np.random.seed(0)
            W, u = variable(device), variable(device, (3,)).array
            with chainer.using_device('@cupy:0'):
                Y = functions.spectral_normalize(W, u, update_u=True)
                Y.grad = Y.array
                Y.backward()
                assert runtime.getDevice() == 0
            results.append((Y.array, W.grad, u))
        for expected, actual in zip(*results):
            assert actual.device.id == 1
            np.testing.assert_allclose(
                cuda.to_cpu(actual), expected, rtol=1e-5, atol=1e-6)
