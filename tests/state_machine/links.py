"""Links that tell what they computed with, and raise or recur if told to."""
from __future__ import annotations

import threading
from typing import Callable, NamedTuple

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np


class _Call(threading.local):
    """What the calls of this thread are to do, and what they saw."""

    def __init__(self):
        self.reset()

    def reset(self, depth=0, error=None):
        self.seen = []
        self.depth = depth
        self.error = error


CALL = _Call()


class _Watched:

    def forward(self, x):
        weights = {name: self.used(name) for name in hooked(self)}
        for W in weights.values():
            assert not isinstance(W, chainer.Parameter)
        CALL.seen.append(weights)
        y = None
        if CALL.depth > 0:
            CALL.depth -= 1
            y = self(x)
            for name, W in weights.items():
                assert self.used(name) is W
        y = self.plain(x) if y is None else self.plain(x) + y
        if CALL.error is not None:
            raise CALL.error
        return y

    def used(self, name):
        """The weight that the link would compute with now."""
        return self.__dict__[name]

    def plain(self, x):
        return super().forward(x)


class _WatchedRNN(_Watched):
    """Has the weights of its layers in a list, and two sequences as x."""

    def used(self, name):
        i, weight_name = name.split('/')
        return self.ws[int(i)][int(weight_name[1:])]

    def plain(self, x):
        states = [None] * (1 + isinstance(self, L.NStepLSTM))
        ys = super(_Watched, self).forward(*states, [x[0], x[1]])[-1]
        return F.concat(ys, axis=0)


class Linear(_Watched, L.Linear):
    pass


class Convolution2D(_Watched, L.Convolution2D):
    pass


class Deconvolution2D(_Watched, L.Deconvolution2D):
    pass


class DepthwiseConvolution2D(_Watched, L.DepthwiseConvolution2D):
    pass


class EmbedID(_Watched, L.EmbedID):
    pass


class _Two(chainer.Link):

    def __init__(self):
        super().__init__()
        with self.init_scope():
            for name, shape in (('W', (6, 5)), ('H', (6, 6))):
                setattr(self, name, chainer.Parameter(
                    chainer.initializers.Normal(1.0), shape))

    def forward(self, x):
        return F.linear(F.linear(x, self.W), self.H)


class Two(_Watched, _Two):
    pass


class NStepLSTM(_WatchedRNN, L.NStepLSTM):
    pass


class NStepGRU(_WatchedRNN, L.NStepGRU):
    pass


def plain_rnn(function, n_states, n_weights):
    """The function of an n-step RNN of one layer, from zero states."""
    def call(x, W):
        x = chainer.as_variable(x)
        states = [np.zeros((1, 2, 4), x.dtype)] * n_states
        *_, ys = function(
            1, 0., *states,
            *[[[chainer.as_variable(W[f'0/{letter}{j}'])
                for j in range(n_weights)]] for letter in 'wb'],
            [x[:, t] for t in range(x.shape[1])])
        return F.concat(F.transpose_sequence(ys), axis=0)
    return call


class Kind(NamedTuple):
    """How links of a kind are made, and what they compute.

    The latter is ``plain(x, W)``, of a dictionary of all parameters.  A
    convolution has one without bias, too, for its map, and groups of it.
    """

    make: Callable
    lazy: Callable | None
    x_shape: tuple | None  # None: indices
    bad_shape: tuple | None
    plain: Callable
    map: Callable | None = None
    n_groups: int = 1


KINDS = {
    'linear': Kind(
        lambda: Linear(5, 6), lambda: Linear(None, 6), (2, 5), (2, 4),
        lambda x, W: F.linear(x, W['W'], W['b'])),
    'convolution': Kind(
        lambda: Convolution2D(3, 4, 2), lambda: Convolution2D(None, 4, 2),
        (2, 3, 3, 3), (2, 2, 3, 3),
        lambda x, W: F.convolution_2d(x, W['W'], W['b']),
        lambda: L.Convolution2D(3, 4, 2, nobias=True)),
    'groups': Kind(
        lambda: Convolution2D(4, 6, 2, groups=2),
        lambda: Convolution2D(None, 6, 2, groups=2),
        (2, 4, 3, 3), (2, 2, 3, 3),
        lambda x, W: F.convolution_2d(x, W['W'], W['b'], groups=2),
        lambda: L.Convolution2D(4, 6, 2, groups=2, nobias=True), 2),
    'depthwise': Kind(
        lambda: DepthwiseConvolution2D(3, 2, 2),
        lambda: DepthwiseConvolution2D(None, 2, 2),
        (2, 3, 3, 3), (2, 2, 3, 3),
        lambda x, W: F.depthwise_convolution_2d(x, W['W'], W['b']),
        lambda: L.DepthwiseConvolution2D(3, 2, 2, nobias=True), 3),
    'deconvolution': Kind(
        lambda: Deconvolution2D(3, 4, 2), lambda: Deconvolution2D(None, 4, 2),
        (2, 3, 3, 3), (2, 2, 3, 3),
        lambda x, W: F.deconvolution_2d(x, W['W'], W['b']),
        lambda: L.Deconvolution2D(3, 4, 2, nobias=True)),
    'embedding': Kind(
        lambda: EmbedID(7, 5), None, None, None,
        lambda x, W: F.embed_id(x, W['W'])),
    'two': Kind(
        Two, None, (2, 5), (2, 4),
        lambda x, W: F.linear(F.linear(x, W['W']), W['H'])),
    'LSTM': Kind(
        lambda: NStepLSTM(1, 3, 4, 0.), None, (2, 3, 3), (2, 3, 4),
        plain_rnn(F.n_step_lstm, 2, 8)),
    'GRU': Kind(
        lambda: NStepGRU(1, 3, 4, 0.), None, (2, 3, 3), (2, 3, 4),
        plain_rnn(F.n_step_gru, 1, 6)),
}


class Fails(chainer.LinkHook):
    """Another hook, that raises."""

    name = 'Fails'

    def __init__(self, when):
        self.when = when

    def forward_preprocess(self, args):
        if self.when == 'pre':
            raise RuntimeError('pre')

    def forward_postprocess(self, args):
        if self.when == 'post':
            raise RuntimeError('post')


class FailingNode(chainer.FunctionNode):

    def forward(self, inputs):
        return inputs[0].copy(),

    def backward(self, indexes, grad_outputs):
        raise ZeroDivisionError('backward')


# Names of parameters are those in the link, or paths such as '0/w1'.

def place_of(link, name):
    """The link that has a parameter, and its name there."""
    *path, name = name.split('/')
    return (link[int(path[0])] if path else link), name


def params_of(link):
    return {path.lstrip('/'): p for path, p in link.namedparams()}


def hooks_of(link):
    """Our hooks by the weight that each is for."""
    return {
        f'{path}/{hook.weight_name}'.lstrip('/'): hook
        for path, owner in link.namedlinks()
        for hook in (owner._local_link_hooks or {}).values()
        if isinstance(hook, sn_function.SpectralNormalization)}


def our_hooks(link):
    return list(hooks_of(link).values())


def hooked(link):
    """Names of the weights that have a hook of ours."""
    return list(hooks_of(link))


def axis_of(link, name):
    axis = hooks_of(link)[name].given_axis
    return int('Deconvolution' in type(link).__name__) if axis is None else (
        axis)


def moves(link, name, train):
    """Whether calls move u on."""
    return train or hooks_of(link)[name].update_u == 'always'


def is_map(link, name):
    """Whether the hook takes the norm of what the link makes of images."""
    return hooks_of(link)[name].norm == 'operator' and (
        'onvolution' in type(link).__name__)


def vector_name(link, name):
    return name + ('_map' if is_map(link, name) else '_u')


def vector_of(link, name):
    owner, name = place_of(link, vector_name(link, name))
    return owner.__dict__[name]


def others_of(link, name):
    """Its other vectors, if the hook has several."""
    owner, name = place_of(link, vector_name(link, name) + 's')
    return owner.__dict__.get(name)


def keys_of(link):
    """Its attributes, but those that Chainer makes when it needs them."""
    return {(path, key) for path, owner in link.namedlinks()
            for key in set(owner.__dict__) - {'_device', '_local_link_hooks'}}


def persistent_of(link):
    return {(path, key) for path, owner in link.namedlinks()
            for key in owner._persistent}


def settings_of(hook):
    """What the user chose; axis is that of the link it was last added to."""
    return {name: value for name, value in vars(hook).items()
            if name != 'axis' and not name.startswith('_')}


CLASS_ATTRIBUTES = [
    (cls, name) for cls in (
        chainer.Link, L.Linear, L.Convolution2D, L.Deconvolution2D, L.EmbedID,
        L.DepthwiseConvolution2D, _Two, _Watched, Linear, Convolution2D,
        Deconvolution2D, DepthwiseConvolution2D, EmbedID, Two, L.NStepLSTM,
        L.NStepGRU, _WatchedRNN, NStepLSTM, NStepGRU,
        chainer.Parameter, chainer.functions.util.forget.Forget)
    for name in ('forward', '__call__', '__setattr__', '__getattribute__',
                 'backward')]


def class_attributes():
    return [getattr(cls, name, None) for cls, name in CLASS_ATTRIBUTES]
