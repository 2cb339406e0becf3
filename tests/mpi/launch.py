"""Starts ``mpiexec``, in a container as root as well as for a user.

Nothing hangs: a run that takes too long is ended, with all its ranks.
"""
from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SECONDS = 120

# Open MPI refuses root without the first two, and more ranks than cores
# without the next two, in the names of version 5.  One thread a rank, as cores
# are shared.  Messages stay on this machine.
ENVIRONMENT = {
    'OMPI_ALLOW_RUN_AS_ROOT': '1',
    'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM': '1',
    'PRTE_MCA_rmaps_default_mapping_policy': ':oversubscribe',
    'PRTE_MCA_hwloc_default_binding_policy': 'none',
    'OMPI_MCA_mpi_yield_when_idle': '1',
    'OMPI_MCA_btl': 'self,sm',
    'OPENBLAS_NUM_THREADS': '1',
    'OMP_NUM_THREADS': '1',
    'MPLBACKEND': 'Agg',
}


class Done(NamedTuple):
    code: int
    text: str
    seconds: float


def find() -> str:
    """Returns the mpiexec beside this interpreter, as PyPI has it."""
    here = os.path.dirname(sys.executable)
    path = shutil.which('mpiexec', path=os.pathsep.join(
        [here, os.environ.get('PATH', '')]))
    if path is None:
        raise FileNotFoundError(
            'There is no mpiexec. Install one: pip install ".[mpi]"')
    return path


def start(size: int, *args: object, cwd: object = ROOT) -> subprocess.Popen:
    """Starts ``python *args`` on ``size`` ranks."""
    path = os.pathsep.join(filter(None, [
        str(ROOT), os.environ.get('PYTHONPATH', '')]))
    return subprocess.Popen(
        [find(), '-n', str(size), sys.executable, *map(str, args)],
        cwd=str(cwd), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, **ENVIRONMENT, 'PYTHONPATH': path})


def wait(process: subprocess.Popen, seconds: float = SECONDS) -> Done:
    """Waits until a run ends, or ends it."""
    begin = time.monotonic()
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()     # mpiexec ends its ranks
        try:
            text, _ = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
        raise TimeoutError(
            f'mpiexec took more than {seconds} seconds:\n{text}') from None
    return Done(process.returncode, text, time.monotonic() - begin)


def run(size: int, *args: object, **kwargs: object) -> Done:
    return wait(start(size, *args, **kwargs))
