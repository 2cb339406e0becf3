"""The repairs of ChainerMN.  Its communicators run in tests/mpi."""
import importlib
import os
import pathlib
import subprocess
import sys
import textwrap
import types

import sn_function  # isort: skip  # before chainer, which it repairs

import chainer
import numpy as np
import pytest
from chainer.backends import cuda

from sn_function import _compat
from sn_function._compat import chainermn as repaired
from tests.compat.test_compat import OLD_STACK, run
from tests.tools import nvrtc

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMUNICATORS = 'chainermn.communicators'
MEMORY = f'{COMMUNICATORS}._memory_utility'


@pytest.fixture(autouse=True)
def _chainermn_of_its_own(monkeypatch):
    """A ChainerMN that is imported anew, with an mpi4py that does nothing.

    That of MPI would be started in this process, and never ended.
    """
    for name in [*sys.modules]:
        if name.split('.')[0] in ('chainermn', 'mpi4py'):
            monkeypatch.delitem(sys.modules, name)
    mpi = types.ModuleType('mpi4py.MPI')
    mpi.FLOAT = None
    package = types.ModuleType('mpi4py')
    package.MPI = mpi
    monkeypatch.setitem(sys.modules, 'mpi4py', package)
    monkeypatch.setitem(sys.modules, 'mpi4py.MPI', mpi)
    monkeypatch.setattr(sys, 'meta_path', [
        each for each in sys.meta_path
        if not isinstance(each, _compat._ChainerMNFinder)])
    monkeypatch.setattr(repaired, 'applied', [])
    yield
    for name in [*sys.modules]:
        if name.split('.')[0] == 'chainermn':
            del sys.modules[name]


def repair(name):
    each, = [each for each in repaired.REPAIRS if each.name == name]
    return each


# Which stacks are broken, as a trial of the test's own finds.

def refuses(f, *args, **kwargs):
    try:
        f(*args, **kwargs)
    except (TypeError, ValueError):
        return True
    return False


@pytest.mark.filterwarnings('ignore')
class TestRepairs:

    def test_what_is_broken_is_repaired_when_it_is_imported(self):
        _compat.install()
        assert not repaired.applied
        importlib.import_module('chainermn')
        expected = ['allreduce_persistent']
        if refuses(int, np.ones(1)):
            expected.append('multi_node_iterator')
        assert repaired.applied == expected
        importlib.import_module(MEMORY)
        if refuses(np.array, np.ones(1, 'e'), copy=False, dtype='f'):
            expected.append('unpack_params')
        if 'batched_copy' in repaired.applied:
            expected.append('batched_copy')     # of a CuPy that is here
        assert repaired.applied == expected
        for each in repaired.REPAIRS:
            each.attempt()
            assert not each.is_needed()

    def test_what_is_imported_already_is_repaired_at_once(self):
        chainermn = importlib.import_module('chainermn')
        assert not repaired.applied
        _compat.install()
        assert 'allreduce_persistent' in repaired.applied
        assert chainermn is sys.modules['chainermn']

    def test_every_name_is_explained(self):
        for each in repaired.REPAIRS:
            fault, needed = _compat.explain(each.name)
            assert 'ChainerMN' in fault
            assert needed.startswith('with ')

    def test_a_chainermn_without_the_fault_is_left_alone(self):
        importlib.import_module('chainermn')
        module = sys.modules['chainermn.extensions.allreduce_persistent']
        module._namedpersistents = lambda model: iter(())
        before = module._namedpersistents
        repaired.repair('chainermn')
        assert module._namedpersistents is before
        assert 'allreduce_persistent' not in repaired.applied


def test_chainermn_is_not_imported_without_need():
    done = subprocess.run(
        [sys.executable, '-W', 'error', '-c', textwrap.dedent('''
            import sys, types
            import sn_function, sn_function.distributed
            assert 'chainermn' not in sys.modules
            assert 'mpi4py' not in sys.modules
        ''')], capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr


class TestMultiNodeIterator:

    @pytest.mark.filterwarnings('ignore')   # NumPy 1.25 to 2.3 only warn
    def test_slave_takes_its_size_from_an_array(self):
        importlib.import_module('chainermn')
        repaired.repair('chainermn')
        module = sys.modules['chainermn.iterators.multi_node_iterator']
        answers = [np.array([7.], 'f'), np.array([2., 0., 1.], 'f'),
                   np.array([0, 1, 0, 1, 5], 'f'), np.array([4., 6.], 'f')]
        comm = types.SimpleNamespace(bcast=lambda x, root: answers.pop(0))
        slave = module._MultiNodeIteratorSlave(comm, 0)
        assert slave.dataset_size == 7
        assert isinstance(slave.dataset_size, int)
        assert slave.next() == [4., 6.]
        assert slave.current_position == 5


class TestAllreducePersistent:

    @pytest.mark.parametrize('hook', ['sn_function', 'chainer'])
    @pytest.mark.parametrize('is_called', [False, True])
    def test_leaves_vectors_out(self, hook, is_called):
        chainermn = importlib.import_module('chainermn')
        repaired.repair('chainermn')
        kind = {'sn_function': sn_function.SpectralNormalization,
                'chainer': chainer.link_hooks.SpectralNormalization}[hook]
        model = chainer.Chain(
            l0=chainer.links.Linear(3, 2).add_hook(kind()),
            l1=chainer.links.Linear(3, 2), bn=chainer.links.
            BatchNormalization(2))
        model.l1.add_persistent('W_u', np.ones(2, 'f'))  # of somebody else
        if is_called:
            model.l0(np.ones((1, 3), 'f'))
        seen = []
        comm = types.SimpleNamespace(
            _multi_node_mean=lambda _, x: seen.append(id(x)))
        chainermn.extensions.AllreducePersistent(model, comm)()
        assert sorted(seen) == sorted(map(id, (
            model.l1.W_u, model.bn.avg_mean, model.bn.avg_var)))


MPI = '''
import types
mpi4py = module('mpi4py', MPI=module('mpi4py.MPI', FLOAT=None))
'''


@pytest.mark.parametrize('imports', [
    'sn_function, chainer, chainermn',
    *[pytest.param(text, marks=pytest.mark.slow) for text in (
        'sn_function.link_hooks, chainermn',
        'chainermn, sn_function',
        'chainermn, sn_function.link_hooks',
        'chainer, sn_function, chainermn')]])
def test_vectors_are_left_out_in_any_order_of_imports(imports):
    run(OLD_STACK, MPI, f'''
        import {imports}
        import chainer.link_hooks
        link = chainer.links.Linear(2, 2).add_hook(
            chainer.link_hooks.SpectralNormalization())
        link(numpy.zeros((1, 2), 'f'))
        assert hasattr(link, 'W_u')
        comm = types.SimpleNamespace(_multi_node_mean=None)
        chainermn.extensions.AllreducePersistent(link, comm)()
    ''')


class Buffer:
    """Memory that numbers of any type are copied to and from."""

    def __init__(self, values):
        self.bytes = values.tobytes()

    def to_device(self, x, size, offset, stream):
        assert x.nbytes == size
        x[...] = np.frombuffer(
            self.bytes[offset:offset + size], x.dtype).reshape(x.shape)


@pytest.mark.parametrize('attribute', ['data', 'grad'])
@pytest.mark.parametrize('sent', ['e', 'f', 'd'])
def test_unpack_params(sent, attribute):
    module = importlib.import_module(MEMORY)
    repaired.repair(MEMORY)
    params = [chainer.Parameter(np.zeros(shape, dtype)) for shape, dtype in (
        ((2, 3), 'e'), ((), 'f'), ((4,), 'd'), ((1, 2), 'f'))]
    for param in params:
        param.grad = np.zeros_like(param.array)
    params[-1].cleargrad()      # zero_fill
    values = np.random.uniform(-2, 2, 13).astype(sent)
    buffer = Buffer(values)
    module.unpack_params(
        params, attribute, buffer, np.dtype(sent), attribute == 'grad')
    begin = 0
    for param in params:
        x = getattr(param, attribute)
        expected = values[begin:begin + x.size].astype(x.dtype)
        np.testing.assert_array_equal(x, expected.reshape(x.shape))
        begin += x.size


IDS = {'e': 6, 'f': 7, 'd': 8}      # of NCCL


@pytest.mark.gpu
@pytest.mark.parametrize('sent', ['e', 'f', 'd'])
def test_kernels_that_gather_and_spread(sent):
    module = importlib.import_module(MEMORY)
    if repair('batched_copy').is_needed() or module.cp is None:
        repaired._repair_half()     # on the host the header is CuPy 14's
    xp = cuda.cupy
    arrays = [xp.array(np.random.uniform(-3, 3, n).astype(dtype))
              for n, dtype in ((3, 'e'), (130, 'f'), (1, 'd'), (5, 'f'))]
    sizes = np.cumsum([0, *(x.size for x in arrays)], dtype='i')
    n = int(sizes[-1])
    pointers = xp.array(np.array([x.data.ptr for x in arrays], np.uint64))
    dtypes = xp.array(np.array([IDS[x.dtype.char] for x in arrays], 'i'))
    others = (np.int32(n), pointers, dtypes, xp.array(sizes),
              np.int32(len(arrays)))
    grid = ((n + 127) // 128,), (128,)
    buffer = xp.zeros(n, sent)
    module._cupy_batched_pack_params()(
        *grid, (buffer, np.int32(IDS[sent]), *others))
    before = [cuda.to_cpu(x) for x in arrays]
    np.testing.assert_array_equal(
        cuda.to_cpu(buffer),
        np.concatenate([x.astype(sent) for x in before]))
    for x in arrays:
        x.fill(0)
    module._cupy_batched_unpack_params()(
        *grid, (buffer, np.int32(IDS[sent]), *others))
    for x, y in zip(arrays, before):
        np.testing.assert_array_equal(
            cuda.to_cpu(x), y.astype(sent).astype(y.dtype))


@pytest.mark.parametrize('arch', nvrtc.ARCHS)
@pytest.mark.parametrize('kernel', repaired._KERNELS)
def test_kernels_compile(kernel, arch, monkeypatch):
    try:
        cupy = nvrtc.load()
    except nvrtc.Unavailable as e:
        reason, *_ = str(e).splitlines()
        pytest.skip(f'{reason}: pip install ".[nvrtc]"')
    module = importlib.import_module(MEMORY)
    repaired.repair(MEMORY)
    monkeypatch.setattr(cuda, 'raw', lambda code, name: code)
    code = getattr(module, kernel)()
    with nvrtc._without_device():
        made = cupy.core.compile_with_cache(
            code, (), arch=arch[len('sm_'):], prepend_cupy_headers=False)
    assert made.cubin.startswith(b'\x7fELF')
