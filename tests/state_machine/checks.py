"""Calls of a link, compared with the oracle."""
from __future__ import annotations

import contextlib
import warnings
import weakref

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import numpy as np

from tests import reference
from tests.state_machine.links import CALL, KINDS, axis_of, hooked, our_hooks
from tests.state_machine.oracle import (
    TOLERANCES,
    assert_close,
    copy_of,
    factor_and_floor,
    largest_factor,
    predict,
    same_bits,
    same_values,
    standardized,
    warmed_up,
)

assert sn_function  # it is imported for what it does


def call(
        rec, x, train=True, run=None, depth=0, error=None, n_calls=None,
        outputs=True):
    """Calls a link, and checks what it computed and where u is now.

    Args:
        rec: The link's record.
        x: Input.
        train: Training mode.
        run: Calls the link, ``f(link, x)``.
        depth: How often the link calls itself.
        error: What its forward raises, and the exception that is expected.
        n_calls: Number of normalizations, if not that of calls of forward.
        outputs: Whether ``run`` returns what the link returns.

    """
    link = rec.link
    names = hooked(link)
    W_then = {n: copy_of(rec.params[n].array) for n in names}
    starts = {}
    stale = [n for n in names if is_stale(rec, n)]
    poisoned = [n for n in names if rec.is_poisoned(n)]
    for name in names:
        u, W = rec.u[name], W_then[name]
        starts[name] = u
        if u is None or W is None or name in poisoned:
            starts[name] = None  # u is made in this call
        elif name in stale:
            hook, = [h for h in our_hooks(link) if h.weight_name == name]
            starts[name] = warmed_up(
                W, u.astype(W.dtype), axis_of(link), hook.n_warmup)
    was_ordinary = rec.is_ordinary
    is_class = isinstance(error, type)
    expected_errors = (error if is_class else type(error),)
    CALL.reset(depth, None if is_class else error)
    y = None
    with contextlib.ExitStack() as stack:
        if not was_ordinary:
            # Chainer's own functions warn of NaN and of overflow.
            stack.enter_context(np.errstate(all='ignore'))
        if poisoned:
            caught = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter('always')
        stack.enter_context(chainer.using_config('train', train))
        if error is None:
            y = run(link, x) if run else link(x)
        else:
            try:
                run(link, x) if run else link(x)
            except expected_errors as e:
                e.__traceback__ = None  # its frames hold e, and the graph
            else:
                raise AssertionError('no exception')
    seen = CALL.seen
    CALL.reset()
    if n_calls is None:
        n_calls = len(seen)
    if poisoned and n_calls:
        texts = [str(w.message) for w in caught]
        assert sorted(t.split()[0].split('.')[1] for t in texts) == sorted(
            n + '_u' for n in poisoned), texts
    if not n_calls:
        return y

    # Which parameters the call may have changed.
    for name, param in rec.params.items():
        if rec.data[name] is None and 'gamma' not in name:
            rec.data[name] = copy_of(param.array)
    rec.graphs += [
        weakref.ref(W.creator_node) for weights in seen
        for W in weights.values() if W.creator_node is not None]
    for name in names:
        check_gamma(rec, name, name in stale)
        rec.forget_copied(name)
        W = rec.params[name].array
        u = link.__dict__[name + '_u']
        assert u.dtype == W.dtype
        assert u.shape == (W.shape[axis_of(link)],)
        assert np.isfinite(u).all()
        assert u.any()
        if name in stale and starts[name] is not None and not train:
            # The vector that was warmed up is where the call started from.
            assert_close(u, starts[name].astype('d'),
                         10 * TOLERANCES[u.dtype.char])
            starts[name] = u
        check_weight(rec, name, starts[name], seen, n_calls, train)
        rec.u[name] = u.copy()
    rec.was_called()
    if y is not None and outputs:
        check_output(rec, x, seen, y)
    return y


def is_stale(rec, name):
    """Whether u and gamma were copied, and are those of another weight."""
    if name not in rec.copied or (
            # Chainer's hook then hides the weight, which tells nothing.
            rec.standardized == 'first' and name == 'W'):
        return False
    W, u = rec.params[name].array, rec.u[name]
    W_copied, u_copied = rec.copied[name]
    return (W is not W_copied and u is not None
            and same_values(u, u_copied)
            and not same_values(W, W_copied))


def check_gamma(rec, name, was_stale):
    """Gamma is made with the weight, and only then.

    It is the norm of the weight, or 1 where that is not finite.

    """
    gamma_name = rec.gamma_of(name)
    if gamma_name is None:
        return
    gamma, W = rec.params[gamma_name].array, rec.params[name].array
    before = rec.data[gamma_name]
    if before is not None and not (
            was_stale and same_bits(before, rec.made[name])):
        assert same_bits(gamma, before)
        return
    expected = 1.0
    if np.isfinite(W).all():
        expected = reference.true_norm(W, axis_of(rec.link))
    assert_close(gamma, np.array(expected), 1e-4)
    rec.data[gamma_name] = rec.made[name] = gamma.copy()


def check_weight(rec, name, start, seen, n_calls, train):
    """Checks what the calls saw of one weight, and its u."""
    link = rec.link
    hook, = [h for h in our_hooks(link) if h.weight_name == name]
    gamma_name = rec.gamma_of(name)
    gamma = rec.params[gamma_name].array if gamma_name else 1.0
    W, u_now = rec.params[name].array, link.__dict__[name + '_u']
    axis, tolerance = axis_of(link), TOLERANCES[W.dtype.char]
    # That of Chainer's other hook; it is on W only.
    standardization = rec.standardized if name == 'W' else None
    if standardization:
        if not rec.is_ordinary or W.dtype == np.float16:
            return
        tolerance *= 100
    if start is None:
        if train:
            # The start is not known, but the norm can be told.
            if not standardization:
                for weights in seen:
                    norm_is_right(rec, name, weights[name].array)
            return
        start = u_now  # in test mode it is where the call started from
    u, exact = start.astype(W.dtype), True
    for k in range(n_calls):
        p = predict(
            standardized(W) if standardization == 'first' else W,
            u, axis, hook, gamma)
        limit = tolerance / p.condition * (k + 1)
        exact = exact and limit < 0.05
        if k >= len(seen) or p.Y is None:
            pass
        elif exact:
            Y = p.Y
            if standardization == 'last':
                Y = standardized(Y)
            assert_close(seen[k][name].array, Y, limit, of=abs(W).max())
        elif not standardization:
            norm_is_right(rec, name, seen[k][name].array, at_most=np.inf)
        if train and p.u is not None:
            u = p.u.astype(W.dtype)
    if not train or p.u is None:
        # Also where the weight is zero, NaN or Inf.
        assert same_bits(u_now, u)
    elif exact:
        assert_close(u_now, u.astype('d'), limit)


@np.errstate(over='ignore')
def norm_is_right(rec, name, Y, at_most=None):
    """Sigma is never above the true norm: the output's is never too low.

    With a u that was warmed up it is not far above either.

    """
    W = rec.params[name].array
    if not np.isfinite(W).all():
        assert not np.isfinite(Y).any()
        return
    hook, = [h for h in our_hooks(rec.link) if h.weight_name == name]
    gamma_name = rec.gamma_of(name)
    gamma = float(rec.params[gamma_name].array) if gamma_name else 1.0
    sigma = reference.true_norm(W, axis_of(rec.link))
    factor, eps = factor_and_floor(hook)
    factor *= abs(gamma) / max(sigma, eps)
    expected = factor * sigma
    # It is not finite, nor need Y be, where W or what it is multiplied by
    # leaves the range.
    if not (2 * factor < largest_factor(W.dtype)
            and 2 * expected < np.finfo(W.dtype).max):
        return
    tolerance = 1e-2 if Y.dtype == np.float16 else 1e-3
    norm = reference.true_norm(Y, axis_of(rec.link))
    assert norm >= expected * (1 - tolerance) - 1e-7
    if at_most is None:
        at_most = 1.5 if hook.n_warmup else np.inf
    if rec.is_ordinary:
        assert norm <= expected * at_most


def plain(rec, x, weights):
    """The link's function with given weights, in float64."""
    arrays = {n: p.array.astype('d') for n, p in rec.params.items()}
    arrays.update(weights)
    x = x.array if isinstance(x, chainer.Variable) else x
    if x.dtype.kind == 'f':
        x = x.astype('d')
    with chainer.no_backprop_mode(), np.errstate(all='ignore'):
        return KINDS[rec.kind].plain(rec.link, x, arrays).array


def check_output(rec, x, seen, y):
    expected = sum(
        plain(rec, x, {n: W.array.astype('d') for n, W in weights.items()})
        for weights in seen)
    if np.isfinite(expected).all() and abs(expected).max() < 1e4:
        tolerance = 3e-2 if y.dtype == np.float16 else 1e-4
        scale = max(abs(expected).max(), 1e-2)
        assert abs(y.array - expected).max() <= tolerance * scale


def check_gradient(rec, x, gy, starts, train, n_calls, rng):
    """The derivative along a random direction, by central differences."""
    names = hooked(rec.link)
    hooks = {h.weight_name: h for h in our_hooks(rec.link)}
    base = {n: p.array.astype('d') for n, p in rec.params.items()}
    direction = {n: rng.normal(size=base[n].shape) for n in base}
    axis = axis_of(rec.link)
    chains = {}
    for name in names:
        u, chain = starts[name], []
        for _ in range(n_calls):
            p = predict(base[name], u, axis, hooks[name], 1.0)
            A = reference.as_matrix(base[name], axis)
            if p.condition < 5e-2 or not (A.T @ u).any():
                return
            uv = None
            if hooks[name].detach_uv:
                uv = reference.power_iteration(
                    reference.as_matrix(base[name], axis), u.astype('d'),
                    hooks[name].n_power_iteration)[:2]
            chain.append((u, uv))
            if train:
                u = p.u
        chains[name] = chain

    def loss(h):
        at = {n: base[n] + h * direction[n] for n in base}
        total = 0.0
        for k in range(n_calls):
            weights = {}
            for n, W in at.items():
                if n in names:
                    gamma_name = rec.gamma_of(n)
                    u, uv = chains[n][k]
                    weights[n] = predict(
                        W, u, axis, hooks[n],
                        at[gamma_name] if gamma_name else 1.0, uv).Y
                elif n != 'b':
                    weights[n] = W
            y = plain(rec, x, weights)
            total += (gy * y).sum()
            if 'b' in at:
                shape = (1, -1) + (1,) * (y.ndim - 2)
                total += (gy * (h * direction['b']).reshape(shape)).sum()
        return total

    h = 1e-6
    expected = (loss(h) - loss(-h)) / (2 * h)
    actual, scale = 0.0, 0.0
    for n, param in rec.params.items():
        g = param.grad.astype('d')
        actual += (g * direction[n]).sum()
        scale += np.linalg.norm(g) * np.linalg.norm(direction[n])
    scale = max(scale, np.linalg.norm(gy))
    assert abs(actual - expected) <= 2e-3 * scale, (actual, expected, scale)
