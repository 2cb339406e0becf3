"""Rules that copy links, and save and load them."""
from __future__ import annotations

import copy
import pickle

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.links as L
import numpy as np
from chainer import link_hooks, serializers
from hypothesis import stateful
from hypothesis import strategies as st

from tests.state_machine.base import COUNTS, INDEX, SEED, Base
from tests.state_machine.links import hooked, our_hooks
from tests.state_machine.oracle import copy_of, same_bits, same_values
from tests.state_machine.record import Record
from tests.test_link_hooks import save

assert sn_function  # it is imported for what it does


class Copies(Base):

    @stateful.rule(
        i=INDEX, how=st.sampled_from([
            'share', 'copy', 'init', 'deepcopy', 'pickle', 'repeat share',
            'repeat copy', 'repeat init', 'twice, init']))
    def copy_link(self, i, how):
        rec = self.pick(i)
        link = rec.link
        if 'share' in how and rec.W is None:
            return
        if 'init' in how:
            # In Chainer a gradient of another dtype than the first is in
            # the way of an initialization.
            link.cleargrads()
        with self.maybe_not_ordinary(rec):
            if how == 'deepcopy':
                others = [copy.deepcopy(link)]
            elif how == 'pickle':
                others = [pickle.loads(pickle.dumps(link))]
            elif how == 'twice, init':
                others = [link.copy('share').copy('init')]
            elif how.startswith('repeat'):
                others = list(link.repeat(2, mode=how.split()[1]))
            else:
                others = [link.copy(how)]
        rec.check()
        for other in others:
            self.put_copy(rec, other, how)

    def put_copy(self, rec, link, how):
        other = Record(link, rec.kind)
        other.standardized = rec.standardized
        is_new = 'init' in how
        for name in hooked(link):
            assert same_bits(other.u[name], rec.u[name])
            assert same_bits(other.others[name], rec.others[name])
            if not is_new:
                assert same_bits(other.data[name], rec.data[name])
        if 'share' in how:
            rec.is_shared = other.is_shared = True
            other.family = rec.family
            # As the initializer is.
            other.made, other.is_unsure = rec.made, rec.is_unsure
            other.updates = rec.updates
        elif not is_new:
            other.made = {n: copy_of(a) for n, a in rec.made.items()}
            other.is_unsure = set(rec.is_unsure)
            other.updates = dict(rec.updates)
        if rec.is_rnn and how not in ('deepcopy', 'pickle'):
            rec.is_shared = other.is_shared = True  # the hook on the chain
        if not is_new:
            other.good = dict(rec.good)
        self.put(other)

    @stateful.rule(
        i=INDEX, into=st.sampled_from(['same', 'new', 'lazy']), seed=SEED)
    def snapshot(self, i, into, seed):
        rec = self.pick(i)
        if rec.W is None:
            return
        if into == 'same':
            self.call(rec, rec.x(np.random.RandomState(seed)))
            file = save(rec.link)
            data, u = dict(rec.data), dict(rec.u)
            others = dict(rec.others)
            self.call(rec, rec.x(np.random.RandomState(seed)))
            for name, param in rec.params.items():
                if 'gamma' not in name:
                    param.array = param.array + param.dtype.type(1)
            with np.errstate(all='ignore'):
                serializers.load_npz(file, rec.link)
            rec.accept()
            for name in rec.u:
                assert same_bits(rec.u[name], u[name])
                assert same_bits(rec.others[name], others[name])
            for name in rec.data:
                assert same_bits(rec.data[name], data[name])
            self.share(rec)
            return
        file = save(rec.link)
        link = self.twin(rec, into == 'lazy')
        with chainer.using_config('dtype', rec.dtype), np.errstate(
                all='ignore'):
            serializers.load_npz(file, link)
        other = self.loaded(link, rec.kind)
        if into == 'lazy':  # gamma was made from the weight that was loaded
            other.made = {n: other.gamma_array(n) for n in other.u}
            other.is_unsure = set(other.u)
        for name in other.u:
            u = rec.u[name]
            if u is None:
                pass  # its weight was initialized by another link
            elif other.u[name].dtype != rec.dtype and (
                    into == 'lazy' or rec.is_map(name)):
                assert same_bits(other.u[name], u)
            else:
                assert same_bits(other.u[name], u.astype(rec.dtype))
                if rec.others[name] is not None:
                    assert same_bits(other.others[name], rec.others[
                        name].astype(other.others[name].dtype))
            assert same_bits(other.data[name], rec.data[name])
            gamma = rec.gamma_of(name)
            if gamma and rec.data[gamma] is not None:
                assert same_values(
                    other.data[gamma],
                    rec.data[gamma].astype(other.data[gamma].dtype))
        self.put(other)

    def loaded(self, link, kind):
        """Its gamma is not as it was made."""
        rec = Record(link, kind)
        rec.made = dict.fromkeys(rec.made)
        return rec

    @stateful.rule(i=INDEX, n=st.integers(0, 3), seed=SEED)
    def by_way_of_the_built_in_hook(self, i, n, seed):
        """Where a NaN or a zero weight leaves a u that is of no use."""
        rec = self.pick(i)
        hooks = our_hooks(rec.link)
        if rec.W is None or len(hooks) != 1 or hooks[0].weight_name != 'W':
            return
        if rec.gamma_of('W') not in (None, 'gamma') or rec.standardized or (
                rec.is_map('W') or hooks[0].given_axis is not None):
            return
        if rec.u['W'] is None or rec.u['W'].dtype != rec.dtype:
            return
        hook = hooks[0]
        if hook.use_gamma and rec.dtype == np.float16:
            return  # NumPy has no SVD of it
        with chainer.using_config('dtype', rec.dtype):
            theirs = {
                'linear': L.Linear, 'embedding': L.EmbedID,
                'convolution': L.Convolution2D,
                'deconvolution': L.Deconvolution2D}.get(rec.kind)
            if theirs is None:
                return
            theirs = theirs(*{
                'linear': (5, 6), 'embedding': (7, 5)}.get(
                    rec.kind, (3, 4, 2)))
        theirs.add_hook(link_hooks.SpectralNormalization(
            hook.n_power_iteration, use_gamma=hook.use_gamma,
            factor=hook.factor))
        x = rec.x(np.random.RandomState(seed))
        with np.errstate(all='ignore'):
            serializers.load_npz(save(rec.link), theirs)
            assert same_bits(theirs.W_u, rec.u['W'])
            for _ in range(n):
                theirs(x)
            link = self.twin(rec, False)
            serializers.load_npz(save(theirs), link)
        assert same_bits(link.W_u, theirs.W_u)
        assert same_bits(link.W.array, rec.W)
        assert getattr(link, 'W_us', None) is None
        other = self.loaded(link, rec.kind)
        if other.is_poisoned('W'):
            COUNTS['fault: poisoned u'] += 1
        self.put(other)
