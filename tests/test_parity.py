"""Side by side with Chainer's hook, over a whole training run."""
import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks

import sn_function

LINKS = {
    'Linear': (lambda n: L.Linear(n and 6, 5), (4, 6)),
    'EmbedID': (lambda n: L.EmbedID(7, 5), None),
    'Convolution1D': (lambda n: L.Convolution1D(n, 5, 3), (2, 3, 6)),
    'Convolution2D': (lambda n: L.Convolution2D(n, 5, 3), (2, 3, 5, 5)),
    'Convolution2D, grouped': (
        lambda n: L.Convolution2D(n and 4, 6, 3, groups=2), (2, 4, 5, 5)),
    'Convolution3D': (lambda n: L.Convolution3D(n, 4, 2), (2, 3, 3, 3, 3)),
    'ConvolutionND': (lambda n: L.ConvolutionND(2, n or 3, 4, 2),
                      (2, 3, 3, 3)),
    'DilatedConvolution2D': (
        lambda n: L.DilatedConvolution2D(n, 4, 2, dilate=2), (2, 3, 5, 5)),
    'Deconvolution1D': (lambda n: L.Deconvolution1D(n, 5, 3), (2, 3, 6)),
    'Deconvolution2D': (lambda n: L.Deconvolution2D(n, 5, 3), (2, 3, 4, 4)),
    'Deconvolution2D, grouped': (
        lambda n: L.Deconvolution2D(n and 4, 6, 3, groups=2), (2, 4, 4, 4)),
    'Deconvolution3D': (
        lambda n: L.Deconvolution3D(n, 4, 2), (2, 3, 3, 3, 3)),
    'DeconvolutionND': (
        lambda n: L.DeconvolutionND(2, n or 3, 4, 2), (2, 3, 3, 3)),
    'Bilinear': (lambda n: L.Bilinear(3, 4, 5), ((2, 3), (2, 4))),
}
N_STEPS = 100


def inputs_of(shape, rng):
    if shape is None:
        return [rng.randint(0, 7, size=8).astype('i')]
    shapes = shape if isinstance(shape[0], tuple) else [shape]
    return [rng.randn(*s).astype('f') for s in shapes]


def train(make_link, shape, hook, *, n=3, n_steps=N_STEPS):
    """Trains with momentum; yields what the link computed at each step."""
    np.random.seed(0)
    rng = np.random.RandomState(1)
    link = make_link(n)
    if n is not None:
        # Where two singular values are close, rounding turns u at will.
        W = link.W.array
        axis = int('Deconvolution' in type(link).__name__)
        np.moveaxis(W, axis, 0)[0] *= 2
    link.add_hook(hook)
    optimizer = chainer.optimizers.MomentumSGD(lr=0.01)
    for step in range(n_steps):
        x = [chainer.Variable(a) if a.dtype.kind == 'f' else a
             for a in inputs_of(shape, rng)]
        y = link(*x)
        if step == 0:
            optimizer.setup(link)
        link.cleargrads()
        # Random upstream gradients, that do not vanish as a loss would.
        y.grad = (rng.randn(*y.shape) / y.size ** 0.5).astype('f')
        y.backward()
        gamma = [link.gamma.grad] if hook.use_gamma else []
        yield [y.array, link.W.array, link.W.grad, link.W_u, *gamma]
        optimizer.update()


def assert_close(actual, expected, tolerance=1e-5, scales=()):
    """Relative to the largest norm so far: a scalar may pass through 0."""
    norms = [np.linalg.norm(b) for b in expected]
    scales = [max(pair) for pair in zip(norms, scales)] or norms
    assert len(actual) == len(expected) == len(scales)
    for a, b, scale in zip(actual, expected, scales):
        assert a.dtype == b.dtype
        assert np.linalg.norm(a - b) <= tolerance * scale
    return scales


@pytest.mark.parametrize('settings', [
    {}, {'use_gamma': True, 'factor': 2.0}, {'n_power_iteration': 3}],
    ids=['plain', 'gamma and factor', 'three iterations'])
# To the hook, a convolution of any kind is one of its weight.
@pytest.mark.parametrize('name', [
    name if name in (
        'Linear', 'EmbedID', 'Convolution2D', 'Deconvolution2D', 'Bilinear')
    else pytest.param(name, marks=pytest.mark.slow) for name in LINKS])
def test_follows_the_built_in_hook(name, settings):
    make_link, shape = LINKS[name]
    theirs = train(make_link, shape,
                   link_hooks.SpectralNormalization(**settings))
    mine = train(make_link, shape, sn_function.SpectralNormalization(
        detach_uv=True, n_warmup=0, **settings))
    weights, scales = [], ()
    for a, b in zip(mine, theirs):
        scales = assert_close(a, b, scales=scales)
        weights.append(a[1].copy())
    assert len(weights) == N_STEPS
    moved = np.linalg.norm(weights[-1] - weights[0])
    assert moved > 0.01 * np.linalg.norm(weights[0])


@pytest.mark.parametrize('name', [
    'Linear', 'Convolution1D', 'Convolution2D', 'Deconvolution2D',
    'Deconvolution3D'])
def test_follows_the_built_in_hook_on_a_lazy_link(name):
    make_link, shape = LINKS[name]
    theirs = train(make_link, shape, link_hooks.SpectralNormalization(),
                   n=None, n_steps=5)
    mine = train(make_link, shape, sn_function.SpectralNormalization(
        detach_uv=True, n_warmup=0), n=None, n_steps=5)
    for a, b in zip(mine, theirs):
        assert_close(a, b)


def test_in_test_mode():
    x = np.random.randn(4, 6).astype('f')
    ys = []
    for make in (link_hooks.SpectralNormalization,
                 lambda: sn_function.SpectralNormalization(
                     detach_uv=True, n_warmup=0)):
        np.random.seed(0)
        link = L.Linear(6, 5).add_hook(make())
        for _ in range(3):
            link(x)
        u = link.W_u.copy()
        with chainer.using_config('train', False):
            ys.append([link(x).array, link(x).array, link.W_u])
        np.testing.assert_array_equal(ys[-1][0], ys[-1][1])
        np.testing.assert_array_equal(u, link.W_u)
    assert_close(ys[1], ys[0])


def test_the_exact_gradient_is_another_one():
    """Else the tests above would not tell the two modes apart."""
    make_link, shape = LINKS['Linear']
    runs = [next(train(make_link, shape, sn_function.SpectralNormalization(
        detach_uv=detach_uv, n_warmup=0))) for detach_uv in (True, False)]
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    difference = np.linalg.norm(runs[0][2] - runs[1][2])
    assert difference > 1e-2 * np.linalg.norm(runs[0][2])
