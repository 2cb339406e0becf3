"""What baking saves: the networks of the example, hooked, baked and as ONNX.

``python -m tests.tools.benchmarks.shipping`` prints sizes of files,
differences of outputs and times of inference; ``--networks result`` takes the
``dis.npz`` and ``gen.npz`` that a run of the example has left there, in place
of untrained networks of the same shape.  The generator of the example has no
hooks, so here it gets the hook of a chain.  Set ``OPENBLAS_NUM_THREADS=1`` and
``OMP_NUM_THREADS=1``; onnxruntime gets one thread, too.
"""
from __future__ import annotations

import argparse
import importlib.metadata
import io
import pathlib
import sys
from typing import Any, Callable, NamedTuple, Sequence

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import numpy as np
from chainer import serializers

from sn_function.bake import bake
from tests.tools.benchmarks import cpu
from tests.tools.benchmarks.report import (
    Budget,
    measure,
    number,
    shape_of,
    text_table,
)

sys.path.insert(0, str(
    pathlib.Path(__file__).resolve().parents[3] / 'examples'))
import sngan_models

HEADER = ('what', 'bytes', 'difference', *(
    name for n in (1, 64) for name in (f'ms of {n}', '20 to 80 %')))


class Network(NamedTuple):
    name: str
    hooked: chainer.Link
    make_inputs: Callable[[int], list[Any]]


def networks(
        shape: tuple[int, ...], directory: pathlib.Path | None
) -> list[Network]:
    """The networks of the example, all of whose layers have hooks."""
    random = np.random.RandomState(0)

    def labels(n: int) -> Any:
        return (np.arange(n) % sngan_models.N_CLASSES).astype('i')

    def images(n: int) -> Any:
        return random.uniform(-1, 1, (n, *shape)).astype('f')

    dis = sngan_models.Discriminator(shape)
    dis.add_hook(sn_function.ChainSpectralNormalization())
    gen = sngan_models.Generator(shape)
    if directory is not None:
        serializers.load_npz(directory / 'dis.npz', dis)
        serializers.load_npz(directory / 'gen.npz', gen)
    gen.add_hook(sn_function.ChainSpectralNormalization())
    return [
        Network('discriminator', dis, lambda n: [images(n), labels(n)]),
        Network('generator', gen, lambda n: [
            random.normal(size=(n, gen.n_hidden)).astype('f'), labels(n)])]


def size_of(model: chainer.Link, **kwargs: Any) -> int:
    file = io.BytesIO()
    serializers.save_npz(file, model, **kwargs)
    return len(file.getvalue())


def session_of(exported: Any) -> Any:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        exported.SerializeToString(), options,
        providers=['CPUExecutionProvider'])


def rows_of(network: Network, n_rounds: int) -> list[tuple[str, ...]]:
    import onnx_chainer
    hooked = network.hooked
    baked = bake(hooked)
    names = f'{network.name}, hooked', 'the same, baked', 'as ONNX'
    sizes = [size_of(hooked), size_of(baked), 0]
    differences, times = [], []
    for n in 1, 64:
        inputs = network.make_inputs(n)
        exported = onnx_chainer.export(baked, list(inputs))
        sizes[2] = len(exported.SerializeToString())
        session = session_of(exported)
        feed = {f'Input_{i}': x for i, x in enumerate(inputs)}
        steps: dict[str, Callable[[], Any]] = {
            names[0]: lambda xs=inputs: hooked(*xs).array,
            names[1]: lambda xs=inputs: baked(*xs).array,
            names[2]: lambda s=session, f=feed: s.run(None, f)[0]}
        outputs = [step() for step in steps.values()]
        differences.append([
            float(np.abs(y - outputs[0]).max()) for y in outputs])
        times.append(measure(
            steps, cpu.time_on_host, Budget(600), n_rounds, seconds=.02))
    rows = []
    for i, name in enumerate(names):
        cells = [name, f'{sizes[i]:,}',
                 f'{max(d[i] for d in differences):.1e}']
        for part in times:
            wall = part[name]['wall']
            median, *spread = (number(wall[key] / 1000)
                               for key in ('median', 'p20', 'p80'))
            cells += [median, ' to '.join(spread)]
        rows.append(tuple(cells))
    return rows


def machine() -> str:
    return ', '.join([cpu.machine(), *(
        f'{name} {importlib.metadata.version(name)}'
        for name in ('onnx', 'onnxruntime'))])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--shape', type=shape_of, default=(1, 28, 28),
                        help='channels x height x width of an image')
    parser.add_argument('--networks', type=pathlib.Path, default=None,
                        metavar='DIRECTORY', help='with dis.npz and gen.npz')
    parser.add_argument('--rounds', type=int, default=30,
                        help='number of times each')
    args = parser.parse_args(argv)
    np.random.seed(0)
    with chainer.using_config('train', False), chainer.no_backprop_mode():
        rows = [row for network in networks(args.shape, args.networks)
                for row in rows_of(network, args.rounds)]
    print(machine(), '\n')
    print(text_table(HEADER, rows))


if __name__ == '__main__':
    main()
