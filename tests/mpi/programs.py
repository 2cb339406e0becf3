"""What runs on each rank: ``mpiexec -n 2 python -m tests.mpi.programs NAME``.

Each program prints the results of rank 0 as one line of JSON.
:mod:`tests.mpi.runs` starts the programs and asserts.
"""
from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import sys
import time
import warnings

import sn_function  # isort: skip  # before chainer, which it repairs

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np
from chainer import link_hooks, training

from sn_function import distributed, errors

HOOKS = {'sn_function': sn_function.SpectralNormalization,
         'chainer': link_hooks.SpectralNormalization}


def make_model(hook='sn_function', lazy=False, **settings):
    """A small discriminator with normalized layers."""
    def add(link):
        return link.add_hook(HOOKS[hook](**settings))

    return chainer.Sequential(
        add(L.Convolution2D(None if lazy else 1, 8, 3)), F.leaky_relu,
        add(L.Deconvolution2D(None if lazy else 8, 6, 3, stride=2)),
        F.leaky_relu,
        add(L.Linear(None if lazy else 6 * 13 * 13, 16)), F.leaky_relu,
        add(L.Linear(16, 1)))


LAYERS = 0, 2, 4, 6
PIXELS = 8


def make_batch(rng, n):
    x = rng.normal(size=(n, 1, PIXELS, PIXELS)).astype('f')
    return x, np.sign(x.sum((1, 2, 3)))[:, None]


def loss(model, x, t):
    return F.mean(F.relu(1 - t * model(x)))


def digest(x):
    return hashlib.blake2b(x.tobytes(), digest_size=8).hexdigest()


def steps(comm, args):
    """200 steps; in each, are W and u the same on all ranks?"""
    np.random.seed(100 + comm.rank)     # different W and u on each
    # Chainer's hook does not initialize a lazy Linear for images.
    model = make_model(args.hook, lazy=args.hook == 'sn_function')
    create = (distributed if args.hook == 'sn_function'
              else chainermn).create_multi_node_optimizer
    optimizer = create(chainer.optimizers.Adam(1e-3), comm).setup(model)
    rng = np.random.RandomState(comm.rank)
    digests, us, sigmas = [], [], []
    for _ in range(args.steps):
        optimizer.update(loss, model, *make_batch(rng, 8))
        digests.append([
            ''.join(digest(x) for x in (model[i].W.array, model[i].W_u))
            for i in LAYERS])
        us.append([model[i].W_u / np.linalg.norm(model[i].W_u)
                   for i in LAYERS])
        sigmas.append([sigma(model[i]) for i in LAYERS])
    return gathered_steps(comm, digests, us, sigmas)


def sigma(link):
    """The sigma that the link divides by in the next call."""
    W = link.W.array
    if isinstance(link, L.Deconvolution2D):
        W = W.swapaxes(0, 1)
    W = W.reshape(len(W), -1).astype(float)
    v = W.T @ link.W_u
    return float(np.linalg.norm(W @ (v / np.linalg.norm(v))))


def gathered_steps(comm, *mine):
    ranks = comm.gather_obj(mine)
    if comm.rank != 0:
        return None
    digests, us, sigmas = zip(*ranks)
    digests, us, sigmas = np.array(digests), list(zip(*us)), np.array(sigmas)
    is_same = (digests == digests[:1]).all(axis=(0, 2))
    W_is_same = np.array([[[d[:16] for d in step] for step in rank]
                          for rank in digests.tolist()])
    W_is_same = (W_is_same == W_is_same[:1]).all(axis=(0, 2))
    angles = [max(float(np.degrees(np.arccos(np.clip(a @ b, -1, 1))))
                  for rank in step for a, b in zip(step[0], rank))
              for step in us]
    spread = np.abs(sigmas / sigmas[:1] - 1).max(axis=(0, 2))
    return {'steps': len(is_same), 'same': int(is_same.sum()),
            'same_W': int(W_is_same.sum()),
            'angle': angles, 'sigma': spread.tolist()}


def halves(comm, args):
    """The same batch, divided among the ranks."""
    np.random.seed(comm.rank)
    model = make_model(use_gamma=True)
    distributed.bcast_data(comm, model)
    optimizer = distributed.create_multi_node_optimizer(
        chainer.optimizers.MomentumSGD(.05), comm).setup(model)
    rng = np.random.RandomState(0)
    for _ in range(args.steps):
        x, t = make_batch(rng, 16)
        own = slice(comm.rank * 16 // comm.size,
                    (comm.rank + 1) * 16 // comm.size)
        optimizer.update(loss, model, x[own], t[own])
    distributed.assert_synchronized(comm, model)
    if comm.rank == 0:
        chainer.serializers.save_npz(args.out, model)
    return {}


def persistents(comm, args):
    """AllreducePersistent, on vectors that differ and on equal ones."""
    np.random.seed(comm.rank)
    model = chainer.Chain(
        ours=L.Linear(7, 11).add_hook(HOOKS['sn_function']()),
        theirs=L.Linear(7, 11).add_hook(HOOKS['chainer']()),
        bn=L.BatchNormalization(3))
    extension = chainermn.extensions.AllreducePersistent(model, comm)
    links = model.ours, model.theirs
    before = [link.W_u.copy() for link in links]
    model.bn.avg_mean[...] = comm.rank
    extension()
    kept = all((a == link.W_u).all() for a, link in zip(before, links))
    distributed.bcast_data(comm, model)
    synced = [link.W_u.copy() for link in links]
    extension()
    kept &= all((a == link.W_u).all() for a, link in zip(synced, links))
    distributed.assert_synchronized(comm, model)
    return {'kept': comm.gather_obj(bool(kept)),
            'mean': model.bn.avg_mean.tolist()}


class Updater(training.updaters.StandardUpdater):

    def update_core(self):
        batch = self.converter(self.get_iterator('main').next())
        optimizer = self.get_optimizer('main')
        optimizer.update(loss, optimizer.target, *batch)


def make_trainer(comm, args, n, out, lazy):
    model = make_model(lazy=lazy, use_gamma=True)
    optimizer = distributed.create_multi_node_optimizer(
        chainer.optimizers.Adam(1e-3), comm).setup(model)
    data = make_batch(np.random.RandomState(7), 48)
    # An order that needs no random state.
    iterator = chainer.iterators.SerialIterator(
        chainermn.scatter_dataset(
            chainer.datasets.TupleDataset(*data) if comm.rank == 0 else None,
            comm), 4, shuffle=False)
    trainer = training.Trainer(
        Updater(iterator, optimizer), (n, 'iteration'), out=out)
    trainer.extend(chainermn.extensions.multi_node_snapshot(
        comm, training.extensions.snapshot(autoload=True), args.replicas),
        trigger=(5, 'iteration'))
    return model, trainer


def train(comm, args):
    """Trains to an iteration, from the last snapshot in --out, if any."""
    np.random.seed(comm.rank)
    model, trainer = make_trainer(
        comm, args, args.steps, args.out, lazy=args.lazy)
    trainer.run()
    return described(comm, model)


def described(comm, model):
    distributed.assert_synchronized(comm, model)
    arrays = {**{k: p.array for k, p in model.namedparams()},
              **{f'{i}/W_u': model[i].W_u for i in LAYERS}}
    return {'digests': {k: digest(x) for k, x in sorted(arrays.items())},
            't': model[0].W.update_rule.t}


def checkpoints(comm, args):
    """create_multi_node_checkpointer, which is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        checkpointer = chainermn.create_multi_node_checkpointer(
            'run', comm, path=args.out)
    found = []
    for is_resumed in False, True:
        np.random.seed(comm.rank + 10 * is_resumed)
        model, trainer = make_trainer(
            comm, args, 0, os.path.join(args.out, 'x'), lazy=is_resumed)
        updater = trainer.updater
        if is_resumed:
            checkpointer.maybe_load(updater)
        while updater.iteration < 20:
            updater.update()
            if updater.iteration == 10 and not is_resumed:
                checkpointer.save(updater, 10)
        found.append(described(comm, model))
    return {'unbroken': found[0], 'resumed': found[1]}


def different_snapshots(comm, args):
    """Ranks load snapshots of different runs, and get the same model."""
    np.random.seed(comm.rank)
    model = make_model(use_gamma=True)
    own = chainer.optimizers.Adam(1e-3).setup(model)
    rng = np.random.RandomState(comm.rank)
    for _ in range(3 + comm.rank):
        own.update(loss, model, *make_batch(rng, 4))
    state = chainer.serializers.npz.serialize(own)
    weights = chainer.serializers.npz.serialize(model)
    # The process that resumes.
    model = make_model(use_gamma=True, lazy=True)
    optimizer = distributed.create_multi_node_optimizer(
        chainer.optimizers.Adam(1e-3), comm).setup(model)
    for x, npz in (model, weights), (optimizer, state):
        chainer.serializers.NpzDeserializer(npz).load(x)
    for _ in range(20):
        optimizer.update(loss, model, *make_batch(rng, 4))
        distributed.assert_synchronized(comm, model)
    return {'t': comm.gather_obj(model[0].W.update_rule.t)}


def differ(comm, args):
    """assert_synchronized, where something is wrong."""
    np.random.seed(0)
    model = make_model()
    distributed.assert_synchronized(comm, model)
    messages = []
    for change in change_u, change_structure:
        if comm.rank == comm.size - 1:
            change(model)
        try:
            distributed.assert_synchronized(comm, model)
        except errors.NotSynchronizedError as e:
            messages.append(str(e))
    try:
        distributed.create_multi_node_optimizer(
            chainer.optimizers.SGD(), comm, double_buffering=True)
    except ValueError as e:     # of ChainerMN
        messages.append(str(e))
    return {'messages': comm.gather_obj(messages)}


def change_u(model):
    model[2].W_u[3] = np.nextafter(model[2].W_u[3], 2, dtype='f')


def change_structure(model):
    model[0].add_param('extra', (1,), initializer=0)


def iterate(comm, args):
    """create_multi_node_iterator: the same batches on all ranks."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # "is experimental"
        iterator = chainermn.iterators.create_multi_node_iterator(
            chainer.iterators.SerialIterator(
                np.arange(10, dtype='f'), 4, shuffle=True), comm)
        batches = [list(map(float, iterator.next())) for _ in range(5)]
    return {'batches': comm.gather_obj(batches)}


def to_cpu(link):
    link = copy.deepcopy(link)
    link.to_device('@numpy')
    return link


def device(comm, args):
    """A communicator for GPUs, on one of them."""
    device = chainer.get_device(args.device)
    device.use()
    model = make_model(use_gamma=True)
    model.to_device(device)
    optimizer = distributed.create_multi_node_optimizer(
        chainer.optimizers.Adam(1e-3), comm).setup(model)
    rng = np.random.RandomState(comm.rank)
    distributed.bcast_data(comm, model)
    for _ in range(10):
        optimizer.update(
            loss, model, *map(device.send, make_batch(rng, 8)))
        distributed.assert_synchronized(comm, model)
    return {'norms': [sigma(to_cpu(link)) for link in (
        model[i] for i in LAYERS)], 't': optimizer.t}


def die(args):
    """The example, in which one rank raises in the third iteration."""
    sys.path.insert(0, os.path.join(
        os.path.dirname(__file__), '..', '..', 'examples'))
    import train_sngan_digits as example
    update = example.SNGANUpdater.update_core

    def update_core(self):
        if self.get_optimizer('dis').communicator.rank == 1 and (
                self.iteration == 2):
            print(f'raised at {time.time()}', flush=True)
            raise ArithmeticError('rank 1 is done for')
        update(self)

    example.SNGANUpdater.update_core = update_core
    sys.exit(example.main([
        '--communicator', 'naive', '--out', args.out, '-i', '1000']))


PROGRAMS = {f.__name__: f for f in (
    steps, halves, persistents, train, checkpoints, different_snapshots,
    differ, iterate, device)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('program', choices=[*PROGRAMS, 'die'])
    parser.add_argument('--hook', choices=HOOKS, default='sn_function')
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--out')
    parser.add_argument('--lazy', action='store_true')
    parser.add_argument('--communicator', default='naive')
    parser.add_argument('--device', default='@numpy')
    parser.add_argument('--replicas', type=json.loads, default=[])
    args = parser.parse_args()
    if args.program == 'die':
        die(args)
    if args.device == '@numpy':     # CuPy warns of missing libraries
        warnings.simplefilter('error')
    chainermn.global_except_hook.add_hook()
    comm = chainermn.create_communicator(args.communicator)
    begin = time.monotonic()
    found = PROGRAMS[args.program](comm, args)
    if comm.rank == 0:
        print(json.dumps({'seconds': time.monotonic() - begin, **found}),
              flush=True)


if __name__ == '__main__':
    main()
