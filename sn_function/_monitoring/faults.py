"""What is wrong with a layer, from the numbers that were measured."""
from __future__ import annotations

import math

from sn_function._links import vector
from sn_function._monitoring.layers import MonitoredWeight


def fault(
        weight: MonitoredWeight, numbers: dict[str, float], tolerance: float,
) -> tuple[str, str]:
    """Returns a word for what is wrong and a sentence, or empty strings."""
    if not math.isfinite(numbers['peak']):
        return 'not finite', 'the weight holds NaN or Inf.'
    if numbers['peak'] == 0:
        return 'zero', 'the weight is all zero, so it has no singular vector.'
    if weight.hook is None:
        return '', ''
    names = vector.names(weight.hook, weight.link)
    if not numbers['is_sound']:
        return 'vector', (
            f'the stored vector {" or ".join(names)} is zero or not finite'
            + (', or they are not independent.' if names[1:] else '.'))
    if numbers.get('sigma_of_u', numbers['sigma']) < (
            1 - tolerance) * numbers['sigma']:
        return 'stale', (
            f'the stored vector {names[0]} is of another '
            f'weight, as after training in test mode, which does not move it '
            f'on. Each call looks for a better one. sn_function.refresh(model)'
            f' stores that.')
    error = _relative_error(numbers)
    # NaN: the weight is so small that the residual is out of the range.
    if error <= tolerance or math.isnan(error):
        return '', ''
    at_least = '' if 'true_sigma' in numbers else 'at least '
    return 'estimate', (
        f'the estimate of sigma, {numbers["sigma"]:.4g}, is off by {at_least}'
        f'{error:.0%}. More power iterations (n_power_iteration) or a '
        f'smaller step size bring it closer.')


def _relative_error(numbers: dict[str, float]) -> float:
    """Returns that of the estimate, or else the least that it can be."""
    if 'true_sigma' in numbers:
        return abs(1 - numbers['sigma'] / numbers['true_sigma'])
    return 1 - 1 / math.hypot(1, numbers['residual'])
