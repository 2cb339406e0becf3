"""Hooks with several vectors."""
import contextlib
import copy
import pickle
import warnings

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest

from sn_function import (
    ChainSpectralNormalization,
    SpectralNormalization,
    bake,
    cached,
    errors,
)
from sn_function import functions as SF
from tests import reference
from tests.test_chain import assert_same_state, grads_of, hooked, images, train
from tests.test_parity import LINKS, inputs_of

NAME = 'SpectralNormalization'


def linear(n=4, in_size=9, out_size=7, **settings):
    return L.Linear(in_size, out_size).add_hook(
        SpectralNormalization(n_vectors=n, **settings))


def x_of(*shape, dtype='f'):
    return np.random.normal(size=shape).astype(dtype)


def vectors(link):
    return np.array([link.W_u, *link.W_us])


def axis_of(link):
    return sn_function.link_hooks.output_axis(link)


def norm_in_span(W, U, axis=0):
    """The largest singular value of W in the span of the rows of U."""
    Q, _ = np.linalg.qr(np.asarray(U, 'd').T)
    return reference.true_norm(Q.T @ reference.as_matrix(W.astype('d'), axis))


def normalized(link):
    return link.local_link_hooks[NAME].normalize_weight(link)


class TestNumbers:

    @pytest.mark.parametrize('lazy', [False, True])
    @pytest.mark.parametrize('name', LINKS)
    def test_the_norm_in_the_span(self, name, lazy):
        make_link, shape = LINKS[name]
        link = make_link(None if lazy else 3).add_hook(
            SpectralNormalization(n_vectors=3, n_warmup=0))
        link(*inputs_of(shape, np.random.RandomState(0)))
        for is_train in (True, True, False, False):
            W, U = link.W.array, vectors(link)
            with chainer.using_config('train', is_train):
                Y = normalized(link).array
            sigma = norm_in_span(W, U, axis_of(link))
            np.testing.assert_allclose(Y, W / sigma, rtol=1e-4, atol=1e-6)
            assert (vectors(link) != U).any() == is_train

    def test_one_is_power_iteration_bit_for_bit(self):
        np.random.seed(0)
        link = linear(1)
        np.random.seed(0)
        other = L.Linear(9, 7).add_hook(SpectralNormalization())
        for _ in range(4):
            x = x_of(2, 9)
            np.testing.assert_array_equal(link(x).array, other(x).array)
            np.testing.assert_array_equal(link.W_u, other.W_u)
        assert not hasattr(link, 'W_us')
        assert link._persistent == other._persistent

    def test_one_that_fits_is_power_iteration_bit_for_bit(self):
        np.random.seed(0)
        link = linear(4, out_size=1)
        np.random.seed(0)
        other = linear(1, out_size=1)
        for _ in range(3):
            x = x_of(2, 9)
            np.testing.assert_array_equal(link(x).array, other(x).array)

    @pytest.mark.parametrize('K', [1, 3])
    @pytest.mark.parametrize('dtype', ['e', 'f', 'd'])
    def test_as_the_function(self, K, dtype):
        with chainer.using_config('dtype', np.dtype(dtype)):
            link = linear(n_power_iteration=K, n_warmup=0)
        U = vectors(link)
        for _ in range(3):
            Y = normalized(link).array
            expected = SF.spectral_normalize(
                link.W.array, U, K, update_u=True).array
            np.testing.assert_array_equal(Y, expected)
            np.testing.assert_array_equal(vectors(link), U)
            assert Y.dtype == link.W_us.dtype == dtype

    def test_the_gradient(self):
        """By differences, with the span as it is."""
        with chainer.using_config('dtype', np.float64):
            link = linear(n_warmup=0)
        gY, direction = x_of(2, 7, 9, dtype='d')
        W, U = link.W.array.copy(), vectors(link)
        link.cleargrads()
        F.sum(normalized(link) * gY).backward()

        def loss(W):
            return (W / norm_in_span(W, U) * gY).sum()

        h = 1e-6
        expected = (loss(W + h * direction) - loss(W - h * direction)) / 2 / h
        assert (link.W.grad * direction).sum() == pytest.approx(
            expected, rel=1e-6)

    def test_it_follows_close_singular_values(self):
        """The reason for it: one vector does not."""
        errors_of = {}
        for n in (1, 8):
            rng = np.random.RandomState(0)
            link = linear(n, 60, 50)
            U, _, V = np.linalg.svd(rng.normal(size=(50, 60)), False)
            link.W.array[...] = (U * np.r_[
                np.linspace(1, 1.05, 6), np.linspace(.9, .1, 44)]) @ V
            worst = 0
            for i in range(150):
                link.W.array += 1e-3 * rng.normal(size=(50, 60))
                Y = normalized(link).array
                if i > 50:
                    worst = max(worst, reference.true_norm(Y) - 1)
            errors_of[n] = worst
        assert errors_of[8] < errors_of[1] / 5

    def test_use_gamma_factor_and_cap(self):
        link = linear(7, use_gamma=True, factor=.5, n_warmup=100)
        assert reference.true_norm(normalized(link).array) == pytest.approx(
            reference.true_norm(link.W.array) / 2, rel=1e-4)
        link = linear(7, cap=.3)
        assert reference.true_norm(normalized(link).array) == pytest.approx(
            .3, rel=1e-4)

    def test_v(self):
        link = linear(n_warmup=0)
        hook = link.local_link_hooks[NAME]
        W, U = link.W.array.copy(), vectors(link)
        link(x_of(2, 9))
        Q, _ = np.linalg.qr(U.astype('d').T)
        v = np.linalg.svd(Q.T @ W)[2][0]
        assert abs(v @ hook.v) == pytest.approx(1, abs=1e-5)


class TestState:

    def test_what_is_added_and_removed(self):
        link = L.Linear(9, 7)
        before = {*vars(link), '_local_link_hooks'}
        hook = SpectralNormalization(n_vectors=3)
        link.add_hook(hook)
        assert link.W_us.shape == (2, 7)
        assert {'W_u', 'W_us'} <= link._persistent
        link.delete_hook(hook.name)
        assert set(vars(link)) == before
        assert not link._persistent

    def test_a_change_of_the_number(self):
        link = linear(1)
        hook = link.local_link_hooks[NAME]
        for n in (3, 5, 2):
            hook.n_vectors = n
            link(x_of(2, 9))
            assert link.W_us.shape == (n - 1, 7)
        hook.n_vectors = 1
        link(x_of(2, 9))
        hook.n_vectors = 2
        link.delete_hook(hook.name)
        assert not link._persistent

    def test_to_delete_after_a_change_of_the_number(self):
        link = linear(1)
        link.local_link_hooks[NAME].n_vectors = 3
        link.delete_hook(NAME)
        assert not link._persistent

    def test_the_name_is_taken(self):
        link = L.Linear(9, 7)
        link.W_us = 1
        with pytest.raises(errors.HookCollisionError, match='W_us'):
            link.add_hook(SpectralNormalization(n_vectors=3))
        assert not link.local_link_hooks
        link.add_hook(SpectralNormalization())

    def test_two_hooks(self):
        link = L.Linear(9, 7)
        link.V = link.W
        link.add_hook(SpectralNormalization(n_vectors=3))
        link.add_hook(SpectralNormalization(
            weight_name='V', name='V', n_vectors=2))
        assert (link.W_us.shape, link.V_us.shape) == ((2, 7), (1, 7))

    @pytest.mark.parametrize('n', [0, -1, 1.5, True, '3', None])
    def test_not_a_number_of_vectors(self, n):
        for hook in (SpectralNormalization, ChainSpectralNormalization):
            with pytest.raises(
                    errors.IterationCountError, match=r'^n_vectors must be'):
                hook(n_vectors=n)

    def test_the_text_of_a_hook(self):
        assert repr(SpectralNormalization(n_vectors=8)) == (
            'SpectralNormalization(n_power_iteration=1, n_vectors=8)')
        assert repr(ChainSpectralNormalization(n_vectors=8)) == (
            'ChainSpectralNormalization(n_power_iteration=1, n_vectors=8)')

    def test_a_hook_of_an_older_pickle(self):
        link = linear(1)
        del vars(link.local_link_hooks[NAME])['n_vectors']
        link = pickle.loads(pickle.dumps(link))
        link(x_of(2, 9))
        assert not hasattr(link, 'W_us')

    @pytest.mark.parametrize('make_copy', [
        copy.deepcopy, lambda link: link.copy('copy'),
        lambda link: pickle.loads(pickle.dumps(link))],
        ids=['deepcopy', 'copy', 'pickle'])
    def test_a_copy_goes_on_alone(self, make_copy):
        link, x = linear(), x_of(2, 9)
        link(x)
        other = make_copy(link)
        for _ in range(3):
            np.testing.assert_array_equal(other(x).array, link(x).array)
        before = vectors(link)
        other.W.array[0] += 1
        other(x)
        np.testing.assert_array_equal(vectors(link), before)

    def test_shared_copies_share_vectors(self):
        link = linear()
        other = link.copy('share')
        other(x_of(2, 9))
        assert other.W_u is link.W_u
        assert other.W_us is link.W_us

    def test_repeat_makes_them_anew(self):
        for link in linear(4, 50, 60).repeat(2, mode='init'):
            assert reference.true_norm(normalized(link).array) == (
                pytest.approx(1, abs=3e-2))

    def test_a_new_dtype(self):
        link = linear()
        for param in link.params():
            param.array = param.array.astype('d')
        before = vectors(link)
        with chainer.using_config('train', False):
            link(x_of(2, 9, dtype='d'))
        assert link.W_u.dtype == link.W_us.dtype == 'd'
        np.testing.assert_array_equal(vectors(link), before)

    @pytest.mark.parametrize(('change', 'names'), [
        (lambda link: setattr(link, 'W_u', x_of(6)), 'W_u'),
        (lambda link: setattr(link, 'W_us', x_of(3, 6)), 'W_us'),
        (lambda link: setattr(link, 'W_us', x_of(7)), 'W_us'),
        (lambda link: setattr(link, 'W_u', x_of(4, 7)), 'W_u'),
        (lambda link: setattr(link.W, 'array', x_of(8, 9)), 'W_u and W_us')])
    def test_another_shape(self, change, names):
        link = linear(n_warmup=300)
        change(link)
        with pytest.warns(errors.SpectralNormalizationWarning,
                          match=f'^Linear: {names} belonged to .* anew'):
            Y = normalized(link).array
        assert reference.true_norm(Y) == pytest.approx(1, abs=1e-3)
        assert link.W_us.shape == (3, len(link.W_u)) == (3, len(link.W))

    def test_another_shape_and_gamma(self):
        link = linear(use_gamma=True)
        link.W.array = x_of(8, 9)
        with pytest.warns(errors.SpectralNormalizationWarning,
                          match=r'^Linear: W_u, W_us and gamma belonged'):
            normalized(link)

    @pytest.mark.parametrize('value', [0, np.nan, np.inf])
    @pytest.mark.parametrize('row', [None, 0, 2])
    @pytest.mark.parametrize('in_scope', [False, True])
    def test_bad_ones_are_made_anew(self, value, row, in_scope):
        link = linear(n_warmup=300)
        u = link.W_u.copy()
        (link.W_u if row is None else link.W_us[row])[...] = value
        name = 'W_u' if row is None else 'W_us'
        scope = cached(link) if in_scope else contextlib.nullcontext()
        with scope, pytest.warns(
                errors.SpectralNormalizationWarning,
                match=f'^Linear: {name} was zero or not finite'):
            Y = normalized(link).array
        assert reference.true_norm(Y) == pytest.approx(1, abs=1e-3)
        assert np.isfinite(vectors(link)).all()
        if row is not None:
            assert abs(u @ link.W_u) == pytest.approx(1, abs=1e-3)
        normalized(link)  # once; warnings are errors here

    def test_dependent_ones_are_made_anew(self):
        link = linear(n_warmup=0)
        link.W_us[1] = 2 * link.W_u - link.W_us[0]
        u = link.W_u.copy()
        with chainer.using_config('train', False), pytest.warns(
                errors.SpectralNormalizationWarning,
                match=r'^Linear: W_us .* not independent'):
            normalized(link)
        np.testing.assert_array_equal(link.W_u, u)
        assert np.linalg.matrix_rank(vectors(link)) == 4

    def test_a_weight_that_is_not_finite(self):
        link = linear()
        before = vectors(link)
        W = link.W.array.copy()
        link.W.array[0, 0] = np.nan
        assert np.isnan(normalized(link).array).all()
        np.testing.assert_array_equal(vectors(link), before)
        link.W.array[...] = 0
        assert not normalized(link).array.any()
        np.testing.assert_array_equal(vectors(link), before)
        link.W.array[...] = W
        assert np.isfinite(normalized(link).array).all()

    @pytest.mark.parametrize('is_train', [False, True])
    def test_a_stale_one_is_not_used(self, is_train):
        link = linear(2, 50, 40)
        link.W.array[...] = x_of(40, 50)
        with chainer.using_config('train', is_train):
            Y = normalized(link).array
        assert reference.true_norm(Y) == pytest.approx(1, abs=.05)

    def test_training_in_test_mode_moves_nothing(self):
        link = linear()
        before = vectors(link)
        with chainer.using_config('train', False):
            for _ in range(2):
                link(x_of(2, 9))
        np.testing.assert_array_equal(vectors(link), before)


class TestForget:

    @pytest.mark.parametrize('dtype', ['f', 'd'])
    def test_gradients(self, dtype):
        found = []
        for forget in (lambda f, x: f(x), F.forget):
            np.random.seed(0)
            with chainer.using_config('dtype', np.dtype(dtype)):
                link = linear(n_warmup=0, n_power_iteration=2)
            x = chainer.Variable(x_of(2, 9, dtype=dtype))
            loss = F.sum(forget(link, x) ** 2) + F.sum(
                forget(link, 2 * x) ** 3)
            link.cleargrads()
            loss.backward()
            found.append([link.W.grad, vectors(link)])
        for a, b in zip(*found):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    def test_recomputing_without_forget(self):
        link, x = linear(n_warmup=0), x_of(2, 9)
        y, before = link(x).array, vectors(link)
        with chainer.using_config('in_recomputing', True):
            np.testing.assert_array_equal(link(x).array, y)
        np.testing.assert_array_equal(vectors(link), before)


class TestModels:

    @pytest.mark.parametrize('detach_uv', [False, True])
    def test_hook_of_a_chain_as_one_on_each_link(self, detach_uv):
        models = [hooked(kind, detach_uv=detach_uv, n_vectors=3)
                  for kind in ('link', 'chain')]
        losses = []
        for model in models:
            np.random.seed(1)
            optimizer = chainer.optimizers.MomentumSGD(.05).setup(model)
            losses.append(train(model, optimizer, 6, in_test_mode=3))
        np.testing.assert_allclose(*losses, rtol=1e-5)
        assert_same_state(*models, rtol=1e-4)
        assert models[1].same.W_us.shape == (2, 16)
        assert models[1].out.W_us.shape == (0, 1)

    def test_a_chain_that_loses_its_hook(self):
        model = hooked('chain', n_vectors=3)
        model(images())
        model.delete_hook('ChainSpectralNormalization')
        assert not any(hasattr(link, 'W_us') for link in model.links())

    def test_cached(self):
        """All calls start from the same vectors, which move on once."""
        grads = []
        for share in (True, False):
            np.random.seed(0)
            model = hooked('link', n_vectors=3, n_warmup=0)
            model(images())
            model.cleargrads()
            links = [link for link in model.children() if link.W_u is not None]
            starts = [vectors(link) for link in links]
            losses = []
            if share:
                with cached(model):
                    for i in range(3):
                        losses.append((i + 1) * model(images(seed=i)))
            else:
                for i in range(3):
                    for link, start in zip(links, starts):
                        link.W_u[...], link.W_us[...] = start[0], start[1:]
                    losses.append((i + 1) * model(images(seed=i)))
            F.add(*losses).backward()
            grads.append(grads_of(model) + [vectors(link) for link in links])
        for a, b in zip(*grads):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    def test_a_second_graph_in_a_scope_starts_from_the_same_vectors(self):
        link = linear(n_warmup=0)
        with cached(link):
            with chainer.no_backprop_mode():
                Y = normalized(link).array
            after = vectors(link)
            np.testing.assert_array_equal(normalized(link).array, Y)
            np.testing.assert_array_equal(vectors(link), after)

    @pytest.mark.parametrize('n', [1, 4])
    def test_vectors_of_half_precision_stay_so(self, n):
        """Iterations have them in single precision."""
        with chainer.using_config('dtype', np.float16):
            link = linear(n)
        arrays = link.W_u, getattr(link, 'W_us', None)
        before = link.W_u.copy()
        with cached(link):
            with chainer.using_config('train', False), \
                    chainer.no_backprop_mode():
                normalized(link)
            normalized(link)
        assert link.W_u is arrays[0]
        assert getattr(link, 'W_us', None) is arrays[1]
        assert (link.W_u != before).any()

    @pytest.mark.parametrize('name', ['W_u', 'W_us'])
    def test_vectors_that_are_taken_away_in_a_scope(self, name):
        link = linear()
        with cached(link):
            with chainer.using_config('train', False):
                normalized(link)
            setattr(link, name, None)
            Y = normalized(link).array
        assert link.W_us.shape == (3, 7)
        np.testing.assert_allclose(
            Y, link.W.array / norm_in_span(link.W.array, vectors(link)),
            rtol=1e-2)

    def test_other_weights_at_once(self):
        Ws = [x_of(7, 9), x_of(5, 6), x_of(7, 9), x_of(4, 3)]
        us = [x_of(3, 7), x_of(5), x_of(3, 7), x_of(2, 4)]
        moved = copy.deepcopy(us)
        expected = [
            SF.spectral_normalize(W, u, return_sigma=True, update_u=True)
            for W, u in zip(Ws, moved)]
        Ys, sigmas = SF.spectral_normalize_all(
            Ws, us, return_sigma=True, update_u=True)
        for u, Y, sigma, each, after in zip(us, Ys, sigmas, expected, moved):
            np.testing.assert_array_equal(Y.array, each[0].array)
            np.testing.assert_array_equal(sigma.array, each[1].array)
            np.testing.assert_array_equal(u, after)

    def test_an_n_step_link(self):
        link = L.NStepLSTM(1, 5, 4, 0.).add_hook(
            SpectralNormalization(n_vectors=4, n_warmup=100))
        link(None, None, [x_of(3, 5)])
        assert link[0].w0_us.shape == (3, 4)
        hook = link[0].local_link_hooks[f'{NAME}_w0']
        assert reference.true_norm(
            hook.normalize_weight(link[0]).array) == pytest.approx(1, abs=1e-4)
        link.delete_hook(NAME)
        assert not link[0]._persistent

    def test_depthwise_convolution_has_one_vector_for_each_group(self):
        links = []
        for n in (1, 4):
            np.random.seed(0)
            links.append(L.Convolution2D(6, 6, 3, groups=6).add_hook(
                SpectralNormalization(groups='each', n_vectors=n)))
        np.testing.assert_array_equal(*[
            normalized(link).array for link in links])
        assert links[1].W_us.shape == (0, 6)

    @pytest.mark.parametrize('in_place', [False, True])
    def test_bake(self, in_place):
        model = hooked('chain', n_vectors=3)
        model(images())
        model(images())
        with chainer.using_config('train', False):
            expected = model(images()).array
            W = normalized(model.same).array
            baked = bake(model, in_place=in_place)
            np.testing.assert_array_equal(baked(images()).array, expected)
        np.testing.assert_array_equal(baked.same.W.array, W)
        assert not any(link._persistent for link in baked.links())

    def test_training_resumes_bit_for_bit(self, tmp_path):
        def make():
            model = hooked('chain', n_vectors=3, use_gamma=True)
            model(images())
            return model, chainer.optimizers.Adam().setup(model)

        whole, optimizer = make()
        train(whole, optimizer, 4)
        chainer.serializers.save_npz(tmp_path / 'model.npz', whole)
        chainer.serializers.save_npz(tmp_path / 'optimizer.npz', optimizer)
        losses = train(whole, optimizer, 4)
        model, optimizer = make()
        chainer.serializers.load_npz(tmp_path / 'model.npz', model)
        chainer.serializers.load_npz(tmp_path / 'optimizer.npz', optimizer)
        np.testing.assert_array_equal(train(model, optimizer, 4), losses)
        assert_same_state(model, whole)

    def test_more_vectors_than_a_weight_of_one_row_has(self):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            link = linear(16, 3, 2)
            link(x_of(2, 3))
        assert link.W_us.shape == (1, 2)
        assert reference.true_norm(normalized(link).array) == pytest.approx(
            1, abs=1e-5)
