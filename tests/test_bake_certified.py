"""Layers that are baked with a certificate have the norm that they shall.

The oracle is a singular value decomposition, in float64, of the matrix that
the layer is, found from its outputs of unit images.
"""
import copy

from sn_function import (  # isort: skip  # before chainer: it repairs that
    ChainSpectralNormalization,
    SpectralNormalization,
    errors,
)
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks

from sn_function import _bake_certified
from sn_function._certificate.interval import Interval
from sn_function.bake import bake

OURS, CHAINERS = SpectralNormalization, link_hooks.SpectralNormalization


def norm_of_map(link, size):
    """The norm of a layer without its bias, for images of that size."""
    link = copy.deepcopy(link)
    link.W.array = link.W.array.astype('d')
    link.b = None
    if not size:
        return np.linalg.norm(link.W.array, 2)
    channels = {
        L.DepthwiseConvolution2D: lambda shape: shape[1],
        L.DeconvolutionND: lambda shape: shape[0],
        L.Deconvolution2D: lambda shape: shape[0]}.get(
            type(link), lambda shape: shape[1] * getattr(link, 'groups', 1))(
                link.W.shape)
    n = channels * int(np.prod(size))
    images = np.eye(n).reshape(n, channels, *size)
    return np.linalg.norm(link(images).array.reshape(n, -1), 2)


def random_layer(seed):
    """A layer of any kind, the size of an image, and settings of a hook."""
    random = np.random.RandomState(seed)

    def pick(*values):
        return values[random.randint(len(values))]

    dtype = pick('e', 'f', 'd')
    with chainer.using_config('dtype', np.dtype(dtype)):
        link, size = _random_link(pick)
    link.W.array[...] = random.normal(size=link.W.shape) * pick(.01, 1, 30)
    settings = pick(
        {}, {'factor': .3}, {'factor': 2.5}, {'use_gamma': True},
        {'use_gamma': True, 'factor': .5}, {'cap': .9}, {'cap': 1e3})
    return link, size, settings


def _random_link(pick):
    ndim = pick(0, 1, 2, 2, 2, 2, 3)
    if ndim == 0:
        return pick(L.Linear, L.EmbedID)(pick(1, 5, 9), pick(1, 4, 12)), ()
    kernel = pick(1, 2, 3, 4) if ndim < 3 else 2
    size = tuple(pick(4, 5, 6) for _ in range(ndim)) if ndim < 3 else (3,) * 3
    stride, pad, groups = pick(1, 1, 2, 3), pick(0, 1), pick(1, 1, 2, 3)
    dilate = pick(1, 2) if kernel < 3 and ndim < 3 else 1
    n, m = groups * pick(1, 2), groups * pick(1, 2, 3)
    if ndim == 2 and pick(0, 0, 0, 1):
        return L.DepthwiseConvolution2D(m, n, kernel, stride, pad), size
    make = pick(L.ConvolutionND, L.ConvolutionND, L.DeconvolutionND)
    if make is L.DeconvolutionND:
        pad = 0
    return make(ndim, m, n, kernel, stride, pad, dilate=dilate,
                groups=groups), size


def limit_of(link, settings):
    if 'cap' in settings:
        return settings['cap']
    gamma = link.gamma.array if settings.get('use_gamma') else 1
    return abs(float(gamma)) * settings.get('factor', 1)


class TestNorm:

    @pytest.mark.parametrize('start', range(0, 200, 20))
    def test_is_not_above_the_limit_at_any_size(self, start):
        ratios = []
        for seed in range(start, start + 20):
            link, size, settings = random_layer(seed)
            link.add_hook(OURS(**settings))
            if settings.get('use_gamma'):
                link.gamma.array[...] *= (-1) ** seed * .7
            c = limit_of(link, settings)
            W = link.W.array
            before = norm_of_map(link, size)
            baked = bake(link, certified=True)
            assert baked.W.dtype == W.dtype
            sizes = [size, tuple(n + 2 for n in size)][:1 + bool(size)]
            norms = [norm_of_map(baked, each) for each in sizes]
            assert max(norms) <= c
            ratios.append(norms[0] / min(c, before))
        # By another size, or by float16.
        assert max(ratios) > .99
        assert min(ratios) > .4

    @pytest.mark.parametrize('dtype', ['e', 'f', 'd'])
    @pytest.mark.parametrize('scale', [1, 1e-3, 30])
    def test_of_a_matrix_is_the_limit(self, dtype, scale):
        with chainer.using_config('dtype', np.dtype(dtype)):
            link = L.Linear(30, 20)
        link.W.array *= scale
        link.add_hook(OURS())
        rtol = 8 * np.finfo(dtype).eps if dtype != 'd' else 1e-11
        norm = norm_of_map(bake(link, certified=True), ())
        assert 1 - rtol <= norm <= 1

    def test_of_several_maps_and_sizes(self):
        """That it is near the limit where images are large."""
        link = L.Convolution2D(2, 3, 3, pad=1).add_hook(OURS())
        assert norm_of_map(link, (16, 16)) > 1.2
        baked = bake(link, certified=True, rtol=1e-2)
        assert .95 < norm_of_map(baked, (16, 16)) < 1

    def test_of_a_hook_that_takes_the_norm_of_the_map(self):
        link = L.Convolution2D(2, 3, 3, pad=1).add_hook(
            OURS(norm='operator', insize=5, rtol=1e-3))
        plain, certified = bake(link), bake(link, certified=True)
        assert norm_of_map(plain, (5, 5)) == pytest.approx(1, rel=1e-3)
        assert norm_of_map(plain, (16, 16)) > 1.01
        assert norm_of_map(certified, (16, 16)) <= 1
        # A scale is all that they differ by.
        ratio = certified.W.array / plain.W.array
        np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-5)
        assert not hasattr(certified, 'W_map')

    @pytest.mark.parametrize('make_hook', [OURS, CHAINERS])
    def test_sign_of_gamma_and_factor(self, make_hook):
        link = L.Linear(5, 4).add_hook(make_hook(use_gamma=True, factor=.5))
        link(np.zeros((1, 5), 'f'))
        link.gamma.array[...] = -3
        baked = bake(link, certified=True)
        W = link.W.array.astype('d')
        np.testing.assert_allclose(
            baked.W.array, -1.5 * W / np.linalg.norm(W, 2), rtol=1e-5)
        link.gamma.array[...] = 0
        assert not bake(link, certified=True).W.array.any()

    def test_cap_leaves_what_is_below_it(self):
        link = L.Convolution2D(2, 3, 3).add_hook(OURS(cap=100.))
        baked = bake(link, certified=True, in_place=False)
        np.testing.assert_array_equal(baked.W.array, link.W.array)
        assert not np.shares_memory(baked.W.array, link.W.array)

    def test_floor(self):
        """eps is under hi, as it is under sigma in the hook."""
        link = L.Linear(5, 4).add_hook(OURS(eps=100.))
        np.testing.assert_allclose(
            bake(link, certified=True).W.array, link.W.array / 100, rtol=1e-6)

    @pytest.mark.parametrize('dtype', ['e', 'f', 'd'])
    def test_zero(self, dtype):
        with chainer.using_config('dtype', np.dtype(dtype)):
            link = L.Convolution2D(2, 3, 3, initialW=0)
        link.add_hook(OURS(eps=0))
        assert not bake(link, certified=True).W.array.any()

    @pytest.mark.parametrize('scale', [1e-30, 1e30])
    def test_range(self, scale):
        link = L.Convolution2D(2, 3, 3)
        link.W.array *= np.float32(scale)
        link.add_hook(OURS(eps=1e-35))
        assert .6 < norm_of_map(bake(link, certified=True), (9, 9)) <= 1

    def test_of_intervals_of_other_widths(self, monkeypatch):
        """As where the time is up: it ends, and holds."""
        link = L.Linear(5, 4).add_hook(OURS())
        widths = iter([.1, .15, .2, .12, .21, .3, .1])
        bounds = []

        def slow(W, *args):
            lo = np.linalg.norm(W.astype('d'), 2)
            bounds.append(lo * (1 + next(widths)))
            return Interval(lo, bounds[-1])

        monkeypatch.setattr(_bake_certified, 'interval_of', slow)
        baked = bake(link, certified=True)
        assert bounds[-1] <= 1
        assert norm_of_map(baked, ()) > .7

    def test_of_what_rounding_undoes(self, monkeypatch):
        """A bound that a slightly smaller weight does not bring down."""
        with chainer.using_config('dtype', np.dtype('e')):
            link = L.Linear(5, 4).add_hook(OURS())
        bounds = []

        def stubborn(W, *args):
            hi = np.linalg.norm(W.astype('d'), 2)
            bounds.append(1.000001 if len(bounds) and hi > .98 else hi)
            return Interval(hi, bounds[-1])

        monkeypatch.setattr(_bake_certified, 'interval_of', stubborn)
        assert .9 < norm_of_map(bake(link, certified=True), ()) <= .98
        assert len(bounds) < 9


class TestModel:

    def model(self, **settings):
        model = chainer.Sequential(
            L.Convolution2D(1, 4, 3), F.relu, L.Deconvolution2D(4, 2, 3),
            chainer.Sequential(L.Linear(2 * 36, 5), L.Linear(5, 5)))
        return model.add_hook(ChainSpectralNormalization(**settings))

    @pytest.mark.parametrize('in_place', [False, True])
    def test_hook_of_a_chain(self, in_place):
        model = self.model(factor=.8)
        raw = {path: param.array.copy() for path, param in model.namedparams()}
        baked = bake(model, in_place, certified=True)
        assert (baked is model) == in_place
        for link in baked.links():
            assert not link.local_link_hooks
            if hasattr(link, 'W'):
                size = (5, 5) if link.W.ndim == 4 else ()
                assert .5 < norm_of_map(link, size) <= .8
                assert not hasattr(link, 'W_u')
        baked(np.zeros((2, 1, 6, 6), 'f'))
        if not in_place:
            for path, param in model.namedparams():
                np.testing.assert_array_equal(param.array, raw[path])

    def test_n_step_rnn(self):
        link = L.NStepLSTM(2, 4, 5, 0.)
        link.add_hook(OURS(factor=.5))
        baked = bake(link, certified=True)
        for layer, ws in zip(baked, baked.ws):
            for i, W in enumerate(ws):
                assert W is getattr(layer, f'w{i}')
                norm = np.linalg.norm(W.array.astype('d'), 2)
                assert .499999 < norm <= .5

    def test_two_weights_of_a_link(self):
        link = chainer.Link()
        with link.init_scope():
            link.A = chainer.Parameter(np.random.normal(size=(4, 5)))
            link.B = chainer.Parameter(np.random.normal(size=(3, 4)))
        for name, factor in ('A', 1.), ('B', .5):
            link.add_hook(OURS(weight_name=name, name=name, factor=factor))
        baked = bake(link, certified=True)
        for name, c in ('A', 1), ('B', .5):
            norm = np.linalg.norm(getattr(baked, name).array, 2)
            assert c * (1 - 1e-11) < norm <= c

    def test_two_hooks_of_one_weight(self):
        """The later one counts, as in a call."""
        link = L.Linear(5, 4).add_hook(OURS(use_gamma=True))
        link.gamma.array[...] = -3
        link.add_hook(CHAINERS(name='second', factor=.5))
        link(np.zeros((1, 5), 'f'))
        W = link.W.array.copy()
        for in_place in False, True:
            baked = bake(link, in_place, certified=True)
            assert .4999 < norm_of_map(baked, ()) <= .5
            assert (baked.W.array / W < 0).all()

    def test_weight_of_two_links(self):
        a, b = L.Linear(5, 5), L.Linear(5, 5)
        b.W = a.W
        a.add_hook(OURS())
        b.add_hook(OURS(cap=100.))
        raw = a.W.array.copy()
        model = bake(chainer.Sequential(a, b), in_place=True, certified=True)
        np.testing.assert_array_equal(model[1].W.array, raw)
        assert .9999 < norm_of_map(model[0], ()) <= 1

    def test_weight_of_two_links_that_is_left_alone(self):
        a, b = L.Linear(5, 5), L.Linear(5, 5)
        b.W = a.W
        for link in a, b:
            link.add_hook(OURS(cap=100.))
        model = bake(chainer.Sequential(a, b), in_place=True, certified=True)
        assert not np.shares_memory(model[0].W.array, model[1].W.array)


class TestErrors:

    def test_unknown_maps(self):
        model = chainer.Sequential(
            L.Linear(5, 4).add_hook(OURS()),
            L.Bilinear(3, 4, 2).add_hook(OURS()))
        with pytest.raises(
                errors.UncertifiedWeightError,
                match=r'Bilinear /1\.W\. Known'):
            bake(model, certified=True, in_place=True)
        assert model[0].local_link_hooks
        assert hasattr(model[0], 'W_u')

    @pytest.mark.parametrize('spoil', [
        lambda link: link.W.array.__setitem__((0, 0), np.nan),
        lambda link: link.W.array.__setitem__((0, 0), np.inf),
        lambda link: link.gamma.array.__setitem__((), np.nan)])
    def test_no_finite_norm(self, spoil):
        model = chainer.Sequential(
            L.Linear(5, 4).add_hook(OURS()),
            L.Linear(4, 4).add_hook(OURS(use_gamma=True)))
        spoil(model[1])
        raw = model[0].W
        with pytest.raises(errors.CertifiedNormError, match=r'Linear /1\.W'):
            bake(model, certified=True, in_place=True)
        assert model[0].W is raw
        assert model[0].local_link_hooks

    def test_limit_out_of_the_range_of_a_dtype(self):
        with chainer.using_config('dtype', np.dtype('e')):
            link = L.Linear(1, 1).add_hook(OURS(factor=1e6))
        with pytest.raises(errors.CertifiedNormError, match='factor'):
            bake(link, certified=True)

    @pytest.mark.parametrize('argument', [
        {'rtol': 0}, {'rtol': None}, {'time_limit': -1}])
    def test_arguments(self, argument):
        link = L.Linear(3, 2).add_hook(OURS())
        with pytest.raises(
                errors.CertifyArgumentError, match=next(iter(argument))):
            bake(link, certified=True, **argument)


@pytest.mark.gpu
def test_device():
    """A certificate is computed on the host."""
    link = L.Linear(6, 5).add_hook(OURS(use_gamma=True))
    link.to_device('@cupy:0')
    gamma = float(link.gamma.array)
    for in_place in False, True:
        baked = bake(link, in_place, certified=True)
        assert baked.W.device == chainer.get_device('@cupy:0')
        W = chainer.backends.cuda.to_cpu(baked.W.array).astype('d')
        assert gamma * (1 - 1e-6) < np.linalg.norm(W, 2) <= gamma
