"""A u that belongs to another weight than the one at hand, and its gamma.

In test mode nothing moves a vector on, so there it would stay wrong for ever.
The right value is that of a singular value decomposition.
"""
import sn_function  # isort: skip  # before chainer, which it repairs

import copy
import pickle
import warnings

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import serializers
from chainer.backends import cuda

from sn_function import (
    ChainSpectralNormalization,
    SpectralNormalization,
    bake,
    cached,
    errors,
)
from tests import reference

# Of an estimate in test mode, relative: what it leaves.
TOLERANCE = 0.04
DEVICES = ['@numpy', pytest.param('@cupy:0', marks=pytest.mark.gpu)]


def axis_of(link):
    return int(isinstance(link, (L.Deconvolution2D, L.DeconvolutionND)))


def norm(link, train=False):
    """That of the weight as a call uses it."""
    hook, = link.local_link_hooks.values()
    with chainer.using_config('train', train):
        Y = hook.normalize_weight(link).array
    return reference.true_norm(cuda.to_cpu(Y).astype('d'), axis_of(link))


def assert_right(link, expected=1, tolerance=TOLERANCE):
    assert norm(link) == pytest.approx(expected, rel=tolerance)


def linear(n_in=256, n_out=256, **settings):
    return L.Linear(n_in, n_out).add_hook(SpectralNormalization(**settings))


def drawn(shape, size=1.):
    return np.random.normal(scale=size, size=shape).astype('f')


class TestInTestMode:

    @pytest.mark.parametrize('device', DEVICES)
    @pytest.mark.parametrize('is_exact', [False, True])
    @pytest.mark.parametrize(('m', 'n'), [
        (256, 256), (64, 576), (10, 512), (576, 64)])
    def test_a_weight_drawn_anew(self, m, n, is_exact, device):
        link = linear(n, m, detach_uv=not is_exact)
        link.to_device(device)
        u = link.W_u.copy()
        link.W.array[...] = link.xp.asarray(drawn((m, n)))
        assert_right(link)
        assert bool((link.W_u == u).all())  # test mode stores nothing

    def test_a_plain_snapshot(self, tmp_path):
        """As docs/migration recommends it; u is not in the file."""
        plain = L.Linear(256, 256)
        plain.W.array *= 3
        serializers.save_npz(tmp_path / 'plain.npz', plain)
        link = linear(use_gamma=True)
        serializers.load_npz(tmp_path / 'plain.npz', link, strict=False)
        sigma = reference.true_norm(plain.W.array)
        assert_right(link, sigma)
        np.testing.assert_allclose(link.gamma.array, sigma, rtol=TOLERANCE)
        baked = bake(link)
        np.testing.assert_allclose(
            reference.true_norm(baked.W.array), sigma, rtol=TOLERANCE)

    def test_a_convolution_and_a_deconvolution(self):
        for kind in (L.Convolution2D, L.Deconvolution2D):
            link = kind(16, 24, 3).add_hook(SpectralNormalization())
            link.W.array[...] = drawn(link.W.shape)
            assert_right(link)

    def test_more_iterations_a_call(self):
        link = linear(n_power_iteration=4)
        link.W.array[...] = drawn((256, 256))
        assert_right(link)

    @pytest.mark.parametrize('dtype', [np.float16, np.float64])
    def test_other_dtypes(self, dtype):
        with chainer.using_config('dtype', dtype):
            link = linear(64, 48)
        link.W.array[...] = np.random.normal(size=(48, 64))
        assert_right(link)

    @pytest.mark.parametrize('size', [1e-30, 1e30])
    def test_weights_of_extreme_size(self, size):
        link = linear(64, 48, eps=0)
        link.W.array[...] = drawn((48, 64), size)
        assert_right(link)

    def test_a_mean_of_weights(self):
        """An average of the parameters alone, which leaves u as it was."""
        link = linear()
        other = drawn((256, 256), 1 / 16)
        link.W.array[...] = (link.W.array + other) / 2
        assert_right(link)

    @pytest.mark.parametrize('device', DEVICES)
    @pytest.mark.parametrize('size', [None, 1e4, 1e-30, 1e30])
    def test_u_that_is_not_of_length_1(self, size, device):
        """By default of one that makes up for how much it is turned."""
        link = linear()
        u = np.random.normal(size=256)
        if size is None:
            A = link.W.array.astype('d')
            u /= np.linalg.norm(u)
            t = reference.power_iteration(A, u)[0]
            size = 1 / (u @ t)
        link.W_u[...] = u * size
        link.to_device(device)
        assert_right(link)

    def test_the_same_at_each_call(self):
        link = linear()
        link.W.array[...] = drawn((256, 256))
        x = drawn((2, 256))
        with chainer.using_config('train', False):
            np.testing.assert_array_equal(link(x).array, link(x).array)

    def test_the_exact_gradient_is_that_of_the_output(self):
        """By differences of a call whose start vector is kept."""
        with chainer.using_config('dtype', np.float64):
            link = linear(6, 5)
        W = link.W.array[...] = np.random.normal(size=(5, 6))
        gY, direction = np.random.normal(size=(2, 5, 6))
        with chainer.using_config('train', False):
            Y = link.local_link_hooks[
                'SpectralNormalization'].normalize_weight(link)
            link.cleargrads()
            F.sum(Y * gY).backward()
        u = reference.settled(W, link.W_u)

        def loss(W):
            return (reference.spectral_normalize(W, u)[0] * gY).sum()

        h = 1e-6
        expected = (loss(W + h * direction) - loss(W - h * direction)) / 2 / h
        np.testing.assert_allclose(
            (link.W.grad * direction).sum(), expected, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize('device', DEVICES)
    def test_a_settled_u_takes_one_iteration(self, device):
        """So it gives what Chainer's hook would."""
        link = linear(7, 5)
        link.to_device(device)
        x = link.xp.asarray(drawn((2, 7)))
        for _ in range(500):
            link(x)
        sigma = reference.power_iteration(
            cuda.to_cpu(link.W.array), cuda.to_cpu(link.W_u))[2]
        with chainer.using_config('train', False):
            Y = link.local_link_hooks[
                'SpectralNormalization'].normalize_weight(link)
        np.testing.assert_allclose(
            cuda.to_cpu(Y.array), cuda.to_cpu(link.W.array) / sigma, rtol=1e-6)


class WeightsOfLinear(chainer.FunctionHook):
    """Collects what F.linear is called with."""

    def __init__(self, found):
        self.found = found

    def forward_preprocess(self, function, inputs):
        if function.label == 'LinearFunction':
            self.found.append(inputs[1])


class TestInTraining:

    @pytest.mark.parametrize('device', DEVICES)
    def test_a_weight_drawn_anew(self, device):
        link = linear()
        link.to_device(device)
        link.W.array[...] = link.xp.asarray(drawn((256, 256)))
        assert norm(link, train=True) == pytest.approx(1, rel=TOLERANCE)
        assert_right(link)

    def test_a_vector_of_this_weight_is_followed(self):
        """One iteration, as long as it turns by less than the limit."""
        link = linear(2, 2)
        link.W.array[...] = W = np.diag([2, 1])
        for angle, is_followed in ((0.1, True), (0.2, False)):
            link.W_u[...] = start = np.array([np.sin(angle), np.cos(angle)])
            end = reference.power_iteration(W, start)[0]
            assert bool(1 - start @ end <= 0.05) is is_followed
            norm(link, train=True)
            assert np.allclose(link.W_u, end, atol=1e-5) is is_followed

    def test_a_lazy_lstm_in_a_chain(self):
        """Chainer makes lateral.W zero, and fills it in the first call."""
        for use_gamma, used in ((False, []), (True, [])):
            model = chainer.Sequential(L.LSTM(None, 64)).add_hook(
                ChainSpectralNormalization(use_gamma=use_gamma))
            with WeightsOfLinear(used):
                model(drawn((2, 32)))
                model(drawn((2, 32)))
            lateral = model[0].lateral
            sigma = reference.true_norm(lateral.W.array)
            found = reference.true_norm(used[-1])
            if use_gamma:
                np.testing.assert_allclose(
                    lateral.gamma.array, sigma, rtol=TOLERANCE)
                np.testing.assert_allclose(found, sigma, rtol=TOLERANCE)
            else:
                np.testing.assert_allclose(found, 1, rtol=TOLERANCE)

    @pytest.mark.parametrize('train', [False, True])
    def test_trained_without_training_mode(self, train):
        """Nothing moves u on in 300 steps; yet each norm is right."""
        x = drawn((64, 32))
        t = x @ drawn((32, 16))
        model = chainer.Sequential(
            L.Linear(32, 64), F.relu, L.Linear(64, 16)).add_hook(
                ChainSpectralNormalization())
        optimizer = chainer.optimizers.Adam(1e-2).setup(model)
        with chainer.using_config('train', train):
            for _ in range(300):
                optimizer.update(
                    lambda: F.mean_squared_error(10 * model(x), t))
        for link in model:
            if isinstance(link, L.Linear):  # 5.6 while u was left behind
                assert_right(link, tolerance=.15)


class TestScopesAndSecondRuns:

    @pytest.mark.parametrize('train', [False, True])
    def test_cached(self, train):
        link = linear()
        link.W.array[...] = drawn((256, 256))
        x = drawn((2, 256))
        with chainer.using_config('train', train), cached(link):
            first, second = link(x), link(x)
            with chainer.no_backprop_mode():
                third = link(x)
        expected = F.linear(x, link.W.array / reference.true_norm(
            link.W.array), link.b)
        np.testing.assert_array_equal(first.array, second.array)
        np.testing.assert_array_equal(first.array, third.array)
        np.testing.assert_allclose(
            first.array, expected.array, rtol=TOLERANCE, atol=1e-5)

    def test_no_graph_first(self):
        """The same weight is made again, with a graph, from the same u."""
        link = linear()
        link.W.array[...] = drawn((256, 256))
        x = drawn((2, 256))
        with cached(link):
            with chainer.no_backprop_mode():
                first = link(x)
            second = link(x)
        np.testing.assert_array_equal(first.array, second.array)

    def test_forget(self):
        link = linear()
        link.W.array[...] = drawn((256, 256))
        link.cleargrads()
        x = chainer.Variable(drawn((2, 256)))
        twin = copy.deepcopy(link)
        F.sum(F.forget(link, x)).backward()
        F.sum(twin(x)).backward()
        np.testing.assert_allclose(
            link.W.grad, twin.W.grad, rtol=1e-5, atol=1e-6)


class TestGamma:

    @pytest.mark.parametrize('device', DEVICES)
    @pytest.mark.parametrize('train', [False, True])
    def test_a_weight_drawn_anew(self, train, device):
        link = linear(use_gamma=True)
        link.to_device(device)
        for size in (.02, 0, .1, .1):
            W = drawn((256, 256), size)
            link.W.array[...] = link.xp.asarray(W)
            expected = reference.true_norm(W)
            assert norm(link, train) == pytest.approx(
                expected, rel=TOLERANCE, abs=1e-6)
            assert float(link.gamma.array) == pytest.approx(
                expected or 1, rel=TOLERANCE)

    def test_small_weights_together(self):
        model = chainer.Sequential(*[L.Linear(12, 12) for _ in range(6)])
        model.add_hook(ChainSpectralNormalization(use_gamma=True))
        for link in model:
            link.W.array[...] = drawn((12, 12))
        model(drawn((1, 12)))
        for link in model:
            np.testing.assert_allclose(
                link.gamma.array, reference.true_norm(link.W.array), rtol=.15)

    @pytest.mark.parametrize('name', ['gamma', 'W', 'both'])
    def test_one_that_was_trained_is_kept(self, name):
        link = linear(use_gamma=True)
        chainer.optimizers.SGD().setup(link)
        link.cleargrads()
        for trained in (link.gamma, link.W):
            if name in (trained.name, 'both'):
                trained.grad = np.ones_like(trained.array)
                trained.update()
        before = link.gamma.array.copy()
        link.W.array[...] = drawn((256, 256))
        assert_right(link, before)
        np.testing.assert_array_equal(link.gamma.array, before)

    def test_one_that_was_loaded_is_kept(self):
        link = linear(use_gamma=True)
        link.gamma.array[...] = 5
        link.W.array *= 3
        assert_right(link, 5)

    def test_one_that_is_held_fixed_is_kept(self):
        """Also by a model that is baked, which has no optimizer."""
        link = linear(use_gamma=True)
        chainer.optimizers.SGD().setup(link)
        link.gamma.update_rule.enabled = False
        before = link.gamma.array.copy()
        link.W.array *= 3
        assert_right(link, before)
        np.testing.assert_allclose(
            reference.true_norm(bake(link).W.array), before, rtol=TOLERANCE)

    def test_a_graph_is_not_changed_by_a_later_call(self):
        """Another hook gives this one another weight in each call."""
        class Scale(chainer.LinkHook):
            name = 'Scale'
            factor = 1.

            def forward_preprocess(self, args):
                self.W = args.link.W
                args.link.__dict__['W'] = self.W * self.factor

            def forward_postprocess(self, args):
                args.link.__dict__['W'] = self.W

        link, x = L.Linear(20, 10), drawn((3, 20))
        scale = Scale()
        link.add_hook(scale)
        link.add_hook(SpectralNormalization(use_gamma=True))
        grads = []
        for calls in ((1.,), (1., 3.)):
            outputs = []
            for scale.factor in calls:
                with chainer.using_config('train', False):
                    outputs.append(link(x))
            link.cleargrads()
            F.sum(outputs[0]).backward()
            grads.append(link.W.grad)
        np.testing.assert_array_equal(*grads)

    def test_a_poor_estimate_does_not_change_the_norm(self):
        link = L.Linear(300, 300).add_hook(
            SpectralNormalization(use_gamma=True, n_warmup=1))
        before = link.gamma.array.copy()
        for _ in range(3):
            norm(link, train=True)
        np.testing.assert_array_equal(link.gamma.array, before)

    @pytest.mark.parametrize('device', DEVICES)
    def test_an_infinite_norm_does_not_stay(self, device):
        link = linear(6, 5, use_gamma=True)
        link.to_device(device)
        W = link.W.array.copy()
        before = link.gamma.array.copy()
        link.W.array[...] = 3e38
        norm(link)
        link.W.array[...] = W
        assert_right(link, float(before))
        assert float(link.gamma.array) == float(before)

    def test_a_norm_that_is_too_small_for_gamma(self):
        """It became zero, so that no gradient reached the weight again."""
        link = linear(6, 5, use_gamma=True)
        link.W.array = np.full((5, 6), 1e-200)
        link.b.array = link.b.array.astype('d')
        norm(link)
        assert link.gamma.dtype == 'f'
        assert link.gamma.array == 1

    def test_a_trained_link_that_is_initialized_again(self):
        """Chainer initializes gamma before w0, from the old weight."""
        link = L.NStepRNNTanh(1, 20, 30, 0.).add_hook(
            SpectralNormalization(use_gamma=True))
        optimizer = chainer.optimizers.Adam(.1).setup(link)
        xs = [drawn((4, 20))]
        for _ in range(20):
            optimizer.update(lambda: F.sum(link(None, xs)[1][0] ** 2))
        layer = link.copy('init')[0]
        hook = layer.local_link_hooks['SpectralNormalization_w0']
        with chainer.using_config('train', False):
            hook.normalize_weight(layer)
        np.testing.assert_allclose(
            layer.gamma.array, reference.true_norm(layer.w0.array),
            rtol=TOLERANCE)

    def test_a_trained_copy_that_is_initialized_again(self):
        """Its gamma counts from the updates of its own weight."""
        link = linear(20, 30, use_gamma=True).copy('share')
        optimizer = chainer.optimizers.Adam(.1).setup(link)
        for _ in range(20):
            optimizer.update(lambda: F.sum(link(drawn((4, 20))) ** 2))
        again = link.copy('init')
        again.W.array *= 3
        sigma = reference.true_norm(again.W.array)
        assert_right(again, sigma)
        np.testing.assert_allclose(again.gamma.array, sigma, rtol=TOLERANCE)

    def test_none_without_a_warm_up(self):
        """As Chainer's hook, whose numbers n_warmup=0 follows."""
        link = linear(use_gamma=True, n_warmup=0)
        before = link.gamma.array.copy()
        link.W.array *= 3
        norm(link)
        np.testing.assert_array_equal(link.gamma.array, before)


class TestZeroWeights:

    @pytest.mark.parametrize('use_gamma', [False, True])
    @pytest.mark.parametrize('kind', ['Linear', 'EmbedID'])
    def test_they_learn(self, kind, use_gamma):
        """And a step is no larger than one of a layer without the hook."""
        if kind == 'Linear':
            link, x = L.Linear(16, 1, initialW=0), drawn((32, 16))
            t = 0.5 * x[:, :1]
        else:
            link = L.EmbedID(16, 1, initialW=0)
            x = np.arange(16, dtype='i')
            t = np.linspace(-.2, .2, 16, dtype='f').reshape(16, 1)
        link.add_hook(SpectralNormalization(use_gamma=use_gamma))
        optimizer = chainer.optimizers.SGD(0.1).setup(link)
        if use_gamma:
            assert link.gamma.array == 1
        losses = []
        for step in range(100):
            loss = F.mean_squared_error(link(x), t)
            link.cleargrads()
            loss.backward()
            if step == 0:
                assert np.linalg.norm(link.W.grad) < 10
            optimizer.update()
            losses.append(float(loss.array))
        assert np.linalg.norm(link.W.array) < 10
        if use_gamma:  # without it the norm is 1, which does not fit
            assert losses[-1] < losses[0] / 10

    @pytest.mark.parametrize('device', DEVICES)
    @pytest.mark.parametrize(('settings', 'expected'), [
        ({}, 1), ({'factor': 3.}, 3), ({'eps': .5}, 1), ({'cap': 5.}, 1)])
    def test_gradient(self, settings, expected, device):
        """That of gamma factor W, and with a cap that of W, which it is."""
        link = L.Linear(5, 4, initialW=0).add_hook(
            SpectralNormalization(**settings))
        link.to_device(device)
        gY = drawn((4, 5))
        Y = link.local_link_hooks['SpectralNormalization'].normalize_weight(
            link)
        Y.grad = link.xp.asarray(gY)
        link.cleargrads()
        Y.backward()
        np.testing.assert_array_equal(cuda.to_cpu(Y.array), 0)
        np.testing.assert_allclose(
            cuda.to_cpu(link.W.grad), expected * gY, rtol=1e-6)


class TestShapes:

    @pytest.mark.parametrize('use_gamma', [False, True])
    @pytest.mark.parametrize('shape', [(7, 20), (10, 30), (7, 30)])
    def test_a_weight_of_another_shape(self, shape, use_gamma):
        """Such as that of another number of classes."""
        model = chainer.Sequential(linear(20, 10, use_gamma=use_gamma))
        link = model[0]
        norm(link)
        with link.init_scope():
            link.W = chainer.Parameter(drawn(shape))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            sigma = reference.true_norm(link.W.array)
            assert_right(link, sigma if use_gamma else 1)
            assert_right(link, sigma if use_gamma else 1)
        assert link.W_u.shape == shape[:1]
        messages = [str(warning.message) for warning in caught]
        if shape[0] == 10 and not use_gamma:
            assert messages == []  # u fits, and is moved to the weight
        else:
            message, = messages
            names = ['W_u'] * (shape[0] != 10) + ['gamma'] * use_gamma
            assert message.startswith(
                f"Linear '0': {' and '.join(names)} belonged to")
            assert issubclass(
                caught[0].category, errors.SpectralNormalizationWarning)


class TestCopies:

    @pytest.mark.parametrize('again', [
        copy.copy, copy.deepcopy, lambda link: link.copy('copy'),
        lambda link: link.copy('share'),
        lambda link: pickle.loads(pickle.dumps(link))])
    @pytest.mark.parametrize('train', [False, True])
    def test_a_copy_goes_on_in_the_same_way(self, again, train):
        link = linear(20, 10)
        x = drawn((2, 20))
        link(x)
        link.W.array[...] += drawn((10, 20), 1e-3)
        twin = again(link)
        with chainer.using_config('train', train):
            u = link.W_u.copy()
            y = link(x).array
            link.W_u[...] = u  # a shallow copy has the same array
            np.testing.assert_array_equal(twin(x).array, y)

    def test_a_resumed_run_is_the_same(self, tmp_path):
        """Also where u was made anew, as the rule asks for no more than u."""
        link = linear(20, 10)
        link.W.array[...] = drawn((10, 20))
        serializers.save_npz(tmp_path / 'link.npz', link)
        other = linear(20, 10)
        serializers.load_npz(tmp_path / 'link.npz', other)
        x = drawn((2, 20))
        for _ in range(3):
            np.testing.assert_array_equal(link(x).array, other(x).array)


assert sn_function  # it is imported for what it does
