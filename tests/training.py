"""A small classifier of real digits, to be trained, stopped and resumed.

``python -m tests.training JOB`` trains in a separate process, which may be
killed, and whose workers may be spawned.  A spawned worker imports the main
module before it unpickles anything, so the next line also takes effect there.
"""
import sn_function  # isort: skip  # before chainer, which it repairs

import functools
import json
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
import zlib

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import training
from chainer.serializers import DictionarySerializer
from chainer.training import extensions

BATCHSIZE = 30
N_EXAMPLES = 300  # 10 iterations an epoch


@functools.lru_cache(maxsize=None)
def digits():
    """Images (N, 1, 8, 8), float32 in [-1, 1], and labels (N,), int32."""
    from sklearn.datasets import load_digits  # slow; not for workers
    images, labels = load_digits(return_X_y=True)
    return ((images[:N_EXAMPLES] / 8 - 1).reshape(-1, 1, 8, 8).astype('f'),
            labels[:N_EXAMPLES].astype('i'))


class Digits(chainer.dataset.DatasetMixin):

    def __init__(self, images, labels):
        self.images = images
        self.labels = labels

    def __len__(self):
        return len(self.images)

    def get_example(self, i):
        return self.images[i], self.labels[i]


def next_order(order, position):
    """Shuffles by the order so far alone, which snapshots hold."""
    seed = zlib.crc32(order.astype(np.int64).tobytes())
    return np.random.RandomState(seed).permutation(len(order))


class Classifier(chainer.Chain):
    """A convolution and two linear layers, each with the hook.

    Args:
        lazy (bool): Leave the input sizes to the first call.
        make_hook (callable or None): Returns the hook, given ``settings``.

    """

    def __init__(self, lazy=False, make_hook=sn_function.SpectralNormalization,
                 **settings):
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(
                None if lazy else 1, 8, 4, stride=2, pad=1)
            self.hidden = L.Linear(None if lazy else 128, 20)
            self.out = L.Linear(None if lazy else 20, 10)
        if make_hook is not None:
            for link in self.children():
                link.add_hook(make_hook(**settings))

    def logits(self, x):
        h = F.leaky_relu(self.conv(x))
        # With a norm of 1 for each layer the logits would be too small.
        return 8 * self.out(F.leaky_relu(self.hidden(h)))

    def forward(self, x, t):
        y = self.logits(x)
        loss = F.softmax_cross_entropy(y, t)
        chainer.report({'loss': loss, 'accuracy': F.accuracy(y, t)}, self)
        return loss


def momentum():
    return chainer.optimizers.MomentumSGD(0.05)


def make_trainer(out='result', iterations=20, *, model=None, optimizer=None,
                 data=None, iterator=None, loss_func=None, seed=0, dtype='f',
                 **settings):
    """Returns a trainer of a :class:`Classifier` with these settings."""
    if model is None:
        np.random.seed(seed)
        with chainer.using_config('dtype', dtype):
            model = Classifier(**settings)
    if data is None:
        images, labels = digits()
        data = Digits(images.astype(dtype), labels)
    if iterator is None:
        iterator = chainer.iterators.SerialIterator(
            data, BATCHSIZE, order_sampler=next_order)
    optimizer = optimizer or momentum()
    if optimizer.target is None:
        optimizer.setup(model)
    updater = training.updaters.StandardUpdater(
        iterator, optimizer, loss_func=loss_func)
    trainer = training.Trainer(updater, (iterations, 'iteration'), out=out)
    trainer.extend(extensions.LogReport(trigger=(5, 'iteration')))
    return trainer


def model_of(trainer):
    return trainer.updater.get_optimizer('main').target


def run(trainer):
    trainer.run(show_loop_exception_msg=False)
    return trainer


def vectors(model):
    """The vectors of each link, by name."""
    return {f'{path}/{name}': getattr(link, name)
            for path, link in model.namedlinks()
            for name in ('W_u', 'W_us') if hasattr(link, name)}


def state(trainer):
    """All numbers of a run: what an updater saves, u, and the log."""
    optimizer = trainer.updater.get_optimizer('main')
    serializer = DictionarySerializer()
    optimizer.serialize(serializer['optimizer'])
    optimizer.target.serialize(serializer['model'])
    numbers = dict(serializer.target)
    # Not from the serializer, which may have lost them.
    numbers.update(vectors(optimizer.target))
    numbers['iteration'] = trainer.updater.iteration
    numbers['epoch'] = trainer.updater.epoch_detail
    numbers['log'] = log(trainer)
    return {key: np.array(value, copy=True)
            for key, value in numbers.items()}


def log(trainer):
    """What LogReport recorded, without the time."""
    return [
        {key: value for key, value in entry.items() if key != 'elapsed_time'}
        for entry in trainer.get_extension('LogReport').log]


def assert_same(actual, expected):
    """Bit by bit, for the states of two runs."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        np.testing.assert_array_equal(actual[key], value, err_msg=key)


class MixedPrecisionState(training.Extension):
    """Keeps in snapshots what Chainer's optimizers leave out of them."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __call__(self, trainer):
        pass

    def serialize(self, serializer):
        optimizer = self.optimizer
        for name in ('_loss_scale', '_loss_scaling_isnan_ever'):
            value = getattr(optimizer, name)
            setattr(optimizer, name, type(value)(serializer(name, value)))
        for name, param in optimizer.target.namedparams():
            rule = param.update_rule
            weight = rule._fp32_param  # None until the first update
            array = serializer[name](
                'fp32', None if weight is None else weight.array)
            if array is not None:
                rule._fp32_param = chainer.Parameter(array)


# In a separate process

def save_half_and_die(path, target):
    """Like a process that is killed while it writes a snapshot."""
    with open(path, 'wb') as file:
        file.write(b'PK\3\4')
        file.flush()
        die()


def die(trainer=None):
    """No handler runs, nothing is flushed or closed."""
    os.kill(os.getpid(), signal.SIGKILL)


def at(iteration):
    """A trigger that is not in snapshots."""
    return lambda trainer: trainer.updater.iteration == iteration


def take_snapshots(trainer, every=5, **kwargs):
    trainer.extend(extensions.snapshot(**kwargs), trigger=(every, 'iteration'))


def flatten(model, attribute):
    """One vector, as ``gather_grads`` and ``gather_params`` of Chainer do."""
    return np.concatenate([
        getattr(param, attribute).ravel()
        for _, param in sorted(model.namedparams())])


def unflatten(model, attribute, vector):
    """As ``scatter_grads`` and ``scatter_params`` do."""
    for _, param in sorted(model.namedparams()):
        part, vector = np.split(vector, [param.size])
        setattr(param, attribute, part.reshape(param.shape))


def gradients(model, batch):
    loss = model(*batch)
    model.cleargrads()
    loss.backward()
    return flatten(model, 'grad')


def replica(connection, model, batches):
    """A worker of MultiprocessParallelUpdater, with a pipe instead of NCCL."""
    for batch in batches:
        connection.send(gradients(model, batch))
        unflatten(model, 'array', connection.recv())
    connection.send(vectors(model))


def train_with_replica(model, batches):
    """Half of each batch here, half in a process with a pickled copy.

    Returns:
        The vectors u of the other process.

    """
    optimizer = chainer.optimizers.SGD(0.05).setup(model)
    halves = [[tuple(array[i::2] for array in batch) for batch in batches]
              for i in range(2)]
    connection, other = multiprocessing.Pipe()
    process = multiprocessing.Process(
        target=replica, args=(other, model, halves[1]))
    process.start()
    other.close()  # so that the pipe ends with the process
    for batch in halves[0]:
        unflatten(model, 'grad',
                  (gradients(model, batch) + connection.recv()) / 2)
        optimizer.update()
        connection.send(flatten(model, 'array'))
    us = connection.recv()
    process.join()
    return us


def main(job):
    """Trains as the dictionary ``job`` says."""
    data = Digits(**np.load(job['data']))
    result = {}
    if 'start_method' in job:
        multiprocessing.set_start_method(job['start_method'])
        trainers = [
            make_trainer(
                job['out'], iterations, data=data, seed=seed,
                iterator=chainer.iterators.MultiprocessIterator(
                    data, BATCHSIZE, n_processes=2, order_sampler=next_order))
            for iterations, seed in ((10, 0), (20, 1))]
        np.random.seed(0)
        model = Classifier(use_gamma=True)
        batches = [(data.images[i:i + 20], data.labels[i:i + 20])
                   for i in range(0, 100, 20)]
        result['replica'] = train_with_replica(model, batches)
        result['vectors'] = vectors(model)
        result['array'] = flatten(model, 'array')
    else:
        trainer = make_trainer(job['out'], data=data, **job['settings'])
        trainers = [trainer]
        if 'die_at' in job:
            trainer.extend(die, trigger=at(job['die_at']))
        if 'die_while_writing' in job:
            trainer.extend(extensions.snapshot(save_half_and_die),
                           name='die', trigger=at(job['die_while_writing']))
    for trainer in trainers:
        take_snapshots(trainer, autoload=True)
        with warnings.catch_warnings():
            # Thread.setDaemon: chainer/iterators/multiprocess_iterator.py.
            warnings.filterwarnings(
                'ignore', r'setDaemon\(\)', DeprecationWarning)
            run(trainer)
    result['state'] = state(trainer)
    with open(os.path.join(job['out'], 'result.pickle'), 'wb') as file:
        pickle.dump(result, file)


if __name__ == '__main__':
    main(json.loads(sys.argv[1]))
