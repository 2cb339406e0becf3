"""Intervals for the norms of links."""
import sn_function  # isort: skip  # before chainer, which it repairs

import io
import math
import sys

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks
from chainer.backends import cuda

from sn_function import SpectralNormalization, _certify, errors
from tests import maps, reference

CONVOLUTIONS = {
    'Convolution2D': lambda: L.Convolution2D(
        3, 6, (2, 3), 2, 1, groups=3, nobias=True),
    'Convolution3D': lambda: L.Convolution3D(2, 2, 2, nobias=True),
    'Deconvolution2D': lambda: L.Deconvolution2D(3, 4, 4, 2, 1, nobias=True),
    'Deconvolution1D': lambda: L.Deconvolution1D(
        4, 2, 3, 2, groups=2, nobias=True),
    'DilatedConvolution2D': lambda: L.DilatedConvolution2D(
        2, 3, 2, dilate=2, nobias=True),
    'DepthwiseConvolution2D': lambda: L.DepthwiseConvolution2D(
        3, 2, 3, nobias=True),
}
MATRICES = {
    'Linear': lambda: L.Linear(6, 5, nobias=True),
    'EmbedID': lambda: L.EmbedID(5, 4),
}
HOOKS = {
    'none': None,
    'hook': SpectralNormalization,
    "Chainer's": link_hooks.SpectralNormalization,
    'factor': lambda: SpectralNormalization(factor=.5),
    'gamma': lambda: SpectralNormalization(use_gamma=True),
}
CASES = [
    ('f', 'none'), ('f', 'hook'), ('f', "Chainer's"), ('d', 'factor'),
    ('e', 'gamma')]


def made(make, hook='none', dtype='d'):
    """A link without a bias, after a call in training mode."""
    with chainer.using_config('dtype', np.dtype(dtype)):
        link = make()
    link.W.array[...] = np.random.normal(size=link.W.shape)
    if HOOKS[hook]:
        link.add_hook(HOOKS[hook]())
    link(inputs(link))
    return link


def inputs(link, size=5):
    """One input of a link."""
    if isinstance(link, L.EmbedID):
        return np.zeros(1, 'i')
    channels = link.W.shape[1] * getattr(link, 'groups', 1)
    if isinstance(link, (L.Deconvolution2D, L.DeconvolutionND)):
        channels = len(link.W)
    return np.ones(
        (1, channels, *(size,) * (link.W.ndim - 2)), link.W.dtype)


def used(link):
    """The weight of a call in test mode, in float64, seen from within."""
    seen = []
    forward = type(link).forward

    def spy(self, x):
        seen.append(self.W.array)
        return forward(self, x)

    with chainer.using_config('train', False), \
            pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(link), 'forward', spy)
        link(inputs(link))
    return seen[0].astype('d')


@pytest.mark.parametrize(('dtype', 'hook'), CASES)
@pytest.mark.parametrize('kind', CONVOLUTIONS)
def test_convolution(kind, dtype, hook):
    if kind == 'DepthwiseConvolution2D' and hook == "Chainer's":
        hook = 'hook'
    link = made(CONVOLUTIONS[kind], hook, dtype)
    plain = made(CONVOLUTIONS[kind])
    W = used(link)
    lo, hi = sn_function.certify(link, rtol=1e-2)
    assert lo <= hi <= 1.01 * lo * (1 + 1e-12)
    for size in 4, 7:
        shape = inputs(link, size).shape[1:]
        sigma = np.linalg.svd(maps.dense(plain, shape, W))[1][0]
        assert sigma <= hi
        low, high = sn_function.certify(link, insize=size)
        assert low <= sigma * (1 + 1e-14)
        assert sigma * (1 - 1e-14) <= high <= low * (1 + 1e-12)
    assert sn_function.certify(link, insize=shape[1:]) == (low, high)
    assert .6 * lo <= sigma


@pytest.mark.parametrize(('dtype', 'hook'), CASES)
@pytest.mark.parametrize('kind', MATRICES)
def test_matrix(kind, dtype, hook):
    link = made(MATRICES[kind], hook, dtype)
    W = used(link)
    interval = sn_function.certify(link)
    sigma = reference.true_norm(W)
    assert interval.lo <= sigma * (1 + 1e-14)
    assert sigma * (1 - 1e-14) <= interval.hi
    assert interval.hi - interval.lo <= 1e-13 * sigma
    # Of a link that maps no images the size makes no difference.
    assert sn_function.certify(link, insize=3) == interval


@pytest.mark.parametrize('hook', HOOKS)
def test_nothing_changes(hook):
    link = made(CONVOLUTIONS['Convolution2D'], hook, 'f')
    before = {name: np.copy(value) for name, value in vars(link).items()
              if isinstance(value, np.ndarray)}
    W, state = link.W, np.random.get_state()[1].copy()
    array = W.array.copy()
    sn_function.certify(link, rtol=.1)
    assert link.W is W
    np.testing.assert_array_equal(W.array, array)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(link, name), value)


def test_several_hooks():
    """The second one normalizes what the first one makes."""
    link = made(MATRICES['Linear'])
    link.add_hook(link_hooks.SpectralNormalization(name='first'))
    link.add_hook(link_hooks.SpectralNormalization(name='second', factor=2))
    link(inputs(link))
    sigma = reference.true_norm(used(link))
    # Both iterate from one vector, so each call is a little closer.
    assert sn_function.certify(link) == pytest.approx((sigma, sigma), rel=1e-9)


def test_own_link():
    """A matrix with a hook, of a link that is not known."""
    class Own(chainer.Link):
        def __init__(self, *shape):
            super().__init__()
            with self.init_scope():
                self.W = chainer.Parameter(np.ones(shape, 'f'))

    link = Own(3, 4)
    with pytest.raises(errors.CertifyLinkError, match='given a Own'):
        sn_function.certify(link)
    link.add_hook(SpectralNormalization())
    lo, hi = sn_function.certify(link)
    assert lo <= 1 + 1e-6
    assert hi >= 1 - 1e-6
    link = Own(3, 4, 5)
    link.add_hook(SpectralNormalization())
    with pytest.raises(errors.CertifyLinkError):
        sn_function.certify(link)


def test_unknown_links():
    with pytest.raises(errors.CertifyLinkError, match='one by one'):
        sn_function.certify(chainer.Sequential(L.Linear(2, 2)))
    with pytest.raises(errors.CertifyLinkError, match='BatchNorm'):
        sn_function.certify(L.BatchNormalization(3))
    with pytest.raises(errors.ModelTypeError, match='certify takes a model'):
        sn_function.certify(np.ones((2, 2)))


@pytest.mark.parametrize('hook', ['none', 'hook'])
def test_lazy_weight(hook):
    for link in L.Linear(None, 3), L.Convolution2D(None, 3, 3):
        if HOOKS[hook]:
            link.add_hook(HOOKS[hook]())
        with pytest.raises(errors.UninitializedWeightError):
            sn_function.certify(link)


@pytest.mark.parametrize(('name', 'values'), [
    ('rtol', [0, -1, math.nan, math.inf, None, '1', True]),
    ('time_limit', [-1, math.nan, '1', True]),
    ('insize', [0, -3, 2.5, (3,), (3, 0), (3, 3, 3), 'ab', True]),
])
def test_arguments(name, values):
    link = made(CONVOLUTIONS['Convolution2D'])
    for value in values:
        with pytest.raises(errors.CertifyArgumentError, match=name):
            sn_function.certify(link, **{name: value})
    with pytest.raises(errors.InputSizeError):
        sn_function.certify(L.Convolution2D(1, 1, 3), insize=2)


def test_nan_and_zero():
    link = L.Convolution2D(2, 2, 3)
    link.W.array[...] = 0
    assert sn_function.certify(link) == (0, 0)
    link.W.array[0, 0, 0, 0] = math.nan
    assert np.isnan(sn_function.certify(link)).all()


def test_time_limit():
    link = made(lambda: L.Convolution2D(20, 20, 3))
    wide = sn_function.certify(link, time_limit=0)
    lo, hi = sn_function.certify(link, time_limit=None)
    assert wide.lo <= lo <= hi < wide.hi


@pytest.mark.gpu
def test_device():
    link = made(CONVOLUTIONS['Deconvolution2D'], 'hook')
    expected = sn_function.certify(link)
    link.to_device('@cupy:0')
    interval = sn_function.certify(link)
    assert isinstance(link.W.array, cuda.ndarray)
    np.testing.assert_allclose(interval, expected, rtol=1e-10)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(_certify, 'DELAY', 0)
    monkeypatch.setattr(_certify, 'PAUSE', 0)


@pytest.mark.usefixtures('impatient')
def test_progress_by_a_function():
    link = made(CONVOLUTIONS['Convolution2D'])
    found = []
    lo, hi = sn_function.certify(link, progress=found.append)
    assert found
    assert all(each.lo <= lo and hi <= each.hi for each in found)


@pytest.mark.usefixtures('impatient')
@pytest.mark.parametrize('is_terminal', [False, True])
def test_progress_on_a_terminal(monkeypatch, is_terminal):
    class Stream(io.StringIO):
        def isatty(self):
            return is_terminal

    monkeypatch.setattr(sys, 'stderr', Stream())
    sn_function.certify(made(CONVOLUTIONS['Convolution2D']))
    text = sys.stderr.getvalue()
    if is_terminal:
        lines = text.split('\r')
        assert lines[1].startswith('certify: ')
        assert 'norm' in lines[1]
        assert not lines[-2].strip()  # it is gone at the end
        assert lines[-1] == ''
    else:
        assert text == ''


def test_progress_waits():
    link = made(CONVOLUTIONS['Convolution2D'])
    found = []
    sn_function.certify(link, progress=found.append)
    assert not found


def test_fixed_output_size():
    link = L.Deconvolution2D(1, 1, 3, outsize=(4, 4), nobias=True)
    interval = sn_function.certify(link, insize=2)
    norm = np.linalg.norm(maps.dense(link, (1, 2, 2)), 2)
    assert interval.lo <= norm <= interval.hi
    with pytest.raises(errors.OutputSizeError, match='does not fit'):
        sn_function.certify(link, insize=3)


def test_empty_weight():
    link = L.Linear(3, 2)
    link.W.array = np.zeros((0, 3), 'f')
    with pytest.raises(errors.WeightShapeError):
        sn_function.certify(link)


def test_vector_of_another_hook_is_left_alone():
    link = L.Linear(3, 2).add_hook(link_hooks.SpectralNormalization())
    link(np.ones((1, 3), 'f'))
    hook = link.local_link_hooks['SpectralNormalization']
    v = hook.v
    sn_function.certify(link)
    assert hook.v is v
