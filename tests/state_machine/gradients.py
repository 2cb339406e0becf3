"""Gradients of a link, compared with finite differences of the oracle."""
from __future__ import annotations

import numpy as np

from tests import reference
from tests.state_machine.checks import plain
from tests.state_machine.links import hooked, hooks_of, moves
from tests.state_machine.oracle import factor_and_floor, predict
from tests.state_machine.states import Rule


def check_gradient(rec, x, gy, starts, train, n_calls, rng):
    """The derivative along a random direction, by central differences."""
    base = {n: p.array.astype('d') for n, p in rec.params.items()}
    direction = {n: rng.normal(size=base[n].shape) for n in base}
    chains = {name: chain_of(rec, name, base[name], starts[name], train,
                             n_calls) for name in hooked(rec.link)}
    if None in chains.values():
        return

    def loss(h):
        at = {n: base[n] + h * direction[n] for n in base}
        total = 0.0
        for k in range(n_calls):
            weights = dict(at)
            for name, chain in chains.items():
                gamma = rec.gamma_of(name)
                weights[name] = normalized(
                    rec, name, at[name], chain[k],
                    at[gamma] if gamma else 1.0, is_zero=not base[name].any())
            total += (gy * plain(rec, x, weights)).sum()
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


def chain_of(rec, name, W, u, train, n_calls):
    """Where each call starts from, and u and v where these are constants.

    ``None`` where rounding decides.
    """
    form, hook = rec.form(name), hooks_of(rec.link)[name]
    is_moved = moves(rec.link, name, train)
    rule = Rule(W, rec.params[name].dtype, form, hook, is_moved)
    chain = []
    for _ in range(n_calls):
        (start, condition), *others = rule.starts(u)
        p = predict(W, start, form, hook, 1.0)
        if others or min(condition, p.condition) < 5e-2:
            return None
        uv = None
        if hook.detach_uv and W.any():
            uv = reference.power_iteration(
                form.matrix(W), start.astype('d'),
                hook.n_power_iteration)[:2]
        chain.append((start, uv))
        if is_moved and p.u is not None:
            u = p.u
    return chain


def normalized(rec, name, W, start, gamma, is_zero):
    hook = hooks_of(rec.link)[name]
    if is_zero:
        # Linear there, and a step is no larger than without normalization.
        factor = 1.0 if hook.cap is not None else factor_and_floor(hook)[0]
        return gamma * factor * W
    u, uv = start
    return predict(W, u, rec.form(name), hook, gamma, uv).Y
