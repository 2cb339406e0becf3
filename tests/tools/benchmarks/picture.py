"""The picture of the CPU benchmark: time over the size of what is timed."""
from __future__ import annotations

import pathlib
from typing import Any, Sequence

# Kind of the rows: title and axis of a panel.
PANELS = {
    'layers': ('A model: one step',
               'number of layers, each 64x64x3x3'),
    'side': ('A square weight: forward and backward',
             'rows and columns of the weight')}
# The hook of one weight and that of a model of many are the same contender.
LABELS = {
    'exact': 'hook', 'detached': 'hook, detach_uv',
    'the same, detached': 'chain hook, cached, detach_uv',
    'composition': 'out of Chainer\'s functions',
    'identity': 'a node that does nothing', 'copy': 'a copy of the weight'}
# A color for each label, the same in all panels; dashes for what is no hook.
STYLES = {
    'Chainer 7.8.1': ('tab:red', '-'),
    'hook': ('tab:blue', '-'),
    'hook, detach_uv': ('tab:cyan', '-'),
    'hook, cached': ('tab:purple', '-'),
    'chain hook': ('tab:green', '-'),
    'chain hook, cached': ('tab:orange', '-'),
    'chain hook, cached, detach_uv': ('tab:pink', '-'),
    'out of Chainer\'s functions': ('tab:brown', '-'),
    'no hook': ('black', '--'),
    'a node that does nothing': ('tab:gray', '--'),
    'a copy of the weight': ('tab:olive', '--')}


def draw(path: pathlib.Path, rows: Sequence[Any]) -> None:
    """Draws the rows of :mod:`tests.tools.benchmarks.cpu`.

    Those with the first number of threads, and with a time.
    """
    from matplotlib.figure import Figure  # without pyplot it draws with Agg

    figure = Figure(figsize=(7, 4.6), dpi=150)
    lines = {}
    for axes, (kind, (title, label)) in zip(
            figure.subplots(1, 2), PANELS.items()):
        series: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if (row.kind, row.threads) == (kind, rows[0].threads) and (
                    row.median == row.median):
                name = LABELS.get(row.contender, row.contender)
                series.setdefault(name, []).append(
                    (int(row.name), row.median / 1e3))
        for name, points in series.items():
            color, dashes = STYLES[name]
            lines[name], = axes.plot(
                *zip(*points), dashes, color=color, marker='o', markersize=3,
                linewidth=1.4)
        sizes = sorted({x for points in series.values() for x, _ in points})
        axes.set(xscale='log', yscale='log')
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(label, fontsize=9)
        axes.set_ylabel('time in ms', fontsize=9)
        axes.set_xticks(sizes, map(str, sizes))
        axes.minorticks_off()
        axes.yaxis.set_major_formatter('{x:g}')
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    figure.legend(
        [lines[name] for name in STYLES if name in lines],
        [name for name in STYLES if name in lines],
        loc='lower center', ncol=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.17, 1, 1))
    figure.savefig(path)
