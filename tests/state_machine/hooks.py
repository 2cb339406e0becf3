"""Rules that make links, and put hooks on them or take them away."""
from __future__ import annotations

import sn_function  # isort: skip  # before chainer, which it repairs
import numpy as np
from chainer import link_hooks
from hypothesis import stateful
from hypothesis import strategies as st

from tests.state_machine.base import INDEX, SEED, SETTINGS, Base
from tests.state_machine.checks import plain
from tests.state_machine.links import (
    CALL,
    KINDS,
    hooked,
    keys_of,
    our_hooks,
    persistent_of,
)
from tests.state_machine.oracle import assert_close
from tests.state_machine.record import Record


class Hooks(Base):

    @stateful.rule(
        kind=st.sampled_from(sorted(KINDS)), lazy=st.booleans(),
        settings=SETTINGS, dtype=st.sampled_from('ffde'))
    def add_link(self, kind, lazy, settings, dtype):
        # A lazy link takes the dtype of the time of its first call.
        link = self.make(kind, lazy, 'f' if lazy else dtype).add_hook(
            sn_function.SpectralNormalization(**settings))
        self.put(Record(link, kind))

    @stateful.rule(
        i=INDEX, kind=st.sampled_from(sorted(KINDS)), lazy=st.booleans())
    def one_hook_for_another_link(self, i, kind, lazy):
        hooks = our_hooks(self.pick(i).link)
        if hooks:
            link = self.make(kind, lazy)
            if hasattr(link, hooks[0].weight_name):
                self.put(Record(link.add_hook(hooks[0]), kind))

    @stateful.rule(i=INDEX, settings=SETTINGS)
    def one_parameter_for_another_link(self, i, settings):
        rec = self.pick(i)
        if rec.is_rnn:
            return
        link = self.make(rec.kind, False, rec.dtype)
        with link.init_scope():
            link.W = rec.params['W']
        self.add_hook(rec, link, **settings)
        other = Record(link, rec.kind)
        other.family = rec.family
        self.put(other)

    @stateful.rule(i=INDEX, settings=SETTINGS)
    def hook_on_the_second_weight(self, i, settings):
        rec = self.pick(i)
        if rec.kind != 'two' or rec.is_shared or 'H' in hooked(rec.link):
            return
        self.add_hook(rec, rec.link, weight_name='H', name='H', **settings)
        self.put_again(rec)

    @stateful.rule(i=INDEX, seed=SEED, settings=SETTINGS)
    def delete_and_add(self, i, seed, settings):
        rec = self.pick(i)
        if rec.is_shared or rec.standardized:
            return
        link = rec.link
        for hook in list(link.local_link_hooks.values()):
            link.delete_hook(hook.name)
        assert keys_of(link) == keys_of(self.make(rec.kind, True))
        assert not persistent_of(link)
        rec.made, rec.updates, rec.is_unsure = {}, {}, set()
        rec.accept()
        if rec.W is not None:
            x = rec.x(np.random.RandomState(seed))
            expected = plain(rec, x, {})
            with np.errstate(all='ignore'):
                y = link(x)
            CALL.reset()
            if rec.is_ordinary:
                assert_close(
                    y.array, expected, 3e-2 if y.dtype == 'e' else 1e-3)
            rec.check()
        self.add_hook(rec, link, **settings)
        self.put_again(rec)

    @stateful.rule(i=INDEX, first=st.booleans())
    def weight_standardization(self, i, first):
        """Chainer's hook beside ours; or away with it."""
        rec = self.pick(i)
        link = rec.link
        if rec.is_shared or rec.W is None or rec.is_rnn:
            return
        if rec.standardized:
            link.delete_hook('WeightStandardization')
            rec.standardized = None
            return
        link.add_hook(link_hooks.WeightStandardization())
        if first:
            link.local_link_hooks.move_to_end(
                'WeightStandardization', last=False)
        rec.standardized = 'first' if first else 'last'
