"""The picture of the README: true norms in training, by the hook.

``python -m tests.tools.norms`` trains the example with Chainer's hook and with
this package's, from the same seed, and draws the true norm of the weight that
its largest layer computes with, at every fifth iteration, into
``docs/images/norms.png``.
"""
from __future__ import annotations

import argparse
import statistics
from typing import Sequence

from tests.tools import estimates

SETTINGS = {
    "Chainer's hook": {'hook': 'chainer'},
    'sn_function, n_vectors=16': {'n_vectors': 16},
}
COLOURS = '#c1483b', '#1f6feb'
LAYER = 'convs/1'


def measure(seed: int, n_iterations: int) -> dict[str, list[float]]:
    """The norms at every fifth iteration, by the name of the setting."""
    norms = {}
    for name, settings in SETTINGS.items():
        excess = estimates.watched(settings, seed, n_iterations, 0)['excess']
        # The first of two calls in a step, right after the weight has moved.
        norms[name] = [1 + e / 100 for e in excess[LAYER][::2]]
    return norms


def draw(norms: dict[str, list[float]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.9), facecolor='white')
    axes = figure.add_subplot()
    for (name, y), colour in zip(norms.items(), COLOURS):
        x = [estimates.EVERY * (i + 1) for i in range(len(y))]
        axes.plot(x, y, label=name, color=colour, linewidth=1.4)
    axes.axhline(1, color='0.6', linewidth=0.8, zorder=0)
    axes.set_title('True norm of the normalized weight: it should be 1',
                   fontsize=11)
    axes.set_xlabel('training step')
    axes.set_xlim(0, None)
    axes.set_ylim(0.99, 0.03 + max(max(y) for y in norms.values()))
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False, loc='upper center', ncol=len(norms))
    figure.savefig(path, dpi=132, bbox_inches='tight')


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m tests.tools.norms',
        description=__doc__.split('\n')[0])
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--iterations', type=int, default=800)
    parser.add_argument('--out', default='docs/images/norms.png')
    args = parser.parse_args(argv)
    norms = measure(args.seed, args.iterations)
    for name, y in norms.items():
        print(f'{name}: median {statistics.median(y):.4f}, most {max(y):.4f}')
    draw(norms, args.out)


if __name__ == '__main__':
    main()
