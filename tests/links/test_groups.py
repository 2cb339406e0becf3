"""The hook on grouped and depthwise convolutions, with `groups='each'`."""
import copy
import pickle

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import serializers

import sn_function
from sn_function import SpectralNormalization, errors, extensions
from sn_function._links.weight import groups_of
from tests import reference

# A link, a batch for it, and its groups as matrices, out of a weight.
LINKS = {
    'Convolution2D, 2': (
        lambda: L.Convolution2D(4, 6, 3, groups=2), (2, 4, 5, 5),
        lambda W: W.reshape(2, 3, -1)),
    'Convolution2D, 4': (
        lambda: L.Convolution2D(8, 16, 3, groups=4), (2, 8, 5, 5),
        lambda W: W.reshape(4, 4, -1)),
    'Convolution2D, 16': (
        lambda: L.Convolution2D(16, 16, 3, groups=16), (2, 16, 5, 5),
        lambda W: W.reshape(16, 1, -1)),
    'Deconvolution2D': (
        lambda: L.Deconvolution2D(6, 4, 3, groups=2), (2, 6, 4, 4),
        lambda W: np.moveaxis(W.reshape(2, 3, 2, 9), 2, 1).reshape(2, 2, -1)),
    'ConvolutionND': (
        lambda: L.ConvolutionND(3, 4, 6, 2, groups=2), (2, 4, 3, 3, 3),
        lambda W: W.reshape(2, 3, -1)),
    'DeconvolutionND': (
        lambda: L.DeconvolutionND(1, 6, 9, 3, groups=3), (2, 6, 4),
        lambda W: np.moveaxis(W.reshape(3, 2, 3, 3), 2, 1).reshape(3, 3, -1)),
    'DepthwiseConvolution2D': (
        lambda: L.DepthwiseConvolution2D(5, 2, 3), (2, 5, 5, 5),
        lambda W: np.moveaxis(W, 1, 0).reshape(5, 2, -1)),
    'DepthwiseConvolution2D, 1': (
        lambda: L.DepthwiseConvolution2D(5, 1, 3), (2, 5, 5, 5),
        lambda W: np.moveaxis(W, 1, 0).reshape(5, 1, -1)),
}

each = pytest.mark.parametrize('name', LINKS)


def hook_of(link):
    return link.local_link_hooks['SpectralNormalization']


def make(name, **settings):
    make_link, shape, matrices = LINKS[name]
    link = make_link()
    for i, part in enumerate(matrices(link.W.array)):
        part *= 1 + i / 3  # where it is a view
    link.add_hook(SpectralNormalization(groups='each', **settings))
    return link, np.random.normal(size=shape).astype('f'), matrices


def norms(matrices):
    return [reference.true_norm(matrix) for matrix in matrices]


@each
def test_the_groups_are_those_of_the_convolution(name):
    """Zeros in one of them leave all channels but those of one group."""
    link, x, matrices = make(name)
    W = link.W.array
    G = len(matrices(W))
    split = groups_of(link, hook_of(link)).split(W, hook_of(link).axis)
    assert split.shape[:1] == (G,)
    link.delete_hook('SpectralNormalization')
    for g in range(G):
        before = link(x).array
        kept = split[g].copy()
        split[g] = 0
        changed = (link(x).array != before).any(axis=(0, *range(2, x.ndim)))
        split[g] = kept
        np.testing.assert_array_equal(
            np.flatnonzero(changed) * G // len(changed), g)


@each
def test_the_largest_group_gets_the_norm_1(name):
    link, x, matrices = make(name, n_power_iteration=200)
    expected = max(norms(matrices(link.W.array)))
    link(x)
    Y = hook_of(link).normalize_weight(link).array
    np.testing.assert_allclose(max(norms(matrices(Y))), 1, rtol=1e-5)
    np.testing.assert_allclose(Y, link.W.array / expected, rtol=1e-5)
    assert link.W_u.shape == (matrices(Y).shape[0] * matrices(Y).shape[1],)
    assert hook_of(link).v.shape == (
        matrices(Y).shape[0] * matrices(Y).shape[2],)


@each
def test_gradients_are_those_of_finite_differences(name):
    link, x, _ = make(name, use_gamma=True, factor=0.7, n_warmup=0)
    link.to_device('@numpy')
    link.W.array = link.W.array.astype('d')
    link.b.array = link.b.array.astype('d')
    link.W_u = np.random.normal(size=link.W_u.shape)
    link.gamma.array = np.array(1.3)
    x = x.astype('d')

    def loss():
        return F.sum(F.sin(link(x)))

    with chainer.using_config('train', False):
        link.cleargrads()
        loss().backward()
        for parameter in (link.W, link.gamma):
            direction = np.random.normal(size=parameter.shape)
            start = parameter.array
            values = []
            for step in (1e-6, -1e-6):
                parameter.array = np.asarray(start + step * direction)
                values.append(float(loss().array))
            parameter.array = start
            np.testing.assert_allclose(
                (parameter.grad * direction).sum(),
                (values[0] - values[1]) / 2e-6, rtol=1e-6)


@each
def test_gamma_starts_as_the_norm_of_the_largest_group(name):
    link, _, matrices = make(name, use_gamma=True)
    np.testing.assert_allclose(
        link.gamma.array, max(norms(matrices(link.W.array))), rtol=1e-5)


@each
def test_a_lazy_link(name):
    make_link, shape, matrices = LINKS[name]
    link = make_link()
    initializer = link.W.array.copy()
    lazy = type(link)(**_lazy_arguments(link, name))
    lazy.W.initializer = chainer.initializers.Constant(initializer)
    lazy.add_hook(SpectralNormalization(
        groups='each', use_gamma=True, n_power_iteration=100))
    assert lazy.W_u is None
    lazy(np.random.normal(size=shape).astype('f'))
    np.testing.assert_array_equal(lazy.W.array, initializer)
    np.testing.assert_allclose(
        lazy.gamma.array, max(norms(matrices(initializer))), rtol=1e-5)
    Y = hook_of(lazy).normalize_weight(lazy).array
    np.testing.assert_allclose(Y, initializer, rtol=1e-4)


def _lazy_arguments(link, name):
    arguments = {'in_channels': None, 'ksize': link.ksize}
    if isinstance(link, L.DepthwiseConvolution2D):
        return dict(arguments, channel_multiplier=link.channel_multiplier)
    arguments.update(out_channels=link.out_channels, groups=link.groups)
    if name.endswith('ND'):
        arguments['ndim'] = len(link.W.shape) - 2
    return arguments


@pytest.mark.parametrize('make_link', [
    lambda: L.Linear(4, 3), lambda: L.EmbedID(4, 3),
    lambda: L.Convolution2D(4, 6, 3), lambda: L.Deconvolution2D(4, 6, 3),
    lambda: L.DilatedConvolution2D(4, 6, 3)])
def test_links_without_groups_are_the_same_to_the_last_bit(make_link):
    link = make_link()
    Ys = []
    for groups in (None, 'each'):
        np.random.seed(1)
        twin = copy.deepcopy(link)
        twin.add_hook(SpectralNormalization(groups=groups, use_gamma=True))
        Ys += [hook_of(twin).normalize_weight(twin).array for _ in range(2)]
    np.testing.assert_array_equal(Ys[:2], Ys[2:])


def test_the_groups_are_those_of_W_only():
    class Link(L.Convolution2D):
        def __init__(self):
            super().__init__(4, 6, 3, groups=2)
            with self.init_scope():
                self.H = chainer.Parameter(np.diag([3., 2, 1]).astype('f'))

    link = Link().add_hook(SpectralNormalization(
        weight_name='H', groups='each', n_warmup=50))
    Y = hook_of(link).normalize_weight(link).array
    np.testing.assert_allclose(Y, link.H.array / 3, rtol=1e-5)


@each
def test_report(name):
    """It warns of nothing, and the norm of the layer is 1."""
    link, x, matrices = make(name, n_power_iteration=100)
    model = chainer.Sequential(link)
    model(x)
    layer, = extensions.SpectralNormReport(model, true_sigma=True).measure()
    expected = max(norms(matrices(link.W.array)))
    np.testing.assert_allclose(layer.true_sigma, expected, rtol=1e-6)
    np.testing.assert_allclose(layer.sigma, expected, rtol=1e-5)
    np.testing.assert_allclose(layer.norm, 1, rtol=1e-5)
    assert layer.residual < 1e-2


@each
def test_the_residual_is_that_of_the_largest_group(name):
    link, _, matrices = make(name, n_warmup=0)
    layer, = extensions.SpectralNormReport(
        chainer.Sequential(link)).measure()
    vectors = np.split(link.W_u.astype('d'), len(matrices(link.W.array)))
    found = []
    for A, u in zip(matrices(link.W.array).astype('d'), vectors):
        u, v, sigma = reference.power_iteration(A, u)
        found.append((sigma, np.linalg.norm(A.T @ u - sigma * v) / sigma))
    np.testing.assert_allclose(
        (layer.sigma, layer.residual), max(found), rtol=1e-4, atol=1e-6)


@each
def test_copies_and_files_go_on_with_the_same_numbers(name, tmp_path):
    link, x, _ = make(name, n_warmup=2)
    link(x)
    serializers.save_npz(tmp_path / 'link.npz', link)
    loaded = LINKS[name][0]().add_hook(SpectralNormalization(groups='each'))
    serializers.load_npz(tmp_path / 'link.npz', loaded)
    others = [loaded, copy.deepcopy(link), pickle.loads(pickle.dumps(link))]
    for _ in range(2):
        expected = link(x).array
        for other in others:
            np.testing.assert_array_equal(other(x).array, expected)
            np.testing.assert_array_equal(other.W_u, link.W_u)


@pytest.mark.parametrize('groups', [None, 'each'])
def test_a_snapshot_of_the_other_setting(groups, tmp_path):
    """For a convolution both vectors have the same length."""
    other = 'each' if groups is None else None
    link = L.Convolution2D(4, 6, 3, groups=2).add_hook(
        SpectralNormalization(groups=other))
    serializers.save_npz(tmp_path / 'link.npz', link)
    link = L.Convolution2D(4, 6, 3, groups=2).add_hook(
        SpectralNormalization(groups=groups, n_power_iteration=200))
    serializers.load_npz(tmp_path / 'link.npz', link)
    W = link.W.array
    expected = max(norms(W.reshape(1 if groups is None else 2, -1, 18)))
    np.testing.assert_allclose(
        hook_of(link).normalize_weight(link).array, W / expected, rtol=1e-5)


@each
def test_bake_cached_and_chain(name):
    link, x, _ = make(name)
    with chainer.using_config('train', False):
        expected = link(x).array
        plain = sn_function.bake(link)
        np.testing.assert_array_equal(plain(x).array, expected)
    before = link.W_u.copy()
    with sn_function.cached(link):
        np.testing.assert_array_equal(link(x).array, link(x).array)
    once = link.W_u.copy()
    link.W_u[...] = before
    link(x)
    np.testing.assert_array_equal(link.W_u, once)


@each
def test_a_second_run_by_forget(name):
    link, x, _ = make(name, n_warmup=0)
    results = []
    for function in (lambda f, x: f(x), F.forget):
        twin = copy.deepcopy(link)
        twin.cleargrads()
        F.sum(function(twin, chainer.Variable(x)) ** 2).backward()
        results.append((twin.W.grad, twin.W_u))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


class TestChain:

    def chain(self):
        return chainer.Sequential(
            L.Convolution2D(4, 6, 3, pad=1, groups=2),
            L.DepthwiseConvolution2D(6, 1, 3, pad=1), L.Convolution2D(6, 4, 1))

    def test_takes_a_depthwise_convolution_by_its_groups_only(self):
        chain = self.chain()
        chain.add_hook(sn_function.ChainSpectralNormalization())
        assert [hasattr(link, 'W_u') for link in chain] == [
            True, False, True]
        chain = self.chain()
        chain.add_hook(sn_function.ChainSpectralNormalization(
            groups='each', n_power_iteration=200))
        x = np.random.normal(size=(2, 4, 5, 5)).astype('f')
        for _ in range(3):
            chain(x)
        for link, shape in zip(chain, [(2, 3, -1), (6, 1, -1), (1, 4, -1)]):
            W = link.W.array
            if isinstance(link, L.DepthwiseConvolution2D):
                W = W.transpose(1, 0, 2, 3)
            Y = hook_of(link).normalize_weight(link).array
            np.testing.assert_allclose(
                max(norms(Y.reshape(shape))), 1, rtol=1e-5)
            np.testing.assert_allclose(
                abs(Y).max(), abs(W).max() / max(norms(W.reshape(shape))),
                rtol=1e-5)

    def statuses(self, chain):
        # By shape: in a Sequential the paths are not in the order of links.
        of_shape = {row.shape: row.status
                    for row in sn_function.summary(chain).rows}
        return [of_shape[link.W.shape] for link in chain]

    def test_summary(self):
        chain = self.chain()
        assert self.statuses(chain) == ['no hook', 'unsupported', 'no hook']
        chain.add_hook(sn_function.ChainSpectralNormalization(
            L.Convolution2D, groups='each'))
        assert self.statuses(chain) == [
            'normalized', 'filtered out', 'normalized']


# Figures of the documentation

@pytest.mark.parametrize(('make_link', 'least', 'most'), [
    (lambda: L.Convolution2D(64, 64, 3, groups=4), 0.77, 0.84),
    (lambda: L.Convolution2D(256, 256, 3, groups=256), 0.24, 0.30),
    (lambda: L.DepthwiseConvolution2D(64, 1, 3), 0.16, 0.22)])
def test_the_largest_group_of_a_reshaped_weight(make_link, least, most):
    link = make_link().add_hook(SpectralNormalization(n_warmup=100))
    Y = hook_of(link).normalize_weight(link).array
    is_depthwise = isinstance(link, L.DepthwiseConvolution2D)
    Y = Y.transpose(1, 0, 2, 3) if is_depthwise else Y
    G = len(Y) if is_depthwise else link.groups
    norm = max(norms(Y.reshape(G, len(Y) // G, -1)))
    assert least < norm < most


@pytest.mark.parametrize('groups', ['all', 'EACH', 2, True, np.ones(2)])
def test_bad_setting(groups):
    with pytest.raises(errors.GroupsError, match='each'):
        SpectralNormalization(groups=groups)


def test_a_vector_of_the_reshaped_weight():
    """Of a deconvolution it has another length, and is made anew."""
    link = L.Deconvolution2D(6, 4, 3, groups=2).add_hook(
        SpectralNormalization(groups='each'))
    link.W_u = np.ones(2, 'f')
    with pytest.warns(errors.SpectralNormalizationWarning, match='W_u belong'):
        link(np.ones((1, 6, 4, 4), 'f'))
    assert link.W_u.shape == (4,)


# Vectors and gammas that belong to another weight

def draw(link):
    """A weight whose groups have one singular value above the others."""
    split = groups_of(link, hook_of(link)).split(
        link.W.array, hook_of(link).axis)
    G, l, m, r = split.shape  # NOQA: E741
    for g in range(G):
        A = 0.1 * np.random.normal(size=(m, l * r)) + (3 + g / G) * np.outer(
            np.random.normal(size=m), np.random.normal(size=l * r))
        split[g] = A.reshape(m, l, r).transpose(1, 0, 2)


@each
@pytest.mark.parametrize('is_train', [True, False])
def test_vectors_of_another_weight_are_made_anew(name, is_train):
    link, _, matrices = make(name, n_warmup=100)
    draw(link)
    before = link.W_u.copy()
    with chainer.using_config('train', is_train):
        Y = hook_of(link).normalize_weight(link).array
    np.testing.assert_allclose(max(norms(matrices(Y))), 1, rtol=1e-3)
    if not is_train:
        np.testing.assert_array_equal(link.W_u, before)


@pytest.mark.parametrize('size', [1, 1e30])
def test_only_the_vector_of_another_weight_is_made_anew(size):
    """Those of other groups go on as if nothing had happened."""
    link, twin = (L.Convolution2D(6, 12, 3, groups=3).add_hook(
        SpectralNormalization(groups='each', n_warmup=n)) for n in (100, 0))
    W = np.random.normal(size=link.W.shape).astype('f')
    W[4:8] *= 3
    u = np.concatenate([np.linalg.svd(part)[0][:, 0]
                        for part in W.reshape(3, 4, -1)])
    u += 0.01 * np.random.normal(size=12)
    vectors = np.linalg.svd(W[4:8].reshape(4, -1))[0]
    u[4:8] = 0.3 * vectors[:, 0] + vectors[:, 3]
    for each_link in link, twin:
        each_link.W.array[...] = W * np.float32(size)
        each_link.W_u[...] = u
        hook_of(each_link).normalize_weight(each_link)
    np.testing.assert_array_equal(link.W_u[:4], twin.W_u[:4])
    np.testing.assert_array_equal(link.W_u[8:], twin.W_u[8:])
    first = np.linalg.svd(W[4:8].reshape(4, -1))[0][:, 0]
    assert abs(first @ link.W_u[4:8]) > 0.99
    assert abs(first @ twin.W_u[4:8]) < 0.9
    start = link.__dict__['_W_sn_state'].start
    np.testing.assert_array_equal(start[:4], u.astype('f')[:4])
    assert abs(first @ start[4:8]) > 0.99


@each
def test_gamma_follows_a_weight_that_is_drawn_anew(name):
    link, _, matrices = make(name, use_gamma=True, n_warmup=200)
    draw(link)
    Y = hook_of(link).normalize_weight(link).array
    np.testing.assert_allclose(
        link.gamma.array, max(norms(matrices(link.W.array))), rtol=1e-5)
    np.testing.assert_allclose(Y, link.W.array, rtol=2e-3)


@pytest.mark.gpu
def test_gamma_follows_on_a_device():
    link, *_ = make('Convolution2D, 2', use_gamma=True, n_warmup=50)
    link.to_device('@cupy:0')
    link.W.array *= 2
    before = float(link.gamma.array)
    Y = hook_of(link).normalize_weight(link)
    np.testing.assert_allclose(
        float(link.gamma.array), 2 * before, rtol=1e-4)
    np.testing.assert_allclose(
        chainer.backends.cuda.to_cpu(Y.array),
        chainer.backends.cuda.to_cpu(link.W.array), rtol=1e-3)


@each
def test_refresh(name):
    link, _, matrices = make(name, use_gamma=True)
    link.W.array[...] = np.random.normal(size=link.W.shape)
    sn_function.refresh(link, gamma=True)
    found = matrices(link.W.array)
    np.testing.assert_allclose(
        link.gamma.array, max(norms(found)), rtol=1e-5)
    for A, u in zip(found, np.split(link.W_u, len(found))):
        first = np.linalg.svd(A)[0][:, 0]
        np.testing.assert_allclose(abs(first @ u), 1, rtol=1e-5)


def test_a_weight_that_has_no_such_groups():
    link = L.Convolution2D(4, 6, 3, groups=2)
    link.W.array = np.ones((5, 2, 3, 3), 'f')
    with pytest.raises(errors.GroupCountError, match='2, for W of shape'):
        link.add_hook(SpectralNormalization(groups='each'))


class TestSeveralVectors:
    """Of each group, as many as its matrix has."""

    @each
    def test_the_norm_in_the_spans(self, name):
        link, x, matrices = make(name, n_vectors=3, n_warmup=0)
        link(x)
        found = matrices(link.W.array.astype('d'))
        G, m, n = found.shape
        b = min(3, m, n)
        assert (link.W_u.shape, link.W_us.shape) == (
            (G * m,), (b - 1, G * m))
        U = np.array([link.W_u, *link.W_us]).reshape(b, G, m)
        expected = max(
            reference.true_norm(np.linalg.qr(U[:, g].T.astype('d'))[0].T @ A)
            for g, A in enumerate(found))
        with chainer.using_config('train', False):
            Y = hook_of(link).normalize_weight(link).array
        if b > 1:
            np.testing.assert_allclose(
                Y, link.W.array / expected, rtol=1e-5, atol=1e-7)
        for _ in range(30):
            link(x)
        Y = hook_of(link).normalize_weight(link).array
        np.testing.assert_allclose(max(norms(matrices(Y))), 1, rtol=1e-4)

    @each
    def test_refresh(self, name):
        link, _, matrices = make(name, n_vectors=2)
        link.W.array[...] = np.random.normal(size=link.W.shape)
        sn_function.refresh(link)
        found = matrices(link.W.array.astype('d'))
        G, m, n = found.shape
        b = min(2, m, n)
        U = np.array([link.W_u, *link.W_us][:b]).reshape(b, G, m)
        for g, A in enumerate(found):
            first = np.linalg.svd(A)[0][:, :b].T
            np.testing.assert_allclose(
                abs(np.sum(first * U[:, g], axis=1)), 1, rtol=1e-4)

    def test_report(self):
        link, x, matrices = make('Convolution2D, 4', n_vectors=3)
        for _ in range(60):
            link(x)
        layer, = extensions.SpectralNormReport(
            chainer.Sequential(link)).measure()
        largest = max(matrices(link.W.array), key=reference.true_norm)
        expected = np.linalg.svd(largest.astype('d'), compute_uv=False)[:3]
        np.testing.assert_allclose(
            layer.singular_values, expected, rtol=1e-2)
        np.testing.assert_allclose(layer.sigma, expected[0], rtol=1e-4)
        assert layer.residual < 1e-2

    def test_copies_and_files_go_on_with_the_same_numbers(self, tmp_path):
        link, x, _ = make('Convolution2D, 4', n_vectors=3)
        link(x)
        link(x)
        other = pickle.loads(pickle.dumps(link))
        serializers.save_npz(tmp_path / 'link.npz', link)
        third, *_ = make('Convolution2D, 4', n_vectors=3)
        serializers.load_npz(tmp_path / 'link.npz', third)
        y = link(x).array
        for twin in other, third:
            np.testing.assert_array_equal(twin(x).array, y)
            np.testing.assert_array_equal(twin.W_us, link.W_us)

    def test_a_snapshot_without_them(self, tmp_path):
        link, x, _ = make('Convolution2D, 4')
        link(x)
        serializers.save_npz(tmp_path / 'link.npz', link)
        other, *_ = make('Convolution2D, 4', n_vectors=3)
        serializers.load_npz(tmp_path / 'link.npz', other)
        other(x)
        assert other.W_us.shape == (2, 16)

    def test_bake_and_forget(self):
        link, x, _ = make('Convolution2D, 4', n_vectors=3)
        link(x)
        with chainer.using_config('train', False):
            expected = link(x).array
            baked = sn_function.bake(link)
            np.testing.assert_allclose(baked(x).array, expected, rtol=1e-6)
        results = []
        for function in (lambda f, x: f(x), F.forget):
            twin = copy.deepcopy(link)
            twin.cleargrads()
            F.sum(function(twin, chainer.Variable(x)) ** 2).backward()
            results.append((twin.W.grad, twin.W_u, twin.W_us))
        for a, b in zip(*results):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.parametrize('n_vectors', [1, 3])
    def test_a_tolerance(self, n_vectors):
        link, x, matrices = make(
            'Convolution2D, 4', n_vectors=n_vectors, rtol=1e-4,
            max_iterations=5000)
        for _ in range(2):
            link.W.array[...] = np.random.normal(size=link.W.shape)
            link(x)
            Y = hook_of(link).normalize_weight(link).array
            np.testing.assert_allclose(
                max(norms(matrices(Y))), 1, rtol=1e-4)

    @pytest.mark.gpu
    def test_on_a_device(self):
        link, x, matrices = make('Convolution2D, 4', n_vectors=3)
        host = copy.deepcopy(link)
        link.to_device('@cupy:0')
        for twin in link, host:
            with chainer.using_device(twin.device):
                for _ in range(40):
                    twin(twin.device.send(x))
        Y, W = (chainer.backends.cuda.to_cpu(y) for y in (
            hook_of(link).normalize_weight(link).array, link.W.array))
        np.testing.assert_allclose(max(norms(matrices(Y))), 1, rtol=1e-4)
        np.testing.assert_allclose(W, host.W.array)
        assert link.W_us.shape == host.W_us.shape == (2, 16)
