"""The bound on a network, by the SVD of its Jacobians and of its maps."""
import sn_function  # isort: skip  # before chainer, which it repairs

import functools
from fractions import Fraction

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from sn_function import errors
from sn_function._monitoring import lipschitz
from tests import maps, reference

assert sn_function  # it is imported for what it does
partial = functools.partial

SIZE = 7  # of the images


def norm_of(link):
    """The norm of the map of images of this size, by the dense matrix."""
    if isinstance(link, (L.Linear, L.EmbedID)):
        return reference.true_norm(link.W.array)
    c_in = link.W.shape[1] * getattr(link, 'groups', 1)
    return np.linalg.norm(
        maps.dense(link, (c_in, SIZE, SIZE)), 2) * (1 + 1e-12)


def bound(model, **kwargs):
    return lipschitz.bound(
        model, lambda link: (0., norm_of(link)), **kwargs)


def unknown(model, **kwargs):
    with pytest.raises(errors.LipschitzError) as caught:
        bound(model, **kwargs)
    return str(caught.value)


def slope(function, x):
    """The norm of the Jacobian of a function of batches, at an input."""
    with chainer.using_config('train', False):
        n = function(x[None]).array.size
        xs = chainer.Variable(np.repeat(x[None], n, axis=0))
        y = function(xs)
        y.grad = np.eye(n).reshape(y.shape)
        y.backward()
    return np.linalg.norm(xs.grad.reshape(n, -1), 2)


def steepest(function, shape, n=5):
    """The largest slope at random inputs."""
    return max(slope(function, np.random.normal(size=shape))
               for _ in range(n))


@pytest.fixture(autouse=True)
def in_float64():
    with chainer.using_config('dtype', np.float64), \
            chainer.using_config('use_ideep', 'never'):
        yield


# Functions

IMAGE = 2, SIZE, SIZE


@pytest.mark.parametrize('function', [
    F.relu, F.leaky_relu, partial(F.leaky_relu, slope=-1.5), F.elu,
    partial(F.elu, alpha=.5), partial(F.elu, alpha=3.), F.selu, F.sigmoid,
    F.tanh, F.softplus, partial(F.softplus, beta=4.), F.relu6,
    F.clipped_relu, F.hard_sigmoid, F.absolute, F.identity,
    partial(F.dropout, ratio=.9), partial(F.reshape, shape=(-1, 7, 14)),
    partial(F.transpose, axes=(0, 2, 1, 3)),
    partial(F.max_pooling_2d, ksize=2),
    partial(F.max_pooling_2d, ksize=3, stride=1, pad=1),
    partial(F.max_pooling_2d, ksize=(3, 2), stride=(2, 2)),
    partial(F.average_pooling_2d, ksize=2),
    partial(F.average_pooling_2d, ksize=3, stride=1, pad=1),
    partial(F.average_pooling_2d, ksize=(4, 3), stride=(2, 2)),
    partial(F.unpooling_2d, ksize=2, cover_all=False),
    partial(F.unpooling_2d, ksize=3, stride=2, pad=1),
], ids=lambda f: getattr(f, '__name__', None) or (
    f'{f.func.__name__}-{f.keywords}'))
def test_function(function):
    """It holds, and comes close where the function does most."""
    constant = bound(chainer.Sequential(function))
    steep = steepest(function, IMAGE, 20)
    for x in 0, 1, -1e-9:
        steep = max(steep, slope(function, np.full(IMAGE, float(x))))
    assert steep <= constant * (1 + 1e-12)
    least = 0.19 if function is F.hard_sigmoid else 0.6
    assert steep >= least * constant


@pytest.mark.parametrize('ndim', [1, 3])
@pytest.mark.parametrize('arguments', [
    {'ksize': 2}, {'ksize': 3, 'stride': 2, 'pad': 1}])
@pytest.mark.parametrize('kind', ['max_pooling', 'average_pooling'])
def test_pooling_along_other_numbers_of_axes(kind, arguments, ndim):
    function = partial(getattr(F, f'{kind}_{ndim}d'), **arguments)
    steep = steepest(function, (1,) + (5,) * ndim)
    assert 0.4 < steep / bound(chainer.Sequential(function)) < 1 + 1e-12


def test_average_pooling_without_the_padding():
    """Windows that are cut off count more."""
    function = partial(
        F.average_pooling_1d, ksize=4, stride=1, pad=3, pad_value=None)
    steep = steepest(function, (1, 2), 1)
    assert 1.05 < steep < bound(chainer.Sequential(function)) == 2
    whole = partial(F.average_pooling_1d, ksize=4, pad_value=None)
    assert bound(chainer.Sequential(whole)) == 0.5


def test_pooling_that_is_exact():
    image = np.ones((1, 1, 8, 8))
    for function, expected in [
            (partial(F.average_pooling_2d, ksize=2), 0.5),
            (partial(F.unpooling_2d, ksize=2, cover_all=False), 2)]:
        assert bound(chainer.Sequential(function)) == expected
        assert np.linalg.norm(function(image).array) == pytest.approx(
            expected * np.linalg.norm(image))


def test_roots_are_rounded_up():
    for n in range(2, 100):
        value = bound(chainer.Sequential(
            partial(F.max_pooling_1d, ksize=n, stride=1)))
        assert Fraction(float(np.nextafter(value, 0))) ** 2 < n
        assert n <= Fraction(value) ** 2


# Networks

def network():
    return chainer.Sequential(
        L.Convolution2D(2, 4, 3, pad=1), F.leaky_relu,
        L.BatchNormalization(4), partial(F.max_pooling_2d, ksize=1),
        chainer.Sequential(
            L.Convolution2D(4, 4, 3, pad=1, groups=2), F.elu,
            L.BatchRenormalization(4, use_gamma=False)),
        partial(F.dropout, ratio=.5),
        L.DepthwiseConvolution2D(4, 1, 1),
        partial(F.average_pooling_2d, ksize=2), L.Linear(36, 3), F.sigmoid)


def test_network():
    for _ in range(3):
        model = network()
        for link in model.links():
            if hasattr(link, 'avg_var'):
                link.avg_var[...] = np.random.uniform(.1, 3, 4)
        model[2].gamma.array[...] = np.random.normal(size=4)
        steep = steepest(model, IMAGE)
        assert 0 < steep < bound(model)
        conv, _, bn, _, (conv2, _, bn2), _, depthwise, _, linear, _ = model
        factors = map(norm_of, (conv, conv2, depthwise, linear))
        assert bound(model) == pytest.approx(
            np.prod(list(factors)) * .5 / 4
            / np.sqrt(bn2.avg_var.min() + bn2.eps)
            * (abs(bn.gamma.array) / np.sqrt(bn.avg_var + bn.eps)).max())


def test_layers_in_a_row_that_share_their_singular_vectors():
    """The bound is what such a network does."""
    Q = np.linalg.qr(np.random.normal(size=(4, 4)))[0]
    model = chainer.ChainList(
        L.Linear(4, 4, initialW=Q @ np.diag([3, 1, 1, 1])),
        L.Linear(4, 4, initialW=np.diag([5, 1, 1, 1]) @ Q.T))
    assert bound(model) == pytest.approx(15)
    assert reference.true_norm(
        model[1].W.array @ model[0].W.array) == pytest.approx(15)


def test_a_link_that_is_called_twice_counts_twice():
    link = L.Linear(3, 3)
    norm = norm_of(link)
    assert bound(chainer.Sequential(link, F.relu, link)) == pytest.approx(
        norm ** 2)


@pytest.mark.parametrize('link', [
    L.BatchNormalization(3), L.BatchNormalization(3, use_gamma=False),
    L.BatchNormalization(3, dtype=np.float16), L.BatchRenormalization(3),
    L.BatchNormalization(3, axis=(0, 2, 3)),
], ids=str)
def test_batch_normalization(link):
    link.avg_var[...] = np.random.uniform(.01, 2, 3)
    if link.gamma is not None:
        link.gamma.array[...] = np.random.normal(size=3)
    with chainer.using_config('train', False):
        y0, y1 = (link(np.full((1, 3, 1, 1), x, link.avg_var.dtype)).array
                  for x in (0, 1))
    expected = abs(y1.astype('d') - y0.astype('d')).max()
    rtol = 1e-2 if link.avg_var.dtype == np.float16 else 1e-6
    assert bound(link) == pytest.approx(expected, rel=rtol)


def test_batch_normalization_is_rounded_up():
    for _ in range(100):
        link = L.BatchNormalization(3, eps=1e-5)
        link.avg_var[...] = np.random.uniform(size=3)
        link.gamma.array[...] = np.random.normal(size=3)
        largest = max(
            Fraction(gamma) ** 2 / (Fraction(var) + Fraction(link.eps))
            for gamma, var in zip(link.gamma.array.tolist(),
                                  link.avg_var.tolist()))
        squared = Fraction(bound(link)) ** 2
        assert largest < squared < largest * (1 + Fraction(1, 10 ** 14))


def test_it_is_rounded_up_once():
    norms = np.random.uniform(.5, 2, 50).tolist()
    exact = np.prod(list(map(Fraction, norms)))
    model = chainer.Sequential(*[L.Linear(1, 1) for _ in norms])
    links = dict(zip(map(id, model), norms))
    value = lipschitz.bound(model, lambda link: (0., links[id(link)]))
    assert exact <= Fraction(value)
    assert Fraction(float(np.nextafter(value, 0))) < exact
    assert lipschitz.bound(model, lambda link: (1., 1.)) == 1


@pytest.mark.parametrize(('norm', 'expected'), [
    (np.nan, np.nan), (np.inf, np.inf), (0., 0.), (1e200, np.inf),
    (1e-200, np.nextafter(0, 1))])
def test_extremes(norm, expected):
    model = chainer.Sequential(
        L.Linear(1, 1), partial(F.average_pooling_2d, ksize=2),
        L.Linear(1, 1))
    np.testing.assert_equal(
        lipschitz.bound(model, lambda link: (0., norm)), expected)


# Residual sums

class Block(chainer.Chain):
    """x + f(x), or shortcut(x) + f(x)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(n_in, n_in, 3, pad=1)
            self.conv2 = L.Convolution2D(n_in, n_out, 3, pad=1)
            if n_in != n_out:
                self.shortcut = L.Convolution2D(n_in, n_out, 1)

    def forward(self, x):
        h = self.conv2(F.relu(self.conv1(F.relu(x))))
        return h + (self.shortcut(x) if hasattr(self, 'shortcut') else x)


class Residual(chainer.Sequential):

    def forward(self, x):
        return x + super().forward(x)


def test_residual_sums():
    model = chainer.Sequential(Block(2, 4), Block(4, 4))
    value = bound(model, residual={Block: 'shortcut'})
    first, second = model
    assert value == pytest.approx(
        (norm_of(first.conv1) * norm_of(first.conv2)
         + norm_of(first.shortcut))
        * (norm_of(second.conv1) * norm_of(second.conv2) + 1))
    assert 0 < steepest(model, IMAGE) < value
    # A pattern of paths takes their links, too, which are no chains.
    assert bound(model, residual={'/[01]*': 'shortcut'}) == value
    # The others are still in a row.
    assert bound(model, residual={'/0': 'short*'}) == pytest.approx(
        value / (norm_of(second.conv1) * norm_of(second.conv2) + 1)
        * norm_of(second.conv1) * norm_of(second.conv2))


@pytest.mark.parametrize('residual', [
    '/1', Residual, ['/nothing', lambda path, link: path == '/1'],
    {'/nothing': '*', ('/1',): None}],
    ids=['pattern', 'class', 'list', 'dictionary'])
def test_a_residual_sequence(residual):
    conv = L.Convolution2D(2, 2, 3, pad=1)
    model = chainer.Sequential(
        L.Convolution2D(2, 2, 1),
        Residual(conv, F.relu, partial(F.leaky_relu, slope=2.)))
    value = bound(model, residual=residual)
    assert value == pytest.approx(
        norm_of(model[0]) * (1 + 2 * norm_of(conv)))
    assert steepest(model, IMAGE) < value


def test_an_identity_is_exact():
    """Where both branches have one singular vector, the bound is reached."""
    model = Residual(L.Linear(3, 3, nobias=True, initialW=2 * np.eye(3)))
    assert bound(model, residual=Residual) == pytest.approx(3)
    assert steepest(model, (3,)) == pytest.approx(3)


@pytest.mark.parametrize(('residual', 'error'), [
    (3, errors.FilterError), ({3: None}, errors.FilterError),
    ({Block: 3}, errors.ShortcutError),
    ({Block: ['a', 'b']}, errors.ShortcutError)])
def test_what_names_no_residual_sum(residual, error):
    with pytest.raises(error):
        sn_function.extensions.SpectralNormReport(
            Block(2, 2), residual=residual)


# What is not understood

class Scaled(L.Linear):

    def forward(self, x):
        return 2 * super().forward(x)


class Called(L.Linear):

    def __call__(self, x):
        return 2 * self.forward(x)


class OfItsOwn(chainer.Chain):

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.a = L.Linear(3, 3)
            self.gain = chainer.Parameter(np.ones(3))


class OnlyOfChildren(chainer.Chain):

    def __init__(self):
        super().__init__(a=L.Linear(3, 3), b=L.Linear(3, 3))


def standardized():
    return L.Convolution2D(2, 2, 3).add_hook(
        chainer.link_hooks.WeightStandardization())


@pytest.mark.parametrize(('make', 'name'), [
    (lambda: L.LayerNormalization(3), 'LayerNormalization /1'),
    (lambda: L.Bilinear(3, 3, 3), 'Bilinear /1'),
    (lambda: L.LSTM(3, 3), 'LSTM /1'),
    (lambda: L.NStepLSTM(1, 3, 3, 0.), 'NStepLSTM /1'),
    (lambda: L.Inception(3, 3, 3, 3, 3, 3, 3), 'Inception /1'),
    (lambda: L.Scale(W_shape=(3,)), 'Scale /1'),
    (lambda: Scaled(3, 3), 'Scaled /1'),
    (lambda: Called(3, 3), 'Called /1'),
    (OfItsOwn, 'OfItsOwn /1'),
    (standardized, 'Convolution2D /1'),
    (lambda: L.EmbedID(3, 3), 'EmbedID /1'),
    (lambda: chainer.Sequential(L.Scale(W_shape=(3,))), 'Scale /1/0'),
    (lambda: lambda x: x, '<lambda> (layer 1 of /)'),
    (lambda: F.swish, 'swish (layer 1 of /)'),
    (lambda: partial(F.log_softmax, axis=1),
     'functools.partial(<function log_softmax'),
    (lambda: partial(F.leaky_relu, 3.), 'functools.partial(<function leaky'),
    (lambda: abs, 'abs (layer 1 of /)'),
    (lambda: chainer.Sequential(lambda x: x), '<lambda> (layer 0 of /1)'),
])
def test_it_is_named(make, name):
    text = unknown(chainer.Sequential(L.Linear(3, 3), make(), F.relu))
    assert name in text.replace(' at 0x', ' ')
    assert 'Linear /0' not in text
    assert 'relu (' not in text


def test_several_are_named_together():
    text = unknown(chainer.Sequential(
        L.Scale(W_shape=(3,)), L.Bilinear(3, 3, 3)))
    assert 'Scale /0, Bilinear /1' in text


def test_an_own_parameter_of_a_residual_sum():
    assert 'OfItsOwn /' in unknown(OfItsOwn(), residual=OfItsOwn)


def test_links_of_users():
    """Without parameters of their own, they are the row of their parts."""
    link = OnlyOfChildren()
    expected = norm_of(link.a) * norm_of(link.b)
    assert bound(link) == pytest.approx(expected)
    assert bound(chainer.Sequential(chainer.Link(), link)) == bound(link)


def test_an_embedding_comes_first():
    embed = L.EmbedID(3, 2)
    linear = L.Linear(2, 2)
    assert bound(chainer.Sequential(embed, linear)) == pytest.approx(
        norm_of(embed) * norm_of(linear))


@pytest.mark.parametrize('make', [
    lambda: L.Linear(None, 3), lambda: L.BatchNormalization(axis=0),
    lambda: L.BatchNormalization(axis=0, use_gamma=False, use_beta=False)])
def test_what_is_not_initialized(make):
    with pytest.raises(errors.UninitializedWeightError):
        bound(chainer.Sequential(L.Linear(3, 3), make()))
