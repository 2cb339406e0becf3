"""The hook with an output axis that is given, as in older code."""
import contextlib
import copy
import io
import pickle

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks, serializers

import sn_function
from sn_function import (
    ChainSpectralNormalization,
    SpectralNormalization,
    errors,
    extensions,
    snapshot,
)
from tests import reference

NAME = 'SpectralNormalization'

# A link, and a batch for it.
LINKS = {
    'Linear': (lambda: L.Linear(5, 6), (2, 5)),
    'Convolution2D': (lambda: L.Convolution2D(3, 6, 2), (2, 3, 4, 4)),
    'Deconvolution2D': (lambda: L.Deconvolution2D(6, 3, 2), (2, 6, 4, 4)),
    'DeconvolutionND': (lambda: L.DeconvolutionND(1, 6, 3, 2), (2, 6, 4))}

each = pytest.mark.parametrize('name', LINKS)
axes = pytest.mark.parametrize('axis', [0, 1, -1])


def make(name, **settings):
    make_link, shape = LINKS[name]
    return make_link().add_hook(SpectralNormalization(**settings)), x_of(
        *shape)


def deconvolution(n=6, m=3, **settings):
    return L.Deconvolution2D(n, m, 2).add_hook(
        SpectralNormalization(**settings))


def x_of(*shape):
    return np.random.normal(size=shape).astype('f')


def hook_of(link, name=NAME):
    return link.local_link_hooks[name]


def normalized(link):
    with chainer.using_config('train', False):
        return hook_of(link).normalize_weight(link).array


def save(link, save_as=serializers.save_npz):
    file = io.BytesIO()
    save_as(file, link)
    file.seek(0)
    return file


class TestNorm:

    @each
    @axes
    @pytest.mark.parametrize('n_vectors', [1, 3])
    def test_it_is_1_along_the_axis(self, name, axis, n_vectors):
        link, x = make(name, axis=axis, n_vectors=n_vectors, n_warmup=500)
        assert link.W_u.shape == (link.W.shape[axis],)
        assert reference.true_norm(
            normalized(link), axis) == pytest.approx(1, abs=1e-5)
        link(x)
        assert hook_of(link).axis == axis

    def test_the_axes_of_a_deconvolution_differ(self):
        link = deconvolution()
        assert hook_of(link).axis == 1
        assert abs(reference.true_norm(link.W.array, 1)
                   / reference.true_norm(link.W.array, 0) - 1) > 0.05

    @each
    @axes
    @pytest.mark.parametrize('detach_uv', [False, True])
    def test_numbers_and_gradient_of_a_call(self, name, axis, detach_uv):
        link, _ = make(name, axis=axis, detach_uv=detach_uv, n_warmup=0,
                       n_power_iteration=2)
        W, u = link.W.array.astype('d'), link.W_u.astype('d')
        gY = np.random.normal(size=W.shape)
        uv = reference.power_iteration(W, u, 2, axis)[:2]
        Y = hook_of(link).normalize_weight(link)
        Y.grad = gY.astype('f')
        link.cleargrads()
        Y.backward()
        np.testing.assert_allclose(
            Y.array, reference.spectral_normalize(W, u, 2, axis=axis)[0],
            rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(link.W_u, uv[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(link.W.grad, reference.complex_step(
            lambda W: np.sum(gY * reference.spectral_normalize(
                W, u, 2, axis=axis, uv=uv if detach_uv else None)[0]), W),
            rtol=1e-3, atol=1e-4)

    @each
    def test_the_axis_of_the_link_is_as_none(self, name):
        link, x = make(name)
        other = copy.deepcopy(link)
        link.delete_hook(NAME)
        u = other.W_u.copy()
        link.add_hook(SpectralNormalization(axis=hook_of(other).axis))
        link.W_u[...] = u
        for _ in range(3):
            np.testing.assert_array_equal(link(x).array, other(x).array)
        np.testing.assert_array_equal(link.W_u, other.W_u)

    @pytest.mark.parametrize('axis', [0, -4, -1])
    @pytest.mark.parametrize('use_gamma', [False, True])
    def test_a_lazy_link(self, axis, use_gamma):
        link = L.Deconvolution2D(None, 3, 2).add_hook(SpectralNormalization(
            axis=axis, use_gamma=use_gamma, n_warmup=300))
        x = x_of(2, 6, 4, 4)
        link(x)
        assert link.W_u.shape == (link.W.shape[axis],)
        sigma = reference.true_norm(link.W.array, axis)
        norm = reference.true_norm(normalized(link), axis)
        assert norm == pytest.approx(sigma if use_gamma else 1, rel=1e-4)
        if use_gamma:
            np.testing.assert_allclose(link.gamma.array, sigma, rtol=1e-5)

    @axes
    def test_gamma_starts_as_the_norm_along_it(self, axis):
        link = deconvolution(axis=axis, use_gamma=True)
        np.testing.assert_allclose(
            link.gamma.array, reference.true_norm(link.W.array, axis),
            rtol=1e-5)

    @axes
    def test_each_group(self, axis):
        """Of two groups the larger one has the norm 1, along the axis."""
        link = L.Deconvolution2D(6, 4, 3, groups=2)
        link.W.array[:3] *= 2
        link.add_hook(SpectralNormalization(
            groups='each', axis=axis, n_warmup=500))
        parts = normalized(link).reshape(2, 3, 2, 3, 3)
        norms = [reference.true_norm(part, axis) for part in parts]
        assert max(norms) == pytest.approx(1, abs=1e-5)
        assert min(norms) < 0.9
        link(x_of(2, 6, 4, 4))

    def test_an_n_step_link(self):
        link = L.NStepLSTM(1, 4, 3, 0.).add_hook(
            SpectralNormalization(axis=1, n_warmup=300))
        link(None, None, [x_of(2, 4)])
        assert link[0].w0_u.shape == (4,)
        hook = hook_of(link[0], f'{NAME}_w0')
        assert reference.true_norm(hook.normalize_weight(
            link[0]).array) == pytest.approx(1, abs=1e-4)

    @pytest.mark.gpu
    @each
    @axes
    @pytest.mark.parametrize('n_vectors', [1, 3])
    def test_same_on_a_device(self, name, axis, n_vectors):
        link, x = make(name, axis=axis, n_vectors=n_vectors)
        other = copy.deepcopy(link)
        other.to_device('@cupy:0')
        for _ in range(2):
            y, z = link(x), other(chainer.get_device('@cupy:0').send(x))
            for each_link, out in ((link, y), (other, z)):
                each_link.cleargrads()
                F.sum(out ** 2).backward()
        to_cpu = chainer.backends.cuda.to_cpu
        for a, b in ((y.array, z.array), (link.W.grad, other.W.grad),
                     (link.W_u, other.W_u)):
            np.testing.assert_allclose(a, to_cpu(b), rtol=1e-3, atol=1e-4)


class OldDeconvolution2D(L.Deconvolution2D):
    """As links of SN-GANs were before there were hooks.

    They take the first axis, of every kind of link, and most of them move u
    on in test mode, too.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.u = x_of(1, self.W.shape[0])
        self.register_persistent('u')

    def forward(self, x):
        return F.deconvolution_2d(
            x, self.normalized(), self.b, self.stride, self.pad)

    def normalized(self):
        A = F.reshape(self.W, (len(self.W), -1))
        v = self.u @ A.array
        v /= np.linalg.norm(v) + 1e-12
        u = v @ A.array.T
        u /= np.linalg.norm(u) + 1e-12
        self.u[...] = u
        sigma = F.sum(F.matmul(u, A) * v)
        return self.W / F.broadcast_to(sigma, self.W.shape)


def generator(make_link, hook=None):
    np.random.seed(0)
    model = chainer.Sequential(
        L.Linear(4, 24), lambda x: F.reshape(x, (-1, 6, 2, 2)),
        make_link(6, 4, 4, 2, 1), F.leaky_relu, make_link(4, 8, 4, 2, 1))
    if hook is not None:
        for i in (2, 4):
            model[i].add_hook(hook)
    return model


def train(model, xs, mode=True):
    optimizer = chainer.optimizers.Adam(0.01, beta1=0).setup(model)
    for x in xs:
        with chainer.using_config('train', mode):
            optimizer.update(lambda x: F.mean((model(x) - 1) ** 2), x)


class TestOldCode:
    """A model of older links, and the same with hooks."""

    @property
    def hook(self):
        return SpectralNormalization(
            axis=0, update_u='always', detach_uv=True, n_warmup=0)

    @pytest.mark.parametrize('mode', [True, False])
    def test_training(self, mode):
        old = generator(OldDeconvolution2D)
        model = generator(L.Deconvolution2D, self.hook)
        for i in (2, 4):
            model[i].copyparams(old[i], copy_persistent=False)
            model[i].W_u = old[i].u[0].copy()
        model[0].copyparams(old[0])
        xs = x_of(20, 8, 4)
        train(old, xs, mode)
        train(model, xs, mode)
        for i in (2, 4):
            assert model[i].W_u.shape == (model[i].W.shape[0],)
            np.testing.assert_allclose(
                model[i].W.array, old[i].W.array, atol=1e-4)
            np.testing.assert_allclose(
                model[i].W_u, old[i].u[0], atol=1e-4)

    def test_a_snapshot_goes_on(self, tmp_path):
        """Converted with its own axes, and trained further."""
        old = generator(OldDeconvolution2D)
        train(old, x_of(20, 8, 4))
        src, dst = tmp_path / 'old.npz', tmp_path / 'new.npz'
        serializers.save_npz(src, old)
        snapshot.convert(src, dst, 'chainer', axes={'*': 0}, fill=False)
        model = generator(L.Deconvolution2D, self.hook)
        serializers.load_npz(dst, model)
        xs = x_of(20, 8, 4)
        train(old, xs)
        train(model, xs)
        for i in (2, 4):
            np.testing.assert_allclose(
                model[i].W.array, old[i].W.array, atol=1e-4)
            np.testing.assert_allclose(
                model[i].W_u, old[i].u[0], atol=1e-4)

    @pytest.mark.parametrize('is_lazy', [False, True])
    @pytest.mark.parametrize('with_file', [
        'npz', pytest.param('hdf5', marks=pytest.mark.skipif(
            not chainer.serializers.hdf5._available, reason='no h5py'))])
    def test_a_snapshot_without_the_axis(self, is_lazy, with_file, tmp_path):
        source = chainer.Sequential(deconvolution(axis=0))
        path = str(tmp_path / 'file')
        getattr(serializers, f'save_{with_file}')(path, source)
        model = chainer.Sequential(
            deconvolution(None if is_lazy else 6))
        with pytest.raises(errors.VectorAxisError, match=(
                r"W_u of Deconvolution2D '0' has length 6 .* takes axis 1 "
                r"of the weight of shape \(6, 3, 2, 2\), so it needs length 3."
                r'.* give the hooks of its links axis=0')):
            getattr(serializers, f'load_{with_file}')(path, model)

    def test_a_snapshot_of_an_axis_that_is_not_that(self):
        with pytest.raises(errors.VectorAxisError, match='axis=1'):
            serializers.load_npz(
                save(deconvolution()), deconvolution(axis=0))

    @pytest.mark.parametrize('axis', [None, 0])
    @pytest.mark.parametrize('of_source', [0, 1])
    @pytest.mark.parametrize('is_lazy', [False, True])
    def test_as_many_inputs_as_outputs(self, axis, of_source, is_lazy):
        """Nothing but the values of the vector tells its axis."""
        source = deconvolution(20, 20, axis=of_source)
        sn_function.refresh(source)
        link = deconvolution(None if is_lazy else 20, 20, axis=axis)
        taken = 1 if axis is None else axis
        expect = contextlib.nullcontext()
        if of_source != taken:
            expect = pytest.warns(errors.VectorAxisWarning, match=(
                f'W_u of Deconvolution2D, .* along axis {of_source} .* not '
                f'along axis {taken}, .* its links axis={of_source}'))
        with expect:
            serializers.load_npz(save(source), link)
        np.testing.assert_array_equal(link.W_u, source.W_u)

    @pytest.mark.parametrize('u', [
        np.random.RandomState(0).normal(size=20), np.zeros(20),
        np.full(20, np.nan)])
    def test_a_vector_of_neither_axis_of_the_same_length(self, u):
        source = deconvolution(20, 20)
        source.W_u = u.astype('f')
        link = deconvolution(20, 20)
        serializers.load_npz(save(source), link)
        np.testing.assert_array_equal(link.W_u, source.W_u)

    def test_a_vector_of_neither_axis(self):
        source = deconvolution()
        source.W_u = x_of(5)
        with pytest.raises(ValueError, match='broadcast'):
            serializers.load_npz(save(source), deconvolution())

    def test_chainers_hook_on_the_same_axis(self):
        """Its snapshots load, where it has the axis that is given."""
        source = L.Deconvolution2D(6, 3, 2).add_hook(
            link_hooks.SpectralNormalization())
        source(x_of(2, 6, 4, 4))
        link = deconvolution(axis=1)
        serializers.load_npz(save(source), link)
        np.testing.assert_array_equal(link.W_u, source.W_u)

    def test_grouped_links_are_left_to_chainer(self):
        """A vector for each group may be as long as an axis."""
        def make(**settings):
            return L.Deconvolution2D(6, 6, 3, groups=2).add_hook(
                SpectralNormalization(**settings))

        with pytest.raises(ValueError, match='broadcast'):
            serializers.load_npz(save(make(groups='each')), make())

    def test_in_a_call(self):
        """The vector is made anew, and the warning tells what it was."""
        link = deconvolution()
        link.W_u = x_of(6)
        with pytest.warns(errors.SpectralNormalizationWarning, match=(
                r'It was made anew. The length was that of axis 0: .* '
                r'axis=0.$')):
            link(x_of(2, 6, 4, 4))
        assert link.W_u.shape == (3,)


    def test_a_weight_without_a_second_axis(self):
        link = L.Linear(5, 6).add_hook(SpectralNormalization())
        link.W.array = x_of(7)
        with pytest.warns(errors.SpectralNormalizationWarning), pytest.raises(
                errors.WeightShapeError):
            link(x_of(2, 5))


class TestWholeModels:

    def model(self, **settings):
        return generator(L.Deconvolution2D).add_hook(
            ChainSpectralNormalization(axis=0, **settings))

    def test_the_hook_of_a_chain(self):
        model = self.model(n_warmup=300)
        model(x_of(2, 4))
        for i in (0, 2, 4):
            assert model[i].W_u.shape == (len(model[i].W),)
            assert reference.true_norm(
                normalized(model[i])) == pytest.approx(1, abs=1e-4)
        assert 'axis=0' in repr(model.local_link_hooks[
            ChainSpectralNormalization.name])

    def test_cached(self):
        link = deconvolution(axis=0, n_warmup=300)
        with sn_function.cached(link):
            link(x_of(2, 6, 4, 4))
            Y = hook_of(link).normalize_weight(link).array
        assert reference.true_norm(Y) == pytest.approx(1, abs=1e-4)

    def test_normalized(self):
        link = deconvolution(axis=0, n_warmup=300)
        with sn_function.normalized(link):
            assert reference.true_norm(
                link.W.array) == pytest.approx(1, abs=1e-4)

    @pytest.mark.parametrize('n_vectors', [1, 2])
    def test_refresh(self, n_vectors):
        link = deconvolution(axis=-4, n_vectors=n_vectors)
        sn_function.refresh(link)
        U = np.linalg.svd(reference.as_matrix(link.W.array.astype('d'), 0))[0]
        assert abs(U[:, 0] @ link.W_u) == pytest.approx(1, abs=1e-6)
        if n_vectors == 2:
            assert abs(U[:, 1] @ link.W_us[0]) == pytest.approx(1, abs=1e-6)

    def test_bake(self):
        model = self.model(n_warmup=300)
        plain = sn_function.bake(copy_without_lambda(model))
        for link in plain:
            if isinstance(link, L.Deconvolution2D):
                assert reference.true_norm(
                    link.W.array) == pytest.approx(1, abs=1e-4)

    def test_report(self):
        link = deconvolution(axis=0, n_warmup=300)
        layer, = extensions.SpectralNormReport(
            link, true_sigma=True).measure()
        sigma = reference.true_norm(link.W.array)
        assert layer.sigma == pytest.approx(sigma, rel=1e-4)
        assert layer.true_sigma == pytest.approx(sigma, rel=1e-4)
        assert layer.norm == pytest.approx(1, abs=1e-4)

    @pytest.mark.parametrize('copy_of', [
        copy.deepcopy, lambda link: link.copy('copy'),
        lambda link: pickle.loads(pickle.dumps(link))])
    def test_copies_go_on(self, copy_of):
        link = deconvolution(axis=0)
        other, x = copy_of(link), x_of(2, 6, 4, 4)
        for _ in range(3):
            np.testing.assert_array_equal(link(x).array, other(x).array)
        np.testing.assert_array_equal(link.W_u, other.W_u)


def copy_without_lambda(model):
    return chainer.Sequential(
        *[link for link in model if isinstance(link, chainer.Link)])


class TestSettings:

    def test_text(self):
        hook = SpectralNormalization(axis=-4)
        assert repr(hook) == (
            'SpectralNormalization(n_power_iteration=1, axis=-4)')
        assert vars(eval(repr(hook))) == vars(hook)
        link = L.Deconvolution2D(3, 4, 2)
        hook = SpectralNormalization()
        link.add_hook(hook)
        assert repr(hook) == 'SpectralNormalization(n_power_iteration=1)'

    @pytest.mark.parametrize('axis', [0, 1, -1])
    def test_reshape_W(self, axis):
        hook = SpectralNormalization(axis=axis)
        W = x_of(3, 4, 2, 2)
        np.testing.assert_array_equal(
            hook.reshape_W(W), reference.as_matrix(W, axis))

    def test_a_number_of_numpy(self):
        hook = SpectralNormalization(axis=np.int64(1))
        assert type(hook.axis) is int

    def test_a_hook_of_an_old_pickle(self):
        """It has no such settings, and the axis of its link."""
        link = deconvolution()
        hook = hook_of(link)
        for name in 'given_axis', 'update_u':
            del vars(hook)[name]
        other = pickle.loads(pickle.dumps(link))
        other(x_of(2, 6, 4, 4))
        assert other.W_u.shape == (3,)

    @pytest.mark.parametrize('axis', [True, 1.0, 'x', (0,)])
    def test_no_integer(self, axis):
        with pytest.raises(errors.AxisError, match='must be an integer'):
            SpectralNormalization(axis=axis)

    def test_the_norm_of_a_map_has_none(self):
        with pytest.raises(errors.NormConflictError, match='axis=0'):
            SpectralNormalization(norm='operator', axis=0)

    @pytest.mark.parametrize('axis', [4, -5])
    def test_out_of_range(self, axis):
        model = chainer.Chain(deconv=L.Deconvolution2D(6, 3, 2))
        before = set(vars(model.deconv)) | {'_local_link_hooks'}
        with pytest.raises(errors.AxisError, match=(
                r"the weight W of Deconvolution2D 'deconv', with 4 dim.* "
                r'from -4 to 3')):
            model.deconv.add_hook(SpectralNormalization(axis=axis))
        assert not model.deconv.local_link_hooks
        assert set(vars(model.deconv)) == before

    def test_out_of_range_in_the_first_call(self):
        link = L.Linear(None, 3).add_hook(
            SpectralNormalization(axis=2, use_gamma=True))
        with pytest.raises(errors.AxisError, match='W of Linear, with 2 dim'):
            link(x_of(2, 5))

    def test_of_a_chain_where_one_link_lacks_it(self):
        """None of the links gets the hook."""
        model = chainer.Sequential(
            L.Convolution2D(3, 4, 2), L.Linear(16, 2))
        with pytest.raises(errors.AxisError, match="Linear '1'"):
            model.add_hook(ChainSpectralNormalization(axis=2))
        assert not model[0].local_link_hooks
        assert not model.local_link_hooks
