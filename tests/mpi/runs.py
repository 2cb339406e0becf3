"""ChainerMN under MPI, on 2 to 4 ranks of the CPU: ``make test-mpi``.

Pytest collects this file only if it is named, as it needs mpi4py and mpiexec.
"""
import json
import os
import pathlib
import re
import signal
import time

import numpy as np
import pytest

from tests.mpi import launch

EXAMPLE = launch.ROOT / 'examples' / 'train_sngan_digits.py'
SHORT = ['--communicator', 'naive', '--display-interval', '2',
         '--snapshot-interval', '3']
# Seconds, most of them for imports, on cores that are shared.
SOON = 15


def program(size, name, *args):
    """The results of a program of tests/mpi/programs.py."""
    done = launch.run(size, '-m', 'tests.mpi.programs', name, *args)
    assert done.code == 0, done.text
    return json.loads(next(
        line for line in done.text.splitlines() if line.startswith('{')))


class TestSteps:

    @pytest.mark.parametrize('size', [2, 4])
    def test_u_and_W_are_identical_in_each_of_200_steps(self, size):
        found = program(size, 'steps')
        assert found['steps'] == found['same'] == found['same_W'] == 200

    @pytest.mark.parametrize('size', [2, 4])
    def test_those_of_chainers_hook_are_not(self, size):
        found = program(size, 'steps', '--hook', 'chainer')
        assert found['same_W'] == found['steps'] == 200
        assert found['same'] == 0
        # Degrees between the vectors of two ranks, for the worst layer.
        assert min(found['angle']) > 10
        angle, sigma = found['angle'], found['sigma']
        for i in 0, 9, 99, 199:
            print(f'{size} ranks, step {i + 1}: u {angle[i]:.0f} degrees, '
                  f'sigma {sigma[i]:.1e} apart')


def test_ranks_that_share_the_batch_follow_one_process(tmp_path):
    found = {}
    for size in 1, 2, 4:
        path = tmp_path / f'{size}.npz'
        program(size, 'halves', '--steps', '40', '--out', path)
        with np.load(path) as f:
            found[size] = dict(f)
    for key, expected in found[1].items():
        for size in 2, 4:
            np.testing.assert_allclose(
                found[size][key], expected, rtol=1e-4,
                atol=2e-5 * abs(expected).max(), err_msg=key)


@pytest.mark.parametrize('size', [2, 3, 4])
def test_allreduce_persistent_leaves_u_alone(size):
    found = program(size, 'persistents')
    assert found['kept'] == [True] * size
    assert found['mean'] == pytest.approx([(size - 1) / 2] * 3)


class TestResume:

    @pytest.mark.parametrize('replicas', ['[]', '[0]', '[0, 1]'])
    def test_multi_node_snapshot(self, tmp_path, replicas):
        def train(steps, out, *args):
            return program(2, 'train', '--steps', steps, '--replicas',
                           replicas, '--out', tmp_path / out, *args)

        expected = train('17', 'whole')
        train('10', 'resumed')
        actual = train('17', 'resumed', '--lazy')
        assert actual['digests'] == expected['digests']
        assert actual['t'] == expected['t'] == 16   # the first one was lost

    def test_multi_node_checkpointer(self, tmp_path):
        found = program(2, 'checkpoints', '--out', tmp_path)
        assert found['resumed'] == found['unbroken']

    def test_ranks_that_loaded_different_snapshots(self):
        # A rank asserts in each of 20 steps.  Rank 0 had made 3.
        found = program(3, 'different_snapshots')
        assert found['t'] == [3 + 19] * 3


def test_assert_synchronized():
    found = program(3, 'differ')['messages']
    assert found[0] == found[1] == found[2]
    one_bit, structure, double_buffering = found[0]
    # A Sequential numbers its links in its own order.
    assert '/3/W_u of rank 2. ' in one_bit
    assert '/0/extra of rank 2, /3/W_u of rank 2. ' in structure
    assert 'double buffering' in double_buffering


def test_multi_node_iterator():
    first, *others = program(3, 'iterate')['batches']
    assert len(first) == 5
    assert others == [first, first]


class TestExample:

    def run(self, *args):
        return launch.run(2, EXAMPLE, *SHORT, *args)

    def test_resumes_with_the_same_numbers(self, tmp_path):
        whole = self.run('-i', '5', '--out', tmp_path / 'whole')
        assert whole.code == 0, whole.text
        # Of rank 0 alone.
        assert whole.text.count('Ranks: 2') == 1
        assert len(re.findall(r'(?m)^\d+ +5 ', whole.text)) == 1
        assert whole.text.count('Pictures, scores') == 1
        assert '\033' not in whole.text
        resumed = self.run('-i', '5', '--out', tmp_path / 'resumed',
                           '--resume', tmp_path / 'whole' / 'snapshot_iter_3')
        assert resumed.code == 0, resumed.text
        for name in 'gen.npz', 'dis.npz':
            with np.load(tmp_path / 'whole' / name) as a, \
                    np.load(tmp_path / 'resumed' / name) as b:
                assert sorted(a.files) == sorted(b.files)
                for key in a.files:
                    np.testing.assert_array_equal(a[key], b[key], key)

    def test_rank_that_raises_ends_the_job(self, tmp_path):
        done = launch.run(
            2, '-m', 'tests.mpi.programs', 'die', '--out', tmp_path)
        assert done.code != 0
        assert 'ArithmeticError: rank 1 is done for' in done.text
        assert 'Uncaught exception on rank 1' in done.text
        raised_at = float(re.search(r'raised at ([\d.]+)', done.text)[1])
        assert time.time() - raised_at < SOON

    def test_rank_without_its_snapshot_ends_the_job(self, tmp_path):
        (tmp_path / 'x.0').write_bytes(b'not a snapshot')
        done = self.run('-i', '5', '--out', tmp_path / 'out',
                        '--resume', tmp_path / 'x')
        assert done.code != 0
        assert f'Cannot resume from {tmp_path}/x.' in done.text

    def test_batch_that_cannot_be_shared(self, tmp_path):
        done = self.run('-b', '7', '--out', tmp_path)
        assert done.code != 0
        assert '7 images cannot be shared out over 2 ranks' in done.text

    def test_killed_rank_ends_the_job(self, tmp_path):
        process = launch.start(
            2, EXAMPLE, *SHORT, '--out', tmp_path, '-i', '100000')
        try:
            victim = self.wait_for_ranks(process, tmp_path)[1]
            begin = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            done = launch.wait(process, 60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert done.code != 0
        assert time.monotonic() - begin < SOON
        assert 'signal 9' in done.text

    def wait_for_ranks(self, process, out):
        """Process ids of the ranks, once they train."""
        end = time.monotonic() + launch.SECONDS
        while not list(out.glob('snapshot_iter_*.1')):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < end
            time.sleep(.2)
        children = pathlib.Path(
            f'/proc/{process.pid}/task/{process.pid}/children')
        return [int(pid) for pid in children.read_text().split()
                if EXAMPLE.name in pathlib.Path(
                    f'/proc/{pid}/cmdline').read_text()]


def test_program_for_devices_on_the_cpu():
    found = program(2, 'device')
    assert found['t'] == 10
    assert np.isfinite(found['norms']).all()


@pytest.mark.cuda
@pytest.mark.parametrize('communicator', ['pure_nccl', 'non_cuda_aware'])
def test_communicators_for_devices(communicator):
    found = program(1, 'device', '--communicator', communicator,
                    '--device', '@cupy:0')
    assert found['t'] == 10
    assert np.isfinite(found['norms']).all()


def test_script_of_the_documentation(tmp_path):
    script = launch.ROOT / 'tests' / 'mpi' / 'script.py'
    for _ in range(2):      # the second run resumes from a snapshot
        done = launch.run(2, '-W', 'error', script, cwd=tmp_path)
        assert done.code == 0, done.text
    assert {path.name for path in (tmp_path / 'result').iterdir()} == {
        'snapshot_iter_10.0', 'snapshot_iter_10.1', 'snapshot_iter_20.0',
        'snapshot_iter_20.1'}


def test_program_that_knows_nothing_of_this_package(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('''
import sys
import chainermn
from chainer.link_hooks import SpectralNormalization as Hook
comm = chainermn.create_communicator('naive')
applied = sys.modules['sn_function._compat.chainermn'].applied
found = comm.gather_obj((Hook.__module__, 'allreduce_persistent' in applied))
if comm.rank == 0:
    print('found', found)
''')
    done = launch.run(2, '-m', 'sn_function', 'run', '--hook', script)
    assert done.code == 0, done.text
    assert f"found {[('sn_function.link_hooks', True)] * 2}" in done.text
