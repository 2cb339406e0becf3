"""The optimizer and the check for ChainerMN, on ranks that are threads.

With MPI the same is asserted by tests/mpi: ``make test-mpi``.
"""
import copy
import functools

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np
import pytest
from chainer import link_hooks, optimizers, serializers
from chainer.backends import cuda

from sn_function import SpectralNormalization, distributed, errors
from sn_function.extensions import SpectralNormPenaltyState
from sn_function.optimizer_hooks import (
    SpectralNormPenalty,
    SpectralNormProjection,
)
from tests.mpi import threads

HOOKS = {'sn_function': SpectralNormalization,
         'several': functools.partial(SpectralNormalization, n_vectors=3),
         'chainer': link_hooks.SpectralNormalization}
KINDS = pytest.mark.parametrize('kind', HOOKS)
SIZES = pytest.mark.parametrize('size', [
    2, pytest.param(3, marks=pytest.mark.slow), 4])


def make_models(size, kind='sn_function', n_in=5, **settings):
    """One for each rank, each with another W and u."""
    def add(link):
        return link.add_hook(HOOKS[kind](**settings))

    return [chainer.Sequential(
        add(L.Linear(n_in, 6)), F.leaky_relu, add(L.Linear(6, 3)))
        for _ in range(size)]


def arrays(model):
    """Copies of all that has to be the same."""
    found = {path: p.array.copy() for path, p in model.namedparams()}
    for path, link in model.namedlinks():
        for name in distributed.vector_names(link):
            found[f'{path}/{name}'] = getattr(link, name).copy()
    return found


def is_one(models):
    first, *others = map(arrays, models)
    assert all(other.keys() == first.keys() for other in others)
    return all(threads.same([each[key] for each in (first, *others)])
               for key in first)


def batches(comm, n=4):
    rng = np.random.RandomState(comm.rank)
    while True:
        yield rng.normal(size=(n, 5)).astype('f')


def loss(model, x):
    return F.mean((model(x) - 1) ** 2)


def train(comm, model, steps, optimizer=None, make=optimizers.Adam,
          create=distributed.create_multi_node_optimizer):
    """Trains and returns the arrays after each update."""
    if optimizer is None:
        optimizer = create(make(), comm).setup(model)
    found = []
    for _, x in zip(range(steps), batches(comm)):
        optimizer.update(loss, model, x)
        found.append(arrays(model))
    return found


def all_same(ranks):
    """For each step, whether all is the same on all ranks."""
    return [all(threads.same([step[key] for step in steps])
                for key in steps[0]) for steps in zip(*ranks)]


class TestOptimizer:

    @KINDS
    @SIZES
    @pytest.mark.parametrize('n_in', [5, None])
    def test_u_is_the_same_in_each_step(self, size, kind, n_in):
        models = make_models(size, kind, n_in, use_gamma=True)
        assert all(all_same(threads.run(size, train, models, 30)))

    @pytest.mark.parametrize('n_vectors', [1, 2])
    @pytest.mark.parametrize('settings', [{}, {'insize': 5}], ids=str)
    def test_maps_are_the_same_in_each_step(self, n_vectors, settings):
        models = [chainer.Sequential(
            functools.partial(F.reshape, shape=(-1, 1, 5)),
            L.Convolution1D(1, 3, 2).add_hook(SpectralNormalization(
                norm='operator', n_vectors=n_vectors, use_gamma=True,
                **settings))) for _ in range(2)]
        assert all(all_same(threads.run(2, train, models, 10)))
        assert models[0][1].W_map.shape == (1, 5)

    def test_in_test_mode_along_another_axis(self):
        models = make_models(2, axis=1, update_u='always')

        def program(comm, model):
            with chainer.using_config('train', False):
                return train(comm, model, 10)

        found = threads.run(2, program, models)
        assert all(all_same(found))
        assert models[0][0].W_u.shape == (5,)
        assert (found[0][0]['/0/W_u'] != found[0][-1]['/0/W_u']).any()

    @pytest.mark.parametrize('insize', [None, 5])
    def test_a_map_of_a_later_call(self, insize):
        """It is one only if the hook has its size, or by a broadcast."""
        models = [chainer.Sequential(*[
            L.Convolution1D(1, 1, 3, pad=1).add_hook(SpectralNormalization(
                norm='operator', insize=size)) for size in (None, insize)])
            for _ in range(2)]

        def program(comm, model):
            optimizer = distributed.create_multi_node_optimizer(
                optimizers.SGD(), comm).setup(model)
            x = np.ones((1, 1, 5), 'f')
            for n_links in (1, 1, 2):
                optimizer.update(lambda n: F.sum(chainer.Sequential(
                    *model[:n])(x) ** 2), n_links)

        threads.run(2, program, models)
        assert is_one(models) == (insize is not None)
        threads.run(2, distributed.bcast_data, models)
        assert is_one(models)

    def test_a_bad_map_is_made_anew(self):
        models = [L.Convolution1D(1, 3, 2).add_hook(SpectralNormalization(
            norm='operator')) for _ in range(2)]
        for model in models:
            model(np.ones((1, 1, 5), 'f'))
        models[0].W_map[...] = 0
        threads.run(2, distributed.bcast_data, models)
        assert is_one(models)
        assert models[1].W_map.any()
        assert models[1].W_map.shape == (1, 5)

    @KINDS
    def test_that_of_chainermn_leaves_each_rank_its_own(self, kind):
        found = threads.run(
            2, train, make_models(2, kind), 30, None, optimizers.Adam,
            chainermn.create_multi_node_optimizer)
        assert not any(all_same(found))
        assert all(threads.same([step['/0/W'] for step in steps])
                   for steps in zip(*found))

    def test_nothing_is_sent_after_the_start(self):
        def program(comm, model):
            train(comm, model, 5)
            return comm.sent

        sent = threads.run(2, program, make_models(2))
        begin = sent[0].index('multi_node_mean_grad')
        assert begin > 0
        assert sent[0][begin:] == ['multi_node_mean_grad'] * 4
        assert sent[0] == sent[1]

    def test_first_update_takes_what_rank_0_has(self):
        models = make_models(3, use_gamma=True)
        expected = arrays(models[0])
        threads.run(3, train, models, 1)
        assert is_one(models)
        for path, p in models[2].namedparams():
            np.testing.assert_array_equal(p.array, expected[path])

    def test_first_update_is_not_lost_where_ranks_are_the_same(self):
        model, = make_models(1)
        models = [copy.deepcopy(model) for _ in range(2)]
        threads.run(2, train, models, 1)
        assert is_one(models)
        assert (models[0][0].W.array != model[0].W.array).any()

    def test_two_ranks_with_half_the_batch_follow_one_with_all_of_it(self):
        def program(comm, model, xs):
            optimizer = distributed.create_multi_node_optimizer(
                optimizers.MomentumSGD(.1), comm).setup(model)
            for x in xs:
                own = len(x) // comm.size
                optimizer.update(
                    loss, model, x[own * comm.rank:own * (comm.rank + 1)])

        model, = make_models(1, use_gamma=True)
        xs = np.random.normal(size=(30, 8, 5)).astype('f')
        found = []
        for size in 1, 2, 4:
            models = [copy.deepcopy(model) for _ in range(size)]
            threads.run(size, program, models, xs)
            assert is_one(models)
            found.append(arrays(models[0]))
        for key, expected in found[0].items():
            for actual in found[1:]:
                np.testing.assert_allclose(
                    actual[key], expected, rtol=1e-4, atol=1e-5)

    def test_lazy_link_that_is_first_called_later(self):
        class Late(chainer.Chain):
            def __init__(self):
                super().__init__()
                with self.init_scope():
                    self.l0 = L.Linear(5, 6).add_hook(SpectralNormalization())
                    self.l1 = L.Linear(None, 6).add_hook(
                        SpectralNormalization(use_gamma=True))
                self.calls = 0

            def forward(self, x):
                self.calls += 1
                h = self.l0(x)
                return h + self.l1(h) if self.calls > 3 else h

        def program(comm, model):
            optimizer = distributed.create_multi_node_optimizer(
                optimizers.Adam(), comm).setup(model)
            same = []
            for _, x in zip(range(8), batches(comm)):
                optimizer.update(loss, model, x)
                same.append(model.l0.W_u.copy())
                distributed.assert_synchronized(comm, model)
            return same

        for us in zip(*threads.run(2, program, [Late(), Late()])):
            assert threads.same(us)

    def test_hook_of_a_chain_in_a_scope(self):
        def program(comm, model):
            optimizer = distributed.create_multi_node_optimizer(
                optimizers.Adam(), comm).setup(model)
            for _, x in zip(range(10), batches(comm)):
                with sn_function.cached(model):
                    optimizer.update(
                        lambda x=x: loss(model, x) + loss(model, -x))
            distributed.assert_synchronized(comm, model)

        models = [chainer.Sequential(L.Linear(5, 4), F.relu, L.Linear(4, 2))
                  .add_hook(sn_function.ChainSpectralNormalization())
                  for _ in range(2)]
        threads.run(2, program, models)
        assert is_one(models)

    def test_float16_with_float32_copies(self):
        # Steps of its own have left each rank a float32 copy of its own.
        def program(comm, model, optimizer):
            optimizer = distributed.create_multi_node_optimizer(
                optimizer, comm)
            for _, x in zip(range(10), batches(comm)):
                optimizer.update(loss, model, x.astype('e'))

        with chainer.using_config('dtype', np.dtype('e')):
            models = make_models(2)
        assert models[0][0].W.dtype == models[0][0].W_u.dtype == np.float16
        made = []
        for model in models:
            optimizer = optimizers.MomentumSGD(.01)
            optimizer.use_fp32_update()
            optimizer.setup(model).update(
                loss, model, np.ones((2, 5), 'e'))
            assert model[0].W.update_rule._fp32_param is not None
            made.append(optimizer)
        threads.run(2, program, models, made)
        assert is_one(models)

    def test_double_buffering(self, monkeypatch):
        # Needs a device, but for these: the gradients of a step are used in
        # the next one.
        class Stream:
            def __init__(self, non_blocking=False):
                pass

            def synchronize(self):
                pass

        Stream.null = Stream()
        monkeypatch.setattr(chainer.cuda, 'Stream', Stream)

        def create(optimizer, comm):
            comm._multi_node_mean_grad_async = (
                lambda model, zero_fill, stream:
                comm.multi_node_mean_grad(model, zero_fill))
            kind = chainermn.optimizers._DoubleBufferingOptimizer
            return distributed._synchronizing(kind)(optimizer, comm, True)

        for same in False, True:
            models = make_models(2)
            if same:
                models[1] = copy.deepcopy(models[0])
            found = threads.run(
                2, train, models, 10, None, optimizers.Adam, create)
            assert all(all_same(found))
            assert (found[0][-1]['/0/W'] != found[0][2]['/0/W']).any()

    @pytest.mark.gpu
    def test_on_a_device(self):
        def program(comm, model):
            model.to_device('@cupy:0')
            optimizer = distributed.create_multi_node_optimizer(
                optimizers.Adam(), comm).setup(model)
            for _, x in zip(range(5), batches(comm)):
                optimizer.update(loss, model, model.device.send(x))
                distributed.assert_synchronized(comm, model)
            return [cuda.to_cpu(model[i].W_u) for i in (0, 2)]

        models = make_models(2, use_gamma=True)
        for us in zip(*threads.run(2, program, models)):
            assert threads.same(us)
        assert isinstance(models[1][0].W_u, cuda.ndarray)


class TestResume:

    makers = pytest.mark.parametrize('make', [
        optimizers.SGD, optimizers.MomentumSGD, optimizers.Adam])

    def resumed(self, comm, model, state, make, steps):
        """A rank that starts from a snapshot of model and optimizer."""
        optimizer = distributed.create_multi_node_optimizer(
            make(), comm).setup(model)
        for target, npz in zip((model, optimizer), state):
            if npz is not None:
                serializers.NpzDeserializer(npz).load(target)
        return train(comm, model, steps, optimizer), optimizer

    def snapshot(self, model, optimizer):
        found = []
        for target in model, optimizer:
            serializer = serializers.DictionarySerializer()
            serializer.save(target)
            found.append({k: np.array(x) for k, x in
                          serializer.target.items()})
        return found

    def one(self, make, steps):
        """A snapshot of a run on one rank."""
        model, = make_models(1, use_gamma=True)
        optimizer = make().setup(model)
        for _ in range(steps):
            x = np.random.normal(size=(4, 5)).astype('f')
            optimizer.update(loss, model, x)
        return self.snapshot(model, optimizer)

    @makers
    @pytest.mark.parametrize('n_in', [5, None])
    def test_goes_on_with_the_same_numbers(self, make, n_in):
        def unbroken(comm, model):
            optimizer = distributed.create_multi_node_optimizer(
                make(), comm).setup(model)
            for i, x in zip(range(6), batches(comm)):
                if i == 3:
                    state = self.snapshot(model, optimizer)
                optimizer.update(loss, model, x)
            return state, arrays(model)

        def program(comm, model, state):
            optimizer = distributed.create_multi_node_optimizer(
                make(), comm).setup(model)
            for target, npz in zip((model, optimizer), state):
                serializers.NpzDeserializer(npz).load(target)
            for i, x in zip(range(6), batches(comm)):
                if i >= 3:
                    optimizer.update(loss, model, x)
            return arrays(model)

        expected = threads.run(2, unbroken, make_models(2, use_gamma=True))
        actual = threads.run(
            2, program, make_models(2, n_in=n_in, use_gamma=True),
            [state for state, _ in expected])
        for (_, a), b in zip(expected, actual):
            assert a.keys() == b.keys()
            for key in a:
                np.testing.assert_array_equal(a[key], b[key], key)

    @makers
    @pytest.mark.parametrize('n_in', [5, None])
    @pytest.mark.parametrize('without', [None, 0, 1])
    def test_from_different_snapshots(self, make, n_in, without):
        states = [self.one(make, 3 + rank) for rank in range(2)]
        if without is not None:     # this rank found none
            states[without] = None, None
        found = threads.run(
            2, self.resumed, make_models(2, n_in=n_in, use_gamma=True),
            states, make, 8)
        assert all(all_same([steps for steps, _ in found]))
        ts = [optimizer.t for _, optimizer in found]
        assert ts == [7 if without == 0 else 3 + 7] * 2

    def test_with_the_same_model_and_another_state_of_the_optimizer(self):
        states = [self.one(optimizers.Adam, 3) for _ in range(2)]
        states[1][0] = states[0][0]
        found = threads.run(
            2, self.resumed, make_models(2, use_gamma=True), states,
            optimizers.Adam, 8)
        assert all(all_same([steps for steps, _ in found]))

    @pytest.mark.parametrize('hook', [
        lambda: SpectralNormPenalty(0.5),
        lambda: SpectralNormProjection(0.5, 1)])
    def test_vectors_of_a_hook_that_one_rank_has_loaded(self, hook):
        def make(model):
            optimizer = optimizers.SGD(0.1).setup(model)
            optimizer.add_hook(hook())
            return optimizer, SpectralNormPenaltyState(optimizer)

        models = [chainer.Sequential(L.Linear(5, 6), F.tanh, L.Linear(6, 1))
                  for _ in range(3)]
        model = models.pop()
        optimizer, state = make(model)
        for _ in range(3):
            x = np.random.normal(size=(4, 5)).astype('f')
            optimizer.update(loss, model, x)
        npz, _ = self.snapshot(model, optimizer)
        vectors, _ = self.snapshot(state, optimizer)
        assert vectors

        def program(comm, model):
            serializers.NpzDeserializer(npz).load(model)
            optimizer, state = make(model)
            if comm.rank == 0:
                serializers.NpzDeserializer(vectors).load(state)
            return train(comm, model, 4, distributed.
                         create_multi_node_optimizer(optimizer, comm))

        assert all(all_same(threads.run(2, program, models)))


class TestBcastData:

    def run(self, models):
        return threads.run(len(models), distributed.bcast_data, models)

    @KINDS
    @SIZES
    def test_sends_parameters_and_vectors_of_rank_0(self, size, kind):
        models = make_models(size, kind, use_gamma=True)
        expected = arrays(models[0])
        self.run(models)
        assert is_one(models)
        for key, x in arrays(models[-1]).items():
            np.testing.assert_array_equal(x, expected[key])

    def call(self, models):
        """A call with the same input moves u as far on all ranks."""
        x = np.random.normal(size=(2, 5)).astype('f')
        for _ in range(3):
            for model in models:
                model(x)
        return is_one(models)

    def test_other_persistents_stay(self):
        models = [chainer.Sequential(
            L.BatchNormalization(5),
            L.Linear(5, 2).add_hook(SpectralNormalization()))
            for _ in range(2)]
        for i, model in enumerate(models):
            model[0].avg_mean[...] = i
        self.run(models)
        assert is_one(models)
        assert models[1][0].avg_mean.tolist() == [1] * 5

    def test_uninitialized(self):
        models = make_models(2, n_in=None)
        self.run(models)
        assert models[1][0].W_u is None
        assert threads.same([m[2].W_u for m in models])

    @pytest.mark.parametrize('rank', [0, 1])
    def test_vector_that_a_snapshot_has_brought_to_one_rank(self, rank):
        full, = make_models(1)
        serializer = serializers.DictionarySerializer()
        serializer.save(full)
        npz = {k: x for k, x in serializer.target.items()
               if k.endswith('W_u')}
        models = make_models(2, n_in=None)
        serializers.NpzDeserializer(npz, strict=False).load(models[rank])
        assert (models[rank][0].W_u is None) == (models[1 - rank][0].W_u
                                                 is not None)
        self.run(models)
        if rank == 0:
            assert threads.same([m[0].W_u for m in models])
        else:
            assert models[1][0].W_u is None

    def test_copies_whose_weights_were_initialized_anew(self):
        # Each would warm its u up in the first call, if that is still the
        # one that was copied.
        original, = make_models(1, use_gamma=True)
        models = [original.copy('init') for _ in range(2)]
        self.run(models)
        assert is_one(models)
        assert self.call(models)

    @pytest.mark.parametrize('bad', [0, np.nan, np.inf])
    @pytest.mark.parametrize('rank', [0, 1])
    def test_vector_without_a_direction(self, bad, rank):
        # Each rank would make another one in its first call.
        models = make_models(2)
        models[rank][0].W_u[...] = bad
        self.run(models)
        assert np.isfinite(models[0][0].W_u).all()
        assert self.call(models)

    @pytest.mark.parametrize('rank', [0, 1])
    @pytest.mark.parametrize('is_missing', [False, True])
    def test_others_of_several_that_are_bad_or_missing(
            self, rank, is_missing):
        # As of a snapshot of one vector, which one rank has loaded, or all.
        models = make_models(2, 'several')
        for model in models[rank:]:
            if is_missing:
                model[0].W_us = None
            else:
                model[0].W_us[1] = 0
        u = models[0][0].W_us[0].copy() if rank == 1 else None
        self.run(models)
        assert is_one(models)
        assert models[1][0].W_us.shape == (2, 6)
        assert models[1][0].W_us.any(axis=1).all()
        if rank == 1:
            np.testing.assert_array_equal(models[1][0].W_us[0], u)
        assert self.call(models)

    @pytest.mark.parametrize('kind', ['sn_function', 'several'])
    def test_vectors_that_links_share_stay_shared(self, kind):
        models = make_models(2, kind)
        twin = models[1].copy('share')
        assert twin[0].W_u is models[1][0].W_u
        self.run(models)
        for name in distributed.vector_names(twin[0]):
            assert getattr(twin[0], name) is getattr(models[1][0], name)
            assert threads.same([getattr(m[0], name) for m in models])

    @KINDS
    def test_vector_of_another_dtype(self, kind):
        models = make_models(2, kind)
        models[1][0].W_u = models[1][0].W_u.astype('d')
        self.run(models)
        assert is_one(models)


class TestAssertSynchronized:

    def check(self, models):
        def program(comm, model):
            try:
                distributed.assert_synchronized(comm, model)
            except errors.NotSynchronizedError as e:
                return e.differences, str(e)
            return None

        found = threads.run(len(models), program, models)
        assert all(each == found[0] for each in found)  # on all ranks
        return found[0]

    @KINDS
    def test_passes_where_all_is_one(self, kind):
        model, = make_models(1, kind, use_gamma=True)
        assert self.check([copy.deepcopy(model) for _ in range(3)]) is None

    def test_of_one_rank(self):
        assert self.check(make_models(1)) is None

    @KINDS
    def test_names_layer_and_ranks(self, kind):
        model, = make_models(1, kind)
        models = [copy.deepcopy(model) for _ in range(4)]
        for rank in 1, 3:
            u = models[rank][2].W_u
            u[0] = np.nextafter(u[0], 2, dtype='f')     # one bit
        differences, message = self.check(models)
        assert differences == {'/1/W_u': [1, 3]}
        assert '/1/W_u of ranks 1, 3.' in message
        models[2][0].W.array[1, 1] += 1
        models[2][0].W_u[...] = models[0][0].W_u
        differences, message = self.check(models)
        assert differences == {'/0/W': [2], '/1/W_u': [1, 3]}
        assert '/0/W of rank 2, /1/W_u of ranks 1, 3.' in message

    def test_other_structure(self):
        models = [copy.deepcopy(make_models(1)[0])] * 2 + make_models(1)
        models[2] = copy.deepcopy(models[0])
        models[2][0].add_param('extra', (1,), initializer=0)
        models[2][2].delete_hook('SpectralNormalization')
        assert self.check(models)[0] == {'/0/extra': [2], '/1/W_u': [2]}

    def test_dtype_and_shape_count(self):
        model, = make_models(1)
        for change in (lambda x: x.astype('d'), lambda x: x[None],
                       lambda x: None):
            other = copy.deepcopy(model)
            other[0].W_u = change(other[0].W_u)
            assert self.check([model, other])[0] == {'/0/W_u': [1]}

    def test_nan_is_equal_to_itself(self):
        model, = make_models(1)
        model[0].W.array[0] = np.nan
        assert self.check([model, copy.deepcopy(model)]) is None

    def test_uninitialized(self):
        model, = make_models(1, n_in=None)
        other = copy.deepcopy(model)
        assert self.check([model, other]) is None
        other[0](np.ones((1, 5), 'f'))
        assert self.check([model, other])[0] == {
            '/0/W': [1], '/0/W_u': [1]}

    def test_statistics_of_batch_normalization_may_differ(self):
        model = L.BatchNormalization(3)
        other = copy.deepcopy(model)
        other.avg_mean[...] = 1
        assert self.check([model, other]) is None

    def test_link_itself(self):
        model = L.Linear(3, 2).add_hook(SpectralNormalization())
        other = copy.deepcopy(model)
        other.W_u[...] = -other.W_u
        assert self.check([model, other])[0] == {'/W_u': [1]}

    def test_message_of_many(self):
        message = str(errors.NotSynchronizedError(
            {f'/{i}/W': list(range(1, 1024)) for i in range(100)}))
        assert len(message) < 1500
        assert '/7/W of ranks 1, 2, 3, 4, 5, 6, 7, 8 and 1015 more' in message
        assert 'and 92 more' in message

    def test_call_on_one_rank_is_found(self):
        model, = make_models(1)
        other = copy.deepcopy(model)
        x = np.ones((1, 5), 'f')
        with chainer.using_config('train', False):
            other(x)
        assert self.check([model, other]) is None
        other(x)
        assert set(self.check([model, other])[0]) == {'/0/W_u', '/1/W_u'}
