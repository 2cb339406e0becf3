"""The hook whose vector moves on in test mode, too, on request."""
import contextlib
import copy
import pickle
import threading

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import serializers
from chainer.training import extensions as chainer_extensions
from chainer.utils import type_check

import sn_function
from sn_function import (
    ChainSpectralNormalization,
    SpectralNormalization,
    errors,
    extensions,
)
from tests import reference

NAME = 'SpectralNormalization'


def linear(n_in=5, n_out=6, update_u='always', **settings):
    return L.Linear(n_in, n_out).add_hook(
        SpectralNormalization(update_u=update_u, **settings))


def x_of(*shape):
    return np.random.normal(size=shape).astype('f')


def hook_of(link, name=NAME):
    return link.local_link_hooks[name]


@contextlib.contextmanager
def in_test_mode(graph=True):
    with chainer.using_config('train', False), chainer.using_config(
            'enable_backprop', graph):
        yield


def moved(link, u, n):
    """The vector after some iterations from another."""
    return reference.power_iteration(
        link.W.array.astype('d'), u.astype('d'), n)[0]


def assert_moved(link, u, n):
    expected = moved(link, u, n) if n else u
    np.testing.assert_allclose(link.W_u, expected, rtol=1e-4, atol=1e-6)


graphs = pytest.mark.parametrize('graph', [True, False])


class TestCalls:

    @graphs
    @pytest.mark.parametrize('update_u', ['train', 'always'])
    def test_each_call_in_test_mode(self, graph, update_u):
        link = linear(n_warmup=0, n_power_iteration=2, update_u=update_u)
        u = link.W_u.copy()
        with in_test_mode(graph):
            for n in (1, 2, 3):
                link(x_of(2, 5))
                assert_moved(link, u, 2 * n * (update_u == 'always'))

    @graphs
    @pytest.mark.parametrize('settings', [
        {}, {'n_warmup': 0}, {'n_vectors': 3}, {'rtol': 1e-3},
        {'use_gamma': True}, {'cap': 0.5}, {'detach_uv': True}], ids=str)
    def test_it_is_as_in_training_mode(self, graph, settings):
        """Bit by bit, while the weight moves and when it is replaced."""
        always = linear(**settings)
        train = linear(update_u='train', **settings)
        for name, x in vars(always).items():
            if isinstance(x, (chainer.Parameter, np.ndarray)):
                vars(train)[name] = copy.deepcopy(x)
        rng = np.random.RandomState(1)
        for k in range(8):
            x = x_of(2, 5)
            with chainer.using_config('enable_backprop', graph):
                y = train(x)
                with chainer.using_config('train', False):
                    z = always(x)
            np.testing.assert_array_equal(y.array, z.array)
            np.testing.assert_array_equal(train.W_u, always.W_u)
            step = rng.normal(scale=0.02 if k % 4 else 1, size=(6, 5))
            for link in (train, always):
                link.W.array += step.astype('f')

    @graphs
    def test_normalize_weight(self, graph):
        link = linear(n_warmup=0)
        u = link.W_u.copy()
        with in_test_mode(graph):
            hook_of(link).normalize_weight(link)
        assert_moved(link, u, 1)

    def test_a_call_within_a_call(self):
        class Twice(L.Linear):
            depth = 1

            def forward(self, x):
                if self.depth:
                    self.depth -= 1
                    self(x)
                return super().forward(x)

        link = Twice(5, 6).add_hook(
            SpectralNormalization(n_warmup=0, update_u='always'))
        u = link.W_u.copy()
        with in_test_mode():
            link(x_of(2, 5))
        assert_moved(link, u, 2)

    def test_forward_that_raises(self):
        """Its weight was normalized, as in training mode."""
        link = linear(n_warmup=0)
        u = link.W_u.copy()
        with in_test_mode(), pytest.raises(type_check.InvalidType):
            link(x_of(2, 7))
        assert_moved(link, u, 1)
        assert isinstance(link.W, chainer.Parameter)

    def test_gradient(self):
        link = linear(n_warmup=0)
        W, u = link.W.array.astype('d'), link.W_u.astype('d')
        gY = np.random.normal(size=W.shape)
        with in_test_mode():
            Y = hook_of(link).normalize_weight(link)
        Y.grad = gY.astype('f')
        link.cleargrads()
        Y.backward()
        np.testing.assert_allclose(link.W.grad, reference.complex_step(
            lambda W: np.sum(gY * reference.spectral_normalize(W, u)[0]), W),
            rtol=1e-3, atol=1e-4)

    def test_it_may_be_changed(self):
        link = linear(n_warmup=0)
        u = link.W_u.copy()
        with in_test_mode():
            link(x_of(2, 5))
            hook_of(link).update_u = 'train'
            link(x_of(2, 5))
        assert_moved(link, u, 1)

    @graphs
    def test_training_in_test_mode_converges(self, graph):
        """With ``train=False`` throughout, u follows the weight."""
        link = linear(30, 20, n_warmup=0)
        optimizer = chainer.optimizers.SGD(0.01).setup(link)
        x = x_of(8, 30)
        with in_test_mode():
            for _ in range(200):
                optimizer.update(lambda x: F.mean(link(x) ** 2), x)
            Y = hook_of(link).normalize_weight(link).array
        assert reference.true_norm(Y) == pytest.approx(1, abs=2e-2)

    @pytest.mark.gpu
    @pytest.mark.parametrize('n_vectors', [1, 2])
    def test_on_a_device(self, n_vectors):
        link = linear(n_vectors=n_vectors)
        other = copy.deepcopy(link)
        other.to_device('@cupy:0')
        u, x = link.W_u.copy(), x_of(2, 5)
        with in_test_mode():
            for _ in range(2):
                y, z = link(x), other(chainer.get_device('@cupy:0').send(x))
        to_cpu = chainer.backends.cuda.to_cpu
        np.testing.assert_allclose(y.array, to_cpu(z.array), atol=1e-4)
        np.testing.assert_allclose(
            link.W_u, to_cpu(other.W_u), rtol=1e-3, atol=1e-4)
        assert (link.W_u != u).any()


class TestScopes:

    @graphs
    def test_cached(self, graph):
        link = linear(n_warmup=0)
        u = link.W_u.copy()
        with in_test_mode(graph):
            with sn_function.cached(link):
                for _ in range(3):
                    link(x_of(2, 5))
            assert_moved(link, u, 1)
            with sn_function.cached(link):
                link(x_of(2, 5))
        assert_moved(link, u, 2)

    def test_cached_without_a_graph_and_then_with_one(self):
        link = linear(n_warmup=0)
        u = link.W_u.copy()
        with sn_function.cached(link):
            with in_test_mode(graph=False):
                link(x_of(2, 5))
            link(x_of(2, 5))
            with in_test_mode():
                link(x_of(2, 5))
        assert_moved(link, u, 1)

    @graphs
    def test_normalized(self, graph):
        """What is read and what is called is one weight."""
        link = linear(n_warmup=0)
        u = link.W_u.copy()
        with in_test_mode(graph), sn_function.normalized(link):
            Y = link.W
            link(x_of(2, 5))
            assert link.W is Y
        assert_moved(link, u, 1)

    def test_a_link_of_the_scope_that_is_not_called(self):
        model = chainer.Sequential(linear(n_warmup=0), linear(n_warmup=0))
        u = model[1].W_u.copy()
        with in_test_mode(), sn_function.cached(model):
            model[0](x_of(2, 5))
        np.testing.assert_array_equal(model[1].W_u, u)

    def test_hooks_with_either_setting(self):
        model = chainer.Sequential(
            linear(n_warmup=0), linear(6, 5, 'train', n_warmup=0))
        us = [link.W_u.copy() for link in model]
        with in_test_mode(), sn_function.cached(model):
            model(x_of(2, 5))
        assert_moved(model[0], us[0], 1)
        np.testing.assert_array_equal(model[1].W_u, us[1])

    @graphs
    def test_the_hook_of_a_chain(self, graph):
        """A link that is called twice is normalized once."""
        a, b = L.Linear(5, 6), L.Linear(6, 6)
        model = chainer.Sequential(a, b, F.tanh, b).add_hook(
            ChainSpectralNormalization(update_u='always', n_warmup=0))
        us = [a.W_u.copy(), b.W_u.copy()]
        with in_test_mode(graph):
            model(x_of(2, 5))
        for link, u in zip((a, b), us):
            assert_moved(link, u, 1)
        hook = model.local_link_hooks[ChainSpectralNormalization.name]
        assert "update_u='always'" in repr(hook)

    @pytest.mark.parametrize('is_nested', [False, True])
    def test_forget(self, is_nested):
        """A second run starts where the first one did, and moves nothing."""
        def gradient(call):
            np.random.seed(0)
            link = linear(n_warmup=0)
            u = link.W_u.copy()
            x = chainer.Variable(x_of(2, 5))
            with in_test_mode():
                loss = F.sum(call(link, x) ** 2) + F.sum(link(-x) ** 2)
                link.cleargrads()
                for _ in range(2):
                    loss.backward(retain_grad=True)
            assert_moved(link, u, 2)
            return link.W.grad

        def forget(link, x):
            return F.forget(
                (lambda x: F.forget(link, x)) if is_nested else link, x)

        np.testing.assert_allclose(
            gradient(forget), gradient(lambda link, x: link(x)), rtol=1e-5,
            atol=1e-6)

    def test_an_n_step_link(self):
        link = L.NStepLSTM(1, 4, 3, 0.).add_hook(
            SpectralNormalization(update_u='always', n_warmup=0))
        layer = link[0]
        us = {f'w{i}': getattr(layer, f'w{i}_u').copy() for i in range(8)}
        with in_test_mode():
            link(None, None, [x_of(2, 4)])
        for name, u in us.items():
            np.testing.assert_allclose(
                getattr(layer, name + '_u'), reference.power_iteration(
                    getattr(layer, name).array, u)[0], rtol=1e-4, atol=1e-6)

    def test_threads(self):
        """All of their calls are counted, one after another."""
        link = linear(n_warmup=0)
        u = link.W_u.copy()
        x = x_of(2, 5)

        def work():
            with in_test_mode():
                for _ in range(5):
                    link(x)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_moved(link, u, 15)


class TestWhatElseCalls:

    def test_evaluator(self):
        link = linear(n_warmup=0)
        u = link.W_u.copy()
        iterator = chainer.iterators.SerialIterator(
            list(x_of(6, 5)), 2, repeat=False, shuffle=False)
        chainer_extensions.Evaluator(
            iterator, link, eval_func=lambda x: link(x))()
        assert_moved(link, u, 3)

    @pytest.mark.parametrize('look', [
        lambda link: sn_function.certify(link),
        lambda link: sn_function.summary(link, lambda f: f(x_of(2, 5))),
        lambda link: sn_function.bake(link),
        lambda link: extensions.SpectralNormReport(
            link, true_sigma=True).measure(),
        copy.deepcopy], ids=['certify', 'summary', 'bake', 'report', 'copy'])
    def test_what_only_looks_moves_nothing(self, look):
        link = linear(n_warmup=0)
        u = link.W_u.copy()
        with in_test_mode():
            look(link)
        np.testing.assert_array_equal(link.W_u, u)

    def test_a_baked_model_is_that_of_the_next_call(self):
        link, x = linear(), x_of(2, 5)
        plain = sn_function.bake(link)
        with in_test_mode():
            np.testing.assert_array_equal(plain(x).array, link(x).array)

    def test_a_report_is_that_of_the_next_call(self):
        """It iterates from a vector of another weight as that does."""
        link = linear(30, 20)
        link.W.array += x_of(20, 30) / 50
        layer, = extensions.SpectralNormReport(link).measure()
        W = link.W.array.copy()
        with in_test_mode():
            Y = hook_of(link).normalize_weight(link).array
        assert layer.sigma == pytest.approx(
            np.linalg.norm(W) / np.linalg.norm(Y), rel=1e-5)

    @pytest.mark.parametrize('format_', ['npz', 'pickle'])
    def test_a_resumed_run(self, format_, tmp_path):
        link, x = linear(n_warmup=0), x_of(2, 5)
        with in_test_mode():
            link(x)
            if format_ == 'npz':
                serializers.save_npz(tmp_path / 'file.npz', link)
                other = linear(n_warmup=0)
                serializers.load_npz(tmp_path / 'file.npz', other)
            else:
                other = pickle.loads(pickle.dumps(link))
            for _ in range(3):
                np.testing.assert_array_equal(
                    link(x).array, other(x).array)
        np.testing.assert_array_equal(link.W_u, other.W_u)


class TestSettings:

    def test_default(self):
        assert SpectralNormalization().update_u == 'train'

    def test_text(self):
        hook = SpectralNormalization(update_u='always')
        assert hook.update_u == 'always'
        assert repr(hook) == (
            "SpectralNormalization(n_power_iteration=1, update_u='always')")

    @pytest.mark.parametrize('bad', [True, None, 'test', ['train'], ''])
    def test_another_value(self, bad):
        with pytest.raises(errors.UpdateModeError, match=r"'train', .*'alw"):
            SpectralNormalization(update_u=bad)
        with pytest.raises(ValueError, match='update_u'):
            ChainSpectralNormalization(update_u=bad)
        hook = SpectralNormalization()
        with pytest.raises(errors.UpdateModeError):
            hook.update_u = bad
        assert hook.update_u == 'train'

    def test_of_an_old_pickle(self):
        """It holds no such setting."""
        state = vars(SpectralNormalization()).copy()
        del state['update_u']
        hook = SpectralNormalization.__new__(SpectralNormalization)
        hook.__setstate__(state)
        assert hook.update_u == 'train'
