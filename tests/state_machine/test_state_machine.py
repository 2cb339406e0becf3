"""Any sequence of what may happen to links with the hook, in any order.

Hypothesis draws the sequences.  A model in float64 tells what each call must
compute and where u must be afterwards; between calls nothing may change but
what the step was to change, bit by bit: see :mod:`tests.state_machine`.

``python -m tests.state_machine --examples 10000`` is the long run.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import gc
import pickle
import sys
import time
import traceback
import warnings
import weakref

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import chainer.links as L
import hypothesis
import numpy as np
import pytest
from chainer import link_hooks
from hypothesis import stateful

from tests import reference
from tests.state_machine.base import COUNTS
from tests.state_machine.links import CALL, FailingNode, Linear
from tests.state_machine.machine import Machine

TestMachine = Machine.TestCase
TestMachine.settings = hypothesis.settings(
    derandomize=True, max_examples=50, stateful_step_count=25, deadline=None,
    database=None, suppress_health_check=list(hypothesis.HealthCheck))


def test_a_copy_beside_a_hook_that_comes_first():
    """A copy computes what its original does, and keeps its u."""
    link = L.Linear(5, 6).add_hook(link_hooks.WeightStandardization())
    link.add_hook(sn_function.SpectralNormalization())
    other = copy.deepcopy(link)
    x = np.random.normal(size=(2, 5)).astype('f')
    with chainer.using_config('train', False):
        np.testing.assert_array_equal(other(x).array, link(x).array)
    np.testing.assert_array_equal(other.W_u, link.W_u)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_forget_with_a_weight_that_is_not_finite(value):
    """The second run leaves u alone, whatever the weight."""
    link = L.Linear(5, 6).add_hook(sn_function.SpectralNormalization())
    link.W.array[0, 0] = value
    x = np.random.normal(size=(2, 5)).astype('f')
    with np.errstate(all='ignore'):
        y = F.sum(F.forget(link, chainer.Variable(x)))
        u = link.W_u.copy()
        link.cleargrads()
        y.backward()  # warnings are errors
    np.testing.assert_array_equal(link.W_u, u)


def test_a_new_copy_after_a_change_of_dtype():
    """As of a link without gamma."""
    link = L.Linear(5, 6).add_hook(
        sn_function.SpectralNormalization(use_gamma=True))
    link.W.array = link.W.array.astype('d')
    link.b.array = link.b.array.astype('d')
    other = link.copy('init')
    assert np.isfinite(other.gamma.array)


@pytest.mark.parametrize('is_alive', [True, False])
@pytest.mark.parametrize('name', ['gamma', 'u'])
def test_a_new_copy_of_a_copy_that_shares(name, is_alive):
    """As of the link that it shares with, also when that is gone."""
    hook = sn_function.SpectralNormalization(use_gamma=True)
    source = L.Linear(50, 60).add_hook(hook)
    shared = source.copy('share')
    if not is_alive:
        del source
    link = shared.copy('init')
    with chainer.using_config('train', False):
        Y = hook.normalize_weight(link).array / link.gamma.array
    if name == 'gamma':
        # It follows by more than 10 %, and becomes an estimate.
        np.testing.assert_allclose(
            link.gamma.array, reference.true_norm(link.W.array), rtol=.15)
    else:
        assert reference.true_norm(Y) < 1.05


@pytest.mark.parametrize('value', [0, np.nan])
@pytest.mark.parametrize('use_gamma', [False, True])
def test_a_new_copy_of_a_link_with_a_poisoned_u(value, use_gamma):
    """The vector is made anew, and gamma is that of the new weight."""
    link = L.Linear(5, 6).add_hook(
        sn_function.SpectralNormalization(use_gamma=use_gamma))
    link.W_u[...] = value
    other = link.copy('share').copy('init')
    with pytest.warns(UserWarning, match='made anew'):
        other(np.ones((2, 5), 'f'))
    assert np.isfinite(other.W_u).all()
    assert other.W_u.any()
    if use_gamma:
        np.testing.assert_allclose(
            other.gamma.array, reference.true_norm(other.W.array), rtol=1e-3)


def test_gamma_of_a_copy_of_a_copy_that_shares_of_a_lazy_link():
    """It is made with the copy's own weight."""
    source = L.Linear(None, 6).add_hook(
        sn_function.SpectralNormalization(use_gamma=True))
    link = source.copy('share').copy('init')
    with chainer.using_config('train', False):
        link(np.ones((2, 5), 'f'))
    np.testing.assert_allclose(
        link.gamma.array, reference.true_norm(link.W.array), rtol=1e-3)


def test_a_new_copy_of_an_unpickled_link():
    """As of the link that was pickled."""
    hook = sn_function.SpectralNormalization()
    source = L.Linear(50, 60).add_hook(hook)
    link = pickle.loads(pickle.dumps(source)).copy('init')
    with chainer.using_config('train', False):
        Y = hook.normalize_weight(link).array
    assert reference.true_norm(Y) < 1.05


def test_a_weight_written_into_a_copy_of_a_copy_that_shares():
    """Its gamma follows, and that of the source, which it left, does not."""
    source = L.Linear(5, 6).add_hook(
        sn_function.SpectralNormalization(use_gamma=True))
    link = source.copy('share').copy('copy')
    gamma = source.gamma.array.copy()
    link.W.array[...] = np.random.normal(size=(6, 5)) * 3
    with chainer.using_config('train', False):
        link(np.ones((2, 5), 'f'))
    np.testing.assert_allclose(
        link.gamma.array, reference.true_norm(link.W.array), rtol=.05)
    np.testing.assert_array_equal(source.gamma.array, gamma)
    np.testing.assert_array_equal(link.W_u, source.W_u)


# Memory.

def live_objects():
    gc.collect()
    counts = collections.Counter(
        type(o).__name__ for o in gc.get_objects() if isinstance(o, (
            chainer.Variable, chainer.variable.VariableNode,
            chainer.FunctionNode, chainer.Link, np.ndarray)))
    return counts, sys.getallocatedblocks()


@pytest.mark.slow
def test_memory_is_flat():
    """Training with exceptions in it leaves nothing behind."""
    n_steps = 10000
    link = Linear(5, 6).add_hook(sn_function.SpectralNormalization(
        use_gamma=True))
    optimizer = chainer.optimizers.SGD(0.01).setup(link)
    x = np.random.normal(size=(2, 5)).astype('f')
    bad = np.zeros((2, 4), 'f')
    nodes = []

    def step(k):
        link.cleargrads()
        y = link(x)
        loss = F.sum(y * y)
        if k % 10 == 1:
            with contextlib.suppress(ZeroDivisionError):
                FailingNode().apply((loss,))[0].backward()
        elif k % 10 == 2:
            CALL.error = ValueError('midway')
            with contextlib.suppress(ValueError):
                link(x)
            CALL.error = None
        elif k % 10 == 3:
            with contextlib.suppress(chainer.utils.type_check.InvalidType):
                link(bad)
        elif k % 10 == 4:
            F.sum(F.forget(link, chainer.Variable(x))).backward()
        else:
            loss.backward()
            optimizer.update()
        CALL.reset()
        if k % 500 == 0:
            nodes.append(weakref.ref(loss.creator_node))

    for k in range(n_steps // 10):
        step(k)
    before, blocks = live_objects()
    for k in range(n_steps // 10, n_steps):
        step(k)
    after, blocks_after = live_objects()
    assert after == before
    # Caches of the interpreter come and go; one block a step would show.
    assert blocks_after - blocks < n_steps / 20
    assert nodes
    assert all(node() is None for node in nodes)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog='python -m tests.state_machine',
        description=__doc__.split('\n')[0])
    parser.add_argument('--examples', type=int, default=10000)
    parser.add_argument('--steps', type=int, default=25, help='an example')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--no-shrink', action='store_true')
    args = parser.parse_args(argv)
    phases = [hypothesis.Phase.generate]
    if not args.no_shrink:
        phases.append(hypothesis.Phase.shrink)
    warnings.simplefilter('error')
    start, status = time.time(), 0
    try:
        stateful.run_state_machine_as_test(
            hypothesis.seed(args.seed)(Machine),
            settings=hypothesis.settings(
                TestMachine.settings, derandomize=False,
                max_examples=args.examples, phases=phases,
                report_multiple_bugs=False, stateful_step_count=args.steps))
    except KeyboardInterrupt:
        print('interrupted; up to here:')
        status = 130
    except Exception:
        traceback.print_exc()
        status = 1
    for name in sorted(COUNTS):
        print(f'{name}: {COUNTS[name]}')
    for text, start_of in (('faults injected', 'fault: '),
                           ('exceptions', 'fault: exception ')):
        n = sum(n for k, n in COUNTS.items() if k.startswith(start_of))
        print(f'{text}: {n}')
    print(f'seconds: {time.time() - start:.0f}')
    print(f'defects found: {int(status == 1)}')
    return status

