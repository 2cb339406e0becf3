"""What the tool reads from machine code is what the source says."""
import math
import re

import pytest

from sn_function._arithmetic import kernels
from tests.tools import nvrtc, sass


@pytest.fixture(scope='module')
def compiler():
    try:
        return nvrtc.load(), sass.find_nvdisasm()
    except nvrtc.Unavailable as e:
        reason, *_ = str(e).splitlines()
        pytest.skip(f'{reason}: pip install ".[nvrtc]"')


def loops_of(body, *, parameters='const T* w, const T* x, T* y, int n',
             helpers=''):
    """Returns the loops of a kernel of which this is the body."""
    return sass.analyze_source('sn_trial', f"""
typedef float T;
{helpers}
extern "C" __global__ void __launch_bounds__(512, 1) sn_trial(
    {parameters}) {{
{body}
}}
""").loops


def one_of(*args, **kwargs):
    loop, = loops_of(*args, **kwargs)
    return loop


@pytest.mark.usefixtures('compiler')
class TestLoops:

    def test_vectors_in_flight(self):
        """Four loads of 16 bytes before the first is used."""
        loop = one_of("""
  const float4* in = reinterpret_cast<const float4*>(w);
  T sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 4096) {
    float4 a[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) a[k] = in[i + 512 * k];
#pragma unroll
    for (int k = 0; k < 4; ++k) sum += a[k].x + a[k].y + a[k].z + a[k].w;
  }
  y[threadIdx.x] = sum;""")
        assert loop.path.loads == {('w', 16): 4}
        assert not loop.path.stores
        assert loop.entries == 16
        assert (loop.path.in_flight, loop.path.bytes_in_flight) == (4, 64)
        assert loop.path.rounds == 1
        assert loop.path.kinds['float32'] == 16
        assert loop.path.kinds['memory'] == 4
        assert loop.is_of_weight

    def test_one_after_the_other(self):
        """A load whose address is what the last one loaded."""
        loop = one_of("""
  int i = threadIdx.x;
#pragma unroll 1
  for (int k = 0; k < n; ++k)
    i = reinterpret_cast<const int*>(w)[i];
  y[threadIdx.x] = i;""")
        assert loop.path.loads == {('w', 4): 1}
        assert (loop.path.in_flight, loop.path.rounds) == (1, 1)

    def test_three_rounds(self):
        loop = one_of("""
  T sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 512) {
    const int at = static_cast<int>(w[i]);
    sum += x[static_cast<int>(x[at])];
  }
  y[threadIdx.x] = sum;""")
        assert loop.path.loads == {('w', 4): 1, ('x', 4): 2}
        assert loop.path.rounds == 3
        assert loop.path.in_flight == 1
        assert loop.entries == 1

    def test_prefetch(self):
        """A load that is used two iterations later takes half a round."""
        loop = one_of("""
  const T* p = w + threadIdx.x;
  T sum = 0, a = p[0], b = p[512];
#pragma unroll 1
  for (int i = 0; i < n; ++i, p += 512) {
    const T c = p[1024];
    sum = sum * 2 + a;
    a = b;
    b = c;
  }
  y[threadIdx.x] = sum;""")
        # The compiler moves registers, so it may wait for what it moves.
        assert loop.path.in_flight in (1, 2)
        assert 0.5 <= loop.path.rounds <= 1

    def test_arrays(self):
        """Loads and stores are told apart by the arguments."""
        loop = one_of("""
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 512)
    gw[i] = gy[i] * x[i / 7] + static_cast<T>(z[i % 5]);""",
                      parameters='const T* gy, const T* x, const double* z, '
                                 'T* gw, int n')
        assert loop.path.loads == {
            ('gy', 4): 1, ('x', 4): 1, ('z', 8): 1}
        assert loop.path.stores == {('gw', 4): 1}
        assert loop.path.kinds['convert'] >= 1
        assert loop.path.arrays == {'gy', 'x', 'z'}

    def test_slow_path_is_not_counted(self):
        """A division of 64 bits is one of 32 where that is enough."""
        loop = one_of("""
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 512)
    y[i] = w[i] + x[start / (i + 1)];""", parameters=(
            'const T* w, const T* x, T* y, int n, long long start'))
        assert loop.path.loads == {('w', 4): 1, ('x', 4): 1}
        assert not [i for i in loop.path.instructions if i.name == 'CALL']
        assert len(loop.path.instructions) < 50

    def test_what_is_loaded_is_used(self):
        """Of two ways, the one that does something with the entry."""
        loop = one_of("""
  double sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 512) {
    const T a = w[i];
    __syncthreads();
    if (i % 8 != 5) {
      sum = fma(sum, static_cast<double>(a), 2.0);
      __syncthreads();
    }
  }
  y[threadIdx.x] = sum;""")
        assert loop.path.kinds['float64'] == 1
        assert loop.path.kinds['convert'] == 1

    def test_around(self, monkeypatch):
        """A line that must not be passed, where there is another way."""
        body = """
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 512) {
    T a = w[i];
    if (i % 8 == 5)
      a = pow(a, x[i]);  // too long for a condition
    y[i] = a;
  }"""
        assert one_of(body).path.loads == {('w', 4): 1, ('x', 4): 1}
        monkeypatch.setitem(sass.AROUND, 'sn_trial', 'too long')
        assert one_of(body).path.loads == {('w', 4): 1}

    def test_functions_and_lines(self):
        loop, = [loop for loop in loops_of(
            '  y[threadIdx.x] = outer(w + 1, n);', helpers="""
struct Pair {
  const T* w;
  __device__ T operator[](int i) const { return w[i]; }
};
__device__ T inner(const Pair& p, int n) {
  T sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 512) sum += p[i];
  return sum;
}
__device__ T outer(const T* w, int n) { return inner(Pair{w}, n); }
""") if loop.entries]
        assert loop.functions == ('Pair', 'inner', 'outer', 'sn_trial')
        assert loop.name == 'outer > inner'
        assert loop.lines[0].startswith('for (int i = threadIdx.x; i < n;')
        assert 'return inner(Pair{w}, n);' in loop.lines[1]

    def test_loop_within(self, monkeypatch):
        """It counts once, or not at all, in the loop around it."""
        body = """
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 512) {
    T sum = 0;
#pragma unroll 1
    for (int k = 0; k < i % 7; ++k)
      sum += x[k];
    gw[i] = sum * gy[i];
  }"""
        parameters = 'const T* gy, const T* x, T* gw, int n'
        outer, inner = loops_of(body, parameters=parameters)
        assert inner.path.loads == {('x', 4): 1}
        assert outer.path.loads == {('gy', 4): 1}
        assert not outer.is_through
        monkeypatch.setitem(sass.THROUGH, 'sn_trial', r'sum \+= x')
        outer, inner = loops_of(body, parameters=parameters)
        assert outer.is_through
        assert outer.path.loads == {('gy', 4): 1, ('x', 4): 1}
        assert inner.path.loads == {('x', 4): 1}

    def test_classes_are_all(self):
        for loop in loops_of("""
  for (int i = threadIdx.x; i < n; i += 512)
    y[i] = static_cast<T>(sqrt(static_cast<double>(w[i])) / (i % 7 + 1));"""):
            kinds = loop.path.kinds
            assert set(kinds) <= {*sass.CYCLES, 'other'}
            assert sum(kinds.values()) == len(loop.path.instructions)
            assert kinds['float64'] > 0
            assert kinds['integer'] > 0


def instruction(opcode, *operands, holds=7, waits=0):
    return sass.Instruction(
        0, '', opcode, operands, holds << 46 | waits << 52, ())


class TestFollow:

    def test_counts_until_the_wait(self):
        path = sass.Path([
            instruction('LDG.E.128', 'R4', '[R2.64]', holds=0),
            instruction('LDG.E', 'R8', '[R2.64]', holds=1),
            instruction('FADD', 'R9', 'R8', 'R8', waits=1 << 1),
            instruction('FADD', 'R9', 'R4', 'R4', waits=1 << 0),
        ], ['w', 'x', '', ''])
        assert (path.in_flight, path.bytes_in_flight) == (2, 20)
        assert path.rounds == 1
        assert path.moved('w') == 16

    def test_waits_for_the_first_before_the_second(self):
        path = sass.Path([
            instruction('LDG.E', 'R4', '[R2.64]', holds=0),
            instruction('IMAD', 'R5', 'R4', waits=1),
            instruction('LDG.E', 'R8', '[R5.64]', holds=0),
            instruction('FADD', 'R9', 'R8', 'R8', waits=1),
        ], ['w', '', 'x', ''])
        assert (path.in_flight, path.rounds) == (1, 2)

    def test_partial_wait(self):
        """DEPBAR leaves so many of the last loads on their way."""
        path = sass.Path([
            instruction('LDG.E', 'R4', '[R2.64]', holds=0),
            instruction('DEPBAR.LE', 'SB0', '0x1'),
            instruction('FADD', 'R9', 'R8', 'R8'),
        ], ['w', '', ''])
        # The load of the last iteration is waited for.
        assert (path.in_flight, path.rounds) == (2, 0.5)

    def test_width_bounds_the_unit_of_memory(self):
        narrow, wide = (
            sass.Path([instruction(code, 'R4', '[R2.64]')], ['w'])
            for code in ('LDG.E', 'LDG.E.128'))
        assert narrow.cycles == (4, 'memory')
        assert wide.cycles == (16, 'memory')


def made(n_integer, registers=32, loads=1):
    """Returns the code of a kernel with a loop of one entry."""
    path = sass.Path([
        *[instruction('LDG.E', 'R4', '[R2.64]', holds=0)] * loads,
        instruction('FADD', 'R9', 'R4', 'R4', waits=1),
        *[instruction('IADD3', 'R1', 'R2', 'R3')] * n_integer],
        ['w'] * loads + [''] * (n_integer + 1))
    loop = sass.Loop('sn_trial', ('sn_trial',), ['y = w'], path, loads, True,
                     False, list, registers)
    return {'sn_trial': sass.Code(
        'sn_trial', 'sn_trial', [], 0, registers, 0, [loop])}


def bounds(codes, n, grid, block=512, seen=(), fits=False):
    each = sass.Pass('', n, (('w', 4 * n),))
    return sass.bounds_of(sass.Launch('sn_trial', grid, block, (each,)),
                          each, codes, set(seen), fits)


class TestModel:

    def test_bytes(self):
        n = 1 << 24
        assert bounds(made(1), n, 264)['bytes'] == pytest.approx(
            4 * n / sass.HBM)
        assert bounds(made(1), n, 264, seen='w', fits=True)['bytes'] == (
            pytest.approx(4 * n / sass.L2))
        assert bounds(made(1), n, 264, seen='w')['bytes'] == pytest.approx(
            4 * n / sass.HBM)

    def test_instructions(self):
        """50 additions take 100 cycles of each of 32 lanes."""
        n = 1 << 24
        found = bounds(made(50), n, 264)
        assert found['integer'] == pytest.approx(
            n / 32 * 100 / (4 * 132 * sass.CLOCK * sass.UTILIZATION))
        # One block has one multiprocessor.
        assert bounds(made(50), n, 1)['integer'] == pytest.approx(
            132 * found['integer'])

    def test_latency(self):
        """Each thread waits once for each of its entries, or for more."""
        n = 512 * 132 * 10
        found = bounds(made(1), n, 132)['latency']
        assert found == pytest.approx(10 * sass.LATENCY['hbm'])
        assert bounds(made(1, loads=5), n, 132)['latency'] == pytest.approx(
            2 * sass.LATENCY['hbm'])

    def test_registers_bound_the_blocks(self):
        """Two rounds of blocks, where half as many are resident."""
        n = 512 * 132 * 4
        assert bounds(made(1, 32), n, 528)['latency'] == pytest.approx(
            sass.LATENCY['hbm'])
        assert bounds(made(1, 64), n, 528)['latency'] == pytest.approx(
            2 * sass.LATENCY['hbm'])

    def test_missing_loop(self):
        each = sass.Pass('nowhere', 1, (('w', 4),))
        with pytest.raises(LookupError, match=r'no loop of .* at .nowhere'):
            sass.choose(made(1)['sn_trial'], each, 512)


@pytest.fixture(scope='module')
def codes(compiler):
    return [sass.analyze(case) for case in sass.cases()]


@pytest.mark.slow
class TestKernels:

    def test_all_are_read(self, codes):
        assert {code.kernel for code in codes} == {
            kernel.name for kernel in kernels.ALL}
        for code in codes:
            assert code.loops, code.label
            assert 0 < code.registers <= 255
            assert 16 * len(code.instructions) == code.size

    def test_arrays_are_known(self, codes):
        """Every load of a loop is of some argument of the kernel."""
        for code in codes:
            for loop in code.loops:
                assert '?' not in loop.path.arrays, (code.label, loop.lines)

    def test_estimates_are_above_the_floor(self, codes):
        by_kernel = sass.by_kernel(codes)
        for shape in sass.SHAPES:
            for is_backward in (False, True):
                found = sass.estimate(shape, is_backward, by_kernel)
                total = sum(each.seconds for each in found)
                assert total > 0.99 * sass.floor(shape, is_backward)
                assert all(each.bound for each in found)

    def test_weights_are_read_as_often_as_claimed(self):
        """The passes of a call have at least the bytes of the floor."""
        for shape in sass.SHAPES:
            size = 4 * math.prod(shape)
            for is_backward in (False, True):
                passes = [each for call in sass.launches(shape, is_backward)
                          for each in call.passes]
                assert sum(each.written for each in passes) == size
                assert sum(n for each in passes for _, n in each.read) >= (
                    3 * size)


@pytest.mark.usefixtures('compiler')
@pytest.mark.parametrize('style', ['text', 'markdown', 'rst'])
def test_output(style, monkeypatch, capsys):
    options = [] if style == 'text' else [f'--{style}']
    monkeypatch.setattr('sys.argv', ['sass', 'sn_correct_bwd', *options])
    assert sass.main() == 0
    out = capsys.readouterr().out
    assert re.search(r'\bgy \d+x(32|128)\b', out)
    assert re.search(r'\bgw \d+x(32|128)\b', out)
    if style == 'markdown':
        rows = [row for row in out.splitlines() if row.startswith('|')]
        assert {row.count(' |') for row in rows} == {len(sass.COLUMNS), 4}
    if style == 'rst':
        assert out.count('.. list-table:: ') == 2


def test_without_nvdisasm(monkeypatch):
    monkeypatch.setattr(sass.util, 'find_spec', lambda name: None)
    with pytest.raises(nvrtc.Unavailable, match='nvdisasm is needed'):
        sass.find_nvdisasm.__wrapped__()
