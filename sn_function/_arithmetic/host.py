"""The arithmetic of NumPy, as :mod:`.device` is that of CuPy.

:mod:`.power_iteration` computes each weight, :mod:`.stacks` small ones of one
kind together, :mod:`.subspace` one with several vectors, and :mod:`.grouped`
one of several groups.
"""
from __future__ import annotations

import contextlib
from typing import Any, Callable, Sequence

import numpy

from sn_function._arithmetic import (
    grouped,
    power_iteration,
    stacks,
    subspace,
)
from sn_function._arithmetic.convolution import Convolution
from sn_function._arithmetic.groups import Groups
from sn_function._arithmetic.interface import (
    NEVER,
    Array,
    Arrays,
    Backward,
    Forward,
    Renewal,
    Settings,
    n_vectors_of,
)


def normalize_all(calls: Sequence[Forward]) -> list[tuple[Arrays, Any]]:
    # NaN and overflow show in the results; they need no warning as well.
    with numpy.errstate(all='ignore'):
        results = _run(
            calls, stacks.kind, stacks.normalize,
            lambda call: module_of(call).normalize(call))
        for call, (_, iterations) in zip(calls, results):
            if call.update_u:
                module_of(call).store(call.u, iterations)
        return results


def gradients_all(calls: Sequence[Backward]) -> list[Arrays]:
    with numpy.errstate(all='ignore'):
        return _run(
            calls, stacks.stack_of, stacks.gradients,
            lambda call: module_of(call).gradients(call))


def module_of(call: Forward | Backward) -> Any:
    """Returns the module that computes one weight on the host.

    A map of a convolution is computed so on a device, too.
    """
    settings = call.settings
    if settings.groups is not None:
        return grouped
    return power_iteration if settings.n_vectors is None else subspace


def _run(
        calls: Sequence[Any], kind: Callable[[Any], Any],
        together: Callable[[Sequence[Any]], Sequence[Any]],
        one: Callable[[Any], Any]) -> list[Any]:
    """Returns the result of each call; those of a kind are run together."""
    if len(calls) == 1:
        return [one(calls[0])]
    groups: dict[Any, list[int]] = {}
    for i, call in enumerate(calls):
        groups.setdefault(kind(call), []).append(i)
    results: list[Any] = [None] * len(calls)
    for key, places in groups.items():
        group = [calls[i] for i in places]
        found: Sequence[Any] = ()
        if key is not None:
            with contextlib.suppress(stacks.OneByOneError):
                found = together(group)
        for i, result in zip(places, found or map(one, group)):
            results[i] = result
    return results


def warm_up(
        W: Array, u: Array, axis: int, n: int, groups: Groups | None = None,
        rtol: float | None = None, convolution: Convolution | None = None,
) -> None:
    settings = Settings(
        n, axis, True, groups=groups, n_vectors=n_vectors_of(u),
        convolution=convolution)
    renewal = NEVER
    if rtol is not None:
        settings = settings._replace(n_power_iteration=1)
        renewal = Renewal(n - 1, 2.0, rtol=rtol)
    normalize_all([Forward(
        settings, W, u, 1.0, (), update_u=True, renewal=renewal)])
