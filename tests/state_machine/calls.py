"""Rules that call a link, and train it."""
from __future__ import annotations

import contextlib
import sys
import threading

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import numpy as np
import pytest
from chainer import link_hooks
from hypothesis import stateful
from hypothesis import strategies as st

from tests import reference
from tests.state_machine.base import COUNTS, INDEX, SEED, Base
from tests.state_machine.checks import call, flat
from tests.state_machine.gradients import check_gradient
from tests.state_machine.links import (
    CALL,
    hooked,
    hooks_of,
    our_hooks,
    place_of,
    vector_of,
)
from tests.state_machine.oracle import (
    TOLERANCES,
    assert_close,
    copy_of,
    factor_and_floor,
)

assert sn_function  # it is imported for what it does


def scope_of(mode):
    """The scope that a call is in, if any."""
    for scope in sn_function.cached, sn_function.normalized:
        if scope.__name__ in mode:
            return scope
    return None


class Calls(Base):

    @stateful.rule(
        i=INDEX, train=st.booleans(), seed=SEED, depth=st.sampled_from(
            [0, 0, 1, 2]),
        mode=st.sampled_from(
            ['plain', 'keyword', 'no_backprop', 'timer', 'cached',
             'cached, no_backprop', 'normalized',
             'normalized, no_backprop']))
    def forward(self, i, train, seed, depth, mode):
        rec = self.pick(i)
        rng = np.random.RandomState(seed)
        if rec.standardized:
            depth = 0  # Chainer's hook holds one weight at a time
            mode = 'plain' if mode == 'keyword' or scope_of(mode) else mode
        scope = scope_of(mode)
        if scope:
            depth = 0  # all depths would start from one u
        x, run = rec.x(rng), None
        if mode == 'keyword':
            def run(link, x):
                return link(x=x)
        with contextlib.ExitStack() as stack:
            if mode == 'timer':
                stack.enter_context(link_hooks.TimerHook())
            if scope:
                stack.enter_context(scope(rec.link))
            with chainer.using_config(
                    'enable_backprop', 'no_backprop' not in mode):
                y = self.call(rec, x, train, run, depth)
            if scope:
                self.call_again(rec, x, train, y, mode)
        if 'no_backprop' not in mode:
            self.pending.append((rec, y, rec.dtype))
            del self.pending[:-3]

    def call_again(self, rec, x, train, y, mode):
        """A second call in a scope has the same weight, and leaves u alone.

        A weight that has no graph is made again: from the same start, but in
        single precision where the first one had to be made in double.
        """
        names = hooked(rec.link)
        us = [vector_of(rec.link, name).copy() for name in names]
        with chainer.using_config('train', train), self.maybe_not_ordinary(
                rec):
            again = rec.link(x)
            for name in names:
                owner, attribute = place_of(rec.link, name)
                assert getattr(owner, attribute) is (
                    CALL.seen[-1][name] if 'normalized' in mode
                    else owner.__dict__[attribute])
        CALL.reset()  # it keeps the weights that it has seen
        if 'no_backprop' not in mode:
            np.testing.assert_array_equal(again.array, y.array)
        else:
            with np.errstate(all='ignore'):
                assert_close(again.array, y.array.astype('d'),
                             10 * TOLERANCES[y.dtype.char])
        for name, u in zip(names, us):
            np.testing.assert_array_equal(vector_of(rec.link, name), u)

    @stateful.rule(i=INDEX)
    def backward_of_an_earlier_call(self, i):
        """Weights may have been changed since, so that no value is known."""
        if not self.pending:
            return
        rec, y, dtype = self.pending.pop(i % len(self.pending))
        if rec.dtype != dtype or any(
                p.array is not None and p.array.dtype != dtype
                and 'gamma' not in n for n, p in rec.params.items()):
            return
        rec.link.cleargrads()
        with np.errstate(all='ignore'):
            F.sum(y).backward()

    @stateful.rule(i=INDEX, train=st.booleans())
    def normalize_weight(self, i, train):
        rec = self.pick(i)
        if rec.W is None or not hooked(rec.link) or rec.standardized:
            return
        hooks = our_hooks(rec.link)
        if len(hooks) == 1 and rec.size_is_known(hooks[0].weight_name):
            def run(link, x):
                Y = hooks[0].normalize_weight(link)
                CALL.seen.append({hooks[0].weight_name: Y})
                return Y
            self.call(rec, None, train, run, outputs=False)

    @stateful.rule(
        i=INDEX, train=st.booleans(), seed=SEED,
        depth=st.sampled_from([0, 0, 1]), forget=st.booleans(),
        update=st.booleans())
    def step(self, i, train, seed, depth, forget, update):
        """Forward, backward and update, with the gradient checked."""
        rec = self.pick(i)
        rng = np.random.RandomState(seed)
        x = rec.x(rng)
        names = hooked(rec.link)
        if x.dtype.kind == 'f':
            x = chainer.Variable(x)
        else:
            forget = False  # it wants a gradient of its input
        if rec.standardized:
            depth = 0
        starts = {n: copy_of(flat(rec.u[n])) for n in names}
        is_known = (
            all(u is not None for u in starts.values())
            and not rec.has_poison() and not rec.standardized
            and all(map(rec.is_followed, names)))
        rec.link.cleargrads()
        y = self.call(
            rec, x, train, F.forget if forget else None, depth)
        gy = rng.normal(size=y.shape)
        y.grad = gy.astype(y.dtype)
        is_ordinary = rec.is_ordinary
        # F.forget calls the link once more here.
        CALL.reset(depth)
        with np.errstate(**({} if is_ordinary else {'all': 'ignore'})), \
                chainer.using_config('train', train):
            y.backward()
        CALL.reset()
        for r in self.records:
            r.check()
        if rec.dtype != np.float16 and is_known and (
                rec.is_of_size(is_zero_ok=True)):
            check_gradient(rec, x, gy, starts, train, depth + 1, rng)
        if is_ordinary:
            for param in rec.params.values():
                if param.grad is not None:
                    assert rec.dtype == np.float16 or np.isfinite(
                        param.grad).all()
        if update:
            self.update(rec)

    def update(self, rec):
        before = {n: copy_of(p.array) for n, p in rec.params.items()}
        with np.errstate(all='ignore'):
            chainer.optimizers.SGD(0.01).setup(rec.link).update()
            for name, param in rec.params.items():
                if param.grad is not None:
                    expected = before[name] - before[name].dtype.type(
                        0.01) * param.grad
                    assert_close(
                        param.array, expected.astype('d'),
                        4 * TOLERANCES[param.dtype.char])
                rec.data[name] = param.array.copy()
        self.share(rec)

    @stateful.rule(i=INDEX, j=INDEX, seed=SEED, train=st.booleans())
    def latest_call_again(self, i, j, seed, train):
        """Where Chainer says so, whatever other links did in between."""
        rec, other = self.pick(i), self.pick(j)
        if rec.standardized or rec.family is other.family:
            return
        rng = np.random.RandomState(seed)
        x = rec.x(rng)
        y = self.call(rec, x, train)
        self.call(other, other.x(rng))
        with chainer.using_config('train', train), chainer.using_config(
                'in_recomputing', True), self.maybe_not_ordinary(rec):
            for _ in range(2):
                again = rec.link(x)
                assert_close(again.array, y.array.astype('d'),
                             10 * TOLERANCES[y.dtype.char])
        CALL.reset()

    @stateful.rule(i=INDEX)
    def cleargrads(self, i):
        self.pick(i).link.cleargrads()

    @stateful.rule(i=INDEX)
    def converge(self, i):
        """Enough iterations lead to the right norm, wherever u is."""
        rec = self.pick(i)
        if rec.W is None or rec.standardized or not hooked(rec.link):
            return
        # Only where there is no NaN: nothing converges to one.
        for name, hook in hooks_of(rec.link).items():
            link, _ = place_of(rec.link, name)
            W = rec.params[name].array
            if not (np.isfinite(W).all() and rec.size_is_known(name)):
                continue
            gamma_name = rec.gamma_of(name)
            gamma = rec.params[gamma_name].array if gamma_name else 1.0
            # None: another link has initialized the weight.
            if gamma is not None and not np.isfinite(gamma):
                continue
            expect = (pytest.warns(UserWarning, match='made anew')
                      if rec.is_poisoned(name) else contextlib.nullcontext())
            tolerance = 2e-2 if W.dtype == np.float16 else 1e-2
            with expect, self.maybe_not_ordinary(rec):
                hook.normalize_weight(link)
            form = rec.form(name)
            sigma = reference.true_norm(form.matrix(W.astype('d')))
            factor, eps = factor_and_floor(hook)
            for k in range(2000):
                if k % 10 == 0:
                    with chainer.using_config('train', False), \
                            self.maybe_not_ordinary(rec):
                        Y = hook.normalize_weight(link).array
                    # It may be made anew until sigma is right.
                    gamma = float(
                        rec.params[gamma_name].array) if gamma_name else 1.0
                    expected = abs(gamma) * factor * min(sigma, eps) / eps
                    assert np.isfinite(Y).all() or expected > 1e4
                    if not np.isfinite(Y).all():
                        break
                    error = abs(reference.true_norm(form.matrix(
                        Y.astype('d'))) - expected)
                    if error <= tolerance * expected + 1e-7:
                        break
                with self.maybe_not_ordinary(rec):
                    hook.normalize_weight(link)
            else:
                raise AssertionError((Y, error, expected))
        self.accept_gammas(rec)

    @stateful.rule(
        i=INDEX, j=INDEX, seed=SEED, n=st.integers(1, 3),
        fails=st.booleans())
    def two_threads(self, i, j, seed, n, fails):
        """Two links, which may have one hook."""
        a, b = self.pick(i), self.pick(j)
        records = [a, b]
        if a is b or any(r.standardized or r.W is None or r.has_poison()
                         for r in records):
            return
        arrays = [[p.array for p in r.params.values()] + [
            vector_of(r.link, name) for name in hooked(r.link)]
            for r in records]
        if any(x is y for x in arrays[0] for y in arrays[1]):
            return
        errors = []
        barrier = threading.Barrier(2)

        def work(rec, train):
            try:
                x = rec.x(np.random.RandomState(seed))
                barrier.wait()
                for k in range(n):
                    y = call(rec, x, train)
                    rec.link.cleargrads()
                    with np.errstate(all='ignore'):
                        F.sum(y).backward()
                    if fails and k == 0:
                        COUNTS['fault: exception in a thread'] += 1
                        call(rec, x, train, error=ValueError('midway'))
            except BaseException as e:
                errors.append(e)

        threads = [threading.Thread(target=work, args=args)
                   for args in zip(records, (True, bool(seed % 2)))]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)  # seconds: many switches in a call
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        sys.setswitchinterval(interval)
        for r in records:
            self.share(r)
        COUNTS['pairs of threads'] += 1
        if errors:
            raise errors[0]
