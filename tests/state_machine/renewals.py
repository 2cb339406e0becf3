"""Rules after which u, or gamma, belongs to another weight."""
from __future__ import annotations

import contextlib
import threading

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import numpy as np
import pytest
from chainer import serializers
from hypothesis import stateful
from hypothesis import strategies as st

from tests import reference
from tests.state_machine.base import COUNTS, INDEX, SEED, Base
from tests.state_machine.checks import flat
from tests.state_machine.links import (
    KINDS,
    hooked,
    moves,
    our_hooks,
    vector_of,
)
from tests.state_machine.oracle import TOLERANCES, assert_close, same_bits
from tests.state_machine.states import norm_for_gamma
from tests.test_link_hooks import save

SHAPES = {
    'linear': {'W': (7, 5), 'b': (7,)},
    'convolution': {'W': (5, 3, 2, 2), 'b': (5,)},
    'deconvolution': {'W': (3, 5, 2, 2), 'b': (5,)},
    'embedding': {'W': (9, 5)},
    'two': {'W': (5, 5), 'H': (7, 5)},
}


class Renewals(Base):

    @stateful.rule(i=INDEX, seed=SEED, train=st.booleans())
    def plain_snapshot(self, i, seed, train):
        """Of a link without the hook, into one that has it."""
        rec = self.pick(i)
        plain = self.make(rec.kind, False, rec.dtype)
        for param in plain.params():
            param.array *= param.dtype.type(3)
        serializers.load_npz(save(plain), rec.link, strict=False)
        self.data_changed(rec)
        for name, param in plain.namedparams():
            assert same_bits(rec.data[name.lstrip('/')], param.array)
        COUNTS['plain snapshots'] += 1
        self.call(rec, rec.x(np.random.RandomState(seed)), train)

    @stateful.rule(
        i=INDEX, seed=SEED, train=st.booleans(),
        size=st.sampled_from([0.02, 0.3, 1.0, 30.0]))
    def drawn_in_place(self, i, seed, train, size):
        """As an initializer does."""
        rec = self.pick(i)
        if rec.W is None:
            return
        draw = chainer.initializers.Normal(
            size, rng=np.random.RandomState(seed))
        for name in hooked(rec.link):
            draw(rec.params[name].array)
        self.data_changed(rec)
        COUNTS['weights drawn in place'] += 1
        self.call(rec, rec.x(np.random.RandomState(seed)), train)

    @stateful.rule(i=INDEX, j=INDEX, seed=SEED, train=st.booleans(),
                   with_gamma=st.booleans())
    def average(self, i, j, seed, train, with_gamma):
        """Of the parameters of two models, which leaves u as it was."""
        rec, other = self.pick(i), self.pick(j)
        if rec is other or rec.kind != other.kind or (
                rec.dtype != other.dtype):
            return
        for name, param in rec.params.items():
            y = other.params.get(name)
            if param.array is not None and y is not None and (
                    y.array is not None) and (
                    with_gamma or 'gamma' not in name):
                with np.errstate(all='ignore'):
                    param.array[...] = param.array / 2 + y.array / 2
        self.data_changed(rec)
        COUNTS['averages'] += 1
        self.call(rec, rec.x(np.random.RandomState(seed)), train)

    @stateful.rule(i=INDEX, seed=SEED, n=st.integers(1, 4),
                   rate=st.sampled_from([0.01, 0.3]))
    def trained_in_test_mode(self, i, seed, n, rate):
        """Unless the hook says so, nothing moves u on, and it lags behind."""
        rec = self.pick(i)
        rng = np.random.RandomState(seed)
        optimizer = chainer.optimizers.SGD(rate).setup(rec.link)
        for _ in range(n):
            x = rec.x(rng)
            rec.link.cleargrads()
            y = self.call(rec, x, train=False)
            if not rec.is_ordinary:
                return
            with np.errstate(all='ignore'):
                F.sum(y * y).backward()
                optimizer.update()
            self.data_changed(rec)
        COUNTS['steps in test mode'] += n
        self.call(rec, rec.x(rng), train=False)

    @stateful.rule(i=INDEX, seed=SEED, train=st.booleans(),
                   how=st.sampled_from(['lost', 'another', 'other norm']))
    def another_map(self, i, how, seed, train):
        """Of another size, or none, or a snapshot has that of a matrix."""
        rec = self.pick(i)
        link = rec.link
        if rec.W is None or rec.u.keys() != {'W'} or not rec.is_map('W'):
            return
        rng = np.random.RandomState(seed)
        if how == 'other norm':
            hook = our_hooks(link)[0]
            other = self.make(rec.kind, False, rec.dtype).add_hook(
                sn_function.SpectralNormalization(
                    use_gamma=hook.use_gamma))
            u = other.W_u.copy()
            serializers.load_npz(save(link), other, strict=False)
            assert same_bits(other.W.array, rec.W)
            assert same_bits(other.W_u, u)
            serializers.load_npz(save(other), link)
            assert link.W_map is None
        else:
            channels = KINDS[rec.kind].x_shape[1]
            shape = (channels, *rng.randint(2, 6, 2))
            link.W_map = None if how == 'lost' else rng.normal(
                size=shape).astype(rec.dtype)
            if hasattr(link, 'W_maps'):
                link.W_maps = None
        rec.accept()
        self.share(rec)
        COUNTS[f'maps: {how}'] += 1
        self.call(rec, rec.x(rng), train)

    @stateful.rule(i=INDEX, gamma=st.booleans())
    def refresh(self, i, gamma):
        rec = self.pick(i)
        are_finite = [
            np.isfinite(rec.params[n].array).all() for n in hooked(rec.link)
            if rec.params[n].array is not None]
        with contextlib.nullcontext() if all(are_finite) else (
                pytest.warns(UserWarning, match='holds NaN or Inf')):
            sn_function.refresh(rec.link, gamma=gamma)
        before = rec.data
        rec.accept()
        for name in hooked(rec.link):
            W = rec.params[name].array
            if W is None or not np.isfinite(W).all() or (
                    rec.u[name] is None):
                continue
            gamma_name = rec.gamma_of(name)
            if gamma_name and before[gamma_name] is not None:
                if gamma:
                    rec.made[name] = rec.data[gamma_name]
                    rec.updates[name] = rec.n_updates(name)
                    rec.is_unsure.discard(name)
                    assert_close(rec.data[gamma_name], norm_for_gamma(
                        W, rec.form(name), rec.data[gamma_name].dtype),
                        1e-6)
                else:
                    assert same_bits(
                        rec.data[gamma_name], before[gamma_name])
            if W.any():
                self.check_refreshed(rec, name, W)
        self.share(rec)
        COUNTS['refreshed'] += 1

    def check_refreshed(self, rec, name, W):
        """u is of length 1, and W^T takes it to the length of the norm."""
        A = rec.form(name).matrix(
            W.astype('d') / float(abs(W.astype('d')).max()))
        u = flat(vector_of(rec.link, name))
        tolerance = TOLERANCES[W.dtype.char]
        assert u.dtype == W.dtype
        u = u.astype('d')
        assert abs(np.linalg.norm(u) / rec.n_groups(
            name) ** 0.5 - 1) <= tolerance
        assert np.linalg.norm(A.T @ u) >= (
            1 - tolerance) * reference.true_norm(A)

    @stateful.rule(i=INDEX, seed=SEED, train=st.booleans(),
                   is_new_parameter=st.booleans())
    def another_shape(self, i, seed, train, is_new_parameter):
        """And back: u and gamma are made anew, with one warning each time."""
        rec = self.pick(i)
        # Where gamma was loaded before a lazy weight, its shape is not known.
        # Along another axis u may have the length that it had.
        if any(hook.given_axis is not None for hook in our_hooks(rec.link)):
            return
        if rec.W is None or rec.kind not in SHAPES or rec.standardized or (
                rec.is_unsure) or any(map(rec.is_map, rec.u)) or (
                rec.is_shared or any(u is None for u in rec.u.values())
        ) or any(r is not rec and r.shares_with(rec) for r in self.records):
            return
        rng = np.random.RandomState(seed)
        shapes = SHAPES[rec.kind]
        before = {n: (rec.params[n], rec.params[n].array) for n in shapes}
        for name, shape in shapes.items():
            array = rng.normal(size=shape).astype(rec.dtype)
            self.replace(rec, name, array, chainer.Parameter(
                array) if is_new_parameter else rec.params[name])
        self.call_with_other_shape(rec, rng, train)
        for name, (param, array) in before.items():
            self.replace(rec, name, array, param)
        self.call_with_other_shape(rec, rng, train)
        self.pending = []
        COUNTS['weights of another shape'] += 2

    def replace(self, rec, name, array, param):
        param.array = array
        with rec.link.init_scope():
            setattr(rec.link, name, param)
        rec.params[name] = param
        rec.data[name] = array.copy()

    def call_with_other_shape(self, rec, rng, train):
        """The call expects the warning; the next one expects none."""
        for _ in range(2):
            self.call(rec, rec.x(rng), train)

    @stateful.rule(i=INDEX, seed=SEED, n=st.integers(1, 3))
    def threads_of_one_link(self, i, seed, n):
        """In test mode; each has what a call without the other has."""
        rec = self.pick(i)
        if rec.standardized or any(
                moves(rec.link, name, False) for name in hooked(rec.link)):
            return
        rng = np.random.RandomState(seed)
        xs = [rec.x(rng) for _ in range(2)]
        ys = [self.call(rec, x, train=False).array for x in xs]
        errors = []
        barrier = threading.Barrier(2)

        def work(x, y):
            try:
                barrier.wait()
                with chainer.using_config('train', False), np.errstate(
                        all='ignore'):
                    for _ in range(n):
                        np.testing.assert_array_equal(rec.link(x).array, y)
            except BaseException as e:
                errors.append(e)

        threads = [threading.Thread(target=work, args=args)
                   for args in zip(xs, ys)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        COUNTS['threads of one link'] += 1
        if errors:
            raise errors[0]
