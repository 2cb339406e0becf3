"""The hook with `norm='operator'`: the norm of the map of a convolution."""
import copy
import io
import pickle
import threading
import warnings

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks, serializers
from chainer.backends import cuda

from sn_function import (
    ChainSpectralNormalization,
    SpectralNormalization,
    bake,
    cached,
    errors,
    extensions,
    refresh,
    summary,
)
from sn_function._models import vector_names
from tests import maps, reference

NAME = 'SpectralNormalization'

# A link without bias, and the shape of an input.
LINKS = {
    '1 D': (lambda n: L.Convolution1D(n, 4, 3, stride=2), (3, 7)),
    '2 D': (lambda n: L.Convolution2D(n, 4, 3, pad=1), (3, 5, 4)),
    '3 D': (lambda n: L.Convolution3D(n, 3, 2), (2, 3, 4, 3)),
    'stride': (
        lambda n: L.Convolution2D(n, 4, 3, stride=(2, 1), pad=1), (3, 5, 4)),
    'dilated': (
        lambda n: L.DilatedConvolution2D(n, 4, 2, dilate=2), (3, 5, 4)),
    'groups': (
        lambda n: L.Convolution2D(n, 6, 3, pad=1, groups=2), (4, 4, 3)),
    'depthwise': (
        lambda n: L.DepthwiseConvolution2D(n, 2, 3, pad=1), (3, 4, 4)),
    'cover all': (
        lambda n: L.ConvolutionND(2, n, 3, 3, stride=2, cover_all=True),
        (2, 6, 6)),
    'transposed': (
        lambda n: L.Deconvolution2D(n, 3, 4, stride=2, pad=1), (4, 3, 3)),
    'transposed, groups': (
        lambda n: L.Deconvolution2D(n, 6, 3, stride=2, groups=2), (4, 3, 3)),
    'outsize': (
        lambda n: L.DeconvolutionND(
            2, n, 3, 3, stride=2, pad=1, outsize=(6, 5)), (4, 3, 3)),
}

each = pytest.mark.parametrize('name', LINKS)


def plain(name, lazy=False):
    make, shape = LINKS[name]
    return make(None if lazy else shape[0]), shape


def make(name, lazy=False, **settings):
    link, shape = plain(name, lazy)
    return link.add_hook(SpectralNormalization(
        norm='operator', **settings)), shape


def conv(n=3, m=4, **settings):
    return L.Convolution2D(n, m, 3, pad=1).add_hook(
        SpectralNormalization(norm='operator', **settings))


def groups_in(link):
    """The number of maps that no product mixes."""
    if isinstance(link, L.DepthwiseConvolution2D):
        return link.W.shape[1]
    return getattr(link, 'groups', 1)


def hook_of(link):
    return link.local_link_hooks[NAME]


def batch(shape, n=2, dtype='f'):
    return np.random.normal(size=(n, *shape)).astype(dtype)


def normalized(link):
    return hook_of(link).normalize_weight(link).array


def norm_of(link, shape, W=None):
    """The norm of the map of a weight: of that as it is, if none is given."""
    twin = copy.deepcopy(link)
    twin.W.array = (link.W.array if W is None else W).astype('d')
    if getattr(twin, 'b', None) is not None:
        twin.b.array = np.zeros(twin.b.shape)
    return np.linalg.norm(maps.dense(twin, shape), 2)


class TestNorm:

    @each
    @pytest.mark.parametrize('lazy', [False, True])
    @pytest.mark.parametrize('n_vectors', [1, 3])
    def test_it_is_1(self, name, lazy, n_vectors):
        link, shape = make(
            name, lazy, n_vectors=n_vectors, rtol=1e-4, max_iterations=2000)
        assert link.W_map is None
        y = link(batch(shape))
        assert link.W_map.shape == shape
        assert hook_of(link).v.shape == y.shape[1:]
        assert norm_of(link, shape, normalized(link)) == pytest.approx(
            1, rel=1e-5)
        names = ['W_map', 'W_maps'][:n_vectors]
        assert vector_names(link) == names
        assert {*names} <= link._persistent
        assert hook_of(link).vector_name == 'W_map'
        assert not hasattr(link, 'W_u')
        if n_vectors > 1:
            assert link.W_maps.shape == (n_vectors - 1, *shape)

    @pytest.mark.parametrize('seed', range(8))
    def test_it_is_1_for_random_links(self, seed):
        np.random.seed(seed)
        for link, shape in maps.random_links(5):
            link.add_hook(SpectralNormalization(
                norm='operator', n_vectors=2, rtol=1e-6, max_iterations=2000))
            link(batch(shape, dtype='d'))
            assert norm_of(link, shape, normalized(link)) == pytest.approx(
                1, rel=1e-8)

    @each
    def test_a_call_is_one_with_the_normalized_weight(self, name):
        link, shape = make(name, n_warmup=5)
        x = batch(shape)
        link(x)
        with chainer.using_config('train', False):
            y = link(x).array
            Y = normalized(link)
        twin, _ = plain(name)
        twin.W.array, twin.b.array = Y, link.b.array
        np.testing.assert_allclose(y, twin(x).array, rtol=1e-5, atol=1e-6)
        sigma = norm_of(link, shape) / norm_of(link, shape, Y)
        np.testing.assert_allclose(Y * sigma, link.W.array, rtol=1e-5)

    @each
    @pytest.mark.parametrize('settings', [
        dict(), dict(n_power_iteration=2), dict(use_gamma=True),
        dict(factor=.7, eps=0.), dict(cap=.3), dict(n_vectors=2),
        dict(n_vectors=2, use_gamma=True)], ids=str)
    def test_gradients_are_those_of_differences(self, name, settings):
        link, shape = make(name, n_warmup=0, **settings)
        link.W.array = link.W.array.astype('d')
        link.b.array = link.b.array.astype('d')
        x = batch(shape, dtype='d')
        link(x)
        weights = batch(link(x).shape[1:], dtype='d')
        link.W_map[...] = np.random.normal(size=shape)  # not converged

        def loss():
            return F.sum(F.sin(link(x)) * weights)

        with chainer.using_config('train', False):
            link.cleargrads()
            loss().backward()
            for parameter in link.params():
                direction = np.random.normal(size=parameter.shape)
                start, values = parameter.array, []
                for step in (1e-6, -1e-6):
                    parameter.array = np.asarray(start + step * direction)
                    values.append(float(loss().array))
                parameter.array = start
                assert np.vdot(parameter.grad, direction) == pytest.approx(
                    (values[0] - values[1]) / 2e-6, rel=1e-6, abs=1e-8)

    @each
    def test_a_constant_gradient(self, name):
        """With `detach_uv` sigma is <v, conv(u, W)>, of constants u and v."""
        link, shape = make(name, detach_uv=True, n_warmup=0)
        link.W.array = link.W.array.astype('d')
        link.b.array = link.b.array.astype('d')
        x = batch(shape, dtype='d')
        link(x)
        link.W_map[...] = np.random.normal(size=shape)
        weights = batch(link.b.shape, 1, dtype='d')[0].reshape(
            -1, *[1] * (len(shape) - 1))
        with chainer.using_config('train', False):
            link.cleargrads()
            F.sum(F.sin(link(x)) * weights).backward()
        twin = copy.deepcopy(link)
        twin.b.array[...] = 0
        G = groups_in(link)
        of_groups = np.eye(G)[:, :, None] * hook_of(link).v.reshape(G, -1)
        u, v = max([(maps.dense(twin, shape) @ v.ravel(), v.ravel())
                    for v in of_groups], key=lambda uv: uv[0] @ uv[0])
        u /= np.linalg.norm(u)

        def loss(W):
            Y = W / (u @ maps.dense(twin, shape, W) @ v)
            rows = maps.dense(twin, shape, Y)
            y = (x.reshape(len(x), -1) @ rows).reshape(
                len(x), *hook_of(link).v.shape)
            y += link.b.array.reshape(weights.shape)
            return (np.sin(y) * weights).sum()

        W, direction = link.W.array, np.random.normal(size=link.W.shape)
        assert np.vdot(link.W.grad, direction) == pytest.approx(
            (loss(W + 1e-6 * direction) - loss(W - 1e-6 * direction)) / 2e-6,
            rel=1e-6, abs=1e-8)

    @each
    @pytest.mark.parametrize('settings', [
        {}, dict(detach_uv=True), dict(n_vectors=2)], ids=str)
    def test_double_backward(self, name, settings):
        link, shape = make(name, n_warmup=0, **settings)
        link.W.array = link.W.array.astype('d')
        link.b.array = link.b.array.astype('d')
        x = batch(shape, dtype='d')
        link(x)

        def square_of_gradient():
            y = F.sum(F.sin(link(x)))
            return F.sum(chainer.grad(
                [y], [link.W], enable_double_backprop=True)[0] ** 2)

        with chainer.using_config('train', False):
            link.cleargrads()
            square_of_gradient().backward()
            assert np.isfinite(link.W.grad).all()
            assert link.W.grad.any()
            if settings:  # differences see the constants move
                return
            W, direction = link.W.array, np.random.normal(size=link.W.shape)
            found, values = link.W.grad, []
            for step in (1e-5, -1e-5):
                link.W.array = W + step * direction
                values.append(float(square_of_gradient().array))
        assert np.vdot(found, direction) == pytest.approx(
            (values[0] - values[1]) / 2e-5, rel=1e-5)

    @pytest.mark.parametrize('n_vectors', [1, 2])
    @pytest.mark.parametrize(
        'name', ['groups', 'depthwise', 'transposed, groups'])
    def test_another_group_becomes_the_largest(self, name, n_vectors):
        """No product mixes groups: each keeps what it has of the vector."""
        link, shape = make(name, n_vectors=n_vectors, rtol=1e-3)
        x = batch(shape)
        group = (np.index_exp[:, :1] if name == 'depthwise'
                 else np.index_exp[:len(link.W.array) // 2])
        link.W.array[group] *= 100
        for _ in range(60):
            link(x)
        for factor in (1e-4, 1e4):
            link.W.array[group] *= factor
            Y = normalized(link)
            assert norm_of(link, shape, Y) == pytest.approx(1, rel=1e-3)


class TestParity:
    """Where the map is the matrix, the numbers are those of it."""

    @pytest.mark.parametrize('n_vectors', [1, 2])
    @pytest.mark.parametrize('settings', [
        dict(), dict(use_gamma=True), dict(rtol=1e-3), dict(cap=.5)], ids=str)
    def test_linear(self, n_vectors, settings):
        runs = []
        for norm in ('matrix', 'operator'):
            np.random.seed(1)
            link = L.Linear(5, 4).add_hook(SpectralNormalization(
                norm=norm, n_vectors=n_vectors, **settings))
            x = batch((5,))
            runs.append([y.array for y in (link(x), link(x), link.W_u)
                         if y is not link.W_u] + [link.W_u])
        for a, b in zip(*runs):
            np.testing.assert_array_equal(a, b)

    def test_embedding(self):
        link = L.EmbedID(5, 4).add_hook(SpectralNormalization(
            norm='operator', n_power_iteration=100))
        link(np.zeros(2, 'i'))
        assert link.W_u.shape == (5,)
        assert reference.true_norm(normalized(link)) == pytest.approx(1)

    @pytest.mark.parametrize('settings', [
        dict(n_power_iteration=300), dict(rtol=1e-5, max_iterations=1000),
        dict(rtol=1e-5, max_iterations=1000, n_vectors=2)], ids=str)
    def test_convolution_of_1_by_1(self, settings):
        links = [L.Convolution2D(3, 4, 1).add_hook(SpectralNormalization(
            norm=norm, **settings)) for norm in ('matrix', 'operator')]
        links[1].W.array[...] = links[0].W.array
        x = batch((3, 5, 5))
        for link in links:
            link(x)
        np.testing.assert_allclose(
            *map(normalized, links), rtol=1e-5, atol=1e-7)

    def test_n_step(self):
        runs = []
        for norm in ('matrix', 'operator'):
            np.random.seed(1)
            link = L.NStepLSTM(1, 3, 2, 0.).add_hook(
                SpectralNormalization(norm=norm))
            runs.append([y.array for y in link(
                None, None, [batch((3,))])[:2]] + [link[0].w0_u])
        for a, b in zip(*runs):
            np.testing.assert_array_equal(a, b)


class TestSizes:

    def test_the_first_call_gives_the_size(self):
        link = conv()
        assert link.W_map is None
        for size in ((4, 6), (7, 3), (4, 6)):
            link(batch((3, *size)))
            assert link.W_map.shape == (3, 4, 6)

    def test_a_call_of_another_size_uses_the_same_weight(self):
        link = conv(rtol=1e-4, max_iterations=1000)
        link(batch((3, 4, 6)))
        x = batch((3, 9, 9))
        with chainer.using_config('train', False):
            Y = normalized(link)
            y = link(x).array
        np.testing.assert_array_equal(
            y, F.convolution_2d(x, Y, link.b, pad=1).array)
        norms = [norm_of(link, (3, n, n), Y) for n in (2, 4, 9)]
        assert norms[0] < norms[1] < 1.01 < norms[2]

    @pytest.mark.parametrize(('insize', 'expected'), [
        (5, (5, 5)), ((4, 6), (4, 6)), ([4, 6], (4, 6)),
        (np.int64(5), (5, 5))])
    def test_the_hook_gives_the_size(self, insize, expected):
        link = conv(insize=insize)
        assert link.W_map.shape == (3, *expected)
        link(batch((3, 8, 8)))
        assert link.W_map.shape == (3, *expected)
        lazy = conv(None, insize=insize)
        assert lazy.W_map is None
        lazy(batch((3, 8, 8)))
        assert lazy.W_map.shape == (3, *expected)

    def test_without_a_call(self):
        link = conv()
        with pytest.raises(errors.UnknownInputSizeError, match='insize=32'):
            normalized(link)
        assert link.W_map is None
        with pytest.raises(errors.InsizeError, match='Convolution2D has 2'):
            hook_of(link).normalize_weight(link, (5, 5, 5))
        Y = hook_of(link).normalize_weight(link, 5).array
        assert link.W_map.shape == (3, 5, 5)
        assert Y.shape == link.W.shape

    @pytest.mark.parametrize('x', [
        np.zeros((3, 5), 'f'), np.zeros((3, 5, 5), 'f'), None])
    def test_an_input_without_a_size(self, x):
        link = conv()
        with pytest.raises(errors.UnknownInputSizeError):
            link(x)
        assert link.W_map is None
        assert isinstance(link.W, chainer.Parameter)

    def test_an_input_that_is_too_small(self):
        link = L.Convolution2D(3, 4, 3).add_hook(
            SpectralNormalization(norm='operator', use_gamma=True))
        with pytest.raises(errors.InputSizeError):
            link(batch((3, 2, 5)))
        assert link.W_map is None
        assert link.gamma.array is None
        link(batch((3, 3, 5)))
        assert link.W_map.shape == (3, 3, 5)

    @pytest.mark.parametrize(('kind', 'args', 'wrong', 'right', 'error'), [
        (L.Convolution2D, (3, 4, 5), 4, 6, errors.InputSizeError),
        (L.Deconvolution2D, (3, 4, 4, 2, 1, False, (8, 8)), 5, 4,
         errors.OutputSizeError)],
        ids=['smaller than the weight', 'of other outputs'])
    def test_a_map_that_does_not_fit(self, kind, args, wrong, right, error):
        link = kind(*args).add_hook(SpectralNormalization(norm='operator'))
        link.W_map = batch((3, wrong, wrong), 1)[0]
        with pytest.raises(error, match=r'W_map.* to None'):
            link(batch((3, right, right)))
        link.W_map = None
        link(batch((3, right, right)))
        assert link.W_map.shape == (3, right, right)

    @pytest.mark.parametrize('n_vectors', [1, 3])
    def test_a_map_of_other_channels_is_made_anew(self, n_vectors):
        link = conv(n_vectors=n_vectors)
        link(batch((3, 5, 5)))
        link.W.array = np.random.normal(size=(4, 2, 3, 3)).astype('f')
        with pytest.warns(errors.SpectralNormalizationWarning,
                          match='W_map.* belonged to a weight of another'
                          ) as found:
            link(batch((2, 7, 7)))
        what = 'It was' if n_vectors == 1 else 'They were'
        assert str(found[0].message).endswith(f'{what} made anew.')
        assert link.W_map.shape == (2, 5, 5)
        if n_vectors > 1:
            assert link.W_maps.shape == (2, 2, 5, 5)

    def test_a_vector_in_its_place_is_made_anew(self):
        link = conv()
        link(batch((3, 5, 5)))
        link.W_map = np.ones(4, 'f')
        with pytest.warns(errors.SpectralNormalizationWarning):
            link(batch((3, 6, 6)))
        assert link.W_map.shape == (3, 6, 6)

    @pytest.mark.parametrize('n_vectors', [1, 2])
    @pytest.mark.parametrize('bad', [0, np.nan, np.inf])
    def test_a_bad_one_is_made_anew(self, n_vectors, bad):
        link = conv(n_vectors=n_vectors)
        link(batch((3, 5, 5)))
        link.W_map[...] = bad
        with pytest.warns(errors.SpectralNormalizationWarning,
                          match='W_map was zero or not finite'):
            link(batch((3, 6, 6)))
        assert link.W_map.shape == (3, 5, 5)
        assert np.isfinite(link.W_map).all()
        assert link.W_map.any()

    def test_no_more_vectors_than_the_map_has(self):
        link = L.Convolution2D(1, 1, 2).add_hook(
            SpectralNormalization(norm='operator', n_vectors=9))
        link(batch((1, 3, 3)))
        assert link.W_maps.shape == (3, 1, 3, 3)
        assert norm_of(link, (1, 3, 3), normalized(link)) == pytest.approx(
            1, rel=1e-5)
        link = L.Convolution2D(1, 1, 2).add_hook(
            SpectralNormalization(norm='operator', n_vectors=9))
        link(batch((1, 2, 2)))
        assert link.W_maps.shape == (0, 1, 2, 2)
        assert norm_of(link, (1, 2, 2), normalized(link)) == pytest.approx(
            1, rel=1e-5)

    def test_more_vectors_later(self):
        link = conv(n_vectors=2)
        link(batch((3, 5, 5)))
        hook_of(link).n_vectors = 4
        link(batch((3, 5, 5)))
        assert link.W_maps.shape == (3, 3, 5, 5)
        hook_of(link).n_vectors = 1
        link(batch((3, 5, 5)))
        link.delete_hook(NAME)
        assert not hasattr(link, 'W_map')


class TestErrors:

    @pytest.mark.parametrize('norm', ['spectral', None, 2, ['operator']])
    def test_norm(self, norm):
        with pytest.raises(errors.NormError, match=r"'matrix'.*'operator'"):
            SpectralNormalization(norm=norm)

    def test_groups(self):
        with pytest.raises(errors.NormConflictError, match='groups='):
            SpectralNormalization(norm='operator', groups='each')

    def test_a_matrix_has_no_size(self):
        with pytest.raises(errors.NormConflictError, match='insize=8'):
            SpectralNormalization(insize=8)

    @pytest.mark.parametrize('insize', [
        0, -1, 2.5, True, (), (4, 0), (4, 2.5), 'ab', [4, None]])
    def test_insize(self, insize):
        with pytest.raises(errors.InsizeError, match='insize'):
            SpectralNormalization(norm='operator', insize=insize)

    @pytest.mark.parametrize('lazy', [False, True])
    def test_insize_of_other_dimensions(self, lazy):
        link = L.Convolution2D(None if lazy else 3, 4, 3)
        with pytest.raises(errors.InsizeError, match='Convolution2D has 2'):
            link.add_hook(SpectralNormalization(
                norm='operator', insize=(4, 4, 4)))
        assert not link.local_link_hooks
        assert not hasattr(link, 'W_map')

    def test_insize_that_is_too_small(self):
        link = L.Convolution2D(3, 4, 5)
        with pytest.raises(errors.InputSizeError):
            link.add_hook(SpectralNormalization(norm='operator', insize=4))
        assert not link.local_link_hooks

    def test_insize_that_does_not_fit_the_outputs(self):
        link = L.Deconvolution2D(3, 4, 4, stride=2, pad=1, outsize=(8, 8))
        with pytest.raises(errors.OutputSizeError):
            link.add_hook(SpectralNormalization(norm='operator', insize=5))
        link.add_hook(SpectralNormalization(norm='operator', insize=4))

    class Own(chainer.Link):

        def __init__(self, shape=None):
            super().__init__()
            with self.init_scope():
                self.W = chainer.Parameter(
                    chainer.initializers.Normal(), shape)

        def forward(self, x):
            return F.convolution_2d(x, self.W)

        def _initialize_params(self, n):
            self.W.initialize((4, n, 3, 3))

    def test_a_link_whose_map_is_unknown(self):
        link = self.Own((4, 3, 3, 3))
        with pytest.raises(errors.UnknownMapError, match='Own'):
            link.add_hook(SpectralNormalization(norm='operator'))
        assert not link.local_link_hooks
        matrix = self.Own((4, 3)).add_hook(
            SpectralNormalization(norm='operator'))
        assert matrix.W_u.shape == (4,)

    def test_a_lazy_link_whose_map_is_unknown(self):
        link = self.Own().add_hook(SpectralNormalization(norm='operator'))
        with pytest.raises(errors.UnknownMapError, match='Own'):
            link(batch((3, 5, 5)))

    def test_another_weight_of_a_convolution(self):
        link = L.Convolution2D(3, 4, 3)
        with link.init_scope():
            link.V = chainer.Parameter(np.ones((4, 3, 3, 3), 'f'))
        with pytest.raises(errors.UnknownMapError, match='V'):
            link.add_hook(SpectralNormalization(
                norm='operator', weight_name='V'))

    @pytest.mark.parametrize('first', [
        SpectralNormalization(name='first'),
        SpectralNormalization(name='first', norm='operator'),
        link_hooks.SpectralNormalization(name='first')])
    @pytest.mark.parametrize('norm', ['matrix', 'operator'])
    def test_another_hook(self, first, norm):
        link = L.Convolution2D(3, 4, 3).add_hook(first)
        link(batch((3, 5, 5)))
        with pytest.raises(errors.HookCollisionError, match='W'):
            link.add_hook(SpectralNormalization(norm=norm))
        assert list(link.local_link_hooks) == ['first']

    def test_a_name_that_is_taken(self):
        link = L.Convolution2D(3, 4, 3)
        link.W_map = 1
        with pytest.raises(errors.HookCollisionError, match='W_map'):
            link.add_hook(SpectralNormalization(norm='operator'))
        assert link.W_map == 1


def test_settings_are_printed():
    assert repr(SpectralNormalization(norm='operator', insize=(4, 5))) == (
        "SpectralNormalization(n_power_iteration=1, norm='operator', "
        'insize=(4, 5))')


class TestGamma:

    @each
    @pytest.mark.parametrize('lazy', [False, True])
    def test_it_starts_as_the_norm_of_the_map(self, name, lazy):
        link, shape = make(name, lazy, use_gamma=True)
        assert link.gamma.array is None
        link(batch(shape))
        assert float(link.gamma.array) == pytest.approx(
            norm_of(link, shape), rel=1e-5)

    def test_with_a_size_it_is_there_at_once(self):
        link = conv(use_gamma=True, insize=6)
        assert float(link.gamma.array) == pytest.approx(
            norm_of(link, (3, 6, 6)), rel=1e-5)

    def test_behind_another_hook_it_starts_as_the_norm_of_the_parameter(self):
        """As without an array, and as with a size that is given."""
        link = conv(use_gamma=True)
        link.add_hook(link_hooks.WeightStandardization())
        link.local_link_hooks.move_to_end('WeightStandardization', last=False)
        link(batch((3, 5, 5)))
        assert link.gamma.array == pytest.approx(
            norm_of(link, (3, 5, 5)), rel=1e-5)

    def test_it_is_made_anew_for_another_weight(self):
        link = conv(use_gamma=True, n_warmup=500)
        link(batch((3, 5, 5)))
        link.W.array *= 3
        link(batch((3, 5, 5)))
        assert float(link.gamma.array) == pytest.approx(
            norm_of(link, (3, 5, 5)), rel=1e-2)

    def test_a_loaded_one_stays(self):
        source, link = conv(use_gamma=True), conv(use_gamma=True)
        source(batch((3, 5, 5)))
        source.gamma.array[...] = 7
        stored(source, link)
        link(batch((3, 5, 5)))
        assert float(link.gamma.array) == 7

    def test_training_moves_it(self):
        link = conv(use_gamma=True)
        optimizer = chainer.optimizers.SGD(.1).setup(link)
        x = batch((3, 5, 5))
        for _ in range(3):
            optimizer.update(lambda: F.sum(link(x) ** 2))
        assert float(link.gamma.array) != pytest.approx(
            float(link.gamma.initializer.value))


def stored(source, target, save=serializers.save_npz,
           load=serializers.load_npz):
    file = io.BytesIO()
    save(file, source)
    file.seek(0)
    load(file, target)


class TestState:

    @pytest.mark.parametrize('n_vectors', [1, 3])
    @pytest.mark.parametrize('lazy', [False, True])
    @pytest.mark.parametrize('called', [False, True])
    def test_a_snapshot_brings_its_size(self, n_vectors, lazy, called):
        source = conv(n_vectors=n_vectors)
        source(batch((3, 5, 4)))
        link = conv(None if lazy else 3, n_vectors=n_vectors)
        if called:
            link(batch((3, 6, 6)))
        stored(source, link)
        x = batch((3, 6, 6))
        for train in (False, True, True):
            with chainer.using_config('train', train):
                np.testing.assert_array_equal(link(x).array, source(x).array)
        np.testing.assert_array_equal(link.W_map, source.W_map)
        assert link.W_map.shape == (3, 5, 4)

    def test_a_snapshot_brings_its_size_in_spite_of_insize(self):
        source, link = conv(), conv(insize=6)
        source(batch((3, 5, 4)))
        stored(source, link)
        link(batch((3, 6, 6)))
        assert link.W_map.shape == (3, 5, 4)

    def test_a_snapshot_before_the_first_call(self):
        source, link = conv(), conv()
        stored(source, link)
        assert link.W_map is None
        link(batch((3, 6, 6)))
        stored(source, link)
        assert link.W_map is None

    @pytest.mark.parametrize('hook', [
        SpectralNormalization(), link_hooks.SpectralNormalization(),
        SpectralNormalization(n_vectors=2)])
    @pytest.mark.parametrize('n_vectors', [1, 2])
    def test_a_snapshot_of_the_matrix_norm(self, hook, n_vectors):
        source = L.Convolution2D(3, 4, 3, pad=1).add_hook(hook)
        source(batch((3, 5, 5)))
        link = conv(n_vectors=n_vectors)
        link(batch((3, 5, 5)))
        stored(source, link)
        np.testing.assert_array_equal(link.W.array, source.W.array)
        assert link.W_map is None
        link(batch((3, 4, 4)))
        assert link.W_map.shape == (3, 4, 4)

    @pytest.mark.parametrize('n_vectors', [1, 2])
    @pytest.mark.parametrize('clone', [
        copy.deepcopy, lambda link: pickle.loads(pickle.dumps(link))],
        ids=['deepcopy', 'pickle'])
    def test_copies(self, clone, n_vectors):
        link = conv(n_vectors=n_vectors, use_gamma=True)
        x = batch((3, 5, 5))
        link(x)
        twin = clone(link)
        expected = link.W_map.copy()
        with chainer.using_config('train', False):
            np.testing.assert_array_equal(twin(x).array, link(x).array)
        twin(x)
        np.testing.assert_array_equal(link.W_map, expected)
        assert (twin.W_map != expected).any()

    def test_copies_with_new_weights(self):
        model = chainer.Sequential(conv(use_gamma=True))
        model(batch((3, 5, 5)))
        link = model[0].copy('init')
        link(batch((3, 5, 5)))
        repeated = chainer.Sequential(conv(4, 4)).repeat(2)
        repeated(batch((4, 5, 5)))
        assert [link[0].W_map.shape for link in repeated] == [(4, 5, 5)] * 2

    @pytest.mark.parametrize('n_vectors', [1, 2])
    def test_stays_in_test_mode(self, n_vectors):
        link = conv(n_vectors=n_vectors)
        x = batch((3, 5, 5))
        link(x)
        before = link.W_map.copy()
        with chainer.using_config('train', False):
            link(x)
        np.testing.assert_array_equal(link.W_map, before)
        link(x)
        assert (link.W_map != before).any()

    def test_is_moved_in_place(self):
        """Links may share it, and copies of a batch on one device do."""
        link = conv(n_vectors=3)
        link(batch((3, 5, 5)))
        arrays = link.W_map, link.W_maps
        link(batch((3, 5, 5)))
        assert (link.W_map, link.W_maps) == arrays

    @pytest.mark.parametrize('n_vectors', [1, 2])
    def test_one_in_another_order_of_memory(self, n_vectors):
        link = conv(n_vectors=n_vectors)
        link(batch((3, 5, 5)))
        link.W_map = np.asfortranarray(link.W_map)
        before = link.W_map.copy()
        link(batch((3, 5, 5)))
        assert (link.W_map != before).any()

    def test_is_brought_to_another_weight(self):
        link = conv(n_warmup=500)
        x = batch((3, 5, 5))
        link(x)
        link.W.array[...] = np.random.normal(size=link.W.shape)
        with chainer.using_config('train', False):
            Y = normalized(link)
        assert norm_of(link, (3, 5, 5), Y) == pytest.approx(1, abs=.05)

    def test_two_dtypes(self):
        link = conv()
        link(batch((3, 5, 5)))
        link.W.array = link.W.array.astype('d')
        link.b.array = link.b.array.astype('d')
        link(batch((3, 5, 5), dtype='d'))
        assert link.W_map.dtype == 'd'

    def test_float16(self):
        with chainer.using_config('dtype', np.float16):
            link = conv(rtol=1e-2, max_iterations=1000)
            x = batch((3, 5, 5), dtype='e')
            y = link(x)
            assert y.dtype == link.W_map.dtype == 'e'
            F.sum(y).backward()
            assert norm_of(link, (3, 5, 5), normalized(
                link)) == pytest.approx(1, abs=1e-2)

    @each
    @pytest.mark.parametrize('peak', [1e38, 1e-36])
    @pytest.mark.parametrize('settings', [
        {}, {'n_vectors': 2}, {'rtol': .1}], ids=str)
    def test_a_weight_at_the_end_of_the_range(self, name, peak, settings):
        """It is computed as one of usual size, in double precision."""
        link, shape = make(name, eps=1e-45, **settings)
        twin = copy.deepcopy(link)
        for param in twin.params():
            param.array = param.array.astype('d')
        scale = peak / abs(twin.W.array).max()
        link.W.array[...] = twin.W.array * scale
        x, Ys = batch(shape), []
        for one, dtype in ((link, 'f'), (twin, 'd')):
            np.random.seed(3)
            for _ in range(3):
                one.cleargrads()
                y = one(x.astype(dtype))
            y.grad = np.random.normal(size=y.shape).astype(dtype)
            y.backward()
            with chainer.using_config('train', False):
                Ys.append(normalized(one))
        np.testing.assert_allclose(*Ys, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(
            link.W.grad.astype('d') * scale, twin.W.grad, rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize('train', [False, True])
    @pytest.mark.parametrize('n_vectors', [1, 2])
    def test_forget(self, train, n_vectors):
        """The second run starts from the map of the first one."""
        x = chainer.Variable(batch((3, 5, 5)))
        grads = []
        link = conv(n_vectors=n_vectors)
        link(x)
        for call in (lambda link: F.forget(link, x), lambda link: link(x)):
            twin = copy.deepcopy(link)
            with chainer.using_config('train', train):
                y = F.sum(call(twin) ** 2)
                twin(batch((3, 5, 5)))
                twin.cleargrads()
                y.backward()
            grads.append(twin.W.grad)
        np.testing.assert_allclose(*grads, rtol=1e-4, atol=1e-5)

    def test_a_start_of_another_size_is_not_used_again(self):
        link = conv()
        link(batch((3, 5, 5)))
        link.W_map = batch((3, 4, 4), 1)[0]
        with chainer.using_config('in_recomputing', True):
            link(batch((3, 5, 5)))
        assert link.W_map.shape == (3, 4, 4)

    def test_a_start_of_another_size_is_not_used_by_forget(self):
        link = conv()
        x = chainer.Variable(batch((3, 5, 5)))
        y = F.sum(F.forget(link, x))
        link.W_map = batch((3, 4, 4), 1)[0]
        y.backward()
        assert link.W.grad is not None
        assert link.W_map.shape == (3, 4, 4)

    def test_threads(self):
        link = conv()
        x = batch((3, 5, 5))
        twin = copy.deepcopy(link)
        np.random.seed(3)
        twin(x)
        np.random.seed(3)
        threads = [threading.Thread(target=link, args=(x,))
                   for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for _ in range(3):
            twin(x)
        np.testing.assert_allclose(link.W_map, twin.W_map, rtol=1e-4)


class Model(chainer.Chain):

    def __init__(self, n=3):
        super().__init__()
        with self.init_scope():
            self.a = L.Convolution2D(n, 4, 3, pad=1)
            self.b = L.DepthwiseConvolution2D(4, 2, 3, stride=2)
            self.c = L.Linear(None, 2)

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.c(F.relu(self.b(h)))


class TestModels:

    def test_of_a_chain(self):
        model = Model().add_hook(ChainSpectralNormalization(
            norm='operator', rtol=1e-3, n_vectors=2))
        x = batch((3, 7, 7))
        for _ in range(4):
            model(x)
        assert model.a.W_map.shape == (3, 7, 7)
        assert model.b.W_map.shape == (4, 7, 7)
        assert model.c.W_u.shape == (2,)
        for link, shape in ((model.a, (3, 7, 7)), (model.b, (4, 7, 7))):
            hook, = link.local_link_hooks.values()
            Y = hook.normalize_weight(link).array
            assert norm_of(link, shape, Y) == pytest.approx(1, rel=1e-3)
        model.delete_hook('ChainSpectralNormalization')
        assert not hasattr(model.a, 'W_map')

    @pytest.mark.parametrize('lazy', [False, True])
    def test_a_chain_is_as_a_hook_on_each_link(self, lazy):
        models = Model(None if lazy else 3), Model(None if lazy else 3)
        models[0].add_hook(ChainSpectralNormalization(norm='operator'))
        for link in models[1].children():
            link.add_hook(SpectralNormalization(norm='operator'))
        x = batch((3, 7, 7))
        models[0](x)
        models[1](x)
        stored(*models)
        for _ in range(3):
            np.testing.assert_allclose(
                models[0](x).array, models[1](x).array, rtol=1e-4, atol=1e-6)
        for a, b in zip(models[0].links(), models[1].links()):
            for name in vector_names(a):
                np.testing.assert_allclose(
                    getattr(a, name), getattr(b, name), rtol=1e-3, atol=1e-5)

    def test_a_scope_leaves_out_what_has_no_size_yet(self):
        model = Model().add_hook(
            ChainSpectralNormalization(norm='operator', insize=None))
        with cached(model):
            model.a(batch((3, 7, 7)))
            assert model.b.W_map is None
            y = model(batch((3, 7, 7)))
            again = model(batch((3, 7, 7)))
        assert model.b.W_map.shape == (4, 7, 7)
        F.sum(y + again).backward()
        assert model.b.W.grad.any()

    def test_a_scope_moves_the_map_once(self):
        model = Model().add_hook(ChainSpectralNormalization(norm='operator'))
        x = batch((3, 7, 7))
        model(x)
        twin = copy.deepcopy(model)
        with cached(model):
            model(x)
            model(x)
        twin(x)
        for name in ('a', 'b'):
            np.testing.assert_allclose(
                model[name].W_map, twin[name].W_map, rtol=1e-5, atol=1e-6)

    def test_a_scope_goes_on_after_a_map_of_another_size_is_loaded(self):
        link = conv()
        link(batch((3, 5, 5)))
        with cached(link):
            with chainer.no_backprop_mode():
                link(batch((3, 5, 5)))
            link.W_map = batch((3, 4, 4), 1)[0]
            F.sum(link(batch((3, 5, 5)))).backward()
        assert link.W_map.shape == (3, 4, 4)

    def test_v_in_a_scope_has_the_size_of_its_map(self):
        link = conv()
        with cached(link):
            link(batch((3, 5, 5)))
            link.W_map = batch((3, 4, 4), 1)[0]
            link(batch((3, 5, 5)))
            assert hook_of(link).v.shape == (4, 5, 5)
        link.W_map = batch((3, 4, 4), 1)[0]
        link(batch((3, 5, 5)))
        assert hook_of(link).v.shape == (4, 4, 4)

    def test_summary(self):
        model = Model().add_hook(ChainSpectralNormalization(
            lambda path, link: path != '/b', norm='operator'))
        statuses = {row.path: row.status for row in summary(model).rows}
        assert statuses['/a/W'] == statuses['/c/W'] == 'normalized'
        assert statuses['/b/W'] == 'filtered out'

    def test_bake(self):
        model = Model().add_hook(ChainSpectralNormalization(
            norm='operator', rtol=1e-2))
        x = batch((3, 7, 7))
        model(x)
        with chainer.using_config('train', False):
            y = model(x).array
        baked = bake(model)
        assert not hasattr(baked.a, 'W_map')
        assert hasattr(model.a, 'W_map')
        np.testing.assert_array_equal(baked(x).array, y)

    def test_bake_needs_the_size(self):
        with pytest.raises(errors.UnknownInputSizeError, match='/0'):
            bake(chainer.Sequential(conv()))
        assert bake(conv(insize=6)).W.shape == (4, 3, 3, 3)

    @pytest.mark.parametrize('n_vectors', [1, 4])
    @each
    def test_refresh(self, name, n_vectors):
        link, shape = make(name, n_vectors=n_vectors, n_warmup=0)
        refresh(link)
        assert link.W_map is None
        link(batch(shape))
        link.W.array[...] = np.random.normal(size=link.W.shape)
        refresh(link)
        with chainer.using_config('train', False):
            assert norm_of(link, shape, normalized(link)) == pytest.approx(
                1, rel=1e-6)
        assert link.W_map.shape == shape

    def test_refresh_of_a_size_that_is_given(self):
        link = conv(insize=(5, 4), use_gamma=True)
        link.W_map = None
        link.W.array *= 2
        refresh(link, gamma=True)
        assert link.W_map.shape == (3, 5, 4)
        assert float(link.gamma.array) == pytest.approx(
            norm_of(link, (3, 5, 4)), rel=1e-5)

    @pytest.mark.parametrize('n_vectors', [1, 2])
    def test_refresh_of_a_zero_group(self, n_vectors):
        link, _ = make('depthwise', n_vectors=n_vectors, insize=4)
        link.W.array[:, 0] = 0
        refresh(link)
        np.testing.assert_allclose(
            np.linalg.norm(link.W_map.reshape(3, -1), axis=1), 1, rtol=1e-5)

    def test_refresh_warns_of_nan(self):
        link = conv(insize=5)
        link.W.array[0] = np.nan
        with pytest.warns(errors.SpectralNormalizationWarning,
                          match='W_map was left'):
            refresh(link)

    @pytest.mark.parametrize('n_vectors', [1, 3])
    def test_report(self, n_vectors):
        model = Model().add_hook(ChainSpectralNormalization(
            norm='operator', n_vectors=n_vectors, rtol=1e-4,
            max_iterations=2000))
        report = extensions.SpectralNormReport(model, true_sigma=True)
        assert report.measure() == []
        model(batch((3, 7, 7)))
        layers = {layer.name: layer for layer in report.measure()}
        for name, shape in (('a', (3, 7, 7)), ('b', (4, 7, 7))):
            expected = norm_of(model[name], shape)
            layer = layers[name]
            assert layer.true_sigma == pytest.approx(expected, rel=1e-6)
            assert layer.sigma == pytest.approx(expected, rel=1e-4)
            assert layer.norm == pytest.approx(1, rel=1e-4)
            assert layer.residual <= 1.1e-4

    @pytest.mark.gpu
    @pytest.mark.parametrize('n_vectors', [1, 2])
    def test_on_a_device(self, n_vectors):
        link = conv(n_vectors=n_vectors, use_gamma=True, rtol=1e-3)
        x = batch((3, 5, 5))
        link(x)
        twin = copy.deepcopy(link)
        twin.to_device('@cupy:0')
        for _ in range(2):
            y, expected = twin(cuda.to_gpu(x)), link(x)
            np.testing.assert_allclose(
                cuda.to_cpu(y.array), expected.array, rtol=1e-3, atol=1e-4)
        assert isinstance(twin.W_map, cuda.ndarray)
        F.sum(y).backward()
        assert isinstance(twin.W.grad, cuda.ndarray)


def test_old_pickles():
    """A hook of an earlier version has no norm, and no size."""
    hook = SpectralNormalization()
    del hook.norm, hook.insize
    link = L.Convolution2D(3, 4, 3).add_hook(hook)
    link(batch((3, 5, 5)))
    assert link.W_u.shape == (4,)


def test_a_tolerance_that_is_not_reached():
    link = conv(rtol=1e-6, max_iterations=2)
    with pytest.warns(errors.ToleranceWarning):
        link(batch((3, 8, 8)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        link(batch((3, 8, 8)))
