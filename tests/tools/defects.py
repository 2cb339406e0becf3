"""Defects of Chainer's hook, and what this package does in their place.

``python -m tests.tools.defects`` runs each case on both and prints a table;
``--rst`` prints it as ``docs/defects.rst`` has it.  :mod:`tests.test_tools`
asserts the outcomes.  A case takes a function that makes a hook.  It returns
what happened, in a few words, and whether that is right.
"""
import argparse
import contextlib
import io
import sys
import warnings
from typing import Callable, List, NamedTuple, Tuple

import numpy as np

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import chainer.links as L
from chainer import gradient_check, link_hooks, serializers

from tests.tools.tables import show

Outcome = Tuple[str, bool]


class Case(NamedTuple):
    name: str
    run: Callable[[Callable], Outcome]


CASES: List[Case] = []


def case(name):
    def register(run):
        CASES.append(Case(name, run))
        return run
    return register


def builtin(**kwargs):
    kwargs.pop('n_warmup', None)
    return link_hooks.SpectralNormalization(**kwargs)


def ours(**kwargs):
    return sn_function.SpectralNormalization(**kwargs)


def norm_of_normalized(link, train=True):
    """The true norm of the weight that the link computes with."""
    hook, = link.local_link_hooks.values()
    with chainer.using_config('train', train):
        Y = hook.normalize_weight(link).array
    Y = np.moveaxis(Y, hook.axis, 0).reshape(Y.shape[hook.axis], -1)
    if not np.isfinite(Y).all():
        return float('nan')
    return float(np.linalg.norm(Y.astype('d'), 2))


def linear(W, make_hook, **kwargs):
    """A linear link with the weight W (an array or a shape) and a hook."""
    if isinstance(W, tuple):
        W = np.random.RandomState(0).randn(*W).astype('f')
    link = L.Linear(W.shape[1], W.shape[0], nobias=True)
    link.W.array = W.copy()  # initialW would make it float32
    np.random.seed(0)
    return link.add_hook(make_hook(**kwargs))


def x_of(*shape):
    return np.random.RandomState(1).randn(*shape).astype('f')


def outcome_of_norm(norm, low=0.0):
    return f'norm {norm:.3g}', bool(low <= norm < 1.02)


@case('`link.forward` raises')
def forward_raises(make_hook):
    link = linear((6, 5), make_hook)
    W = link.W
    with contextlib.suppress(Exception):
        link(x_of(2, 4))
    if link.W is W:
        return 'weight put back', True
    return f'`link.W` stays a `{type(link.W).__name__}`', False


@case('called as `link(x=x)`')
def keyword_call(make_hook):
    y = L.Linear(None, 6).add_hook(make_hook())(x=x_of(2, 5))
    return 'works', y.shape == (2, 6)


@case('snapshot loaded into a lazy link (chainer#8453)')
def load_into_lazy_link(make_hook):
    source = linear((6, 5), make_hook)
    for _ in range(3):
        source(x_of(2, 5))
    file = io.BytesIO()
    serializers.save_npz(file, source)
    file.seek(0)
    link = L.Linear(None, 6, nobias=True).add_hook(make_hook())
    serializers.load_npz(file, link)
    with chainer.using_config('train', False):
        link(x_of(2, 5))
    ok = np.array_equal(link.W_u, source.W_u)
    return 'u loaded' if ok else 'saved u dropped', ok


@case('weight all zero once')
def zero_once(make_hook):
    return _recovery(make_hook, lambda W: W.fill(0))


@case('one NaN in the weight, once')
def nan_once(make_hook):
    return _recovery(make_hook, lambda W: W.fill(np.nan))


@case('one Inf in the weight, once')
def inf_once(make_hook):
    return _recovery(make_hook, lambda W: W[0].fill(np.inf))


def _recovery(make_hook, spoil):
    link = linear((6, 5), make_hook)
    for _ in range(30):
        link(x_of(2, 5))
    good = link.W.array.copy()
    spoil(link.W.array)
    with np.errstate(all='ignore'):
        link(x_of(2, 5))
        link.W.array[...] = good
        norm = norm_of_normalized(link)
    if np.isnan(norm):
        return 'NaN for ever', False
    return f'norm {norm:.3g} as soon as it is restored', 0.99 < norm < 1.01


@case('float16, 512 x 512, entries around 30')
def float16_large_entries(make_hook):
    return _float16(make_hook, 512, 30)


@case('float16, 4096 x 4096, entries around 1')
def float16_large_shape(make_hook):
    return _float16(make_hook, 4096, 1)


def _float16(make_hook, n, scale):
    W = np.random.RandomState(0).randn(n, n).astype('f') * scale
    link = linear(W.astype(np.float16), make_hook)
    hook, = link.local_link_hooks.values()
    with np.errstate(all='ignore'):
        for _ in range(5):
            Y = hook.normalize_weight(link).array.astype('f')
    if not np.isfinite(Y).all():
        return 'NaN for ever', False
    u = link.W_u.astype('f')
    for _ in range(60):  # the SVD of so large a matrix takes too long
        v = Y.T @ (u / np.linalg.norm(u))
        u = Y @ (v / np.linalg.norm(v))
    return outcome_of_norm(float(np.linalg.norm(u)), 0.98)


@case('float32, entries around 1e-7, 10 calls')
def tiny_entries(make_hook):
    W = np.random.RandomState(0).randn(6, 5).astype('f') * np.float32(1e-7)
    link = linear(W, make_hook)
    return outcome_of_norm(max(
        norm_of_normalized(link) for _ in range(10)))


@case('first call, 6 x 5')
def first_call_small(make_hook):
    return outcome_of_norm(norm_of_normalized(linear((6, 5), make_hook)), .98)


@case('first call, 200 x 200')
def first_call_large(make_hook):
    return outcome_of_norm(
        norm_of_normalized(linear((200, 200), make_hook)), .98)


@case('one hook on two lazy links')
def one_hook_two_lazy_links(make_hook):
    hook = make_hook()
    for n in (3, 4):
        L.Linear(None, n).add_hook(hook)(x_of(2, 5))
    return 'works', True


@case('one hook on a deconvolution, then on a convolution')
def one_hook_two_axes(make_hook):
    hook = make_hook()
    L.Deconvolution2D(3, 5, 3).add_hook(hook)
    conv = L.Convolution2D(3, 5, 3).add_hook(hook)
    m = conv.W_u.shape[0]
    return (f'u of length {m} for 5 outputs', m == 5)


@case('`delete_hook` before the first call')
def delete_before_initialization(make_hook):
    hook = make_hook()
    link = L.Linear(None, 6).add_hook(hook)
    link.delete_hook(hook.name)
    return 'works', not hasattr(link, 'W_u')


@case('`F.forget` over two calls before backward')
def forget_two_calls(make_hook):
    grads = []
    for call in (lambda f, x: f(x), F.forget):
        link = linear((6, 5), make_hook)
        x1, x2 = x_of(2, 2, 5)
        ys = [F.sum(call(link, chainer.Variable(x)) ** 2) for x in (x1, x2)]
        link.cleargrads()
        (ys[0] + 3 * ys[1]).backward()
        grads.append(link.W.grad)
    error = np.linalg.norm(grads[1] - grads[0]) / np.linalg.norm(grads[0])
    return f'gradient off by {error:.2g}', bool(error < 1e-5)


class TwoWeights(chainer.Link):

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.W = chainer.Parameter(x_of(6, 5))
            self.H = chainer.Parameter(2 * x_of(6, 6))

    def forward(self, x):
        return F.linear(F.linear(x, self.W), self.H)


@case('two hooks with `use_gamma` on one link')
def two_gammas(make_hook):
    link = TwoWeights()
    link.add_hook(make_hook(use_gamma=True))
    link.add_hook(make_hook(use_gamma=True, weight_name='H', name='H'))
    link(x_of(2, 5))
    n = len(list(link.params())) - 2
    return f'{n} gamma for 2 weights' if n == 1 else 'one gamma each', n == 2


@case('`repeat()` or `copy("init")` with `use_gamma`')
def repeat_with_gamma(make_hook):
    links = linear((6, 5), make_hook, use_gamma=True).repeat(3, mode='init')
    for link in links:
        link.W.array[...] *= 2
        link.gamma.initialize(())
    ok = all(np.isclose(link.gamma.array, np.linalg.norm(link.W.array, 2))
             for link in links)
    return 'works', ok


@case('`gradient_check` at an unconverged u')
def gradient_check_unconverged(make_hook):
    link = linear(x_of(6, 5).astype('d'), make_hook, n_warmup=0)
    hook, = link.local_link_hooks.values()

    def f(W):
        link.__dict__['W'] = W
        return hook.normalize_weight(link)

    W, gy = link.W.array, x_of(6, 5).astype('d') ** 2
    with chainer.using_config('train', False):
        try:
            gradient_check.check_backward(
                f, W, gy, dtype='d', eps=1e-5, atol=1e-6, rtol=1e-6)
        except AssertionError:
            return 'fails', False
    return 'passes', True


def run(run_case, make_hook):
    """The outcome of a case; an exception is one."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            return run_case(make_hook)
        except Exception as e:
            return f'`{type(e).__name__}`', False


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog='python -m tests.tools.defects',
        description=__doc__.split('\n')[0])
    parser.add_argument('--rst', action='store_true', help='as in the docs')
    args = parser.parse_args(argv)
    rows = [(c, *(run(c.run, make) for make in (builtin, ours)))
            for c in CASES]
    if args.rst:
        show([('case', 'Chainer 7.8.1', 'sn_function', 'test'), *(
            (c.name, theirs, mine, f'`{c.run.__name__}`')
            for c, (theirs, _), (mine, _) in rows)], as_rst=True)
    else:
        from rich.console import Console
        from rich.table import Table
        table = Table('case', 'Chainer 7.8.1', 'sn_function')
        for c, *outcomes in rows:
            table.add_row(c.name.replace('`', ''), *(
                f'[{"green" if ok else "red"}]{text.replace("`", "")}[/]'
                for text, ok in outcomes))
        console = Console()
        Console(width=None if console.is_terminal else 100).print(table)
    return 0 if all(ok for _, _, (_, ok) in rows) else 1


if __name__ == '__main__':
    sys.exit(main())
