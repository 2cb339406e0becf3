"""What has no effect, or is given by mistake, and is not told."""
from __future__ import annotations

import warnings
from typing import Any, Callable

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

from tests import reference
from tests.tools.silent.cases import (
    Hook,
    Outcome,
    case,
    linear,
    public,
    text_of_error,
    text_of_warnings,
    x_of,
)


def warned(call: Callable[[], Any]) -> Outcome:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        call()
    return text_of_warnings(caught)


# Hooks that Chainer does not call

class OldLinear(L.Linear):
    """As before Chainer 5, in the place of ``forward``."""

    def __call__(self, x: Any) -> Any:
        return F.linear(x, self.W)


class OldChain(chainer.Chain):

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.l1 = linear(8, 8)

    def __call__(self, x: Any) -> Any:
        return self.l1(self.l1(x))


@case('link whose class defines `__call__`', theirs=True)
def own_call(make_hook: Hook) -> Outcome:
    link = OldLinear(64, 64, nobias=True, initialW=np.float32(.375))
    bypassed = getattr(sn_function.errors, 'HookBypassedError', ())
    try:
        link.add_hook(make_hook())
    except bypassed as e:
        return f'`{type(e).__name__}`', True
    with chainer.using_config('train', False):
        Y = link(np.eye(64, dtype='f')).array
    return f'norm {reference.true_norm(Y):.4g}', False


@case('the same, in `summary`')
def own_call_in_summary(make_hook: Hook) -> Outcome:
    link = OldLinear(64, 64, nobias=True)
    try:
        link.add_hook(make_hook())
    except sn_function.errors.SpectralNormalizationError as e:
        return f'`{type(e).__name__}`', True
    status = sn_function.summary(link).rows[0].status
    return f'"{status}"', status == 'never'


@case('chain whose class defines `__call__`, hook of the chain')
def own_call_of_chain(make_hook: Hook) -> Outcome:
    return warned(lambda: OldChain().add_hook(
        sn_function.ChainSpectralNormalization()))


# Nothing to act on

@case('`bake` of a model without a hook')
def bake_nothing(make_hook: Hook) -> Outcome:
    return warned(lambda: sn_function.bake(linear(4, 3)))


@case('`cached` of a model without a hook')
def cache_nothing(make_hook: Hook) -> Outcome:
    def call() -> None:
        with sn_function.cached(linear(4, 3)):
            pass

    return warned(call)


@case('`SpectralNormReport(model).measure()` of a model without a hook')
def report_nothing(make_hook: Hook) -> Outcome:
    from sn_function.extensions import SpectralNormReport
    return text_of_error(SpectralNormReport(linear(4, 3)).measure)


@case('`use_gamma` after `optimizer.setup`')
def late_gamma(make_hook: Hook) -> Outcome:
    link = linear(4, 3)
    optimizer = chainer.optimizers.SGD().setup(link)
    text, ok = warned(lambda: link.add_hook(make_hook(use_gamma=True)))
    return text, ok and optimizer.target is link


@case('`SpectralNormalization` on a chain: what the error says')
def hook_of_link_on_chain(make_hook: Hook) -> Outcome:
    return advice(
        lambda: chainer.Sequential(linear(4, 3)).add_hook(make_hook()),
        'ChainSpectralNormalization')


@case("filter `'0'` of a Sequential: what the error says")
def filter_without_slash(make_hook: Hook) -> Outcome:
    return advice(
        lambda: chainer.Sequential(linear(4, 3)).add_hook(
            sn_function.ChainSpectralNormalization('0')), "'/0'")


def advice(call: Callable[[], Any], remedy: str) -> Outcome:
    """Whether an error names the remedy."""
    try:
        call()
    except sn_function.errors.SpectralNormalizationError as e:
        ok = remedy in str(e)
        return f'{"names" if ok else "does not name"} `{remedy}`', ok
    return 'no error', False


# Something else in the place of a model

@case("`bake('x.npz')`")
def bake_file(make_hook: Hook) -> Outcome:
    return text_of_error(lambda: sn_function.bake('x.npz'))


@case('`summary` of an array')
def summary_of_array(make_hook: Hook) -> Outcome:
    return text_of_error(lambda: sn_function.summary(x_of(3, 3)))


@case('`cached` of a hook')
def cached_hook(make_hook: Hook) -> Outcome:
    def call() -> None:
        with sn_function.cached(make_hook()):
            pass

    return text_of_error(call)


# What is printed

@case('`repr` of a hook')
def repr_of_hook(make_hook: Hook) -> Outcome:
    return printed(make_hook(use_gamma=True), 'use_gamma=True')


@case('`repr` of the hook of a chain')
def repr_of_chain_hook(make_hook: Hook) -> Outcome:
    return printed(public('ChainSpectralNormalization')('/0'), "'/0'")


@case('`repr` of a report')
def repr_of_report(make_hook: Hook) -> Outcome:
    from sn_function.extensions import SpectralNormReport
    model = linear(4, 3).add_hook(make_hook())
    return printed(SpectralNormReport(model, tolerance=.3), 'tolerance=0.3')


def printed(x: Any, setting: str) -> Outcome:
    """Whether a setting is in what is printed, rather than an address."""
    text = repr(x)
    ok = setting in text
    return f'`{text}`' if ok else 'an address', ok
