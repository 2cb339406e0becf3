"""A scope in which `link.W` is the weight that calls of the link use."""
import contextlib
import copy
import gc
import io
import pickle
import threading

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks, optimizers, serializers

import sn_function
from sn_function import (
    ChainSpectralNormalization,
    SpectralNormalization,
    cached,
    errors,
    normalized,
)
from sn_function._links import scope as scopes
from tests import reference
from tests.links.test_threads import Slow
from tests.links.test_turn import SECONDS, Thread, wait_for

X = np.random.RandomState(0).randn(2, 3).astype('f')


def make(**settings):
    np.random.seed(0)
    return L.Linear(3, 4).add_hook(SpectralNormalization(**settings))


class Model(chainer.Chain):

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.one = L.Linear(3, 4)
            self.two = L.Linear(4, 4)

    def forward(self, x):
        return self.two(F.tanh(self.one(x)))


def hooked(kind, **settings):
    np.random.seed(0)
    model = Model()
    if kind == 'chain':
        return model.add_hook(ChainSpectralNormalization(**settings))
    for link in model.children():
        link.add_hook(SpectralNormalization(**settings))
    return model


@pytest.fixture
def link():
    return make()


@pytest.fixture
def model():
    return hooked('chain')


def is_parameter(x):
    return isinstance(x, chainer.Parameter)


def assert_outside(*links):
    """The attributes are the parameters, and no scope is open."""
    for link in links:
        assert scopes.covering(link) is None
        assert is_parameter(link.W)
        assert link.W is vars(link)['W']


# What it is

@pytest.mark.parametrize(('make', 'axis'), [
    (lambda: L.Linear(5, 3), 0),
    (lambda: L.EmbedID(6, 4), 0),
    (lambda: L.Convolution2D(2, 5, 3), 0),
    (lambda: L.Deconvolution2D(2, 5, 3), 1),
    (lambda: L.ConvolutionND(1, 2, 3, 2), 0),
    (lambda: L.Convolution2D(1, 1, 1), 0)])
@pytest.mark.parametrize(('settings', 'scale'), [
    ({}, lambda sigma: 1 / sigma),
    ({'factor': 2.}, lambda sigma: 2 / sigma),
    ({'use_gamma': True}, lambda sigma: 1),
    ({'cap': .5}, lambda sigma: min(1, .5 / sigma)),
    ({'detach_uv': True}, lambda sigma: 1 / sigma)],
    ids=['default', 'factor', 'gamma', 'cap', 'detached'])
def test_the_weight(make, axis, settings, scale):
    """By a float64 SVD."""
    np.random.seed(0)
    link = make()
    raw = link.W.array.astype('d')
    link.add_hook(SpectralNormalization(n_warmup=200, **settings))
    with normalized(link):
        np.testing.assert_allclose(
            link.W.array, raw * scale(reference.true_norm(raw, axis)),
            rtol=1e-4, atol=1e-6)
    assert_outside(link)


@pytest.mark.parametrize('kind', ['link', 'chain'])
@pytest.mark.parametrize('first', ['call', 'read'])
def test_calls_use_it(kind, first):
    """One Variable, and u as of one call."""
    model, other = hooked(kind, n_warmup=0), hooked(kind, n_warmup=0)
    other(X)
    seen = []
    model.one.forward = lambda x: seen.append(model.one.W) or x[:, [0] * 4]
    with normalized(model):
        if first == 'call':
            model(X)
        read = [model.one.W, model.two.W]
        for _ in range(2):
            model(X)
        assert read == [model.one.W, model.two.W]
    assert all(W is read[0] for W in seen)
    for link, expected in zip(model.children(), other.children()):
        np.testing.assert_array_equal(link.W_u, expected.W_u)
    assert_outside(*model.children())


def test_all_in_one_node(model):
    with normalized(model):
        assert model.one.W.creator_node is model.two.W.creator_node


def test_what_is_not_read_is_left_alone():
    model = hooked('link', n_warmup=0)
    before = model.two.W_u.copy()
    with normalized(model):
        assert not is_parameter(model.one.W)
    np.testing.assert_array_equal(model.two.W_u, before)


def test_in_test_mode(link):
    before = link.W_u.copy()
    with chainer.using_config('train', False):
        expected = link(X).array
        with normalized(link):
            found = F.linear(X, link.W).array
            assert link.W is link.W
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(link.W_u, before)


def test_without_a_call_of_the_link(link):
    """`forward` of the link, and functions that take its weight."""
    with normalized(link):
        expected = link(X).array
        for y in link.forward(X), F.linear(X, link.W, link.b):
            np.testing.assert_array_equal(y.array, expected)
    assert_outside(link)


class Two(chainer.Link):

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.V = chainer.Parameter(np.diag([4., 2.]))
            self.H = chainer.Parameter(np.diag([8., 2.]))
            self.raw = chainer.Parameter(np.diag([3., 1.]))

    def forward(self):
        return self.V, self.H, self.raw


def test_several_weights_of_a_link():
    link = Two()
    for name in 'V', 'H':
        link.add_hook(SpectralNormalization(
            weight_name=name, name=name, use_gamma=name == 'H'))
    with normalized(link):
        assert all(a is b for a, b in zip(link(), (link.V, link.H, link.raw)))
        np.testing.assert_allclose(link.V.array, np.diag([1, .5]), rtol=1e-6)
        np.testing.assert_allclose(link.H.array, np.diag([8, 2]), rtol=1e-6)
        assert is_parameter(link.raw)
    assert is_parameter(link.V)
    assert is_parameter(link.H)


@pytest.mark.parametrize('kind', [L.NStepLSTM, L.NStepBiGRU])
def test_an_n_step_link(kind):
    np.random.seed(0)
    link = kind(2, 3, 4, 0.).add_hook(SpectralNormalization(n_warmup=200))
    ws = vars(link)['ws']
    with normalized(link):
        hy, *_ = link(*[None] * (2 if kind is L.NStepLSTM else 1), [X])
        assert not any(is_parameter(w) for layer in link.ws for w in layer)
        for layer, raws, own in zip(link.ws, ws, link):
            for i, (w, raw) in enumerate(zip(layer, raws)):
                np.testing.assert_allclose(
                    w.array, raw.array / reference.true_norm(raw.array),
                    rtol=1e-4, atol=1e-6)
                assert getattr(own, f'w{i}') is w
        seen = {id(w) for w in hy.creator_node.inputs}
    assert seen
    assert link.ws is ws
    assert all(is_parameter(w) for layer in link.ws for w in layer)


def test_links_of_one_class_that_have_no_hook(link):
    plain, bare = L.Linear(3, 4), chainer.Link()
    with normalized(link):
        assert not is_parameter(link.W)
        assert is_parameter(plain.W)
        assert not hasattr(bare, 'W')
    assert not hasattr(L.Linear, 'W')
    with pytest.raises(AttributeError, match='W'):
        is_parameter(L.Linear.W)
    del plain.W
    assert not hasattr(plain, 'W')
    with pytest.raises(AttributeError):
        del plain.W
    with plain.init_scope():
        plain.W = chainer.Parameter(0, (4, 3))
    assert 'W' in plain._params
    assert plain(X).shape == (2, 4)


def test_a_class_with_a_default():
    class Own(chainer.Link):
        W = 'nothing'

        def __init__(self, *args):
            super().__init__()
            with self.init_scope():
                if args:
                    self.W = chainer.Parameter(*args)

    link = Own(np.diag([4., 2.])).add_hook(SpectralNormalization())
    with normalized(link):
        np.testing.assert_allclose(link.W.array, np.diag([1, .5]), rtol=1e-6)
        assert Own().W == Own.W == 'nothing'


def test_a_class_with_a_method():
    class Own(chainer.Link):

        def __init__(self, *args):
            super().__init__()
            with self.init_scope():
                if args:
                    self.W = chainer.Parameter(*args)

        def W(self):
            return self

    link, other = Own(np.eye(2)).add_hook(SpectralNormalization()), Own()
    with normalized(link):
        assert not is_parameter(link.W)
        assert other.W() is other
        assert Own.W(other) is other


def test_a_class_with_a_property():
    """It makes the attribute itself, before, within and after a scope."""
    class Masked(L.Linear):

        @property
        def W(self):
            W = vars(self)['W']
            return W if W.array is None else W * mask

        @W.setter
        def W(self, value):
            vars(self)['W'] = value

    mask = np.eye(4, 3, dtype='f')
    link = Masked(3, 4).add_hook(SpectralNormalization())
    with normalized(link):
        np.testing.assert_array_equal(
            link.W.array, vars(link)['W'].array * mask)
    W = vars(link)['W'].array
    np.testing.assert_allclose(
        link(X).array, X @ (W * mask).T / np.linalg.norm(W, 2), rtol=1e-2)


def test_a_class_that_was_pickled(link):
    """By its contents, as cloudpickle does with those of a program."""
    with normalized(link):
        pass
    attribute = pickle.loads(pickle.dumps(vars(L.Linear)['W']))
    own = type('Own', (chainer.Link,), {'W': attribute})
    assert not hasattr(own(), 'W')


# Gradients

def penalty(W):
    """Analytic in W: how far its rows are from being orthonormal."""
    G = W @ W.T
    return ((G - np.eye(len(G))) ** 2).sum()


def penalty_of(W):
    G = F.matmul(W, W, transb=True)
    return F.sum((G - G.xp.eye(len(G), dtype=G.dtype)) ** 2)


def of_double(n_in=3, **settings):
    np.random.seed(0)
    with chainer.using_config('dtype', 'float64'):
        link = L.Linear(n_in, 4, nobias=True)
        return link.add_hook(SpectralNormalization(n_warmup=0, **settings))


@pytest.mark.parametrize('n_in', [1, 3, 4, 7])
@pytest.mark.parametrize('n_power_iteration', [1, 3])
def test_the_gradient(n_in, n_power_iteration):
    """Of a penalty and a call, by a complex step."""
    link = of_double(n_in, n_power_iteration=n_power_iteration)
    u, W = link.W_u.copy(), link.W.array.copy()
    random = np.random.RandomState(1)
    x, g = random.randn(5, n_in), random.randn(5, 4)

    def loss(W):
        Y, _ = reference.spectral_normalize(W, u, n_power_iteration)
        return penalty(Y) + (g * (x @ Y.T)).sum()

    link.cleargrads()
    with normalized(link):
        found = penalty_of(link.W) + F.sum(g * link(x))
    found.backward()
    np.testing.assert_allclose(found.array, loss(W), rtol=1e-10)
    np.testing.assert_allclose(
        link.W.grad, reference.complex_step(loss, W), rtol=1e-7, atol=1e-10)


def test_the_gradient_of_a_gradient():
    """By differences of complex steps."""
    link = of_double()
    u, W = link.W_u.copy(), link.W.array.copy()
    R = np.random.RandomState(1).randn(*W.shape)

    def slope(W):
        g = reference.complex_step(lambda W: penalty(
            reference.spectral_normalize(W, u)[0]), W)
        return (g * R).sum()

    with normalized(link):
        W_ = vars(link)['W']
        gW, = chainer.grad(
            [penalty_of(link.W)], [W_], enable_double_backprop=True)
        ggW, = chainer.grad([F.sum(gW * R)], [W_])
    expected = np.empty_like(W)
    for i in np.ndindex(*W.shape):
        d = np.zeros_like(W)
        d[i] = 1e-6
        expected[i] = (slope(W + d) - slope(W - d)) / 2e-6
    np.testing.assert_allclose(ggW.array, expected, rtol=1e-6, atol=1e-7)


def test_a_log_determinant():
    """That of the layer, and its gradient, by a complex step."""
    with chainer.using_config('dtype', 'float64'):
        link = L.Linear(3, 3, initialW=np.random.RandomState(0).randn(3, 3))
    link.add_hook(SpectralNormalization())
    u, W = link.W_u.copy(), link.W.array.copy()
    link.cleargrads()
    with normalized(link):
        found = F.log(F.det(link.W) ** 2)

    def expected(W):
        Y, _ = reference.spectral_normalize(W, u)
        return np.log(np.linalg.det(Y) ** 2)

    found.backward()
    np.testing.assert_allclose(found.array, expected(W), rtol=1e-9)
    np.testing.assert_allclose(
        link.W.grad, reference.complex_step(expected, W), rtol=1e-7)


def test_a_gradient_penalty_by_hand():
    """The gradient of an input, from products with weights."""
    model = hooked('link', n_warmup=50)
    x = chainer.Variable(X)
    with normalized(model), chainer.using_config('train', False):
        h = F.tanh(model.one(x))
        y = F.sum(model.two(h))
        by_hand = F.matmul(
            F.matmul(np.ones((2, 4), 'f'), model.two.W) * (1 - h ** 2),
            model.one.W)
        gx, = chainer.grad([y], [x], enable_double_backprop=True)
        losses = F.sum(by_hand ** 2), F.sum(gx ** 2)
    grads = []
    for loss in losses:
        model.cleargrads()
        loss.backward()
        grads.append(np.concatenate([
            link.W.grad.ravel() for link in model.children()]))
    np.testing.assert_allclose(*[loss.array for loss in losses], rtol=1e-5)
    np.testing.assert_allclose(*grads, rtol=1e-3, atol=1e-6)


# Scopes

@pytest.mark.parametrize('outer', [cached, normalized])
@pytest.mark.parametrize('inner', [cached, normalized])
def test_nested(outer, inner, link):
    chain = chainer.Sequential(link)
    u = None
    with outer(link):
        y = link(X)
        u = link.W_u.copy()
        with inner(chain), normalized(link):
            np.testing.assert_array_equal(
                F.linear(X, link.W, link.b).array, y.array)
            W = link.W
        assert (link.W is W) == (outer is normalized)
        with normalized(link):
            assert link.W is W
    np.testing.assert_array_equal(link.W_u, u)
    assert_outside(link)


def test_in_a_call_of_a_chain():
    """The scope of a call is the outer one."""
    class Penalized(Model):
        def forward(self, x):
            y = super().forward(x)
            with normalized(self.one):
                seen.append(self.one.W)
                assert is_parameter(self.two.W)
            seen.append(self.one(x).creator_node.inputs[1])
            return y

    seen = []
    model = Penalized().add_hook(ChainSpectralNormalization())
    model(X)
    assert seen[0].node is seen[1]
    assert_outside(*model.children())


@pytest.mark.parametrize('scope', [cached, normalized])
def test_what_an_outer_scope_has(scope, model):
    """The inner one does not normalize it again."""
    with scope(model.one), normalized(model):
        W, = model.two.W.creator_node.inputs
        assert W is vars(model.two)['W'].node


def test_in_a_call_of_the_link():
    """There it is what the hooks have made of it."""
    class Own(L.Linear):
        def forward(self, x):
            before = self.W
            with normalized(self):
                seen.append((before, self.W))
            assert self.W is before
            return super().forward(x)

    seen = []
    link = Own(3, 4).add_hook(SpectralNormalization())
    for scope in contextlib.nullcontext(), normalized(link):
        with scope:
            link(X)
    assert all(a is b and not is_parameter(a) for a, b in seen)
    assert_outside(link)


@pytest.mark.parametrize('is_first', [True, False])
def test_another_hook(is_first):
    """It finds in a call what it finds outside of the scope."""
    def make():
        np.random.seed(0)
        hooks = [link_hooks.WeightStandardization(),
                 SpectralNormalization(n_warmup=0)]
        link = L.Linear(3, 4)
        for hook in hooks if is_first else hooks[::-1]:
            link.add_hook(hook)
        return link

    link, expected = make(), make()
    with normalized(link):
        for _ in range(2):
            W = link.W
            assert not is_parameter(W)
        y = link(X)
    if not is_first:
        np.testing.assert_array_equal(y.array, expected(X).array)
    else:
        with cached(expected):
            np.testing.assert_allclose(y.array, expected(X).array, rtol=.2)
    assert_outside(link)


def raise_with(W):
    assert not is_parameter(W)
    raise ZeroDivisionError


def test_an_exception(link):
    with pytest.raises(ZeroDivisionError), normalized(link):
        raise_with(link.W)
    assert_outside(link)


def test_a_call_raises(link):
    with normalized(link):
        W = link.W
        with pytest.raises(chainer.utils.type_check.InvalidType):
            link(np.ones((2, 7), 'f'))
        assert link.W is W
    assert_outside(link)


def test_a_decorator(link):
    @normalized(link)
    def norm():
        return np.linalg.norm(link.W.array, 2)

    for _ in range(2):
        assert abs(norm() - 1) < 1e-3
        assert_outside(link)


def generator(link):
    with normalized(link):
        while True:
            yield link.W


def test_a_generator(link):
    steps = generator(link)
    W = next(steps)
    assert not is_parameter(W)
    assert next(steps) is W
    steps.close()
    assert_outside(link)


def test_a_generator_that_another_thread_ends(link):
    steps = [generator(link)]
    next(steps[0])

    def end():
        steps.clear()
        gc.collect()

    Thread(end).wait()
    assert_outside(link)


# Threads

def test_another_thread_finds_the_parameter(link):
    found = []
    with normalized(link):
        W = link.W
        thread = Thread(lambda: found.extend([link.W, link(X)]))
        thread.wait()
        assert link.W is W
    assert found[0] is link.W
    assert found[1].creator_node.inputs[1] is not W.node


def test_each_thread_has_a_scope_of_its_own(link):
    barrier = threading.Barrier(4)
    found = []

    def work():
        with chainer.using_config('train', False), normalized(link):
            barrier.wait(SECONDS)
            for _ in range(20):
                W = link.W
                assert not is_parameter(W)
                assert link(X).creator_node.inputs[1] is W.node
            barrier.wait(SECONDS)
            found.append(W)

    threads = [Thread(work) for _ in range(4)]
    for thread in threads:
        thread.wait()
    assert len({id(W) for W in found}) == 4
    assert_outside(link)


def test_while_another_thread_is_in_a_call(monkeypatch):
    """It waits, as a call would."""
    link = Slow(3, 4).add_hook(SpectralNormalization())
    monkeypatch.setattr(Slow, 'began', threading.Event())
    monkeypatch.setattr(Slow, 'ends', threading.Event())
    found = []

    def read():
        with normalized(link):
            found.append(link.W)

    calling = Thread(lambda: link(X))
    assert Slow.began.wait(SECONDS)
    theirs = vars(link)['W']
    assert not is_parameter(theirs)
    reading = Thread(read)
    wait_for(lambda: len(sn_function._links.turn.queue_of(link)) == 2)
    assert not found
    Slow.ends.set()
    calling.wait()
    reading.wait()
    assert not is_parameter(found[0])
    assert found[0] is not theirs
    assert_outside(link)


# What finds the parameters in it

def test_params(model):
    own = dict(model.namedparams())
    with normalized(model):
        assert not is_parameter(model.one.W)
        assert dict(model.namedparams()) == own
        assert all(x is own[name] for name, x in model.namedparams())
        assert {*map(id, model.params())} == {*map(id, own.values())}
        assert {*map(id, model.params(include_uninit=False))} == {
            *map(id, own.values())}
        assert model.count_params() == 36


def test_gradients_are_cleared_and_added(model):
    other = hooked('chain')
    with normalized(model, other):
        penalty_of(other.one.W).backward()
        model.cleargrads()
        assert vars(model.one)['W'].grad is None
        model.one.addgrads(other.one)
    np.testing.assert_array_equal(model.one.W.grad, other.one.W.grad)
    assert model.one.W.grad.any()


def train(model, scope, is_around):
    """Three steps, whose updates are in the scope or after it."""
    optimizer = optimizers.Adam().setup(model)
    losses = []

    def step():
        with contextlib.nullcontext() if is_around else scope(model):
            loss = F.sum(model(X) ** 2) + penalty_of(model.one.W)
        model.cleargrads()
        loss.backward()
        optimizer.update()
        losses.append(loss.array)

    with scope(model) if is_around else contextlib.nullcontext():
        for _ in range(3):
            step()
    return losses


@pytest.mark.parametrize('settings', [{}, {'use_gamma': True}])
def test_updates(settings):
    """The next read is of the new weight, and from the next u."""
    models = [hooked('link', **settings) for _ in range(2)]
    found = [train(model, normalized, is_around)
             for model, is_around in zip(models, (False, True))]
    np.testing.assert_array_equal(*found)
    assert len(set(map(float, found[0]))) == 3
    for a, b in zip(models[0].namedparams(), models[1].namedparams()):
        np.testing.assert_array_equal(a[1].array, b[1].array)
    np.testing.assert_array_equal(*[model.one.W_u for model in models])


def test_an_update_by_a_function(model):
    """`optimizer.update(loss)` clears, computes and updates in the scope."""
    optimizer = optimizers.SGD(.1).setup(model)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(.1))
    before = model.one.W.array.copy()
    with normalized(model):
        first = model.one.W
        optimizer.update(lambda: penalty_of(model.one.W))
        second = model.one.W
    assert second is not first
    assert not np.array_equal(model.one.W.array, before)
    np.testing.assert_allclose(np.linalg.norm(second.array, 2), 1, rtol=1e-2)
    assert_outside(model.one)


@pytest.mark.parametrize('name', ['npz', 'hdf5'])
def test_snapshots(name, model):
    if name == 'hdf5':
        pytest.importorskip('h5py')
    save = getattr(serializers, f'save_{name}')
    load = getattr(serializers, f'load_{name}')
    files = io.BytesIO(), io.BytesIO()
    save(files[0], model)
    u = model.one.W_u.copy()
    with normalized(model), chainer.using_config('train', False):
        before = model.one.W
        save(files[1], model)
        other = hooked('chain')
        other.one.W.array *= 2
        with normalized(other):
            for file in files:
                file.seek(0)
                load(file, other)
            after = other.one.W
    np.testing.assert_array_equal(other.one.W.array, model.one.W.array)
    np.testing.assert_array_equal(other.one.W_u, u)
    np.testing.assert_allclose(after.array, before.array, rtol=1e-6)
    assert_outside(model.one, other.one)


@pytest.mark.parametrize('copy_of', [
    copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x)),
    lambda x: x.copy('copy'), lambda x: x.copy('share'),
    lambda x: x.copy('init'), lambda x: x.repeat(1, 'copy')[0]],
    ids=['deepcopy', 'shallow', 'pickle', 'copy', 'share', 'init', 'repeat'])
def test_copies(copy_of, link):
    with normalized(link):
        W = link.W
        twin = copy_of(link)
        assert is_parameter(twin.W)
        assert twin.W is vars(twin)['W']
        assert type(twin) is L.Linear
        twin(X)
        assert link.W is W
    assert_outside(link, twin)
    assert abs(np.linalg.norm(vars(link)['W'].array, 2) - 1) > .01


def test_other_functions(model):
    """What they find is what they find outside of the scope."""
    def state():
        report = sn_function.extensions.SpectralNormReport(model)
        plain = sn_function.bake(model)
        return (
            str(sn_function.summary(model)), plain.one.W.array.tolist(),
            tuple(sn_function.certify(model.one)), report.measure(),
            sorted(map(id, model.params())))

    with chainer.using_config('train', False):
        expected = state()
        with normalized(model):
            assert not is_parameter(model.one.W)
            assert repr(state()) == repr(expected)
            sn_function.refresh(model)
    u = np.linalg.svd(model.one.W.array)[0][:, 0]
    assert abs(abs(u @ model.one.W_u) - 1) < 1e-6


def test_baked_in_place(link):
    with normalized(link), chainer.using_config('train', False):
        W = link.W.array.copy()
        sn_function.bake(link, in_place=True)
        assert is_parameter(link.W)
        np.testing.assert_array_equal(link.W.array, W)
    assert_outside(link)


def test_hooks_come_and_go(link):
    with normalized(link):
        link.delete_hook('SpectralNormalization')
        assert is_parameter(link.W)
        link.add_hook(SpectralNormalization(factor=3.))
        assert abs(np.linalg.norm(link.W.array, 2) - 3) < .01
    assert_outside(link)


# What the program puts there

def test_a_weight_is_put_back(link):
    """After another one was there, for a while."""
    own = link.W
    with normalized(link):
        W = link.W
        link.W = chainer.Variable(np.zeros((4, 3), 'f'))
        assert not link.forward(X).array.any()
        link.W = W
        assert vars(link)['W'] is own
        assert link.W is W
    assert link.W is own


class Masked(L.Linear):
    """Replaces its weight for a while, and does so twice in a call."""

    def apply(self, x, mask):
        W = self.W
        self.W = W * mask
        try:
            return super().forward(x)
        finally:
            self.W = W

    def forward(self, x):
        return self.apply(x, 1) + self.apply(x, 2)


@pytest.mark.parametrize('scope', [
    normalized, cached, lambda _: contextlib.nullcontext()])
def test_a_forward_that_puts_the_weight_back(scope):
    """In a call it puts back what the call began with."""
    np.random.seed(0)
    link = Masked(3, 4, nobias=True)
    W = link.W.array / np.linalg.norm(link.W.array, 2)
    model = chainer.Sequential(link).add_hook(
        ChainSpectralNormalization(n_warmup=200))
    with normalized(model):
        pass  # from now on the class has the attribute
    with scope(model):
        ys = [model(X)]
        if scope is normalized:
            ys.append(link.forward(X))
    for y in ys:
        np.testing.assert_allclose(
            y.array, 3 * X @ W.T, rtol=1e-4, atol=1e-6)
    assert_outside(link)


@pytest.mark.parametrize('is_left', [True, False])
def test_the_weights_of_an_n_step_link_are_put_back(is_left):
    link = L.NStepLSTM(1, 3, 4, 0.).add_hook(SpectralNormalization())
    with normalized(link):
        ws = link.ws
        link.ws = [[F.dropout(w) for w in ws[0]]]
        if not is_left:
            link.ws = ws
    assert all(w is vars(link[0])[f'w{i}'] for i, w in enumerate(link.ws[0]))


@pytest.mark.parametrize('reads_again', [True, False])
def test_a_weight_is_put_back_after_a_call(reads_again, link):
    """By then the scope has another one, also of the weight itself."""
    own = link.W
    with normalized(link):
        with chainer.using_config('enable_backprop', not reads_again):
            W = link.W
        if reads_again:
            assert link.W is not W
        link.W = W * 2
        link(X)
        link.W = W
        assert vars(link)['W'] is own
        assert any(x is own for x in link.params())


def test_forget_of_what_puts_the_weight_back(link):
    """Also in the second run, after the scope."""
    def function(x):
        W = link.W
        link.W = W * 2
        y = F.linear(x, link.W)
        link.W = W
        return y

    with normalized(link):
        loss = F.sum(F.forget(function, chainer.Variable(X)))
    loss.backward()
    assert_outside(link)


def test_a_weight_of_another_link(link):
    """It is no weight of this one, and stays as it was given."""
    other = make()
    with normalized(link, other):
        other.W = link.W
        assert vars(other)['W'] is link.W
    assert_outside(link, other)


def test_a_weight_that_is_left_there(link):
    own = link.W
    with normalized(link):
        link.W = other = F.dropout(link.W)
        with normalized(link):
            assert link.W is other
    assert link.W is own
    assert_outside(link)


def test_a_new_parameter_stays(link):
    new = chainer.Parameter(np.eye(4, 3, dtype='f'))
    with normalized(link):
        assert not is_parameter(link.W)
        with link.init_scope():
            link.W = new
        np.testing.assert_allclose(link.W.array, new.array, rtol=1e-2)
    assert link.W is new


def test_a_weight_that_is_deleted(link):
    with normalized(link):
        del link.W
        assert not hasattr(link, 'W')
    assert 'W' not in vars(link)


# F.forget

@pytest.mark.parametrize('ends', ['after', 'before', 'inside'])
@pytest.mark.parametrize('n', [1, 2])
def test_forget(ends, n):
    """The second run gets the weight of the first one."""
    def function(x):
        with normalized(link) if ends == 'inside' else (
                contextlib.nullcontext()):
            return link(x) + F.linear(F.tanh(x), link.W)

    def run(forget):
        for _ in range(n - 1):
            forget = nested(forget)
        scope = (contextlib.nullcontext() if ends == 'inside'
                 else normalized(link))
        link.cleargrads()
        with scope:
            loss = F.sum(forget(function, chainer.Variable(X)) ** 3)
            if ends == 'after':
                loss.backward()
        if ends != 'after':
            link(X)  # u moves on
            loss.backward()
        return loss.array, link.W.grad

    def nested(forget):
        return lambda f, x: forget(lambda x: forget(f, x), x)

    results = []
    for forget in (lambda f, x: f(x)), F.forget:
        link = make(n_warmup=0)
        results.append(run(forget))
    np.testing.assert_allclose(*[loss for loss, _ in results], rtol=1e-6)
    np.testing.assert_allclose(*[g for _, g in results], rtol=1e-5, atol=1e-6)
    assert_outside(link)


def test_forget_of_what_reads_the_parameter_as_well(link):
    """The function that opens the scope reads the parameter before it."""
    def function(x):
        y = F.linear(x, link.W)
        with normalized(link):
            return y + F.linear(F.tanh(x), link.W)

    results = []
    for forget in (lambda f, x: f(x)), F.forget:
        link.cleargrads()
        with chainer.using_config('train', False):
            F.sum(forget(function, chainer.Variable(X)) ** 3).backward()
        results.append(link.W.grad)
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('opens', [True, False])
@pytest.mark.parametrize('run_of', [
    lambda f: lambda x: F.forget(f, x),
    lambda f: lambda x: F.forget(lambda x: F.forget(f, x), x)])
def test_forget_before_the_scope(opens, run_of):
    """The second run, in a scope, gets the parameter as the first one did."""
    def function(x):
        y = F.linear(x, link.W)
        with normalized(link) if opens else contextlib.nullcontext():
            return y * F.linear(F.tanh(x), link.W)

    link = make()
    results = []
    for run in function, run_of(function):
        link.cleargrads()
        with chainer.using_config('train', False):
            loss = F.sum(run(chainer.Variable(X)) ** 2)
            with normalized(link):
                assert not is_parameter(link.W)
                loss.backward()
        results.append(link.W.grad)
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


# Mistakes

def test_a_lazy_link():
    """A call initializes it, also within."""
    link = L.Linear(None, 4).add_hook(SpectralNormalization())
    with normalized(link):
        with pytest.raises(
                errors.UninitializedWeightError, match='no array yet'):
            is_parameter(link.W)
        y = link(X)
        np.testing.assert_array_equal(
            F.linear(X, link.W, link.b).array, y.array)
    assert_outside(link)


def test_a_lazy_lstm():
    """It would initialize weights in the place of normalized ones."""
    model = chainer.Sequential(L.LSTM(None, 4)).add_hook(
        ChainSpectralNormalization())
    with pytest.raises(
            errors.UninitializedWeightError, match='outside of sn_function'
    ), normalized(model):
        model(X)
    model(X)
    model[0].reset_state()
    with normalized(model):
        model(X)
        assert not is_parameter(model[0].lateral.W)
    assert_outside(model[0].upward, model[0].lateral)


def test_a_map_of_unknown_size():
    link = L.Convolution2D(2, 3, 3).add_hook(
        SpectralNormalization(norm='operator'))
    with normalized(link):
        with pytest.raises(errors.UnknownInputSizeError):
            is_parameter(link.W)
        y = link(np.ones((1, 2, 5, 5), 'f'))
        assert y.creator_node.inputs[1] is link.W.node
    assert_outside(link)


def test_without_hooks():
    link = L.Linear(3, 4)
    with pytest.warns(
            errors.NothingToShareWarning, match='^normalized has no effect'
    ) as record, normalized(link):
        assert is_parameter(link.W)
    assert [w.filename for w in record] == [__file__]


def test_the_hook_of_chainer():
    model = hooked('link')
    model.two.delete_hook('SpectralNormalization')
    model.two.add_hook(link_hooks.SpectralNormalization())
    with pytest.raises(
            errors.ForeignHookError, match=r'/two \(Linear\)'
    ), normalized(model):
        pass
    assert_outside(*model.children())


def test_a_hook_in_the_place_of_that_of_chainer(link, monkeypatch):
    monkeypatch.setattr(
        link_hooks, 'SpectralNormalization', SpectralNormalization)
    with normalized(link):
        assert not is_parameter(link.W)


@pytest.mark.parametrize(('args', 'match'), [
    ((), 'nothing'), ((None,), 'NoneType'), ((L.Linear,), 'object of this'),
    (([L.Linear(2, 2)],), r'normalized\(\*models\)')])
def test_no_model(args, match):
    with pytest.raises(
            errors.ModelTypeError, match=match), normalized(*args):
        pass


@pytest.mark.gpu
def test_on_a_device():
    link = make(n_warmup=0)
    other = copy.deepcopy(link)
    link.to_device('@cupy:0')
    x = link.xp.asarray(X)
    for each in link, other:
        each.cleargrads()
        with normalized(each):
            loss = penalty_of(each.W) + F.sum(each(x if each is link else X))
        loss.backward()
    np.testing.assert_allclose(
        chainer.backends.cuda.to_cpu(link.W.grad), other.W.grad, rtol=1e-4,
        atol=1e-6)
