"""The maps of groups, beside the blocks of a dense matrix of all of them."""
import sn_function  # isort: skip  # before chainer, which it repairs
import chainer.links as L
import numpy as np
import pytest

from sn_function._arithmetic import singular
from sn_function._arithmetic.group_maps import GroupMaps
from sn_function._links.weight import convolution_of
from tests import maps

assert sn_function

LINKS = {
    'convolution': lambda: L.Convolution2D(6, 4, 3, groups=2, nobias=True),
    'stride': lambda: L.ConvolutionND(
        1, 3, 9, 2, stride=2, groups=3, nobias=True),
    'transposed': lambda: L.Deconvolution2D(
        6, 4, 3, stride=2, pad=1, groups=2, nobias=True),
    'depthwise': lambda: L.DepthwiseConvolution2D(
        3, 2, 3, pad=1, nobias=True),
}


@pytest.fixture(params=LINKS)
def found(request):
    """The maps of a link, and the blocks of its dense matrix."""
    link = LINKS[request.param]()
    link.W.array = np.random.normal(size=link.W.shape)
    size = (5, 4)[:link.W.ndim - 2]
    convolution = convolution_of(link)._replace(insize=size)
    shape = convolution.in_shape(link.W.shape)
    A = GroupMaps(link.W.array, convolution.split, convolution)
    M = maps.dense(link, shape)
    _, _, m, n = A.shape
    blocks = [M[g * m:(g + 1) * m, g * n:(g + 1) * n] for g in range(len(A))]
    assert sum(map(np.count_nonzero, blocks)) == np.count_nonzero(M)
    return link, convolution, A, np.array(blocks)


def test_products(found):
    *_, A, blocks = found
    G, _, m, n = A.shape
    assert blocks.shape == (G, m, n)
    U, V = np.random.normal(size=(G, 1, 3, m)), np.random.normal(
        size=(G, 1, 3, n))
    np.testing.assert_allclose(A.tdot(U)[:, 0], U[:, 0] @ blocks, atol=1e-12)
    np.testing.assert_allclose(
        A.dot(V)[:, 0], V[:, 0] @ blocks.transpose(0, 2, 1), atol=1e-12)


def test_one_group(found):
    *_, A, blocks = found
    G, _, m, n = A.shape
    for g in range(G):
        one = A.pick(slice(g, g + 1))
        assert one.shape == (1, 1, m, n)
        u, v = np.random.normal(size=(1, 1, 2, m)), np.random.normal(
            size=(1, 1, 2, n))
        np.testing.assert_allclose(
            one.tdot(u)[0, 0], u[0, 0] @ blocks[g], atol=1e-12)
        # <P^T Q, A> is linear in W, so its gradient gives it back.
        np.testing.assert_allclose(
            np.vdot(one.gradient(u, v), A.blocks[g]),
            (u[0, 0] * (v[0, 0] @ blocks[g].T)).sum(), rtol=1e-11)


def test_scales(found):
    *_, A, blocks = found
    scale = np.random.uniform(1, 2, (len(A), 1, 1, 1))
    U = np.random.normal(size=(len(A), 1, 1, A.shape[2]))
    np.testing.assert_allclose(
        A.divided_by(scale).tdot(U)[:, 0],
        U[:, 0] @ (blocks / scale[:, 0]), atol=1e-12)
    np.testing.assert_array_equal(A.astype('f').blocks.dtype, 'f')


def test_rows_of_zero(found):
    *_, A, _ = found
    A.blocks[-1] = 0
    assert not A.row_sizes()[-1].any()
    assert A.row_sizes()[0].any()


def test_most_vectors(found):
    link, convolution, A, blocks = found
    shape = link.W.shape
    assert convolution.most_vectors(shape, convolution.split) == min(
        blocks[0].shape)
    assert convolution.most_vectors(shape) == len(A) * min(blocks[0].shape)


@pytest.mark.parametrize('n', [1, 2])
def test_leading_vectors(found, n):
    """Of each group, whichever is the largest."""
    link, convolution, A, blocks = found
    sigma, u = singular.leading_of_map(link.W.array, convolution, n)
    assert sigma == pytest.approx(
        max(np.linalg.norm(block, 2) for block in blocks), rel=1e-9)
    u = u.reshape(n, len(A), -1)
    for g, block in enumerate(blocks):
        assert np.linalg.norm(u[0, g] @ block) == pytest.approx(
            np.linalg.norm(u[0, g]) * np.linalg.norm(block, 2), rel=1e-9)


def test_leading_vectors_of_a_group_that_is_zero():
    link = LINKS['convolution']()
    link.W.array[:2] = 0
    convolution = convolution_of(link)._replace(insize=(5, 4))
    for n in (1, 3):
        sigma, u = singular.leading_of_map(link.W.array, convolution, n)
        assert sigma > 0
        assert np.isfinite(u).all()
        assert u.reshape(n, 2, -1).any(axis=2).all()
