"""Which classes of links hide the call of Chainer that calls hooks."""
import functools

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import sequential, static_graph

from sn_function._links.bypass import bypasses_hooks


class Recorder(chainer.LinkHook):
    """The oracle: whether Chainer calls it."""

    def __init__(self):
        self.is_called = False

    def forward_preprocess(self, args):
        self.is_called = True


def is_called(link):
    hook = Recorder()
    link.add_hook(hook)
    with chainer.using_config('use_static_graph', False):  # for chains only
        link(np.ones((2, 3), 'f'))
    return hook.is_called


def plain_decorator(function):
    @functools.wraps(function)
    def wrapped(*args):
        return function(*args)
    return wrapped


class ByForward(L.Linear):

    def forward(self, x):
        return F.linear(x, self.W)


class Own(L.Linear):

    def __call__(self, x):
        return F.linear(x, self.W)


class OwnToForward(L.Linear):

    def __call__(self, x):
        return self.forward(x)


class OwnIsForward(L.Linear):
    __call__ = L.Linear.forward


class Decorated(L.Linear):

    @plain_decorator
    def __call__(self, x):
        return F.linear(x, self.W)


class Static(L.Linear):

    @static_graph
    def __call__(self, x):
        return F.linear(x, self.W)


class ChildOfOwn(Own):
    pass


class SuperOfOwn(Own):

    def __call__(self, x):
        return super().__call__(x)


class Mixin:

    def __call__(self, x):
        return F.linear(x, self.W)


class MixedBefore(Mixin, L.Linear):
    pass


class MixedAfter(L.Linear, Mixin):
    pass


class SuperMixin:

    def __call__(self, x):
        return 2 * super().__call__(x)


class SuperMixedBefore(SuperMixin, L.Linear):
    pass


class Super(L.Linear):

    def __call__(self, x):
        return super().__call__(x)


class OldSuper(L.Linear):

    def __call__(self, x):
        return super(OldSuper, self).__call__(x)  # NOQA: UP008


class SuperDecorated(L.Linear):

    @plain_decorator
    def __call__(self, x):
        return super().__call__(x)


class SuperInside(L.Linear):

    def __call__(self, x):
        return (lambda x: super(SuperInside, self).__call__(x))(x)


class SuperByName(L.Linear):

    def __call__(self, x):
        return getattr(super(), '__call__')(x)  # NOQA: B004, B009


class ByMethod(L.Linear):

    def __call__(self, x):
        return self.call(x)

    def call(self, x):
        return self.call_again(x)

    def call_again(self, x):
        return super().__call__(x)


class LinkByName(Own):

    def __call__(self, x):
        return chainer.Link.__call__(self, x)


class Restored(Own):
    __call__ = chainer.Link.__call__
    forward = Own.__call__


class ByPartial(L.Linear):
    __call__ = functools.partialmethod(L.Linear.__call__)


BYPASSING = [Own, OwnToForward, OwnIsForward, Decorated, Static, ChildOfOwn,
             SuperOfOwn, MixedBefore]
REACHING = [L.Linear, ByForward, MixedAfter, SuperMixedBefore, Super, OldSuper,
            SuperDecorated, SuperInside, SuperByName, ByMethod, LinkByName,
            Restored, ByPartial]


@pytest.mark.parametrize('kind', BYPASSING)
def test_it_bypasses_hooks(kind):
    link = kind(3, 3)
    assert bypasses_hooks(link)
    assert not is_called(link)


@pytest.mark.parametrize('kind', REACHING)
def test_it_calls_hooks(kind):
    link = kind(3, 3)
    assert not bypasses_hooks(link)
    assert is_called(link)


def test_when_in_doubt_it_calls_hooks():
    class Doubtful(L.Linear):

        def __init__(self):
            super().__init__(3, 3)
            with self.init_scope():
                self.other = L.Linear(3, 3)

        def __call__(self, x):
            return self.other.__call__(x)

    assert not bypasses_hooks(Doubtful())


def test_no_class_of_chainer_bypasses_hooks():
    kinds = [kind for kind in vars(L).values()
             if isinstance(kind, type) and issubclass(kind, chainer.Link)]
    assert len(kinds) > 50
    for kind in [*kinds, chainer.Link, chainer.Chain, chainer.ChainList,
                 sequential.Sequential]:
        assert not bypasses_hooks(kind.__new__(kind)), kind
