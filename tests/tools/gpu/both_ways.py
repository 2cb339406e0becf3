"""The function by each of its ways on a device, for compute-sanitizer.

``python -m tests.tools.gpu.both_ways memcheck`` runs this under that tool.
"""
from __future__ import annotations

import os
import shutil
import sys
from typing import Any

from tests.tools.gpu.steps import NOT_HERE

# Each is normalized by kernels of one block, then by those of many.
SHAPES = (64, 3, 3, 3), (130, 70, 3, 3), (40, 24, 4, 4)
AXES = 0, 0, 1
PLACES = '/usr/local/cuda/bin', '/opt/cuda/bin'


def call_all(is_strict: bool = True) -> None:
    """Raises where a gradient is not finite."""
    import sn_function  # isort: skip  # before chainer, which it repairs
    import chainer
    import numpy as np
    from chainer.backends import cuda

    from sn_function._arithmetic import kernels

    if is_strict:
        # What is past the end of an array belongs to nobody, not to the pool.
        cuda.cupy.cuda.set_allocator(None)

    def make(shape: Any, dtype: str) -> Any:
        return cuda.to_gpu(np.random.normal(size=shape).astype(dtype))

    for size in (kernels.FUSED_SIZE, 0):
        kernels.FUSED_SIZE = size
        for dtype in 'fe':
            for detach_uv in (False, True):
                Ws = [chainer.Parameter(make(shape, dtype))
                      for shape in SHAPES]
                us = [make(shape[axis], dtype)
                      for shape, axis in zip(SHAPES, AXES)]
                Ys = sn_function.spectral_normalize_all(
                    Ws, us, axis=AXES, detach_uv=detach_uv)
                for Y in Ys:
                    Y.grad = make(Y.shape, dtype)
                chainer.backward(Ys)
                for W in Ws:
                    if not np.isfinite(cuda.to_cpu(W.grad)).all():
                        raise FloatingPointError(
                            f'{W.shape}, {dtype}, {detach_uv}, {size}')
    print('all gradients are finite')


def main() -> None:
    if len(sys.argv) == 1:
        call_all()
        return
    path = shutil.which('compute-sanitizer', path=os.pathsep.join(
        [os.environ.get('PATH', ''), *PLACES]))
    if path is None:
        print('compute-sanitizer is not installed')
        sys.exit(NOT_HERE)
    tool = sys.argv[1]
    # CuPy tries calls that may fail.
    options = ['--report-api-errors', 'no'] if tool == 'memcheck' else []
    os.execv(path, [path, '--tool', tool, '--error-exitcode', '9', *options,
                    sys.executable, '-m', 'tests.tools.gpu.both_ways'])


if __name__ == '__main__':
    main()
