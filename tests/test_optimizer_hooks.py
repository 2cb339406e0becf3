"""The penalty, by finite differences of float64 singular values; the
projection, by the singular values themselves."""
import sn_function  # isort: skip  # before chainer, which it repairs

import copy
import pickle

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks, optimizer_hooks, optimizers
from chainer.backends import cuda

from sn_function import SpectralNormalization, errors
from sn_function.link_hooks import output_axis
from sn_function.optimizer_hooks import (
    PROJECTION_VECTOR,
    VECTOR,
    SpectralNormPenalty,
    SpectralNormProjection,
)
from tests import reference
from tests.cuda_on_host import array as on_host
from tests.tools import projection

LINKS = {
    'Linear': lambda: L.Linear(4, 3),
    'EmbedID': lambda: L.EmbedID(5, 2),
    'Convolution2D': lambda: L.Convolution2D(2, 3, 2),
    'ConvolutionND': lambda: L.ConvolutionND(1, 2, 4, 3),
    'Deconvolution2D': lambda: L.Deconvolution2D(2, 3, 2),
    'DeconvolutionND': lambda: L.DeconvolutionND(3, 2, 3, 2),
}


def penalty_of(W, axis, rate):
    return rate / 2 * reference.true_norm(W, axis) ** 2


def finite_differences(f, W, eps=1e-6):
    g = np.empty_like(W)
    for i in np.ndindex(*W.shape):
        values = []
        for step in (eps, -eps):
            x = W.copy()
            x[i] += step
            values.append(f(x))
        g[i] = (values[0] - values[1]) / (2 * eps)
    return g


def make(link, hook, grad=0., lr=1.):
    """An optimizer whose gradients are there."""
    optimizer = optimizers.SGD(lr).setup(link)
    optimizer.add_hook(hook)
    for param in link.params():
        param.grad = param.xp.full_like(param.array, grad)
    return optimizer


def update(optimizer, target=None):
    """Updates, without a gradient of a loss; returns what is reported."""
    optimizer.target.cleargrads()
    observation = {}
    with chainer.Reporter().scope(observation):
        optimizer.update()
    return observation


@pytest.mark.parametrize('kind', LINKS)
def test_gradient(kind):
    """That of the true penalty, added to what is there."""
    with chainer.using_config('dtype', np.float64):
        link = LINKS[kind]()
    rate, axis = 0.3, output_axis(link)
    before = link.W.array.copy()
    optimizer = make(link, SpectralNormPenalty(rate, 300), grad=0.7)
    optimizer.call_hooks('pre')
    np.testing.assert_array_equal(link.W.array, before)
    expected = finite_differences(
        lambda W: penalty_of(W, axis, rate), before)
    np.testing.assert_allclose(
        link.W.grad - 0.7, expected, rtol=1e-5, atol=1e-7)
    if hasattr(link, 'b') and link.b is not None:
        np.testing.assert_array_equal(link.b.grad, 0.7)


@pytest.mark.parametrize(('dtype', 'tolerance'), [
    ('e', 3e-3), ('f', 1e-5), ('d', 1e-12)])
@pytest.mark.parametrize('K', [1, 3])
def test_each_step_is_the_closed_form(K, dtype, tolerance):
    with chainer.using_config('dtype', np.dtype(dtype)):
        link = L.Linear(30, 20)
    optimizer = make(link, SpectralNormPenalty(0.1, K))
    update(optimizer)
    for _ in range(3):
        W = link.W.array.astype(np.float64)
        u = getattr(link.W.update_rule, VECTOR).astype(np.float64)
        observation = update(optimizer)
        u, v, sigma = reference.power_iteration(W, u, K)
        np.testing.assert_allclose(
            link.W.array, W - 0.1 * sigma * np.outer(u, v),
            rtol=tolerance, atol=tolerance)
        assert observation == {'spectral_norm_penalty': pytest.approx(
            0.05 * sigma ** 2, rel=tolerance)}
        assert link.W.dtype == link.W.grad.dtype == dtype


@pytest.mark.parametrize('K', [
    1, pytest.param(5, marks=pytest.mark.slow)])
def test_training_shrinks_sigma(K):
    class Model(chainer.Chain):

        def __init__(self):
            super().__init__()
            with self.init_scope():
                self.conv = L.Convolution2D(1, 4, 3)
                self.deconv = L.Deconvolution2D(4, 2, 3)
                self.out = L.Linear(None, 1)

        def forward(self, x):
            return self.out(F.relu(self.deconv(F.relu(self.conv(x)))))

    x = np.random.normal(size=(16, 1, 6, 6)).astype('f')
    t = x.sum(axis=(2, 3))
    ends = {}
    for rate in (0, 0.5):
        np.random.seed(0)
        model = Model()
        optimizer = optimizers.Adam(0.02).setup(model)
        optimizer.add_hook(SpectralNormPenalty(rate, K))
        for _ in range(100):
            optimizer.update(lambda: F.mean_squared_error(model(x), t))  # NOQA: B023
        ends[rate] = [
            reference.true_norm(link.W.array, output_axis(link))
            for link in (model.conv, model.deconv, model.out)]
    assert all(a < 0.8 * b for a, b in zip(ends[0.5], ends[0]))


def test_only_the_penalty_brings_the_norms_down_evenly():
    """To where the largest meets the second, and so on."""
    link = L.Linear(3, 3)
    link.W.array[...] = np.diag([4, 2, 1])
    optimizer = make(link, SpectralNormPenalty(0.1))
    for _ in range(10):
        update(optimizer)
    s = np.linalg.svd(link.W.array, compute_uv=False)
    assert s[0] < 2.1
    np.testing.assert_allclose(s[2], 1, rtol=1e-4)


class TestWhichWeights:

    def model(self):
        model = chainer.ChainList(
            L.Linear(3, 3), L.Linear(3, 3).add_hook(SpectralNormalization()),
            L.Linear(3, 3).add_hook(link_hooks.SpectralNormalization()),
            L.Bias(shape=(3, 3)), L.LayerNormalization(3))
        model.add_link(L.Linear(3, 3))
        model[5].W = model[0].W  # shared: it counts once
        return model

    def penalized(self, model, hook):
        optimizer = make(model, hook)
        observation = update(optimizer)
        return [path for path, param in model.namedparams()
                if abs(param.grad).any()], observation

    def test_without_a_hook_and_each_once(self):
        model = self.model()
        sigma = reference.true_norm(model[0].W.array)
        paths, observation = self.penalized(
            model, SpectralNormPenalty(0.1, 50))
        assert set(paths) == {'/0/W', '/5/W'}
        assert observation['spectral_norm_penalty'] == pytest.approx(
            0.05 * sigma ** 2, rel=1e-5)

    def test_a_hook_of_a_chain(self):
        model = chainer.ChainList(L.Linear(3, 3))
        model.add_hook(sn_function.ChainSpectralNormalization())
        with pytest.raises(errors.NoPenaltyError, match='nothing to penal'):
            self.penalized(model, SpectralNormPenalty(0.1))

    def test_filter(self):
        model = chainer.ChainList(L.Linear(3, 3), L.Linear(3, 3))
        seen = []

        def keep(path, link):
            seen.append((path, link))
            return path != '/0'

        paths, _ = self.penalized(model, SpectralNormPenalty(0.1, filter=keep))
        assert paths == ['/1/W']
        assert seen == [('/0', model[0]), ('/1', model[1])]
        with pytest.raises(errors.NoPenaltyError, match='passes the filter'):
            self.penalized(model, SpectralNormPenalty(
                0.1, filter=lambda path, link: False))

    @pytest.mark.parametrize(('filter', 'expected'), [
        ('/1', ['/1/W']), ('/*', ['/0/W', '/1/W']), (L.EmbedID, ['/0/W']),
        (['/2', L.Linear], ['/1/W']),
        ('/2', ['/1/W'])])  # another path of a link
    def test_kinds_of_filters(self, filter, expected):
        model = chainer.ChainList(L.EmbedID(3, 3), L.Linear(3, 3))
        model.add_link(model[1])
        paths, _ = self.penalized(
            model, SpectralNormPenalty(0.1, filter=filter))
        assert [path for path in paths if path != '/2/W'] == expected

    @pytest.mark.parametrize('exclude', ['/0', L.EmbedID, ['/0', '/2']])
    def test_exclude(self, exclude):
        model = chainer.ChainList(
            L.EmbedID(3, 3), L.Linear(3, 3), L.Linear(3, 3))
        model[2].add_hook(sn_function.SpectralNormalization())
        paths, _ = self.penalized(
            model, SpectralNormPenalty(0.1, exclude=exclude))
        assert paths == ['/1/W']

    def test_exclude_nothing_or_all(self):
        model = chainer.ChainList(L.EmbedID(3, 3))
        with pytest.raises(errors.NothingExcludedError, match='/0'):
            self.penalized(model, SpectralNormPenalty(0.1, exclude='/1'))
        with pytest.raises(errors.NoPenaltyError):
            self.penalized(model, SpectralNormPenalty(0.1, exclude='/0'))

    @pytest.mark.parametrize('filter', [3, [None]])
    def test_not_a_filter(self, filter):
        with pytest.raises(errors.FilterError, match='pattern'):
            SpectralNormPenalty(0.1, filter=filter)
        with pytest.raises(errors.FilterError, match='pattern'):
            SpectralNormPenalty(0.1, exclude=filter)

    def test_disabled_lazy_and_without_gradient(self):
        model = chainer.ChainList(L.Linear(3, 3), L.Linear(None, 3))
        optimizer = optimizers.SGD(1).setup(model)
        optimizer.add_hook(SpectralNormPenalty(0.1))
        model[0].disable_update()
        before = model[0].W.array.copy()
        assert update(optimizer) == {'spectral_norm_penalty': 0}
        np.testing.assert_array_equal(model[0].W.array, before)
        model[0].enable_update()
        model[0].cleargrads()
        optimizer.call_hook(lambda optimizer: None)  # it makes zeros
        model[0].W.grad = None
        SpectralNormPenalty(0.1)(optimizer)
        assert model[0].W.grad is None
        model[1](np.ones((1, 3), 'f'))
        assert update(optimizer)['spectral_norm_penalty'] > 0

    def test_a_bare_link(self):
        paths, _ = self.penalized(L.Linear(3, 3), SpectralNormPenalty(0.1))
        assert paths == ['/W']


class TestReport:

    def test_by_the_name_of_the_target(self):
        link = L.Linear(3, 3)
        optimizer = make(link, SpectralNormPenalty(0.1))
        reporter = chainer.Reporter()
        reporter.add_observer('main', link)
        observation = {}
        with reporter.scope(observation):
            optimizer.update()
        assert list(observation) == ['main/spectral_norm_penalty']

    def test_without_a_reporter(self):
        make(L.Linear(3, 3), SpectralNormPenalty(0.1)).update()


class TestLossScaling:

    @pytest.mark.parametrize('scale', [1., 128.])
    def test_as_weight_decay(self, scale):
        """The update is the same at any scale."""
        with chainer.using_config('dtype', np.float16):
            link = L.Linear(4, 3)
        link.W.array[...] = np.eye(3, 4) * [[3], [1], [1]]
        optimizer = optimizers.SGD(1).setup(link)
        optimizer.set_loss_scale(scale)
        optimizer.add_hook(SpectralNormPenalty(0.125))
        optimizer.add_hook(optimizer_hooks.WeightDecay(0.125))
        x = np.ones((1, 4), np.float16)
        optimizer.update(lambda: 0 * F.sum(link(x)))
        np.testing.assert_allclose(
            link.W.array.diagonal(),
            np.array([3, 1, 1]) * 0.875 - [0.125 * 3, 0, 0], rtol=2e-3)

    def test_update_in_float32(self):
        with chainer.using_config('dtype', np.float16):
            link = L.Linear(4, 3)
        optimizer = optimizers.SGD(1).setup(link)
        optimizer.use_fp32_update()
        optimizer.add_hook(SpectralNormPenalty(0.1))
        W = link.W.array.astype('d')
        update(optimizer)
        assert reference.true_norm(link.W.array) < reference.true_norm(W)
        assert link.W.dtype == np.float16


class TestVector:

    def test_it_is_the_same_each_time(self):
        """No random number is drawn."""
        vectors = []
        for seed in (0, 1):
            link = L.Linear(4, 3, initialW=np.arange(12.).reshape(3, 4))
            np.random.seed(seed)
            update(make(link, SpectralNormPenalty(0.1)))
            vectors.append(getattr(link.W.update_rule, VECTOR))
        np.testing.assert_array_equal(*vectors)

    def test_the_first_estimate_is_close(self):
        link = L.Linear(60, 50)
        observation = update(make(link, SpectralNormPenalty(2.)))
        assert observation['spectral_norm_penalty'] ** 0.5 > (
            0.95 * reference.true_norm(link.W.array))

    @pytest.mark.parametrize('bad', [0, np.nan, np.inf])
    def test_a_bad_one_is_made_anew(self, bad):
        link = L.Linear(4, 3)
        optimizer = make(link, SpectralNormPenalty(0.))
        expected = update(optimizer)
        getattr(link.W.update_rule, VECTOR)[...] = bad
        assert update(optimizer) == pytest.approx(expected)

    @pytest.mark.parametrize('bad', [np.nan, np.inf, 0, 1e30])
    def test_a_bad_weight_leaves_a_good_one(self, bad):
        link = L.Linear(4, 3)
        W = link.W.array.copy()
        for is_first in (True, False):
            optimizer = make(link, SpectralNormPenalty(1.))
            if not is_first:
                update(optimizer)
            link.W.array[...] = W
            if bad == 0:
                link.W.array[...] = 0
            else:
                link.W.array[0, 0] = bad
            update(optimizer)
            u = getattr(link.W.update_rule, VECTOR)
            assert np.isfinite(u).all()
            assert u.any()
            link.W.array[...] = W
            for _ in range(30):
                optimizer.lr = 0
                observation = update(optimizer)
            assert observation['spectral_norm_penalty'] == pytest.approx(
                reference.true_norm(W) ** 2 / 2, rel=1e-3)

    @pytest.mark.parametrize('clone', [
        copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_a_copy_goes_on_with_the_same_numbers(self, clone):
        optimizer = make(L.Linear(4, 3), SpectralNormPenalty(0.1), lr=0.1)
        update(optimizer)
        other = clone(optimizer)
        for _ in range(3):
            update(optimizer)
            update(other)
        a, b = optimizer.target.W, other.target.W
        assert a is not b
        np.testing.assert_array_equal(a.array, b.array)
        u, v = (getattr(x.update_rule, VECTOR) for x in (a, b))
        assert u is not v
        np.testing.assert_array_equal(u, v)

    def test_a_hook_may_serve_two_optimizers(self):
        hook = SpectralNormPenalty(0.1)
        links = [L.Linear(4, 3), L.Linear(5, 2)]
        optimizers = [make(link, hook) for link in links]
        for link, optimizer in zip(links, optimizers):
            before = reference.true_norm(link.W.array)
            update(optimizer)
            assert reference.true_norm(link.W.array) < before

    def test_a_weight_of_another_shape(self):
        link = L.Linear(4, 3)
        optimizer = make(link, SpectralNormPenalty(0.1))
        update(optimizer)
        link.W.array = np.random.normal(size=(5, 4)).astype('f')
        assert update(optimizer)['spectral_norm_penalty'] > 0


@pytest.mark.parametrize('rate', [-1, float('nan'), float('inf'), None])
def test_bad_rate(rate):
    with pytest.raises(errors.PenaltyRateError, match='at least 0'):
        SpectralNormPenalty(rate)


@pytest.mark.parametrize('n', [0, 1.5, True])
def test_bad_count(n):
    with pytest.raises(errors.IterationCountError, match='n_power_iteration'):
        SpectralNormPenalty(0.1, n)


@pytest.mark.parametrize('c', [
    0, -1, float('nan'), float('inf'), None, '1', True])
def test_bad_bound(c):
    with pytest.raises(errors.ProjectionNormError, match='finite number ab'):
        SpectralNormProjection(c)


def test_bad_settings_of_the_projection():
    with pytest.raises(errors.IterationCountError, match='n_power_iteration'):
        SpectralNormProjection(1, 0)
    with pytest.raises(errors.FilterError, match='pattern'):
        SpectralNormProjection(1, filter=3)


@pytest.mark.parametrize('text', [
    'SpectralNormPenalty(rate=0.01, n_power_iteration=1, filter=None)',
    "SpectralNormPenalty(rate=1, n_power_iteration=3, filter='/a*')",
    'SpectralNormProjection(c=1.0, n_power_iteration=5, filter=None)',
    "SpectralNormProjection(c=2, n_power_iteration=1, filter=['/a', '/b'])",
    "SpectralNormProjection(c=2, n_power_iteration=1, filter=None, "
    "exclude='/a')"])
def test_repr(text):
    assert repr(eval(text)) == text


class TestAWeightComesBack:
    """Where the best one is within the bound, from any start."""

    # All columns count the same, so the least loss of a weight of norm 1 is
    # 0.7 ** 2 / 8.
    x = np.float32(8 ** 0.5) * np.eye(8, dtype='f')

    def train(self, norm, projects):
        W = np.random.RandomState(0).normal(size=(8, 8))
        link = L.Linear(8, 8, nobias=True, initialW=(
            W * norm / reference.true_norm(W)))
        optimizer = optimizers.SGD(0.5).setup(link)
        if projects:
            optimizer.add_hook(SpectralNormProjection(1))
        else:
            link.add_hook(SpectralNormalization(cap=1))

        def loss():
            return F.mean_squared_error(link(self.x), 0.3 * self.x)

        for _ in range(300):
            optimizer.update(loss)
        return float(loss().array), reference.true_norm(link.W.array)

    @pytest.mark.parametrize('norm', [0.5, 0.8, 1.5, 4])
    def test_with_the_projection(self, norm):
        loss, end = self.train(norm, True)
        assert loss < 1e-6
        assert end == pytest.approx(0.3, abs=1e-3)

    @pytest.mark.parametrize('norm', [0.5, 0.8])
    def test_with_the_cap_from_below(self, norm):
        assert self.train(norm, False)[0] < 1e-6

    @pytest.mark.parametrize('norm', [1.5, 4])
    def test_not_with_the_cap_from_above(self, norm):
        """Its gradient is orthogonal to the weight, which only grows."""
        loss, end = self.train(norm, False)
        assert loss > 0.99 * 0.7 ** 2 / 8
        assert end > norm


class TestProjection:

    @pytest.mark.parametrize(('dtype', 'tolerance'), [
        ('e', 1e-3), ('f', 1e-5), ('d', 1e-12)])
    @pytest.mark.parametrize('kind', LINKS)
    def test_is_the_closed_form(self, kind, dtype, tolerance):
        with chainer.using_config('dtype', np.dtype(dtype)):
            link = LINKS[kind]()
        axis = output_axis(link)
        before = link.W.array.astype('d')
        norm = reference.true_norm(before, axis)
        for c in (2 * norm, norm / 2):
            optimizer = make(link, SpectralNormProjection(c, 300))
            optimizer.call_hooks('pre')
            np.testing.assert_array_equal(link.W.array, before)
            update(optimizer)
            np.testing.assert_allclose(
                link.W.array, before / max(1, norm / c), rtol=tolerance)
            assert link.W.dtype == dtype
        assert reference.true_norm(link.W.array.astype('d'), axis) == (
            pytest.approx(norm / 2, rel=tolerance))

    def test_below_the_bound_not_a_bit_is_changed(self):
        link = L.Linear(4, 3)
        before = link.W.array.copy()
        update(make(link, SpectralNormProjection(100)))
        np.testing.assert_array_equal(link.W.array, before)

    def test_after_the_update(self):
        link = L.Linear(2, 2, initialW=np.diag([1., 0.5]))
        optimizer = make(link, SpectralNormProjection(2), lr=1)
        link.W.grad[...] = -np.diag([3, 0.5])
        optimizer.update()
        np.testing.assert_allclose(
            link.W.array, np.diag([2, 0.5]), rtol=1e-5)

    def test_the_bound_may_be_changed(self):
        link = L.Linear(4, 3)
        hook = SpectralNormProjection(0.1, 50)
        optimizer = make(link, hook)
        for hook.c in (0.1, 0.05):
            update(optimizer)
            assert reference.true_norm(link.W.array) == pytest.approx(hook.c)

    @pytest.mark.parametrize('bad', [np.nan, np.inf, 0])
    def test_a_bad_weight_is_left_alone(self, bad):
        link = L.Linear(4, 3)
        optimizer = make(link, SpectralNormProjection(0.1))
        update(optimizer)
        W = link.W.array.copy()
        link.W.array[...] = 0
        link.W.array[0, 0] = bad
        before = link.W.array.copy()
        update(optimizer)
        np.testing.assert_array_equal(link.W.array, before)
        link.W.array[...] = 9 * W
        for _ in range(20):
            update(optimizer)
        assert reference.true_norm(link.W.array) == pytest.approx(0.1)

    @pytest.mark.parametrize('size', [1e-30, 1e30])
    def test_extreme_weights(self, size):
        link = L.Linear(4, 3)
        link.W.array *= size
        W = link.W.array.astype('d')
        c = reference.true_norm(W) / 3
        update(make(link, SpectralNormProjection(c)))
        np.testing.assert_allclose(link.W.array, W / 3, rtol=1e-5)

    def test_update_in_float32(self):
        """The copy that Chainer updates is scaled, too, or it would grow."""
        with chainer.using_config('dtype', np.float16):
            link = L.Linear(4, 3)
        optimizer = optimizers.SGD(1).setup(link)
        optimizer.use_fp32_update()
        optimizer.add_hook(SpectralNormProjection(1, 50))
        for _ in range(3):
            link.W.grad = -np.eye(3, 4, dtype=np.float16)
            optimizer.update()
            copy = link.W.update_rule._fp32_param.array
            assert copy.dtype == np.float32
            assert reference.true_norm(copy) == pytest.approx(1, rel=1e-5)
            np.testing.assert_array_equal(
                link.W.array, copy.astype(np.float16))

    def test_a_scaled_loss(self):
        link = L.Linear(4, 3)
        optimizer = optimizers.SGD(1).setup(link)
        optimizer.set_loss_scale(128.)
        optimizer.add_hook(SpectralNormProjection(0.5, 50))
        optimizer.update(lambda: F.sum(link(np.ones((1, 4), 'f'))))
        assert reference.true_norm(link.W.array) == pytest.approx(0.5)

    def test_together_with_a_penalty(self):
        """Each has a vector of its own, and acts as if it were alone."""
        link = L.Linear(3, 3, initialW=np.diag([4., 2, 1]))
        optimizer = make(link, SpectralNormPenalty(0.25))
        optimizer.add_hook(SpectralNormProjection(1.5))
        observation = update(optimizer)
        # The penalty takes 1 from the largest, then all are halved.
        np.testing.assert_allclose(
            link.W.array, np.diag([1.5, 1, 0.5]), rtol=1e-5)
        assert observation['spectral_norm_penalty'] == pytest.approx(2)
        u, v = (getattr(link.W.update_rule, name)
                for name in (VECTOR, PROJECTION_VECTOR))
        assert u is not v


class TestWhichWeightsAreProjected:

    def projected(self, model, hook):
        before = {
            path: param.array.copy() for path, param in model.namedparams()}
        update(make(model, hook))
        return {path for path, param in model.namedparams()
                if not np.array_equal(param.array, before[path])}

    def test_without_a_hook_and_each_once(self):
        model = TestWhichWeights().model()
        assert self.projected(
            model, SpectralNormProjection(0.1, 50)) == {'/0/W', '/5/W'}
        assert reference.true_norm(model[0].W.array) == pytest.approx(0.1)

    def test_filter(self):
        model = chainer.ChainList(L.EmbedID(3, 3), L.Linear(3, 3))
        assert self.projected(
            model, SpectralNormProjection(0.1, filter='/1')) == {'/1/W'}
        with pytest.raises(
                errors.NoProjectionError, match='nothing to project'):
            self.projected(
                model, SpectralNormProjection(0.1, filter='/2'))
        model[1].W.array *= 9
        assert self.projected(
            model, SpectralNormProjection(0.1, exclude='/0')) == {'/1/W'}

    def test_disabled_lazy_and_without_an_update_rule(self):
        model = chainer.ChainList(
            L.Linear(3, 3), L.Linear(None, 3), L.Linear(3, 3))
        optimizer = optimizers.SGD(1).setup(model)
        optimizer.add_hook(SpectralNormProjection(0.1, 50))
        model[0].disable_update()
        model[2].W.update_rule = None
        before = [model[i].W.array.copy() for i in (0, 2)]
        update(optimizer)
        for i, W in zip((0, 2), before):
            np.testing.assert_array_equal(model[i].W.array, W)
        assert model[1].W.array is None
        model[0].enable_update()
        model[1](np.ones((1, 3), 'f'))
        update(optimizer)
        for i in (0, 1):
            assert reference.true_norm(model[i].W.array) == (
                pytest.approx(0.1))


class TestTheNormAfterEachUpdate:
    """In float64, of all weights, as far as it is promised."""

    @pytest.mark.parametrize(('alpha', 'seed'), [
        (1e-3, 0), (1e-2, 0),
        pytest.param(1e-3, 1, marks=pytest.mark.slow),
        pytest.param(1e-2, 1, marks=pytest.mark.slow)])
    def test_of_layers_that_are_trained(self, alpha, seed):
        norms = projection.regression(
            SpectralNormProjection(1), alpha, seed, 60)
        assert max(norms) < 1 + 1e-5
        assert min(norms[1:]) > 0.95

    @pytest.mark.parametrize(('size', 'above', 'below'), [
        (0.01, 1e-5, 0.02), (0.1, 0.1, 0.1)])
    def test_of_weights_that_drift(self, size, above, below):
        """The closer its singular values, the later is the largest seen."""
        norms = projection.drift(
            SpectralNormProjection(1), (64, 64), size, 0, 200)
        assert max(norms) < 1 + above
        assert min(norms[100:]) > 1 - below


class TestVectorOfTheProjection:

    def test_another_singular_value_becomes_the_largest(self):
        """The vector is exact, so its iterations stay where they are."""
        link = L.Linear(3, 3, initialW=np.diag([1., 0.5, 0.2]))
        optimizer = make(link, SpectralNormProjection(1, 1))
        update(optimizer)
        link.W.array[1, 1] = 4
        update(optimizer)
        np.testing.assert_allclose(
            link.W.array, np.diag([0.25, 1, 0.05]), rtol=1e-5)
        u = getattr(link.W.update_rule, PROJECTION_VECTOR)
        np.testing.assert_allclose(abs(u), [0, 1, 0], atol=1e-6)

    @pytest.mark.parametrize('clone', [
        copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_a_copy_goes_on_with_the_same_numbers(self, clone):
        optimizer = make(L.Linear(4, 3), SpectralNormProjection(0.1), lr=0.1)
        rule = optimizer.target.W.update_rule
        update(optimizer)
        other = clone(optimizer)
        for x in (optimizer, other):
            for _ in range(3):
                x.target.W.array += np.float32(0.1) * np.eye(3, 4, dtype='f')
                update(x)
        a, b = optimizer.target.W, other.target.W
        assert a is not b
        np.testing.assert_array_equal(a.array, b.array)
        np.testing.assert_array_equal(
            getattr(rule, PROJECTION_VECTOR),
            getattr(b.update_rule, PROJECTION_VECTOR))

    def test_the_first_update_finds_the_norm(self):
        """Of a weight whose singular values are close together."""
        link = L.Linear(300, 200)
        update(make(link, SpectralNormProjection(0.5)))
        assert reference.true_norm(link.W.array) == pytest.approx(
            0.5, rel=2e-2)
        assert reference.true_norm(link.W.array) < 0.5

    @pytest.mark.parametrize('bad', [0, np.nan])
    def test_a_bad_one_is_made_anew(self, bad):
        link = L.Linear(4, 3)
        optimizer = make(link, SpectralNormProjection(0.1))
        update(optimizer)
        getattr(link.W.update_rule, PROJECTION_VECTOR)[...] = bad
        link.W.array *= 3
        update(optimizer)
        assert reference.true_norm(link.W.array) == pytest.approx(
            0.1, rel=1e-5)


@pytest.mark.gpu
class TestOnDevice:

    def model(self, dtype='f'):
        with chainer.using_config('dtype', np.dtype(dtype)):
            return chainer.ChainList(
                L.Linear(7, 5), L.Deconvolution2D(3, 4, 3),
                L.Convolution2D(3, 4, 3))

    @pytest.mark.parametrize('dtype', [
        pytest.param('e', marks=pytest.mark.slow), 'f'])
    def test_as_on_the_host_without_waiting(self, dtype):
        model = self.model(dtype)
        other = copy.deepcopy(model)
        other.to_device('@cupy:0')
        values = []
        for x in (model, other):
            optimizer = make(x, SpectralNormPenalty(0.1, 2), lr=0.5)
            observation = {}
            with chainer.Reporter().scope(observation):
                if x is other and cuda.ndarray is on_host.DeviceArray:
                    with on_host.no_synchronization():
                        for _ in range(3):
                            optimizer.update()
                else:
                    for _ in range(3):
                        optimizer.update()
            values.append(float(observation['spectral_norm_penalty']))
        rtol = 1e-2 if dtype == 'e' else 1e-4
        np.testing.assert_allclose(*values, rtol=rtol)
        for a, b in zip(model.params(), other.params()):
            np.testing.assert_allclose(
                cuda.to_cpu(b.array), a.array, rtol=rtol, atol=rtol)

    def test_it_moves_with_the_weight(self):
        model = self.model()
        optimizer = make(model, SpectralNormPenalty(0.1))
        update(optimizer)
        model.to_device('@cupy:0')
        update(optimizer)
        assert isinstance(
            getattr(model[0].W.update_rule, VECTOR), cuda.ndarray)
        model.to_device('@numpy')
        update(optimizer)

    @pytest.mark.parametrize('bad', [0, np.nan])
    def test_a_bad_one_is_replaced(self, bad):
        link = L.Linear(4, 3)
        link.to_device('@cupy:0')
        optimizer = make(link, SpectralNormPenalty(1.), lr=0)
        update(optimizer)
        getattr(link.W.update_rule, VECTOR)[...] = bad
        for _ in range(30):
            observation = update(optimizer)
        W = cuda.to_cpu(link.W.array)
        assert float(observation['spectral_norm_penalty']) == pytest.approx(
            reference.true_norm(W) ** 2 / 2, rel=1e-3)

    @pytest.mark.parametrize('dtype', [
        pytest.param('e', marks=pytest.mark.slow), 'f'])
    def test_projection_as_on_the_host_without_waiting(self, dtype):
        model = self.model(dtype)
        other = copy.deepcopy(model)
        other.to_device('@cupy:0')
        for x in (model, other):
            optimizer = make(x, SpectralNormProjection(0.2), grad=0.1, lr=0.5)
            if x is other and cuda.ndarray is on_host.DeviceArray:
                with on_host.no_synchronization():
                    for _ in range(3):
                        optimizer.update()
            else:
                for _ in range(3):
                    optimizer.update()
        rtol = 1e-2 if dtype == 'e' else 1e-4
        for a, b in zip(model.params(), other.params()):
            assert b.dtype == dtype
            np.testing.assert_allclose(
                cuda.to_cpu(b.array), a.array, rtol=rtol, atol=rtol)
        for link in model:
            norm = reference.true_norm(
                link.W.array.astype('d'), output_axis(link))
            assert norm == pytest.approx(0.2, rel=2e-2)

    def test_a_bad_weight_is_left_alone_by_the_projection(self):
        link = L.Linear(4, 3)
        link.W.array[0, 0] = np.nan
        before = link.W.array.copy()
        link.to_device('@cupy:0')
        update(make(link, SpectralNormProjection(0.1)))
        np.testing.assert_array_equal(cuda.to_cpu(link.W.array), before)
