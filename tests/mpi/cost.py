"""What spectral normalization costs on more ranks.

``python -m tests.mpi.cost`` starts 1, 2 and 4 ranks and prints the table of
docs/distributed.rst: the bytes that a rank gives to MPI, and the time that the
hook adds to a step.
"""
from __future__ import annotations

import json
import os
import pickle
import statistics
import sys
import time

from tests.mpi import launch

SIZES = 1, 2, 4
MANY = 1024
STEPS, BATCH = 60, 16


class Counting:
    """A communicator of mpi4py that counts the bytes of its messages."""

    def __init__(self, comm):
        self._comm, self.bytes = comm, 0

    def __getattr__(self, name):
        method = getattr(self._comm, name)
        if name not in ('bcast', 'gather', 'Bcast', 'Allreduce'):
            return method

        def counting(*args, **kwargs):
            is_sent = name != 'bcast' or self._comm.rank == 0
            for x in args[:2] if is_sent else ():
                self.bytes += getattr(x, 'nbytes', None) or (
                    len(pickle.dumps(x, pickle.HIGHEST_PROTOCOL))
                    if name.islower() else len(x) if isinstance(
                        x, (bytes, bytearray)) else 0)
            return method(*args, **kwargs)

        return counting


def measure():
    """Makes the same steps with the hook and without, on each rank."""
    import sn_function  # isort: skip  # before chainer, which it repairs
    sys.path.insert(0, str(launch.ROOT / 'examples'))
    import chainer
    import chainermn
    import numpy as np
    import sngan_models

    from sn_function import distributed

    chainermn.global_except_hook.add_hook()
    comm = chainermn.create_communicator('naive')
    comm.mpi_comm = counter = Counting(comm.mpi_comm)
    rng = np.random.RandomState(comm.rank)
    x = rng.uniform(-1, 1, (BATCH, 1, 8, 8)).astype('f')
    t = rng.randint(10, size=BATCH).astype('i')
    runs = {}
    for name, create in (
            ('plain', chainermn.create_multi_node_optimizer),
            ('hook', distributed.create_multi_node_optimizer)):
        model = sngan_models.Discriminator((1, 8, 8))
        if name == 'hook':
            model.add_hook(sn_function.ChainSpectralNormalization())
        runs[name] = model, create(
            chainer.optimizers.Adam(), comm).setup(model)
    start, step, seconds = {}, {}, {name: [] for name in runs}
    for i in range(STEPS):
        for name, (model, optimizer) in runs.items():
            # Nothing is sent here, so no rank waits for another.
            begin = time.thread_time()
            loss = sngan_models.loss_gen(model(x, t))
            model.cleargrads()
            loss.backward()
            seconds[name].append(time.thread_time() - begin)
            counter.bytes = 0
            optimizer.update()
            (step if i else start)[name] = counter.bytes
    vectors = sum(link.W_u.nbytes for link in runs['hook'][0].links()
                  if hasattr(link, 'W_u'))
    found = comm.gather_obj({
        'start': start['hook'] - start['plain'],
        'step': step['hook'] - step['plain'], 'gradients': step['plain'],
        'ms': 1e3 * (statistics.median(seconds['hook'])
                     - statistics.median(seconds['plain'])),
        'vectors': vectors})
    if comm.rank == 0:
        print(json.dumps(found), flush=True)


def main():
    print(f'{os.cpu_count()} cores, Python {sys.version.split()[0]}\n')
    print('| ranks | gradients, a step | normalization, a step | u, at the '
          'start | all of the start | CPU time added to a step |')
    print('| ---: | ---: | ---: | ---: | ---: | ---: |')
    for size in SIZES:
        done = launch.run(size, '-m', 'tests.mpi.cost', 'rank')
        assert done.code == 0, done.text
        ranks = json.loads(next(line for line in done.text.splitlines()
                                if line.startswith('[{')))
        ms = statistics.median(rank['ms'] for rank in ranks)
        print(f'| {size} | {ranks[0]["gradients"]:,} B | '
              f'{max(abs(rank["step"]) for rank in ranks)} B | '
              f'{ranks[0]["vectors"]:,} B | {ranks[0]["start"]:,} B | '
              f'{ms:.2f} ms |')


if __name__ == '__main__':
    measure() if sys.argv[1:] == ['rank'] else main()
