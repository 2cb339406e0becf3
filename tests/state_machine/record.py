"""A link, and what must be true of it between calls, bit by bit."""
from __future__ import annotations

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import numpy as np

from tests.state_machine.links import (
    KINDS,
    axis_of,
    hooked,
    hooks_of,
    is_map,
    keys_of,
    others_of,
    params_of,
    persistent_of,
    place_of,
    vector_of,
)
from tests.state_machine.oracle import OfMap, OfMatrix, copy_of, same_bits

assert sn_function  # it is imported for what it does


class Record:
    """A link, and what must be true of it until something is done to it."""

    def __init__(self, link, kind):
        self.link = link
        self.kind = kind
        self.standardized = None  # or 'first' or 'last'
        self.is_shared = False  # Chainer's copies share the dict of hooks
        self.family = object()  # links that share parameters have the same
        self.graphs = []  # weak references to nodes of the latest calls
        self.good = {}
        self.accept()
        # Gamma of each weight as it was made: it is made anew while nobody
        # has written to it.
        self.made = {n: self.gamma_array(n) for n in hooked(link)}
        self.updates = {n: self.n_updates(n) for n in self.made}
        # Weights whose gamma was loaded, and may be that which was made.
        self.is_unsure = set()
        self.remember()

    def accept(self):
        """Takes the present for what is right."""
        self.keys = keys_of(self.link)
        self.params = params_of(self.link)
        self.data = {n: copy_of(p.array) for n, p in self.params.items()}
        self.persistent = persistent_of(self.link)
        self.u = {n: copy_of(vector_of(self.link, n))
                  for n in hooked(self.link)}
        self.others = {n: copy_of(others_of(self.link, n))
                       for n in hooked(self.link)}

    def accept_shared(self, other):
        """The same for what is shared with a link that was changed."""
        if self.family is not other.family:
            return
        for name, param in self.params.items():
            array = param.array
            for p in other.params.values():
                if p is param or (array is not None and p.array is array):
                    self.data[name] = copy_of(array)
        for name in self.u:
            u = vector_of(self.link, name)
            if any(u is vector_of(other.link, n) for n in other.u):
                self.u[name] = copy_of(u)
            others = others_of(self.link, name)
            if any(others is others_of(other.link, n) for n in other.u):
                self.others[name] = copy_of(others)

    def remember(self):
        """Keeps the parameters, to recover them later."""
        for name, array in self.data.items():
            if array is not None and np.isfinite(array).all() and (
                    1e-3 < abs(array).max() < 1e3 or is_bias(name)):
                self.good[name] = array.copy()

    def check(self):
        link = self.link
        assert keys_of(link) == self.keys
        assert not [k for _, k in self.keys if k.startswith('_sn_')]
        assert not [k for _, k in self.keys if k == 'forward']
        assert persistent_of(link) == self.persistent
        assert set(params_of(link)) == set(self.params)
        for name, param in self.params.items():
            owner, own_name = place_of(link, name)
            assert owner.__dict__[own_name] is param
            assert isinstance(param, chainer.Parameter)
            assert same_bits(param.array, self.data[name])
        for name in hooked(link):
            u, W = vector_of(link, name), self.params[name].array
            assert same_bits(u, self.u[name])
            assert same_bits(others_of(link, name), self.others[name])
            if u is not None and W is not None:
                assert u.shape == self.shape_of_u(name)
            if self.is_rnn:
                assert link.used(name) is self.params[name]

    def is_map(self, name):
        return is_map(self.link, name)

    def shape_of_u(self, name):
        """Of one vector; the size of a map is that of the one there is."""
        if self.is_map(name):
            u = vector_of(self.link, name)
            return KINDS[self.kind].x_shape[1], *u.shape[1:]
        return self.params[name].shape[axis_of(self.link, name)],

    def form(self, name):
        """How the weight is a matrix, whose norm the hook takes."""
        if self.is_map(name):
            return OfMap(KINDS[self.kind].map(), self.shape_of_u(name))
        return OfMatrix(axis_of(self.link, name))

    def is_followed(self, name):
        """Whether it is known how far each call moves u, which is one."""
        hook = hooks_of(self.link)[name]
        return hook.n_vectors == 1 and hook.rtol is None and (
            self.n_groups(name) == 1)

    def n_groups(self, name):
        """How many groups have iterations of their own."""
        return KINDS[self.kind].n_groups if self.is_map(name) else 1

    def size_is_known(self, name):
        return not self.is_map(name) or self.u[name] is not None or (
            hooks_of(self.link)[name].insize is not None)

    def is_poisoned(self, name):
        u = self.u[name]
        return u is not None and not (np.isfinite(u).all() and u.any())

    def has_poison(self):
        return any(map(self.is_poisoned, hooked(self.link)))

    @property
    def is_rnn(self):
        return self.kind in ('LSTM', 'GRU')

    @property
    def W(self):
        """The first weight; all have arrays if it has."""
        return self.params['0/w0' if self.is_rnn else 'W'].array

    @property
    def dtype(self):
        return np.dtype('f') if self.W is None else self.W.dtype

    @property
    def is_ordinary(self):
        return self.is_of_size(is_zero_ok=False)

    def is_of_size(self, is_zero_ok):
        """Whether all parameters are finite and of usual size."""
        return all(
            p.array is None or (
                np.isfinite(p.array).all()
                and (is_bias(n) or 1e-2 < abs(p.array).max() < 1e2
                     or (is_zero_ok and not p.array.any())))
            for n, p in self.params.items())

    def shares_with(self, other):
        return any(
            p is q or (p.array is not None and p.array is q.array)
            for p in self.params.values() for q in other.params.values())

    def name_of(self, name, seed=0):
        """The name for this kind of link: that of any such weight."""
        if not self.is_rnn or name == 'gamma':
            return next((n for n in self.params if n.endswith(name)), name)
        return sorted(n for n in self.params if n.startswith(
            '0/b' if name == 'b' else '0/w') and 'gamma' not in n)[
                seed % (6 if self.kind == 'GRU' else 8)]

    def gamma_of(self, name):
        """Gamma's name is W_gamma where gamma belongs to another weight."""
        if not hooks_of(self.link)[name].use_gamma:
            return None
        own = name + '_gamma'
        return own if own in self.params else name[:-len(
            place_of(self.link, name)[1])] + 'gamma'

    def gamma_array(self, name):
        gamma_name = self.gamma_of(name)
        return copy_of(self.data[gamma_name]) if gamma_name else None

    def is_gamma_free(self, name):
        """Whether a call may make gamma anew: see docs/accuracy.rst."""
        gamma = self.gamma_of(name)
        if gamma is None or hooks_of(self.link)[name].n_warmup == 0:
            return False
        rule = self.params[gamma].update_rule
        return same_bits(self.data[gamma], self.made[name]) and (
            self.n_updates(name) <= self.updates[name]
            and (rule is None or rule.enabled)
            # Chainer's other hook makes another W in each call.
            and not (name == 'W' and self.standardized == 'first'))

    def n_updates(self, name):
        """How often the present optimizer has updated a weight."""
        rule = self.params[name].update_rule
        return 0 if rule is None else rule.t

    def x(self, rng, dtype=None):
        shape = KINDS[self.kind].x_shape
        if shape is None:
            return rng.randint(0, 7, size=3).astype('i')
        if KINDS[self.kind].map:  # images of several sizes
            shape = *shape[:2], *rng.randint(3, 5, 2)
        return rng.normal(size=shape).astype(dtype or self.dtype)


def is_bias(name):
    return name.split('/')[-1][0] == 'b'
