"""The spectral norms of the discriminator's layers, in a table."""
from __future__ import annotations

from rich.table import Table

from sn_function.extensions import Layer

TOLERANCE = 0.01


def make_table(layers: list[Layer]) -> Table:
    """Returns the table that is printed at the end."""
    of = 'normalized weight' if any(map(is_normalized, layers)) else 'weight'
    table = Table(title='Spectral norm of the discriminator\'s layers')
    table.add_column('layer')
    table.add_column('weight shape', no_wrap=True)
    table.add_column('sigma, estimated', justify='right')
    table.add_column(f'true sigma of {of}', justify='right')
    table.add_column('relative error', justify='right')
    for layer in layers:
        normalized = is_normalized(layer)
        table.add_row(
            layer.name, str(layer.shape),
            f'{layer.sigma:.5f}' if normalized else '-',
            f'{layer.norm:.6f}',
            f'{abs(layer.norm - 1):.2e}' if normalized else '-')
    return table


def is_normalized(layer: Layer) -> bool:
    return layer.sigma is not None


def verdict(layers: list[Layer]) -> str:
    """Returns one sentence on the table: whether the norms are 1."""
    hooked = list(filter(is_normalized, layers))
    if not hooked:
        return 'No layer is normalized.'
    bad = [layer.name for layer in hooked
           if not abs(layer.norm - 1) <= TOLERANCE]  # NaN is bad, too
    if bad:
        return (f'Warning: the norm of {", ".join(bad)} is off from 1 by more '
                f'than {TOLERANCE:.0%}.')
    return (f'The norms of all {len(hooked)} normalized weights are within '
            f'{TOLERANCE:.0%} of 1.')
