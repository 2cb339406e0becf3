"""Models, kinds of links, and settings."""
from __future__ import annotations

import pickle
from typing import Any

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

from tests import reference
from tests.tools import threads
from tests.tools.silent.cases import (
    Hook,
    MissingError,
    Outcome,
    case,
    linear,
    public,
    test_mode,
    text_of_norms,
    x_of,
)

# The summary of a run


class Hidden(chainer.Chain):
    """Calls links in a list, and one in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.own = L.Linear(4, 4)
        self.in_list = [L.Linear(4, 4)]
        self.plain = chainer.ChainList(L.Linear(4, 4))

    def forward(self, x: Any) -> Any:
        return self.plain[0](self.in_list[0](self.own(x)))


class Aliases(chainer.ChainList):
    """Calls its 27 links by other names."""

    def __init__(self) -> None:
        super().__init__(*[L.Linear(4, 4) for _ in range(27)])
        self.all = list(self)

    def forward(self, x: Any) -> Any:
        for link in self.all:
            x = link(x)
        return x


def of_run(model: Any) -> Any:
    return sn_function.summary(model, lambda model: model(x_of(2, 4)))


@case('`summary` with a run: links in a list, and in a plain attribute')
def summary_of_hidden_links(make_hook: Hook) -> Outcome:
    found = of_run(Hidden().add_hook(sn_function.ChainSpectralNormalization()))
    n = len(getattr(found, 'remarks', ()))
    return f'{n} of 2 links remarked on' if n else 'says nothing', n == 2


@case('`summary` with a run: a ChainList that calls 27 links by attributes')
def summary_of_aliases(make_hook: Hook) -> Outcome:
    model = Aliases().add_hook(sn_function.ChainSpectralNormalization())
    n = sum('not called' in row.note for row in of_run(model).rows)
    return f'{n} of 27 "not called"', n == 0


@case('`summary` with a run: the model afterwards')
def summary_leaves_the_model(make_hook: Hook) -> Outcome:
    model = Aliases().add_hook(sn_function.ChainSpectralNormalization())
    model.hidden = [L.Linear(None, 4)]
    before = pickle.dumps(model)
    sn_function.summary(
        model, lambda model: model.hidden[0](model(x_of(2, 4))))
    same = pickle.dumps(model) == before
    return 'unchanged' if same else 'changed', same


@case('`summary` of a hook for `w0` of a layer in `L.NStepLSTM`')
def summary_of_n_step(make_hook: Hook) -> Outcome:
    rnn = L.NStepLSTM(1, 8, 8, 0.)
    rnn[0].add_hook(make_hook(weight_name='w0'))
    status, = (row.status for row in sn_function.summary(rnn).rows
               if row.path.endswith('/w0'))
    return f'"{status}"', status == 'never'


# N-step RNNs

def n_step_norms(rnn: Any) -> Any:
    """The norms of the matrices that the RNN computes with in test mode."""
    used: Any = []
    compute = rnn.rnn

    def spy(n_layers: int, dropout: float, *args: Any) -> Any:
        used.extend(w.array for w in args[2][0])
        return compute(n_layers, dropout, *args)

    rnn.rnn = spy
    with test_mode():
        rnn(None, None, [x_of(3, 16)])
    return [reference.true_norm(w) for w in used]


@case('weights of `L.NStepLSTM`, hook on it, or else on its layers')
def n_step(make_hook: Hook) -> Outcome:
    rnn = L.NStepLSTM(1, 16, 16, 0.)
    try:
        rnn.add_hook(make_hook(n_warmup=200))
    except sn_function.errors.WeightNotFoundError:
        for i in range(8):
            rnn[0].add_hook(make_hook(
                weight_name=f'w{i}', name=str(i), n_warmup=200))
    norms = n_step_norms(rnn)
    text, ok = text_of_norms([min(norms), max(norms)])
    return text.replace(', ', ' to '), ok


# A cap

@case('target of norm 0.3 from a weight of 1.5, `cap=1` or projection')
def projection(make_hook: Hook) -> Outcome:
    W = np.random.RandomState(0).randn(8, 8)
    link = linear(8, 8, initialW=1.5 * W / reference.true_norm(W))
    optimizer = chainer.optimizers.SGD(.5).setup(link)
    try:
        optimizer.add_hook(public('optimizer_hooks.SpectralNormProjection')(1))
    except MissingError:
        link.add_hook(make_hook(cap=1))
    x = np.float32(8 ** .5) * np.eye(8, dtype='f')
    for _ in range(300):
        optimizer.update(lambda: F.mean_squared_error(link(x), .3 * x))
    loss = float(F.mean_squared_error(link(x), .3 * x).array)
    return f'loss {loss:.3f}', loss < .001


# Groups

def largest_group(make_hook: Hook, link: Any, n_groups: int) -> Outcome:
    """The norm of the largest group, by ``groups='each'`` if there is that."""
    try:
        hook = make_hook(n_warmup=200, groups='each')
    except TypeError:  # no such argument
        hook = make_hook(n_warmup=200)
    link.add_hook(hook)
    Y = hook.normalize_weight(link).array
    if isinstance(link, L.DepthwiseConvolution2D):
        Y = Y.transpose(1, 0, 2, 3)  # a group for each channel
    return text_of_norms(max(
        reference.true_norm(group.reshape(len(group), -1))
        for group in np.split(Y, n_groups)))


@case('convolution, 4 groups, the largest one')
def four_groups(make_hook: Hook) -> Outcome:
    return largest_group(
        make_hook, L.Convolution2D(64, 64, 3, groups=4), 4)


@case('convolution, 256 groups, the largest one')
def many_groups(make_hook: Hook) -> Outcome:
    return largest_group(
        make_hook, L.Convolution2D(256, 256, 3, groups=256), 256)


@case('`L.DepthwiseConvolution2D`, the largest channel')
def depthwise(make_hook: Hook) -> Outcome:
    return largest_group(
        make_hook, L.DepthwiseConvolution2D(64, 1, 3), 64)


# Threads

def of_threads(name: str) -> Outcome:
    """Wrong outputs, and errors, where four threads call one model."""
    found, = (c for c in threads.CASES if c.name == name)
    row = threads.run(found, 4, 250)
    kinds = sorted({error.split('(')[0] for error in row.errors})
    text = f'{row.wrong} of {row.calls:,} wrong'
    return ', '.join([text, *(f'`{kind}`' if kind.endswith('Error') else kind
                              for kind in kinds)]), row.is_right


@case('4 threads in test mode, a hook on each link')
def threads_of_links(make_hook: Hook) -> Outcome:
    return of_threads('a hook on each link, test')


@case('4 threads in test mode, a hook for the chain')
def threads_of_chain(make_hook: Hook) -> Outcome:
    return of_threads('a hook for the chain, test')
