"""Rules that write parameters, or move them."""
from __future__ import annotations

import copy

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import numpy as np
from hypothesis import stateful
from hypothesis import strategies as st

from sn_function._links import gamma
from tests import cuda_on_host
from tests.cuda_on_host import array as stand_in
from tests.state_machine.base import COUNTS, INDEX, SEED, Base
from tests.state_machine.links import (
    CALL,
    axis_of,
    hooked,
    hooks_of,
    others_of,
    vector_of,
)
from tests.state_machine.oracle import smallest_subnormal

assert sn_function  # it is imported for what it does

VALUES = ['nan', 'one nan', 'inf', 'one inf', 'zero', 'tiny', 'subnormal',
          'huge', 'one entry', 'rank one', 'new']


def spoil(kind, array, seed):
    """Another value for a weight."""
    info = np.finfo(array.dtype)
    out = np.random.RandomState(seed).normal(size=array.shape)
    if kind == 'nan':
        out[...] = np.nan
    elif kind == 'inf':
        out[0] = np.inf
    elif kind == 'one nan':
        out.flat[seed % out.size] = np.nan
    elif kind == 'one inf':
        out.flat[seed % out.size] = -np.inf
    elif kind == 'zero':
        out[...] = 0
    elif kind == 'tiny':
        out *= float(info.tiny) * 100
    elif kind == 'subnormal':
        out = np.round(out * 4) * smallest_subnormal(array.dtype)
    elif kind == 'huge':
        out *= float(info.max) / 8
    elif kind == 'one entry':
        value = out.flat[0]
        out[...] = 0
        out.flat[seed % out.size] = value
    elif kind == 'rank one':
        out[...] = out[:1]
    return out.astype(array.dtype)


def is_nearly_subnormal(W):
    tiny = float(np.finfo(np.result_type(W.dtype, 'f')).tiny)
    return 0 < abs(W).max() < 1e6 * tiny


def first_rows(rec, name):
    """What the first row of the matrix is made of, and perhaps others."""
    W, axis = rec.params[name].array, axis_of(rec.link, name)
    if not rec.is_map(name):
        return np.moveaxis(W, axis, 0)[0]
    # A row is an entry of an input, of the first channel of its group.
    return np.moveaxis(W, 1 - axis, 0)[0]


class Weights(Base):

    @stateful.rule(
        i=INDEX, value=st.sampled_from(VALUES), seed=SEED,
        in_place=st.booleans(), name=st.sampled_from(['W', 'W', 'gamma', 'H']))
    def write(self, i, value, seed, in_place, name):
        rec = self.pick(i)
        name = rec.name_of(name, seed)
        param = rec.params.get(name)
        if param is None or param.array is None:
            return
        if 'gamma' in name:
            value = {'nan': 'nan', 'zero': 'zero'}.get(value, 'new')
            new = np.array({'nan': np.nan, 'zero': 0.0}.get(
                value, 0.5 + seed), param.dtype)
        else:
            with np.errstate(all='ignore'):
                new = spoil(value, param.array, seed)
        COUNTS[f'fault: {value}' if value != 'new' else 'new weights'] += 1
        self.assign(rec, name, new, in_place)

    @stateful.rule(i=INDEX, value=st.sampled_from([0, np.nan, np.inf]))
    def poison_u(self, i, value):
        """As a snapshot of a model that has met a NaN does."""
        rec = self.pick(i)
        for name in hooked(rec.link):
            u = vector_of(rec.link, name)
            if u is not None:
                COUNTS['fault: poisoned u'] += 1
                u[...] = value
        self.accept(rec)

    @stateful.rule(i=INDEX)
    def make_orthogonal_to_u(self, i):
        """From there power iteration would lead nowhere."""
        rec = self.pick(i)
        for name in hooked(rec.link):
            u, W = vector_of(rec.link, name), rec.params[name].array
            if u is not None and W is not None:
                COUNTS['fault: orthogonal u'] += 1
                n_groups = rec.n_groups(name)
                units = np.eye(u.size // n_groups)
                u[...] = np.tile(units[0], n_groups).reshape(u.shape)
                others = others_of(rec.link, name)
                if others is not None:
                    others[...] = np.tile(
                        units[1:1 + len(others)], n_groups).reshape(
                            others.shape)
                first_rows(rec, name)[...] = 0
        self.accept(rec)

    def assign(self, rec, name, new, in_place):
        if in_place:
            rec.params[name].array[...] = new
        else:
            rec.params[name].array = new
        self.data_changed(rec)

    @stateful.rule(i=INDEX, in_place=st.booleans())
    def recover(self, i, in_place):
        """A good weight leads to good numbers at once."""
        rec = self.pick(i)
        for name, good in rec.good.items():
            param = rec.params.get(name)
            if param is not None and param.array is not None and (
                    param.shape == good.shape):
                self.assign(
                    rec, name, good.astype(param.dtype), in_place)
        COUNTS['recoveries'] += 1
        if rec.W is None:
            return
        x = rec.x(np.random.RandomState(0))
        y = self.call(rec, x, False)
        if rec.is_ordinary:
            assert np.isfinite(y.array).all()

    @stateful.rule(i=INDEX, dtype=st.sampled_from('fde'))
    def change_dtype(self, i, dtype):
        rec = self.pick(i)
        if rec.W is None:
            return
        # Links that share a parameter or its array have to follow, and those
        # that share with these: what a link adds up must be of one dtype.
        group = [rec]
        for r in group:
            group += [other for other in self.records if other not in group
                      and r.shares_with(other)]
        for r in group:
            for name, param in r.params.items():
                if 'gamma' not in name and param.array is not None:
                    with np.errstate(all='ignore'):
                        param.array = param.array.astype(dtype)
        for r in group:
            self.data_changed(r)
        self.pending = []

    @stateful.rule(i=INDEX)
    def to_the_device_it_is_on(self, i):
        self.pick(i).link.to_device('@numpy')

    @stateful.rule(i=INDEX, seed=SEED, train=st.booleans(),
                   is_called=st.booleans())
    def to_another_device_and_back(self, i, seed, train, is_called):
        rec = self.pick(i)
        link = rec.link
        if rec.W is None or rec.standardized or rec.is_rnn or (
                rec.has_poison()):
            return  # on a device u is mended without a warning
        host = chainer.get_device('@numpy')

        def run(link, x):
            device = chainer.get_device('@cupy:0')
            link.to_device(device)
            if is_called:
                link(device.send(x))
            link.to_device(host)
            # What its state has would follow in the next call, which comes
            # after the stand-in is gone.
            for name in filter(rec.gamma_of, hooked(link)):
                if rec.params[rec.gamma_of(name)].array is not None:
                    gamma.initial(
                        rec.params[rec.gamma_of(name)], rec.params[name])
            copy.deepcopy(link)
            for weights in CALL.seen:
                for W in weights.values():
                    W.to_device(host)

        # There are kernels to compile, and what is subnormal is zero for
        # them: see docs/gpu.rst.
        is_called = is_called and cuda_on_host.available() and not any(
            is_nearly_subnormal(rec.params[n].array)
            or hooks_of(link)[n].n_vectors > 1 for n in hooked(link))
        with stand_in.installed():
            self.call(rec, rec.x(np.random.RandomState(seed)), train, run,
                      outputs=False, on_device=is_called)
        self.pending = []
        COUNTS['there and back'] += 1
