"""Threads that call one model: outputs, gradients and what is left behind.

``python -m tests.tools.threads`` prints a table; ``--calls`` is the number of
calls of each thread, of which the rarer cases get a tenth.  The interpreter
switches threads as often as it can.

The oracle is the SVD in float64: the weights have a large gap behind their
first singular value, and their vectors have converged, so that calls in
training mode have the same output as those in test mode.
"""
import argparse
import contextlib
import sys
import threading
import time
from typing import Callable, List, NamedTuple

import numpy as np

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import chainer.links as L
from chainer import link_hooks

NORM = 8  # of the raw weights
TOLERANCE = 1e-5  # in training mode; in test mode all bits are the same


class Row(NamedTuple):
    name: str
    calls: int
    wrong: int
    errors: List[str]
    seconds: float

    @property
    def is_right(self):
        return not self.wrong and not self.errors


class Case(NamedTuple):
    name: str
    make: Callable  # the model
    run: Callable  # of model and x: what must always be the same, in a list
    train: bool
    share: float  # of the calls


CASES: List[Case] = []


def case(name, make, modes=(False, True), share=1):
    def register(run):
        CASES.extend(Case(
            f'{name}, {"training" if train else "test"}', make, run, train,
            share) for train in modes)
        return run
    return register


def with_gap(link, seed):
    """Gives a link a weight of norm 8, whose other values are below 1."""
    rng = np.random.RandomState(seed)
    m = link.W.shape[0]
    U, s, V = np.linalg.svd(
        rng.randn(m, link.W.size // m), full_matrices=False)
    s /= s[0]
    s[0] = NORM
    link.W.array[...] = ((U * s) @ V).reshape(link.W.shape)
    return link


def linear(seed, kind=L.Linear):
    return with_gap(kind(8, 8, nobias=True), seed)


def hook():
    return sn_function.SpectralNormalization()


def hooked(*kinds):
    return chainer.Sequential(*[
        linear(seed, kind).add_hook(hook()) for seed, kind in enumerate(
            kinds or [L.Linear] * 2)])


def of_chain():
    return chainer.Sequential(*map(linear, range(4))).add_hook(
        sn_function.ChainSpectralNormalization())


def standardized():
    model = chainer.Sequential(with_gap(L.Convolution2D(8, 8, 1), 0))
    model[0].add_hook(hook()).add_hook(link_hooks.WeightStandardization())
    return model


class Recursive(L.Linear):

    def forward(self, x, depth=2):
        y = super().forward(x)
        return self(y, depth - 1) if depth else y


class Raising(L.Linear):

    def forward(self, x, raises=False):
        y = super().forward(x)
        if raises:
            raise ZeroDivisionError
        return y


@case('a link that calls itself', lambda: hooked(Recursive), share=0.1)
@case('a hook for the chain', of_chain, [False])
@case('a hook on each link', hooked, [False])
def call(model, x):
    return [model(x)]


@case('a second hook', standardized, share=0.1)
def call_with_images(model, x):
    return [model(F.reshape(x, (*x.shape, 1, 1)))]


@case('cached', of_chain)
def call_in_scope(model, x):
    with sn_function.cached(model):
        return [model(x), model(x)]


@case('normalized', of_chain)
def read_in_scope(model, x):
    with sn_function.normalized(model):
        return [*(link.W for link in model), model(x)]


@case('a hook for the chain, gradients', of_chain, [True])
@case('a hook on each link, gradients', hooked, [True])
def differentiate(model, x):
    y = model(x)
    # Not backward: it adds to the gradients that all threads share.  Nor
    # link.W, which is the normalized one while another thread is in a call.
    return [y, *chainer.grad([F.sum(y * y)], model.Ws)]


@case('forget', hooked, [True], share=0.1)
def forget(model, x):
    x = chainer.Variable(x)
    y = F.forget(model, x)
    y.grad = np.ones_like(y.array)
    y.backward()
    return [y, x.grad_var]


@case('calls that raise', lambda: hooked(Raising), share=0.1)
def call_that_raises(model, x):
    with contextlib.suppress(ZeroDivisionError):
        model[0](x, True)
    return [model(x)]


def is_same(actual, expected, train):
    if not train:
        return all(a.tobytes() == b.tobytes()
                   for a, b in zip(actual, expected))
    return all(np.abs(a - b).max() <= TOLERANCE * max(1, np.abs(b).max())
               for a, b in zip(actual, expected))


def left_behind(model, raw):
    """What is wrong with the model after the calls."""
    found = []
    for link, (W, names) in zip(model, raw):
        if link.W is not W:
            found.append('link.W is another')
        found += [f'link.{name} is left' for name in set(vars(link)) - names]
        U, _, _ = np.linalg.svd(W.array.reshape(len(W), -1).astype('d'))
        if abs(U[:, 0] @ link.W_u) < 1 - 1e-5:
            found.append('u is wrong')
    return found


def run(case, n_threads, n_calls):
    """Runs a case; returns its row of the table."""
    np.random.seed(0)
    model = case.make()
    model.Ws = [link.W for link in model]
    x = np.random.randn(4, 8).astype('f')
    for _ in range(20):
        case.run(model, x)
    with chainer.using_config('train', False):
        check_norm(model)
    raw = [(link.W, set(vars(link))) for link in model]
    wrong, errors = [], []

    def arrays():
        return [y.array for y in case.run(model, x)]

    def work():
        # Chainer's configuration is that of a thread.
        with chainer.using_config('train', case.train):
            for _ in range(n_calls):
                try:
                    if not is_same(arrays(), expected, case.train):
                        wrong.append(1)
                except Exception as e:
                    errors.append(repr(e))

    with chainer.using_config('train', case.train):
        expected = arrays()
    threads = [threading.Thread(target=work) for _ in range(n_threads)]
    start = time.perf_counter()
    with switch_interval(1e-6):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    seconds = time.perf_counter() - start
    errors += left_behind(model, raw)
    return Row(case.name, n_threads * n_calls, len(wrong), errors, seconds)


def check_norm(model):
    """What is expected is itself compared with the SVD."""
    hook, = [h for h in model[0].local_link_hooks.values()
             if isinstance(h, sn_function.SpectralNormalization)]
    Y = hook.normalize_weight(model[0]).array
    norm = np.linalg.norm(Y.reshape(len(Y), -1).astype('d'), 2)
    assert abs(norm - 1) < 1e-5, norm


@contextlib.contextmanager
def switch_interval(seconds):
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--threads', type=int, default=4)
    parser.add_argument('--calls', type=int, default=20000)
    parser.add_argument('--only', default='', help='part of a name')
    args = parser.parse_args()
    print(f'{"case":<44} {"calls":>7} {"wrong":>6} {"errors":>6} {"us":>6}')
    rows = []
    for c in CASES:
        if args.only in c.name:
            row = run(c, args.threads, int(args.calls * c.share))
            rows.append(row)
            print(f'{row.name:<44} {row.calls:>7} {row.wrong:>6} '
                  f'{len(row.errors):>6} {row.seconds / row.calls * 1e6:>6.0f}'
                  f'  {", ".join(sorted(set(row.errors)))}'.rstrip(),
                  flush=True)
    return not all(row.is_right for row in rows)


if __name__ == '__main__':
    sys.exit(main())
