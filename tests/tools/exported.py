"""Generators and discriminators of two public repositories, as ONNX.

``python -m tests.tools.exported --sngan DIRECTORY --gan-lib DIRECTORY`` takes
checkouts of https://github.com/pfnet-research/sngan_projection and
https://github.com/pfnet-research/chainer-gan-lib.  Their links with spectral
normalization become Chainer's with the hook of this package.  Each model is
untrained, with the sizes that it has there, and noise on biases and the like.
It is called twice in training mode, for ``u`` and the statistics of batch
normalization, baked, exported, and run in test mode.  It prints the largest
difference, divided by the largest output,

* ``onnxruntime``: between onnxruntime and Chainer, in float32;
* ``rounding``: between Chainer in float32 and in float64;
* ``graph``: between the exported graph in float64, in onnx's reference
  evaluator, and Chainer in float64.  ONNX has float32 attributes, such as the
  slope of a leaky ReLU, so this is not 1e-16.

A model that cannot be exported has the error in place of the numbers.
"""
from __future__ import annotations

import argparse
import functools
import importlib
import re
import sys
import types
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.links as L
import numpy as np

from sn_function.bake import bake
from tests.tools.benchmarks import shipping
from tests.tools.benchmarks.report import text_of, text_table

HEADER = 'model', 'normalized', 'onnxruntime', 'rounding', 'graph'
LINKS = {'sn_convolution_2d': ('SNConvolution2D', L.Convolution2D),
         'sn_linear': ('SNLinear', L.Linear),
         'sn_embed_id': ('SNEmbedID', L.EmbedID)}

random = np.random.RandomState(0)


class Case(NamedTuple):
    name: str
    make: Callable[[], chainer.Chain]
    inputs: dict[str, Any]
    # Of the call, such as the stage of a model that grows.
    others: Mapping[str, Any] = types.MappingProxyType({})


class Called(chainer.Chain):
    """A model with the same arguments in each call."""

    def __init__(
            self, model: chainer.Chain, others: Mapping[str, Any]) -> None:
        super().__init__()
        with self.init_scope():
            self.model = model
        self.others = dict(others)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs, **self.others)


# Repositories

def provide_links(package: str) -> None:
    """Puts hooked links in the place of those that the models import."""
    for name, (class_name, link) in LINKS.items():
        def make(*args: Any, link: Any = link, **kwargs: Any) -> Any:
            return link(*args, **kwargs).add_hook(
                sn_function.SpectralNormalization())

        module = types.ModuleType(f'{package}.{name}')
        setattr(module, class_name, make)
        sys.modules[module.__name__] = module


def images(size: int, n: int) -> Any:
    return random.uniform(-1, 1, (n, 3, size, size)).astype('f')


def normal(n: int, *shape: int) -> Any:
    return random.normal(size=(n, *shape)).astype('f')


def of_sngan(directory: str, n: int) -> Iterator[Case]:
    sys.path.insert(0, directory)
    provide_links('source.links')
    for name, size, n_classes in [
            ('resnet_32', 32, 10), ('resnet_small', 128, 1000),
            ('resnet_64', 64, 1000), ('resnet', 128, 1000),
            ('resnet_256', 256, 1000)]:
        gen = importlib.import_module(f'gen_models.{name}').ResNetGenerator
        dis = importlib.import_module(f'dis_models.sn{name}')
        y = {'y': random.randint(n_classes, size=n).astype('i')}
        models = [(f'gen_models.{name}', gen, {'z': normal(n, 128)})]
        for short in 'Projection', 'Concat':
            found = getattr(dis, f'SNResNet{short}Discriminator', None)
            if found is not None:
                models.append((f'dis_models.sn{name}, {short.lower()}', found,
                               {'x': images(size, n)}))
        for title, model, inputs in models:
            if 'concat' not in title:
                yield Case(title, model, inputs)
            yield Case(f'{title}, classes',
                       functools.partial(model, n_classes=n_classes),
                       {**inputs, **y})


def of_gan_lib(directory: str, n: int) -> Iterator[Case]:
    sys.path[:0] = [directory, f'{directory}/common']
    provide_links('sn')
    z = {'z': random.uniform(-1, 1, (n, 128, 1, 1)).astype('f')}
    x = {'x': images(32, n)}
    for name, classes, inputs in [
            ('common', ('DCGANGenerator',), z),
            ('common', ('ResnetGenerator',), {'x': z['z']}),
            ('common', ('DCGANDiscriminator', 'SNDCGANDiscriminator',
                        'WGANDiscriminator', 'ResnetDiscriminator'), x),
            ('dcgan', ('Generator',), z),
            ('dcgan', ('Discriminator',), x),
            ('dfm', ('Discriminator',), x),
            ('dfm', ('Denoiser',), {'x': normal(n, 512, 2, 2)}),
            ('minibatch_discrimination', ('Discriminator',), x),
            ('began', ('Discriminator',), x)]:
        module = importlib.import_module(f'{name}.net')
        for each in classes:
            yield Case(f'{name}.{each}', getattr(module, each), inputs)
    common = importlib.import_module('common.net')
    yield Case('common.DCGANGenerator, no norm', functools.partial(
        common.DCGANGenerator, use_bn=False), z)
    module = importlib.import_module('progressive.net')
    for stage in 0, 1.25, 2, 3.5, 4, 5.75, 6:
        size = min(32, 4 * 2 ** (int(stage + 1) // 2))
        for each, inputs in [('Generator', {'z': normal(n, 512, 1, 1)}),
                             ('Discriminator', {'x': images(size, n)})]:
            yield Case(f'progressive.{each}, stage {stage}',
                       getattr(module, each), inputs, {'stage': stage})


# What is printed of a model

def call(model: chainer.Chain, inputs: dict[str, Any]) -> list[Any]:
    # As a trainer calls it: NumPy promotes an array times a NumPy scalar.
    y = model(**{key: chainer.Variable(x) if x.dtype.kind == 'f' else x
                 for key, x in inputs.items()})
    return [each.array for each in (y if isinstance(y, tuple) else [y])]


def difference(ys: Sequence[Any], others: Sequence[Any]) -> float:
    for y, other in zip(ys, others):
        if (y.shape, len(ys)) != (other.shape, len(others)):
            raise ValueError(f'shapes {y.shape} and {other.shape}')
    return max(float(abs(y - other).max() / abs(other).max())
               for y, other in zip(ys, others))


def export(model: chainer.Chain, inputs: dict[str, Any], opset: int) -> Any:
    import onnx_chainer
    return onnx_chainer.export(model, dict(inputs), opset_version=opset)


def feed_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {f'Input_{i}': x for i, x in enumerate(inputs.values())}


def in_float64(model: chainer.Chain, inputs: dict[str, Any]) -> dict[str, Any]:
    """Makes the model one in float64, and returns such inputs."""
    for link in model.links():
        for param in link.params():
            param.array = param.array.astype('d')
        for name, value in vars(link).items():
            if isinstance(value, np.ndarray) and value.dtype == 'f':
                setattr(link, name, value.astype('d'))
        if isinstance(link, L.BatchNormalization):
            link._highprec_dtype = np.dtype('d')
    return {key: x.astype('d') if x.dtype == 'f' else x
            for key, x in inputs.items()}


def graph_outputs(exported: Any, inputs: dict[str, Any]) -> list[Any]:
    from onnx.reference import ReferenceEvaluator
    for node in exported.graph.node:
        for each in node.attribute:
            # The evaluator of opset 9 updates the statistics with it, and
            # uses the result.
            if each.name == 'momentum':
                each.f = 1.
    return ReferenceEvaluator(exported).run(None, feed_of(inputs))


def settle(model: chainer.Chain) -> None:
    """Gives it what a trained model has, where a new one is constant."""
    for param in model.params():
        noise = np.random.standard_normal(param.shape).astype('f')
        if param.array.size and (param.array == param.array.flat[0]).all():
            param.array += .1 * noise
    for link in model.links():
        if hasattr(link, 'avg_var'):
            link.decay = 0.     # statistics of the latest batch


def row_of(case: Case, opset: int, with_graph: bool) -> list[str]:
    np.random.seed(0)
    model = Called(case.make(), case.others)
    settle(model)
    for _ in range(2):
        call(model, case.inputs)
    n_normalized = sum(bool(link.local_link_hooks) for link in model.links())
    row = [case.name, str(n_normalized)]
    with chainer.using_config('train', False):
        if n_normalized:
            model = bake(model)
        y = call(model, case.inputs)
        try:
            session = shipping.session_of(export(model, case.inputs, opset))
            row.append('{:.1e}'.format(difference(
                session.run(None, feed_of(case.inputs)), y)))
        except Exception as error:  # it is what is to be shown
            return [*row, text_of(error), '', '']
        inputs = in_float64(model, case.inputs)
        with chainer.using_config('dtype', np.float64):
            exact = call(model, inputs)
            row.append(f'{difference(y, exact):.1e}')
            row.append('{:.1e}'.format(difference(graph_outputs(
                export(model, inputs, opset), inputs), exact))
                if with_graph else '-')
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--sngan', metavar='DIRECTORY')
    parser.add_argument('--gan-lib', metavar='DIRECTORY')
    parser.add_argument('--opset', type=int, default=11)
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--only', default='',
                        help='a regular expression for the name')
    parser.add_argument('--no-graph', action='store_true',
                        help='the evaluator is slow with large images')
    args = parser.parse_args(argv)
    rows = []
    for cases, directory in [(of_gan_lib, args.gan_lib),
                             (of_sngan, args.sngan)]:
        for case in cases(directory, args.batch) if directory else ():
            if re.search(args.only, case.name):
                rows.append(row_of(case, args.opset, not args.no_graph))
                print(*rows[-1], file=sys.stderr, flush=True)
    print(shipping.machine(), '\n')
    print(text_table(HEADER, rows))


if __name__ == '__main__':
    main()
