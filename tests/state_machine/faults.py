"""Rules that raise, wherever something of the user's is run."""
from __future__ import annotations

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import numpy as np
from hypothesis import stateful
from hypothesis import strategies as st

from sn_function import errors
from tests.state_machine.base import COUNTS, INDEX, SEED, Base
from tests.state_machine.links import (
    CALL,
    KINDS,
    FailingNode,
    Fails,
    hooked,
)

ERRORS = [ValueError, MemoryError, KeyboardInterrupt, StopIteration,
          GeneratorExit, SystemExit]


class Faults(Base):

    @stateful.rule(
        i=INDEX, seed=SEED, train=st.booleans(),
        error=st.sampled_from(ERRORS), depth=st.integers(0, 2))
    def exception_in_forward(self, i, seed, train, error, depth):
        rec = self.pick(i)
        if rec.standardized == 'first':
            return  # Chainer's hook does not put back what it replaced
        COUNTS['fault: exception in forward'] += 1
        depth = 0 if rec.standardized else depth
        self.call(rec, rec.x(np.random.RandomState(seed)), train,
                  depth=depth, error=error('midway'))

    @stateful.rule(i=INDEX, seed=SEED, train=st.booleans())
    def wrong_input(self, i, seed, train):
        rec = self.pick(i)
        if rec.standardized:
            return
        COUNTS['fault: exception by a wrong input'] += 1
        shape = KINDS[rec.kind].bad_shape
        if shape is None:
            x = np.zeros((2, 2))
        elif rec.W is None:
            x = np.zeros(3, 'f')
        else:
            x = np.zeros(shape, rec.dtype)
        CALL.reset()
        self.call(rec, x, train, error=Exception)

    @stateful.rule(
        i=INDEX, seed=SEED, train=st.booleans(),
        when=st.sampled_from(['pre', 'post']), is_first=st.booleans())
    def exception_in_another_hook(self, i, seed, train, when, is_first):
        rec = self.pick(i)
        if rec.standardized or rec.is_shared or rec.W is None:
            return
        COUNTS['fault: exception in a hook'] += 1
        rec.link.add_hook(Fails(when))
        if is_first:
            rec.link.local_link_hooks.move_to_end('Fails', last=False)
        n_calls = int(when == 'post' or not is_first)
        try:
            self.call(rec, rec.x(np.random.RandomState(seed)), train,
                      error=RuntimeError, n_calls=n_calls)
        finally:
            rec.link.delete_hook('Fails')

    @stateful.rule(i=INDEX, name=st.sampled_from(['W', 'H', 'nothing']))
    def refused_hook(self, i, name):
        rec = self.pick(i)
        if name in rec.params and name not in hooked(rec.link):
            return
        COUNTS['fault: exception by a refused hook'] += 1
        hooks = list(rec.link.local_link_hooks)
        try:
            rec.link.add_hook(sn_function.SpectralNormalization(
                weight_name=name, name='refused', use_gamma=True))
        except errors.SpectralNormalizationError:
            pass
        else:
            raise AssertionError('no exception')
        assert list(rec.link.local_link_hooks) == hooks

    @stateful.rule(i=INDEX, seed=SEED, twice=st.booleans())
    def exception_in_backward(self, i, seed, twice):
        rec = self.pick(i)
        COUNTS['fault: exception in backward'] += 1
        x = rec.x(np.random.RandomState(seed))
        rec.link.cleargrads()
        y = self.call(rec, x)
        loss = FailingNode().apply((y,))[0]
        if twice:
            with self.maybe_not_ordinary(rec):
                loss = loss + self.call(rec, x)
        with np.errstate(all='ignore'):
            try:
                F.sum(loss).backward()
            except ZeroDivisionError:
                pass
            else:
                raise AssertionError('no exception')

    @stateful.rule(i=INDEX, seed=SEED)
    def exception_in_the_second_run(self, i, seed):
        rec = self.pick(i)
        if KINDS[rec.kind].x_shape is None or rec.standardized == 'first':
            return
        COUNTS['fault: exception in a second run'] += 1
        x = chainer.Variable(rec.x(np.random.RandomState(seed)))
        rec.link.cleargrads()
        with self.maybe_not_ordinary(rec):
            y = F.sum(self.call(rec, x, True, F.forget))
        for r in self.records:
            r.check()
        CALL.reset(error=RuntimeError('second run'))
        with np.errstate(all='ignore'):
            try:
                y.backward()
            except RuntimeError:
                pass
            else:
                raise AssertionError('no exception')
        CALL.reset()
