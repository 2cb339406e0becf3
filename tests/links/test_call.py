"""Changes for the time of one call are undone, however it ends."""
import types

import chainer
import pytest

from sn_function._links import call


class Link(chainer.Link):

    def __init__(self):
        super().__init__()
        self.is_changed = False
        with self.init_scope():
            self.W = chainer.Parameter(1., (2, 2))

    def forward(self, error=None):
        if error is not None:
            raise error
        return self.is_changed


class Change(call.TemporaryChange):

    def change(self):
        self.link.is_changed = True

    def undo(self):
        self.link.is_changed = False


class ApplyHook(chainer.LinkHook):

    def __init__(self, apply):
        self.apply = apply

    def forward_preprocess(self, args):
        self.apply(args)


class RaisingHook(chainer.LinkHook):
    name = 'RaisingHook'

    def forward_preprocess(self, args):
        raise RuntimeError


@pytest.fixture
def link():
    return Link().add_hook(ApplyHook(
        lambda args: call.apply(args, 'change', Change(args.link))))


def assert_restored(link):
    assert not link.is_changed
    assert set(vars(link)) == set(vars(Link())) | {'_local_link_hooks'}


def test_during_forward_only(link):
    assert link()
    assert_restored(link)


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_forward_raises(link, error):
    try:
        link(error())
    except error:
        assert_restored(link)


def test_the_next_hook_raises(link):
    link.add_hook(RaisingHook())
    with pytest.raises(RuntimeError):
        link()
    assert_restored(link)


def test_forward_is_not_called(link):
    args = types.SimpleNamespace(link=link)
    change = Change(link)
    call.apply(args, 'change', change)
    assert link.is_changed
    change.restore_unless_called()
    assert_restored(link)


def test_the_arguments_die(link):
    args = types.SimpleNamespace(link=link)
    call.apply(args, 'change', Change(link))
    assert link.is_changed
    del args
    assert_restored(link)


def test_a_weight():
    """Also where the link calls itself."""
    class Recursive(Link):

        def forward(self, n):
            seen.append((self.W, call.original(self, 'W')))
            if n > 0:
                self(n - 1)
            seen.append((self.W, call.original(self, 'W')))

    link, seen = Recursive(), []
    W, Ys = link.W, [chainer.Variable(link.W.array * k) for k in range(3)]
    left = iter(Ys)
    link.add_hook(ApplyHook(
        lambda args: call.replace_weight(
            args, 'W', lambda: next(left))))
    link(2)
    assert [Y for Y, _ in seen] == [*Ys, *Ys[::-1]]
    assert all(original is W for _, original in seen)
    assert link.W is W
    assert_restored(link)
