"""Whole models: the hook of a chain, and the scope that shares weights."""
import contextlib
import copy
import gc
import inspect
import pickle
import threading
import warnings
import weakref

import chainer
import chainer.functions as CF
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks, optimizers, serializers

from sn_function import (
    ChainSpectralNormalization,
    SpectralNormalization,
    cached,
    errors,
    summary,
)
from sn_function._links import scope as _scope


class Model(chainer.Chain):
    """Each axis, a lazy link, one that is called twice, and an unused one."""

    def __init__(self, n_calls=1):
        super().__init__()
        self.n_calls = n_calls
        with self.init_scope():
            self.up = L.Deconvolution2D(2, 3, 2)
            self.conv = L.Convolution2D(None, 4, 2)
            self.same = L.Linear(16, 16)
            self.out = L.Linear(None, 1)
            self.unused = L.EmbedID(5, 3)

    def forward(self, x):
        h = CF.tanh(self.conv(CF.tanh(self.up(x))))
        for _ in range(self.n_calls):
            h = CF.tanh(self.same(h.reshape(len(h), -1)))
        return CF.sum(self.out(h))


def hooked(kind, n_calls=1, **settings):
    """A model with a hook on each link, or one on the chain."""
    np.random.seed(0)
    model = Model(n_calls)
    if kind == 'chain':
        model.add_hook(ChainSpectralNormalization(**settings))
    else:
        hook = SpectralNormalization(**settings)
        for link in model.children():
            link.add_hook(hook)
    return model


def images(n=2, seed=1):
    return np.random.RandomState(seed).normal(size=(n, 2, 2, 2)).astype('f')


def train(model, optimizer, n, in_test_mode=None):
    """Returns the losses of n steps, one of them maybe in test mode."""
    losses = []
    for i in range(n):
        with chainer.using_config('train', i != in_test_mode):
            loss = model(images(seed=i))
        model.cleargrads()
        loss.backward()
        optimizer.update()
        losses.append(loss.array)
    return losses


def state_of(model):
    target = chainer.serializers.DictionarySerializer()
    target.save(model)
    return {key: np.copy(value) for key, value in target.target.items()}


def assert_same_state(actual, expected, rtol=0):
    actual, expected = state_of(actual), state_of(expected)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(
            actual[key], value, rtol=rtol, atol=rtol, err_msg=key)


def used(model):
    """The links that a call of the model calls."""
    return [model.up, model.conv, model.same, model.out]


def norms(model):
    """The norms of the weights that a call of the model uses."""
    with cached(model):
        model(images())
        Ys = [link.local_link_hooks['SpectralNormalization'].normalize_weight(
            link).array for link in used(model)]
    Ys[0] = Ys[0].swapaxes(0, 1)
    return [np.linalg.norm(Y.reshape(len(Y), -1), 2) for Y in Ys]


def grads_of(model):
    return [link.W.grad for link in used(model)]


def us_of(model):
    return [link.W_u for link in used(model)]


RECURRENT = {
    'LSTM': lambda: L.LSTM(5, 6),
    'StatelessLSTM': lambda: L.StatelessLSTM(5, 6),
    'GRU': lambda: L.GRU(5, 6),
    'StatefulGRU': lambda: L.StatefulGRU(5, 6),
    'StatelessGRU': lambda: L.StatelessGRU(5, 6),
    'StatefulPeepholeLSTM': lambda: L.StatefulPeepholeLSTM(5, 6),
    'StatefulMGU': lambda: L.StatefulMGU(5, 6),
    'StatelessMGU': lambda: L.StatelessMGU(5, 6),
    'StatefulZoneoutLSTM': lambda: L.StatefulZoneoutLSTM(5, 6),
    'ChildSumTreeLSTM': lambda: L.ChildSumTreeLSTM(5, 6),
    'NaryTreeLSTM': lambda: L.NaryTreeLSTM(5, 6, n_ary=2)}


class Steps(chainer.Chain):
    """Three steps of a recurrent link."""

    def __init__(self, rnn):
        super().__init__()
        with self.init_scope():
            self.rnn = rnn

    def forward(self, xs):
        rnn, state = self.rnn, np.zeros((2, 6), 'f')
        if hasattr(rnn, 'reset_state'):
            rnn.reset_state()
        c = h = state
        for x in xs:
            if 'Tree' in type(rnn).__name__:
                c, h = rnn(c, c, h, h, x)
            elif isinstance(rnn, L.StatelessLSTM):
                c, h = rnn(c, h, x)
            elif isinstance(rnn, (L.StatelessGRU, L.StatelessMGU)):
                h = rnn(h, x)
            else:
                h = rnn(x)
        return h


@pytest.mark.parametrize('name', RECURRENT)
def test_the_inner_links_of_recurrent_ones(name):
    model = Steps(RECURRENT[name]())
    xs = np.random.normal(size=(3, 2, 5)).astype('f')
    plain = model.copy('copy')
    model.add_hook(ChainSpectralNormalization(n_warmup=2000))
    matrices = [x for x in plain.params() if x.ndim == 2]
    assert len(matrices) >= 2
    assert sum(hasattr(link, 'W_u') for link in model.links()) == (
        len(matrices))
    for x in matrices:
        x.array[...] /= np.linalg.svd(x.array.astype('d'))[1][0]
    with chainer.using_config('train', False):  # zoneout is random
        np.testing.assert_allclose(
            model(xs).array, plain(xs).array, rtol=1e-4, atol=1e-5)
    assert {row.status for row in summary(
        model, lambda model: model(xs)).rows if len(row.shape) == 2} == {
            'normalized'}


def test_a_lazy_recurrent_link():
    model = Steps(L.LSTM(None, 6))
    model.add_hook(ChainSpectralNormalization())
    model(np.ones((3, 2, 5), 'f'))
    assert model.rnn.upward.W_u.shape == model.rnn.lateral.W_u.shape == (24,)


def test_a_recurrent_link_normalizes_once_a_sequence():
    model = Steps(L.LSTM(5, 6))
    model.add_hook(ChainSpectralNormalization())
    h = model(np.ones((3, 2, 5), 'f'))
    nodes, todo = set(), [h.creator_node]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [x.creator_node for x in node.inputs]
    assert sum(type(node).__name__ == 'SpectralNormalize'
               for node in nodes) == 1


class TestHookOfAChain:

    @pytest.mark.parametrize('use_gamma', [False, True])
    @pytest.mark.parametrize('detach_uv', [False, True])
    def test_same_numbers_as_a_hook_on_each_link(self, detach_uv, use_gamma):
        """Through training and test, also of what is not called."""
        models = [hooked(kind, detach_uv=detach_uv, use_gamma=use_gamma)
                  for kind in ('link', 'chain')]
        losses = []
        for model in models:
            np.random.seed(1)
            optimizer = optimizers.MomentumSGD(0.05).setup(model)
            losses.append(train(model, optimizer, 6, in_test_mode=3))
        np.testing.assert_allclose(*losses, rtol=1e-5)
        assert_same_state(*models, rtol=1e-5)

    def test_one_node(self):
        model = hooked('chain')
        model(images())  # from now on nothing is lazy
        hook = chainer.function_hooks.TimerHook()
        with hook:
            model(images())
        names = [name for name, _ in hook.call_history]
        assert names.count('SpectralNormalize') == 1

    def test_a_link_called_twice_is_normalized_once(self):
        model = hooked('chain', n_calls=2, n_warmup=0)
        model(images())
        expected = model.same.W_u.copy()
        model(images())
        W, u = model.same.W.array, expected
        u = W @ (W.T @ u)
        np.testing.assert_allclose(
            model.same.W_u, u / np.linalg.norm(u), rtol=1e-4, atol=1e-6)

    def test_snapshots(self, tmp_path):
        a, b = hooked('chain', use_gamma=True), hooked('link', use_gamma=True)
        for source, target in ((a, b), (b, a)):
            source(images())
            serializers.save_npz(tmp_path / 'model.npz', source)
            serializers.load_npz(tmp_path / 'model.npz', target)
            assert_same_state(target, source)

    def test_a_link_called_by_itself(self):
        model = hooked('chain')
        x = np.eye(16, dtype='f')
        y = model.same(x).array - model.same.b.array
        assert np.linalg.norm(y, 2) == pytest.approx(1, rel=0.05)

    def test_all_norms_are_one(self):
        assert norms(hooked('chain')) == pytest.approx([1] * 4, rel=0.02)

    @pytest.mark.parametrize('kind', ['sequential', 'chain list', 'link'])
    def test_other_chains(self, kind):
        if kind == 'link':
            model = L.Linear(3, 3)
        else:
            links = [L.Linear(3, 3), chainer.Sequential(L.Linear(3, 3))]
            model = (chainer.Sequential if kind == 'sequential'
                     else chainer.ChainList)(*links)
        model.add_hook(ChainSpectralNormalization())
        hooks = [link.local_link_hooks.get('SpectralNormalization')
                 for link in model.links() if isinstance(link, L.Linear)]
        assert all(hooks)
        if kind != 'chain list':
            assert model(np.ones((2, 3), 'f')).shape == (2, 3)

    def test_recurrent_links(self):
        model = chainer.Sequential(L.LSTM(3, 4)).add_hook(
            ChainSpectralNormalization())
        assert hasattr(model[0].upward, 'W_u')
        assert hasattr(model[0].lateral, 'W_u')
        for _ in range(2):
            model(np.ones((2, 3), 'f'))
        assert isinstance(model[0].lateral.W, chainer.Parameter)

    @pytest.mark.parametrize('make', [
        copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.copy('copy'), lambda model: model.copy('init'),
        lambda model: model.repeat(1)[0]])
    def test_copies_are_independent(self, make):
        model = hooked('chain', use_gamma=True)
        model(images())
        other = make(model)
        before = state_of(model)
        for _ in range(2):
            other(images())
        after = state_of(model)
        for key, value in before.items():
            np.testing.assert_array_equal(after[key], value)
        other.delete_hook('ChainSpectralNormalization')
        assert not any(hasattr(link, 'W_u') for link in other.links())
        assert not other.same.local_link_hooks
        model(images())

    def test_forget(self):
        x = chainer.Variable(images())
        grads = []
        for forget in (lambda f, x: f(x), CF.forget):
            model = hooked('chain', n_calls=2, n_warmup=0)
            model(images())
            model.cleargrads()
            (forget(model, x) + 2 * forget(model, 2 * x)).backward()
            grads.append(grads_of(model))
        for a, b in zip(*grads):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)

    def test_forward_raises(self):
        model = hooked('chain')
        model(images())
        before = [link.W for link in model.children()]
        for bad in (np.ones((2, 5, 2, 2), 'f'), images()[0]):
            with pytest.raises(chainer.utils.type_check.InvalidType):
                model(bad)
            assert _scope.covering(model.same) is None
            assert 'forward' not in model.__dict__
            assert all(link.W is W
                       for link, W in zip(model.children(), before))
        assert norms(model) == pytest.approx([1] * 4, rel=0.02)

    def test_another_hook_raises(self):
        class Bad(chainer.LinkHook):
            name = 'Bad'

            def forward_preprocess(self, args):
                raise KeyboardInterrupt

        model = hooked('chain')
        model.add_hook(Bad())
        with pytest.raises(KeyboardInterrupt):
            model(images())
        assert _scope.covering(model) is None
        assert 'forward' not in model.__dict__

    def test_injected_call(self):
        class Twice:
            def __call__(self, x):
                assert _scope.covering(self) is not None
                return self.forward(x) + self.forward(x)

        class TwiceModel(Model, Twice):
            pass

        model = TwiceModel()
        model.add_hook(ChainSpectralNormalization())
        model(images())
        assert _scope.covering(model) is None
        with pytest.raises(chainer.utils.type_check.InvalidType):
            model(np.ones((2, 5, 2, 2), 'f'))
        assert _scope.covering(model) is None

    def test_the_outermost_chain_counts(self):
        inner = hooked('chain', n_warmup=0)
        outer = chainer.Sequential(L.Convolution2D(2, 2, 1), inner)
        outer.add_hook(ChainSpectralNormalization(n_warmup=0))
        hook = inner.same.local_link_hooks['SpectralNormalization']
        assert hook is inner.local_link_hooks[
            'ChainSpectralNormalization'].hook
        outer(images())
        timer = chainer.function_hooks.TimerHook()
        with timer:
            outer(images())
        assert [name for name, _ in timer.call_history].count(
            'SpectralNormalize') == 1
        outer.delete_hook('ChainSpectralNormalization')
        assert not hasattr(outer[0], 'W_u')
        assert hasattr(inner.same, 'W_u')

    def test_a_link_with_two_paths(self):
        link = L.Linear(4, 4)
        model = chainer.Sequential(link, CF.relu, link)
        model.add_hook(ChainSpectralNormalization())
        model(np.ones((1, 4), 'f'))
        model.delete_hook('ChainSpectralNormalization')
        assert not hasattr(link, 'W_u')

    def test_filter(self):
        seen = []

        def select(path, link):
            seen.append((path, link))
            return isinstance(link, L.Linear) and path != '/out'

        model = Model()
        model.add_hook(ChainSpectralNormalization(filter=select, eps=0.1))
        assert [path for path, _ in seen] == [
            '/conv', '/out', '/same', '/unused', '/up']
        assert [link.name for link in model.children()
                if hasattr(link, 'W_u')] == ['same']
        assert model.same.local_link_hooks['SpectralNormalization'].eps == 0.1

    @pytest.mark.parametrize(('filter', 'expected'), [
        ('/same', 'same'), ('/u*', 'unused up'), ('*', 'conv out same unused '
                                                       'up'),
        (L.Linear, 'out same'),
        ([L.Deconvolution2D, '/s*'], 'same up'),
        ((L.EmbedID, lambda path, link: path == '/out'),
         'out unused')])
    def test_kinds_of_filters(self, filter, expected):
        model = Model()
        model.add_hook(ChainSpectralNormalization(filter))
        assert ' '.join(sorted(
            link.name for link in model.children()
            if hasattr(link, 'W_u'))) == expected

    def test_a_pattern_goes_through_chains(self):
        model = chainer.Sequential(Model(), Model())
        model.add_hook(ChainSpectralNormalization(['/0/out', '*/same']))
        assert sorted(path for path, link in model.namedlinks()
                      if hasattr(link, 'W_u')) == [
            '/0/out', '/0/same', '/1/same']
        pickle.loads(pickle.dumps(model))

    @pytest.mark.parametrize(('filter', 'exclude', 'expected'), [
        (None, '/u*', 'conv out same'),
        (L.Linear, '/same', 'out'),
        (['/s*', '/u*'], [L.EmbedID, '/same'], 'up'),
        (None, lambda path, link: path != '/out', 'out')])
    def test_exclude(self, filter, exclude, expected):
        model = Model()
        model.add_hook(ChainSpectralNormalization(filter, exclude=exclude))
        assert ' '.join(sorted(
            link.name for link in model.children()
            if hasattr(link, 'W_u'))) == expected
        assert [row.path[1:-2] for row in summary(model).rows
                if row.status == 'normalized'] == expected.split()
        assert {row.status for row in summary(model).rows} == {
            'normalized', 'filtered out', 'no matrix'}

    def test_exclude_a_link_that_has_a_hook(self):
        model = Model()
        model.out.add_hook(SpectralNormalization())
        model.add_hook(ChainSpectralNormalization(exclude='/out'))
        assert sum(hasattr(link, 'W_u') for link in model.children()) == 5

    def test_exclude_an_n_step_link(self):
        model = chainer.ChainList(
            L.NStepGRU(1, 2, 3, 0.), L.NStepGRU(1, 2, 3, 0.))
        model.add_hook(ChainSpectralNormalization(
            L.NStepGRU, exclude='/1'))
        assert hasattr(model[0][0], 'w0_u')
        assert not hasattr(model[1][0], 'w0_u')

    @pytest.mark.parametrize('exclude', [3, [None]])
    def test_not_an_exclude(self, exclude):
        with pytest.raises(errors.FilterError, match='pattern'):
            ChainSpectralNormalization(exclude=exclude)

    @pytest.mark.parametrize(('filter', 'exclude', 'error', 'match'), [
        (None, '/sam', errors.NothingExcludedError, "mean '/same'"),
        (L.Linear, L.Linear, errors.NoLinkError,
         'but those that exclude=.*Linear.* leaves out'),
        (None, '*', errors.NoLinkError, 'Exclude less')])
    def test_exclude_nothing_or_all(self, filter, exclude, error, match):
        model = Model()
        with pytest.raises(error, match=match):
            model.add_hook(ChainSpectralNormalization(filter, exclude=exclude))
        assert not model.local_link_hooks
        assert not any(hasattr(link, 'W_u') for link in model.children())

    def test_an_excluded_link_is_gone(self):
        """The summary tells of those that there are."""
        model = Model()
        model.add_hook(ChainSpectralNormalization(exclude='/out'))
        del model.out
        assert 'filtered out' not in str(summary(model))

    @pytest.mark.parametrize('filter', [3, [None], ['/a', 3]])
    def test_not_a_filter(self, filter):
        with pytest.raises(errors.FilterError, match='pattern'):
            ChainSpectralNormalization(filter)

    @pytest.mark.parametrize(('filter', 'match'), [
        ('0', r"filter '0' takes none of its links, which are /0, /1, /2, /3, "
              r"/4, /5, /6, /7 and 2 more\. .* did you mean '/0'\?"),
        (['/x', '1*'], r"takes none of .* did you mean '/1\*'\?"),
        ('/x', r"'/x' takes none of its links.* /7 and 2 more\. Give"),
        (L.EmbedID, r'EmbedID.* takes none of its links, which are /0, '),
        ([], r'takes none of')])
    def test_nothing_passes_the_filter(self, filter, match):
        model = chainer.ChainList(*(L.Linear(2, 2) for _ in range(10)))
        with pytest.raises(errors.NoLinkError, match=match):
            model.add_hook(ChainSpectralNormalization(filter))
        assert not model.local_link_hooks
        assert not any(hasattr(link, 'W_u') for link in model)

    def test_links_keep_the_hook_they_have(self):
        model = Model()
        own = SpectralNormalization(n_power_iteration=3)
        model.same.add_hook(own)
        hook = ChainSpectralNormalization()
        model.add_hook(hook)
        assert model.same.local_link_hooks['SpectralNormalization'] is own
        assert model.out.local_link_hooks['SpectralNormalization'] is hook.hook
        model(images())
        model.delete_hook(hook.name)
        assert model.same.local_link_hooks['SpectralNormalization'] is own
        assert not hasattr(model.out, 'W_u')

    def test_nothing_is_added_where_one_cannot_be(self):
        model = Model()
        model.unused.add_hook(link_hooks.SpectralNormalization())
        before = [dict(link.local_link_hooks) for link in model.links()]
        with pytest.raises(KeyError, match='already exists'):
            model.add_hook(ChainSpectralNormalization())
        assert [dict(link.local_link_hooks)
                for link in model.links()] == before
        assert not hasattr(model.same, 'W_u')

    def test_no_link(self):
        model = Model()
        with pytest.raises(
                errors.NoLinkError,
                match=r'has a V: / \(Model\), /conv \(Convolution2D\).*'
                      r'namedlinks\(\) has all paths'):
            model.add_hook(ChainSpectralNormalization(weight_name='V'))
        assert not model.local_link_hooks

    def test_all_links_have_a_hook(self):
        model = hooked('link')
        with pytest.raises(
                errors.NoLinkError, match='have a hook already: /conv, /out'):
            model.add_hook(ChainSpectralNormalization())
        assert not model.local_link_hooks
        model(images())

    def test_refused_under_another_name(self):
        model = Model()
        with pytest.raises(errors.NoLinkError):
            model.add_hook(ChainSpectralNormalization('/x'), 'other')
        assert not model.local_link_hooks

    def test_is_no_context_manager(self):
        with pytest.raises(
                NotImplementedError, match='add_hook'
        ), ChainSpectralNormalization():
            pass

    def test_bad_settings(self):
        with pytest.raises(errors.EpsError):
            ChainSpectralNormalization(eps=-1)
        with pytest.raises(TypeError, match='epsilon'):
            ChainSpectralNormalization(epsilon=1)

    def test_settings_are_those_of_the_hook_of_a_link(self):
        of_link, of_chain = [
            dict(inspect.signature(hook).parameters) for hook in (
                SpectralNormalization, ChainSpectralNormalization)]
        for name in 'filter', 'name', 'exclude':
            of_link.pop(name, None)
            of_chain.pop(name)
        assert list(of_chain) == list(of_link)
        for name, parameter in of_link.items():
            assert of_chain[name] == parameter.replace(
                kind=inspect.Parameter.KEYWORD_ONLY)

    def test_settings_reach_the_hook(self):
        given = {
            'n_power_iteration': 2, 'eps': 1e-3, 'factor': 1.5,
            'weight_name': 'V', 'detach_uv': True, 'n_warmup': 3,
            'n_vectors': 2, 'rtol': 0.1, 'max_iterations': 7,
            'update_u': 'always'}
        for settings in (given, {'use_gamma': True}, {'cap': 2.0},
                         {'groups': 'each'}, {'axis': 1},
                         {'norm': 'operator', 'insize': 8}):
            hook = ChainSpectralNormalization(**settings).hook
            expected = SpectralNormalization(**settings)
            assert {**vars(hook), 'key': 0} == {**vars(expected), 'key': 0}


class Own(L.Linear):
    """A link from before Chainer 5."""

    def __call__(self, x):
        return CF.linear(x, self.W)


class OwnModel(Model):
    """A chain from before Chainer 5."""

    def __call__(self, x):
        return Model.forward(self, x)


class TestOwnCall:
    """Chainer calls no hook of a link whose class has a ``__call__``."""

    def model(self):
        return chainer.Chain(
            a=L.Linear(3, 4), b=Own(4, 3), c=chainer.Sequential(Own(3, 2)))

    @pytest.mark.parametrize(('filter', 'paths'), [
        (None, ['/b', '/c/0']), (L.Linear, ['/b', '/c/0']),
        (['/a', '/c/*'], ['/c/0'])])
    def test_links_are_refused_by_their_paths(self, filter, paths):
        model = self.model()
        where = ', '.join(rf'{path} \(Own\.__call__\)' for path in paths)
        with pytest.raises(
                errors.HookBypassedError,
                match=f'calls the hooks: {where}. Rename.*filter'):
            model.add_hook(ChainSpectralNormalization(filter, use_gamma=True))
        assert not any(link.local_link_hooks for link in model.links())
        assert sorted(path for path, _ in model.namedparams()) == sorted(
            path for path, _ in self.model().namedparams())

    def test_links_are_left_out_by_the_filter(self):
        model = self.model()
        model.add_hook(ChainSpectralNormalization(
            lambda path, link: not isinstance(link, Own), n_warmup=100))
        assert [path for path, link in model.namedlinks()
                if hasattr(link, 'W_u')] == ['/a']
        y = model.a(np.eye(3, dtype='f')).array
        assert np.linalg.norm(y, 2) == pytest.approx(1, abs=1e-4)

    def test_a_chain_warns_and_its_links_are_normalized(self):
        model = OwnModel(n_calls=2)
        with pytest.warns(
                errors.SpectralNormalizationWarning,
                match=r'Rename OwnModel\.__call__ to forward.*'
                      r'with sn_function\.cached') as record:
            model.add_hook(ChainSpectralNormalization(n_warmup=100))
        assert [w.filename for w in record] == [__file__]
        model(images())
        np.testing.assert_allclose(norms(model), 1, atol=1e-4)

    def test_the_remedies_for_a_chain(self):
        """Both share what it says is not shared."""
        timer = chainer.function_hooks.TimerHook()

        def n_nodes(model, scope=None):
            timer.call_history.clear()
            with timer, scope or contextlib.nullcontext():
                model(images())
            return [name for name, _ in timer.call_history].count(
                'SpectralNormalize')

        model = OwnModel(n_calls=2)
        with pytest.warns(errors.ChainCallWarning):
            model.add_hook(ChainSpectralNormalization())
        model(images())
        assert n_nodes(model) == 5  # 4 links, one of them called twice
        assert n_nodes(model, cached(model)) == 1
        model = hooked('chain', n_calls=2)
        model(images())
        assert n_nodes(model) == 1

    def test_in_a_chain_that_calls_its_hook(self):
        """There is nothing to warn of."""
        model = chainer.Sequential(OwnModel(n_calls=2))
        model.add_hook(ChainSpectralNormalization())
        model(images())

    def test_as_an_error_the_warning_changes_nothing(self):
        model = OwnModel()
        with pytest.raises(errors.ChainCallWarning):
            model.add_hook(ChainSpectralNormalization())
        assert not any(link.local_link_hooks for link in model.links())
        assert not hasattr(model.same, 'W_u')


class TestGammaAfterSetup:

    def test_it_warns_once_with_the_paths(self):
        model = Model()
        optimizer = optimizers.SGD(.1).setup(model)
        with pytest.warns(
                errors.UntrainedGammaWarning,
                match=r'of /conv, /out, .*Call optimizer\.setup') as record:
            model.add_hook(ChainSpectralNormalization(use_gamma=True))
        assert [w.filename for w in record] == [__file__]
        assert model.same.gamma.update_rule is None
        optimizer.setup(model)
        assert model.same.gamma.update_rule is not None

    def test_it_does_not_warn_otherwise(self):
        model = hooked('chain', use_gamma=True)
        optimizers.SGD(.1).setup(model)
        model = Model()
        optimizers.SGD(.1).setup(model)
        model.add_hook(ChainSpectralNormalization())


def all_but_out(path, link):
    return path != '/out'


@pytest.mark.parametrize(('args', 'settings', 'text'), [
    ((), {}, ''), (('/conv*',), {}, "'/conv*', "),
    ((['/conv*', L.Linear],), {}, "['/conv*', Linear], "),
    ((all_but_out,), {}, 'all_but_out, ')])
def test_the_text_of_a_hook(args, settings, text):
    hook = ChainSpectralNormalization(*args, **settings)
    assert repr(hook) == (
        f'ChainSpectralNormalization({text}n_power_iteration=1)')


def test_the_text_of_the_settings():
    hook = ChainSpectralNormalization(name='mine', cap=2., n_power_iteration=2)
    assert repr(hook) == (
        "ChainSpectralNormalization(n_power_iteration=2, cap=2.0, "
        "name='mine')")
    assert repr(hook.hook) == (
        'SpectralNormalization(n_power_iteration=2, cap=2.0)')
    assert repr(
        ChainSpectralNormalization('/a*', exclude=[L.EmbedID, '/ab'])) == (
        "ChainSpectralNormalization('/a*', n_power_iteration=1, "
        "exclude=[EmbedID, '/ab'])")
    model = Model()
    before = str(model)
    assert str(model.add_hook(hook)) == before


def ready(n_calls=1, **settings):
    """A model that is initialized, at an unconverged u."""
    model = hooked('link', n_calls, n_warmup=0, **settings)
    model(images())
    model.cleargrads()
    return model


class TestCached:

    @pytest.mark.parametrize('make', [
        lambda: [Model()],
        lambda: [Model(), L.Linear(2, 2)],
        lambda: [L.Linear(2, 2).add_hook(link_hooks.SpectralNormalization())]])
    def test_it_warns_where_nothing_is_shared(self, make):
        models = make()
        with pytest.warns(
                errors.SpectralNormalizationWarning,
                match=rf'no link of {type(models[0]).__name__}.*Add the hook'
        ) as record, cached(*models):
            assert _scope.covering(models[0]) is not None
        assert [w.filename for w in record] == [__file__]

    def test_one_hook_in_all_models_is_enough(self):
        with cached(Model(), Model(), hooked('link')):
            pass

    @pytest.mark.parametrize('kind', ['link', 'chain'])
    def test_one_normalization_for_all_calls(self, kind):
        model = hooked(kind, n_calls=2, n_warmup=0)
        model(images())
        timer = chainer.function_hooks.TimerHook()
        with timer, cached(model):
            for _ in range(3):
                model(images())
        assert [name for name, _ in timer.call_history].count(
            'SpectralNormalize') == 1

    def test_gradients_of_all_calls_meet(self):
        """They are those of calls that all start from the same u."""
        grads = []
        for share in (True, False):
            model = ready()
            us = {link: link.W_u.copy() for link in model.children()
                  if link.W_u is not None}
            losses = []
            if share:
                with cached(model):
                    for i in range(3):
                        losses.append((i + 1) * model(images(seed=i)))
            else:
                for i in range(3):
                    for link, u in us.items():
                        link.W_u[...] = u
                    losses.append((i + 1) * model(images(seed=i)))
            CF.add(*losses).backward()
            grads.append(grads_of(model) + us_of(model))
        for a, b in zip(*grads):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

    def test_several_backwards(self):
        model = ready()
        with cached(model):
            a, b = model(images(seed=1)), model(images(seed=2))
        a.backward()
        b.backward()
        twice = [g.copy() for g in grads_of(model)]
        model.cleargrads()
        (a + b).backward()
        for x, g in zip(twice, grads_of(model)):
            np.testing.assert_allclose(x, g, rtol=1e-4, atol=1e-7)

    def test_what_is_not_called_is_left_alone(self):
        model = ready()
        before = model.unused.W_u.copy()
        with cached(model):
            model(images())
        np.testing.assert_array_equal(model.unused.W_u, before)

    @pytest.mark.parametrize('order', [
        (False, True), (True, False), (False, False)])
    def test_test_mode(self, order):
        """All calls use one weight; a call in training mode moves u on."""
        model, other = ready(), ready()
        before = model.same.W_u.copy()
        found = []
        with cached(model):
            for train in order:
                with chainer.using_config('train', train):
                    found.append(model(images()).array)
        assert found[0] == found[1]
        if any(order):
            other(images())
            np.testing.assert_array_equal(model.same.W_u, other.same.W_u)
        else:
            np.testing.assert_array_equal(model.same.W_u, before)

    def test_first_without_a_graph(self):
        model, other = ready(), ready()
        with cached(model):
            with chainer.no_backprop_mode():
                first = model(images())
            loss = model(images())
        assert first.array == loss.array
        loss.backward()
        other(images()).backward()
        for g, expected in zip(grads_of(model), grads_of(other)):
            np.testing.assert_allclose(g, expected, rtol=1e-5, atol=1e-8)
        assert_same_state(model, other)

    def test_without_a_graph_after_one(self):
        model = ready()
        with cached(model):
            Y = model.same.local_link_hooks[
                'SpectralNormalization'].normalize_weight(model.same)
            with chainer.no_backprop_mode():
                assert model.same.local_link_hooks[
                    'SpectralNormalization'].normalize_weight(model.same) is Y

    def test_an_optimizer_updates_a_weight(self):
        """The next call normalizes anew, and from the new u."""
        models = [ready(use_gamma=True), ready(use_gamma=True)]
        found = []
        for scope, model in zip((cached, contextlib.nullcontext), models):
            optimizer = optimizers.SGD(0.1).setup(model)
            with scope(model):
                found.append(train(model, optimizer, 4))
        np.testing.assert_allclose(*found, rtol=1e-5)
        assert_same_state(*models, rtol=1e-5)

    def test_only_gamma_is_updated(self):
        model = ready(use_gamma=True)
        optimizer = optimizers.SGD(0.1).setup(model)
        with cached(model):
            before = model(images())
            model.cleargrads()
            before.backward()
            for link in model.children():
                link.W.cleargrad()
            optimizer.update()
            after = model(images())
        assert before.array != after.array

    def test_an_array_is_replaced(self):
        model = L.Linear(3, 4).add_hook(SpectralNormalization(n_warmup=0))
        other = copy.deepcopy(model)
        W = np.arange(12, dtype='f').reshape(4, 3)
        x = np.eye(3, dtype='f')
        with cached(model):
            found = [model(x).array]
            model.W.array = W
            found += [model(x).array, model(x).array]
        expected = [other(x).array]
        other.W.array = W
        expected += [other(x).array] * 2
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(model.W_u, other.W_u)

    def test_lazy_links(self):
        model = hooked('link')
        with cached(model):
            a, b = model(images()), model(images())
        assert a.array == b.array

    def test_nested(self):
        model = ready(n_calls=2)
        inner = chainer.Sequential(model.same)
        with cached(model):
            a = model.same(np.ones((1, 16), 'f'))
            with cached(inner), cached(model):
                b = inner(np.ones((1, 16), 'f'))
            c = model.same(np.ones((1, 16), 'f'))
        assert all(np.array_equal(a.array, x.array) for x in (b, c))
        assert _scope.covering(model) is None

    def test_an_exception_ends_it(self):
        model = ready()
        with pytest.raises(chainer.utils.type_check.InvalidType), cached(
                model):
            model(images()[0])
        assert _scope.covering(model) is None
        before = model.same.W_u.copy()
        model(images())
        assert not np.array_equal(model.same.W_u, before)

    def test_forward_raises_within(self):
        model = ready()
        with cached(model):
            a = model(images())
            with pytest.raises(chainer.utils.type_check.InvalidType):
                model(np.ones((2, 5, 2, 2), 'f'))
            assert isinstance(model.up.W, chainer.Parameter)
            b = model(images())
        assert a.array == b.array

    @pytest.mark.parametrize('backward_within', [True, False])
    @pytest.mark.parametrize('use_gamma', [False, True])
    def test_forget(self, use_gamma, backward_within):
        x = chainer.Variable(images())
        found = []
        for forget in (lambda f, x: f(x), CF.forget):
            model = ready(use_gamma=use_gamma)
            with cached(model):
                loss = forget(model, x) + 2 * forget(model, 2 * x)
                if backward_within:
                    loss.backward()
            if not backward_within:
                model(images(seed=7))  # u moves on
                loss.backward()
            found.append(grads_of(model) + us_of(model))
        for a, b in zip(*found):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

    def test_a_poisoned_u(self):
        """Each link is told of by itself, and the others go on."""
        model, other = ready(), ready()
        model.same.W_u[...] = np.nan
        model.up.W_u[...] = 0
        with pytest.warns(UserWarning, match='made anew') as record, cached(
                model):
            model(images())
        assert len(record) == 2
        other(images())
        np.testing.assert_allclose(
            model.conv.W_u, other.conv.W_u, rtol=1e-6)
        for link in model.children():
            assert np.isfinite(link.W_u).all()

    def test_unchain_backward(self):
        """Of what one call has made; others share the normalized weights."""
        found = []
        for scope in (cached, contextlib.nullcontext):
            gen = L.Linear(2, 3).add_hook(SpectralNormalization())
            dis = L.Linear(3, 1).add_hook(SpectralNormalization())
            gen.W.array[...] = np.arange(6).reshape(3, 2)
            dis.W.array[...] = np.arange(3)
            gen.cleargrads()
            dis.cleargrads()
            with scope(gen, dis) if scope is cached else scope():
                fake = gen(np.ones((1, 2), 'f'))
                score = dis(fake)
                fake.unchain_backward()
                CF.sum(score).backward()
                assert gen.W.grad is None
                assert fake.creator is None
            found.append(dis.W.grad)
        assert np.abs(found[0]).max() > 0
        np.testing.assert_allclose(*found, rtol=0.1)  # u starts anywhere

    def test_truncated_backpropagation(self):
        layer = L.Linear(3, 3).add_hook(SpectralNormalization())
        h = np.ones((1, 3), 'f')
        sizes = []
        with cached(layer):
            for _ in range(3):
                h = CF.tanh(layer(h))
                loss = CF.sum(h * h)
                layer.cleargrads()
                loss.backward()
                loss.unchain_backward()
                sizes.append(abs(layer.W.grad).max())
        assert min(sizes) > 0

    def test_u_is_taken_away(self):
        model = ready()
        x = np.ones((1, 16), 'f')
        with cached(model):
            with chainer.using_config('train', False):
                model.same(x)
            model.same.W_u = None
            model.same(x)
        assert np.isfinite(model.same.W_u).all()

    def test_another_hook_within(self):
        model = ready()
        x = np.ones((1, 16), 'f')
        with cached(model):
            before = model.same(x).array
            model.same.delete_hook('SpectralNormalization')
            model.same.add_hook(SpectralNormalization(factor=3))
            after = model.same(x).array
        b = model.same.b.array
        assert np.linalg.norm(after - b) > 1.5 * np.linalg.norm(before - b)

    def test_a_weight_of_another_shape(self):
        model = ready()
        x = np.ones((1, 16), 'f')
        model.out.W.array = np.ones((2, 16), 'f')
        model.out.b.array = np.zeros(2, 'f')
        with cached(model), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            model.same(x)
            y = model.out(x)
        warning, = caught
        assert "Linear 'out': W_u belonged to" in str(warning.message)
        np.testing.assert_allclose(
            y.array, [[16 / np.sqrt(32)] * 2], rtol=1e-5)

    def test_a_weight_with_nan(self):
        model = ready()
        before = model.same.W_u.copy()
        good = model.same.W.array.copy()
        model.same.W.array[0, 0] = np.nan
        with cached(model):
            assert np.isnan(model(images()).array)
            model.same.W.array = good
            assert np.isfinite(model(images()).array)
        assert not np.array_equal(model.same.W_u, before)

    def test_another_hook_first(self):
        """What it makes is another weight at each call."""
        model = L.Linear(3, 4)
        model.add_hook(link_hooks.WeightStandardization())
        model.add_hook(SpectralNormalization())
        x = np.eye(3, dtype='f')
        expected = model(x).array
        with cached(model):
            for _ in range(2):
                np.testing.assert_allclose(
                    model(x).array, expected, rtol=0.1, atol=1e-6)

    def test_threads(self):
        """A scope is one of its thread."""
        model = ready()
        found = []
        with cached(model):
            thread = threading.Thread(
                target=lambda: found.append(_scope.covering(model)))
            thread.start()
            thread.join()
            assert _scope.covering(model) is not None
        assert found == [None]

    def test_nothing_is_kept_after_it(self):
        model = ready()
        with cached(model):
            hook = model.same.local_link_hooks['SpectralNormalization']
            Y = weakref.ref(hook.normalize_weight(model.same))
            gc.collect()
            assert Y() is not None
        gc.collect()
        assert Y() is None

    def test_links_that_are_not_in_it(self):
        model, other = ready(), ready()
        with cached(model):
            assert _scope.covering(other.same) is None

    def test_several_models(self):
        a, b = ready(), ready()
        timer = chainer.function_hooks.TimerHook()
        with timer, cached(a, b):
            for _ in range(2):
                a(images())
                b(images())
        assert [name for name, _ in timer.call_history].count(
            'SpectralNormalize') == 1
