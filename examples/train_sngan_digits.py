#!/usr/bin/env python
"""A GAN with spectral normalization on real handwritten digits.

The layers of the discriminator are normalized, and the loss is the hinge loss,
as in Miyato et al., https://arxiv.org/abs/1802.05957.  Both networks get the
class of each image.  These files are written to the directory --out:

    samples.png       real and generated digits, with a score of these
    sigma.png         the spectral norm of each layer over training
    scores.json       how far generated digits are from real ones
    log               what LogReport recorded
    snapshot_iter_*   for --resume
    gen.npz, dis.npz  the trained networks
    dis_plain.npz     the discriminator with its normalized weights, no hook

Ctrl-C ends it with a snapshot, and prints the command that goes on from there.

It needs matplotlib, rich and scikit-learn, the extra `examples`, and takes one
to four minutes on a CPU.  With the extra `mpi` it runs on several processes or
machines, which share each batch:

    mpiexec -n 2 python examples/train_sngan_digits.py --communicator naive
"""
from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
from typing import Any, Callable

# For layers as small as these one thread of BLAS is faster than two, which
# wait for each other.  It has to be set before NumPy is imported.  OpenBLAS
# and MKL read it, where their own variables are not set.
os.environ.setdefault('OMP_NUM_THREADS', '1')

# Before Chainer: with sn_function, Chainer 7.8.1 can be imported on current
# versions of NumPy and setuptools.
import sn_function

# isort: split
import chainer
import chainer.functions as F
import chainer.link_hooks
import digits_data
import digits_score
import numpy
import sigma_report
from chainer import training
from chainer.training import extensions
from rich.console import Console
from sngan_extensions import (
    Bar,
    PlainOutput,
    RandomState,
    Samples,
    Snapshots,
)
from sngan_models import (
    Discriminator,
    Generator,
    loss_dis,
    loss_gen,
)

from sn_function import distributed
from sn_function.extensions import SpectralNormReport

HOOKS = 'sn_function', 'chainer', 'none'
COMMUNICATORS = 'naive', 'flat', 'non_cuda_aware', 'pure_nccl'


def normalize(args: argparse.Namespace, dis: Discriminator) -> None:
    """Adds the hook to all layers of the discriminator."""
    settings = {'n_power_iteration': args.n_power_iteration}
    if args.hook == 'sn_function':
        dis.add_hook(sn_function.ChainSpectralNormalization(
            n_vectors=args.n_vectors, **settings))
    elif args.hook == 'chainer':
        for link in dis.links():
            if hasattr(link, 'W'):
                link.add_hook(
                    chainer.link_hooks.SpectralNormalization(**settings))


class SNGANUpdater(training.updaters.StandardUpdater):
    """``n_dis`` steps of the discriminator, then one of the generator."""

    def __init__(self, *args: Any, n_dis: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.n_dis = n_dis

    def update_core(self) -> None:
        optimizer_gen = self.get_optimizer('gen')
        optimizer_dis = self.get_optimizer('dis')
        gen, dis = optimizer_gen.target, optimizer_dis.target
        for _ in range(self.n_dis):
            x_real, labels = self.converter(
                self.get_iterator('main').next(), self.input_device)
            n = len(x_real)
            with chainer.no_backprop_mode():
                x_fake = gen(gen.make_noise(n), labels).array
            # Both in one call, as each call normalizes all weights.
            y = dis(F.concat((x_real, x_fake), axis=0),
                    F.concat((labels, labels), axis=0))
            optimizer_dis.update(self.report, dis, loss_dis, y[:n], y[n:])
        y_fake = dis(gen(gen.make_noise(n), labels), labels)
        optimizer_gen.update(self.report, gen, loss_gen, y_fake)

    @staticmethod
    def report(
            model: chainer.Link, loss: Callable, *args: chainer.Variable
    ) -> chainer.Variable:
        value = loss(*args)
        chainer.report({'loss': value}, model)
        return value


def every(interval: int, last: int) -> Callable[[training.Trainer], bool]:
    """Returns a trigger: each ``interval`` iterations, and the last one."""
    def trigger(trainer: training.Trainer) -> bool:
        iteration = trainer.updater.iteration
        return iteration % interval == 0 or iteration == last
    return trigger


def make_optimizer(args: argparse.Namespace) -> Any:
    optimizer = chainer.optimizers.Adam(
        args.alpha, beta1=args.beta1, beta2=0.9)
    if args.comm is None:
        return optimizer
    # It averages the gradients, and keeps u the same on all ranks.
    return distributed.create_multi_node_optimizer(optimizer, args.comm)


def make_iterator(
        args: argparse.Namespace,
        images: digits_data.Images) -> chainer.dataset.Iterator:
    dataset = chainer.datasets.TupleDataset(images.train, images.train_labels)
    if args.comm is None:
        return chainer.iterators.SerialIterator(dataset, args.batchsize)
    import chainermn
    return chainer.iterators.SerialIterator(
        chainermn.scatter_dataset(
            dataset, args.comm, shuffle=True, seed=args.seed),
        args.batchsize // args.comm.size)


def make_snapshots(
        args: argparse.Namespace, trigger: Callable) -> training.Extension:
    if args.comm is None:
        return Snapshots(trigger)
    import chainermn
    # One for each rank, as each has its own order of images.
    own = extensions.snapshot()
    snapshot = chainermn.extensions.multi_node_snapshot(
        args.comm, own, list(range(args.comm.size)))
    snapshot.priority = own.priority    # after all other extensions
    snapshot.trigger = trigger
    return snapshot


def make_trainer(
        args: argparse.Namespace, images: digits_data.Images,
        gen: Generator, dis: Discriminator, noise: Any) -> training.Trainer:
    """Puts the updater and the extensions together."""
    device, last = args.device, args.iteration
    optimizers = {
        name: make_optimizer(args).setup(model)
        for name, model in (('gen', gen), ('dis', dis))}
    iterator = make_iterator(args, images)
    updater = SNGANUpdater(
        iterator, optimizers, input_device=device, n_dis=args.n_dis)
    trainer = training.Trainer(updater, (last, 'iteration'), out=args.out)

    # The step size goes down linearly, as in the paper, so that the samples
    # settle.  It is 0 for the last twentieth, so that power iteration, which
    # lags behind moving weights, can converge.
    for name, optimizer in optimizers.items():
        trainer.extend(
            extensions.LinearShift(
                'alpha', (args.alpha, 0.), (last // 2, last * 19 // 20),
                optimizer),
            name=f'decay_{name}', trigger=(1, 'iteration'))
    snapshot = every(args.snapshot_interval, last)
    if args.is_first:
        display = every(args.display_interval, last)
        trainer.extend(
            SpectralNormReport(dis, true_sigma=True, filename='sigma.png'),
            trigger=display)
        trainer.extend(extensions.LogReport(trigger=display))
        trainer.extend(extensions.PrintReport(
            ['epoch', 'iteration', 'gen/loss', 'dis/loss', 'distance',
             'elapsed_time'], out=PlainOutput()), trigger=display)
        trainer.extend(Samples(images, gen, noise), trigger=snapshot)
    trainer.extend(RandomState())
    trainer.extend(make_snapshots(args, snapshot))
    return trainer


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} is not 1 or more')
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float('inf'):
        raise argparse.ArgumentTypeError(f'{text} is not above 0')
    return value


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Train an SNGAN on handwritten digits.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--dataset', choices=digits_data.NAMES, default='digits',
        help='digits comes with scikit-learn, the others are downloaded')
    add('--hook', choices=HOOKS, default='sn_function',
        help='spectral normalization of the discriminator')
    length = parser.add_mutually_exclusive_group()
    length.add_argument('--iteration', '-i', type=positive_int, default=2000,
                        help='number of steps of the generator')
    length.add_argument('--epoch', '-e', type=positive_int, default=None,
                        help='passes over the images, instead of --iteration')
    add('--batchsize', '-b', type=positive_int, default=32,
        help='images in a step')
    # In training the largest singular values of a normalized weight come
    # within a percent of each other, and change places.  One vector lags
    # behind: docs/accuracy.rst.
    add('--n-vectors', type=positive_int, default=16,
        help='vectors that follow each weight; of --hook sn_function')
    add('--n-power-iteration', '-k', type=positive_int, default=1,
        help='power iterations in a call of a layer')
    add('--n-dis', type=positive_int, default=1,
        help='steps of the discriminator for one of the generator')
    add('--alpha', type=positive_float, default=1e-3, help='step size of Adam')
    add('--beta1', type=float, default=0.5,
        help='of Adam; the paper has also 0')
    add('--gpu', '-g', type=int, default=-1, metavar='N',
        help='GPU to use, of several ranks the first; below 0, the CPU')
    add('--communicator', choices=COMMUNICATORS, default=None,
        help='of ChainerMN, under mpiexec; the ranks share --batchsize')
    add('--seed', type=int, default=0, help='of all random numbers')
    add('--out', '-o', default='result', metavar='DIRECTORY',
        help='all files go there')
    add('--resume', '-r', default=None, metavar='SNAPSHOT',
        help='go on from a snapshot, with the same other arguments')
    add('--snapshot-interval', type=positive_int, default=500,
        help='iterations between snapshots, and between samples')
    add('--display-interval', type=positive_int, default=100,
        help='iterations between lines of the log')
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if not 0 <= args.seed < 2 ** 32:
        parser.error(f'argument --seed: {args.seed} is not in 0 to 2^32 - 1')
    if not 0 <= args.beta1 < 1:
        parser.error(f'argument --beta1: {args.beta1} is not in [0, 1)')
    args.comm = make_communicator(parser, args)
    args.is_first = args.comm is None or args.comm.rank == 0
    # mpiexec gives each rank a terminal, wherever its output goes.
    args.is_terminal = args.comm is None and sys.stdout.isatty()
    if args.resume is not None and args.comm is not None:
        args.resume += f'.{args.comm.rank}'
    elif args.resume is not None and not os.path.isfile(args.resume):
        parser.error(f'argument --resume: there is no file {args.resume}')
    try:
        if args.gpu >= 0 and args.comm is not None:
            args.gpu += args.comm.intra_rank
        args.device = chainer.get_device(
            f'@cupy:{args.gpu}' if args.gpu >= 0 else '@numpy')
        args.device.use()
    except Exception as e:  # Chainer and CuPy raise several kinds
        message = f'argument --gpu: cannot use GPU {args.gpu}: {e}'
        if args.comm is not None:
            give_up(args, message)
        parser.error(message)
    return args


def make_communicator(
        parser: argparse.ArgumentParser, args: argparse.Namespace) -> Any:
    if args.communicator is None:
        return None
    import chainermn
    try:
        comm = chainermn.create_communicator(args.communicator)
    except (ImportError, RuntimeError) as e:    # no mpi4py, no MPI, no NCCL
        parser.error(f"argument --communicator: {e} The extra has mpi4py and "
                     f"an MPI: pip install 'sn_function[mpi]'")
    # A rank that fails ends the others, which would wait for it.
    chainermn.global_except_hook.add_hook()
    if args.batchsize % comm.size:
        parser.error(f'argument --batchsize: {args.batchsize} images cannot '
                     f'be shared out over {comm.size} ranks')
    return comm


def give_up(args: argparse.Namespace, message: str) -> int:
    print(message, file=sys.stderr, flush=True)
    if args.comm is not None:
        args.comm.mpi_comm.Abort(1)     # the other ranks would wait
    return 1


def run(args: argparse.Namespace) -> int:
    random.seed(args.seed)
    numpy.random.seed(args.seed)
    try:
        images = digits_data.load(args.dataset)
    except digits_data.DatasetUnavailableError as e:
        return give_up(args, str(e))
    os.makedirs(args.out, exist_ok=True)
    with tempfile.TemporaryFile(dir=args.out):  # fails here, before training
        pass
    if args.epoch is not None:
        args.iteration = max(1, round(
            args.epoch * len(images.train) / args.batchsize / args.n_dis))
    if args.is_first:
        print(f'Device: {args.device}')
        if args.comm is not None:
            print(f'Ranks: {args.comm.size}, {args.communicator}')
        print(f'Images: {len(images.train)} of {args.dataset}, '
              f'{len(images.test)} held out')
        print(f'Hook: {args.hook}')
        print(f'Iterations: {args.iteration}, batch size: {args.batchsize}\n',
              flush=True)

    shape = images.train.shape[1:]
    gen, dis = Generator(shape), Discriminator(shape)
    normalize(args, dis)
    gen.to_device(args.device)
    dis.to_device(args.device)
    # Noise that training does not draw, the same before and after it.
    n = min(len(images.train), len(images.test), digits_score.MAX_SAMPLES)
    noise = gen.make_noise(n, numpy.random.RandomState(args.seed))
    labels = images.test_labels[:n]
    samples = {
        'real, for training': (images.train[:n], images.train_labels[:n]),
        'untrained generator': (gen.sample(noise, labels), labels)}
    if not args.is_first:   # each rank draws its own noise
        numpy.random.seed((args.seed + args.comm.rank) % 2 ** 32)
    trainer = make_trainer(args, images, gen, dis, noise)
    if args.resume is not None:
        try:
            chainer.serializers.load_npz(args.resume, trainer)
        except Exception as e:  # its class depends on the fault
            return give_up(
                args, f'Cannot resume from {args.resume}: '
                f'{type(e).__name__}: {e}\nIs it a snapshot of a run with '
                f'the same --dataset and --hook?')
    # Without a terminal, which would give its width, wide enough.
    console = Console(width=None if args.is_terminal else 100,
                      force_terminal=args.is_terminal)
    try:
        with Bar(args.iteration, console) as bar:
            trainer.extend(bar)
            trainer.run()
        if args.is_first:
            samples['trained generator'] = gen.sample(noise, labels), labels
            finish(args, console, trainer, gen, dis, samples)
    except KeyboardInterrupt:
        return interrupted(args, trainer)
    return 0


def finish(
        args: argparse.Namespace, console: Console, trainer: training.Trainer,
        gen: Generator, dis: Discriminator, samples: dict[str, tuple]) -> None:
    """Writes the scores and the networks, and prints the tables."""
    scores = trainer.get_extension('Samples').scorer.scores(samples)
    with open(os.path.join(args.out, 'scores.json'), 'w') as f:
        json.dump(scores, f, indent=4)
    plain = dis if args.hook == 'none' else sn_function.bake(dis)
    for name, model in (('gen', gen), ('dis', dis), ('dis_plain', plain)):
        chainer.serializers.save_npz(
            os.path.join(args.out, f'{name}.npz'), model)

    layers = trainer.get_extension('SpectralNormReport').measure()
    print()
    if args.hook != 'none':
        print(f'{sn_function.summary(dis)}\n')
    console.print(digits_score.make_table(scores),
                  sigma_report.make_table(layers),
                  sigma_report.verdict(layers))
    print(f'Trained for {trainer.elapsed_time:.0f} s. Pictures, scores, log, '
          f'snapshots and networks: {args.out}')


def interrupted(
        args: argparse.Namespace, trainer: training.Trainer = None) -> int:
    """Says how to go on, in an ``except`` block; returns an exit code."""
    if args.comm is not None:
        raise       # ends the other ranks
    newest = trainer and trainer.get_extension('Snapshots').newest
    if newest:
        print(f'\nInterrupted. There is a snapshot; this goes on from it:\n\n'
              f'{resume_command(args, newest)}\n', file=sys.stderr)
    elif trainer and trainer.updater.iteration:
        print('\nInterrupted at once, without a snapshot.', file=sys.stderr)
    else:
        print('\nInterrupted. Nothing has been trained yet, so there is no '
              'snapshot.', file=sys.stderr)
    return 130      # as a shell has it after Ctrl-C


def resume_command(args: argparse.Namespace, snapshot: str) -> str:
    """Returns the command that was given, with another ``--resume``."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--resume', '-r')
    _, others = parser.parse_known_args(args.argv)
    return shlex.join([
        shortest(sys.executable), shortest(__file__), *others,
        '--resume', snapshot])


def shortest(path: str) -> str:
    return min(path, os.path.relpath(path), key=len)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return run(args)
    except KeyboardInterrupt:
        return interrupted(args)
    except OSError as e:    # no such directory, or a full disk
        return give_up(args, f'Cannot write to {args.out}: {e}')


if __name__ == '__main__':
    sys.exit(main())
