import sn_function.distributed  # before chainer

# isort: split
import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np
from chainer.training import extensions

chainermn.global_except_hook.add_hook()     # see "A rank that dies"
comm = chainermn.create_communicator('naive')
model = L.Classifier(chainer.Sequential(
    L.Linear(None, 32).add_hook(sn_function.SpectralNormalization()),
    F.relu,
    L.Linear(32, 10).add_hook(sn_function.SpectralNormalization())))
optimizer = sn_function.distributed.create_multi_node_optimizer(
    chainer.optimizers.Adam(), comm).setup(model)

rng = np.random.RandomState(0)
dataset = chainer.datasets.TupleDataset(
    rng.normal(size=(64, 20)).astype('f'),
    rng.randint(10, size=64).astype('i'))
iterator = chainer.iterators.SerialIterator(
    chainermn.scatter_dataset(dataset, comm), 8)
trainer = chainer.training.Trainer(
    chainer.training.StandardUpdater(iterator, optimizer), (20, 'iteration'))

trainer.extend(
    lambda _: sn_function.distributed.assert_synchronized(comm, model),
    name='check', trigger=(5, 'iteration'))
snapshot = chainermn.extensions.multi_node_snapshot(
    comm, extensions.snapshot(autoload=True), list(range(comm.size)))
snapshot.priority = -100    # that of Chainer's snapshot: after the others
trainer.extend(snapshot, trigger=(10, 'iteration'))
trainer.run()
