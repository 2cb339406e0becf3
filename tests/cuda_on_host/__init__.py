"""Runs the source of CUDA kernels on the host.

Kernels of CuPy are compiled as C++, and each thread of theirs is a fiber.
"""

from .compiler import CompileError, available, races
from .elementwise import ElementwiseKernel, elementwise, empty, set_empty
from .raw import (
    KernelFault,
    RawKernel,
    counts,
    raw,
    schedule,
    set_array_type,
    set_schedule,
)
from .reduction import (
    ReductionKernel,
    block_size,
    reduce,
    set_block_size,
)

__all__ = [
    'CompileError', 'ElementwiseKernel', 'KernelFault', 'RawKernel',
    'ReductionKernel', 'available', 'block_size', 'counts', 'elementwise',
    'empty', 'races', 'raw', 'reduce', 'schedule', 'set_array_type',
    'set_block_size', 'set_empty', 'set_schedule',
]
