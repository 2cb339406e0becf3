"""The arithmetic of NumPy, as :mod:`.device` is that of CuPy.

Each weight is done by :mod:`.power_iteration`, but small ones of
one kind together, by :mod:`.stacks`.
"""
from __future__ import annotations

import contextlib
from typing import Any, Callable, Sequence

import numpy

from sn_function._arithmetic import power_iteration, stacks
from sn_function._arithmetic.power_iteration import PowerIteration, Settings
from sn_function._arithmetic.stacks import Call


def normalize_all(
        calls: Sequence[Call]) -> list[tuple[tuple[Any, ...], PowerIteration]]:
    """Returns ``Y`` and ``sigma``, as named, and what backward needs.

    Args:
        calls: For each weight the arguments of
            :func:`.power_iteration.normalize`, and ``update_u``: whether to
            overwrite ``u`` with ``u_K``, unless that is not finite.

    Raises:
        VectorValueError: A ``u`` is zero or not finite.  None is changed.

    """
    def one(call: Call) -> Any:
        return power_iteration.normalize(
            call['settings'], call['W'], call['u'], call['gamma'],
            call['output_names'], call.get('reuse', False))

    # NaN and overflow show in the results; they need no warning as well.
    with numpy.errstate(all='ignore'):
        results = _run(calls, stacks.kind, stacks.normalize, one)
        for call, (_, it) in zip(calls, results):
            if call['update_u']:
                power_iteration.store(call['u'], it)
        return results


def gradients_all(calls: Sequence[Call]) -> list[tuple[Any, ...]]:
    """Returns ``gW``, ``gu`` and ``ggamma``, as wanted.

    Args:
        calls: For each weight the arguments of
            :func:`.power_iteration.gradients`.

    """
    with numpy.errstate(all='ignore'):
        return _run(calls, stacks.stack_of, stacks.gradients,
                    lambda call: power_iteration.gradients(**call))


def _run(
        calls: Sequence[Call], kind: Callable[[Call], Any],
        together: Callable[[Sequence[Call]], Sequence[Any]],
        one: Callable[[Call], Any]) -> list[Any]:
    """Returns the result of each call; those of a kind are done together."""
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


def warm_up(W: Any, u: Any, axis: int, n: int) -> None:
    """Moves ``u`` on by ``n`` iterations, unless it would not be finite."""
    normalize_all([{
        'settings': Settings(n, axis, True), 'W': W, 'u': u, 'gamma': 1.0,
        'output_names': (), 'update_u': True}])
