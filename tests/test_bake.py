"""A baked model is a plain one that computes the same, bit for bit."""
import copy
import pickle

from sn_function import (  # isort: skip  # before chainer: it repairs that
    ChainSpectralNormalization,
    SpectralNormalization,
    cached,
    errors,
)
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import link_hooks, optimizers, serializers

from sn_function.bake import bake
from tests.compat.test_compat import run

# A link, and the shape of its input.
LINKS = {
    'linear': (lambda: L.Linear(6, 5), (3, 6)),
    'linear, lazy': (lambda: L.Linear(None, 5), (3, 6)),
    'embed_id': (lambda: L.EmbedID(7, 4), None),
    'convolution': (lambda: L.Convolution2D(3, 5, 3, pad=1), (2, 3, 6, 6)),
    'convolution, lazy': (lambda: L.Convolution2D(None, 5, 3), (2, 3, 6, 6)),
    'convolution, groups': (
        lambda: L.Convolution2D(4, 6, 3, groups=2), (2, 4, 6, 6)),
    'convolution, dilated': (
        lambda: L.DilatedConvolution2D(3, 5, 3, dilate=2), (2, 3, 7, 7)),
    'convolution, 1D': (lambda: L.Convolution1D(3, 5, 3), (2, 3, 6)),
    'convolution, 3D': (lambda: L.Convolution3D(2, 3, 2), (2, 2, 4, 4, 4)),
    'deconvolution': (
        lambda: L.Deconvolution2D(3, 5, 4, 2, 1), (2, 3, 6, 6)),
    'deconvolution, groups': (
        lambda: L.Deconvolution2D(4, 6, 3, groups=2), (2, 4, 6, 6)),
    'deconvolution, 3D': (
        lambda: L.Deconvolution3D(2, 3, 2), (2, 2, 4, 4, 4)),
}
SETTINGS = {
    'default': {},
    'gamma': {'use_gamma': True},
    'factor': {'factor': .5},
    'K = 3': {'n_power_iteration': 3, 'n_warmup': 0},
    'detached': {'detach_uv': True, 'n_warmup': 0},
    'floor': {'eps': 100.},
    'several vectors': {'n_vectors': 3},
}


def make_input(shape, seed=0, dtype='f'):
    random = np.random.RandomState(seed)
    if shape is None:
        return random.randint(7, size=(3, 2)).astype('i')
    return random.normal(size=shape).astype(dtype)


def test_mode(model, *args):
    with chainer.using_config('train', False):
        return model(*args).array


test_mode.__test__ = False


def state_of(model):
    target = serializers.DictionarySerializer()
    target.save(model)
    return {key: copy.deepcopy(value) for key, value in target.target.items()}


def assert_same_bits(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def trained(hook, make=lambda: L.Linear(6, 5), shape=(3, 6), dtype='f', n=3):
    """A hooked link some steps on, with a u that has not converged."""
    with chainer.using_config('dtype', np.dtype(dtype)):
        link = make().add_hook(hook)
        inputs = make_input(shape, dtype=dtype)
        link(inputs)
        optimizer = optimizers.SGD(.1).setup(link)
        for _ in range(n):
            optimizer.update(lambda: F.mean(link(inputs) ** 2))
    return link


def model_of(hook=SpectralNormalization, **settings):
    """Two blocks with hooks, and links without."""
    model = chainer.Sequential(
        L.Linear(6, 5).add_hook(hook(**settings)), F.relu,
        chainer.Sequential(
            L.Linear(5, 4).add_hook(hook(**settings)),
            L.BatchNormalization(4)),
        L.Linear(4, 2))
    model(make_input((3, 6)))
    return model


class Two(chainer.Link):
    """A link that has two weights."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.A = chainer.Parameter(make_input((5, 6), 1))
            self.B = chainer.Parameter(make_input((4, 5), 2))

    def forward(self, x):
        return F.linear(F.linear(x, self.A), self.B)


class TestOutputs:

    @pytest.mark.parametrize('dtype', ['f', 'e', 'd'])
    @pytest.mark.parametrize('settings', SETTINGS)
    @pytest.mark.parametrize('kind', LINKS)
    def test_bit_for_bit(self, kind, settings, dtype):
        make, shape = LINKS[kind]
        link = trained(SpectralNormalization(**SETTINGS[settings]),
                       make, shape, dtype)
        baked = bake(link)
        assert baked.W.dtype == dtype
        for seed in range(3):
            inputs = make_input(shape, seed, dtype)
            expected = test_mode(link, inputs)
            assert_same_bits(test_mode(baked, inputs), expected)
            assert_same_bits(baked(inputs).array, expected)
        assert np.abs(baked.W.array - link.W.array).max() > 1e-3

    @pytest.mark.parametrize('kind', LINKS)
    def test_of_chainers_hook(self, kind):
        make, shape = LINKS[kind]
        for use_gamma in False, True:
            link = trained(link_hooks.SpectralNormalization(
                use_gamma=use_gamma, factor=2.), make, shape)
            inputs = make_input(shape, 1)
            expected = test_mode(link, inputs)
            assert_same_bits(test_mode(bake(link), inputs), expected)
            assert not hasattr(bake(link), 'gamma')
            assert_same_bits(test_mode(link, inputs), expected)

    @pytest.mark.parametrize('kind', ['linear', 'deconvolution'])
    def test_norm_is_that_of_a_singular_value_decomposition(self, kind):
        make, shape = LINKS[kind]
        W = bake(trained(SpectralNormalization(
            n_power_iteration=100), make, shape)).W.array.astype('d')
        matrix = W.swapaxes(0, 1) if kind == 'deconvolution' else W
        matrix = matrix.reshape(len(matrix), -1)
        assert np.linalg.norm(matrix, 2) == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize('use_gamma', [False, True])
    def test_hook_of_a_chain(self, use_gamma):
        hooked = chainer.Sequential(
            L.Convolution2D(1, 8, 3), F.relu, L.Deconvolution2D(8, 2, 3),
            chainer.Sequential(L.Linear(2 * 36, 5), L.Linear(5, 5))
        ).add_hook(ChainSpectralNormalization(use_gamma=use_gamma))
        hooked(make_input((2, 1, 6, 6)))
        inputs = make_input((2, 1, 6, 6), 1)
        expected = test_mode(hooked, inputs)
        baked = bake(hooked)
        assert_same_bits(test_mode(baked, inputs), expected)
        assert not any(link.local_link_hooks for link in baked.links())
        assert len(hooked.local_link_hooks) == 1
        assert_same_bits(test_mode(hooked, inputs), expected)

    def test_other_weights_of_a_link(self):
        link = Two()
        for name in 'AB':
            link.add_hook(SpectralNormalization(
                weight_name=name, name=name, use_gamma=True))
        link(make_input((3, 6)))
        baked = bake(link)
        assert_same_bits(test_mode(baked, make_input((3, 6))),
                         test_mode(link, make_input((3, 6))))
        assert sorted(state_of(baked)) == ['A', 'B']

    def test_hook_upon_the_hook_of_another_kind(self):
        """Chainer's hook normalizes what this one has made, as in a call."""
        link = trained(SpectralNormalization(factor=.5, use_gamma=True))
        link.add_hook(link_hooks.SpectralNormalization(
            name='second', use_gamma=True))
        inputs = make_input((3, 6))
        expected = test_mode(link, inputs)
        for in_place in False, True:
            baked = bake(link, in_place)
            assert_same_bits(test_mode(baked, inputs), expected)
            assert sorted(state_of(baked)) == ['W', 'b']

    def test_two_of_chainers_hooks_with_one_gamma(self):
        link = Two()
        for name in 'AB':
            link.add_hook(link_hooks.SpectralNormalization(
                weight_name=name, name=name, use_gamma=True))
        inputs = make_input((3, 6))
        expected = test_mode(link, inputs)
        assert_same_bits(bake(link)(inputs).array, expected)

    def test_inside_a_cached_scope(self):
        """Where calls use a weight that was made from the u before."""
        for in_place in False, True:
            link = trained(SpectralNormalization(n_warmup=0), n=0)
            inputs = make_input((3, 6))
            with cached(link):
                link(inputs)
                copied = copy.deepcopy(link)
                baked = bake(link, in_place)
                expected = test_mode(copied, inputs)
            assert_same_bits(baked(inputs).array, expected)

    def test_nan_and_zero_are_kept(self):
        link = trained(SpectralNormalization())
        link.W.array[1, 2] = np.nan
        assert_same_bits(bake(link)(make_input((3, 6))).array,
                         test_mode(link, make_input((3, 6))))
        link.W.array[...] = 0
        assert not bake(link).W.array.any()

    def test_vector_that_another_hook_has_spoiled(self):
        link = trained(SpectralNormalization())
        link.W_u[...] = np.nan
        with pytest.warns(UserWarning, match='made anew'):
            baked = bake(link)
        assert np.isnan(link.W_u).all()
        assert np.linalg.norm(baked.W.array, 2) == pytest.approx(1, abs=.02)

    def test_weight_and_vector_loaded_before_the_first_call(self, tmp_path):
        source = trained(SpectralNormalization())
        serializers.save_npz(tmp_path / 'model.npz', source)
        link = L.Linear(None, 5).add_hook(SpectralNormalization())
        serializers.load_npz(tmp_path / 'model.npz', link)
        assert_same_bits(bake(link).W.array, bake(source).W.array)


class TestModel:

    @pytest.mark.parametrize('in_place', [False, True])
    def test_is_plain(self, in_place, tmp_path):
        hooked = model_of(use_gamma=True)
        inputs = make_input((3, 6), 1)
        expected = test_mode(hooked, inputs)
        baked = bake(hooked, in_place)
        assert (baked is hooked) == in_place
        plain = chainer.Sequential(
            L.Linear(6, 5), F.relu,
            chainer.Sequential(L.Linear(5, 4), L.BatchNormalization(4)),
            L.Linear(4, 2))
        assert state_of(baked).keys() == state_of(plain).keys()
        for link in baked.links():
            assert not link.local_link_hooks
        assert not [key for link in baked.links() for key in vars(link)
                    if key.startswith('_W')]
        serializers.save_npz(tmp_path / 'model.npz', baked)
        serializers.load_npz(tmp_path / 'model.npz', plain)
        assert_same_bits(test_mode(plain, inputs), expected)

    def test_original_is_as_it_was(self):
        hooked = model_of(use_gamma=True)
        optimizer = optimizers.Adam().setup(hooked)
        inputs = make_input((3, 6))
        optimizer.update(lambda: F.mean(hooked(inputs) ** 2))
        before = state_of(hooked)
        objects = dict(hooked.namedparams())
        arrays = {path: (p.array, p.grad) for path, p in objects.items()}
        baked = bake(hooked)
        baked[0].W.array[...] = 0
        after = state_of(hooked)
        assert after.keys() == before.keys()
        for key, value in before.items():
            np.testing.assert_array_equal(after[key], value)
        for path, p in hooked.namedparams():
            assert p is objects[path]
            assert p.array is arrays[path][0]
            assert p.grad is arrays[path][1]
            assert p.update_rule is not None
        assert len(hooked[0].local_link_hooks) == 1
        twin = copy.deepcopy(hooked)
        for model in hooked, twin:      # and it trains on
            optimizer = optimizers.SGD().setup(model)
            optimizer.update(lambda m=model: F.mean(m(inputs) ** 2))
        for key, value in state_of(twin).items():
            np.testing.assert_array_equal(state_of(hooked)[key], value)

    def test_copy_shares_nothing_with_the_original(self):
        hooked = model_of()
        baked = bake(hooked)
        for a in [*state_of_arrays(baked)]:
            for b in state_of_arrays(hooked):
                assert not np.shares_memory(a, b)

    def test_copy_has_nothing_of_training(self):
        hooked = model_of()
        optimizer = optimizers.Adam().setup(hooked)
        optimizer.update(lambda: F.mean(hooked(make_input((3, 6))) ** 2))
        for param in bake(hooked).params():
            assert param.grad is None
            assert param.update_rule is None

    def test_in_place_the_gradient_of_the_raw_weight_is_gone(self):
        link = trained(SpectralNormalization())
        W, b = link.W, link.b
        assert W.grad is not None
        bake(link, in_place=True)
        assert link.W is not W
        assert link.W.name == 'W'
        assert link.W.grad is None
        assert link.W.update_rule is None
        assert link.b is b

    def test_training_goes_on_with_a_new_optimizer(self):
        link = bake(trained(SpectralNormalization(use_gamma=True)), True)
        before = link.W.array.copy()
        inputs = make_input((3, 6))
        optimizer = optimizers.SGD(.1).setup(link)
        optimizer.update(lambda: F.mean(link(inputs) ** 2))
        assert (link.W.array != before).any()

    def test_single_link_and_plain_models(self):
        link = trained(SpectralNormalization())
        plain = bake(link)
        with pytest.warns(
                errors.SpectralNormalizationWarning,
                match='Linear has no .*hooks, add them before its snapshot'
        ) as record:
            again = bake(plain)
        assert [w.filename for w in record] == [__file__]
        assert type(again) is L.Linear
        assert again is not plain
        assert_same_bits(again.W.array, plain.W.array)
        with pytest.warns(errors.NothingToBakeWarning):
            assert bake(plain, in_place=True) is plain

    def test_a_hook_without_effect(self):
        """Chainer takes it; what it makes of the weight is never used."""
        class Own(L.Linear):
            def __call__(self, x):
                return F.linear(x, self.W, self.b)

        model = chainer.Chain(own=Own(6, 5))
        hook = link_hooks.SpectralNormalization()
        model.own.add_hook(hook)
        for in_place in False, True:
            with pytest.raises(
                    errors.HookBypassedError,
                    match=r'/own \(Own\.__call__\).*link\.delete_hook'):
                bake(model, in_place)
        assert list(model.own.local_link_hooks.values()) == [hook]

    def test_other_hooks_stay(self):
        link = trained(SpectralNormalization())
        link.add_hook(link_hooks.TimerHook())
        assert list(bake(link).local_link_hooks) == ['TimerHook']
        assert list(link.local_link_hooks) == [
            'SpectralNormalization', 'TimerHook']

    def test_baked_model_can_be_copied_and_pickled(self):
        baked = bake(model_of(use_gamma=True))
        inputs = make_input((3, 6))
        expected = test_mode(baked, inputs)
        for make in (copy.deepcopy, lambda m: m.copy('copy'),
                     lambda m: pickle.loads(pickle.dumps(m))):
            assert_same_bits(test_mode(make(baked), inputs), expected)
        initialized = baked.copy('init')
        assert (initialized[0].W.array != baked[0].W.array).any()

    def test_hook_can_be_added_again(self):
        baked = bake(model_of(use_gamma=True))
        baked[0].add_hook(SpectralNormalization(use_gamma=True))
        baked(make_input((3, 6)))


def state_of_arrays(model):
    for param in model.params():
        yield param.array
    for link in model.links():
        for name in link._persistent:
            if isinstance(getattr(link, name), np.ndarray):
                yield getattr(link, name)


@pytest.mark.parametrize('in_place', [False, True])
class TestShared:

    def test_link_with_two_paths(self, in_place):
        link = L.Linear(5, 5).add_hook(SpectralNormalization())
        model = chainer.Sequential(link, F.relu, link)
        model(make_input((3, 5)))
        expected = test_mode(model, make_input((3, 5)))
        baked = bake(model, in_place)
        assert baked[0] is baked[2]
        assert_same_bits(test_mode(baked, make_input((3, 5))), expected)

    def test_copy_that_shares_arrays_and_hooks(self, in_place):
        link = trained(SpectralNormalization(use_gamma=True))
        model = chainer.Sequential(link, L.Linear(5, 6), link.copy('share'))
        model(make_input((3, 6)))
        expected = test_mode(model, make_input((3, 6)))
        baked = bake(model, in_place)
        assert_same_bits(test_mode(baked, make_input((3, 6))), expected)
        for part in baked:
            assert not part.local_link_hooks
            assert not hasattr(part, 'W_u')

    def test_copy_elsewhere_keeps_its_weight_and_hook(self, in_place):
        link = trained(SpectralNormalization())
        other = link.copy('share')
        expected = test_mode(other, make_input((3, 6)))
        bake(link, in_place)
        assert_same_bits(test_mode(other, make_input((3, 6))), expected)
        assert len(other.local_link_hooks) == 1

    @pytest.mark.parametrize('is_other_hooked', [False, True])
    def test_parameter_of_two_links(self, in_place, is_other_hooked):
        a, b = L.Linear(5, 5), L.Linear(5, 5)
        b.W = a.W
        a.add_hook(SpectralNormalization(factor=.5))
        if is_other_hooked:
            b.add_hook(SpectralNormalization(n_warmup=0))
        model = chainer.Sequential(a, b)
        model(make_input((3, 5)))
        expected = test_mode(model, make_input((3, 5)))
        baked = bake(model, in_place)
        assert baked[0].W is not baked[1].W
        assert_same_bits(test_mode(baked, make_input((3, 5))), expected)


class TestErrors:

    @pytest.mark.parametrize('in_place', [False, True])
    @pytest.mark.parametrize('hook', [
        SpectralNormalization, link_hooks.SpectralNormalization])
    def test_lazy_link(self, hook, in_place):
        model = chainer.Sequential(
            L.Linear(6, 5).add_hook(hook()),
            chainer.Sequential(L.Linear(None, 4).add_hook(hook())))
        before = state_of(model[0])
        with pytest.raises(
                errors.UninitializedWeightError, match=r'/1/0\.W'):
            bake(model, in_place)
        for key, value in before.items():
            np.testing.assert_array_equal(state_of(model[0])[key], value)
        assert model[0].local_link_hooks

    def test_sequential_with_a_lambda(self):
        """Which Chainer cannot copy, by any means."""
        model = chainer.Sequential(
            L.Linear(6, 5), lambda x: F.relu(x)).add_hook(
            ChainSpectralNormalization())
        expected = test_mode(model, make_input((3, 6)))
        with pytest.raises(ValueError, match='lambda'):
            bake(model)
        assert model[0].local_link_hooks
        baked = bake(model, in_place=True)
        assert_same_bits(test_mode(baked, make_input((3, 6))), expected)

    def test_lazy_link_without_a_hook_is_none(self):
        model = chainer.Sequential(
            L.Linear(6, 5).add_hook(SpectralNormalization()),
            L.Linear(None, 4))
        assert bake(model)[1].W.array is None

    def test_chainers_hook_that_has_no_vector_yet(self, tmp_path):
        serializers.save_npz(tmp_path / 'plain.npz', L.Linear(6, 5))
        link = L.Linear(None, 5).add_hook(link_hooks.SpectralNormalization())
        serializers.load_npz(tmp_path / 'plain.npz', link)
        with pytest.raises(errors.UninitializedWeightError):
            bake(link)

    @pytest.mark.parametrize('in_place', [False, True])
    @pytest.mark.parametrize('hook', [
        SpectralNormalization, link_hooks.SpectralNormalization])
    def test_inside_a_call(self, hook, in_place):
        class Curious(L.Linear):
            def forward(self, x):
                with pytest.raises(
                        errors.WeightInUseError, match=r'Curious /\.W'):
                    bake(self, in_place)
                return super().forward(x)

        link = Curious(6, 5).add_hook(hook())
        link(make_input((3, 6)))
        assert isinstance(link.W, chainer.Parameter)
        assert link.local_link_hooks

    def test_inside_a_call_of_a_chain(self):
        class Curious(chainer.Chain):
            def __init__(self):
                super().__init__()
                with self.init_scope():
                    self.link = L.Linear(6, 5)

            def forward(self, x):
                self.baked = bake(self.link)
                return self.link(x)

        chain = Curious().add_hook(ChainSpectralNormalization())
        inputs = make_input((3, 6))
        expected = test_mode(chain, inputs)
        assert_same_bits(chain.baked(inputs).array, expected)

    def test_nothing_is_changed_when_a_later_weight_fails(self):
        class Bad(SpectralNormalization):
            def normalize_weight(self, link):
                raise KeyboardInterrupt

        model = model_of()
        model[3].add_hook(Bad())
        before = state_of(model)
        W = model[0].W
        with pytest.raises(KeyboardInterrupt):
            bake(model, in_place=True)
        assert model[0].W is W
        assert isinstance(model[3].W, chainer.Parameter)
        assert model[0].local_link_hooks
        for key, value in before.items():
            np.testing.assert_array_equal(state_of(model)[key], value)


@pytest.mark.parametrize('statements', [
    'sn_function.bake(link()); from sn_function.bake import bake',
    'import sn_function.bake as module; assert module is sn_function.bake',
    *[pytest.param(text, marks=pytest.mark.slow) for text in (
        'from sn_function.bake import bake',
        'import sn_function.bake',
        'from sn_function import bake',
        'sn_function.bake(link()); import sn_function.bake',
        'import importlib; importlib.import_module("sn_function.bake")',
        'import importlib; importlib.reload(sys.modules["sn_function.bake"])',
    )]])
def test_function_is_not_replaced_by_the_module_of_its_name(statements):
    run(f'''
        import sys
        import sn_function

        def link():
            import chainer
            return chainer.links.Linear(2, 2).add_hook(
                sn_function.SpectralNormalization())

        {statements}
        for bake in sn_function.bake, sys.modules['sn_function.bake'].bake:
            assert not bake(link()).local_link_hooks
    ''')


# Copies of a model are made on the device, which cuda_on_host stands in for.
@pytest.mark.gpu
def test_device():
    link = L.Linear(6, 5).add_hook(SpectralNormalization(use_gamma=True))
    link.to_device('@cupy:0')
    inputs = link.xp.asarray(make_input((3, 6)))
    link(inputs)
    for in_place in False, True:
        expected = chainer.backends.cuda.to_cpu(test_mode(link, inputs))
        baked = bake(link, in_place)
        assert baked.W.device == chainer.get_device('@cupy:0')
        actual = chainer.backends.cuda.to_cpu(test_mode(baked, inputs))
        assert_same_bits(actual, expected)
