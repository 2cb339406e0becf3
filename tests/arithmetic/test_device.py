"""The functions and the hook on a CUDA device, or where there is none, with
every kernel executed on the host (:mod:`tests.cuda_on_host`).

Small weights go through kernels of one block, others through products and
kernels between them: all here is run through both.
"""
import contextlib

import chainer
import chainer.functions as CF
import chainer.links as L
import numpy as np
import pytest
from chainer.backends import cuda

from sn_function import SpectralNormalization, errors, functions
from sn_function._arithmetic import device, host, kernels, workspace
from sn_function._arithmetic.interface import (
    GAMMA_LIMIT,
    GAMMA_TURN,
    Forward,
    Renewal,
    Settings,
)
from tests import cuda_on_host, reference, test_functions
from tests.cuda_on_host import array as on_host
from tests.test_functions import (  # NOQA: F401  run here as well
    BAD_ARGUMENTS,
    WEIGHTS,
    TestArguments,
    TestExtremes,
    TestUpdate,
    random,
    test_all_axes_give_the_same_as_a_transposed_copy,
    test_detached_gradient_equals_its_definition,
    test_double_backward_detached,
    test_double_backward_exact,
    test_double_backward_when_gy_depends_on_W,
    test_exact_gradient_equals_complex_step,
    test_only_one_of_two_outputs_is_used,
    test_spectral_norm,
    test_third_order,
)

pytestmark = pytest.mark.gpu
DEVICE = '@cupy:0'
PATHS = {'one block': 1 << 62, 'products': 0}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setattr(kernels, 'FUSED_SIZE', PATHS[request.param])
    if cuda.ndarray is on_host.DeviceArray:
        # Each thread is a fiber: a block of 512 takes a while.
        monkeypatch.setattr(kernels, 'BLOCK_SIZE', 64)
        monkeypatch.setattr(kernels, 'FUSED_BLOCK_SIZE', 64)
    return request.param


@pytest.fixture(autouse=True)
def _on_device(path, request, monkeypatch):
    """Tests of the host's path: their arrays go to the device and back."""
    if request.node.originalname in vars(test_functions) or (
            request.cls is not None
            and request.cls.__module__ == test_functions.__name__):
        patch_functions(monkeypatch)


def patch_functions(monkeypatch):
    for name in ('spectral_normalize', 'spectral_norm'):
        monkeypatch.setattr(
            test_functions.F, name, through_device(getattr(functions, name)))


def send(x):
    if isinstance(x, chainer.Variable):
        return CF.copy(x, DEVICE)
    return chainer.get_device(DEVICE).send(x)


def through_device(function):
    def wrapper(W, u, *args, gamma=None, **kwargs):
        if len(args) > 1 and not isinstance(args[1], int):
            args = (args[0], to_device(args[1]), *args[2:])
        elif gamma is not None:
            kwargs['gamma'] = to_device(gamma)
        device_u = to_device(u)
        outputs = function(to_device(W), device_u, *args, **kwargs)
        if kwargs.get('update_u'):
            u[...] = cuda.to_cpu(device_u)
        if isinstance(outputs, tuple):
            return tuple(CF.copy(y, '@numpy') for y in outputs)
        return CF.copy(outputs, '@numpy')

    return wrapper


def to_device(x):
    is_array = isinstance(x, (np.ndarray, chainer.Variable))
    return send(x) if is_array else x


# What is the same on a device is tested by the names imported above.

@pytest.mark.parametrize('name', [
    name for name in BAD_ARGUMENTS
    if name not in ('u all zero', 'u holds NaN', 'update of a read-only u')])
def test_bad_argument(name):
    changes, error, message = BAD_ARGUMENTS[name]
    arguments = dict({'W': random(4, 3), 'u': np.ones(4)}, **changes)
    arguments = {
        key: send(x) if isinstance(x, np.ndarray) else x
        for key, x in arguments.items()}
    with pytest.raises(error, match=message):
        functions.spectral_normalize(**arguments)


@pytest.mark.parametrize(('given', 'wanted'), [
    ('Y', 'W'), ('sigma', 'u'), ('Y', 'gamma'),
    ('Y sigma', 'W u gamma'), ('sigma', 'W gamma')])
@pytest.mark.parametrize('detach_uv', [False, True])
@pytest.mark.parametrize(('dtype', 'u_dtype', 'tolerance'), [
    ('e', 'e', 3e-3), ('e', 'f', 3e-3), ('f', 'f', 1e-5), ('d', 'd', 1e-12)])
@pytest.mark.parametrize(('shape', 'axis', 'K'), [
    ((40, 3, 3, 3), 0, 1), ((3, 40, 4, 4), 1, 2), ((33, 50), 1, 3),
    ((1, 70), 0, 1), ((70, 1), 0, 2), ((2, 3, 35), 1, 1)])
def test_as_on_the_host(
        shape, axis, K, dtype, u_dtype, tolerance, detach_uv, given, wanted):
    W, gY = random(*shape).astype(dtype), random(*shape).astype(dtype)
    u = random(shape[axis]).astype(u_dtype)
    gamma = np.array(0.7, u_dtype)
    gsigma = np.array(0.3, u_dtype if dtype == 'e' else dtype)
    results = []
    for convert in (lambda x: x, send):
        x = {name: chainer.Variable(convert(value)) for name, value in
             (('W', W), ('u', u), ('gamma', gamma))}
        Y, sigma = functions.spectral_normalize(
            x['W'], x['u'], K, x['gamma'], 1.3, axis=axis,
            detach_uv=detach_uv, return_sigma=True)
        wanted_names, given_names = wanted.split(), given.split()
        outputs = {'Y': Y, 'sigma': sigma}
        upstream = {'Y': gY, 'sigma': gsigma.astype(sigma.dtype)}
        grads = chainer.grad(
            [outputs[name] for name in given_names],
            [x[name] for name in wanted_names],
            [chainer.Variable(convert(upstream[name]))
             for name in given_names])
        results.append([Y, sigma, *grads])
    for a, b in zip(*results):
        if a is None:
            assert b is None
            continue
        assert isinstance(b.array, cuda.ndarray)
        assert b.dtype == a.dtype
        np.testing.assert_allclose(
            cuda.to_cpu(b.array), a.array, rtol=tolerance,
            atol=tolerance * max(1, abs(a.array).max()))


@pytest.mark.parametrize('bad', [0, np.nan, np.inf])
@pytest.mark.parametrize('dtype', ['e', 'f', 'd'])
def test_a_bad_u_is_replaced(bad, dtype):
    """On the host it is an error; a device cannot tell."""
    W = np.diag([1.0, 3.0, 2.0]).astype(dtype)
    u = send(np.full(3, bad, dtype))
    Y = functions.spectral_normalize(send(W), u, update_u=True)
    np.testing.assert_array_equal(cuda.to_cpu(u), [0, 1, 0])
    np.testing.assert_allclose(cuda.to_cpu(Y.array), W / 3, rtol=1e-3)


def iterations(*args, **kwargs):
    """What the node of the function keeps for its backward."""
    Y = functions.spectral_normalize(*args, eps=0.0, **kwargs)
    return Y.creator_node.weights[0].iterations


@pytest.mark.parametrize(('shape', 'axis'), [
    ((40, 70), 0), ((3, 40, 5), 1), ((70, 40), 1)])
def test_the_largest_row_takes_its_place(shape, axis):
    W = random(*shape)
    it = iterations(send(W), send(np.zeros(40)), 2, axis=axis)
    norms = np.linalg.norm(reference.as_matrix(W, axis), axis=1)
    expected = np.zeros(40)
    expected[norms.argmax()] = 1
    np.testing.assert_array_equal(cuda.to_cpu(it.start), expected)


@pytest.mark.parametrize('scale', [1e-30, 1e30])
def test_the_largest_row_of_an_extreme_weight(scale):
    W = random(40, 70)
    W[7] *= 2
    it = iterations(
        send((scale * W).astype('f')), send(np.zeros(40, 'f')), 2)
    np.testing.assert_array_equal(cuda.to_cpu(it.start), np.arange(40) == 7)


@pytest.mark.parametrize('K', [1, 3])
def test_all_vectors_of_a_bad_weight_are_nan(K):
    W = random(3, 4, 5)
    W[1, 2, 3] = np.inf
    u = random(4)
    it = iterations(send(W), send(u), K, axis=1)
    for k in range(K):
        assert np.isnan(cuda.to_cpu(it.us(k + 1))).all()
        assert np.isnan(cuda.to_cpu(it.vs(k + 1))).all()
    # A second run of the call starts from it.
    np.testing.assert_array_equal(cuda.to_cpu(it.start), u)


def test_no_gradient_of_a_u_that_was_replaced():
    W = send(np.diag([0.0, 2.0, 1.0]))
    u = chainer.Variable(send(np.array([1.0, 0, 0])))
    sigma = functions.spectral_norm(W, u)
    sigma.backward()
    assert not cuda.to_cpu(u.grad).any()


@pytest.mark.parametrize('layout', [
    lambda x: x[::2], lambda x: x[::-1], lambda x: x[:1]])
def test_u_that_is_not_contiguous_is_updated(layout):
    u = random(8)
    part = layout(u)
    W = random(part.size, 5)
    on_device = send(u)
    functions.spectral_normalize(
        send(W), layout(on_device), 2, update_u=True)
    part[...] = reference.power_iteration(W, part, 2)[0]
    np.testing.assert_allclose(cuda.to_cpu(on_device), u, rtol=1e-12)


def test_the_unit_of_an_ordinary_weight_is_one():
    for dtype, least, most in (('f', 1e-9, 1e9), ('d', 1e-60, 1e60)):
        for size in (least, 1, most):
            W, u = size * 20 * random(40, 30), random(40)
            it = iterations(
                send(W.astype(dtype)), send(u.astype(dtype)), 2)
            for name in ('SCALE', 'U_NORM'):
                assert float(it.number(name)) == 1


@pytest.mark.parametrize(('dtype', 'size'), [
    ('f', 1e-36), ('f', 1e-30), ('f', 1e30), ('f', 3e38), ('d', 1e-150),
    ('d', 1e150)])
def test_the_unit_of_an_extreme_weight(dtype, size):
    W, u = random(40, 30), random(40).astype(dtype)
    W = (W / abs(W).max() * size).astype(dtype)
    it = iterations(send(W), send(u), 1)
    # A power of two, as near as its inverse is in the range as well.
    unit = 1 / float(it.number('SCALE'))
    assert np.frexp(unit)[0] == 0.5
    largest = float(abs(W).max())
    assert unit <= largest < (4 if size == 3e38 else 2) * unit
    assert float(it.number('U_NORM')) == 1
    np.testing.assert_array_equal(cuda.to_cpu(it.start), u)
    sigma = reference.power_iteration(W.astype('d') / size, u, 1)[2]
    assert float(it.sigma) == pytest.approx(sigma * size, rel=1e-5)
    norms = cuda.to_cpu(it.numbers)[len(kernels.NUMBERS):]
    assert norms[1] == pytest.approx(sigma * size, rel=1e-5)


def test_the_unit_of_a_subnormal_weight():
    it = iterations(send(1e-310 * np.ones((4, 3))), send(np.ones(4)), 1)
    assert float(it.number('SCALE')) == 2.0 ** 1022


@pytest.mark.parametrize('scale', [1e-60, 1e-79, 1e-81, 1e-90])
def test_the_product_of_two_norms_may_be_extreme(scale):
    """The norm of W s is that of s times sigma."""
    W, u, gY = scale * random(8, 9), random(8), random(8, 9)
    results = []
    for convert in (lambda x: x, send):
        x = chainer.Variable(convert(W))
        Y = functions.spectral_normalize(x, convert(u), eps=0)
        Y.grad = convert(gY)
        Y.backward()
        results.append([cuda.to_cpu(Y.array), cuda.to_cpu(x.grad) * scale])
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_no_gradient_of_gamma_from_sigma(bad):
    W = random(4, 3)
    W[1, 2] = bad
    gamma = chainer.Variable(send(np.array(2.)))
    _, sigma = functions.spectral_normalize(
        send(W), send(random(4)), gamma=gamma, return_sigma=True)
    g, = chainer.grad([sigma], [gamma])
    assert cuda.to_cpu(g.array) == 0


def test_subnormal_numbers_are_zero():
    """In float32: CuPy compiles all kernels so."""
    W, u = np.full((4, 3), 1e-40, 'f'), random(4).astype('f')
    on_device = send(u)
    Y, sigma = functions.spectral_normalize(
        send(W), on_device, eps=0, update_u=True, return_sigma=True)
    assert not cuda.to_cpu(Y.array).any()
    assert cuda.to_cpu(sigma.array) == 0
    np.testing.assert_array_equal(cuda.to_cpu(on_device), u)


@pytest.mark.parametrize(('dtype', 'other'), ['ef', 'fe', 'fd', 'df'])
def test_upstream_gradient_of_another_dtype(dtype, other):
    W, u = random(30, 40).astype(dtype), random(30).astype(dtype)
    gY = random(30, 40).astype(other)
    grads = []
    for convert in (lambda x: x, send):
        x = chainer.Variable(convert(W))
        Y = functions.spectral_normalize(x, convert(u))
        g, = chainer.grad([Y], [x], [chainer.Variable(convert(gY))])
        grads.append(cuda.to_cpu(g.array))
    assert grads[0].dtype == grads[1].dtype == dtype
    np.testing.assert_allclose(*grads, rtol=2e-2, atol=2e-2)


def test_gamma_on_another_device(monkeypatch):
    W, u, gamma = send(random(4, 3)), send(random(4)), send(np.array(0.7))
    with pytest.raises(errors.GammaError, match='on the device of W'):
        functions.spectral_normalize(W, u, gamma=np.array(0.7))
    monkeypatch.setattr(
        chainer.backend, 'get_device_from_array',
        lambda x: '@cupy:1' if x is gamma else '@cupy:0')
    with pytest.raises(errors.GammaError, match='on the device of W'):
        functions.spectral_normalize(W, u, gamma=gamma)


def test_outputs_do_not_keep_the_vectors_alive():
    """A list of sigmas, for logging, may become long."""
    W = chainer.Parameter(send(random(40, 30)))
    gamma = chainer.Parameter(send(np.array(0.7)))
    Y, sigma = functions.spectral_normalize(
        W, send(random(40)), gamma=gamma, return_sigma=True)
    Y.grad = W.array
    Y.backward()
    for x in (sigma.array, gamma.grad):
        assert x.base is None


@pytest.mark.parametrize(('shape', 'axis'), [
    ((40, 3, 3, 3), 0), ((3, 400, 8, 8), 1)])  # a fused kernel, and several
@pytest.mark.parametrize('dtype', 'efd')
def test_a_weight_below_the_cap_is_left_alone(dtype, shape, axis):
    W, gY = random(*shape).astype(dtype), random(*shape).astype(dtype)
    u = random(shape[axis]).astype(dtype)
    norm = np.linalg.svd(
        np.moveaxis(W, axis, 0).reshape(shape[axis], -1).astype('d'),
        compute_uv=False)[0]
    x = chainer.Variable(send(W))
    Y = functions.spectral_normalize(x, send(u), axis=axis, cap=1.1 * norm)
    Y.grad = send(gY)
    Y.backward()
    np.testing.assert_array_equal(cuda.to_cpu(Y.array), W)
    np.testing.assert_array_equal(cuda.to_cpu(x.grad), gY)
    Y = functions.spectral_normalize(
        send(W), send(u), 3, axis=axis, cap=norm / 4)
    expected = functions.spectral_normalize(
        W, u, 3, axis=axis, factor=norm / 4)
    np.testing.assert_allclose(
        cuda.to_cpu(Y.array), expected.array,
        rtol=2e-3 if dtype == 'e' else 1e-5)


def test_an_extreme_weight_below_the_floor():
    W, u = (1e-30 * random(4, 3)).astype('f'), random(4).astype('f')
    gY = (1e30 * random(4, 3)).astype('f')
    results = []
    for convert in (lambda x: x, send):
        gamma = chainer.Variable(convert(np.array(0.7, 'f')))
        Y = functions.spectral_normalize(
            convert(W), convert(u), gamma=gamma, factor=1.3)
        Y.grad = convert(gY)
        Y.backward()
        results.append([cuda.to_cpu(Y.array), cuda.to_cpu(gamma.grad)])
    for actual, expected in zip(*results):
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


EXTREME = (((40, 70), 0), ((70, 40), 1), ((3, 40, 5), 1), ((3, 2, 40), 2))


@pytest.mark.parametrize('scale', [1e-28, 1e28])
@pytest.mark.parametrize('K', [1, 3])
@pytest.mark.parametrize(('shape', 'axis'), EXTREME)
def test_an_extreme_weight(shape, axis, K, scale):
    """Its unit goes through all products, of all kinds."""
    W, gY = scale * random(*shape), random(*shape)
    u, gsigma = random(40), np.array(scale)
    results = []
    for convert in (lambda x: x, send):
        x = [chainer.Variable(convert(np.asarray(x, 'f'))) for x in (W, u, .7)]
        outputs = functions.spectral_normalize(
            *x[:2], K, x[2], axis=axis, return_sigma=True, eps=0)
        grads = chainer.grad(outputs, x, [
            chainer.Variable(convert(y.astype('f'))) for y in (gY, gsigma)])
        results.append([cuda.to_cpu(y.array) for y in (*outputs, *grads)])
    for a, b in zip(*results):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * abs(a).max())


def test_a_coefficient_above_the_range():
    """Y has a place in float32, and factor / sigma has none."""
    W, u = np.full((4, 3), 1.2e-38, 'f'), np.ones(4, 'f')
    Y = functions.spectral_normalize(send(W), send(u), factor=1e4, eps=0)
    np.testing.assert_allclose(
        cuda.to_cpu(Y.array), 1e4 * 12 ** -.5, rtol=1e-5)


@pytest.mark.parametrize('scale', [2e-38, 1e-30, 1e27])
def test_a_far_u_is_normalized(scale):
    W, gY = random(4, 3).astype('f'), random(4, 3).astype('f')
    u = (scale * np.array([1, 2, 1, -1])).astype('f')
    results = []
    for convert in (lambda x: x, send):
        x = chainer.Variable(convert(u))
        Y = functions.spectral_normalize(convert(W), x, 2)
        Y.grad = convert(gY)
        Y.backward()
        results.append([cuda.to_cpu(Y.array), cuda.to_cpu(x.grad)])
    for actual, expected in zip(*results):
        np.testing.assert_allclose(actual, expected, rtol=5e-3)


# What a device must not be asked for, and how often it is launched.

def weight(shape, axis, dtype):
    return (chainer.Parameter(send(random(*shape).astype(dtype))),
            send(random(shape[axis]).astype(dtype)),
            send(random(*shape).astype(dtype)))


@contextlib.contextmanager
def watched():
    """The host must not wait; yields what is launched."""
    if cuda.ndarray is not on_host.DeviceArray:
        pytest.skip('counted by tests/test_gpu.py on a real device')
    with on_host.counted() as launches, on_host.no_synchronization():
        yield launches


def once(shape, axis=0, dtype='f', K=1, **kwargs):
    """Runs a forward and a backward; returns what each launches."""
    W, u, gY = weight(shape, axis, dtype)
    gamma = kwargs.pop('gamma', None)
    with watched() as forward:
        outputs = functions.spectral_normalize(
            W, u, K, gamma, axis=axis, update_u=True, return_sigma=True,
            **kwargs)
    outputs[0].grad = gY
    with watched() as backward:
        outputs[0].backward()
    assert isinstance(W.grad, cuda.ndarray)
    return list(forward), list(backward)


PRODUCTS = ['sn_product', 'sn_product']
IN_THE_MIDDLE = ['sn_product', 'sn_middle_product', 'sn_gather']


@pytest.mark.parametrize(('shape', 'axis', 'dtype', 'products'), [
    ((40, 30), 0, 'f', PRODUCTS), ((40, 30), 1, 'd', PRODUCTS),
    ((40, 30, 3, 3), 0, 'f', PRODUCTS), ((40, 30), 0, 'e', PRODUCTS),
    ((1, 30), 0, 'f', PRODUCTS), ((4, 5, 6), 2, 'd', PRODUCTS),
    ((30, 40, 3, 3), 1, 'f', IN_THE_MIDDLE)])
def test_launches(path, shape, axis, dtype, products):
    """No host synchronization, and not one copy of the weight."""
    exact = once(shape, axis, dtype)
    detached = once(shape, axis, dtype, detach_uv=True)
    if path == 'one block':
        assert exact == detached == (['sn_fused_fwd'], ['sn_fused_bwd'])
        return
    assert exact == (
        [*products, 'sn_finish_fwd'], ['sn_product', 'sn_correct_bwd'])
    assert detached == (exact[0], ['sn_dot_bwd', 'sn_correct_bwd'])


@pytest.mark.parametrize('detach_uv', [False, True])
@pytest.mark.parametrize('K', [1, 2, 5])
def test_number_of_launches(path, K, detach_uv):
    forward, backward = once((40, 30), K=K, detach_uv=detach_uv)
    if path == 'one block':
        assert len(forward) == len(backward) == 1
    else:
        assert len(forward) == 2 * K + 1
        assert len(backward) == (2 if detach_uv or K == 1 else 3 * K)


def test_gamma_takes_no_launch(path):
    gamma = chainer.Parameter(send(np.array(0.7, 'f')))
    forward, backward = once((40, 30), gamma=gamma)
    assert len(forward) == (1 if path == 'one block' else 3)
    assert len(backward) == (1 if path == 'one block' else 2)
    assert isinstance(gamma.grad, cuda.ndarray)


@pytest.mark.parametrize('layout', [
    lambda x: CF.broadcast_to(x[:1, :1], x.shape).array,
    lambda x: x[::-1], lambda x: x.transpose(1, 0)])
def test_upstream_gradient_of_any_strides(layout):
    W, u, gY = random(30, 30), random(30), random(30, 30)
    grads = []
    for convert in (lambda x: x, send):
        x = chainer.Variable(convert(W))
        Y = functions.spectral_normalize(x, convert(u))
        Y.grad = layout(convert(gY))
        Y.backward()
        grads.append(cuda.to_cpu(x.grad))
    np.testing.assert_allclose(*grads, rtol=1e-9, atol=1e-9)


def test_a_large_block_gives_the_same(monkeypatch):
    monkeypatch.setattr(kernels, 'BLOCK_SIZE', 256)
    monkeypatch.setattr(kernels, 'FUSED_BLOCK_SIZE', 512)
    for shape, axis in WEIGHTS:
        test_as_on_the_host(
            shape, axis % len(shape), 2, 'd', 'd', 1e-12, False, 'Y sigma',
            'W u gamma')


class TestHook:

    @pytest.mark.parametrize('dtype', ['e', 'f'])
    @pytest.mark.parametrize('use_gamma', [False, True])
    def test_training_does_not_wait(self, path, dtype, use_gamma):
        with chainer.using_config('dtype', np.dtype(dtype)):
            link = L.Linear(30, 40).add_hook(
                SpectralNormalization(use_gamma=use_gamma))
        link.to_device(DEVICE)
        x = send(random(5, 30).astype(dtype))
        link(x)  # u is moved to the device
        before = cuda.to_cpu(link.W_u)
        for _ in range(2):
            with watched() as launches:
                link.cleargrads()
                y = link(x)
                ours = [name for name in launches if name.startswith('sn_')]
                if path == 'one block':
                    assert ours == ['sn_fused_fwd']
                y.grad = y.array
                y.backward()
            assert 'copy' not in launches
        assert not np.array_equal(cuda.to_cpu(link.W_u), before)

    @pytest.mark.parametrize('bad', [0, np.nan])
    def test_a_poisoned_vector_is_healed(self, bad):
        link = L.Linear(3, 4).add_hook(SpectralNormalization())
        link.to_device(DEVICE)
        link.W_u[...] = bad
        for _ in range(20):
            link(send(random(2, 3).astype('f')))
        W = cuda.to_cpu(link.W.array)
        Y = link.local_link_hooks['SpectralNormalization'].normalize_weight(
            link)
        np.testing.assert_allclose(
            cuda.to_cpu(Y.array), W / reference.true_norm(W), rtol=1e-3)

    def test_nan_in_the_weight_once(self):
        link = L.Linear(3, 4).add_hook(SpectralNormalization())
        link.to_device(DEVICE)
        x = send(random(2, 3).astype('f'))
        expected = link(x).array
        good, before = link.W.array.copy(), cuda.to_cpu(link.W_u)
        link.W.array[0, 0] = np.nan
        assert np.isnan(cuda.to_cpu(link(x).array)).all()
        np.testing.assert_array_equal(cuda.to_cpu(link.W_u), before)
        link.W.array[...] = good
        np.testing.assert_allclose(
            cuda.to_cpu(link(x).array), cuda.to_cpu(expected), rtol=1e-2)

    def test_recomputation_starts_from_the_same_u(self):
        link = L.Linear(30, 40).add_hook(SpectralNormalization())
        link.to_device(DEVICE)
        x = chainer.Variable(send(random(5, 30).astype('f')))
        start = cuda.to_cpu(link.W_u)
        grads = []
        for forward in (link, lambda x: CF.forget(link, x)):
            link.W_u[...] = send(start)
            link.cleargrads()
            y = forward(x)
            y.grad = y.array
            y.backward()
            grads.append(cuda.to_cpu(link.W.grad))
        np.testing.assert_array_equal(*grads)


class TestManyWeights:
    """All small ones of a kind are in one launch."""

    SHAPES = (((4, 3), 0), ((3, 5, 2), 1), ((6, 2, 3), 0), ((7, 2), 1),
              ((2, 3, 4), 2))

    def make(self, convert, dtype='f'):
        state = np.random.RandomState(0)
        Ws = [chainer.Parameter(convert(state.normal(size=shape).astype(
            dtype))) for shape, _ in self.SHAPES]
        us = [convert(state.normal(size=shape[axis]).astype(dtype))
              for shape, axis in self.SHAPES]
        gammas = [None, 2.0, None, chainer.Parameter(
            convert(np.array(3, dtype))), 0.5]
        gYs = [convert(state.normal(size=shape).astype(dtype))
               for shape, _ in self.SHAPES]
        return Ws, us, gammas, gYs

    @pytest.mark.parametrize('detach_uv', [False, True])
    @pytest.mark.parametrize('fused_size', [0, 20, 1 << 62])
    @pytest.mark.parametrize('n_in_a_launch', [2, 16])
    def test_as_on_the_host(
            self, n_in_a_launch, fused_size, detach_uv, monkeypatch):
        monkeypatch.setattr(kernels, 'FUSED_SIZE', fused_size)
        monkeypatch.setattr(kernels, 'MAX_WEIGHTS', n_in_a_launch)
        found = []
        for convert in (lambda x: x, send):
            Ws, us, gammas, gYs = self.make(convert)
            Ys, sigmas = functions.spectral_normalize_all(
                Ws, us, 2, gammas, 1.5, axis=[axis for _, axis in self.SHAPES],
                detach_uv=detach_uv, update_u=True, return_sigma=True)
            terms = [CF.sum(Y * gY) for Y, gY in zip(Ys, gYs)]
            terms[1] = 3 * sigmas[1]  # no gradient comes to Ys[1]
            CF.add(*terms).backward()
            found.append([
                cuda.to_cpu(x) for x in (
                    *us, gammas[3].grad, *(W.grad for W in Ws),
                    *(Y.array for Y in Ys), *(s.array for s in sigmas))])
        for a, b in zip(*found):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(('n', 'expected'), [(1, 1), (16, 1), (17, 2)])
    def test_launches(self, path, n, expected):
        if path != 'one block':
            return
        Ws, us, gYs = zip(*[weight((4, 3), 0, 'f') for _ in range(n)])
        with watched() as forward:
            Ys = functions.spectral_normalize_all(Ws, us, update_u=True)
        gYs = [chainer.Variable(gY) for gY in gYs]
        with watched() as backward:
            chainer.grad(Ys, Ws, gYs)
        assert list(forward) == ['sn_fused_fwd'] * expected
        assert list(backward) == ['sn_fused_bwd'] * expected

    def test_kinds_are_apart(self, path):
        weights = [weight((4, 3), 0, dtype) for dtype in 'fdefd']
        Ws, us, _ = zip(*weights)
        Ys = functions.spectral_normalize_all(Ws, us)
        for W, u, Y in zip(Ws, us, Ys):
            expected = functions.spectral_normalize(W, u)
            np.testing.assert_array_equal(
                cuda.to_cpu(Y.array), cuda.to_cpu(expected.array))


@pytest.mark.parametrize('sigma', [1e-11, 3e-12, 1e-12])
def test_no_digit_is_lost_near_the_end_of_the_ordinary(sigma):
    """Where several iterations multiply norms before they divide by them."""
    W, u = random(31, 40), random(31).astype('f')
    W = (W / reference.true_norm(W) * sigma).astype('f')
    u /= np.linalg.norm(u)
    results = []
    for convert in (lambda x: x, send):
        vector = convert(u.copy())
        found = functions.spectral_normalize(
            convert(W), vector, 3, eps=0, update_u=True, return_sigma=True)[1]
        results.append([cuda.to_cpu(found.array), cuda.to_cpu(vector)])
    for actual, expected in zip(*results):
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('n_warmup', [1, 2, 15])
def test_a_stale_u_of_an_extreme_weight(n_warmup):
    """The first iteration shows only that u is stale."""
    W, u = np.diag([1e13, 1e10]).astype('f'), np.array([5e-5, 1], 'f')
    sigmas = []
    for convert, arithmetic in ((lambda x: x, host), (send, device)):
        ((sigma,), _), = arithmetic.normalize_all([Forward(
            Settings(1, 0, True), convert(W), convert(u.copy()), 1.0,
            ('sigma',), renewal=Renewal(n_warmup, 0.02))])
        sigmas.append(float(cuda.to_cpu(sigma)))
    assert sigmas[0] == pytest.approx(1e13, rel=1e-3)
    assert sigmas[1] == pytest.approx(sigmas[0], rel=1e-6)


DEALT_OUT_OTHERWISE = {
    'sums in parts': {'FEW_BLOCKS': 1 << 30, 'LONG_SUM': 1, 'BATCH': 8},
    'few blocks': {'MAX_BLOCKS': 2}}
LARGE = [((300, 40), 0), ((7, 900), 0), ((900, 7), 1), ((40, 302), 1),
         ((64, 24, 3, 3), 0), ((6, 70, 12), 1), ((70, 9, 3, 3), 1),
         ((3, 4200), 0), ((3, 4200), 1)]


@pytest.mark.parametrize(
    'constants', DEALT_OUT_OTHERWISE.values(), ids=DEALT_OUT_OTHERWISE)
@pytest.mark.parametrize('dtype', 'efd')
@pytest.mark.parametrize(('shape', 'axis'), LARGE)
def test_dealt_out_otherwise(shape, axis, dtype, constants, monkeypatch):
    """A large weight, without its size."""
    monkeypatch.setattr(kernels, 'FUSED_SIZE', 0)
    for name, value in constants.items():
        monkeypatch.setattr(workspace, name, value)
    workspace.plan.cache_clear()
    try:
        for K, detach_uv in ((1, False), (2, False), (2, True)):
            test_as_on_the_host(
                shape, axis, K, dtype, dtype,
                {'e': 4e-3, 'f': 3e-5, 'd': 1e-12}[dtype], detach_uv,
                'Y sigma', 'W u gamma')
    finally:
        workspace.plan.cache_clear()


@pytest.mark.parametrize('dtype', 'efd')
@pytest.mark.parametrize('axis', [0, 1])
def test_several_rows_in_a_block(axis, dtype, monkeypatch):
    """Each of more than one warp."""
    monkeypatch.setattr(kernels, 'FUSED_SIZE', 0)
    monkeypatch.setattr(kernels, 'BLOCK_SIZE', 256)
    product = workspace.product(
        *((9, 600, 1) if axis else (1, 9, 600)), bool(axis),
        np.dtype(dtype).itemsize, True, 256)
    assert 32 < product.arguments[0] < 256
    test_as_on_the_host(
        (9, 600), axis, 2, dtype, dtype,
        {'e': 4e-3, 'f': 3e-5, 'd': 1e-12}[dtype], False, 'Y sigma',
        'W u gamma')


def test_the_plan_cuts_long_sums_in_parts():
    """And no others: it takes a launch more."""
    def parts(l, m, r, is_transposed):  # NOQA: E741
        product = workspace.product(l, m, r, is_transposed, 4, True, 256)
        assert product.is_gathered == (product.arguments[1] > 1)
        return product.arguments[1]

    for n_out, n_in in ((1024, 9216), (512, 4608), (256, 2048), (4096, 4096),
                        (128, 1024), (1000, 1536), (1, 8192)):
        assert parts(1, n_out, n_in, True) == 1
        assert parts(1, n_out, n_in, False) == 1
    assert parts(1, 100000, 128, True) > 10
    assert parts(1, 10, 1000000, False) > 10
    assert parts(1, 100000, 128, False) == parts(1, 10, 1000000, True) == 1


@pytest.mark.parametrize('K', [1, 3])
@pytest.mark.parametrize('dtype', 'efd')
def test_arrays_that_start_anywhere(dtype, K, path):
    """16 bytes are read at once only from multiples of 16."""
    def shifted(x):
        y = send(np.append(x.ravel()[:1], x.ravel()))
        return y[1:].reshape(x.shape)

    for shape, axis in (((24, 64), 0), ((64, 24), 1)):
        W, gY = random(*shape).astype(dtype), random(*shape).astype(dtype)
        u = random(shape[axis]).astype(dtype)
        results = []
        for convert in (lambda x: x, shifted):
            x = chainer.Variable(convert(W))
            Y = functions.spectral_normalize(x, convert(u), K, axis=axis)
            Y.grad = convert(gY)
            Y.backward()
            results.append([cuda.to_cpu(y) for y in (Y.array, x.grad)])
        for actual, expected in zip(*results):
            tolerance = {'e': 4e-3, 'f': 1e-5, 'd': 1e-12}[dtype]
            np.testing.assert_allclose(
                actual, expected, rtol=tolerance, atol=tolerance)


def normalized(
        W, u, axis=0, K=1, n_warmup=0, limit=2., gamma=None, initial=None):
    """What the host and a device make of a weight, its vector and gamma."""
    found = []
    for arithmetic, convert in ((host, np.copy), (device, send)):
        W_, u_ = convert(W), convert(u)
        gammas = [None if x is None else convert(np.array(x, W.dtype))
                  for x in (gamma, initial)]
        (outputs, it), = arithmetic.normalize_all([Forward(
            Settings(K, axis, False),
            W_, u_, 1.0 if gamma is None else gammas[0], ('Y', 'sigma'), True,
            renewal=Renewal(n_warmup, limit, gammas[1]))])
        found.append([cuda.to_cpu(x) for x in (
            *outputs, u_, it.start, it.u, it.v, *gammas) if x is not None])
    return found


def turn_of(W, u, axis, K):
    A = reference.as_matrix(W, axis).astype('d')
    t = A @ (A.T @ u.astype('d'))
    return 1 - u @ t / np.linalg.norm(u) / np.linalg.norm(t)


@pytest.mark.parametrize(('scale', 'u_scale'), [
    (1, 1e14), (1, 1e-14), (1e14, 1e-14), (1e-14, 1e14), (1e14, 1e-4)])
def test_one_of_two_norms_is_extreme(scale, u_scale):
    """Of W^T u and of W v: the vector to start from is as on the host."""
    W = (scale * random(70, 90)).astype('f')
    u = (u_scale * random(70)).astype('f')
    expected, found = normalized(W, u)
    for a, b in zip(expected, found):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6 * abs(a).max())


def test_a_norm_in_between_may_be_extreme():
    """Those of W s_1 and W s_3 are not, here: they are 1e-130 and 1e-120."""
    it = iterations(
        send(np.diag([1e-60, 1e-80])), send(np.array([1e-50, 1e30])), 3)
    np.testing.assert_allclose(
        cuda.to_cpu(it.us(2)), [.5 ** .5, .5 ** .5], rtol=1e-12)


class TestRenewal:
    """As on the host; tests/links/test_renewal.py has what it is for."""

    SHAPES = (((70, 90), 0), ((90, 70), 1), ((3, 70, 30), 1))

    @pytest.mark.parametrize('scale', [1, 1e-28, 1e28])
    @pytest.mark.parametrize('n_warmup', [1, 5, 300])
    @pytest.mark.parametrize('K', [1, 2])
    @pytest.mark.parametrize(('shape', 'axis'), SHAPES)
    def test_a_stale_u(self, shape, axis, K, n_warmup, scale):
        dtype, tolerance = ('d', 1e-7) if scale == 1 else ('f', 1e-3)
        W = (scale * random(*shape)).astype(dtype)
        u = random(shape[axis]).astype(dtype)
        for factor in (1 - 1e-3, 1 + 1e-3):  # just stale, and just not
            limit = factor * turn_of(W, u, axis, K)
            expected, found = normalized(W, u, axis, K, n_warmup, limit)
            assert np.array_equal(expected[3], u) == (factor > 1)
            for a, b in zip(expected, found):
                np.testing.assert_allclose(
                    b, a, rtol=tolerance, atol=tolerance * abs(a).max())

    def test_no_warm_up(self):
        W, u = random(70, 90), random(70)
        for limit in (0., 2.):
            expected, found = normalized(W, u, limit=limit)
            for a, b in zip(expected, found):
                np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-12)

    # gamma and initial_gamma, in units of sigma; how much u turns; whether
    # gamma is made anew.
    GAMMAS = (
        (.5, .5, 0, True), (.5, .5, .1, True), (.5, .6, 0, False),
        (1 / (1 + GAMMA_LIMIT) - 1e-3, None, .1, True),
        (1 / (1 + GAMMA_LIMIT) + 1e-3, None, .1, False),
        (1 / (1 - GAMMA_LIMIT) + 1e-3, None, 0, True),
        (1 / (1 - GAMMA_LIMIT) - 1e-3, None, 0, False),
        (2, 2, .9 * GAMMA_TURN, True), (2, 2, 1.1 * GAMMA_TURN, False),
        (1, 1, 0, False))

    @pytest.mark.parametrize(('gamma', 'initial', 'turn', 'is_new'), GAMMAS)
    @pytest.mark.parametrize('dtype', 'fd')
    def test_gamma(self, dtype, gamma, initial, turn, is_new):
        # Singular values 1 and 2: an iteration turns (x, 1) to (x, 4).
        W, u = np.zeros((70, 80), dtype), np.zeros(70, dtype)
        W[[0, 1], [3, 2]] = 1, 2
        u[:2] = self.lean(turn), 1
        sigma = reference.power_iteration(W.astype('d'), u.astype('d'), 1)[2]
        initial = gamma if initial is None else initial
        expected, found = normalized(
            W, u, gamma=gamma * sigma, initial=initial * sigma)
        assert expected[-2] == pytest.approx(
            sigma * (1 if is_new else gamma), rel=1e-5)
        for a, b in zip(expected, found):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)

    @staticmethod
    def lean(turn):
        """The x with which (x, 1) turns so much."""
        least, most = 0., 1.
        for _ in range(60):
            x = (least + most) / 2
            found = 1 - (x * x + 4) / np.sqrt((x * x + 1) * (x * x + 16))
            least, most = (x, most) if found < turn else (least, x)
        return x

    BAD_SIGMAS = (0, 3, 1), (np.nan, 3, 3), (np.inf, 3, 3), (3e38, 3, 3)

    @pytest.mark.parametrize(('value', 'gamma', 'expected'), BAD_SIGMAS)
    def test_gamma_of_no_sigma(self, value, gamma, expected):
        """Of zero it is 1, and of what is not finite it stays."""
        W = np.full((70, 80), value, 'f')
        for found in normalized(
                W, np.ones(70, 'f'), gamma=gamma, initial=gamma):
            assert found[-2] == found[-1] == expected


def test_every_kernel_is_run_here(monkeypatch):
    """By the name under which the executor counts it."""
    if cuda.ndarray is not on_host.DeviceArray:
        pytest.skip('counted on the host only')
    names = {kernel.name for kernel in kernels.ALL
             if not getattr(kernel, 'has_several', False)}
    with on_host.counted() as launches:
        for size in PATHS.values():
            monkeypatch.setattr(kernels, 'FUSED_SIZE', size)
            for detach_uv in (False, True):
                W, u, gY = weight((3, 4, 2), 1, 'f')
                x = chainer.Variable(u)
                Y = functions.spectral_normalize(
                    W, x, axis=1, detach_uv=detach_uv)
                Y.grad = gY
                Y.backward()
        link = L.Linear(3, 4).add_hook(SpectralNormalization(use_gamma=True))
        link.to_device(DEVICE)
        link(send(random(2, 3).astype('f')))
    assert names <= set(launches)
    assert cuda_on_host.available()
