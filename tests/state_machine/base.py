"""What all rules share: the links, and what is true after every step."""
from __future__ import annotations

import collections
import contextlib
import gc
import sys
import warnings
import weakref

import sn_function  # isort: skip  # before chainer, which it repairs
import sn_function._bake  # isort: skip
import chainer
import numpy as np
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from sn_function import errors
from tests.state_machine.checks import call
from tests.state_machine.links import (
    CALL,
    KINDS,
    class_attributes,
    hooked,
    our_hooks,
    settings_of,
)
from tests.state_machine.oracle import copy_of, same_bits
from tests.state_machine.record import Record

# Public names are imported on first use, which is not to be in a step.
for name in sn_function.__all__:
    getattr(sn_function, name)

MAX_LINKS = 4
COUNTS: collections.Counter = collections.Counter()


def without_conflict(settings):
    settings = dict(settings, **{
        'insize' if settings['norm'] == 'matrix' else 'axis': None})
    if settings['rtol'] is not None:
        settings = dict(settings, n_power_iteration=1, max_iterations=10000)
    if settings['n_vectors'] > 1:  # gamma is followed with one vector only
        settings = dict(settings, use_gamma=False)
    if settings['cap'] is None:
        return settings
    return dict(settings, use_gamma=False, factor=None)


SETTINGS = st.fixed_dictionaries({
    'n_power_iteration': st.integers(1, 3),
    'use_gamma': st.booleans(),
    'detach_uv': st.booleans(),
    'factor': st.sampled_from([None, 0.5, 2.5]),
    'n_warmup': st.sampled_from([15, 15, 2, 0]),
    'cap': st.sampled_from([None, None, None, 0.5, 2.5]),
    'n_vectors': st.sampled_from([1, 1, 1, 2, 4, 9]),
    'rtol': st.sampled_from([None, None, None, 0.1]),
    'norm': st.sampled_from(['matrix', 'operator']),
    'insize': st.sampled_from([None, None, 3]),
    'axis': st.sampled_from([None, None, None, 0, 1, -1]),
    'update_u': st.sampled_from(['train', 'train', 'always']),
}).map(without_conflict)
INDEX = st.integers(0, MAX_LINKS - 1)
SEED = st.integers(0, 9)


class Base(stateful.RuleBasedStateMachine):

    def __init__(self):
        super().__init__()
        np.random.seed(0)
        # Of a weight that is nearly zero, no tolerance is reached.
        warnings.simplefilter('ignore', errors.ToleranceWarning)
        CALL.reset()
        COUNTS['examples'] += 1
        self.records = []
        self.settings = {}
        self.pending = []  # outputs whose graphs are kept
        self.dropped = []  # weak references to links
        self.class_attributes = class_attributes()
        self.modules = {m for m in sys.modules if m.startswith('sn_function')}

    def pick(self, index):
        return self.records[index % len(self.records)]

    def put(self, rec):
        """Adds a record; the oldest makes room for it."""
        self.records.append(rec)
        self.dropped += [
            weakref.ref(old.link) for old in self.records[:-MAX_LINKS]]
        del self.records[:-MAX_LINKS]
        self.watch_hooks(rec)

    def put_again(self, rec):
        """After a change of its hooks."""
        rec.accept()
        for name in hooked(rec.link):
            rec.made.setdefault(name, rec.gamma_array(name))
            rec.updates.setdefault(name, rec.n_updates(name))
        self.watch_hooks(rec)

    def watch_hooks(self, rec):
        for hook in our_hooks(rec.link):
            self.settings[id(hook)] = hook, settings_of(hook)

    def accept_gammas(self, rec):
        """After calls that were not compared with the oracle."""
        before = rec.data
        rec.accept()
        for name in hooked(rec.link):
            gamma = rec.gamma_of(name)
            if gamma and not same_bits(before.get(gamma), rec.data[gamma]):
                rec.made[name] = rec.gamma_array(name)
        self.share(rec)

    def data_changed(self, rec):
        for n, p in rec.params.items():
            rec.data[n] = copy_of(p.array)
        self.share(rec)

    def accept(self, rec):
        rec.accept()
        self.share(rec)

    def share(self, rec):
        for other in self.records:
            if other is not rec:
                other.accept_shared(rec)

    def call(self, rec, *args, **kwargs):
        try:
            return call(rec, *args, **kwargs)
        finally:
            self.share(rec)

    def make(self, kind, lazy, dtype='f'):
        k = KINDS[kind]
        with chainer.using_config('dtype', np.dtype(dtype)):
            return k.lazy() if lazy and k.lazy else k.make()

    def hook_like(self, hook):
        return sn_function.SpectralNormalization(
            hook.n_power_iteration, hook.eps, hook.use_gamma, hook.factor,
            hook.weight_name, hook.name, detach_uv=hook.detach_uv,
            n_warmup=hook.n_warmup, cap=hook.cap, n_vectors=hook.n_vectors,
            rtol=hook.rtol, max_iterations=hook.max_iterations,
            norm=hook.norm, insize=hook.insize, axis=hook.given_axis,
            update_u=hook.update_u)

    def twin(self, rec, lazy):
        """A new link of the same kind with the same hooks and dtype."""
        link = self.make(rec.kind, lazy, rec.dtype)
        hooks = [self.hook_like(hook) for hook in our_hooks(rec.link)]
        if rec.is_rnn:  # they are on the layers, and due to one on the link
            hooks = hooks[:1]
            hooks[0].weight_name, hooks[0].name = 'W', 'SpectralNormalization'
        with chainer.using_config('dtype', rec.dtype):
            for hook in hooks:
                link.add_hook(hook)
        return link

    def add_hook(self, rec, link, **settings):
        """Adds a hook to the link of a record, or to one that has its W."""
        hook = sn_function.SpectralNormalization(**settings)
        is_late = hook.use_gamma and any(
            param.update_rule is not None for param in link.params())
        expect = (pytest.warns(errors.UntrainedGammaWarning) if is_late
                  else contextlib.nullcontext())
        with expect, self.maybe_not_ordinary(rec):
            link.add_hook(hook)

    @contextlib.contextmanager
    def maybe_not_ordinary(self, rec):
        with np.errstate(**({} if rec.is_ordinary else {'all': 'ignore'})):
            yield

    @stateful.initialize(
        kind=st.sampled_from(sorted(KINDS)), settings=SETTINGS)
    def first(self, kind, settings):
        link = self.make(kind, False).add_hook(
            sn_function.SpectralNormalization(**settings))
        self.put(Record(link, kind))

    # What is always true

    @stateful.invariant()
    def what_is_not_used_is_dead(self):
        """Graphs by their reference count, links after a collection."""
        nodes = [y.creator_node for _, y, _ in self.pending]
        kept = set()
        while nodes:
            node = nodes.pop()
            if node is not None and id(node) not in kept:
                kept.add(id(node))
                nodes += [x.creator_node for x in node.inputs]
        for rec in self.records:
            rec.graphs = [ref for ref in rec.graphs if ref() is not None]
            assert all(id(ref()) in kept for ref in rec.graphs)
        links = {id(rec.link) for rec, _, _ in self.pending}

        def undead():
            return [ref for ref in self.dropped if ref() is not None]

        if any(id(ref()) not in links for ref in undead()):
            gc.collect()  # an optimizer is in a cycle, and holds its link
        self.dropped = undead()
        assert all(id(ref()) in links for ref in self.dropped)

    @stateful.invariant()
    def nothing_else_has_changed(self):
        COUNTS['steps'] += 1
        for rec in self.records:
            rec.check()
            rec.remember()
        for hook, settings in self.settings.values():
            assert settings_of(hook) == settings
        assert class_attributes() == self.class_attributes
        assert self.modules == {
            m for m in sys.modules if m.startswith('sn_function')}
        config = chainer.config
        assert config.train
        assert config.enable_backprop
        assert not config.in_recomputing
        assert not chainer._get_link_hooks()
        assert chainer.get_dtype() == np.float32
