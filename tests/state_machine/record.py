"""A link, and what must be true of it between calls, bit by bit."""
from __future__ import annotations

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import numpy as np

from tests.state_machine.links import (
    KINDS,
    axis_of,
    hooked,
    keys_of,
    our_hooks,
)
from tests.state_machine.oracle import copy_of, same_bits

assert sn_function  # it is imported for what it does


class Group:
    """Links that share; ``is_split`` where one has got another u since."""

    is_split = False


class Record:
    """A link, and what must be true of it until something is done to it."""

    def __init__(self, link, kind):
        self.link = link
        self.kind = kind
        self.standardized = None  # or 'first' or 'last'
        self.is_shared = False  # Chainer's copies share the dict of hooks
        self.group = Group()  # copies that share have the same,
        self.family = object()  # and this, as links of one parameter have
        self.graphs = []  # weak references to nodes of the latest calls
        # The array of W, and what u was, when this was made by a deep copy:
        # where W has another array now and u is the same, u is of no use.
        self.copied = {}
        self.good = {}
        self.accept()
        # Gamma of each weight as it was made: it is made anew with the
        # weight while nobody has written to it.
        self.made = {n: self.gamma_array(n) for n in hooked(link)}
        self.remember()
        # Copies that share and unpickled links, before their first call.
        self.is_loose = False
        self.u_at_the_call = self.u_arrays()

    def u_arrays(self):
        return {n: self.link.__dict__[n + '_u'] for n in hooked(self.link)}

    def was_called(self):
        self.watch_u()
        if not self.is_shared:
            self.group.is_split = False
        self.is_loose = False
        self.u_at_the_call = self.u_arrays()

    def forget_copied(self, name):
        if self.is_loose:
            self.copied = dict(self.copied)  # from now on it has its own
        self.copied.pop(name, None)

    def watch_u(self):
        then, now = self.u_at_the_call, self.u_arrays()
        if any(then.get(n) is not now[n] for n in now):
            self.group.is_split = True

    def accept(self):
        """Takes the present for what is right."""
        attributes = self.link.__dict__
        self.keys = keys_of(self.link)
        self.params = {n: attributes[n] for n in self.link._params}
        self.data = {n: copy_of(p.array) for n, p in self.params.items()}
        self.persistent = set(self.link._persistent)
        self.u = {n: copy_of(attributes[n + '_u']) for n in hooked(self.link)}

    def accept_shared(self, other):
        """The same for what is shared with a link that was changed."""
        if self.family is not other.family:
            return
        for name, param in self.params.items():
            array = param.array
            for p in other.params.values():
                if p is param or (array is not None and p.array is array):
                    self.data[name] = copy_of(array)
        if self.group is not other.group:
            return
        for name in self.u:
            u = self.link.__dict__[name + '_u']
            if u is other.link.__dict__[name + '_u']:
                self.u[name] = copy_of(u)

    def remember(self):
        """Keeps the parameters, to recover them later."""
        for name, array in self.data.items():
            if array is not None and np.isfinite(array).all() and (
                    1e-3 < abs(array).max() < 1e3 or name == 'b'):
                self.good[name] = array.copy()

    def check(self):
        attributes = self.link.__dict__
        self.watch_u()
        assert keys_of(self.link) == self.keys
        assert not [k for k in attributes if k.startswith('_sn_')]
        assert 'forward' not in attributes
        assert self.link._params == set(self.params)
        assert self.link._persistent == self.persistent
        for name, param in self.params.items():
            assert attributes[name] is param
            assert isinstance(param, chainer.Parameter)
            assert same_bits(param.array, self.data[name])
        for name in hooked(self.link):
            u, W = attributes[name + '_u'], self.params[name].array
            assert same_bits(u, self.u[name])
            if u is not None and W is not None:
                assert u.shape == (W.shape[axis_of(self.link)],)

    def is_poisoned(self, name):
        u = self.u[name]
        return u is not None and not (np.isfinite(u).all() and u.any())

    @property
    def W(self):
        return self.link.__dict__['W'].array

    @property
    def dtype(self):
        return np.dtype('f') if self.W is None else self.W.dtype

    @property
    def is_ordinary(self):
        return all(
            p.array is None or (
                np.isfinite(p.array).all()
                and (n == 'b' or 1e-2 < abs(p.array).max() < 1e2))
            for n, p in self.params.items())

    def shares_with(self, other):
        return any(
            p is q or (p.array is not None and p.array is q.array)
            for p in self.params.values() for q in other.params.values())

    def gamma_of(self, name):
        """Gamma's name is W_gamma where gamma belongs to another weight."""
        hook, = [h for h in our_hooks(self.link) if h.weight_name == name]
        if not hook.use_gamma:
            return None
        own = name + '_gamma'
        return own if own in self.params else 'gamma'

    def gamma_array(self, name):
        gamma_name = self.gamma_of(name)
        return copy_of(self.data[gamma_name]) if gamma_name else None

    def x(self, rng, dtype=None):
        shape = KINDS[self.kind].x_shape
        if shape is None:
            return rng.randint(0, 7, size=3).astype('i')
        return rng.normal(size=shape).astype(dtype or self.dtype)
