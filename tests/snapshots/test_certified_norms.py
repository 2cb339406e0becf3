"""``inspect`` with certificates: intervals that hold the norms in a file.

The oracle is the map of a link of Chainer as a dense matrix, in float64.
"""
import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import serializers

from sn_function import SpectralNormalization, errors, snapshot
from tests import maps

RTOL = 1e-2


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    assert sn_function
    monkeypatch.chdir(tmp_path)


def model(make_hook=None, **settings):
    links = dict(
        linear=L.Linear(5, 7), embed=L.EmbedID(8, 4),
        conv=L.Convolution2D(3, 4, 3, nobias=True),
        strided=L.Convolution2D(2, 3, 4, 2, 1, nobias=True),
        grouped=L.Convolution2D(4, 6, 3, nobias=True, groups=2),
        dilated=L.DilatedConvolution2D(2, 3, 2, 2, dilate=2, nobias=True),
        deconv=L.Deconvolution2D(4, 3, 4, 2, 1, nobias=True),
        depthwise=L.DepthwiseConvolution2D(3, 2, 3, nobias=True),
        line=L.Convolution1D(2, 3, 3, nobias=True))
    for link in links.values():
        link.W.array[...] = np.random.normal(size=link.W.shape)
        if make_hook is not None:
            link.add_hook(make_hook(**settings))
    links['plain'] = L.Convolution2D(2, 2, 3, nobias=True)
    links['norm'] = L.BatchNormalization(3)
    return chainer.Chain(**links)


OPTIONS = dict(
    stride={'strided/W': 2, 'dilated/W': (2, 2), 'deconv/W': 2},
    dilate={'dilated/W': 2}, groups={
        'grouped/W': 2, 'depthwise/W': 'depthwise'})
CHANNELS = dict(conv=3, strided=2, grouped=4, dilated=2, deconv=4,
                depthwise=3, line=2, plain=2)


def norm(chain, path, W, size):
    """The norm of the map of a link for images of that size."""
    if W.ndim == 2:
        return np.linalg.norm(W, 2)
    return np.linalg.norm(maps.dense(
        chain[path], (CHANNELS[path], *(size,) * (W.ndim - 2)), W), 2)


def inspect(path='in.npz', certify=RTOL, **options):
    reports = snapshot.inspect(path, certify=certify, **options)
    return {each.key.rsplit('/', 1)[0]: each for each in reports}


@pytest.mark.parametrize('name', ['in.npz', 'in.h5'])
def test_hold_the_norms_of_weights_and_of_normalized_ones(name):
    chain = model(SpectralNormalization, use_gamma=True)
    for path in 'conv', 'linear':
        chain[path].gamma.array[...] = -.7
    save = (serializers.save_npz if name.endswith('npz')
            else serializers.save_hdf5)
    save(name, chain)
    reports = inspect(name, **OPTIONS)
    assert set(reports) == {*chain._children} - {'norm'}
    for path, report in reports.items():
        W = chain[path].W.array.astype('d')
        sizes = (4, 9) if W.ndim < 5 else (3, 4)
        for interval, Y in ((report.certified, W), (
                report.normalized, normalized(chain[path]))):
            if Y is None:
                assert interval is None
                continue
            lo, hi = interval
            norms = [norm(chain, path, Y, size) for size in sizes]
            assert lo <= hi <= (1 + RTOL) * lo
            assert max(norms) <= hi
            # The norms of larger images come close.
            assert norms[-1] > .9 * lo
        assert report.healthy


def normalized(link):
    with chainer.using_config('train', False):
        Ys = [hook.normalize_weight(link).array.astype('d')
              for hook in link.local_link_hooks.values()]
    return Ys[0] if Ys else None


def test_upper_ends_hold_for_what_is_not_given():
    chain = model()
    serializers.save_npz('in.npz', chain)
    exact, loose = inspect(**OPTIONS), inspect()
    for path in exact:
        assert exact[path].certified[0] <= loose[path].certified[1]
    assert loose['strided'].certified[0] > exact['strided'].certified[1]


def test_weights_without_vectors():
    serializers.save_npz('in.npz', model())
    reports = inspect()
    assert set(reports) == {
        'linear', 'embed', 'conv', 'strided', 'grouped', 'dilated', 'deconv',
        'depthwise', 'line', 'plain'}
    for report in reports.values():
        assert (report.status, report.layout) == ('no vector', 'plain')
        assert report.healthy
        assert report.normalized is report.estimate is None
        assert report.sigma is not None
    assert len(snapshot.inspect('in.npz')) == len(reports)


def test_what_no_certificate_is_asked_for():
    serializers.save_npz('in.npz', model(SpectralNormalization))
    for report in snapshot.inspect('in.npz'):
        assert report.certified is report.normalized is None
        assert (report.status == 'no vector') == (report.key == 'plain/W')


def test_baked_with_a_certificate():
    """What is shipped can be looked at where Chainer is not."""
    chain = model(SpectralNormalization)
    serializers.save_npz('in.npz', sn_function.bake(chain, certified=True))
    reports = inspect(certify=1e-3, **OPTIONS)
    del reports['plain']
    for report in reports.values():
        lo, hi = report.certified
        assert .998 < lo <= hi <= 1


def test_of_torch():
    W = np.random.normal(size=(4, 3, 3, 3)).astype('f')
    matrix = W.reshape(4, -1).astype('d')
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    np.savez('in.npz', **{
        'l.weight_orig': W, 'l.weight_u': u[:, 0], 'l.weight_v': v[0],
        'm.weight': W, 'm.bias': np.ones(4), 'bn.weight': np.ones(4)})
    reports = {each.key: each for each in snapshot.inspect(
        'in.npz', certify=RTOL)}
    assert set(reports) == {'l.weight_orig', 'm.weight'}
    both = [reports[key].certified for key in reports]
    assert both[0] == both[1]
    np.testing.assert_allclose(
        reports['l.weight_orig'].normalized, np.divide(both[0], s[0]),
        rtol=RTOL)


def test_vectors_that_are_not_usable():
    serializers.save_npz('in.npz', model(SpectralNormalization))
    with np.load('in.npz') as file:
        arrays = dict(file)
    arrays['linear/W_u'][...] = np.nan
    arrays['conv/W'][0] = np.inf
    arrays['line/W_u'] = np.random.normal(size=3).astype('f')
    np.savez('in.npz', **arrays)
    reports = inspect()
    assert reports['linear'].certified[1] >= reports['linear'].sigma
    assert reports['linear'].normalized is None
    assert reports['conv'].certified is reports['conv'].normalized is None
    # Test mode iterates first.
    for path in 'line', 'embed':
        report = reports[path]
        np.testing.assert_allclose(
            np.multiply(report.normalized, report.estimate),
            report.certified, rtol=1.001 * RTOL)


def test_vectors_of_maps():
    """They have an estimate only where the layer is known."""
    link = L.Convolution2D(2, 3, 3, 2, 1, nobias=True)
    link.W.array = link.W.array.astype('d')
    rows = maps.dense(link, (2, 6, 6))
    np.savez('in.npz', **{
        'l/W': link.W.array,
        'l/W_map': np.linalg.svd(rows)[0][:, 0].reshape(2, 6, 6)})
    report = inspect(stride=2)['l']
    assert report.status == 'map'
    assert report.normalized is None
    lo, hi = inspect(stride=2, pad=1)['l'].normalized
    sup = report.certified[0] / np.linalg.norm(rows, 2)
    assert lo < sup * (1 + RTOL)
    assert sup < hi * (1 + RTOL)
    assert hi > 1


def test_arguments():
    serializers.save_npz('in.npz', model())
    for argument in {'certify': -1}, {'certify': 1e-2, 'time_limit': -1}:
        with pytest.raises(errors.CertifyArgumentError):
            snapshot.inspect('in.npz', **argument)
