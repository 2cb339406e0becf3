"""Maps of convolutions, beside the links and a dense matrix of them."""
import sn_function  # isort: skip  # before chainer, which it repairs
import math

import chainer.links as L
import numpy as np
import pytest

from sn_function import errors
from sn_function._arithmetic import singular
from sn_function._arithmetic.convolution import (
    Convolution,
    ConvolutionMatrix,
)
from sn_function._links.weight import convolution_of
from tests import maps

assert sn_function


def matrix_of(link, insize):
    return ConvolutionMatrix(
        link.W.array, convolution_of(link)._replace(insize=insize))


@pytest.mark.parametrize('seed', range(60))
def test_products(seed):
    np.random.seed(seed)
    for link, shape in maps.random_links(5):
        A = matrix_of(link, shape[1:])
        dense = maps.dense(link, shape)  # (m, n): a row for each input
        assert (A.m, A.n) == dense.shape
        U, V = (np.random.normal(size=(3, size)) for size in dense.shape)
        close = dict(rtol=0, atol=1e-12 * np.abs(dense).sum())
        np.testing.assert_allclose(A.tdot_all(U), U @ dense, **close)
        np.testing.assert_allclose(A.dot_all(V), V @ dense.T, **close)
        np.testing.assert_allclose(A.tdot(U[0]), U[0] @ dense, **close)
        np.testing.assert_allclose(A.dot(V[0]), dense @ V[0], **close)
        X = np.random.normal(size=link.W.shape)
        np.testing.assert_allclose(
            np.vdot(X, A.combination(2., X, 3., U, V)),
            2 * np.vdot(X, X) + 3 * sum(
                v @ maps.dense(link, shape, X).T @ u for u, v in zip(U, V)),
            rtol=1e-11)


@pytest.mark.parametrize('seed', range(10))
def test_norm(seed):
    np.random.seed(seed)
    for link, shape in maps.random_links(5):
        convolution = convolution_of(link)._replace(insize=shape[1:])
        assert singular.norm(
            link.W.array, 0, convolution=convolution) == pytest.approx(
                np.linalg.norm(maps.dense(link, shape), 2), rel=1e-12)


def test_norm_of_a_large_map():
    """Published: about 77.6 for a draw of 64x64x5x5 on images of 12 x 12."""
    np.random.seed(0)
    W = np.random.normal(size=(64, 64, 5, 5))
    convolution = Convolution((1, 1), (1, 1), (1, 1), insize=(12, 12))
    norm = singular.norm(W, 0, convolution=convolution)
    assert norm == pytest.approx(77.6, rel=.02)
    # Any vector gives a lower bound, and this one is all but the best.
    u = np.random.normal(size=64 * 12 * 12)
    A = ConvolutionMatrix(W, convolution)
    for _ in range(300):
        u = A.dot(A.tdot(u / np.linalg.norm(u)))
    assert math.sqrt(np.linalg.norm(u)) == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize('kind', ['zero', 'nan', 'huge', 'tiny'])
def test_norm_of_extreme_weights(kind):
    W = np.random.normal(size=(2, 2, 3, 3))
    W *= {'zero': 0, 'nan': np.nan, 'huge': 1e200, 'tiny': 1e-200}[kind]
    norm = singular.norm(W, 0, convolution=Convolution(
        (1, 1), (1, 1), (1, 1), insize=(4, 4)))
    expected = {'zero': 0, 'nan': np.nan}.get(kind, norm)
    np.testing.assert_equal(norm, expected)
    assert kind in ('zero', 'nan') or 1e-201 < norm < 1e203


def test_of_link():
    link = L.Deconvolution2D(4, 6, 3, stride=2, pad=1, groups=2)
    assert convolution_of(link) == Convolution(
        (2, 2), (1, 1), (1, 1), 2, is_transposed=True)
    link = L.ConvolutionND(3, 4, 6, 3, cover_all=True)
    assert convolution_of(link) == Convolution(
        (1, 1, 1), (0, 0, 0), (1, 1, 1), cover_all=True)
    assert convolution_of(L.Linear(3, 4)) is None
    lazy = L.DilatedConvolution2D(None, 4, 3, dilate=2)
    assert convolution_of(lazy).dilate == (2, 2)


def test_images_too_small():
    convolution = Convolution((1, 1), (0, 0), (1, 1), insize=(2, 2))
    with pytest.raises(errors.InputSizeError, match=r'\(2, 2\) gives no out'):
        convolution.out_shape((4, 4, 3, 3))
