"""The bound on a layer, by the SVD of the matrix that it is."""
import sn_function  # isort: skip  # before chainer, which it repairs

import copy

import chainer
import chainer.links as L
import numpy as np
import pytest

from sn_function._monitoring import lipschitz
from sn_function.link_hooks import output_axis
from tests import reference

assert sn_function  # it is imported for what it does


def operator_of(link, shape):
    """The matrix of a convolution without its bias."""
    n = int(np.prod(shape))
    x = np.eye(n, dtype=np.float64).reshape(n, *shape)
    link = copy.deepcopy(link)
    with chainer.using_config('use_ideep', 'never'):
        return link(x).array.reshape(n, -1)


@pytest.mark.parametrize(('make', 'shape'), [
    (lambda: L.Convolution2D(2, 3, 3, pad=1, nobias=True), (2, 5, 6)),
    (lambda: L.Convolution2D(2, 3, (4, 3), stride=(2, 1), nobias=True),
     (2, 7, 6)),
    (lambda: L.Convolution2D(2, 3, 2, stride=2, nobias=True), (2, 6, 6)),
    (lambda: L.Convolution2D(2, 3, 3, stride=[2, 1], nobias=True), (2, 7, 6)),
    (lambda: L.Convolution2D(4, 6, 3, groups=2, nobias=True), (4, 5, 5)),
    (lambda: L.Convolution2D(1, 2, 3, stride=2, dilate=2, pad=2, nobias=True),
     (1, 7, 7)),
    (lambda: L.Convolution2D(1, 2, 3, stride=2, dilate=3, pad=3, nobias=True),
     (1, 9, 9)),
    (lambda: L.DilatedConvolution2D(1, 2, 3, dilate=2, pad=2, nobias=True),
     (1, 6, 6)),
    (lambda: L.ConvolutionND(1, 2, 3, 5, stride=3, nobias=True), (2, 14)),
    (lambda: L.Deconvolution2D(2, 3, 3, nobias=True), (2, 4, 5)),
    (lambda: L.Deconvolution2D(2, 3, 4, stride=2, pad=1, nobias=True),
     (2, 4, 4)),
    (lambda: L.Deconvolution2D(4, 6, 3, groups=2, nobias=True), (4, 4, 4)),
    (lambda: L.DeconvolutionND(1, 2, 3, 5, stride=3, nobias=True), (2, 6)),
    (lambda: L.Linear(4, 3, nobias=True), (4,)),
])
@pytest.mark.parametrize('is_constant', [False, True])
def test_bound_of_a_layer(make, shape, is_constant):
    """It holds, and comes close where all entries are one."""
    with chainer.using_config('dtype', np.float64):
        link = make()
    if is_constant:
        link.W.array[...] = 1
    norm = np.linalg.svd(operator_of(link, shape), compute_uv=False)[0]
    bound = lipschitz.bound([
        (link, reference.true_norm(link.W.array, output_axis(link)))])
    assert norm <= bound * (1 + 1e-12)
    if is_constant:
        assert norm > 0.3 * bound


def test_bound_of_a_row_of_layers():
    conv = L.Convolution2D(2, 3, (2, 3))
    assert lipschitz.bound([]) == 1
    assert lipschitz.bound([(conv, 2.), (L.Linear(3, 2), 5.)]) == (
        pytest.approx(10 * 6 ** 0.5))


def test_windows_of_links_of_other_kinds():
    """Nothing is known of how such a link uses its weight."""
    assert lipschitz.n_windows(L.Bilinear(2, 3, 4)) == 1
    assert lipschitz.n_windows(L.Linear(2, 3)) == 1
