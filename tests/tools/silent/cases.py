"""What a case is, and what the cases have in common."""
from __future__ import annotations

import io
import warnings
from typing import Any, Callable, NamedTuple, Tuple

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.links as L
import numpy as np
from chainer import serializers

from tests import reference
from tests.tools.defects import builtin, ours

Outcome = Tuple[str, bool]
Hook = Callable[..., Any]


class Case(NamedTuple):
    """A fault, and what happens there.

    Attributes:
        name: Of the case, for people.
        run: Called with what makes a hook; returns a short text, with the
            figure, and whether that is right.
        theirs: Whether Chainer's hook has the fault, too.

    """

    name: str
    run: Callable[[Hook], Outcome]
    theirs: bool

    @property
    def id(self) -> str:
        return self.run.__name__


CASES: list[Case] = []


def case(name: str, theirs: bool = False) -> Callable[..., Any]:
    def register(run: Callable[[Hook], Outcome]) -> Callable[[Hook], Outcome]:
        CASES.append(Case(name, run, theirs))
        return run
    return register


class MissingError(Exception):
    """The version has no function or argument of this name."""


def public(name: str) -> Any:
    """A public name of the package that is imported."""
    try:
        value: Any = sn_function
        for part in name.split('.'):
            value = getattr(value, part)
        return value
    except AttributeError:
        raise MissingError(f'no `{name}`') from None


def outcome(case: Case, make_hook: Hook) -> Outcome:
    """The outcome of a case; an exception is one."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        np.random.seed(0)
        try:
            return case.run(make_hook)
        except MissingError as e:
            return str(e), False
        except Exception as e:
            if 'unexpected keyword argument' in str(e):
                return f'no argument `{str(e).split(chr(39))[1]}`', False
            return f'`{type(e).__name__}`', False


def outcome_now(case: Case) -> Outcome:
    return outcome(case, ours)


def outcome_of_chainer(case: Case) -> Outcome:
    return outcome(case, builtin)


# Measuring

# The norms of a first call: 15 iterations from a random vector.
FIRST = .98, 1.1


def linear(n: int, m: int, **kwargs: Any) -> Any:
    return L.Linear(n, m, nobias=True, **kwargs)


def x_of(*shape: int) -> Any:
    return np.random.RandomState(1).randn(*shape).astype('f')


def test_mode() -> Any:
    return chainer.using_config('train', False)


def used_norm(link: Any) -> float:
    """The true norm of what a linear link computes in test mode.

    It is that of its outputs for the rows of the identity.
    """
    eye = np.eye(link.W.shape[1], dtype=link.W.dtype)
    with test_mode():
        Y = link(eye).array
    if getattr(link, 'b', None) is not None:
        Y = Y - link.b.array
    return float(reference.true_norm(Y))


def text_of_norms(norms: Any, low: float = .98, high: float = 1.02) -> Outcome:
    """The norms of weights, of which each has to be within the bounds."""
    norms = np.atleast_1d(norms)
    text = ', '.join(f'{norm:.4g}' if norm >= 100 else f'{norm:.2f}'
                     for norm in norms)
    return f'norm {text}', bool(((low <= norms) & (norms <= high)).all())


def text_of_gamma(gamma: Any, W: Any) -> Outcome:
    """gamma beside the norm of the weight, which it has to be about."""
    gamma, norm = float(gamma.array), reference.true_norm(W.array)
    return f'gamma {gamma:.2f} for {norm:.2f}', (
        FIRST[0] * gamma <= norm <= FIRST[1] * gamma)


def text_of_warnings(caught: Any, expected: int = 1) -> Outcome:
    """How many warnings of the package there are."""
    found = [w for w in caught if w.category.__module__.startswith(
        'sn_function')]
    n = len(found)
    text = 'no warning' if n == 0 else f'{n} warning' + 's' * (n > 1)
    return text, n == expected


def text_of_error(call: Callable[[], Any]) -> Outcome:
    """The class of what is raised; right is one of this package's."""
    try:
        call()
    except Exception as e:
        return f'`{type(e).__name__}`', isinstance(
            e, sn_function.errors.SpectralNormalizationError)
    return 'nothing', False


def copied(source: Any, target: Any) -> Any:
    """Loads the parameters of one model into another, as files do."""
    file = io.BytesIO()
    serializers.save_npz(file, source)
    file.seek(0)
    serializers.load_npz(file, target, strict=False)
    return target
