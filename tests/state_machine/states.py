"""Where u and gamma may be after a call: the rule for those of another weight.

A call first compares numbers with limits: how far u turns, and how far sigma
is from gamma.  Where such a number is within rounding of its limit, both
outcomes are right, so this is a set of states rather than one.  What a call
was seen to compute tells which of them remain.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tests import reference
from tests.state_machine.oracle import (
    TOLERANCES,
    not_orthogonal,
    predict,
    same_bits,
)

# See docs/accuracy.rst.
LIMIT_IN_TRAINING = 0.05
LIMIT = 1e-3
LIMIT_OF_GAMMA = 0.1
TURN_OF_GAMMA = 1e-2
# Of what a turn is computed from.
ROUNDING = {'e': 1e-6, 'f': 1e-6, 'd': 1e-13}


class State(NamedTuple):
    """What a link has of one weight; ``initial`` is what gamma was made."""

    u: Any
    gamma: Any = None
    initial: Any = None  # None: gamma is left alone


class Outcome(NamedTuple):
    """What a call may compute, and the state after it."""

    Y: Any
    state: State
    tolerance: float


class Rule(NamedTuple):
    """What decides of the outcome, beside the state.

    Attributes:
        W: The weight as the hook finds it.
        dtype: That of the link's weight.
        form: How it is a matrix.
        hook: The hook.
        is_moved: Whether calls move u on.
        roughness: How much larger rounding errors are than usual.
        on_device: Whether a device computes.

    """

    W: Any
    dtype: Any
    form: Any
    hook: Any
    is_moved: bool
    roughness: float = 1.0
    on_device: bool = False

    def outcomes(self, state):
        """All outcomes of a call."""
        found = []
        with np.errstate(all='ignore'):
            A = self.form.matrix(self.W.astype('d'))
        for start, condition in self.starts(state.u):
            tolerance = (
                self.roughness * TOLERANCES[self.dtype.char] / condition)
            sigma = predict(
                self.W, start, self.form, self.hook, 1.0).sigma
            turn = turn_of(A, start)
            for gamma in self.gammas(state, sigma, turn, tolerance):
                is_new = gamma is not state.gamma
                p = predict(
                    self.W, start, self.form, self.hook,
                    1.0 if gamma is None else gamma)
                u = state.u
                if self.is_moved and p.u is not None:
                    u = p.u.astype(self.dtype)
                found.append(Outcome(p.Y, State(
                    u, gamma, gamma if is_new else state.initial),
                    tolerance / min(p.condition, 1)))
        return found

    def starts(self, u):
        """Vectors that the iterations may start from, and how exact each is.

        They are settled first if u is one of another weight.
        """
        W = self.W.astype('d')
        scale = abs(W).max()
        if not 0 < scale < np.inf:
            return [(u, 1.0)]
        A = self.form.matrix(W / scale)
        rounding = self.roughness * ROUNDING[self.dtype.char]
        return [start for v in not_orthogonal(
                    self.form, A, u.astype('d'), rounding)
                for start in self.settled(A, v, rounding)]

    def settled(self, A, u, rounding):
        condition = np.linalg.norm(A.T @ u) / reference.true_norm(A)
        if self.hook.n_warmup == 0:
            return [(u, condition)]
        K = self.hook.n_power_iteration
        limit = LIMIT_IN_TRAINING if self.is_moved else LIMIT
        found = []
        for _ in range(-(-self.hook.n_warmup // K)):
            turn = turn_of(A, u)
            margin = 1e-4 * limit + rounding / condition
            if turn <= limit + margin:
                found.append((u, condition))
            if turn <= limit - margin:
                return found
            limit = LIMIT
            u = reference.power_iteration(A, u, K)[0]
        return [*found, (u, condition)]

    def gammas(self, state, sigma, turn, tolerance):
        """What gamma may be: as it was, or sigma, or 1 where that is zero.

        A sigma that is less says nothing while u turns.
        """
        gamma = state.gamma
        if self.hook.n_warmup == 0 or state.initial is None or (
                not same_bits(gamma, state.initial)):
            return [gamma]
        with np.errstate(over='ignore', under='ignore'):
            value = np.array(sigma, gamma.dtype)
        value = value if value != 0 else np.ones((), gamma.dtype)
        # A kernel has one dtype for gamma and what it computes.
        if not np.isfinite(value) or (self.on_device and (
                gamma.dtype != np.result_type(self.dtype, 'f'))):
            return [gamma]
        old = float(gamma)
        excess = abs(sigma - old) - LIMIT_OF_GAMMA * old
        margin = tolerance * max(sigma, old)
        rounding = self.roughness * ROUNDING[self.dtype.char] + tolerance
        found = []
        if excess <= margin or (
                sigma < old and turn > TURN_OF_GAMMA - rounding):
            found.append(gamma)
        if excess >= -margin and (
                sigma > old - margin or turn < TURN_OF_GAMMA + rounding):
            found.append(value)
        return found


@np.errstate(all='ignore')
def turn_of(A, u):
    """How far the first iteration turns u; 0 where nothing can be said."""
    scale = abs(A).max()
    if not 0 < scale < np.inf:
        return 0.0
    A = A / scale
    t = A @ (A.T @ u)
    return 1 - u @ t / np.linalg.norm(t) / np.linalg.norm(u)


def norm_for_gamma(W, form, dtype):
    return as_gamma(reference.true_norm(form.matrix(
        W.astype('d'))) if np.isfinite(W).all() else np.nan, dtype)


def as_gamma(norm, dtype):
    """What gamma is made: 1 where the norm is zero or not finite."""
    with np.errstate(over='ignore', under='ignore'):
        norm = np.array(norm, dtype)
    return norm if 0 < norm < np.inf else np.ones((), dtype)
