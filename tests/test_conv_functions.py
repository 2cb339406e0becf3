"""conv_spectral_normalize beside a dense matrix of the map.

The matrix is made by Chainer from images that are zero but for one entry, so
the oracle has no code in common with the package.
"""
import sn_function  # isort: skip  # before chainer, which it repairs
import subprocess
import sys
import warnings

import chainer
import chainer.functions as CF
import chainer.links as L
import numpy as np
import pytest
from chainer import gradient_check
from chainer.backends import cuda

from sn_function import errors
from sn_function import functions as F
from tests import maps, reference

assert sn_function


def cases(n):
    """Links, shapes of their inputs, and arguments for their maps."""
    for link, shape in maps.random_links(n):
        if isinstance(link, L.DepthwiseConvolution2D):
            continue  # one of groups, with the weight in another order
        outsize = getattr(link, 'outsize', None)
        yield link, shape, dict(
            stride=link.stride, pad=link.pad, dilate=link.dilate,
            groups=getattr(link, 'groups', 1),
            transposed=isinstance(link, L.DeconvolutionND),
            outsize=None if outsize is None or None in outsize else outsize,
            cover_all=getattr(link, 'cover_all', False))


def dense(link, shape, W):
    """The matrix of a complex weight; rows belong to inputs."""
    M = maps.dense(link, shape, np.ascontiguousarray(W.real))
    if np.iscomplexobj(W):
        M = M + 1j * maps.dense(link, shape, np.ascontiguousarray(W.imag))
    return M


def of_groups(M, G):
    """For each group, the rows and the columns of M, and zero elsewhere."""
    m, n = (size // G for size in M.shape)
    for g in range(G):
        block = np.zeros_like(M)
        part = np.index_exp[g * m:(g + 1) * m, g * n:(g + 1) * n]
        block[part] = M[part]
        yield block


def iterate(M, u, K, G):
    """K iterations of u on each group; those of the largest one."""
    return max([_iterate(block, u, K) for block in of_groups(M, G)],
               key=lambda found: found[-1].real)


def _iterate(M, u, K):
    """As a complex step needs them."""
    for _ in range(K):
        y = u @ M
        y = y / np.sqrt((y * y).sum())
        u = M @ y
        sigma = np.sqrt((u * u).sum())
        u = u / sigma
    return u, y, sigma


def derivative(f, x, direction):
    """That of a scalar function, by a complex step."""
    return f(x + 1e-200j * direction).imag / 1e-200


def arguments(link, shape):
    W = link.W.array
    return W, np.random.normal(size=shape), np.random.normal(size=W.shape)


@pytest.mark.parametrize('seed', range(60))
def test_exact_gradient_equals_complex_step(seed):
    np.random.seed(seed)
    for link, shape, how in cases(5):
        W, u, gY = arguments(link, shape)
        K, gsigma = np.random.randint(1, 4), np.random.normal()

        def loss(W, u, gamma, link=link, shape=shape, K=K, gY=gY, gs=gsigma,
                 G=how['groups']):
            *_, sigma = iterate(dense(link, shape, W), u.ravel(), K, G)
            return (gY * gamma * W / sigma).sum() + gs * sigma

        xs = [chainer.Variable(x) for x in (W, u, np.array(1.3))]
        Y, sigma = F.conv_spectral_normalize(
            xs[0], xs[1], n_power_iteration=K, gamma=xs[2],
            return_sigma=True, **how)
        (CF.sum(Y * gY) + sigma * gsigma).backward()
        values = [x.array for x in xs]
        for i, x in enumerate(xs):
            D = np.random.normal(size=x.shape)
            expected = derivative(
                lambda z, i=i, values=values, loss=loss: loss(
                    *values[:i], z, *values[i + 1:]), values[i], D)
            np.testing.assert_allclose(
                (x.grad * D).sum(), expected, rtol=0,
                atol=1e-11 * abs(x.grad * D).sum() + 1e-13)


@pytest.mark.parametrize('seed', range(30))
def test_detached_gradient_equals_its_definition(seed):
    np.random.seed(seed)
    for link, shape, how in cases(10):
        W, u, gY = arguments(link, shape)
        u_1, v_1, sigma = iterate(
            dense(link, shape, W), u.ravel(), 1, how['groups'])
        D = np.random.normal(size=W.shape)
        along = u_1 @ dense(link, shape, D) @ v_1
        W = chainer.Variable(W)
        Y, found = F.conv_spectral_normalize(
            W, u, detach_uv=True, return_sigma=True, **how)
        assert found.array == pytest.approx(sigma, rel=1e-12)
        (CF.sum(Y * gY) + 2 * found).backward()
        np.testing.assert_allclose(
            (W.grad * D).sum(), (gY * D).sum() / sigma + along * (
                2 - (gY * W.array).sum() / sigma ** 2),
            rtol=0, atol=1e-11 * abs(W.grad * D).sum())


def span_norm(M, rows, G):
    """The largest of any group, in the span of its part of the rows."""
    m, n = (size // G for size in M.shape)
    return max([reference.span_norm(
        M[g * m:(g + 1) * m, g * n:(g + 1) * n],
        rows[:, g * m:(g + 1) * m])[2] for g in range(G)],
        key=lambda sigma: sigma.real)


@pytest.mark.parametrize('seed', range(10))
def test_several_vectors(seed):
    np.random.seed(seed)
    for link, shape, how in cases(5):
        W, _, gY = arguments(link, shape)
        M = dense(link, shape, W)
        G = how['groups']
        b = min(3, *[size // G for size in M.shape])
        U = np.random.normal(size=(b, *shape))
        rows = U.reshape(b, -1).copy()
        W = chainer.Variable(W)
        Y, sigma = F.conv_spectral_normalize(
            W, U, return_sigma=True, update_u=True, **how)
        assert sigma.array == pytest.approx(
            span_norm(M, rows, G), rel=1e-11)
        (CF.sum(Y * gY) + sigma).backward()

        def loss(Z, link=link, shape=shape, gY=gY, rows=rows, G=G):
            sigma = span_norm(dense(link, shape, Z), rows, G)
            return (gY * Z / sigma).sum() + sigma

        D = np.random.normal(size=W.shape)
        np.testing.assert_allclose(
            (W.grad * D).sum(), derivative(loss, W.array, D),
            rtol=0, atol=1e-9 * abs(W.grad * D).sum())
        assert U.shape == (b, *shape)  # moved on, so a call finds more
        with chainer.no_backprop_mode():
            _, later = F.conv_spectral_normalize(
                W, U, return_sigma=True, **how)
        assert later.array >= sigma.array * (1 - 1e-9)


# Two singular values may be too close to tell their vectors apart.
@pytest.mark.filterwarnings('ignore::sn_function.errors.ToleranceWarning')
@pytest.mark.parametrize('seed', range(30))
def test_converges_to_the_norm(seed):
    np.random.seed(seed)
    for link, shape, how in cases(10):
        norm = np.linalg.norm(maps.dense(link, shape), 2)
        b = min(6, *[size // how['groups']
                     for size in maps.dense(link, shape).shape])
        Y, sigma = F.conv_spectral_normalize(
            link.W.array, np.random.normal(size=(b, *shape)), rtol=1e-8,
            max_iterations=5000, return_sigma=True, **how)
        assert sigma.array == pytest.approx(norm, rel=1e-10)
        assert np.linalg.norm(
            maps.dense(link, shape, Y.array), 2) == pytest.approx(1)


@pytest.mark.parametrize('detach_uv', [False, True])
@pytest.mark.parametrize('n_vectors', [1, 2])
@pytest.mark.parametrize('kind', ['plain', 'transposed'])
def test_double_backward(kind, n_vectors, detach_uv):
    np.random.seed(3)
    kernel = (4, 1) if kind == 'plain' else (2, 2)
    W = np.random.normal(size=(*kernel, 2, 3))
    u = np.random.normal(size=(n_vectors, 2, 5, 4))
    u = u[0] if n_vectors == 1 else u
    how = dict(stride=(2, 1), pad=1, dilate=(1, 2), groups=2,
               transposed=kind == 'transposed', n_power_iteration=2)
    if n_vectors > 1:
        # The span is a constant, and so are the vectors where they are
        # detached; differences see it move in the iterations before.
        how['n_power_iteration'] = 1
    if detach_uv:
        Y, = [F.conv_spectral_normalize(W, u, detach_uv=True, **how)]
        of_W = Y.creator.weights[0].iterations
        # Of the largest group; nothing depends on the others.
        u_K, v_K = (np.zeros_like(x).reshape(2, -1) for x in (of_W.u, of_W.v))
        of_group = of_W.of_largest()
        u_K[of_W.largest], v_K[of_W.largest] = of_group.u, of_group.v
        u_K, v_K = u_K.ravel(), v_K.ravel()
        link = _link_of(how, W.shape)

        def f(W):
            # Of u^T M v with constants u and v, without the package.
            sigma = CF.sum(_pairing(W, u_K, v_K, link, u.shape[-3:]))
            return W / CF.broadcast_to(sigma, W.shape)
        grads = []
        for function in (f, lambda W: F.conv_spectral_normalize(
                W, u, detach_uv=True, **how)):
            x = chainer.Variable(W)
            gx, = chainer.grad(
                [CF.sum(function(x) ** 3)], [x], enable_double_backprop=True)
            ggx, = chainer.grad([CF.sum(gx ** 2)], [x])
            grads.append(ggx.array)
        np.testing.assert_allclose(*grads, rtol=1e-9)
        return
    gradient_check.check_double_backward(
        lambda W: F.conv_spectral_normalize(W, u, **how), W,
        np.random.normal(size=W.shape), np.random.normal(size=W.shape),
        dtype='d', rtol=1e-4, atol=1e-5)


def _link_of(how, W_shape):
    kind = L.DeconvolutionND if how['transposed'] else L.ConvolutionND
    c_in = W_shape[0] if how['transposed'] else W_shape[1] * how['groups']
    c_out = W_shape[1] * how['groups'] if how['transposed'] else W_shape[0]
    return kind(2, c_in, c_out, W_shape[2:], how['stride'], how['pad'],
                nobias=True, dilate=how['dilate'], groups=how['groups'])


def _pairing(W, u, v, link, shape):
    function = (CF.deconvolution_nd if isinstance(link, L.DeconvolutionND)
                else CF.convolution_nd)
    y = function(u.reshape(1, *shape), W, stride=link.stride, pad=link.pad,
                 dilate=link.dilate, groups=link.groups)
    return CF.flatten(y) * v


def test_gradient_check():
    W = np.random.normal(size=(3, 2, 3))
    u = np.random.normal(size=(2, 6))
    gradient_check.check_backward(
        lambda W, u, gamma: F.conv_spectral_normalize(
            W, u, 2, gamma=gamma, n_power_iteration=2),
        (W, u, np.array(.7)), np.random.normal(size=W.shape), dtype='d')


@pytest.mark.parametrize(('dtype', 'rtol'), [('e', 2e-3), ('f', 1e-5)])
@pytest.mark.parametrize('n_vectors', [None, 2])
def test_dtypes(dtype, rtol, n_vectors):
    W = np.random.normal(size=(4, 3, 3, 3)).astype(dtype)
    shape = (3, 6, 6) if n_vectors is None else (n_vectors, 3, 6, 6)
    u = np.random.normal(size=shape).astype(dtype)
    Y, sigma = F.conv_spectral_normalize(W, u, pad=1, return_sigma=True)
    expected = F.conv_spectral_normalize(
        W.astype('d'), u.astype('d'), pad=1, return_sigma=True)
    assert Y.dtype == dtype
    assert sigma.dtype == 'f'
    for found, of_double in zip((Y, sigma), expected):
        np.testing.assert_allclose(
            found.array, of_double.array, rtol=rtol, atol=rtol)
    W = chainer.Variable(W)
    CF.sum(F.conv_spectral_normalize(W, u, pad=1) ** 2).backward()
    assert W.grad.dtype == dtype


def test_cap_factor_and_gamma():
    W = np.random.normal(size=(4, 3, 3))
    u = np.random.normal(size=(3, 8))
    plain, sigma = F.conv_spectral_normalize(W, u, return_sigma=True)
    scaled = F.conv_spectral_normalize(W, u, factor=.5, gamma=3.)
    np.testing.assert_allclose(scaled.array, 1.5 * plain.array)
    np.testing.assert_array_equal(
        F.conv_spectral_normalize(W, u, cap=2 * sigma.array).array, W)
    np.testing.assert_allclose(
        F.conv_spectral_normalize(W, u, cap=.9).array, .9 * plain.array)


def test_a_matrix_in_disguise():
    """With one pixel, and with 1x1 kernels, the map is the matrix."""
    W, u = np.random.normal(size=(5, 3)), np.random.normal(size=3)
    expected = F.spectral_normalize(W.T, u).array.T
    for size in ((1, 1), (1, 7)):
        image = np.zeros((3, *size))
        image[..., 0] = u[:, None]
        found = F.conv_spectral_normalize(W[..., None, None], image)
        np.testing.assert_allclose(
            found.array[..., 0, 0], expected, rtol=1e-12)


def test_update():
    W = np.random.normal(size=(4, 3, 3, 3))
    u = np.random.normal(size=(3, 6, 5))
    start = u.copy()
    F.conv_spectral_normalize(W, u)
    np.testing.assert_array_equal(u, start)
    for _ in range(300):
        F.conv_spectral_normalize(W, u, update_u=True)
    link = L.Convolution2D(3, 4, 3, nobias=True)
    M = maps.dense(link, (3, 6, 5), W)
    assert np.linalg.norm(u.ravel() @ M) == pytest.approx(
        np.linalg.norm(M, 2))


class TestExtremes:

    W = np.random.RandomState(0).normal(size=(2, 2, 3))
    u = np.random.RandomState(1).normal(size=(2, 5))

    @pytest.mark.parametrize('n_vectors', [None, 2])
    @pytest.mark.parametrize('scale', [1e-200, 1e-30, 1e30, 1e200])
    def test_sizes(self, scale, n_vectors):
        u = self.u if n_vectors is None else np.stack([self.u, self.u ** 2])
        expected = F.conv_spectral_normalize(self.W, u, pad=1, eps=0)
        for x, y in ((self.W * scale, u), (self.W, u * scale)):
            found = F.conv_spectral_normalize(x, y, pad=1, eps=0)
            np.testing.assert_allclose(
                found.array, expected.array, rtol=1e-10)

    def test_zero(self):
        W = chainer.Variable(0 * self.W)
        u = self.u.copy()
        Y = F.conv_spectral_normalize(W, u, pad=1, update_u=True)
        CF.sum(Y).backward()
        assert not Y.array.any()
        np.testing.assert_array_equal(W.grad, np.ones_like(self.W))
        np.testing.assert_array_equal(u, self.u)

    def test_nan(self):
        W = self.W.copy()
        W[0, 0, 0] = np.nan
        u = self.u.copy()
        Y = F.conv_spectral_normalize(W, u, pad=1, update_u=True)
        assert np.isnan(Y.array).all()
        np.testing.assert_array_equal(u, self.u)

    def test_u_that_is_mapped_to_zero(self):
        u = np.zeros((2, 5))
        u[:, 1] = 1  # between windows of size 1 and stride 2
        W = self.W[..., :1]
        _, sigma = F.conv_spectral_normalize(
            W, u, 2, n_power_iteration=50, return_sigma=True, update_u=True)
        assert sigma.array == pytest.approx(np.linalg.norm(W[..., 0], 2))
        assert u[:, ::2].any()

    def test_nothing_but_padding(self):
        """W is not zero, but what images of one pixel see of it is."""
        W = self.W.copy()
        W[..., 1] = 0
        Y, sigma = F.conv_spectral_normalize(
            W, np.ones((2, 1)), pad=1, return_sigma=True)
        assert sigma.array == 0
        assert np.isfinite(Y.array).all()


def test_tolerance_that_is_not_reached():
    W, u = np.random.normal(size=(4, 3, 3)), np.random.normal(size=(3, 9))
    with pytest.warns(errors.ToleranceWarning, match=r'\(4, 3, 3\)'):
        F.conv_spectral_normalize(W, u, rtol=1e-12, max_iterations=2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        F.conv_spectral_normalize(W, u, rtol=1e-6, max_iterations=9999)


W = np.ones((4, 3, 3, 2))
U = np.ones((3, 5, 5))


@pytest.mark.parametrize(('args', 'error', 'text'), [
    ((np.ones((4, 3)), np.ones(3)), errors.MapWeightError, 'use spectral_n'),
    ((W, np.ones((4, 5, 5))), errors.MapShapeError, r'shape \(3, h, w\)'),
    ((W, np.ones(3)), errors.MapShapeError, r'\(b, 3, h, w\) for several'),
    ((W, np.ones((3, 2, 5))), errors.InputSizeError, 'Take larger'),
    ((W, U, 0), errors.SizeError, 'stride must be an integer of 1'),
    ((W, U, (1, 1, 1)), errors.SizeError, '2 of them'),
    ((W, U, 1, -1), errors.SizeError, 'pad must be an integer of 0'),
    ((W, U, 1, 0, 1.5), errors.SizeError, 'dilate'),
    ((W, U, 1, 0, 1, 3), errors.GroupCountError, 'groups'),
    ((W, np.ones((76, 3, 5, 5))), errors.VectorShapeError, '76'),
    ((W.astype('f'), U), errors.VectorTypeError, 'float32'),
    ((W, 0 * U), errors.VectorValueError, 'zero'),
    ((chainer.Parameter(), U), errors.UninitializedWeightError, 'W'),
])
def test_bad_arguments(args, error, text):
    with pytest.raises(error, match=text):
        F.conv_spectral_normalize(*args)


def test_sizes_of_numpy():
    expected = F.conv_spectral_normalize(W, U, (2, 1), 1).array
    for stride in (np.array([2, 1]), [np.int64(2), np.int64(1)]):
        found = F.conv_spectral_normalize(W, U, stride, np.int64(1))
        np.testing.assert_array_equal(found.array, expected)


def test_number_of_sizes_without_assertions():
    """Python with -O leaves out those of Chainer."""
    code = (
        'import sn_function, numpy as np; sn_function.conv_spectral_normalize('
        'np.ones((4, 3, 3, 2)), np.ones((3, 5, 5)), (1, 1, 1))')
    done = subprocess.run([sys.executable, '-O', '-c', code],
                          capture_output=True, text=True)
    assert 'SizeError: stride must be an integer of 1' in done.stderr


@pytest.mark.parametrize('how', [
    dict(outsize=(9, 9)), dict(outsize=(5, 9), transposed=True)])
def test_bad_outsize(how):
    x = np.ones((4, 5, 5)) if 'transposed' in how else U
    with pytest.raises(errors.OutputSizeError, match='does not fit'):
        F.conv_spectral_normalize(W, x, **how)


def test_u_that_cannot_be_overwritten():
    with pytest.raises(errors.VectorUpdateError, match='not C-contiguous'):
        F.conv_spectral_normalize(
            W, np.ones((5, 5, 3)).transpose(2, 0, 1), update_u=True)
    with pytest.raises(errors.VectorUpdateError, match='is a Variable'):
        F.conv_spectral_normalize(W, chainer.Variable(U), update_u=True)


@pytest.mark.gpu
@pytest.mark.parametrize('detach_uv', [False, True])
@pytest.mark.parametrize('n_vectors', [None, 2])
def test_on_a_device(n_vectors, detach_uv):
    """The kernels of Chainer's convolutions, executed on the host."""
    W = np.random.normal(size=(4, 2, 3, 3))
    shape = (4, 5, 4) if n_vectors is None else (n_vectors, 4, 5, 4)
    u, gY = np.random.normal(size=shape), np.random.normal(size=W.shape)
    results = []
    for module in (np, cuda.cupy):
        W_, u_ = chainer.Variable(module.array(W)), module.array(u)
        Y, sigma = F.conv_spectral_normalize(
            W_, u_, (2, 1), 1, groups=2, return_sigma=True, update_u=True,
            detach_uv=detach_uv, n_power_iteration=2, rtol=.3)
        (CF.sum(Y * module.asarray(gY)) + sigma).backward()
        results.append([chainer.get_device('@numpy').send(x)
                        for x in (Y.array, sigma.array, abs(u_), W_.grad)])
    for on_host, on_device in zip(*results):
        np.testing.assert_allclose(on_device, on_host, rtol=1e-6, atol=1e-9)
