"""Calls of a link, compared with the oracle."""
from __future__ import annotations

import contextlib
import functools
import re
import warnings
import weakref
from typing import Any, NamedTuple

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import numpy as np

from tests import reference
from tests.state_machine.links import (
    CALL,
    KINDS,
    hooked,
    hooks_of,
    moves,
    others_of,
    vector_of,
)
from tests.state_machine.oracle import (
    TOLERANCES,
    assert_close,
    copy_of,
    factor_and_floor,
    largest_factor,
    same_bits,
    standardized,
)
from tests.state_machine.states import Rule, State, norm_for_gamma

assert sn_function  # it is imported for what it does


class Before(NamedTuple):
    """What a link had of one weight before a call."""

    u: Any  # None: it is made in the call
    gamma: Any
    is_gamma_free: bool
    is_unsure: bool  # whether gamma is not, in spite of that


def call(
        rec, x, train=True, run=None, depth=0, error=None, n_calls=None,
        outputs=True, on_device=False):
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
        on_device: Whether the weight is on a device in the call.

    """
    before = {name: before_call(rec, name) for name in hooked(rec.link)}
    made_anew = [name for name in before if rec.is_poisoned(name)
                 or has_other_shape(rec, name)]
    sizes = {name: size_of_map(rec, name, x) for name in before}
    is_class = isinstance(error, type)
    expected_errors = (error if is_class else type(error),)
    CALL.reset(depth, None if is_class else error)
    y = None
    with contextlib.ExitStack() as stack:
        if not rec.is_ordinary:
            # Chainer's own functions warn of NaN and of overflow.
            stack.enter_context(np.errstate(all='ignore'))
        if made_anew:
            caught = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter('always')
        stack.enter_context(chainer.using_config('train', train))
        if error is None:
            y = run(rec.link, x) if run else rec.link(x)
        else:
            try:
                run(rec.link, x) if run else rec.link(x)
            except expected_errors as e:
                e.__traceback__ = None  # its frames hold e, and the graph
            else:
                raise AssertionError('no exception')
    seen = CALL.seen
    CALL.reset()
    if n_calls is None:
        n_calls = len(seen)
    if made_anew and n_calls:
        texts = [str(w.message) for w in caught]
        found = re.findall(r'(\w+)_(?:u|map) ', ' '.join(texts))
        assert sorted(found) == sorted(
            name.split('/')[-1] for name in made_anew), texts
    if n_calls:
        check_call(rec, before, seen, n_calls, train, on_device, sizes)
        if y is not None and outputs:
            check_output(rec, x, seen, y)
    return y


def size_of_map(rec, name, x):
    """Of the images whose norm a call takes; nothing for a matrix."""
    if not rec.is_map(name):
        return ()
    u, insize = rec.u[name], hooks_of(rec.link)[name].insize
    if u is None or (insize and rec.is_poisoned(name)):
        return (insize,) * 2 if insize else x.shape[2:]
    return u.shape[1:]


def before_call(rec, name):
    u, gamma = flat(rec.u[name]), rec.gamma_array(name)
    if rec.params[name].array is None or rec.is_poisoned(name) or (
            has_other_shape(rec, name)):
        u = None
        if has_other_shape(rec, name):
            gamma = None
    return Before(
        u, gamma, rec.is_gamma_free(name), name in rec.is_unsure)


def has_other_shape(rec, name):
    """Whether a weight was replaced by one with another number of rows."""
    u, W = rec.u[name], rec.params[name].array
    return u is not None and W is not None and (
        u.shape != rec.shape_of_u(name))


def flat(u, ndim=1):
    """Vectors as the oracle takes them, or ``None``."""
    return u if u is None else u.reshape(*u.shape[:ndim - 1], -1)


def check_call(rec, before, seen, n_calls, train, on_device, sizes):
    # Which parameters the call may have changed.
    for name, param in rec.params.items():
        if rec.data[name] is None and 'gamma' not in name:
            rec.data[name] = copy_of(param.array)
    rec.graphs += [
        weakref.ref(W.creator_node) for weights in seen
        for W in weights.values() if W.creator_node is not None]
    for name in before:
        W, u = rec.params[name].array, vector_of(rec.link, name)
        assert u.dtype == W.dtype
        assert u.shape == rec.shape_of_u(name)
        assert not sizes[name] or u.shape[1:] == sizes[name]
        assert np.isfinite(u).all()
        assert u.any()
        is_moved = moves(rec.link, name, train)
        if rec.is_followed(name):
            check_weight(
                rec, name, before[name], seen, n_calls, is_moved, on_device)
        else:
            check_several(rec, name, before[name], seen, is_moved)
        rec.u[name] = u.copy()
        rec.others[name] = copy_of(others_of(rec.link, name))
        gamma_name = rec.gamma_of(name)
        if gamma_name is not None:
            gamma = rec.params[gamma_name].array
            if not same_bits(gamma, rec.data[gamma_name]):
                if rec.data[gamma_name] is None or before[name].gamma is None:
                    rec.updates[name] = rec.n_updates(name)
                rec.data[gamma_name] = rec.made[name] = gamma.copy()
                rec.is_unsure.discard(name)


def check_several(rec, name, before, seen, is_moved):
    """Checks a weight with several vectors, as far as those are known.

    Or one whose u moves on until a tolerance is reached, or for each group.
    """
    W, hook = rec.params[name].array, hooks_of(rec.link)[name]
    with np.errstate(all='ignore'):
        A = rec.form(name).matrix(W.astype('d'))
    n_groups = rec.n_groups(name)
    n = min(hook.n_vectors, *(k // n_groups for k in A.shape))
    u, others = flat(vector_of(rec.link, name)), None
    old = flat(rec.others[name], 2)
    if hook.n_vectors > 1:
        others = flat(others_of(rec.link, name), 2)
        assert (others.shape, others.dtype) == ((n - 1, len(A)), W.dtype)
        assert np.isfinite(others).all()
        assert others.any(axis=1).all()
    if name == 'W' and rec.standardized:
        return
    gamma = rec.gamma_of(name)
    is_same = gamma is None or same_bits(
        before.gamma, rec.params[gamma].array)
    assert is_same or before.gamma is None or before.is_gamma_free or (
        before.is_unsure)
    for weights in seen if is_same else seen[-1:]:
        norm_is_right(rec, name, weights[name].array,
                      at_most=None if before.u is None else np.inf)
    if before.u is None or (old is None) != (others is None) or (
            old is not None and old.shape != others.shape):
        return
    if not (is_moved and np.isfinite(W).all() and W.any()):
        assert same_bits(u, before.u.astype(W.dtype))
        assert others is None or same_bits(others, old.astype(W.dtype))
    if rec.is_ordinary and seen and hook.n_power_iteration == 1 and (
            hook.n_warmup == 0 and hook.rtol is None and n_groups == 1):
        u = np.array([before.u, *old], 'd')
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        # Where W takes all of them to zero, others come in their place.
        if np.linalg.cond(u) < 10 and (u @ A).any():
            sigma = reference.true_norm(np.linalg.qr(u.T)[0].T @ A)
            factor, floor = factor_and_floor(hook)
            assert_close(
                seen[0][name].array, W.astype('d') * factor / max(
                    sigma, floor), 10 * TOLERANCES[W.dtype.char])


def check_weight(rec, name, before, seen, n_calls, is_moved, on_device):
    """Checks what the calls saw of one weight, and its u and gamma."""
    W, gamma = rec.params[name].array, before.gamma
    form = rec.form(name)
    # That of Chainer's other hook; it is on W only.
    standardization = rec.standardized if name == 'W' else None
    W_used = standardized(W) if standardization == 'first' else W
    gamma_name, gamma_now = rec.gamma_of(name), None
    initial = gamma if before.is_gamma_free else None
    if gamma_name is not None:
        gamma_now = rec.params[gamma_name].array
        if gamma is None:  # it is made in this call, as this
            gamma = norm_for_gamma(W, form, gamma_now.dtype)
            # Chainer's other hook makes another W in each call.
            initial = None if standardization == 'first' else gamma
    rule = Rule(W_used, W.dtype, form, hooks_of(rec.link)[name], is_moved,
                roughness(W, standardization), on_device)
    start = before.u
    if standardization and (not rec.is_ordinary or W.dtype == np.float16):
        return
    if start is None and is_moved:
        # The start is not known, but the norm can be told.
        is_new = before.gamma is None and initial is None
        if gamma_now is not None and is_new:
            # Made in this call of the raw weight, by another SVD.
            np.testing.assert_allclose(gamma_now, gamma, rtol=1e-5)
        elif gamma_now is not None and not same_bits(gamma, gamma_now):
            assert initial is not None
            norm = norm_for_gamma(W_used, form, gamma_now.dtype)
            assert norm / 3 <= gamma_now <= norm * (1 + 1e-3)
        for weights in [] if standardization else seen:
            norm_is_right(rec, name, weights[name].array)
        return
    if start is None:
        start = flat(vector_of(rec.link, name))  # where the call started from
    states = [State(start.astype(W.dtype), gamma, initial)]
    start = states[0].u
    if before.is_unsure:
        states.append(states[0]._replace(initial=None))
    for k in range(n_calls):
        outcomes = [o for state in states for o in rule.outcomes(state)]
        if k < len(seen):
            outcomes = those_that_pass(outcomes, functools.partial(
                check_Y, rec, name, seen[k][name].array, k, standardization))
        states = [o.state for o in outcomes]
    those_that_pass(outcomes, functools.partial(
        check_state, rec, name, start, before.gamma, n_calls))


def roughness(W, standardization):
    """How much larger rounding errors are than usual."""
    if W.dtype == np.float64 and 0 < abs(W).max() < 1e-300:
        return 1e12  # subnormal products: see docs/accuracy.rst
    return 100.0 if standardization else 1.0


def those_that_pass(outcomes, check):
    found, error = [], None
    for outcome in outcomes:
        try:
            check(outcome)
        except AssertionError as e:
            error = e.with_traceback(None)  # its frames hold it, and graphs
        else:
            found.append(outcome)
    if not found:
        raise error
    return found


def check_Y(rec, name, Y, k, standardization, outcome):
    limit = outcome.tolerance * (k + 1)
    if outcome.Y is None:
        return
    if limit < 0.05:
        expected = outcome.Y
        if standardization == 'last':
            expected = standardized(expected)
        W = rec.params[name].array
        assert_close(Y, expected, limit, of=abs(W).max())
    elif not standardization:
        norm_is_right(rec, name, Y, at_most=np.inf)


def check_state(rec, name, start, gamma, n_calls, outcome):
    """Checks where u and gamma are after the calls."""
    u, state = flat(vector_of(rec.link, name)), outcome.state
    limit = outcome.tolerance * n_calls
    if state.u is start:
        # Also where the weight is zero, NaN or Inf.
        assert same_bits(u, start)
    elif limit < 0.05:
        assert_close(u, state.u.astype('d'), limit)
    gamma_name = rec.gamma_of(name)
    if gamma_name is not None:
        gamma_now = rec.params[gamma_name].array
        if state.gamma is gamma:
            assert same_bits(gamma_now, gamma)
        else:
            assert limit >= 0.05 or assert_close(
                gamma_now, state.gamma, max(1e-6, limit)) is None


@np.errstate(over='ignore')
def norm_is_right(rec, name, Y, at_most=None):
    """Sigma is never above the true norm: the output's is never too low.

    With a u that was warmed up it is not far above either.

    """
    W = rec.params[name].array
    if not np.isfinite(W).all():
        assert not np.isfinite(Y).any()
        return
    if abs(W).max() > 1e300 and not rec.is_followed(name):
        return  # see docs/accuracy.rst
    hook = hooks_of(rec.link)[name]
    gamma_name = rec.gamma_of(name)
    gamma = float(rec.params[gamma_name].array) if gamma_name else 1.0
    form = rec.form(name)
    sigma = reference.true_norm(form.matrix(W.astype('d')))
    factor, eps = factor_and_floor(hook)
    factor *= abs(gamma) / max(sigma, eps)
    expected = factor * sigma
    # It is not finite, nor need Y be, where W or what it is multiplied by
    # leaves the range.
    if not (2 * factor < largest_factor(W.dtype)
            and 2 * expected < np.finfo(W.dtype).max):
        return
    tolerance = 1e-2 if Y.dtype == np.float16 else 1e-3
    norm = reference.true_norm(form.matrix(Y.astype('d')))
    assert norm >= expected * (1 - tolerance) - 1e-7
    if at_most is None:
        at_most = 1.5 if hook.n_warmup >= 15 else np.inf
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
        return KINDS[rec.kind].plain(x, arrays).array


def check_output(rec, x, seen, y):
    expected = sum(
        plain(rec, x, {n: W.array.astype('d') for n, W in weights.items()})
        for weights in seen)
    if np.isfinite(expected).all() and abs(expected).max() < 1e4:
        tolerance = 3e-2 if y.dtype == np.float16 else 1e-4
        scale = max(abs(expected).max(), 1e-2)
        assert abs(y.array - expected).max() <= tolerance * scale
