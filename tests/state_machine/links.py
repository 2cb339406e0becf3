"""Links that tell what they computed with, and raise or recur if told to."""
from __future__ import annotations

import threading
from typing import Callable, NamedTuple

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import chainer.links as L


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
        weights = {name: self.__dict__[name] for name in hooked(self)}
        for W in weights.values():
            assert not isinstance(W, chainer.Parameter)
        CALL.seen.append(weights)
        y = None
        if CALL.depth > 0:
            CALL.depth -= 1
            y = self(x)
            for name, W in weights.items():
                assert self.__dict__[name] is W
        y = super().forward(x) if y is None else super().forward(x) + y
        if CALL.error is not None:
            raise CALL.error
        return y


class Linear(_Watched, L.Linear):
    pass


class Convolution2D(_Watched, L.Convolution2D):
    pass


class Deconvolution2D(_Watched, L.Deconvolution2D):
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


class Kind(NamedTuple):
    make: Callable
    lazy: Callable | None
    x_shape: tuple | None  # None: indices
    bad_shape: tuple | None
    plain: Callable
KINDS = {
    'linear': Kind(
        lambda: Linear(5, 6), lambda: Linear(None, 6), (2, 5), (2, 4),
        lambda link, x, W: F.linear(x, W['W'], _bias(link))),
    'convolution': Kind(
        lambda: Convolution2D(3, 4, 2), lambda: Convolution2D(None, 4, 2),
        (2, 3, 3, 3), (2, 2, 3, 3),
        lambda link, x, W: F.convolution_2d(x, W['W'], _bias(link))),
    'deconvolution': Kind(
        lambda: Deconvolution2D(3, 4, 2), lambda: Deconvolution2D(None, 4, 2),
        (2, 3, 3, 3), (2, 2, 3, 3),
        lambda link, x, W: F.deconvolution_2d(x, W['W'], _bias(link))),
    'embedding': Kind(
        lambda: EmbedID(7, 5), None, None, None,
        lambda link, x, W: F.embed_id(x, W['W'])),
    'two': Kind(
        Two, None, (2, 5), (2, 4),
        lambda link, x, W: F.linear(F.linear(x, W['W']), W['H'])),
}


def _bias(link):
    return link.b.array.astype('d')


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


def axis_of(link):
    return int('Deconvolution' in type(link).__name__)


def our_hooks(link):
    return [h for h in (link._local_link_hooks or {}).values()
            if isinstance(h, sn_function.SpectralNormalization)]


def hooked(link):
    """Names of the weights that have a hook of ours."""
    return [h.weight_name for h in our_hooks(link)]


def keys_of(link):
    """Its attributes, but those that Chainer makes when it needs them."""
    return set(link.__dict__) - {'_device', '_local_link_hooks'}


def settings_of(hook):
    """What the user chose; axis is that of the link it was last added to."""
    return {name: value for name, value in vars(hook).items()
            if name != 'axis' and not name.startswith('_')}


CLASS_ATTRIBUTES = [
    (cls, name) for cls in (
        chainer.Link, L.Linear, L.Convolution2D, L.Deconvolution2D, L.EmbedID,
        _Two, _Watched, Linear, Convolution2D, Deconvolution2D, EmbedID,
        Two, chainer.Parameter, chainer.functions.util.forget.Forget)
    for name in ('forward', '__call__', '__setattr__', '__getattribute__',
                 'backward')]


def class_attributes():
    return [getattr(cls, name, None) for cls, name in CLASS_ATTRIBUTES]
