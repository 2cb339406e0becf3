"""The hook: what Chainer documents of it, and what happens in the corners."""
import copy
import gc
import io
import pickle
import weakref

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks, serializers

import sn_function
from sn_function import SpectralNormalization, errors
from tests import reference
from tests.test_parity import LINKS, inputs_of
from tests.tools.defects import TwoWeights


def linear(n_in=5, n_out=6, **kwargs):
    return L.Linear(n_in, n_out).add_hook(SpectralNormalization(**kwargs))


def x_of(*shape):
    return np.random.normal(size=shape).astype('f')


def norm(link, name='SpectralNormalization'):
    hook = link.local_link_hooks[name]
    with chainer.using_config('train', False):
        Y = hook.normalize_weight(link).array
    return reference.true_norm(
        Y, sn_function.link_hooks.output_axis(link))


def backward(link, loss):
    link.cleargrads()
    loss.backward()


def save(obj):
    file = io.BytesIO()
    serializers.save_npz(file, obj)
    file.seek(0)
    return file


class TestDocumentation:
    """The page of ``chainer.link_hooks.SpectralNormalization``."""

    def test_constructor(self):
        hook = SpectralNormalization(2, 1e-4, True, 3.0, 'H', 'mine')
        assert (hook.n_power_iteration, hook.eps, hook.use_gamma, hook.factor,
                hook.weight_name, hook.name) == (2, 1e-4, True, 3.0, 'H',
                                                 'mine')
        hook = SpectralNormalization()
        theirs = link_hooks.SpectralNormalization()
        for name in ('n_power_iteration', 'eps', 'use_gamma', 'factor',
                     'weight_name', 'name', 'vector_name', 'axis'):
            assert getattr(hook, name) == getattr(theirs, name)
        assert isinstance(hook, chainer.LinkHook)

    def test_is_no_context_manager(self):
        with pytest.raises(NotImplementedError), SpectralNormalization():
            pass
        with pytest.raises(NotImplementedError):
            SpectralNormalization().__exit__()

    def test_vector_is_persistent(self):
        link = linear()
        assert link.W_u.shape == (6,)
        assert link.W_u.dtype == link.W.dtype
        assert 'W_u' in link._persistent
        assert [n for n, _ in link.namedparams()] == ['/W', '/b']

    def test_delete_hook_removes_what_it_added(self):
        link = linear(use_gamma=True)
        link(x_of(2, 5))
        attributes = set(L.Linear(5, 6).__dict__)
        link.delete_hook('SpectralNormalization')
        assert set(link.__dict__) - {'_local_link_hooks'} == attributes
        assert [n for n, _ in link.namedparams()] == ['/W', '/b']
        assert 'W_u' not in link._persistent
        link.add_hook(SpectralNormalization())
        assert norm(link) == pytest.approx(1, abs=1e-2)

    def test_gamma_starts_as_the_largest_singular_value(self):
        for link in (linear(use_gamma=True),
                     L.Deconvolution2D(3, 4, 2).add_hook(
                         SpectralNormalization(use_gamma=True))):
            axis = sn_function.link_hooks.output_axis(link)
            assert link.gamma.shape == ()
            assert link.gamma.dtype == np.float32
            np.testing.assert_allclose(
                link.gamma.array, reference.true_norm(link.W.array, axis),
                rtol=1e-6)

    def test_gamma_of_a_float16_weight(self):
        with chainer.using_config('dtype', np.float16):
            link = linear(use_gamma=True)
        assert link.gamma.dtype == np.float32
        with np.errstate(all='raise'):
            backward(link, F.sum(link(x_of(2, 5).astype(np.float16))))
        assert np.isfinite(link.gamma.grad)

    def test_gamma_is_trained(self):
        link = linear(use_gamma=True)
        optimizer = chainer.optimizers.SGD(0.1).setup(link)
        before = link.gamma.array.copy()
        optimizer.update(lambda x: F.sum(link(x) ** 2), x_of(2, 5))
        assert link.gamma.array != before

    def test_factor_multiplies_the_weight(self):
        link = linear(factor=2.5, n_warmup=200)
        np.testing.assert_allclose(norm(link), 2.5, rtol=1e-4)

    @pytest.mark.parametrize('axis', [0, 1])
    def test_reshape_W(self, axis):
        hook = SpectralNormalization()
        (L.Deconvolution2D if axis else L.Convolution2D)(3, 4, 2).add_hook(
            hook)
        assert hook.axis == axis
        W = x_of(3, 4, 2, 2)
        for kind in (np.asarray, chainer.Variable):
            out = chainer.as_variable(hook.reshape_W(kind(W)))
            np.testing.assert_array_equal(
                out.array, reference.as_matrix(W, axis))

    @pytest.mark.parametrize('train', [True, False])
    def test_u_moves_on_in_training_only(self, train):
        link = linear(n_warmup=0)
        u = link.W_u.copy()
        expected = reference.power_iteration(link.W.array, u)[0]
        with chainer.using_config('train', train):
            y1, y2 = link(x_of(2, 5)), link(x_of(2, 5))
        assert y1.dtype == y2.dtype
        if train:
            expected = reference.power_iteration(link.W.array, u, 2)[0]
            np.testing.assert_allclose(link.W_u, expected, rtol=1e-5)
        else:
            np.testing.assert_array_equal(link.W_u, u)

    def test_test_mode_is_a_function_of_W_and_u(self):
        link, x = linear(), x_of(2, 5)
        with chainer.using_config('train', False):
            np.testing.assert_array_equal(link(x).array, link(x).array)


@pytest.mark.parametrize('name', LINKS)
@pytest.mark.parametrize('lazy', [False, True])
def test_links(name, lazy):
    """The link computes what it would with the normalized weight."""
    make_link, shape = LINKS[name]
    link = make_link(None if lazy else 3)
    plain = copy.deepcopy(link)
    # Weights of a lazy link are drawn at the first call, before u.
    np.random.seed(1)
    link.add_hook(SpectralNormalization(n_warmup=500))
    x = inputs_of(shape, np.random.RandomState(0))
    with chainer.using_config('train', False):
        y = link(*x)
        Y = link.local_link_hooks['SpectralNormalization'].normalize_weight(
            link).array
        plain(*x)
        plain.copyparams(link, copy_persistent=False)
        plain.W.array[...] = Y
        np.testing.assert_array_equal(y.array, plain(*x).array)
    assert isinstance(link.W, chainer.Parameter)
    assert norm(link) == pytest.approx(1, abs=1e-2)
    backward(link, F.sum(link(*x)))
    assert np.isfinite(link.W.grad).all()


class TestLazy:

    @pytest.mark.parametrize('use_gamma', [False, True])
    def test_first_call(self, use_gamma):
        link = L.Linear(None, 6).add_hook(
            SpectralNormalization(use_gamma=use_gamma))
        assert link.W_u is None
        link(x_of(2, 5))
        assert link.W_u.shape == (6,)
        assert norm(link) == pytest.approx(
            link.gamma.array if use_gamma else 1, rel=1e-2)

    @pytest.mark.parametrize('kwargs', [
        {}, {'n_batch_axes': 2}], ids=['plain', 'two batch axes'])
    def test_linear_flattens_its_input(self, kwargs):
        """Chainer's hook takes x.shape[1] for the input size."""
        x = x_of(2, 3, 4)
        link = L.Linear(None, 6).add_hook(SpectralNormalization())
        expected = L.Linear(None, 6)(x, **kwargs)
        assert link(x, **kwargs).shape == expected.shape
        link = L.Linear(None, 6).add_hook(SpectralNormalization())
        assert link(x=x, **kwargs).shape == expected.shape

    @pytest.mark.parametrize('forward', [
        lambda self, x: L.Linear.forward(self, x),
        lambda self, *xs: L.Linear.forward(self, *xs)])
    def test_a_subclass_with_its_own_forward(self, forward):
        link = type('Own', (L.Linear,), {'forward': forward})(None, 6)
        link.add_hook(SpectralNormalization())
        assert link(x_of(2, 5)).shape == (2, 6)
        assert link.W_u.shape == (6,)

    def test_a_call_without_an_argument(self):
        link = L.Linear(None, 6).add_hook(SpectralNormalization())
        with pytest.raises(TypeError, match="missing a required argument"):
            link()

    def test_gamma_is_known_to_an_optimizer_set_up_before(self):
        link = L.Linear(None, 6).add_hook(
            SpectralNormalization(use_gamma=True))
        optimizer = chainer.optimizers.Adam().setup(link)
        optimizer.update(lambda x: F.sum(link(x) ** 2), x_of(2, 5))
        before = link.gamma.array.copy()
        optimizer.update(lambda x: F.sum(link(x) ** 2), x_of(2, 5))
        assert link.gamma.array != before

    def test_a_float64_link(self):
        with chainer.using_config('dtype', np.float64):
            link = L.Linear(None, 6).add_hook(
                SpectralNormalization(use_gamma=True))
            backward(link, F.sum(link(np.random.normal(size=(2, 5)))))
        assert link.W_u.dtype == link.gamma.grad.dtype == np.float64

    @pytest.mark.parametrize('dtypes', [('f', 'd'), ('d', 'f')])
    def test_another_dtype_at_the_first_call(self, dtypes):
        with chainer.using_config('dtype', np.dtype(dtypes[0])):
            link = L.Linear(None, 6, nobias=True).add_hook(
                SpectralNormalization(use_gamma=True))
        with chainer.using_config('dtype', np.dtype(dtypes[1])):
            backward(link, F.sum(link(x_of(2, 5).astype(dtypes[1]))))
        assert link.gamma.dtype == link.gamma.grad.dtype == dtypes[1]

    def test_a_link_whose_weight_needs_more_than_the_input_size(self):
        link = L.LocalConvolution2D(None, 4, ksize=3)
        link.add_hook(SpectralNormalization())
        with pytest.raises(errors.UninitializedWeightError):
            link(x_of(2, 3, 5, 5))

    def test_a_link_that_cannot_be_initialized_from_the_call(self):
        class Custom(chainer.Link):

            def __init__(self):
                super().__init__()
                with self.init_scope():
                    self.W = chainer.Parameter()

            def forward(self, x):
                return F.linear(x, self.W)

        link = Custom().add_hook(SpectralNormalization())
        with pytest.raises(
                errors.UninitializedWeightError, match=r'Custom\.W'):
            link(x_of(2, 5))
        with pytest.raises(errors.UninitializedWeightError):
            link.local_link_hooks[
                'SpectralNormalization'].normalize_weight(link)
        link.W.initialize((6, 5))
        assert link(x_of(2, 5)).shape == (2, 6)


class TestWeightIsPutBack:

    def check(self, link, W):
        assert link.W is W
        assert 'forward' not in link.__dict__
        assert not [k for k in link.__dict__ if k.startswith('_sn_')]
        assert link(x_of(2, 5)).shape == (2, 6)
        assert link.W is W

    @pytest.mark.parametrize('error', [
        ValueError, MemoryError, KeyboardInterrupt])
    def test_forward_raises(self, error):
        class Fails(L.Linear):
            fails = True

            def forward(self, x):
                assert not isinstance(self.W, chainer.Parameter)
                if self.fails:
                    raise error
                return super().forward(x)

        link = Fails(5, 6).add_hook(SpectralNormalization())
        W = link.W
        try:
            link(x_of(2, 5))
        except error:
            # Within the handler, where a trainer would save a snapshot.
            assert link.W is W
            save(link)
        Fails.fails = False
        self.check(link, W)

    @pytest.mark.parametrize('when', ['pre', 'post'])
    @pytest.mark.parametrize('first', [True, False])
    def test_another_hook_raises(self, when, first):
        class Fails(chainer.LinkHook):
            name = 'Fails'

            def forward_preprocess(self, args):
                if when == 'pre':
                    raise RuntimeError

            def forward_postprocess(self, args):
                if when == 'post':
                    raise RuntimeError

        hooks = [Fails(), SpectralNormalization()]
        link = L.Linear(5, 6)
        for hook in hooks if first else hooks[::-1]:
            link.add_hook(hook)
        W = link.W
        with pytest.raises(RuntimeError):
            link(x_of(2, 5))
        gc.collect()
        link.delete_hook('Fails')
        self.check(link, W)

    def test_another_hook_raises_after_two_of_ours(self):
        class Fails(chainer.LinkHook):
            name = 'Fails'

            def forward_preprocess(self, args):
                raise RuntimeError

        link = TwoWeights()
        for name in ('W', 'H'):
            link.add_hook(SpectralNormalization(weight_name=name, name=name))
        link.add_hook(Fails())
        W, H = link.W, link.H
        with pytest.raises(RuntimeError):
            link(x_of(2, 5))
        gc.collect()
        link.delete_hook('Fails')
        self.check(link, W)
        assert link.H is H

    @pytest.mark.parametrize('first', [True, False])
    def test_beside_weight_standardization(self, first):
        """Chainer's, which puts back what it found, in the same order."""
        hooks = [SpectralNormalization(), link_hooks.WeightStandardization()]
        link = L.Convolution2D(3, 6, 3)
        for hook in hooks if first else hooks[::-1]:
            link.add_hook(hook)
        W = link.W
        for _ in range(2):
            y = link(x_of(2, 3, 5, 5))
            assert link.W is W
        backward(link, F.sum(y ** 2))
        assert np.isfinite(W.grad).all()

    def test_an_injected_call(self):
        """Chainer prefers a mixin's __call__ to forward."""
        class Mixin:

            def __call__(self, x):
                y = self.forward(x)
                assert not isinstance(self.W, chainer.Parameter)
                np.testing.assert_array_equal(y.array, self.forward(x).array)
                return y

        class Mixed(L.Linear, Mixin):
            pass

        link = Mixed(5, 6).add_hook(SpectralNormalization())
        W = link.W
        link(x_of(2, 5))
        self.check(link, W)

    def test_recursion(self):
        class Recursive(L.Linear):
            depth = 0

            def forward(self, x):
                if self.depth < 2:
                    self.depth += 1
                    return self(x) + super().forward(x)
                return super().forward(x)

        link = Recursive(5, 6).add_hook(SpectralNormalization())
        W = link.W
        link(x_of(2, 5))
        self.check(link, W)

    def test_recursion_that_raises(self):
        class Recursive(L.Linear):
            depth = 0

            def forward(self, x):
                self.depth += 1
                if self.depth < 3:
                    return self(x)
                if self.depth == 3:
                    raise RuntimeError
                return super().forward(x)

        link = Recursive(5, 6).add_hook(SpectralNormalization())
        W = link.W
        with pytest.raises(RuntimeError):
            link(x_of(2, 5))
        self.check(link, W)

    def test_an_instance_with_its_own_forward(self):
        link = linear()
        plain = link.forward
        link.forward = lambda x: 2 * plain(x)
        own = link.forward
        W, x = link.W, x_of(2, 5)
        with chainer.using_config('train', False):
            y = link(x)
            del link.forward
            np.testing.assert_allclose(y.array, 2 * link(x).array)
        link.forward = own
        link(x)
        assert link.forward is own
        assert link.W is W


class TestManyHooksManyLinks:

    def test_one_hook_for_many_links(self):
        hook = SpectralNormalization(use_gamma=True)
        links = [L.Convolution2D(None, 4, 3), L.Deconvolution2D(3, 4, 3),
                 L.Linear(27, 6), L.Linear(None, 5)]
        for link in links:
            link.add_hook(hook)
        state = dict(vars(hook))
        for link, x in zip(links, (x_of(2, 3, 5, 5), x_of(2, 3, 5, 5),
                                   x_of(2, 27), x_of(2, 3, 3, 3))):
            link(x)
            assert norm(link) == pytest.approx(
                float(link.gamma.array), rel=1e-2)
        assert vars(hook) == state

    def test_two_hooks_on_one_link(self):
        link = TwoWeights()
        link.add_hook(SpectralNormalization(use_gamma=True))
        link.add_hook(SpectralNormalization(
            use_gamma=True, weight_name='H', name='H'))
        assert sorted(n for n, _ in link.namedparams()) == [
            '/H', '/H_gamma', '/W', '/gamma']
        for weight, gamma in (('W', link.gamma), ('H', link.H_gamma)):
            np.testing.assert_allclose(
                gamma.array,
                reference.true_norm(getattr(link, weight).array), rtol=1e-6)
        backward(link, F.sum(link(x_of(2, 5))))
        assert link.gamma.grad
        assert link.H_gamma.grad
        # A new copy finds its gammas, and each hook deletes its own.
        other = pickle.loads(pickle.dumps(link))
        other.delete_hook('SpectralNormalization')
        other(x_of(2, 5))
        other.delete_hook('H')
        assert sorted(n for n, _ in other.namedparams()) == ['/H', '/W']

    def test_the_name_gamma_is_taken(self):
        link = L.Linear(5, 6)
        link.gamma = 'mine'
        link.add_hook(SpectralNormalization(use_gamma=True))
        assert link.gamma == 'mine'
        assert link.W_gamma.shape == ()
        link.delete_hook('SpectralNormalization')
        assert link.gamma == 'mine'
        assert not hasattr(link, 'W_gamma')

    def test_bilinear_by_weight_name(self):
        link = L.Bilinear(3, 4, 5).add_hook(
            SpectralNormalization(weight_name='V1'))
        V1 = link.V1
        assert link(x_of(2, 3), x_of(2, 4)).shape == (2, 5)
        assert link.V1 is V1
        assert link.V1_u.shape == (3,)


class TestCap:

    def test_both_sides(self):
        link = linear(cap=2.0)
        W = link.W.array / reference.true_norm(link.W.array)
        for size, expected in ((0.5, 0.5), (1.9, 1.9), (2.1, 2), (300, 2)):
            link.W.array[...] = W * size
            for _ in range(20):
                link(x_of(2, 5))
            assert norm(link) == pytest.approx(expected, rel=1e-3)

    def test_below_it_the_hook_is_not_there(self):
        link, plain = linear(cap=100.), linear()
        plain.delete_hook('SpectralNormalization')
        x, gy = x_of(3, 5), x_of(3, 6)
        plain.copyparams(link)
        results = []
        for each in (link, plain):
            y = each(x)
            each.cleargrads()
            y.grad = gy
            y.backward()
            results.append((y.array, each.W.grad, each.b.grad))
        for a, b in zip(*results):
            np.testing.assert_array_equal(a, b)

    def test_training_stays_below_it(self):
        link = linear(cap=1.5, n_power_iteration=50)
        link.W.array[...] *= 1.2 / reference.true_norm(link.W.array)
        optimizer = chainer.optimizers.SGD(0.02).setup(link)
        x = x_of(20, 5)
        norms = []
        for _ in range(300):
            backward(link, -F.mean(link(x) ** 2))  # it would grow
            optimizer.update()
            norms.append(norm(link))
        assert norms[0] < 1.45
        assert 1.49 < max(norms) < 1.6
        assert reference.true_norm(link.W.array) > 1.55

    def test_a_change_of_it_counts_from_the_next_call_on(self):
        link = linear(cap=0.1)
        hook = link.local_link_hooks['SpectralNormalization']
        link(x_of(2, 5))
        hook.cap = 0.05
        assert norm(link) == pytest.approx(0.05, rel=1e-3)

    @pytest.mark.parametrize('other', [{'use_gamma': True}, {'factor': 2.}])
    def test_not_with_what_would_undo_it(self, other):
        name, = other
        with pytest.raises(errors.CapConflictError, match=name):
            SpectralNormalization(cap=1.0, **other)

    def test_not_a_cap(self):
        with pytest.raises(errors.CapError, match='-1'):
            SpectralNormalization(cap=-1)


class TestWarmUp:

    def test_the_first_call_is_normalized(self):
        for _ in range(10):
            assert norm(linear(n_in=20, n_out=30)) == pytest.approx(
                1, abs=3e-2)

    def test_it_is_the_same_as_more_iterations(self):
        np.random.seed(3)
        link = linear(n_warmup=4)
        np.random.seed(3)
        plain = linear(n_warmup=0)
        np.testing.assert_allclose(
            link.W_u,
            reference.power_iteration(plain.W.array, plain.W_u, 4)[0],
            rtol=1e-4, atol=1e-6)

    def test_zero_weight(self):
        link = L.Linear(5, 6, initialW=0).add_hook(SpectralNormalization())
        assert np.isfinite(link.W_u).all()
        assert link.W_u.any()


class TestSnapshots:

    @pytest.mark.parametrize('use_gamma', [False, True])
    @pytest.mark.parametrize('lazy', [False, True])
    @pytest.mark.parametrize('reverse', [False, True])
    def test_exchanged_with_the_built_in_hook(self, use_gamma, lazy, reverse):
        makes = [
            lambda: link_hooks.SpectralNormalization(use_gamma=use_gamma),
            lambda: SpectralNormalization(
                use_gamma=use_gamma, detach_uv=True, n_warmup=0)]
        if reverse:
            if lazy:
                pytest.skip('chainer#8453: it drops the u: see defects')
            makes.reverse()
        source = L.Convolution2D(3, 4, 3).add_hook(makes[0]())
        x = x_of(2, 3, 5, 5)
        for _ in range(5):
            source(x)
        link = L.Convolution2D(None if lazy else 3, 4, 3).add_hook(makes[1]())
        serializers.load_npz(save(source), link)
        np.testing.assert_array_equal(link.W_u, source.W_u)
        for train in (False, True):
            with chainer.using_config('train', train):
                np.testing.assert_allclose(
                    link(x).array, source(x).array, rtol=1e-5, atol=1e-6)
        if use_gamma:
            np.testing.assert_array_equal(
                link.gamma.array, source.gamma.array)

    def test_u_of_a_snapshot_is_not_warmed_up(self):
        source = linear(n_warmup=0)
        link = L.Linear(None, 6).add_hook(SpectralNormalization())
        serializers.load_npz(save(source), link)
        with chainer.using_config('train', False):
            link(x_of(2, 5))
        np.testing.assert_array_equal(link.W_u, source.W_u)

    @pytest.mark.parametrize('value', [0, np.nan])
    def test_a_poisoned_u_is_made_anew(self, value):
        """As the built-in hook saves it after a NaN."""
        link = linear()
        link.W_u[...] = value
        copied = linear()
        serializers.load_npz(save(link), copied)
        with pytest.warns(UserWarning, match='W_u was zero or not finite'):
            copied(x_of(2, 5))
        assert norm(copied) == pytest.approx(1, abs=1e-2)
        copied(x_of(2, 5))  # once; warnings are errors here

    def test_hdf5(self, tmp_path):
        pytest.importorskip('h5py')
        source = linear(use_gamma=True)
        link = L.Linear(None, 6).add_hook(
            SpectralNormalization(use_gamma=True))
        serializers.save_hdf5(str(tmp_path / 'a.h5'), source)
        serializers.load_hdf5(str(tmp_path / 'a.h5'), link)
        np.testing.assert_array_equal(link.W_u, source.W_u)


class TestCopies:

    @pytest.mark.parametrize('use_gamma', [False, True])
    @pytest.mark.parametrize('make_copy', [
        copy.deepcopy, lambda link: link.copy('copy'),
        lambda link: pickle.loads(pickle.dumps(link))],
        ids=['deepcopy', 'copy', 'pickle'])
    def test_a_copy_goes_on_alone(self, make_copy, use_gamma):
        link, x = linear(use_gamma=use_gamma), x_of(2, 5)
        link(x)
        other = make_copy(link)
        for _ in range(3):
            np.testing.assert_array_equal(other(x).array, link(x).array)
        u = link.W_u.copy()
        other.W.array[0] += 1
        other(x)
        np.testing.assert_array_equal(link.W_u, u)

    def test_repeat_with_gamma(self):
        links = linear(use_gamma=True).repeat(3, mode='init')
        for link in links:
            np.testing.assert_allclose(
                link.gamma.array, reference.true_norm(link.W.array),
                rtol=1e-6)

    @pytest.mark.parametrize('use_gamma', [False, True])
    def test_repeat_warms_up_for_the_new_weights(self, use_gamma):
        links = linear(n_in=50, n_out=60, use_gamma=use_gamma).repeat(
            3, mode='init')
        for link in links:
            sigma = float(link.gamma.array) if use_gamma else 1
            assert norm(link) == pytest.approx(sigma, rel=3e-2)

    def test_a_snapshot_loaded_into_a_repeated_link_is_kept(self):
        source = linear(use_gamma=True)
        source(x_of(2, 5))
        link, = linear(use_gamma=True).repeat(1, mode='init')
        serializers.load_npz(save(source), link)
        with chainer.using_config('train', False):
            link(x_of(2, 5))
        np.testing.assert_array_equal(link.W_u, source.W_u)
        np.testing.assert_array_equal(link.gamma.array, source.gamma.array)

    @pytest.mark.parametrize('change', [
        lambda source, link: link.copyparams(source),
        lambda source, link: serializers.load_npz(save(source), link)],
        ids=['copyparams', 'snapshot'])
    def test_a_repeated_link_that_gets_its_source_back(self, change):
        """As a target network does."""
        source = linear(use_gamma=True)
        source.gamma.array[...] = 5
        link, = source.repeat(1, mode='init')
        change(source, link)
        with chainer.using_config('train', False):
            link(x_of(2, 5))
        np.testing.assert_array_equal(link.W_u, source.W_u)
        assert link.gamma.array == 5

    @pytest.mark.parametrize('dtype', ['f', 'd'])
    def test_a_copy_whose_arrays_are_replaced(self, dtype):
        """As by an average of weights that is kept by assignment."""
        source = linear(use_gamma=True)
        source.gamma.array[...] = 5
        link = copy.deepcopy(source)
        for param in link.params():
            param.array = param.array.astype(dtype)
        with chainer.using_config('train', False):
            link(x_of(2, 5).astype(dtype))
        np.testing.assert_array_equal(link.W_u, source.W_u)
        assert link.gamma.array == 5

    def test_training_after_repeat(self):
        """Gradients are cleared before the first call, as many loops do."""
        link, = linear(use_gamma=True).repeat(1, mode='init')
        optimizer = chainer.optimizers.SGD(0.01).setup(link)
        for _ in range(2):
            backward(link, F.sum(link(x_of(2, 5)) ** 2))
            optimizer.update()
        link.cleargrads()
        F.sum(link(x_of(2, 5))).backward()
        for param in link.params():
            assert np.isfinite(param.array).all()
            assert np.isfinite(param.grad).all()

    @pytest.mark.parametrize('again', [
        copy.deepcopy, lambda link: pickle.loads(pickle.dumps(link)),
        lambda link: link.copy('init')])
    def test_a_copy_of_a_repeated_link(self, again):
        link, = linear(n_in=50, n_out=60).repeat(1, mode='init')
        assert norm(again(link)) == pytest.approx(1, abs=3e-2)

    def test_gamma_of_a_weight_that_is_initialized_after_it(self):
        class Late(chainer.Link):

            def __init__(self):
                super().__init__()
                with self.init_scope():
                    self.weight = chainer.Parameter(
                        chainer.initializers.Normal(1.0), (6, 5))

            def forward(self, x):
                return F.linear(x, self.weight)

        link, = Late().add_hook(SpectralNormalization(
            use_gamma=True, weight_name='weight')).repeat(1, mode='init')
        link.weight.array *= 3
        link(x_of(2, 5))
        np.testing.assert_allclose(
            link.gamma.array, reference.true_norm(link.weight.array),
            rtol=2e-2)

    def test_no_warm_up_no_new_u(self):
        """As the built-in hook, whose numbers n_warmup=0 follows."""
        link = linear(n_warmup=0)
        copied, = link.repeat(1, mode='init')
        with chainer.using_config('train', False):
            copied(x_of(2, 5))
        np.testing.assert_array_equal(copied.W_u, link.W_u)

    def test_gamma_is_finite_before_the_weight_is(self):
        """chainer.Link.copyparams initializes parameters in any order."""
        link = linear(use_gamma=True)
        link.copyparams(L.Linear(None, 6).add_hook(
            SpectralNormalization(use_gamma=True)), copy_persistent=False)
        assert np.isfinite(link.gamma.array)
        spoilt = L.Linear(5, 6)
        spoilt.W.array[0, 0] = np.nan
        spoilt.add_hook(SpectralNormalization(use_gamma=True))
        assert spoilt.gamma.array == 1

    def test_shared_copies_share_u(self):
        link = linear()
        other = link.copy('share')
        other(x_of(2, 5))
        assert other.W_u is link.W_u

    def test_a_new_dtype(self):
        link = linear()
        link.W.array = link.W.array.astype('d')
        link.b.array = link.b.array.astype('d')
        link(np.random.normal(size=(2, 5)))
        assert link.W_u.dtype == np.float64


class TestForget:

    class Net(chainer.Chain):

        def __init__(self, hook):
            super().__init__()
            with self.init_scope():
                self.a = L.Linear(5, 5).add_hook(hook)
                self.b = L.Linear(5, 5).add_hook(hook)

        def forward(self, x):
            return self.b(F.tanh(self.a(x)) + self.a(2 * x))

    def gradients(self, call, n_backward=1):
        np.random.seed(0)
        net = self.Net(SpectralNormalization(n_warmup=0))
        xs = [chainer.Variable(x) for x in x_of(2, 3, 5)]
        ys = [F.sum(call(net, x) ** 2) for x in xs]
        net.cleargrads()
        loss = ys[0] + 3 * ys[1]
        for _ in range(n_backward):
            loss.backward(retain_grad=True)
        return [p.grad for p in net.params()] + [net.a.W_u, net.b.W_u]

    @pytest.mark.parametrize('call', [
        F.forget,
        lambda net, x: F.forget(lambda x: F.forget(net, x), x),
        lambda net, x: F.forget(
            lambda x: F.forget(net.b, F.tanh(net.a(x)) + net.a(2 * x)), x)],
        ids=['once', 'nested', 'partly nested'])
    @pytest.mark.parametrize('n_backward', [1, 2])
    def test_gradients(self, call, n_backward):
        expected = self.gradients(lambda net, x: net(x), n_backward)
        actual = self.gradients(call, n_backward)
        for a, b in zip(actual, expected):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    def test_after_an_exception_in_the_second_run(self):
        link, x = linear(n_warmup=0), chainer.Variable(x_of(2, 5))
        fail = [False]

        def f(x):
            y = link(x)
            if fail[0]:
                raise RuntimeError
            return y + link(x)

        W, u = link.W, link.W_u.copy()
        y = F.sum(F.forget(f, x) ** 2)
        link.cleargrads()
        fail[0] = True
        with pytest.raises(RuntimeError):
            y.backward()
        assert link.W is W
        fail[0] = False
        link.cleargrads()
        y.backward()
        link.W_u[...] = u
        expected, g = f(x), W.grad
        link.cleargrads()
        F.sum(expected ** 2).backward()
        np.testing.assert_allclose(g, W.grad, rtol=1e-5, atol=1e-6)

    def test_a_poisoned_u_is_made_anew_once(self):
        link = L.Linear(5, 6, nobias=True).add_hook(SpectralNormalization())
        link.W_u[...] = 0
        link.cleargrads()
        with pytest.warns(UserWarning, match='made anew'):
            y = F.sum(F.forget(link, chainer.Variable(x_of(2, 5))) ** 2)
        u = link.W_u.copy()
        y.backward()
        np.testing.assert_array_equal(link.W_u, u)

    def test_recomputing_without_forget(self):
        """As other code does that runs a link twice."""
        link, x = linear(n_warmup=0), x_of(2, 5)
        y, u = link(x), link.W_u.copy()
        with chainer.using_config('in_recomputing', True):
            np.testing.assert_array_equal(link(x).array, y.array)
        np.testing.assert_array_equal(link.W_u, u)


class TestRightVector:
    """``hook.v``, which Chainer's own tests read."""

    def test_as_the_built_in_hook(self):
        hooks = [SpectralNormalization(n_warmup=0, detach_uv=True),
                 link_hooks.SpectralNormalization()]
        links = [L.Linear(5, 6).add_hook(hook) for hook in hooks]
        for link in links:
            link.W.array[...] = links[0].W.array
            link.W_u[...] = links[0].W_u
        for _ in range(3):
            for link in links:
                link(x_of(2, 5))
            np.testing.assert_allclose(
                hooks[0].v, hooks[1].v.ravel(), rtol=1e-5)

    def test_in_recomputing(self):
        link, x = linear(n_power_iteration=2), x_of(2, 5)
        hook, = link.local_link_hooks.values()
        assert hook.v is None
        link(x)
        u, v = link.W_u.copy(), hook.v.copy()
        with chainer.using_config('in_recomputing', True):
            link(x)
        np.testing.assert_array_equal(link.W_u, u)
        np.testing.assert_array_equal(hook.v, v)

    def test_of_the_link_called_last(self):
        hook = SpectralNormalization()
        links = [L.Linear(n, 6).add_hook(hook) for n in (5, 4)]
        for link, n in zip(links, (5, 4)):
            link(x_of(2, n))
            assert hook.v.shape == (n,)
        links.clear()
        del link
        assert hook.v is None

    @pytest.mark.parametrize('copy_of', [
        copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_not_copied(self, copy_of):
        link = linear()
        link(x_of(2, 5))
        other, = copy_of(link).local_link_hooks.values()
        assert other.v is None
        hook, = link.local_link_hooks.values()
        assert hook.v is not None

    @pytest.mark.gpu
    def test_on_a_device(self):
        link, x = linear(), x_of(2, 5)
        hook, = link.local_link_hooks.values()
        other = copy.deepcopy(link)
        other.to_device('@cupy:0')
        on_device, = other.local_link_hooks.values()
        link(x)
        other(chainer.get_device('@cupy:0').send(x))
        assert isinstance(on_device.v, chainer.backends.cuda.ndarray)
        np.testing.assert_allclose(
            chainer.backends.cuda.to_cpu(on_device.v), hook.v, rtol=1e-4)


def test_no_reference_keeps_a_dead_graph_alive():
    """Reference counts alone free it."""
    link, x = linear(use_gamma=True), x_of(2, 5)
    gc.collect()
    gc.disable()
    try:
        y = link(x)
        node = weakref.ref(y.creator_node.inputs[1].creator_node)
        assert type(node()).__name__ == 'SpectralNormalize'
        F.sum(y).backward()
        del y
        assert node() is None
    finally:
        gc.enable()


def test_function_hooks():
    link = linear()
    with chainer.function_hooks.TimerHook() as hook:
        backward(link, F.sum(link(x_of(2, 5))))
    assert 'SpectralNormalize' in hook.summary()


def test_debug_mode():
    link = linear(use_gamma=True)
    with chainer.using_config('debug', True):
        backward(link, F.sum(link(x_of(2, 5))))
    assert np.isfinite(link.W.grad).all()


class TestBadInput:

    def test_a_weight_that_the_link_lacks(self):
        link = L.Linear(5, 6)
        with pytest.raises(
                errors.WeightNotFoundError,
                match=r"Weight 'w' does not exist.*'W', 'b'"):
            link.add_hook(SpectralNormalization(weight_name='w'))
        self.check_unchanged(link, L.Linear(5, 6))

    def test_a_weight_that_is_a_link(self):
        link = L.LSTM(5, 6)
        with pytest.raises(errors.WeightNotFoundError, match='not a Param'):
            link.add_hook(SpectralNormalization(weight_name='upward'))
        link.upward.add_hook(SpectralNormalization())

    @pytest.mark.parametrize(('weight_name', 'remedy'), [
        ('W', r'add sn_function\.ChainSpectralNormalization\(\) to it'),
        ('H', r"ChainSpectralNormalization\(weight_name='H'\) to it")])
    @pytest.mark.parametrize('kind', [
        chainer.Sequential, chainer.ChainList,
        lambda link: chainer.Chain(link=link)])
    def test_a_chain(self, kind, weight_name, remedy):
        chain = kind(L.Linear(5, 6))
        with pytest.raises(errors.WeightNotFoundError, match=remedy):
            chain.add_hook(SpectralNormalization(weight_name=weight_name))
        self.check_unchanged(chain, kind(L.Linear(5, 6)))

    def test_a_link_that_never_calls_hooks(self):
        """It is from before Chainer 5, and would stay as it is."""
        class Base(L.Linear):
            def __call__(self, x):
                return F.linear(x, self.W)

        class Own(Base):
            pass

        link = Own(5, 6)
        with pytest.raises(
                errors.HookBypassedError,
                match=r'Own \(Base\.__call__\)\. Rename this __call__ to forw'
        ) as e:
            link.add_hook(SpectralNormalization(use_gamma=True))
        assert 'filter' not in str(e.value)
        self.check_unchanged(link, Own(5, 6))
        Base.forward = Base.__call__
        del Base.__call__
        link.add_hook(SpectralNormalization(n_warmup=100))
        y = link(np.eye(5, dtype='f')).array
        assert reference.true_norm(y) == pytest.approx(1, abs=1e-4)

    def test_a_link_whose_call_goes_on_to_that_of_chainer(self):
        class Twice(L.Linear):
            def __call__(self, x):
                return 2 * super().__call__(x)

        link = Twice(5, 6, nobias=True).add_hook(
            SpectralNormalization(n_warmup=100))
        y = link(np.eye(5, dtype='f')).array
        assert reference.true_norm(y) == pytest.approx(2, abs=1e-4)

    def test_an_empty_weight(self):
        link = L.Linear(5, 0)
        with pytest.raises(errors.WeightShapeError, match='empty'):
            link.add_hook(SpectralNormalization(use_gamma=True))
        self.check_unchanged(link, L.Linear(5, 0))

    def test_a_vector(self):
        link = L.Linear(5, 6)
        with pytest.raises(errors.WeightShapeError, match='fewer than 2'):
            link.add_hook(SpectralNormalization(weight_name='b'))
        self.check_unchanged(link, L.Linear(5, 6))

    def test_twice_under_one_name(self):
        link = linear()
        u = link.W_u
        with pytest.raises(KeyError, match='already exists'):
            link.add_hook(SpectralNormalization())
        assert link.W_u is u
        assert len(link.local_link_hooks) == 1

    def test_twice_on_one_weight(self):
        link = linear()
        u = link.W_u
        with pytest.raises(errors.HookCollisionError, match='W_u'):
            link.add_hook(SpectralNormalization(name='second'))
        assert link.W_u is u
        assert list(link.local_link_hooks) == ['SpectralNormalization']
        link(x_of(2, 5))

    def test_beside_the_built_in_hook(self):
        link = L.Linear(5, 6).add_hook(link_hooks.SpectralNormalization())
        with pytest.raises(errors.HookCollisionError):
            link.add_hook(SpectralNormalization(name='ours'))

    def test_both_names_of_gamma_are_taken(self):
        link = L.Linear(5, 6)
        link.gamma = link.W_gamma = 1
        with pytest.raises(errors.HookCollisionError, match='W_gamma'):
            link.add_hook(SpectralNormalization(use_gamma=True))
        assert not hasattr(link, 'W_u')
        assert not link.local_link_hooks

    @pytest.mark.parametrize(('settings', 'error'), [
        ({'n_power_iteration': 0}, errors.IterationCountError),
        ({'n_power_iteration': 1.0}, errors.IterationCountError),
        ({'n_warmup': -1}, errors.IterationCountError),
        ({'eps': -1}, errors.EpsError),
        ({'eps': 'x'}, errors.EpsError),
        ({'factor': 0}, errors.FactorError),
        ({'factor': -1.0}, errors.FactorError)])
    def test_settings(self, settings, error):
        with pytest.raises(error):
            SpectralNormalization(**settings)

    def test_a_link_without_the_hook(self):
        with pytest.raises(errors.HookNotAddedError, match='Add it first'):
            SpectralNormalization().normalize_weight(L.Linear(5, 6))

    def test_u_of_another_length(self):
        link = linear()
        link.W_u = x_of(7)
        with pytest.warns(
                errors.SpectralNormalizationWarning,
                match=r'Linear: W_u belonged to .* shape than \(6, 5\)'):
            assert norm(link) == pytest.approx(1, abs=3e-2)
        assert link.W_u.shape == (6,)

    def check_unchanged(self, link, plain):
        assert set(link.__dict__) - {'_local_link_hooks'} == set(
            plain.__dict__)
        assert not link.local_link_hooks
        assert link._params == plain._params
        assert link._persistent == plain._persistent


class TestGammaAfterSetup:
    """An optimizer knows the parameters of when it was set up."""

    def add(self, link, **settings):
        return link.add_hook(SpectralNormalization(**settings))

    @pytest.mark.parametrize('in_size', [5, None])
    def test_it_warns_where_gamma_would_stay(self, in_size):
        link = L.Linear(in_size, 6)
        optimizer = chainer.optimizers.SGD(.1).setup(link)
        with pytest.warns(
                errors.SpectralNormalizationWarning,
                match=r'of Linear already.*optimizer\.setup\(model\) after'
        ) as record:
            self.add(link, use_gamma=True)
        assert [w.filename for w in record] == [__file__]
        assert link.gamma.update_rule is None
        optimizer.setup(link)  # as it says
        optimizer.update(lambda: F.sum(link(x_of(2, 5)) ** 2))
        gamma = link.gamma.array.copy()
        optimizer.update(lambda: F.sum(link(x_of(2, 5)) ** 2))
        assert link.gamma.array != gamma

    def test_it_does_not_warn_otherwise(self):
        link = self.add(L.Linear(5, 6), use_gamma=True)
        chainer.optimizers.SGD(.1).setup(link)
        link = L.Linear(5, 6)
        chainer.optimizers.SGD(.1).setup(link)
        self.add(link)

    def test_as_an_error_it_changes_nothing(self):
        link, plain = L.Linear(5, 6), L.Linear(5, 6)
        for each in link, plain:
            chainer.optimizers.SGD(.1).setup(each)
        with pytest.raises(errors.UntrainedGammaWarning):
            self.add(link, use_gamma=True)
        TestBadInput().check_unchanged(link, plain)


def test_the_text_of_a_hook():
    """It makes the same hook, and links are printed as without it."""
    assert repr(SpectralNormalization()) == (
        'SpectralNormalization(n_power_iteration=1)')
    hook = SpectralNormalization(
        3, use_gamma=True, weight_name='H', name='mine', detach_uv=True)
    assert repr(hook) == (
        "SpectralNormalization(n_power_iteration=3, use_gamma=True, "
        "weight_name='H', name='mine', detach_uv=True)")
    assert vars(eval(repr(hook))) == vars(hook)
    link = L.Linear(5, 6)
    before = str(link)
    assert str(link.add_hook(SpectralNormalization())) == before


@pytest.mark.parametrize('bad', [
    np.ones(1, 'f'), np.ones((), 'i'), np.ones(4, 'f')])
def test_gamma_becomes_invalid(bad):
    link, x = linear(use_gamma=True), x_of(2, 5)
    for _ in range(2):
        link(x)
    link.gamma.array = bad
    with pytest.raises(errors.GammaError):
        link(x)


@pytest.mark.parametrize('bad', [
    [np.inf, -np.inf], [np.finfo('f').max] * 2, [np.nan, 0], [1e-38, 1e-38]])
@pytest.mark.parametrize('shape', [(5, 6), (200, 300)])
def test_no_warning_of_an_extreme_gradient(shape, bad):
    W = chainer.Parameter(np.random.normal(size=shape).astype('f'))
    W.array[0, 1] = 1e-38
    gY = np.ones(shape, 'f')
    gY[0, :2] = bad
    with np.errstate(all='raise'):
        for detach_uv in (False, True):
            Y = sn_function.spectral_normalize(
                W, np.ones(shape[0], 'f'), factor=1e-5, detach_uv=detach_uv)
            Y.grad = gY
            Y.backward()


@pytest.mark.gpu
class TestDevice:

    @pytest.mark.parametrize('name', LINKS)
    def test_same_as_on_the_host(self, name):
        make_link, shape = LINKS[name]
        link = make_link(3).add_hook(SpectralNormalization())
        other = copy.deepcopy(link)
        other.to_device('@cupy:0')
        x = inputs_of(shape, np.random.RandomState(0))
        for _ in range(3):
            y, z = link(*x), other(*map(chainer.get_device('@cupy:0').send, x))
            link.cleargrads()
            other.cleargrads()
            F.sum(y ** 2).backward()
            F.sum(z ** 2).backward()
        to_cpu = chainer.backends.cuda.to_cpu
        for a, b in ((y.array, z.array), (link.W.grad, other.W.grad),
                     (link.W_u, other.W_u)):
            np.testing.assert_allclose(a, to_cpu(b), rtol=1e-3, atol=1e-4)
