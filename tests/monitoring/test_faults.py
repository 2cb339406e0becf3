"""The error of an estimate that is taken for a fault."""
import sn_function  # isort: skip  # before chainer, which it repairs

import chainer.links as L
import numpy as np
import pytest

from sn_function import SpectralNormalization, _models
from sn_function._monitoring import faults, layers

assert sn_function  # it is imported for what it does


@pytest.fixture
def weight():
    link = L.Linear(7, 5).add_hook(SpectralNormalization())
    found, = _models.weights(link)
    return layers.MonitoredWeight(found)


SOUND = {'peak': 1., 'is_sound': 1., 'sigma': 3., 'residual': 0.75}


@pytest.mark.parametrize(('true_sigma', 'expected'), [
    (None, 1 - 3 / 3.75), (4., 0.25), (3., 0.), (2., 0.5)])
def test_relative_error(weight, true_sigma, expected):
    """By the residual the true value is at least 3 sqrt(1 + 0.75^2)."""
    numbers = dict(SOUND)
    if true_sigma is not None:
        numbers['true_sigma'] = true_sigma
    assert faults.fault(weight, numbers, expected + 1e-9) == ('', '')
    if expected > 0:
        cause, message = faults.fault(weight, numbers, expected - 1e-9)
        assert cause == 'estimate'
        assert ('at least' in message) is (true_sigma is None)
        assert f'{expected:.0%}' in message


def test_a_residual_that_is_out_of_range(weight):
    numbers = dict(SOUND, residual=float('nan'))
    assert faults.fault(weight, numbers, 0.2) == ('', '')


def test_the_first_cause_counts(weight):
    bad = dict(SOUND, peak=0., is_sound=0.)
    causes = [faults.fault(weight, numbers, 0.1)[0] for numbers in (
        dict(bad, peak=np.inf), bad, dict(bad, peak=1.), SOUND)]
    assert causes == ['not finite', 'zero', 'vector', 'estimate']


def test_a_link_without_a_hook():
    found, = _models.weights(L.Linear(7, 5))
    weight = layers.MonitoredWeight(found)
    assert faults.fault(weight, {'peak': 1.}, 0.1) == ('', '')
    assert faults.fault(weight, {'peak': 0.}, 0.1)[0] == 'zero'
