"""N-step RNNs: the hook is on the link, its state on the layers."""
import copy
import io
import pickle

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import serializers

from sn_function import (
    ChainSpectralNormalization,
    SpectralNormalization,
    bake,
    cached,
    errors,
    extensions,
    link_hooks,
    snapshot,
)
from tests import reference

KINDS = [
    L.NStepLSTM, L.NStepBiLSTM, L.NStepGRU, L.NStepBiGRU, L.NStepRNNTanh,
    L.NStepBiRNNTanh, L.NStepRNNReLU, L.NStepBiRNNReLU]
FUNCTIONS = dict(zip(KINDS, [
    F.n_step_lstm, F.n_step_bilstm, F.n_step_gru, F.n_step_bigru,
    F.n_step_rnn, F.n_step_birnn, F.n_step_rnn, F.n_step_birnn]))
N_LAYERS, N_IN, N_OUT = 2, 3, 4


@pytest.fixture(autouse=True)
def _seed():
    np.random.seed(0)


def make(kind=L.NStepLSTM, dtype='f', **settings):
    with chainer.using_config('dtype', dtype):
        link = kind(N_LAYERS, N_IN, N_OUT, 0.)
    for x in link.params():  # norms far from 1, and easy to find
        x.array[...] = np.random.normal(size=x.shape) * .3
        if x.ndim == 2:
            a, b = np.random.normal(size=x.shape[0]), np.ones(x.shape[1])
            x.array[...] += np.random.uniform(1, 2) * np.outer(a, b)
    return link.add_hook(SpectralNormalization(**settings))


def sequences(dtype='f', lengths=(4, 2)):
    random = np.random.RandomState(1)
    return [random.normal(size=(n, N_IN)).astype(dtype) for n in lengths]


def outputs(link, xs=None):
    """All that a call returns, in a row."""
    xs = sequences(link[0].w0.dtype) if xs is None else xs
    states = [None] * (1 + isinstance(link, (L.NStepLSTM, L.NStepBiLSTM)))
    *states, ys = link(*states, xs)
    return F.concat([F.flatten(x) for x in [*states, *ys]], axis=0)


def outputs_in_test_mode(link):
    with chainer.using_config('train', False):
        return outputs(link).array


def expected_outputs(link, weights):
    """By Chainer's function, with these weights (dictionaries, by layers)."""
    kind = type(link)
    ws = [[chainer.as_variable(weights[i][f'w{j}'].astype('d'))
           for j in range(link.n_weights)] for i in range(len(link))]
    bs = [[chainer.as_variable(layer.__dict__[f'b{j}'].array.astype('d'))
           for j in range(link.n_weights)] for layer in link]
    # The longest sequence comes first already.
    xs = F.transpose_sequence(sequences('d'))
    zeros = np.zeros((len(link), 2, N_OUT))
    n_states = 1 + (kind in (L.NStepLSTM, L.NStepBiLSTM))
    kwargs = {'activation': 'relu'} if 'ReLU' in kind.__name__ else {}
    with chainer.using_config('train', False):
        *states, ys = FUNCTIONS[kind](
            N_LAYERS, 0., *[zeros] * n_states, ws, bs, xs, **kwargs)
    ys = F.transpose_sequence(ys)
    return F.concat([F.flatten(x) for x in [*states, *ys]], axis=0)


def names(link):
    return [f'w{j}' for j in range(link.n_weights)]


def raw(link):
    return [{name: layer.__dict__[name].array.copy() for name in names(link)}
            for layer in link]


def attributes(link):
    return set(vars(link)) - {'_local_link_hooks'}  # which may be None


def vectors(link):
    return [{name: layer.__dict__[name + '_u'].copy() for name in names(link)}
            for layer in link]


def assert_weights_are_parameters(link):
    params = {id(x) for x in link.params()}
    assert [[id(x) in params for x in ws] for ws in link.ws] == (
        [[True] * link.n_weights] * len(link))
    for layer, ws in zip(link, link.ws):
        assert all(layer.__dict__[f'w{j}'] is w for j, w in enumerate(ws))


def assert_equal(a, b):
    for x, y in zip(a, b):
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


# Numbers

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('settings', 'scale'), [
    ({}, lambda W, sigma: 1 / sigma),
    ({'factor': 2.}, lambda W, sigma: 2 / sigma),
    ({'use_gamma': True}, lambda W, sigma: 1),
    ({'cap': 3.}, lambda W, sigma: min(1, 3 / sigma))],
    ids=['default', 'factor', 'gamma', 'cap'])
def test_each_matrix_is_divided_by_its_own_norm(kind, settings, scale):
    """As by a float64 SVD."""
    link = make(kind, n_warmup=100, **settings)
    weights = [{name: W * scale(W, reference.true_norm(W))
                for name, W in layer.items()} for layer in raw(link)]
    expected = expected_outputs(link, weights).array
    for is_train in True, False:
        with chainer.using_config('train', is_train):
            np.testing.assert_allclose(
                outputs(link).array, expected, rtol=1e-3, atol=1e-4)
    assert_weights_are_parameters(link)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('detach_uv', [False, True])
def test_gradients(kind, detach_uv):
    """Those of the iteration, as by finite differences of an oracle."""
    link = make(kind, np.float64, n_warmup=0, detach_uv=detach_uv)
    u, W = vectors(link), raw(link)
    uv = [{name: reference.power_iteration(W[i][name], u[i][name])[:2]
           for name in names(link)} for i in range(len(link))]
    y = outputs(link)
    coefficients = np.random.normal(size=y.shape)
    link.cleargrads()
    F.sum(y * coefficients).backward()

    def loss(i, name, x):
        weights = [{
            key: reference.spectral_normalize(
                x if (k, key) == (i, name) else W[k][key], u[k][key],
                uv=uv[k][key] if detach_uv else None)[0]
            for key in names(link)} for k in range(len(link))]
        return (expected_outputs(link, weights).array * coefficients).sum()

    np.testing.assert_allclose(
        (y.array * coefficients).sum(), loss(0, 'w0', W[0]['w0']), rtol=1e-9)
    for i in 0, len(link) - 1:
        for name in 'w0', names(link)[-1]:
            x, h = W[i][name], 1e-5
            for index in (0, 0), (3, 1):
                step = np.zeros_like(x)
                step[index] = h
                expected = (loss(i, name, x + step)
                            - loss(i, name, x - step)) / (2 * h)
                np.testing.assert_allclose(
                    getattr(link[i], name).grad[index], expected,
                    rtol=1e-5, atol=1e-7)


def test_vectors_advance_in_training_mode_only():
    link = make(n_warmup=0)
    W, u = raw(link), vectors(link)
    outputs_in_test_mode(link)
    assert_equal(vectors(link), u)
    outputs(link)
    for i, layer in enumerate(vectors(link)):
        for name, actual in layer.items():
            expected, _, _ = reference.power_iteration(
                W[i][name].astype('d'), u[i][name].astype('d'))
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_two_calls_are_two_iterations_but_one_in_a_scope():
    link = make(n_warmup=0)
    twin, second = copy.deepcopy(link), copy.deepcopy(link)
    outputs(link)
    with cached(twin):
        a, b = outputs(twin), outputs(twin)
    np.testing.assert_array_equal(a.array, b.array)
    assert_equal(vectors(link), vectors(twin))
    for model in second, second, link:
        outputs(model)
    assert_equal(vectors(link), vectors(second))
    assert (link[0].w0_u != twin[0].w0_u).any()


def test_one_node_for_all_weights():
    link = make()
    with chainer.function_hooks.TimerHook() as hook:
        outputs(link)
    nodes = [f for f, _ in hook.call_history if 'Normaliz' in f]
    assert len(nodes) == 1


def test_gammas_are_trained():
    link = make(use_gamma=True)
    assert [name for name in sorted(link[0]._params) if 'gamma' in name] == [
        'gamma', *(f'w{j}_gamma' for j in range(1, 8))]
    np.testing.assert_allclose(
        link[1].w3_gamma.array, reference.true_norm(link[1].w3.array),
        rtol=1e-6)
    optimizer = chainer.optimizers.SGD(.1).setup(link)
    before = [float(link[0].gamma.array), float(link[1].w7_gamma.array)]
    optimizer.update(lambda: F.sum(outputs(link) ** 2))
    after = [float(link[0].gamma.array), float(link[1].w7_gamma.array)]
    assert all(a != b for a, b in zip(before, after))


def test_forget():
    """The second run starts from the vectors of the first one."""
    def gradients(call):
        np.random.seed(0)
        link = make(n_warmup=0)
        xs = [chainer.Variable(x) for x in sequences()]
        y = F.sum(call(lambda *xs: outputs(link, list(xs)), *xs) ** 2)
        outputs(link)  # moves the vectors on, before backward
        link.cleargrads()
        y.backward()
        assert_weights_are_parameters(link)
        return [x.grad for x in link.params()] + [
            u for layer in vectors(link) for u in layer.values()]

    expected = gradients(lambda f, *xs: f(*xs))
    for a, b in zip(gradients(F.forget), expected):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', ['e', 'd'])
def test_dtypes(dtype):
    link = make(dtype=np.dtype(dtype))
    assert outputs(link).dtype == link[0].w0_u.dtype == np.dtype(dtype)


@pytest.mark.gpu
def test_device():
    link = make(use_gamma=True)
    expected = outputs_in_test_mode(link)
    link.to_device('@cupy:0')
    xs = [link.xp.asarray(x) for x in sequences()]
    with chainer.using_config('train', False):
        actual = outputs(link, xs)
    np.testing.assert_allclose(
        chainer.backends.cuda.to_cpu(actual.array), expected, rtol=1e-4,
        atol=1e-5)
    assert type(link[0].w0_u) is type(actual.array)
    assert_weights_are_parameters(link)


# Weights are put back

class Failing(L.NStepGRU):

    def rnn(self, *args):
        self.seen = self.ws
        if self.fails:
            raise ZeroDivisionError
        if self.again:
            self.again = False
            outputs(self)
        return super().rnn(*args)


def test_after_an_exception():
    link = make(Failing)
    link.fails, link.again = True, False
    with pytest.raises(ZeroDivisionError):
        outputs(link)
    assert not any(isinstance(w, chainer.Parameter)
                   for ws in link.seen for w in ws)
    assert_weights_are_parameters(link)
    assert not {'forward', '_sn_replacements'} & set(vars(link))


def test_a_call_within_a_call():
    link = make(Failing, n_warmup=100)
    link.fails = link.again = False
    expected = outputs(link).array
    link.again = True
    np.testing.assert_allclose(
        outputs(link).array, expected, rtol=1e-4, atol=1e-5)
    assert_weights_are_parameters(link)


# Adding and deleting

def test_delete_hook_leaves_nothing():
    link = make(use_gamma=True)
    plain = L.NStepLSTM(N_LAYERS, N_IN, N_OUT, 0.)
    W = raw(link)
    outputs(link)
    link.delete_hook('SpectralNormalization')
    for a, b in zip(link.links(), plain.links()):
        assert attributes(a) == attributes(b)
        assert (a._params, a._persistent) == (b._params, b._persistent)
        assert not a.local_link_hooks
    np.testing.assert_allclose(
        outputs_in_test_mode(link), expected_outputs(link, W).array,
        rtol=1e-3, atol=1e-4)
    link.add_hook(SpectralNormalization())
    assert link[0].w0_u.shape == (N_OUT,)


def test_under_another_name():
    link = L.NStepGRU(1, 3, 4, 0.).add_hook(SpectralNormalization(), name='x')
    assert list(link.local_link_hooks) == ['x']
    link.delete_hook('x')
    assert not link[0].local_link_hooks


def test_a_certain_weight_is_refused():
    link = L.NStepLSTM(1, 3, 4, 0.)
    with pytest.raises(errors.NStepWeightError, match=r"NStepLSTM .* 'w4'"):
        link.add_hook(SpectralNormalization(weight_name='w4'))
    assert not link.local_link_hooks
    assert not link[0].local_link_hooks


def test_a_hook_is_refused_where_a_layer_has_one():
    link = L.NStepLSTM(2, 3, 4, 0.)
    link[1].add_hook(SpectralNormalization(weight_name='w4', name='own'))
    with pytest.raises(errors.HookCollisionError, match='w4_u'):
        link.add_hook(SpectralNormalization())
    assert not link.local_link_hooks
    assert not link[0].local_link_hooks
    assert list(link[1].local_link_hooks) == ['own']
    assert link[0]._persistent == set() != link[1]._persistent
    link[1].delete_hook('own')
    link.add_hook(SpectralNormalization())
    with pytest.raises(errors.HookCollisionError, match='w0_u'):
        link.add_hook(SpectralNormalization(name='second'))
    assert list(link.local_link_hooks) == ['SpectralNormalization']
    assert len(link[0].local_link_hooks) == 8


def test_a_weight_of_its_own():
    """An n-step RNN of a user, with another weight, and a hook for it."""
    class Projected(L.NStepGRU):
        def __init__(self):
            super().__init__(1, N_IN, N_OUT, 0.)
            with self.init_scope():
                self.H = chainer.Parameter(np.eye(N_OUT, dtype='f') * 5)

        def forward(self, *args):
            h, ys = super().forward(*args)
            return h, [F.linear(y, self.H) for y in ys]

    link = Projected()
    expected = link(None, sequences())[1][0].array / 5
    link.add_hook(SpectralNormalization(weight_name='H', name='H'))
    np.testing.assert_allclose(
        link(None, sequences())[1][0].array, expected, rtol=1e-5)
    link.add_hook(SpectralNormalization(use_gamma=True))
    np.testing.assert_allclose(
        link(None, sequences())[1][0].array, expected, rtol=1e-4)
    assert_weights_are_parameters(link)


# Copies and files

@pytest.mark.parametrize('duplicate', [
    copy.deepcopy, lambda link: pickle.loads(pickle.dumps(link)),
    lambda link: link.copy('copy'), lambda link: link.copy('share'),
    lambda link: link.repeat(2, 'copy')[1]],
    ids=['deepcopy', 'pickle', 'copy', 'share', 'repeat'])
def test_copies(duplicate):
    link = make(use_gamma=True)
    outputs(link)
    twin = duplicate(link)
    np.testing.assert_array_equal(
        outputs_in_test_mode(twin), outputs_in_test_mode(link))
    assert_weights_are_parameters(twin)
    link.cleargrads()
    with cached(twin):
        y = outputs(twin)
    twin.cleargrads()
    F.sum(y).backward()
    assert all(x.grad is not None for x in twin.params())
    assert_weights_are_parameters(link)
    assert all(x.grad is None for x in link.params())


def test_copies_with_new_weights():
    link = make(n_warmup=100)
    outputs(link)
    for twin in link.copy('init'), link.repeat(1)[0]:
        for layer in raw(twin):
            assert all((W != V).any() for W, V in zip(
                layer.values(), raw(link)[0].values()) if W.shape == V.shape)
        weights = [{name: W / reference.true_norm(W)
                    for name, W in layer.items()} for layer in raw(twin)]
        np.testing.assert_allclose(
            outputs_in_test_mode(twin),
            expected_outputs(twin, weights).array, rtol=1e-3, atol=1e-4)


def test_snapshots():
    link, other = make(use_gamma=True), make(use_gamma=True)
    outputs(link)
    file = io.BytesIO()
    serializers.save_npz(file, link)
    file.seek(0)
    with np.load(file) as arrays:
        assert arrays['1/w3_u'].shape == (N_OUT,)
    file.seek(0)
    serializers.load_npz(file, other, strict=True)
    np.testing.assert_array_equal(
        outputs_in_test_mode(other), outputs_in_test_mode(link))
    assert_equal(vectors(link), vectors(other))


def test_snapshots_are_read_without_the_model(tmp_path):
    link = make(use_gamma=True)
    serializers.save_npz(str(tmp_path / 'x.npz'), link)
    found = snapshot.inspect(str(tmp_path / 'x.npz'))
    assert len(found) == N_LAYERS * 8
    for weight in found:
        i, name = weight.key.split('/')
        assert weight.sigma == pytest.approx(
            reference.true_norm(raw(link)[int(i)][name]), rel=1e-5)


# What is built on hooks

@pytest.mark.parametrize('in_place', [False, True])
@pytest.mark.parametrize('settings', [
    {}, {'use_gamma': True}, {'factor': 2.}, {'cap': 2.}, {'n_vectors': 2}])
@pytest.mark.parametrize('kind', KINDS[::3])
def test_bake(kind, settings, in_place):
    model = chainer.ChainList(make(kind, **settings))
    outputs(model[0])
    expected = outputs_in_test_mode(model[0])
    baked = bake(model, in_place)
    assert (baked is model) is in_place
    np.testing.assert_array_equal(outputs_in_test_mode(baked[0]), expected)
    assert_weights_are_parameters(baked[0])
    for a, b in zip(baked[0].links(), kind(2, 3, 4, 0.).links()):
        assert attributes(a) == attributes(b)
        assert (a._params, a._persistent) == (b._params, b._persistent)
        assert not a.local_link_hooks
    if not in_place:
        assert_weights_are_parameters(model[0])
        np.testing.assert_array_equal(
            outputs_in_test_mode(model[0]), expected)


def test_bake_within_a_call():
    class Baking(L.NStepGRU):
        def rnn(self, *args):
            bake(self, in_place=True)

    with pytest.raises(errors.WeightInUseError, match=r'Baking /\.ws'):
        outputs(make(Baking))


def test_baking_a_hook_that_never_acts_leaves_one_set_of_weights():
    link = L.NStepGRU(1, N_IN, N_OUT, 0.)
    link[0].add_hook(SpectralNormalization(weight_name='w0'))
    assert_weights_are_parameters(bake(link))


def test_report():
    model = chainer.Chain(rnn=make(L.NStepGRU, n_warmup=100))
    layers = extensions.SpectralNormReport(model, true_sigma=True).measure()
    assert [layer.name for layer in layers] == [
        f'rnn/{i}/w{j}' for i in range(2) for j in range(6)]
    for layer in layers:
        _, i, name = layer.name.split('/')
        expected = reference.true_norm(raw(model.rnn)[int(i)][name])
        assert layer.sigma == pytest.approx(expected, rel=1e-3)
        assert layer.norm == pytest.approx(1, rel=1e-3)


# Of a chain

class Model(chainer.Chain):

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.rnn = L.NStepGRU(1, N_IN, N_OUT, 0.)
            self.out = L.Linear(N_OUT, 2)

    def forward(self, xs):
        return self.out(F.concat(self.rnn(None, xs)[1], axis=0))


def test_a_chain_takes_it_where_the_filter_has_its_class():
    for filter in None, '*', [L.Linear, chainer.ChainList], (
            lambda path, link: True):
        model = Model().add_hook(ChainSpectralNormalization(filter))
        assert 'w0_u' not in vars(model.rnn[0])
        assert 'W_u' in vars(model.out)
    model = Model()
    model.add_hook(ChainSpectralNormalization([L.Linear, L.NStepGRU]))
    assert model.out.W_u is not None
    assert model.rnn[0].w5_u is not None
    twin = Model()
    twin.copyparams(model, copy_persistent=False)
    for link in twin.rnn, twin.out:
        link.add_hook(SpectralNormalization())
    serializer = serializers.DictionarySerializer()
    serializer.save(model)
    serializers.NpzDeserializer(serializer.target).load(twin)
    with chainer.function_hooks.TimerHook() as timer:
        y = model(sequences())
    assert sum('Normaliz' in f for f, _ in timer.call_history) == 1
    np.testing.assert_array_equal(y.array, twin(sequences()).array)
    model.delete_hook('ChainSpectralNormalization')
    assert not any(link.local_link_hooks for link in model.links())


def test_a_chain_of_nothing_else():
    model = Model().add_hook(ChainSpectralNormalization(L.NStepGRU))
    assert 'W_u' not in vars(model.out)
    assert 'w0_u' in vars(model.rnn[0])
    with pytest.raises(errors.NoLinkError):
        model.add_hook(
            ChainSpectralNormalization(L.NStepGRU, name='x'), name='y')
    assert list(model.local_link_hooks) == ['ChainSpectralNormalization']


def test_hooks_are_of_this_package():
    """So an exporter finds them, and bake and delete_hook remove them."""
    hook, = make().local_link_hooks.values()
    assert isinstance(hook, link_hooks.LocalHook)


class OldRNN(L.NStepRNNTanh):
    """As before Chainer 5."""

    def __call__(self, *args):
        return self.forward(*args)


def test_a_call_that_calls_no_hooks():
    link = OldRNN(1, 3, 4, 0.)
    with pytest.raises(errors.HookBypassedError, match='OldRNN'):
        link.add_hook(SpectralNormalization())
    assert not link.local_link_hooks
    assert not any(layer.local_link_hooks for layer in link)
