"""Can the host tests of the kernels fail?  ``python -m tests.tools.mutants``.

Every operator of every kernel, and of the functions that kernels share, is
replaced by another, one at a time, and the tests of
:mod:`tests.arithmetic.test_device` are run until one fails.  A mutant that no
test notices is printed with its line; the exit status is the number of those
that are not listed, with the reason, in :data:`EQUIVALENT`, and of those that
are listed but do not exist.
"""
from __future__ import annotations

import argparse
import collections
import concurrent.futures
import multiprocessing
import os
import re
import sys
import time
import warnings

import sn_function  # isort: skip  # before chainer, which it repairs
import numpy as np
import pytest

from sn_function._arithmetic import kernels
from tests import cuda_on_host
from tests.cuda_on_host import array

assert sn_function  # it is imported for what it does

REPLACEMENTS = {
    '+': '-', '-': '+', '*': '/', '/': '*', '%': '/', '<': '>=', '>': '<=',
    '<=': '>', '>=': '<', '==': '!=', '!=': '==', '&&': '||', '||': '&&',
    '+=': '-=', '-=': '+=', '*=': '/=', '/=': '*=', '!': '', '>>': '<<',
    '__syncthreads();': ';',
}
# What is no operator: comments, casts, templates, pointers, declarations,
# directives.  Only an operator has spaces around it.
_SKIP = re.compile(r"""
    //[^\n]* | \#[^\n]* | \w+_cast<[^>]*> | template\s*<[^>]*>
    | \w+<\w+(?:,\s\w+)*> | \w[*](?=[\s>,)]) | operator\W+\(
    | \{[^{};]*\} (?=;) | enum[^;]*; | "C" | ->""", re.X)
_OPERATOR = re.compile(
    r'__syncthreads\(\);|\+\+|--|&&|\|\||[-+*/<>=!]=|>>|[-+*/%<>!]')
TIMEOUT = 60  # seconds: a loop that does not end counts as noticed

# (part, operator, line) -> why no result can depend on it.
_TUNING = 'both ways are right, and one is faster'
EQUIVALENT = {
    ('_BLOCK', '__syncthreads();', 'strided_product: __syncthreads();'):
        'who reads an entry next is the thread that wrote it, so far',
    ('_BLOCK', '>=', 'contiguous_product: if (r >= 32) {'): _TUNING,
    ('sn_fused_bwd', '&&', 'sn_fused_bwd_of: if (!detach && (gw || gu)) {'):
        'what is computed is not used',
}
for _operator in '-/':
    EQUIVALENT['sn_fused_bwd', _operator, (
        'sn_fused_bwd_of: const Size rows = (W.size() + width - 1) / width;'
    )] = 'the loop also ends where the weight does'
for _operator in ('>', '&&', '/', '>='):
    EQUIVALENT['_BLOCK', _operator, (
        'strided_product: while (width > 32 && width / 2 >= n_out) '
        'width /= 2;')] = _TUNING


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


def source_of(kernel):
    """All that is compiled for float32, but for what CuPy adds."""
    if isinstance(kernel, kernels.Raw):
        return kernel.source(np.dtype('f'), np.dtype('f'))
    return getattr(kernel, 'preamble', '') + code_of(kernel)


def shared():
    """Functions that sources begin with: constants of the module, by name."""
    sources = [source_of(kernel) for kernel in kernels.ALL]
    codes = [code_of(kernel) for kernel in kernels.ALL]
    return {
        name: text for name, text in vars(kernels).items()
        if isinstance(text, str) and '__device__' in text
        and any(text in source for source in sources)
        and not any(text in code for code in codes)}


def parts():
    """Names of all sources, and their text."""
    return {**shared(), **{
        kernel.name: code_of(kernel) for kernel in kernels.ALL}}


def replace(name, text):
    """Replaces the text of a part of the sources, in this process."""
    old = parts()[name]
    for kernel in kernels.ALL:
        if isinstance(kernel, kernels.Raw):
            kernel._sources.clear()
    if name in shared():
        setattr(kernels, name, text)
        # A kernel may have got it when it was made.
        for kernel in kernels.ALL:
            for key, value in vars(kernel).items():
                if isinstance(value, str):
                    setattr(kernel, key, value.replace(old, text))
        if not any(text in source_of(kernel) for kernel in kernels.ALL):
            raise RuntimeError(f'no kernel has another {name} now')
        return
    kernel, = [k for k in kernels.ALL if k.name == name]
    if isinstance(kernel, kernels.Raw):
        kernel.code = text
    elif isinstance(kernel, kernels.Elementwise):
        kernel.arguments = (*kernel.arguments[:2], text)
    else:
        kernel.arguments = (
            *kernel.arguments[:2], *text.split(' ; '), kernel.arguments[5])


def line_of(text, position):
    """The function that a position is in, and its line there."""
    start = text.rfind('\n', 0, position) + 1
    functions = re.findall(
        r'^(?:__device__|extern.*\d\)).*?(\w+)\(', text[:position], re.M)
    line = ' '.join(text[start:].split('\n')[0].split())
    return f'{functions[-1]}: {line}' if functions else line


def tests():
    """Tests of tests/arithmetic/test_device.py, the quickest first."""
    from tests.arithmetic import test_device as t
    f = ('f', 'f', 1e-4)
    everything = 'Y sigma', 'W u gamma'
    for detach_uv, names in ((False, everything), (True, everything),
                             (False, ('sigma', 'W')), (False, ('Y', 'W'))):
        for shape, axis, K in (
                ((40, 3, 3, 3), 0, 1), ((3, 40, 4, 4), 1, 3),
                ((70, 50), 1, 2), ((33, 100), 0, 1), ((1, 70), 0, 1),
                ((70, 1), 0, 2), ((2, 3, 35), 1, 3)):
            yield t.test_as_on_the_host, (
                shape, axis, K, *f, detach_uv, *names)
    yield t.test_quotient_of_large_numbers, ()
    yield t.test_the_unit_of_an_ordinary_weight_is_one, ()
    for dtype, size in (('f', 1e-36), ('f', 1e30), ('d', 1e150)):
        yield t.test_the_unit_of_an_extreme_weight, (dtype, size)
    for bad in (0, np.nan, np.inf):
        yield t.test_a_bad_u_is_replaced, (bad, 'f')
    yield t.test_the_largest_row_takes_its_place, ((3, 40, 5), 1)
    yield t.test_the_largest_row_takes_its_place, ((70, 40), 1)
    yield t.test_all_vectors_of_a_bad_weight_are_nan, (1,)
    yield t.test_all_vectors_of_a_bad_weight_are_nan, (3,)
    yield t.test_no_gradient_of_a_u_that_was_replaced, ()
    yield t.test_the_product_of_two_norms_may_be_extreme, (1e-81,)
    yield t.test_no_gradient_of_gamma_from_sigma, (np.nan,)
    extremes, update = t.TestExtremes(), t.TestUpdate()
    yield extremes.test_zero_weight, (0, 2)
    yield extremes.test_zero_weight, (1e-6, 2)
    yield extremes.test_u_in_the_left_null_space_is_no_trap, ()
    yield extremes.test_below_the_floor_Y_is_W_over_eps, ()
    yield t.test_an_extreme_weight_below_the_floor, ()
    for scales in ((1e-30, 1), (1e30, 1), (1, 1e-35), (1, 1e33),
                   (1e-9, 1e18)):
        yield extremes.test_gradients_at_the_ends_of_the_range, (
            'f', *scales, 3, False)
    for value in ('largest', 'tiny'):
        yield extremes.test_at_the_limits_of_a_dtype, ('f', value)
        yield extremes.test_at_the_limits_of_a_dtype, ('d', value)
    yield extremes.test_the_norm_is_never_hidden_nan, ()
    for value in (0, np.nan, np.inf):
        for where in (slice(None), (0, 0)):
            yield update.test_a_bad_weight_does_not_reach_u, (value, where)
    yield update.test_a_live_graph_is_not_changed, (False,)
    for scale in (2e-38, 1e27):
        yield t.test_a_far_u_is_normalized, (scale,)
    yield extremes.test_the_norm_is_one_at_any_scale, ('f',)


def run_tests():
    """Runs the tests on both paths; returns the name of the first to fail."""
    from tests.arithmetic import test_device
    for mode in (lambda: cuda_on_host.schedule('ascending'),
                 lambda: cuda_on_host.schedule('descending'),
                 cuda_on_host.races):
        for size in test_device.PATHS.values():
            kernels.FUSED_SIZE, kernels.BLOCK_SIZE = size, 64
            for test, arguments in tests():
                np.random.seed(0)
                with array.installed(), mode(), \
                        pytest.MonkeyPatch.context() as patch:
                    if hasattr(test, '__self__'):
                        test_device.patch_functions(patch)
                    try:
                        test(*arguments)
                    except cuda_on_host.CompileError:
                        return 'compiler'
                    except Exception as error:
                        return f'{test.__name__}: {type(error).__name__}'
    return None


def run_mutant(name, text):
    """Returns the test that failed, in a process of its own, or None."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child():
        warnings.simplefilter('ignore')
        sys.stdout = sys.stderr = open(os.devnull, 'w')  # NOQA: SIM115
        replace(name, text)
        sender.send(run_tests())

    process = multiprocessing.get_context('fork').Process(target=child)
    process.start()
    sender.close()
    try:
        if not receiver.poll(TIMEOUT):
            return 'time-out'
        return receiver.recv()
    except EOFError:
        return 'crash'
    finally:
        process.kill()
        process.join()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('parts', nargs='*', help='only these, e.g. sn_product')
    parser.add_argument('--every', type=int, default=1,
                        help='only each so manieth operator of a part')
    args = parser.parse_args(arguments)
    start = time.time()
    failed = run_tests()
    assert failed is None, f'without any change, {failed}'
    todo = [
        (name, line_of(text, position), operator, mutant)
        for name, text in parts().items()
        if not args.parts or name in args.parts
        for position, operator, mutant in list(mutants_of(text))[::args.every]]
    counts = {name: collections.Counter() for name, *_ in todo}
    survivors = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda m: run_mutant(m[0], m[3]), todo)
        for (name, line, operator, _), result in zip(todo, results):
            if result is None and (name, operator, line) in EQUIVALENT:
                result = 'equivalent'
            kind = result if result in ('compiler', 'equivalent') else (
                'caught' if result else 'survived')
            counts[name][kind] += 1
            if result is None:
                survivors.append((name, line, operator))
                print(f'survived  {name}  {operator!r}  {line}', flush=True)
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
        gone = set(EQUIVALENT) - {
            (name, operator, line) for name, line, operator, _ in todo}
    for name, operator, line in sorted(gone):
        print(f'no such mutant  {name}  {operator!r}  {line}')
    return len(survivors) + len(gone)


if __name__ == '__main__':
    sys.exit(main())
