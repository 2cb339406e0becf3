"""What is timed on many weights: lists of them, models, training steps."""
from __future__ import annotations

import contextlib
import functools
import importlib
import math
import pathlib
import sys
import tempfile
from typing import Any, Callable, Sequence

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

from tests.tools.benchmarks.contenders import (
    BUILT_IN,
    OF_PEERS,
    Contender,
    Weight,
    built_in,
    case_of,
    hooked_link,
    ours,
    why_not,
)
from tests.tools.benchmarks.report import NO_HOOK

EXAMPLES = pathlib.Path(__file__).parents[3] / 'examples'
HOST = '@numpy'
BATCH_SIZE = 4  # of the training steps

Shapes = Sequence[Any]  # of tuples of int
Makers = dict  # of functions that make a contender, by name


def residual(
        n_in: int, n_out: int, has_shortcut: bool = True
) -> list[tuple[int, ...]]:
    """The weights of a block: two convolutions, and that of the shortcut."""
    n_hidden = max(n_in, n_out)
    shapes: list[tuple[int, ...]] = [
        (n_hidden, n_in, 3, 3), (n_out, n_hidden, 3, 3)]
    return [*shapes, (n_out, n_in, 1, 1)] if has_shortcut else shapes


def resnet(widths: Sequence[int]) -> list[tuple[int, ...]]:
    """A discriminator of blocks; none but the last keeps the width."""
    return [shape for n_in, n_out in zip(widths, widths[1:])
            for shape in residual(n_in, n_out, n_in != n_out)]


RESNET_WIDTHS = (3, 64, 128, 256, 512, 1024, 1024)
# The discriminators.  A block has its wider width between its convolutions.
MODELS: dict[str, list[tuple[int, ...]]] = {
    'SNGAN 32x32': [
        (64, 3, 3, 3), (64, 64, 4, 4), (128, 64, 3, 3), (128, 128, 4, 4),
        (256, 128, 3, 3), (256, 256, 4, 4), (512, 256, 3, 3), (1, 512 * 16)],
    'SNGAN ResNet 64x64': [*resnet(RESNET_WIDTHS), (1, 1024)],
    'BigGAN 128x128': resnet((3, 96, 192, 384, 768, 1536, 1536)),
}
# Weights that are normalized at once.
LISTS: dict[str, list[tuple[int, ...]]] = {
    '18 of 16x16x3x3': [(16, 16, 3, 3)] * 18,
    '18 of SNGAN ResNet 64x64': MODELS['SNGAN ResNet 64x64']}


def nbytes_of(shapes: Shapes) -> int:
    """Bytes of weights in float32."""
    return 4 * sum(map(math.prod, shapes))


# Lists of weights, without layers

def list_makers(shapes: Shapes) -> Makers:
    """All weights, then one backward."""
    cases = [case_of(shape) for shape in shapes]

    def several(
            parameters: Any, forward: Callable[[], Any]) -> Contender:
        def backward(Ys: Any) -> Any:
            for Y, case in zip(Ys, cases):
                Y.grad = case.gY
            chainer.backward(Ys)
            return [W.grad for W in parameters]

        def clear() -> None:
            for W in parameters:
                W.cleargrad()

        return Contender(forward, backward, clear)

    def hooks(make_hook: Callable[[int], Any]) -> Contender:
        links = [(make_hook(1), case) for case in cases]
        links = [(hook, hooked_link(hook, case)) for hook, case in links]
        return several([link.W for _, link in links], lambda: [
            hook.normalize_weight(link) for hook, link in links])

    def at_once(**settings: Any) -> Contender:
        Ws = [chainer.Parameter(case.W[...]) for case in cases]
        us = [case.u.copy() for case in cases]
        return several(Ws, lambda: sn_function.spectral_normalize_all(
            Ws, us, update_u=True, **settings))

    return {
        BUILT_IN: lambda: hooks(built_in),
        'hook on each': lambda: hooks(ours),
        'at once': at_once,
        'at once, detached': lambda: at_once(detach_uv=True),
        **{name: functools.partial(make, cases)
           for name, make in OF_PEERS.items() if why_not(name) is None}}


# Models of layers that cost nothing

class Model(chainer.ChainList):
    """Layers one after another."""

    def forward(self, x: Any) -> Any:
        for layer in self:
            x = layer(x)
        return x


def on_chain(**settings: Any) -> Any:
    return sn_function.ChainSpectralNormalization(n_warmup=0, **settings)


# How the hooks come to a model: a function that makes one, whether it belongs
# on the chain, whether a step is `cached`.
Way = Any
WAYS: dict[str, Way] = {
    NO_HOOK: (None, False, False),
    BUILT_IN: (lambda: built_in(1), False, False),
    'hook': (lambda: ours(1), False, False),
    'hook, cached': (lambda: ours(1), False, True),
    'chain hook': (on_chain, True, False),
    'chain hook, cached': (on_chain, True, True),
    'the same, detached': (lambda: on_chain(detach_uv=True), True, True),
}


def add_hooks(model: chainer.Chain, way: Way) -> Callable[[], Any]:
    """Returns the scope of a step."""
    make_hook, is_on_chain, is_cached = way
    if make_hook is not None:
        for link in [model] if is_on_chain else model.links():
            if is_on_chain or hasattr(link, 'W'):
                link.add_hook(make_hook())
    # Looked up here, so that what cannot be made differs from what fails.
    return (functools.partial(sn_function.cached, model) if is_cached
            else contextlib.nullcontext)


def model_contender(
        model: Model, way: Way, device: str = HOST) -> Contender:
    """A step of training: real, fake, the generator's, and one backward."""
    model.to_device(device)
    scope = add_hooks(model, way)
    x = model.device.send(np.zeros((), 'f'))

    def forward() -> Any:
        with contextlib.ExitStack() as stack:
            stack.enter_context(scope())
            return sum(model(x) for _ in range(3)), stack.pop_all()

    def backward(loss_and_scope: Any) -> Any:
        loss, stack = loss_and_scope
        with stack:
            loss.backward()
        return [layer.W.grad for layer in model]

    return Contender(forward, backward, model.cleargrads)


def model_makers(shapes: Shapes, device: str = HOST) -> Makers:
    send = chainer.get_device(device).send
    # Nothing writes into them, so models on the host can share them.
    cases = {shape: case_of(shape) for shape in set(shapes)}

    def make(way: Way) -> Contender:
        return model_contender(
            Model(*(Weight(send(cases[shape].W), send(cases[shape].gY))
                    for shape in shapes)), way, device)

    return {name: functools.partial(make, way) for name, way in WAYS.items()}


# Whole training steps

class Plain(chainer.Sequential):
    """The discriminator of SNGAN for images of 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        *convolutions, (_, size) = MODELS['SNGAN 32x32']
        for m, n, k, _ in convolutions:
            self.append(L.Convolution2D(n, m, k, stride=k - 2, pad=1))
            self.append(F.leaky_relu)
        self.append(L.Linear(size, 1))


class Block(chainer.Chain):
    """Of a residual network; the wider width is in between."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        n_hidden = max(n_in, n_out)
        with self.init_scope():
            self.conv1 = L.Convolution2D(n_in, n_hidden, 3, pad=1)
            self.conv2 = L.Convolution2D(n_hidden, n_out, 3, pad=1)
            if n_in != n_out:
                self.shortcut = L.Convolution2D(n_in, n_out, 1)

    def forward(self, x: Any) -> Any:
        h = self.conv2(F.relu(self.conv1(F.relu(x))))
        if not hasattr(self, 'shortcut'):
            return h + x
        return F.average_pooling_2d(h, 2) + F.average_pooling_2d(
            self.shortcut(x), 2)


class ResNet(chainer.Sequential):
    """The discriminator of SNGAN for images of 64 x 64."""

    def __init__(self) -> None:
        super().__init__(
            *map(Block, RESNET_WIDTHS, RESNET_WIDTHS[1:]),
            sum_of_pixels, L.Linear(1024, 1))


def sum_of_pixels(h: Any) -> Any:
    return F.sum(F.relu(h), axis=(2, 3))


def gan_contender(
        make: Callable[[], chainer.Chain], size: int, way: Way,
        device: str = HOST, batch_size: int = BATCH_SIZE) -> Contender:
    """Real and fake with an update, then the generator's pass."""
    np.random.seed(0)
    model = make()
    model.to_device(device)
    scope = add_hooks(model, way)
    optimizer = chainer.optimizers.Adam(1e-4).setup(model)
    real, fake = model.device.send(np.random.uniform(
        -1, 1, (2, batch_size, 3, size, size)).astype('f'))

    def step(_: Any) -> Any:
        with scope():
            loss = F.mean(F.relu(1 - model(real))) + F.mean(
                F.relu(1 + model(fake)))
            model.cleargrads()
            loss.backward()
            del loss
            optimizer.update()
            x = chainer.Variable(fake)
            F.mean(model(x)).backward()
        return x.grad

    return Contender(lambda: None, step, lambda: None, False)


def demo_contender(
        hook: str, is_detached: bool, gpu: int = -1) -> Contender:
    """A step of ``make demo``, with one vector and five iterations."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    demo: Any = importlib.import_module('train_sngan_digits')
    np.random.seed(0)
    args = demo.parse_args([
        '--hook', hook, '--n-vectors', '1', '-k', '5', '--out',
        tempfile.gettempdir(), '--gpu', str(gpu)])
    images = demo.digits_data.load(args.dataset)
    shape = images.train.shape[1:]
    gen, dis = demo.Generator(shape), demo.Discriminator(shape)
    demo.normalize(args, dis)
    for link in dis.links():
        for of_link in link.local_link_hooks.values():
            if isinstance(of_link, sn_function.SpectralNormalization):
                of_link.detach_uv = is_detached
    gen.to_device(args.device)
    dis.to_device(args.device)
    updater = demo.make_trainer(args, images, gen, dis, None).updater

    def step(_: Any) -> Any:
        updater.update_core()
        return dis.linear.W.grad

    return Contender(lambda: None, step, lambda: None, False)


def demo_makers(gpu: int = -1) -> Makers:
    return {
        NO_HOOK: lambda: demo_contender('none', False, gpu),
        BUILT_IN: lambda: demo_contender('chainer', False, gpu),
        'chain hook': lambda: demo_contender('sn_function', False, gpu),
        'chain hook, detached': lambda: demo_contender(
            'sn_function', True, gpu)}


def gan_makers(
        make: Callable[[], chainer.Chain], size: int, device: str = HOST,
        batch_size: int = BATCH_SIZE) -> Makers:
    ways = {name: WAYS[name] for name in (
        NO_HOOK, BUILT_IN, 'hook', 'chain hook', 'chain hook, cached',
        'the same, detached')}
    return {name: functools.partial(
        gan_contender, make, size, way, device, batch_size)
        for name, way in ways.items()}


STEPS: dict[str, Callable[[], Makers]] = {
    'the demo': demo_makers,
    'SNGAN 32x32': lambda: gan_makers(Plain, 32),
    'SNGAN ResNet 64x64': lambda: gan_makers(ResNet, 64)}
