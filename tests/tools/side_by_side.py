"""Other people's training code with its own normalization and with ours.

``python -m tests.tools.side_by_side ADAPTER`` prints a row of the table of
docs/old_code.rst.  ``ADAPTER`` is a file that you write.  It imports the code,
and defines ``build()``, which returns a function that makes one update, and
the models by name::

    import os, sys
    sys.path.insert(0, '/path/to/the/checkout')
    os.chdir(sys.path[0])
    import net, updater

    def build():
        gen, dis = net.Generator(), net.Discriminator()
        ...
        return updater.Updater(...).update, {'gen': gen, 'dis': dis}

It is built as it is, and with a plain link and our hook in the place of each
link that has a ``W_bar`` of its own, or our hook in the place of Chainer's.
Weights and vectors are the same at the start, and so are the seeds of each
step.  Ours is built twice: one goes its own way, and one, for the losses, gets
the weights of theirs before each step, but keeps its vectors.  Theirs, too:
the other starts with each weight changed in its last bit, which tells how much
of a way is rounding.  Data must not depend on how many random numbers the
links have drawn: give them a seed.  ``SETTINGS``, if the adapter has it, holds
more arguments of the hook by the name of the class.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import io
import os
import random
import sys
import time
from typing import Any, Callable, Dict, Iterator, Sequence, Tuple

# Threads of BLAS wait for each other here; NumPy reads it when it is imported.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import sn_function  # isort: skip  # before chainer, which it repairs
import chainer
import chainer.links as L
import numpy as np
from chainer.link_hooks import SpectralNormalization as ChainersHook

from tests.tools.tables import show

HEADER = 'hooks', 'losses', 'vectors', 'way', 'rounding', 'time'
HOOKS = ChainersHook, sn_function.SpectralNormalization
Built = Tuple[Callable[[], Any], Dict[str, Any]]


def hook(settings: dict[str, Any], **arguments: Any) -> Any:
    """Ours, set as the old links are: u and v are constants."""
    return sn_function.SpectralNormalization(
        **arguments, detach_uv=True, n_warmup=0, **settings)


def plain(cls: Any, settings: dict[str, Any]) -> Callable[..., Any]:
    """A constructor of Chainer's link with our hook, in the place of cls."""
    bases = [c for c in cls.__mro__ if c.__module__.startswith('chainer.')]
    base = L.EmbedID if bases[0] is chainer.Link else bases[0]
    signature = inspect.signature(cls.__init__)

    def make(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(None, *args, **kwargs).arguments
        del given['self']
        ours = hook(settings,
                    n_power_iteration=given.pop('Ip', 1),
                    factor=given.pop('factor', None),
                    use_gamma=given.pop('use_gamma', False))
        return base(**given).add_hook(ours)
    return make


def is_link_class(value: Any) -> bool:
    # issubclass asks the abstract classes of all modules: Python 3.8 crashes.
    return inspect.isclass(value) and chainer.Link in value.__mro__


@contextlib.contextmanager
def replaced(settings: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Names in all modules mean ours, which were theirs or Chainer's hook."""
    undo = []
    for module in list(sys.modules.values()):
        names = getattr(module, '__dict__', {})
        if getattr(module, '__name__', '').split('.')[0] in (
                'chainer', 'sn_function', 'tests'):
            continue
        for name, value in list(names.items()):
            if value is ChainersHook:
                def new(*args: Any, **kwargs: Any) -> Any:
                    return sn_function.SpectralNormalization(
                        *args, **kwargs, detach_uv=True, n_warmup=0)
            elif is_link_class(value) and hasattr(value, 'W_bar'):
                new = plain(value, settings.get(value.__name__, {}))
            else:
                continue
            undo.append((names, name, value))
            names[name] = new
    if not undo:
        raise SystemExit('No module has a link with a W_bar, or Chainer\'s '
                         'hook: import what has it, at the top of the file.')
    try:
        yield
    finally:
        for names, name, value in undo:
            names[name] = value


def seed(number: int) -> None:
    np.random.seed(number)
    random.seed(number)


def links(models: dict[str, Any]) -> dict[str, Any]:
    return {name + path: link for name, model in models.items()
            for path, link in model.namedlinks()}


def params(models: dict[str, Any]) -> dict[str, Any]:
    return {name + path: param for name, model in models.items()
            for path, param in model.namedparams()}


def is_normalized(link: Any) -> bool:
    return hasattr(type(link), 'W_bar') or any(
        isinstance(h, HOOKS) for h in link.local_link_hooks.values())


def copy_weights(theirs: dict[str, Any], other: dict[str, Any]) -> None:
    """Copy parameters and statistics, but no vectors."""
    copies = params(other)
    for path, param in params(theirs).items():
        copy = copies[path].array
        copy[...] = param.array.reshape(copy.shape)
    copies = links(other)
    for path, link in links(theirs).items():
        for name in link._persistent:
            value = getattr(link, name)
            if name not in ('u', 'W_u') and isinstance(value, np.ndarray):
                getattr(copies[path], name)[...] = value


def vectors(models: dict[str, Any]) -> dict[str, Any]:
    """u by path; one that is drawn in the first call is drawn here."""
    rng = np.random.RandomState(5)
    result = {}
    for path, link in links(models).items():
        if hasattr(type(link), 'W_bar'):
            if link.u is None:
                link.u = rng.normal(size=(1, len(link.W))).astype('f')
            result[path] = link.u.ravel()
        elif is_normalized(link):
            result[path] = link.W_u
    return result


def copy_vectors(theirs: dict[str, Any], other: dict[str, Any]) -> None:
    copies = links(other)
    for path, u in vectors(theirs).items():
        link = copies[path]
        if hasattr(type(link), 'W_bar'):
            link.u = u.reshape(1, -1).copy()
        else:
            link.W_u = u.copy()


def turn(u: Any, w: Any) -> float:
    """The sine of the angle between two vectors."""
    u, w = (x.astype('d') / np.linalg.norm(x.astype('d')) for x in (u, w))
    return min(np.linalg.norm(u - w), np.linalg.norm(u + w))


def nudge(models: dict[str, Any]) -> None:
    rng = np.random.RandomState(5)
    for param in params(models).values():
        param.array *= 1 + 2. ** -23 * rng.choice([-1, 1], param.shape)


def reported(step: Callable[[], Any], models: dict[str, Any]) -> list[float]:
    """What one update reports, in the order of the names."""
    reporter = chainer.Reporter()
    for name, model in models.items():
        reporter.add_observer(name, model)
        reporter.add_observers(name, model.namedlinks(skipself=True))
    observation: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()), \
            reporter, reporter.scope(observation):
        step()
    return [float(np.ravel(getattr(value, 'array', value))[0])
            for _, value in sorted(observation.items())]


def flat(models: dict[str, Any]) -> Any:
    return np.concatenate([param.array.ravel().astype('d') for _, param
                           in sorted(params(models).items())])


def compare(build: Callable[[], Built], n_steps: int, n_timed: int,
            settings: dict[str, dict[str, Any]]) -> list[str]:
    """The row of an adapter."""
    def built(ours: bool) -> Built:
        seed(1)
        with replaced(settings) if ours else contextlib.nullcontext():
            return build()

    theirs, ours, led, nudged = map(built, (False, True, True, False))
    for other in ours, led, nudged:
        copy_weights(theirs[1], other[1])
        copy_vectors(theirs[1], other[1])
    nudge(nudged[1])
    start = flat(theirs[1])
    of_losses = []
    for number in range(n_steps):
        copy_weights(theirs[1], led[1])
        losses = []
        for each in theirs, led, ours, nudged:
            seed(100 + number)
            losses.append(np.array(reported(*each)))
        of_losses.append(abs(losses[1] - losses[0]) / np.maximum(
            abs(losses[0]), 1e-3))
    of_led = vectors(led[1])
    turns = [turn(u, of_led[path]) for path, u in vectors(theirs[1]).items()]
    end = flat(theirs[1])
    way = np.linalg.norm(end - start)
    apart = [np.linalg.norm(flat(each[1]) - end) for each in (ours, nudged)]
    ratios = []
    for number in range(n_timed):
        # Which one is first alternates: the other finds a warm cache.
        seconds = {}
        for which in ((0, 1), (1, 0))[number % 2]:
            seed(900 + number)
            since = time.process_time()
            reported(*(theirs, ours)[which])
            seconds[which] = time.process_time() - since
        ratios.append(seconds[1] / seconds[0])
    return [str(len(turns)), *(f'{x:.0e}' for x in (
        np.max(of_losses), np.max(turns), apart[0] / way, apart[1] / way)),
        f'{np.median(ratios):.2f}' if ratios else '']


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location('adapter', path)
    if spec is None or spec.loader is None:
        raise SystemExit(f'{path} is no file of Python.')
    module = sys.modules['adapter'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m tests.tools.side_by_side',
        description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument('adapter')
    parser.add_argument('--steps', type=int, default=20)
    parser.add_argument('--timed', type=int, default=8)
    args = parser.parse_args(argv)
    adapter = load(os.path.abspath(args.adapter))
    row = compare(adapter.build, args.steps, args.timed,
                  getattr(adapter, 'SETTINGS', {}))
    show([HEADER, row], as_rst=False)
    return 0


if __name__ == '__main__':
    sys.exit(main())
