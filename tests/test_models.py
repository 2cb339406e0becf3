"""Which weights of a model are normalized, and which could be."""
import pathlib
from typing import ClassVar

import sn_function  # isort: skip  # before chainer, which it repairs

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks

from sn_function import (
    ChainSpectralNormalization,
    SpectralNormalization,
    _models,
    distributed,
    errors,
    extensions,
)


class Two(chainer.Link):
    """A link of another kind, with two weights."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.A = chainer.Parameter(1., (3, 2))
            self.B = chainer.Parameter(1., (2, 4))


class Model(chainer.Chain):

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.blocks = chainer.ChainList(
                chainer.Sequential(L.Linear(2, 2)), L.Linear(2, 2))
            self.conv = L.Convolution2D(1, 2, 3)
            self.again = self.conv
            self.theirs = L.Linear(2, 2).add_hook(
                link_hooks.SpectralNormalization())
            self.two = Two()
            self.bn = L.BatchNormalization(2)
        self.conv.add_hook(SpectralNormalization())
        self.blocks[1].add_hook(SpectralNormalization())
        self.two.add_hook(SpectralNormalization(weight_name='B', name='B'))
        self.two.add_hook(SpectralNormalization(weight_name='A', name='A'))


def names(found):
    return [(path, weight_name) for path, _, weight_name, _ in found]


class TestWeights:

    def test_each_once_with_the_first_path(self):
        """In the order of the paths; hooks of a link in their own order."""
        model = Model()
        assert [path for path, link in model.namedlinks()
                if link is model.conv] == ['/again', '/conv']
        assert names(_models.hooked_weights(model)) == [
            ('/again', 'W'), ('/blocks/1', 'W'), ('/theirs', 'W'),
            ('/two', 'B'), ('/two', 'A')]

    def test_link_and_hook_belong_to_the_path(self):
        model = Model()
        links = dict(model.namedlinks())
        for path, link, weight_name, hook in _models.weights(model):
            assert links[path] is link
            assert hook is None or (
                hook in link.local_link_hooks.values()
                and hook.weight_name == weight_name)

    def test_supported_links_without_a_hook(self):
        found = list(_models.weights(Model()))
        assert names(weight for weight in found if weight.hook is None) == [
            ('/blocks/0/0', 'W')]
        assert names(found)[1] == ('/blocks/0/0', 'W')  # in its place

    @pytest.mark.parametrize('make_hook', [
        SpectralNormalization, link_hooks.SpectralNormalization])
    def test_a_single_link(self, make_hook):
        link = L.Linear(2, 2)
        assert list(_models.hooked_weights(link)) == []
        assert list(_models.weights(link)) == [('/', link, 'W', None)]
        hook = make_hook()
        link.add_hook(hook)
        assert list(_models.hooked_weights(link)) == [('/', link, 'W', hook)]
        assert list(_models.weights(link)) == [('/', link, 'W', hook)]

    def test_other_hooks_do_not_count(self):
        link = L.Linear(2, 2).add_hook(link_hooks.TimerHook())
        assert list(_models.hooked_weights(link)) == []
        assert not _models.is_hooked(link)

    def test_a_link_has_a_hook_for_a_weight(self):
        two = Model().two
        two.delete_hook('A')
        assert _models.is_hooked(two, 'B')
        assert not _models.is_hooked(two, 'A')


class TestLinks:

    def test_each_once_with_the_first_path(self):
        model = Model()
        found = list(_models.hooked_links(model))
        assert found == [
            ('/again', model.conv), ('/blocks/1', model.blocks[1]),
            ('/theirs', model.theirs), ('/two', model.two)]
        assert [path for path, _ in _models.hooked_links(
            model, _models.OURS)] == ['/again', '/blocks/1', '/two']

    def test_a_hook_of_a_chain_is_one_of_ours(self):
        model = chainer.Sequential(chainer.Sequential(L.Linear(2, 2)))
        model.add_hook(ChainSpectralNormalization())
        for kinds in (_models.OURS, _models.ALL_HOOKS):
            assert [path for path, _ in _models.hooked_links(
                model, kinds)] == ['/', '/0/0']
        assert names(_models.hooked_weights(model)) == [('/0/0', 'W')]

    def test_supported_ones_under_each_path(self):
        """A filter may take one of them and not the other."""
        model = Model()
        paths = [path for path, _ in _models.supported_links(model)]
        assert paths == ['/again', '/blocks/0/0', '/blocks/1', '/conv',
                         '/theirs']
        assert list(_models.supported_links(model, 'V')) == []

    def test_kinds_of_links(self):
        supported = [
            L.Linear(2, 2), L.Linear(None, 2), L.EmbedID(2, 2),
            L.Convolution1D(1, 1, 1), L.Convolution2D(1, 1, 1),
            L.Convolution3D(1, 1, 1), L.Deconvolution1D(1, 1, 1),
            L.Deconvolution2D(1, 1, 1), L.Deconvolution3D(1, 1, 1),
            L.DilatedConvolution2D(1, 1, 1)]
        assert all(map(_models.is_supported, supported))
        others = [L.Bilinear(2, 2, 2), L.Scale(W_shape=(2, 2)),
                  L.StatefulGRU(2, 2), chainer.Chain(), Two()]
        assert not any(map(_models.is_supported, others))


class TestFilters:

    LINK = L.Linear(2, 2)

    @pytest.mark.parametrize(('filter', 'expected'), [
        (None, True),
        ('/a/b', True), ('/*', True), ('*b', True), ('/b', False),
        ('/A/*', False),
        (L.Linear, True), (chainer.Link, True), (L.EmbedID, False),
        (lambda path, link: path == '/a/b', True),
        (lambda path, link: link.W is None, False),
        (lambda path, link: [], False),
        ([], False), (['/b', L.Linear], True), (('/b', L.EmbedID), False),
        (['/b', ['/a/*']], True)])
    def test_what_they_take(self, filter, expected):
        assert _models.takes(filter, '/a/b', self.LINK) is expected

    @pytest.mark.parametrize('filter', [
        None, '*', L.Linear, lambda path, link: True, [], ['*', L.Linear],
        ('*',)])
    def test_what_is_one(self, filter):
        _models.check_filter(filter)

    @pytest.mark.parametrize('filter', [
        3, True, {'*'}, [None], ['*', 3], b'*'])
    def test_what_is_none(self, filter):
        with pytest.raises(errors.FilterError, match='pattern'):
            _models.check_filter(filter)


class Conditional(chainer.Chain):
    """As a conditional batch normalization, which embeds its scales."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.gammas = L.EmbedID(5, 3)
            self.betas = L.EmbedID(5, 3)


class Block(chainer.Chain):

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.bn = Conditional()
            self.conv = L.Convolution2D(3, 3, 3)


class Generator(chainer.Chain):

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.embed = L.EmbedID(5, 4)
            self.block1 = Block()
            self.block2 = Block()


def is_square(path, link):
    return link.W.shape[0] == link.W.shape[1]


IN_BLOCKS = ['/block1/conv', '/block2/conv']


class TestExcluded:

    @pytest.mark.parametrize(('exclude', 'kept'), [
        (None, [
            '/block1/bn/betas', '/block1/bn/gammas', '/block1/conv',
            '/block2/bn/betas', '/block2/bn/gammas', '/block2/conv',
            '/embed']),
        ('*/bn/*', [*IN_BLOCKS, '/embed']),
        ('*/bn', [*IN_BLOCKS, '/embed']),
        (Conditional, [*IN_BLOCKS, '/embed']),
        (L.EmbedID, IN_BLOCKS),
        (['*/bn', '/block1/conv'], ['/block2/conv', '/embed']),
        (['/block2', '*/betas'], [
            '/block1/bn/gammas', '/block1/conv', '/embed']),
        (is_square, [
            '/block1/bn/betas', '/block1/bn/gammas', '/block2/bn/betas',
            '/block2/bn/gammas', '/embed']),
        ((is_square, Conditional), ['/embed']),
        ([], None)])
    def test_what_is_kept(self, exclude, kept):
        model = Generator()
        links = list(_models.supported_links(model))
        excluded = _models.excluded(model, exclude, links)
        if kept is None:
            kept = [path for path, _ in links]
        assert [path for path, link in links if id(link) not in excluded] == (
            kept)
        assert _models.excluded(model, exclude, links, False) == excluded

    def test_the_model_itself_is_no_chain_in_it(self):
        model = chainer.Sequential(chainer.Sequential(L.Linear(2, 2)),
                                   L.Linear(2, 2))
        links = list(_models.supported_links(model))
        assert _models.excluded(model, chainer.Sequential, links) == {
            id(model[0][0])}

    def test_one_path_of_several(self):
        model = chainer.ChainList(L.Linear(2, 2))
        model.add_link(model[0])
        links = list(_models.supported_links(model))
        assert _models.excluded(model, '/0', links) == {id(model[0])}

    @pytest.mark.parametrize(('exclude', 'match'), [
        ('*/bn/gamas', r"^exclude='\*/bn/gamas' leaves out none of the links "
                       r"of Generator .* are /block1/bn/betas \(EmbedID\), .*"
                       r"Did you mean '/block./bn/gammas' or "),
        ('/blok1', r"leaves out none.* Give"),
        ('/blck1/conv', r"Did you mean '/block1/conv' or '/block2/conv'\?"),
        ('block1', r"did you mean '/block1'\?"),
        (L.Linear, '^exclude=Linear leaves out none'),
        (['*/bn', L.Linear], '^exclude=Linear leaves out none'),
        (lambda path, link: False, 'lambda> leaves out none'),
        ('/', "'/' leaves out none")])
    def test_what_takes_nothing(self, exclude, match):
        model = Generator()
        links = list(_models.supported_links(model))
        with pytest.raises(errors.NothingExcludedError, match=match):
            _models.excluded(model, exclude, links)
        _models.excluded(model, exclude, links, is_strict=False)


class TestModelsGiven:
    """Something else in the place of a model is refused by name."""

    TOOLS: ClassVar = {
        'bake': sn_function.bake,
        'summary': sn_function.summary,
        'SpectralNormReport': extensions.SpectralNormReport,
        'cached': lambda *models: sn_function.cached(*models).__enter__(),
    }

    @pytest.mark.parametrize(('given', 'match'), [
        ('x.npz', r"given str 'x\.npz'\..*load_npz.*snapshot\."
                  r"(bake\(snapshot, out\)|inspect\(snapshot\))"),
        (pathlib.Path('x.npz'), r"x\.npz.*`sn-function (bake SNAPSHOT OUT|"
                                r"inspect SNAPSHOT)`"),
        (np.ones((2, 3)), r'ndarray of shape \(2, 3\).*Give the link'),
        (SpectralNormalization(), r'given SpectralNormalization\(n_power_it.*'
                                  r'model\.add_hook\(hook\)'),
        (ChainSpectralNormalization(), r'model\.add_hook\(hook\)'),
        (link_hooks.SpectralNormalization(), r'model\.add_hook\(hook\)'),
        (L.Linear, r'Give an object of this class: Linear\(\.\.\.\)'),
        (chainer.optimizers.SGD().setup(L.Linear(2, 2)), r'optimizer\.target'),
        ([L.Linear(2, 2)], r'Give the (link|models one by one: cached\(\*m)'),
        (None, r'given NoneType None\. Give the link')])
    @pytest.mark.parametrize('tool', TOOLS)
    def test_another_thing(self, tool, given, match):
        with pytest.raises(TypeError, match=match) as e:
            self.TOOLS[tool](given)
        assert type(e.value) is errors.ModelTypeError
        assert str(e.value).startswith(f'{tool} takes a model')

    def test_no_model(self):
        with pytest.raises(
                errors.ModelTypeError, match=r'nothing\..*cached\(model\)'):
            self.TOOLS['cached']()

    def test_one_of_several(self):
        link = L.Linear(2, 2).add_hook(SpectralNormalization())
        with pytest.raises(errors.ModelTypeError, match='given int 3'):
            self.TOOLS['cached'](link, 3)


def test_names_of_vectors():
    link = L.Linear(3, 3)
    link.V = link.W
    link.add_hook(sn_function.SpectralNormalization(n_vectors=2))
    link.add_hook(link_hooks.SpectralNormalization(
        weight_name='V', name='V'))
    assert _models.vector_names(link) == ['W_u', 'W_us', 'V_u']


def test_all_tools_see_the_same():
    """The report, the summary, and what is broadcast."""
    model = Model()
    weights = list(_models.hooked_weights(model))
    assert [name for _, _, name in distributed._vectors(model)] == [
        f'{weight.weight_name}_u' for weight in weights]
    assert [layer.shape for layer in extensions.SpectralNormReport(
        model).measure()] == [
            getattr(weight.link, weight.weight_name).shape
            for weight in weights]
    paths = {f'{weight.path}/{weight.weight_name}' for weight in weights}
    assert paths | {'/conv/W'} == {
        row.path for row in sn_function.summary(model).rows
        if row.status == 'normalized'}
    assert list(_models.hooked_weights(sn_function.bake(model))) == []
