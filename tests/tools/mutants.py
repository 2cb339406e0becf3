"""Can the host tests of the kernels fail?  ``python -m tests.tools.mutants``.

Every operator of every kernel, and of the functions that kernels share, is
replaced by another, one at a time, and the tests of
:mod:`tests.arithmetic.test_device` and of
:mod:`tests.arithmetic.test_device_subspace` are run until one fails.  A mutant
that no test notices is printed with its line; the exit status is the number of
those that are not listed, with the reason, in :data:`EQUIVALENT`, and of those
that are listed but do not exist.
"""
from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import importlib
import inspect
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings

import sn_function  # isort: skip  # before chainer, which it repairs
import numpy as np
import pytest

from sn_function._arithmetic import kernels
from tests import cuda_on_host
from tests.cuda_on_host import array, compiler

assert sn_function  # it is imported for what it does
RAW = importlib.import_module('tests.cuda_on_host.raw')  # also a function

REPLACEMENTS = {
    '+': '-', '-': '+', '*': '/', '/': '*', '%': '/', '<': '>=', '>': '<=',
    '<=': '>', '>=': '<', '==': '!=', '!=': '==', '&&': '||', '||': '&&',
    '+=': '-=', '-=': '+=', '*=': '/=', '/=': '*=', '!': '', '>>': '<<',
    '__syncthreads();': ';',
}
# What is no operator: comments, casts, templates, pointers, declarations,
# directives.
_SKIP = re.compile(r"""
    //[^\n]* | ^\#(?!define)[^\n]* | \w+_cast<(?:[^<>]|<[^<>]*>)*>
    | template\s*<[^>]*> | \w+<(?:\w+(?:<\w+>\(\))?(?:,\s)?)+>
    | (?<=[\w>])[*](?=[\s>,)]) | [*](?=\w) | operator\W+\( | "C" | ->
    """, re.X | re.M)
_OPERATOR = re.compile(
    r'__syncthreads\(\);|\+\+|--|&&|\|\||[-+*/<>=!]=|>>|[-+*/%<>!]')
# Seconds: of the processor for a launch, and of all for a test.  What does not
# end counts as noticed.
LAUNCH_TIMEOUT = 4
TIMEOUT = 120

# Why no result can depend on it: the parts, and changed lines.
_REASONS = {
    'what is past the end is skipped: it only takes time': {
        'grid': """
product_by_columns: const int n = columns.n_out * V, \
lane = threadIdx.x % lanes;
product_by_columns: const int tiles = (n + lanes + 1) / lanes;
product_by_columns: const int tiles = (n + lanes - 1) * lanes;
product_by_rows: const int tiles = (rows.n_out + height + 1) / height;
product_by_rows: const int tiles = (rows.n_out + height - 1) * height;
""",
        'subspace': """
product_of_all_by_columns: const int n = columns.n_out * V, \
lane = threadIdx.x % lanes;
product_of_all_by_columns: const int tiles = (n + lanes + 1) / lanes, \
by = blockDim.x / lanes;
product_of_all_by_columns: const int tiles = (n + lanes - 1) * lanes, \
by = blockDim.x / lanes;
product_of_all_by_rows: const int tiles = (rows.n_out + height + 1) / height;
product_of_all_by_rows: const int tiles = (rows.n_out + height - 1) * height;
""",
        'entries': """
correct: const int n_matrices = is_flat ? 1 : W.l, n = n_columns * V;
correct: const int strips = (n + blockDim.x + 1) / blockDim.x;
correct: const int strips = (n + blockDim.x - 1) * blockDim.x;
correct: const int chunks = (n_rows + chunk + 1) / chunk;
correct: const int chunks = (n_rows + chunk - 1) * chunk;
"""},
    'in parts of any length each entry is in one': {
        'sn_gram_subspace': """
const int chunk = (W.n() + blocks + 1) / blocks;
const int chunk = (W.n() + blocks - 1) * blocks;
""",
        'subspace': """
product_of_all_by_columns: const int chunk = (columns.n_in + task.parts + 1) \
/ task.parts;
product_of_all_by_columns: const int chunk = (columns.n_in + task.parts - 1) \
* task.parts;
product_of_all_by_rows: const int n = rows.n_in / V, \
chunk = (n + task.parts + 1) / task.parts;
product_of_all_by_rows: const int n = rows.n_in / V, \
chunk = (n + task.parts - 1) * task.parts;
""",
        'grid': """
product_by_columns: const int chunk = (columns.n_in + parts + 1) / parts;
product_by_columns: const int chunk = (columns.n_in + parts - 1) * parts;
product_by_rows: const int n = rows.n_in / V, chunk = (n + parts + 1) / parts;
product_by_rows: const int n = rows.n_in / V, chunk = (n + parts - 1) * parts;
"""},
    'both ways are right, and one is faster': {
        'entries': """
correct: if (strips <= 1) lanes = (lanes + 31) / 32 * 32;
""",
        'products': """
size: struct __align__(sizeof(X) * V > 16 ? 16 : sizeof(X) / V) Pack {
batch_of: return (sizeof(T) != 2 ? 16 : 64 / sizeof(T)) / V;
batch_of: return (sizeof(T) == 2 ? 16 : 64 * sizeof(T)) / V;
batch_of: return (sizeof(T) == 2 ? 16 : 64 / sizeof(T)) * V;
""",
        'block': """
product: const int N = 32 * sizeof(A);
product: while (width <= 32 && width / 2 >= columns.n_out) width /= 2;
product: while (width > 32 || width / 2 >= columns.n_out) width /= 2;
product: while (width > 32 && width * 2 >= columns.n_out) width /= 2;
product: while (width > 32 && width / 2 < columns.n_out) width /= 2;
""",
        'subspace': """
product_of_all: const int N = ROW_SIZE > 32 ? 32 / sizeof(A) : \
sizeof(A) == 4 ? 4 : 1;
product_of_all: const int N = ROW_SIZE <= 32 ? 32 * sizeof(A) : \
sizeof(A) == 4 ? 4 : 1;
product_of_all: const int N = ROW_SIZE <= 32 ? 32 / sizeof(A) : \
sizeof(A) != 4 ? 4 : 1;
product_of_all: while (width <= 32 && width / 2 >= columns.n_out) width /= 2;
product_of_all: while (width > 32 || width / 2 >= columns.n_out) width /= 2;
product_of_all: while (width > 32 && width * 2 >= columns.n_out) width /= 2;
product_of_all: while (width > 32 && width / 2 < columns.n_out) width /= 2;
gram: while (width >= SQUARES && width < static_cast<int>(blockDim.x)) \
width *= 2;
gram: while (width < SQUARES && width >= static_cast<int>(blockDim.x)) \
width *= 2;
product_of_all_by_rows: const int N = 32 / sizeof(T) / V > R ? \
32 / sizeof(T) / V * R : 1;
diagonalize: if (p / (EVEN + 1) == 0)
enum { B = N_VECTORS, EVEN = (B + 1) * 2 * 2 };
#define ROW_SIZE (B / sizeof(A))
#define ROW_UNIT (ROW_SIZE & (~ROW_SIZE - 1))
add_all: for (; is_apart && q + (N + 1) * by < end; q += N * by)
gram: while (width < SQUARES || width < static_cast<int>(blockDim.x)) \
width *= 2;
product_of_all_by_columns: enum { AT_ONCE = 64 * sizeof(A) };
product_of_all_by_columns: const int N = 32 * sizeof(T) / V;
product_of_all_by_columns: const int N = 32 / sizeof(T) * V;
product_of_all_by_columns: add_all<N, 1, V, false, sizeof(A) != 4>(
product_of_all_by_rows: const int N = 32 / sizeof(T) / V > R ? \
32 * sizeof(T) / V / R : 1;
product_of_all: } else if (narrow == 1 && is_wide) {
product_of_all_by_rows: const int N = 32 / sizeof(T) / V > R ? \
32 / sizeof(T) * V / R : 1;
"""},
    'any numbers that look random will do': {'subspace': """
some_number: i = (i - 1) * 2654435769u;
some_number: i = (i ^ i << 15) * 2246822519u;
some_number: i = (i ^ i >> 15) / 2246822519u;
some_number: i = (i ^ i << 13) * 3266489917u;
some_number: return static_cast<A>(static_cast<int>(i ^ i << 16)) / \
2147483648.0f;
"""},
    'with the opposite sign a vector is as good': {'subspace': """
combine: for (int k = 0; k < B; ++k) sum -= E[j * B + k] * row.x[k];
solve: sum -= C[j * EVEN + k] * small.E[k * B + p % B];
"""},
    'what a thread reads next, it has written': {'block': """
product: ; }
"""},
    'all that follows is the same for a weight that is zero': {
        'block': """
estimate: if (w_largest == 0 && is_u_good && first != 0) break;
is_met: if (!(sigma > 0 || isfinite(sigma))) return true;
""",
        'subspace': """
estimate_all: if (w_largest == 0 && isinf(w_largest)) {
""",
        'sn_finish_fwd': """
if (last != 0 && largest_of(extras, n_extras, shared) == 0) is_alone = false;
"""},
    'of vectors of length 1 both are the same': {'subspace': """
follow: sums.off += (of_v - u) * (of_v + u);
follow: sums.off += (of_v + u) * (of_v - u);
"""},
    'what is computed is not used': {'sn_fused_bwd': """
if (!detach || (gw || need_u)) go_back(W, state, bars, K, need_u, shared);
"""},
}
EQUIVALENT = {
    (part, line): reason for reason, parts_ in _REASONS.items()
    for part, lines in parts_.items() for line in lines.strip().split('\n')}


def mutants_of(text):
    """Yields the position, the operator and the text with it replaced."""
    skipped = [m.span() for m in _SKIP.finditer(text)]
    for match in _OPERATOR.finditer(text):
        start, end = match.span()
        if any(a <= start < b for a, b in skipped):
            continue
        operator = match[0]
        if operator in REPLACEMENTS:
            yield start, operator, (
                text[:start] + REPLACEMENTS[operator] + text[end:])


def code_of(kernel):
    """The text of its own, with operators to replace."""
    if isinstance(kernel, kernels.Raw):
        return kernel.code
    if isinstance(kernel, kernels.Elementwise):
        return kernel.arguments[2]
    return ' ; '.join(kernel.arguments[2:5])


def parts():
    """Names of all sources, and their text."""
    return {**kernels.SHARED, **{
        kernel.name: code_of(kernel) for kernel in kernels.ALL}}


def _pieces(text):
    """Top-level definitions, with what stands before each."""
    return re.findall(r'.*?^\};?$', text, re.S | re.M)


def _defined(piece):
    """Names of functions, types and macros."""
    return set(re.findall(
        r'^(?:struct .*?(?=\w+ {)|#define |__device__ [^(]*?(?=\w+\())(\w+)',
        piece, re.M))


def _used(code):
    """Names of such, and some others."""
    code = re.sub('//.*', '', code)
    return set(re.findall(r'(?<![.\w])\w+(?=[(<])|[A-Z]\w*', code))


def users_of(piece):
    """Kernels that use what a shared piece defines, or what uses it."""
    rest = {p for text in kernels.SHARED.values() for p in _pieces(text)}
    names, found = set(), {piece}
    while found:
        names = names.union(*map(_defined, found))
        rest -= found
        found = {p for p in rest if names & _used(p)}
    return [kernel for kernel in kernels.ALL
            if isinstance(kernel, kernels.Raw) and names & _used(kernel.code)]


def replace(name, text):
    """Replaces the text of a part; returns the names of changed kernels."""
    if name in kernels.SHARED:
        piece, = [a for a, b in zip(
            _pieces(kernels.SHARED[name]), _pieces(text)) if a != b]
        changed = users_of(piece)
        kernels.SHARED[name] = text
    else:
        kernel, = changed = [k for k in kernels.ALL if k.name == name]
        if isinstance(kernel, kernels.Raw):
            kernel.code = text
        elif isinstance(kernel, kernels.Elementwise):
            kernel.arguments = (*kernel.arguments[:2], text)
        else:
            kernel.arguments = (
                *kernel.arguments[:2], *text.split(' ; '),
                kernel.arguments[5])
    for kernel in changed:
        if isinstance(kernel, kernels.Raw):
            kernel._sources.clear()
    return {kernel.name for kernel in changed}


def line_of(text, position):
    """The function that a position is in, and its line there."""
    start = text.rfind('\n', 0, position) + 1
    functions = re.findall(
        r'__device__[^(]*?(\w+|operator\W*)\(', text[:position])
    lines = text[start:].split('\n')
    line = ' '.join(lines[0].split())
    if line == ';':  # a barrier that is gone: before what?
        line = f'; {lines[1].strip()}'
    return f'{functions[-1]}: {line}' if functions else line


def tests():
    """Yields tests with arguments, on which paths, and whether in all modes.

    The quickest come first.
    """
    from tests.arithmetic import test_device as t
    both, products = tuple(t.PATHS), ('products',)
    everything = 'Y sigma', 'W u gamma'
    for detach_uv, names in ((False, everything), (True, everything),
                             (False, ('sigma', 'W')), (False, ('Y', 'W')),
                             (False, ('sigma', 'u')), (True, ('Y', 'gamma'))):
        for shape, axis, K in (
                ((40, 3, 3, 3), 0, 1), ((3, 40, 4, 4), 1, 3),
                ((70, 50), 1, 2), ((33, 100), 0, 1), ((1, 70), 0, 1),
                ((70, 1), 0, 2), ((2, 3, 35), 1, 3)):
            yield both, names is everything, t.test_as_on_the_host, (
                shape, axis, K, 'f', 'f', 1e-4, detach_uv, *names)
    extremes, update = t.TestExtremes(), t.TestUpdate()
    for bad in (0, np.nan, np.inf):
        yield both, not bad, t.test_a_bad_u_is_replaced, (bad, 'f')
    yield both, False, t.test_the_largest_row_takes_its_place, ((3, 40, 5), 1)
    yield both, True, t.test_the_largest_row_takes_its_place, ((70, 40), 1)
    yield both, False, t.test_the_largest_row_of_an_extreme_weight, (1e30,)
    yield both, False, t.test_all_vectors_of_a_bad_weight_are_nan, (1,)
    yield both, True, t.test_all_vectors_of_a_bad_weight_are_nan, (3,)
    yield both, False, t.test_no_gradient_of_a_u_that_was_replaced, ()
    yield both, False, t.test_the_product_of_two_norms_may_be_extreme, (1e-81,)
    yield both, False, t.test_no_gradient_of_gamma_from_sigma, (np.nan,)
    yield both, False, t.test_the_unit_of_an_ordinary_weight_is_one, ()
    for dtype, size in (('f', 1e-36), ('f', 1e30), ('d', 1e150)):
        yield both, False, t.test_the_unit_of_an_extreme_weight, (dtype, size)
    yield both, False, t.test_the_unit_of_a_subnormal_weight, ()
    yield both, False, extremes.test_zero_weight, (0, 2)
    yield both, False, extremes.test_zero_weight, (1e-6, 2)
    yield both, False, extremes.test_u_in_the_left_null_space_is_no_trap, ()
    yield both, False, extremes.test_below_the_floor_Y_is_W_over_eps, ()
    yield both, False, t.test_an_extreme_weight_below_the_floor, ()
    for scales in ((1e-30, 1), (1e30, 1), (1, 1e-35), (1, 1e33),
                   (1e-9, 1e18)):
        test = extremes.test_gradients_at_the_ends_of_the_range
        yield both, scales == (1, 1e33), test, ('f', *scales, 3, False)
    yield both, False, t.test_a_coefficient_above_the_range, ()
    for scales in ((1, 1e14), (1e14, 1e-14)):
        yield both, False, t.test_one_of_two_norms_is_extreme, scales
    yield both, False, t.test_a_norm_in_between_may_be_extreme, ()
    for shape, axis in t.EXTREME:
        yield both, False, t.test_an_extreme_weight, (shape, axis, 3, 1e28)
    for value in ('largest', 'tiny'):
        yield both, False, extremes.test_at_the_limits_of_a_dtype, ('f', value)
        yield both, False, extremes.test_at_the_limits_of_a_dtype, ('d', value)
    yield both, False, extremes.test_the_norm_is_never_hidden_nan, ()
    for value in (0, np.nan, np.inf):
        for where in (slice(None), (0, 0)):
            yield both, False, update.test_a_bad_weight_does_not_reach_u, (
                value, where)
    yield both, False, update.test_a_live_graph_is_not_changed, (False,)
    for scale in (2e-38, 1e27):
        yield both, False, t.test_a_far_u_is_normalized, (scale,)
    for dtype, K in (('f', 1), ('e', 3)):
        yield both, False, t.test_arrays_that_start_anywhere, (dtype, K)
    renewal = t.TestRenewal()
    for (shape, axis), K, n_warmup in zip(
            renewal.SHAPES, (2, 1, 1), (5, 300, 1)):
        for scale in (1, 1e28):
            yield both, K == 2 and scale == 1, renewal.test_a_stale_u, (
                shape, axis, K, n_warmup, scale)
    yield both, False, renewal.test_no_warm_up, ()
    yield both, False, t.test_no_digit_is_lost_near_the_end_of_the_ordinary, (
        1e-11,)
    for n_warmup in (1, 15):
        yield both, False, t.test_a_stale_u_of_an_extreme_weight, (n_warmup,)
    for is_first, case in enumerate(renewal.GAMMAS):
        yield both, not is_first, renewal.test_gamma, ('d', *case)
    for case in renewal.BAD_SIGMAS:
        yield both, False, renewal.test_gamma_of_no_sigma, case
    for dtype in 'ed':
        yield both, False, t.test_as_on_the_host, (
            (3, 40, 4, 4), 1, 2, dtype, dtype, 3e-3, False, *everything)
    in_parts, few_blocks = t.DEALT_OUT_OTHERWISE.values()
    for constants in (in_parts, few_blocks):
        for shape, axis in t.LARGE:
            yield products, constants is in_parts and shape[0] < 50, (
                t.test_dealt_out_otherwise), (shape, axis, 'f', constants)
    for shape, axis in t.LARGE:
        yield products, False, t.test_dealt_out_otherwise, (
            shape, axis, 'e', in_parts)
    for axis in (0, 1):
        yield products, not axis, t.test_several_rows_in_a_block, (axis, 'f')
    many = t.TestManyWeights()
    yield both, False, many.test_as_on_the_host, (16, 20, False)
    yield from tests_of_several_vectors(both, products)


def tests_of_several_vectors(both, products):
    """The same, of test_device_subspace."""
    from tests.arithmetic import test_device_subspace as t
    for shape, axis in t.SHAPES:
        yield both, axis == 0, t.test_as_on_the_host, (shape, axis, 3, 'ff')
    yield both, False, t.test_as_on_the_host, (*t.SHAPES[0], 8, 'ff')
    yield both, False, t.test_weights_of_a_kind_share_launches, ()
    for scale in ('huge', 'tiny'):
        yield both, scale == 'huge', t.test_extreme_weights, (scale, 'f')
    yield both, False, t.test_lengths_of_the_vectors_do_not_matter, (
        (1e25, 1, 1e-25),)
    yield both, False, t.test_vectors_that_are_nearly_dependent, (
        1e-3, 'f', 1e-4)
    for name in t.BAD_ROWS:
        yield both, name in ('Inf', 'dependent'), (
            t.test_bad_vectors_are_replaced), (name,)
    for value in (0, np.nan):
        test = t.test_a_weight_without_a_direction_stores_nothing
        yield both, not value, test, (value,)
    yield both, True, t.test_a_span_that_W_takes_to_zero_is_left, ()
    for name in ('rank 1', 'identity'):
        yield both, False, t.test_hard_weights, (name,)
    for initial in (0.9, 1.02, 30.0):
        yield both, initial == 0.9, t.test_gamma_is_made_anew, (initial,)
    yield both, False, t.test_100_random_gradients, ()
    for shape, axis in t.DEALT_OUT:
        for few, long in ((1000, 0), (1, 8)):
            yield products, few > 1, t.test_dealt_out_otherwise, (
                shape, axis, few, long)
    for K, rtol in ((1, 1e-2), (2, 1e-2), (2, 0.3), (1, 10), (2, 10)):
        yield both, K == 1, t.test_tolerance_of_one_vector, (
            (5, 12, 7), 1, rtol, K)
    yield both, False, t.test_tolerance_of_a_weight_without_a_residual, (
        (40,), 0)
    yield both, False, t.test_vectors_that_are_each_close_to_the_one_before, (
        'd',)
    yield both, False, t.test_rows_that_come_back, ('f',)
    from tests.arithmetic import test_subspace_kernels as k
    for way in k.one.WAYS:
        for types, b in (('ff', 8), ('ef', 3)):
            yield products, False, k.test_product, (way, types, b)
    for b in (3, 8):
        yield products, False, k.test_begin_makes_the_vectors_independent, (
            k.each_close_to_the_one_before, b)
    yield products, False, k.test_begin_leaves_vectors_of_any_length, ()
    yield products, False, k.test_follow_bounds_what_is_new, ()


MODES = {
    'ascending': lambda: cuda_on_host.schedule('ascending'),
    'descending': lambda: cuda_on_host.schedule('descending'),
    'races': cuda_on_host.races,
}


def jobs():
    """Tests on a path in a mode: the keys of what is known of them."""
    return [(mode, path, at) for mode in MODES
            for at, (paths, is_for_all, *_) in enumerate(tests())
            if is_for_all or mode == 'ascending' for path in paths]


def run(job):
    """Runs a test; returns what failed, or None."""
    from tests.arithmetic import test_device
    mode, path, at = job
    *_, test, arguments = list(tests())[at]
    takes = inspect.signature(test).parameters
    np.random.seed(0)
    with array.installed(), MODES[mode](), \
            pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, 'FUSED_SIZE', test_device.PATHS[path])
        patch.setattr(kernels, 'BLOCK_SIZE', 64)
        patch.setattr(kernels, 'FUSED_BLOCK_SIZE', 64)
        if test.__module__ not in (
                test_device.__name__, test_device.__name__ + '_subspace'):
            test_device.patch_functions(patch)
        fixtures = {'monkeypatch': patch, 'path': path}
        try:
            test(*arguments, **{
                name: fixtures[name] for name in takes if name in fixtures})
        except cuda_on_host.CompileError:
            return 'compiler'
        except Exception as error:
            return f'{test.__name__}: {type(error).__name__}'
    return None


def find_launches():
    """Returns the kernels that each test launches; none may fail."""
    launches = {}
    for job in jobs():
        with array.counted() as names:
            failed = run(job)
        assert failed is None, f'without any change, {failed} in {job}'
        launches[job] = {kernel.name for kernel in kernels.ALL} & set(names)
    return launches


@contextlib.contextmanager
def quick_compilation():
    """A mutant runs for a moment, so what counts is how soon it does."""
    flags, limit = compiler._FLAGS, RAW.time_limit
    compiler._FLAGS = ('-O0', *flags[1:])
    RAW.time_limit = LAUNCH_TIMEOUT
    try:
        yield
    finally:
        compiler._FLAGS, RAW.time_limit = flags, limit


def run_mutant(name, text, launches):
    """Runs tests of the kernels that a mutant changes, until one fails.

    Args:
        name: Its part.
        text: The changed text.
        launches: The kernels that each test launches, the tests in order.

    Returns: The test that failed and why, or ``(None, None)``.

    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    # Not into the cache: nobody asks for it again.
    folder = tempfile.TemporaryDirectory()

    def child():
        warnings.simplefilter('ignore')
        sys.stdout = sys.stderr = open(os.devnull, 'w')  # NOQA: SIM115
        compiler.CACHE = folder.name
        changed = replace(name, text)
        for job, names in launches.items():
            if names & changed:
                sender.send((job, 'crash or time-out'))
                failed = run(job)
                if failed:
                    sender.send((job, failed))
                    os._exit(0)
        sender.send((None, None))
        os._exit(0)

    process = multiprocessing.get_context('fork').Process(target=child)
    process.start()
    sender.close()
    result = None
    with folder, contextlib.suppress(EOFError):
        try:
            while receiver.poll(TIMEOUT):
                result = receiver.recv()
        finally:
            process.kill()
            process.join()
    return result


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('parts', nargs='*', help='only these, e.g. sn_product')
    parser.add_argument('--every', type=int, default=1,
                        help='only each so manieth operator of a part')
    parser.add_argument('--verbose', action='store_true',
                        help='print what became of each')
    args = parser.parse_args(arguments)
    start = time.time()
    todo = [
        (name, line_of(mutant, position), operator, mutant)
        for name, text in parts().items()
        if not args.parts or name in args.parts
        for position, operator, mutant in list(mutants_of(text))[::args.every]]
    counts = {name: collections.Counter() for name, *_ in todo}
    survivors = []
    with quick_compilation():
        launches = find_launches()
        print(f'{len(todo)} mutants, after {time.time() - start:.0f} s',
              flush=True)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(Runner(launches), todo)
            for (name, line, operator, _), failed in zip(todo, results):
                if failed is None and (name, line) in EQUIVALENT:
                    failed = 'equivalent'
                kind = failed if failed in ('compiler', 'equivalent') else (
                    'caught' if failed else 'survived')
                counts[name][kind] += 1
                if args.verbose or failed is None:
                    print(f'{failed or "survived"}  {name}  {operator!r}  '
                          f'{line}', flush=True)
                if failed is None:
                    survivors.append((name, line))
    print(f'{"":24}{"caught":>10}{"survived":>10}{"equivalent":>12}'
          f'{"not C++":>10}')
    total = collections.Counter()
    for name, count in [*counts.items(), ('all', total)]:
        print(f'{name:24}{count["caught"]:10}{count["survived"]:10}'
              f'{count["equivalent"]:12}{count["compiler"]:10}')
        total.update(count)
    print(f'{len(todo)} mutants in {time.time() - start:.0f} s')
    gone = set()
    if not args.parts and args.every == 1:
        gone = set(EQUIVALENT) - {(name, line) for name, line, *_ in todo}
    for name, line in sorted(gone):
        print(f'no such mutant  {name}  {line}')
    return len(survivors) + len(gone)


class Runner:
    """Runs a mutant; what found others like it is tried first."""

    def __init__(self, launches):
        self.launches = launches
        self.found = collections.defaultdict(collections.Counter)

    def __call__(self, mutant):
        name, _, operator, text = mutant
        found = self.found[name, operator == '__syncthreads();']
        job, failed = run_mutant(name, text, {
            job: self.launches[job]
            for job in sorted(self.launches, key=lambda job: -found[job])})
        if job:
            found[job] += 1
        return failed


if __name__ == '__main__':
    sys.exit(main())
