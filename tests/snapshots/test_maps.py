"""Snapshots with vectors of ``norm='operator'``: inputs of a convolution.

They hold neither its stride nor its padding, so little can be done to them.
"""
import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import serializers

from sn_function import SpectralNormalization, errors, snapshot
from sn_function.functions import conv_spectral_normalize
from tests import maps

# A link without bias, the shape of an input, and what is said of the link.
LINKS = {
    'plain': (lambda: L.Convolution2D(
        2, 3, 3, 1, 1, nobias=True), (2, 5, 4), {'stride': 1, 'pad': 1}),
    'stride': (lambda: L.Convolution2D(
        3, 2, 3, (2, 1), nobias=True), (3, 7, 5),
        {'stride': (2, 1), 'pad': 0}),
    'groups': (lambda: L.Convolution2D(
        4, 6, 3, 1, 1, nobias=True, groups=2), (4, 5, 4),
        {'stride': 1, 'pad': 1, 'groups': 2}),
    'depthwise': (lambda: L.DepthwiseConvolution2D(
        4, 2, 3, 1, 1, nobias=True), (4, 5, 4),
        {'stride': 1, 'pad': 1, 'groups': 'depthwise'}),
    'dilated': (lambda: L.DilatedConvolution2D(
        2, 3, 2, dilate=2, nobias=True), (2, 5, 4),
        {'stride': 1, 'pad': 0, 'dilate': 2}),
    'deconvolution': (lambda: L.Deconvolution2D(
        5, 3, 4, 2, 1, nobias=True), (5, 4, 3), {'stride': 2, 'pad': 1}),
    'square deconvolution': (lambda: L.Deconvolution2D(
        3, 3, 4, 2, 1, nobias=True), (3, 4, 3),
        {'stride': 2, 'pad': 1, 'axes': {'l/W': 1}}),
    '1 D': (lambda: L.Convolution1D(
        2, 3, 3, nobias=True), (2, 8), {'stride': 1, 'pad': 0}),
    '3 D': (lambda: L.Convolution3D(
        2, 3, 2, nobias=True), (2, 3, 4, 3), {'stride': 1, 'pad': 0}),
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    assert sn_function
    monkeypatch.chdir(tmp_path)


def entries(link, shape, n_vectors=1, dtype='f'):
    """Those of a link whose vector has settled, and of one with a matrix."""
    link.W.array = np.random.normal(size=link.W.shape).astype(dtype)
    rows = maps.dense(link, shape, link.W.array.astype('d'))
    n_groups = shape[0] if isinstance(link, L.DepthwiseConvolution2D) else (
        getattr(link, 'groups', 1))
    units = np.concatenate([
        np.linalg.svd(block)[0].T[:n_vectors]
        for block in np.split(rows, n_groups)], axis=1).astype(dtype)
    arrays = {'l/W': link.W.array, 'l/W_map': units[0].reshape(shape)}
    if n_vectors > 1:
        arrays['l/W_maps'] = units[1:].reshape(-1, *shape)
    matrix = np.random.normal(size=(4, 6))
    u = np.linalg.svd(matrix)[0][:, 0]
    return {**arrays, 'm/W': matrix.astype(dtype), 'm/W_u': u.astype(dtype),
            'n': np.arange(3)}, np.linalg.norm(rows, 2)


def saved(kind='plain', **settings):
    make, shape, options = LINKS[kind]
    arrays, norm = entries(make(), shape, **settings)
    np.savez('in.npz', **arrays)
    return arrays, norm, options


def contents(path='out.npz'):
    with np.load(path) as file:
        return dict(file)


def report_of(key='l/W', **options):
    return {each.key: each for each in snapshot.inspect(
        'in.npz', **options)}[key]


def same(a, b):
    assert list(a) == list(b)
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


class TestInspect:

    @pytest.mark.parametrize('kind', LINKS)
    def test_norm_of_the_map_where_it_is_given(self, kind):
        _, norm, options = saved(kind)
        report = report_of(**options)
        assert report.status == 'ok'
        assert report.sigma == pytest.approx(norm, rel=1e-9)
        assert report.estimate == pytest.approx(norm, rel=1e-5)
        assert report.axis == int('deconv' in kind)
        assert report.condition is None

    def test_without(self):
        saved(n_vectors=3)
        for options in {}, {'stride': 1}, {'pad': {'*': 1}}:
            report = report_of(**options)
            assert report.status == 'map'
            assert report.healthy
            assert report.note == (
                '3 vectors; map of 2 x 5 x 4; its estimate needs --stride and '
                '--pad')
            assert report[4:8] == (None,) * 4
        assert report_of('m/W').status == 'ok'

    def test_several_vectors(self):
        _, norm, options = saved(n_vectors=3)
        report = report_of(**options)
        assert (report.status, report.note) == (
            'ok', '3 vectors; map of 2 x 5 x 4')
        assert report.estimate == pytest.approx(norm, rel=1e-5)

    def test_vector_of_another_map(self):
        arrays, _, options = saved()
        arrays['l/W_map'] = np.random.normal(size=(2, 5, 4)).astype('f')
        np.savez('in.npz', **arrays)
        assert report_of(**options).status == 'stale'

    @pytest.mark.parametrize(('name', 'value', 'status'), [
        ('W_map', np.zeros((2, 5, 4), 'f'), 'zero'),
        ('W_map', np.full((2, 5, 4), np.nan, 'f'), 'NaN'),
        ('W_map', np.ones((3, 5), 'f'),
         'of shape (3, 5), which is no input of it'),
        ('W_map', np.ones((5, 5, 4), 'f'),
         'of shape (5, 5, 4), which is no input of it'),
        ('W_map', np.ones((2, 0, 4), 'f'),
         'of shape (2, 0, 4), which is no input of it'),
        ('W_map', np.ones((2, 5, 4), 'i'), 'of dtype int32'),
        ('W_map', None, 'not initialized'),
        ('W_maps', np.full((2, 2, 5, 4), np.inf, 'f'), 'Inf in W_maps'),
        ('W_maps', np.ones((2, 2, 5, 5), 'f'), 'of shape (2, 2, 5, 5) '
         'instead of (2, 2, 5, 4) in W_maps'),
        ('W_maps', np.ones((2, 20), 'f'),
         'of shape (2, 20) instead of (0, 2, 5, 4) in W_maps'),
    ])
    def test_faults(self, name, value, status):
        arrays, *_ = saved(n_vectors=3)
        arrays[f'l/{name}'] = value
        np.savez('in.npz', **arrays)
        report = report_of()
        assert report.status == status
        assert not report.healthy

    def test_vector_of_a_group(self):
        """Each group has one of its own."""
        arrays, _, options = saved('groups', n_vectors=3)
        for name in 'W_map', 'W_maps':
            broken = {**arrays, f'l/{name}': arrays[f'l/{name}'].copy()}
            broken[f'l/{name}'][..., 2:, :, :] = 0
            np.savez('in.npz', **broken)
            assert not report_of(**options).healthy
            assert report_of(**options).status.startswith('zero')
            assert report_of().status == 'map'  # as far as can be told

    def test_vectors_that_are_not_independent(self):
        arrays, _, options = saved(n_vectors=3)
        arrays['l/W_maps'][1] = arrays['l/W_maps'][0]
        np.savez('in.npz', **arrays)
        assert report_of(**options).status == 'not independent in W_maps'
        assert report_of().status == 'map'  # as far as can be told

    def test_is_no_weight(self):
        """Nor is a map of a link with another vector, or without W."""
        arrays, *_ = saved('1 D')
        keys = {'l/W', 'm/W'}
        assert {each.key for each in snapshot.inspect(
            'in.npz', certify=.1)} == keys
        with pytest.raises(errors.SnapshotPatternError):
            snapshot.repair('in.npz', 'out.npz', add_u=['l/W_map'])
        arrays['l/W_u'] = np.ones(3, 'f')
        np.savez('in.npz', **arrays, **{
            'k/W_map': np.ones((2, 3)), 'm/W_map': np.ones((6, 3))})
        reports = snapshot.inspect('in.npz')
        assert [(each.key, each.note) for each in reports] == [
            ('l/W', ''), ('m/W', '')]

    def test_with_an_entry_that_another_layout_has(self):
        arrays, *_ = saved()
        np.savez('in.npz', **arrays, **{'l/u': np.ones((1, 3), 'f')})
        assert [each.layout for each in snapshot.inspect('in.npz')] == [
            'chainer', 'chainer']

    def test_more_vectors_than_outputs(self):
        W = np.random.normal(size=(1, 2, 3))
        maps_ = np.random.normal(size=(10, 2, 8))
        np.savez('in.npz', **{
            'l/W': W, 'l/W_map': maps_[0], 'l/W_maps': maps_[1:]})
        assert report_of(stride=1, pad=0).note.endswith(
            'refresh(model) makes it anew; 6 vectors; map of 2 x 8')
        assert report_of().note.startswith('10 vectors; map of 2 x 8')

    def test_weight_that_was_not_initialized(self):
        np.savez('in.npz', **{'l/W': None, 'l/W_map': None})
        assert report_of().status == 'not initialized'

    @pytest.mark.parametrize(('options', 'match'), [
        ({'groups': 4}, 'not one of 4 groups'),
        ({}, 'of 4 channels, with the groups'),
        ({'groups': 2, 'axes': {'l/W': 1}}, 'of 4 channels, with the'),
        ({'stride': (1, 1, 1)}, 'not for the 2 axes'),
    ])
    def test_what_does_not_fit(self, options, match):
        saved('groups')
        options = {'stride': 1, 'pad': 1, **options}
        with pytest.raises(errors.SnapshotMapError, match=match):
            report_of(**options)

    @pytest.mark.parametrize(('name', 'value'), [
        ('stride', 0), ('stride', (1, 0)), ('pad', -1), ('dilate', 1.5),
        ('groups', (2, 2)), ('groups', 'each'), ('stride', ()),
        ('stride', {'*': 'a'})])
    def test_numbers_out_of_range(self, name, value):
        saved()
        with pytest.raises(errors.MapOptionError, match=f'{name} must be'):
            report_of(**{name: value})

    def test_pattern_that_fits_nothing(self):
        saved()
        for name in 'stride', 'pad', 'dilate', 'groups':
            with pytest.raises(errors.SnapshotPatternError, match=name):
                report_of(**{name: {'x/*': 1}})


class TestBake:

    @pytest.mark.parametrize('n_vectors', [1, 3])
    @pytest.mark.parametrize('kind', LINKS)
    def test_has_the_weight_of_test_mode(self, kind, n_vectors):
        arrays, norm, options = saved(kind, n_vectors=n_vectors)
        outcome = snapshot.bake('in.npz', 'out.npz', factor=.5, **options)
        found = contents()
        assert list(found) == ['l/W', 'm/W', 'n']
        assert outcome.weights[0].sigma == pytest.approx(norm, rel=1e-5)
        link = LINKS[kind][0]()
        rows = maps.dense(link, LINKS[kind][1], found['l/W'].astype('d'))
        assert np.linalg.norm(rows, 2) == pytest.approx(.5, rel=1e-5)
        if kind == 'depthwise':
            return
        u = arrays['l/W_map']
        if n_vectors > 1:
            u = np.concatenate([u[None], arrays['l/W_maps']])
        more = {key: value for key, value in options.items()
                if key != 'axes'}
        Y = conv_spectral_normalize(
            arrays['l/W'], u, factor=.5, transposed='deconv' in kind, **more)
        np.testing.assert_array_equal(found['l/W'], Y.array)

    def test_is_refused_without(self):
        saved()
        with pytest.raises(
                errors.SnapshotMapError, match=r"entry 'l/W': .*"
                r'--stride l/W=N --pad l/W=N.*sn_function\.bake\(model\)'):
            snapshot.bake('in.npz', 'out.npz')
        with pytest.raises(errors.SnapshotMapError):
            snapshot.bake('in.npz', 'out.npz', stride=1)

    @pytest.mark.parametrize(('dtype', 'rtol'), [('e', 2e-3), ('d', 1e-12)])
    def test_dtype(self, dtype, rtol):
        _, _, options = saved(dtype=dtype)
        snapshot.bake('in.npz', 'out.npz', **options)
        W = contents()['l/W']
        assert W.dtype == dtype
        rows = maps.dense(
            LINKS['plain'][0](), (2, 5, 4), W.astype('d'))
        assert np.linalg.norm(rows, 2) == pytest.approx(1, rel=rtol)

    def test_square_deconvolution(self):
        """It is taken for a convolution unless its axis says otherwise."""
        _, _, options = saved('square deconvolution')
        snapshot.bake('in.npz', 'axis.npz', **options)
        options = {'stride': 2, 'pad': 1}
        snapshot.bake('in.npz', 'out.npz', **options)
        snapshot.bake('in.npz', 'axis0.npz', axes={'l/W': 0}, **options)
        same(contents(), contents('axis0.npz'))
        assert (contents()['l/W'] != contents('axis.npz')['l/W']).any()
        with pytest.raises(errors.AxisError):
            snapshot.bake('in.npz', 'b.npz', axes={'l/W': 9}, **options)

    def test_images_that_are_too_small(self):
        saved('1 D')
        with pytest.raises(errors.InputSizeError):
            snapshot.bake('in.npz', 'out.npz', stride=1, pad=0, dilate=5)

    def test_options_by_patterns(self):
        _, norm, _ = saved()
        snapshot.bake('in.npz', 'out.npz', stride={'*': 1},
                      pad={'l/*': (1, 1), '*': 0}, dilate={'l/W': 1})
        rows = maps.dense(
            LINKS['plain'][0](), (2, 5, 4), contents()['l/W'].astype('d'))
        assert np.linalg.norm(rows, 2) == pytest.approx(1, rel=1e-5)
        assert norm > 1.5


class TestConvert:

    @pytest.mark.parametrize('layout', [
        'torch', 'torch-parametrized', 'sngan-projection'])
    def test_no_other_layout_has_a_place_for_it(self, layout):
        saved()
        with pytest.raises(
                errors.SnapshotTargetError,
                match=f"operator'.*{layout} has no place .*W_map"):
            snapshot.convert('in.npz', 'out.npz', layout)

    @pytest.mark.parametrize('converge', [False, True])
    def test_stays_as_it_is(self, converge):
        arrays, *_ = saved(n_vectors=3)
        outcome = snapshot.convert(
            'in.npz', 'out.npz', 'chainer', converge=converge)
        found = contents()
        if not converge:
            same(found, arrays)
        for key in 'l/W', 'l/W_map', 'l/W_maps':
            np.testing.assert_array_equal(found[key], arrays[key])
        change = {each.key: each for each in outcome.weights}['l/W']
        assert change.action == 'kept'
        assert ('refresh' in change.note) == converge

    @pytest.mark.parametrize('rename', [{'l': 'a/b'}, {'l/W': 'a/b/W'}])
    def test_gets_another_path(self, rename):
        arrays, *_ = saved(n_vectors=3)
        arrays['l/gamma'] = np.array(2., 'f')
        np.savez('in.npz', **arrays)
        outcome = snapshot.convert(
            'in.npz', 'out.npz', 'chainer', rename=rename)
        found = contents()
        for name in 'W', 'W_map', 'W_maps', 'gamma':
            np.testing.assert_array_equal(
                found[f'a/b/{name}'], arrays[f'l/{name}'])
        assert [key for key in found if key.startswith('l/')] == []
        assert {each.key for each in outcome.weights} == {'a/b/W', 'm/W'}

    def test_one_model_of_a_trainer(self):
        arrays, *_ = saved()
        np.savez('in.npz', **{
            f'updater/model:dis/{key}': value
            for key, value in arrays.items()}, other=np.ones(3))
        snapshot.convert('in.npz', 'out.npz', 'chainer', model='dis')
        same(contents(), arrays)


class TestRepair:

    def test_good_one_is_kept(self):
        arrays, *_ = saved(n_vectors=3)
        for all_ in False, True:
            outcome = snapshot.repair(
                'in.npz', 'out.npz', all=all_, overwrite=True)
            change = outcome.weights[0]
            assert (change.key, change.action) == ('l/W', 'kept')
            assert ('refresh' in change.note) == all_
            for key in 'l/W', 'l/W_map', 'l/W_maps':
                np.testing.assert_array_equal(contents()[key], arrays[key])

    def test_bad_one_is_left_out(self):
        arrays, *_ = saved(n_vectors=3)
        arrays['l/W_map'][0, 0] = np.nan
        np.savez('in.npz', **arrays)
        change = snapshot.repair('in.npz', 'out.npz').weights[0]
        assert change.action == 'repaired'
        assert change.note == (
            'its vector was NaN: without W_map and W_maps the hook makes it '
            'anew in its next call')
        same(contents(), {key: arrays[key] for key in arrays
                          if 'map' not in key})

    def test_so_are_bad_ones_beside_it(self):
        arrays, *_ = saved(n_vectors=3)
        arrays['l/W_maps'][...] = 0
        np.savez('in.npz', **arrays)
        change = snapshot.repair('in.npz', 'out.npz').weights[0]
        assert change.note == (
            'its vector was zero in W_maps: without W_maps the hook makes it '
            'anew in its next call')
        assert 'l/W_map' in contents()
        assert 'l/W_maps' not in contents()

    def test_one_that_was_not_initialized(self):
        arrays, *_ = saved()
        arrays['l/W_map'] = None
        np.savez('in.npz', **arrays)
        change = snapshot.repair('in.npz', 'out.npz').weights[0]
        assert (change.action, change.note) == (
            'kept', 'its vector is made in the next call')
        assert 'l/W_map' in np.load('out.npz').files

    def test_others_get_none(self):
        saved()
        with pytest.raises(errors.SnapshotPatternError):
            snapshot.repair('in.npz', 'out.npz', add_u=['l/*'])


class TestOfHook:
    """Files of links with the hook itself."""

    def saved(self, kind, path='in.npz', **settings):
        make, shape, options = LINKS[kind]
        link = chainer.Chain(l=make().add_hook(SpectralNormalization(
            norm='operator', **settings)))
        x = np.random.normal(size=(2, *shape)).astype('f')
        for _ in range(2):
            link.l(x)
        save = (serializers.save_npz if path.endswith('npz')
                else serializers.save_hdf5)
        save(path, link)
        return link, x, options

    @pytest.mark.parametrize('settings', [
        {}, {'n_vectors': 3}, {'use_gamma': True}, {'cap': .5},
        {'n_power_iteration': 3, 'n_warmup': 0}, {'factor': .3}])
    @pytest.mark.parametrize('kind', LINKS)
    def test_bake_is_bit_for_bit_test_mode(self, kind, settings):
        link, _, options = self.saved(kind, **settings)
        given = {key: value for key, value in settings.items()
                 if key not in ('n_vectors', 'use_gamma')}
        snapshot.bake('in.npz', 'out.npz', **options, **given)
        found = contents()
        assert list(found) == ['l/W']
        np.testing.assert_array_equal(
            found['l/W'], sn_function.bake(link).l.W.array)

    @pytest.mark.parametrize('path', ['in.npz', 'in.h5'])
    def test_inspect(self, path):
        link, _, options = self.saved('plain', path, n_vectors=2)
        report, = snapshot.inspect(path, **options)
        assert report.sigma == pytest.approx(np.linalg.norm(maps.dense(
            link.l, (2, 5, 4), link.l.W.array.astype('d')), 2), rel=1e-9)
        assert report.note == '2 vectors; map of 2 x 5 x 4'
        assert report.status == 'ok'

    @pytest.mark.parametrize('path', ['in.npz', 'in.h5'])
    def test_repaired_one_is_loaded(self, path):
        source, x, options = self.saved('plain', path, n_vectors=3)
        source.l.W_map[...] = np.nan
        end = path[2:]
        save, load = (
            (serializers.save_npz, serializers.load_npz) if end == '.npz'
            else (serializers.save_hdf5, serializers.load_hdf5))
        save(path, source)
        assert not snapshot.inspect(path)[0].healthy
        snapshot.repair(path, f'out{end}')
        link, _, _ = self.saved('plain', f'other{end}', n_vectors=3)
        load(f'out{end}', link)
        link.l(x)
        save(f'again{end}', link)
        assert snapshot.inspect(f'again{end}', **options)[0].status == 'ok'

    def test_one_that_was_never_called(self):
        link = chainer.Chain(l=L.Convolution2D(2, 3, 3).add_hook(
            SpectralNormalization(norm='operator')))
        serializers.save_npz('in.npz', link)
        report, = snapshot.inspect('in.npz')
        assert report.status == 'not initialized'
        change, = snapshot.repair('in.npz', 'out.npz').weights
        assert change.action == 'kept'
