"""What the hot loops of the CUDA kernels do, from their machine code.

``python -m tests.tools.sass`` compiles each kernel as :mod:`.nvrtc` does,
disassembles it and prints, for each loop that reads or writes a weight, the
instructions of an iteration, its loads from global memory, and how many of
them are in flight.  From these it ESTIMATES how long the launches of a
normalization take on an H100.  No device and no driver are needed.  Nothing
here was measured: the estimate shows what bounds a kernel, not how fast it is.

Loops
    A loop is a branch back, and what lies on a way from its target to it.
    What counts is one way through it: of those that load and store the most
    and use what they load, the one with the fewest instructions.  So neither
    the slow divisions of 64 bits count, nor a loop within it that may be left
    out, unless :data:`THROUGH` names a line of the source that must be passed,
    and :data:`AROUND` one that must not.  A loop within it counts once.
    Instructions under a condition count.
Arrays
    Which array a load reads is followed back from its address to the pointers
    among the arguments.  The entries of an iteration are the bytes that it
    loads of ``w`` by the size of an entry; without ``w`` those of ``gy``, or
    those that it stores to ``gw``.
Loads in flight
    An instruction says which scoreboards it waits for (bits 52 to 57 of the
    upper half of its encoding), a load which one it holds (bits 46 to 48).
    Issued in order, the most loads that no instruction has waited for yet are
    those in flight.  A wait for loads that were issued after the last wait is
    a round: the latency of the memory, once.

Model
    A launch is a list of passes over an array, one after the other.  A pass
    takes the longest of

    * its bytes by the bandwidth of where they are;
    * its instructions: the cycles of each unit of a quarter of a
      multiprocessor (:data:`CYCLES`), by :data:`UTILIZATION`;
    * its rounds, one after the other: iterations of a thread x rounds x
      latency, by as many threads as are resident.

    Add :data:`STEP` for each step of a block between passes (a sum, a norm),
    and the gap between kernels.  What is read again comes from L2 when all
    arrays of the call together fit there.  The floor is the bytes alone:
    3 reads and 1 write of the weight each way.
"""
from __future__ import annotations

import argparse
import bisect
import collections
import functools
import math
import os
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import time
from importlib import util
from typing import Callable, Iterable, Iterator, NamedTuple
from unittest import mock

import numpy

from sn_function._arithmetic import kernels as _kernels
from sn_function._arithmetic import workspace
from tests.tools import nvrtc

ARCH = 'sm_90'
INSTALL = '''\
nvdisasm is needed, too.  With Python 3.10 or newer:
    pip install ".[nvrtc]"'''

# An H100 SXM.  NVIDIA's data sheet has 132 multiprocessors, 50 MB of L2 and
# 3.35 TB/s, of which kernels get about 3.0.  The clock is below the boost, of
# 1.755 GHz on the PCIe card.  The rest is assumed.
PROCESSORS = 132
CLOCK = 1.7e9               # Hz
HBM = 3.0e12                # bytes/s
L2_SIZE = 50e6
L2 = 5.5e12                 # bytes/s
# Seconds from a load to its use while many others load; alone, it takes half.
LATENCY = {'hbm': 0.7e-6, 'l2': 0.3e-6}
# The CUDA programming guide, on compute capability 9.0: threads, registers
# and blocks of a multiprocessor, and results per cycle of its units: float32
# 128, integers 64, float64 64, conversions and special functions 16, loads
# and stores 32.  For a warp on a quarter of it, in cycles:
THREADS, REGISTERS, BLOCKS = 2048, 65536, 32
CYCLES = {'float32': 1, 'multiply': 2, 'integer': 2, 'float64': 2,
          'convert': 8, 'memory': 4}
UTILIZATION = 0.8           # a guess: no scheduler finds work in each cycle
STEP = 0.5e-6               # a guess: barriers, shuffles and a square root
GAP = 1.5e-6                # assumed: between kernels of a graph

# As the goals for speed name them; float32.
SHAPES = ((64, 3, 3, 3), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 3, 3),
          (512, 512, 3, 3), (1024, 1024, 3, 3), (4096, 4096))

# The names of arguments of the size of the weight, which count entries.
WEIGHTS = ('w', 'gy', 'gw')

# Functions whose loops are for weights that hardly occur.
RARE = {'largest', 'start_from_largest_row', 'InUnits'}
RARE_IN = {'sn_finish_fwd': {'estimate'},
           'sn_finish_subspace': {'estimate_all'}}
# A line of the source that must be passed where it can be: what the exact
# gradient takes for K=1.
THROUGH = dict.fromkeys(
    ('sn_correct_bwd', 'sn_fused_bwd'), r'pairs\.p\(first, which, at\)')
# One that must not be, if there is another way: that of weights (l, m).
AROUND = dict.fromkeys(
    ('sn_correct_bwd', 'sn_fused_bwd'), r'pairs\.q\(first, which, at\)')

COLUMNS = ('kernel', 'functions', 'line', 'entries', 'instr.', 'per entry',
           'int', 'f32', 'f64, conv.', 'memory', 'other', 'loads', 'stores',
           'in flight', 'rounds', 'reg.')


class Instruction(NamedTuple):
    """One of the machine, with what it waits for."""

    address: int
    predicate: str
    opcode: str         # with its modifiers
    operands: tuple[str, ...]
    control: int        # the upper half of its encoding
    lines: tuple[int, ...]  # of the source, innermost of the inlined first

    @property
    def name(self) -> str:
        return self.opcode.split('.')[0]

    @property
    def kind(self) -> str:
        """The unit that executes it, as in CYCLES, or ``other``."""
        name = self.name
        if name == 'HFMA2' and self.operands[1:3] == ('-RZ', 'RZ'):
            return 'integer'    # moves a constant
        if re.match(r'(LD|ST|ATOM|RED)', name) and name != 'LDC':
            return 'memory'
        if re.match(r'(F2F|F2I|I2F|I2I|MUFU|FRND|POPC|FLO)', name):
            return 'convert'
        if re.match(r'D(ADD|MUL|FMA|SETP|MNMX)', name):
            return 'float64'
        if re.match(r'(F|H(ADD|MUL|FMA|SETP|MNMX))', name):
            return 'float32'
        if re.match(r'(BRA|BS|BREAK|BAR|BMOV|CALL|RET|EXIT|WARPSYNC|SHFL|'
                    r'VOTE|NOP|YIELD|LDC|ULDC|S2|CS2R|MEMBAR|ERRBAR|CCTL|'
                    r'NANO|DEPBAR|PLOP3|UPLOP3|R2UR)', name):
            return 'other'
        return 'multiply' if re.match(r'U?IMAD', name) else 'integer'

    @property
    def is_load(self) -> bool:
        return self.name == 'LDG'

    @property
    def is_store(self) -> bool:
        return self.name in ('STG', 'RED', 'ATOMG', 'ATOM')

    @property
    def bytes(self) -> int:
        """What a thread loads or stores."""
        for text, size in (('128', 16), ('64', 8), ('U8', 1), ('S8', 1),
                           ('U16', 2), ('S16', 2)):
            if text in self.opcode.split('.'):
                return size
        return 4

    @property
    def holds(self) -> int:
        """The scoreboard that is held until what it loads has come, or 7."""
        return self.control >> 46 & 7

    @property
    def waits(self) -> int:
        """A mask of the scoreboards that must be free before it."""
        return self.control >> 52 & 63

    def targets(self) -> list[str]:
        return re.findall(r'`\((\.L_x_\d+|\$[\w$]+)\)',
                          ' '.join(self.operands))

    def destination(self) -> list[str]:
        """The registers that it writes."""
        if re.match(r'(ST|RED|BRA|BS|BREAK|BAR|CALL|RET|EXIT|WARPSYNC|NOP|'
                    r'YIELD|MEMBAR|ERRBAR|CCTL|DEPBAR|R2P)', self.name):
            return []
        for operand in self.operands[:2]:
            match = re.fullmatch(r'(U?R)(\d+)', operand)
            if match:
                kind, number = match.groups()
                return [f'{kind}{int(number) + i}' for i in range(
                    self._width())]
            if not re.match(r'!?U?P', operand):
                break
        return []

    def _width(self) -> int:
        name, modifiers = self.name, self.opcode.split('.')[1:]
        if self.name.startswith('LD') and '128' in modifiers:
            return 4
        if ('64' in modifiers or 'WIDE' in modifiers
                or (name == 'CS2R' and '32' not in modifiers)
                or (name in ('DADD', 'DMUL', 'DFMA'))
                or modifiers[:1] == ['F64']):
            return 2
        return 1

    def sources(self) -> list[str]:
        """The registers that it reads."""
        operands = self.operands
        if self.destination():
            first = 1 + next(i for i, operand in enumerate(operands[:2])
                             if re.fullmatch(r'U?R\d+', operand))
            operands = operands[first:]
        return re.findall(r'\bU?R\d+', ' '.join(operands))


class Parameter(NamedTuple):
    """An argument of a kernel, where it is in the bank of constants."""

    name: str
    is_pointer: bool
    offset: int


class Path(NamedTuple):
    """One way through instructions, and the arrays that they access."""

    instructions: list[Instruction]
    accessed: list[str]     # by each, or ''

    @property
    def loads(self) -> collections.Counter[tuple[str, int]]:
        """How often, by array and bytes."""
        return collections.Counter([
            (name, each.bytes) for each, name in zip(*self) if each.is_load])

    @property
    def stores(self) -> collections.Counter[tuple[str, int]]:
        return collections.Counter([
            (name, each.bytes) for each, name in zip(*self) if each.is_store])

    @property
    def in_flight(self) -> int:
        """The most loads that nothing has waited for yet."""
        return self.follow()[0]

    @property
    def bytes_in_flight(self) -> int:
        return self.follow()[1]

    @property
    def rounds(self) -> float:
        """Latencies of an iteration, one after the other."""
        return self.follow()[2]

    def follow(self, latency: Callable[[str], float] = lambda array: 1,
               ) -> tuple[int, int, float]:
        """Issues them in order, seven times over."""
        out: list[tuple[int, int, float]] = []  # scoreboard, bytes, when here
        now, most, most_bytes, at_end = 0.0, 0, 0, []
        for _ in range(7):
            for each, array in zip(*self):
                waits = each.waits
                keep: dict[int, int] = {}
                if each.name == 'DEPBAR':   # until at most so many are left
                    name, left = each.operands[:2]
                    keep = {int(name[2:]): int(left, 16)}
                still = []
                for load in reversed(out):
                    board = load[0]
                    if board in keep:
                        keep[board] -= 1
                    if waits >> board & 1 or keep.get(board, 0) < 0:
                        now = max(now, load[2])
                    else:
                        still.append(load)
                out = still[::-1]
                if each.is_load:
                    out.append((each.holds, each.bytes, now + latency(array)))
                    most = max(most, len(out))
                    most_bytes = max(most_bytes, sum(x[1] for x in out))
            at_end.append(now)
        # The first time is another: nothing is on its way.
        return most, most_bytes, (at_end[-1] - at_end[0]) / 6

    @property
    def kinds(self) -> collections.Counter[str]:
        return collections.Counter(i.kind for i in self.instructions)

    @property
    def arrays(self) -> set[str]:
        return {name for names, _ in self.loads for name in names.split('/')}

    def moved(self, array: str) -> int:
        """The bytes of an array that are loaded, or else stored."""
        for counter in self.loads, self.stores:
            found = sum(size * n for (name, size), n in counter.items()
                        if name == array)
            if found:
                return found
        return 0

    @property
    def cycles(self) -> tuple[float, str]:
        """Those of a quarter of a multiprocessor for a warp, and where."""
        units = dict.fromkeys(('issue', *CYCLES), 0)
        units['issue'] = len(self.instructions)
        for each in self.instructions:
            if each.kind in CYCLES:
                units[each.kind] += CYCLES[each.kind] * (
                    max(1, each.bytes // 4) if each.kind == 'memory' else 1)
        unit = max(units, key=lambda unit: units[unit])
        return units[unit], unit


class Loop(NamedTuple):
    """One that accesses global memory itself, not by a loop within it."""

    kernel: str
    functions: tuple[str, ...]  # inlined in each other, innermost first
    lines: list[str]    # of the source, where it accesses memory, likewise
    path: Path
    entries: float              # of the weight, in an iteration
    is_of_weight: bool
    is_through: bool    # as THROUGH has it
    setup: Callable[[], list[Instruction]]  # before it and after it
    registers: int

    @property
    def name(self) -> str:
        # The kernel's own function needs no name, a struct is not one.
        return ' > '.join([
            name for name in reversed(self.functions)
            if not name.startswith('sn_') and not name[0].isupper()][-3:])

    @property
    def is_rare(self) -> bool:
        return bool(set(self.functions) & (
            RARE | RARE_IN.get(self.kernel, set())))


class Code(NamedTuple):
    """The machine code of one kernel, and its loops."""

    label: str
    kernel: str
    instructions: list[Instruction]
    size: int           # bytes
    registers: int
    seconds: float      # that NVRTC took
    loops: list[Loop]


def compile_to_cubin(source: str, has_headers: bool) -> tuple[bytes, float]:
    """Returns the machine code, and the seconds it took."""
    cp = nvrtc.load()
    start = time.perf_counter()
    with nvrtc._without_device():
        module = cp.core.compile_with_cache(
            # CuPy may put headers before it: count the lines from here.
            '#line 1 "sn_kernel"\n' + source,
            # Which changes nothing else in the machine code.
            ('-lineinfo',), arch=ARCH[len('sm_'):],
            prepend_cupy_headers=not has_headers)
    # CuPy takes the last byte, which is 0, for the end of a text.
    return module.cubin + b'\0', time.perf_counter() - start


@functools.lru_cache(maxsize=None)
def find_nvdisasm() -> str:
    """Returns its path.

    Raises:
        nvrtc.Unavailable: If there is none.

    """
    spec = util.find_spec('nvidia')
    for path in (spec and spec.submodule_search_locations) or ():
        for found in sorted(pathlib.Path(path).glob('*/bin/nvdisasm')):
            return str(found)
    raise nvrtc.Unavailable(INSTALL)


def disassemble(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, 'kernel.cubin')
        pathlib.Path(path).write_bytes(cubin)
        return subprocess.run(
            [find_nvdisasm(), '-c', '-gi', '-hex', path], check=True,
            stdout=subprocess.PIPE, text=True).stdout


def read_code(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Returns the instructions, and the labels as indices of them."""
    found: list[Instruction] = []
    labels = {}
    chain: list[int] = []
    is_open = False     # does the next line of a chain belong to this one
    for row in text.splitlines():
        note = re.match(r'\s*//## File "([^"]*)", line (\d+)( inlined)?', row)
        if note:
            path, line, inlined = note.groups()
            if not is_open:
                chain = []
            if path.endswith('sn_kernel'):
                chain.append(int(line))
            is_open = bool(inlined)
            continue
        label = re.match(r'(\.L_x_\d+|\$[\w$]+):', row)
        if label:
            labels[label[1]] = len(found)
            continue
        code = re.match(r'\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z]\S*?)'
                        r'(?:\s+([^;]*?))?\s*;', row)
        if code:
            address, predicate, opcode, operands = code.groups()
            found.append(Instruction(
                int(address, 16), predicate or '', opcode,
                tuple(text.strip().replace('.reuse', '') for text in (
                    operands or '').split(',') if text.strip()),
                0, tuple(chain)))
            continue
        upper = re.match(r'\s*/\* 0x([0-9a-f]{16}) \*/', row)
        if upper and found:
            found[-1] = found[-1]._replace(control=int(upper[1], 16))
    return found, labels


class Graph:
    """Which instruction may follow which."""

    def __init__(self, instructions: list[Instruction],
                 labels: dict[str, int], parameters: list[Parameter]) -> None:
        self.instructions = instructions
        self.writes = [set(each.destination()) for each in instructions]
        self.reads = [each.sources() for each in instructions]
        names = {p.offset: p.name for p in parameters if p.is_pointer}
        self.pointers = [
            {names[int(offset, 16)] for offset in re.findall(
                r'c\[0x0\]\[(?:U?R\d+\+)?0x([0-9a-f]+)\]',
                ' '.join(each.operands)) if int(offset, 16) in names}
            for each in instructions]
        self.next: list[list[int]] = []
        self.previous: list[list[int]] = [[] for _ in instructions]
        ends: dict[str, int] = {}   # where a set of threads meets again
        for i, each in enumerate(instructions):
            targets = [labels[label] for label in each.targets()]
            goes_on = True
            if each.name == 'CALL':     # as one long instruction
                self.writes[i] = self._written_from(targets[0])
                targets = []
            elif each.name == 'BSSY':
                ends[each.operands[0]] = targets[0]
                targets = []
            elif each.name == 'BSYNC' and each.operands[0] in ends:
                targets = [ends[each.operands[0]]]
                goes_on = bool(each.predicate)
            elif each.name in ('EXIT', 'RET') or (
                    each.name == 'BRA' and '.DIV' not in each.opcode
                    and len(each.operands) == 1):
                goes_on = bool(each.predicate)
            if goes_on and i + 1 < len(instructions):
                targets.append(i + 1)
            self.next.append(sorted(set(targets)))
        for i, targets in enumerate(self.next):
            for j in targets:
                self.previous[j].append(i)

    def _written_from(self, start: int) -> set[str]:
        written: set[str] = set()
        for i in range(start, len(self.instructions)):
            written |= self.writes[i]
            each = self.instructions[i]
            if each.name == 'RET' and not each.predicate:
                break
        return written

    def loops(self) -> dict[int, set[int]]:
        """Returns the body of each loop, by where it begins."""
        found: dict[int, set[int]] = {}
        for i, targets in enumerate(self.next):
            for head in targets:
                if head > i:
                    continue
                body, rest = {head, i}, [i] if i != head else []
                while rest:
                    for j in self.previous[rest.pop()]:
                        if j not in body:
                            body.add(j)
                            rest.append(j)
                # The start of the kernel: the head is no way in.
                if 0 not in body and len(body) > 1:
                    found.setdefault(head, set()).update(body)
        return found

    @functools.lru_cache(maxsize=None)  # noqa: B019  (as long as the code)
    def definitions(self, i: int, register: str) -> frozenset[int]:
        """Returns the instructions that may have written it before i."""
        found, seen, rest = set(), set(), list(self.previous[i])
        # What is done under the same condition is done.
        conditions = '', self.instructions[i].predicate
        while rest:
            j = rest.pop()
            if j in seen:
                continue
            seen.add(j)
            if register in self.writes[j]:
                found.add(j)
                if self.instructions[j].predicate in conditions:
                    continue
            rest += self.previous[j]
        return frozenset(found)

    def readers(self, i: int, body: set[int]) -> set[int]:
        """Returns those in a loop that read what it writes."""
        found, seen = set(), set()
        rest = [(j, frozenset(self.writes[i])) for j in self.next[i]]
        while rest:
            j, registers = rest.pop()
            if j not in body or not registers or (j, registers) in seen:
                continue
            seen.add((j, registers))
            each = self.instructions[j]
            if registers.intersection(self.reads[j]):
                found.add(j)
            if not each.predicate:
                registers -= self.writes[j]
            rest += [(k, registers) for k in self.next[j]]
        return found

    @functools.lru_cache(maxsize=None)  # noqa: B019
    def arrays(self, i: int) -> str:
        """Returns the names of those whose pointers reach its address."""
        names: set[str] = set()
        seen: set[int] = set()
        address = next(x for x in self.instructions[i].operands if '[' in x)
        inner = address[address.rindex('['):]   # without desc[...]
        rest = [(i, name) for name in re.findall(r'\bU?R\d+', inner)]
        while rest:
            for j in self.definitions(*rest.pop()) - seen:
                seen.add(j)
                each = self.instructions[j]
                if each.is_load or each.name == 'CALL' or (
                        each.kind == 'convert'):
                    continue    # an index, or no address at all
                rest += [(j, name) for name in self.reads[j]]
                names |= self.pointers[j]
        return '/'.join(sorted(names)) or '?'

    def way(self, start: int, end: int, within: set[int],
            value: Callable[[int], float],
            wanted: frozenset[int] = frozenset()) -> list[int]:
        """Returns that of the highest value, without a turn of a loop.

        If it can, it passes one of those that are wanted.
        """
        order: list[int] = []
        done: dict[int, bool] = {start: False}
        dropped = set()
        stack = [(start, iter(self.next[start]))]
        while stack:
            i, following = stack[-1]
            for j in following:
                if j not in within or (j == start):
                    continue
                if j not in done:
                    done[j] = False
                    stack.append((j, iter(self.next[j])))
                    break
                if not done[j]:
                    dropped.add((i, j))     # back, in a loop within
            else:
                stack.pop()
                done[i] = True
                order.append(i)
        # The best way on from i, and the best of those that are wanted: its
        # value, and where it goes next.
        best: dict[tuple[int, bool], tuple[float, int, bool]] = {}
        for i in order:     # the last first
            for passed in (False, True):
                rest = passed and i not in wanted
                options = [(*best[j, rest][:1], j, rest) for j in self.next[i]
                           if (j, rest) in best and j != start
                           and (i, j) not in dropped]
                if i == end and not rest:
                    options.append((0.0, -1, False))
                if options:
                    most, j, rest = max(options)
                    best[i, passed] = most + value(i), j, rest
        at = start, (start, True) in best
        found = []
        while at in best:
            found.append(at[0])
            at = best[at][1:]
        return found


def read_parameters(
        cubin: bytes, kernel: str, source: str,
) -> tuple[list[Parameter], int, int]:
    """Returns the parameters, the registers, and the bytes of code."""
    sections = {}
    (at,), (size, count, names) = (
        struct.unpack_from('<Q', cubin, 40),
        struct.unpack_from('<HHH', cubin, 58))
    headers = [struct.unpack_from('<IIQQQQ', cubin, at + k * size)
               for k in range(count)]
    strings = headers[names][4]
    for name, _, _, _, start, length in headers:
        end = cubin.index(b'\0', strings + name)
        sections[cubin[strings + name:end].decode()] = (start, length)

    text_size = sections[f'.text.{kernel}'][1]
    offsets: dict[int, int] = {}
    base = registers = 0
    for section in '.nv.info', f'.nv.info.{kernel}':
        start, length = sections[section]
        info, at = cubin[start:start + length], 0
        while at < len(info):
            form, attribute, n = struct.unpack_from('<BBH', info, at)
            at += 4
            if form != 4:
                continue
            if attribute == 0x17:   # KPARAM_INFO
                order, offset = struct.unpack_from('<HH', info, at + 4)
                offsets[order] = offset
            elif attribute == 0x0a:     # PARAM_CBANK
                base, = struct.unpack_from('<H', info, at + 4)
            elif attribute == 0x2f:     # REGCOUNT, of the only function
                registers, = struct.unpack_from('<I', info, at + 4)
            at += n
    return [
        Parameter(name, is_pointer, base + offsets[k])
        for k, (name, is_pointer) in enumerate(declared(kernel, source))
    ], registers, text_size


def declared(kernel: str, source: str) -> list[tuple[str, bool]]:
    """Returns the parameters of a kernel, and whether each is a pointer."""
    match = re.search(
        r'__global__[^;{]*?\b' + kernel + r'\s*\((.*?)\)\s*\{', source,
        re.DOTALL)
    if match is None:
        raise ValueError(f'no {kernel} in the source')
    found = []
    for text in re.sub(r'<[^>]*>', '<>', match[1]).split(','):
        kind, name = re.fullmatch(
            r'\s*(.*?)(\w+)\s*', text, re.DOTALL).groups()  # type: ignore
        # CuPy's arrays begin with the pointer; many weights are numbered.
        name = re.sub(r'^_raw_|\d+$', '', name)
        found.append((name, '*' in kind or 'CArray' in kind))
    return found


class _Functions:
    """Which function, or struct, a line of the source is in."""

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines()
        plain = re.sub(r'__launch_bounds__\([^)]*\)',
                       lambda match: ' ' * len(match[0]), source)
        found = []
        for match in re.finditer(
                r'^(?:struct (?:__align__\(.*\) )?(\w+)|'
                r'(?:extern "C" )?__(?:device|global)__[^;{(]*?(\w+)\s*\()',
                plain, re.MULTILINE):
            found.append((plain.count('\n', 0, match.start()) + 1,
                          match[1] or match[2]))
        self._starts = [line for line, _ in found]
        self._names = [name for _, name in found]

    def of(self, line: int) -> str:
        k = bisect.bisect_right(self._starts, line)
        return self._names[k - 1] if k else ''

    def text(self, line: int) -> str:
        return ' '.join(self.lines[line - 1].split()) if (
            0 < line <= len(self.lines)) else ''


def analyze(case: nvrtc.Case) -> Code:
    """Compiles a kernel, and reads its loops from the machine code."""
    kernel, dtypes, *_ = case.signature
    return analyze_source(
        kernel.name, nvrtc.source(case), str(case.signature),
        isinstance(kernel, _kernels.Raw),
        numpy.dtype(dict(dtypes).get('T', 'f')).itemsize)


def analyze_source(
        kernel: str, source: str, label: str = '', has_headers: bool = True,
        itemsize: int = 4) -> Code:
    cubin, seconds = compile_to_cubin(source, has_headers)
    parameters, registers, size = read_parameters(cubin, kernel, source)
    instructions, labels = read_code(disassemble(cubin))
    return Code(
        f'{kernel} {label}'.rstrip(), kernel, instructions, size, registers,
        seconds, find_loops(
            kernel, Graph(instructions, labels, parameters),
            _Functions(source), itemsize, registers))


def find_loops(
        kernel: str, graph: Graph, functions: _Functions, itemsize: int,
        registers: int) -> list[Loop]:
    """Returns those that access global memory themselves."""
    bodies = graph.loops()
    found = []
    for head, body in sorted(bodies.items()):
        inner = set().union(*[
            other for start, other in bodies.items()
            if start != head and start in body and other < body])
        arrays = {i: graph.arrays(i) for i in sorted(body)
                  if graph.instructions[i].is_load
                  or graph.instructions[i].is_store}
        own = {i: array for i, array in arrays.items() if i not in inner}
        if not own:
            continue
        wanted, unwanted = (
            frozenset([i for i in body if kernel in lines and re.search(
                lines[kernel], ' '.join(map(
                    functions.text, graph.instructions[i].lines)))])
            for lines in (THROUGH, AROUND))
        way = best_way(graph, head, body, own, wanted, unwanted)
        path = Path([graph.instructions[i] for i in way],
                    [arrays.get(i, '') for i in way])
        of_weight = [i for i in own if _is_weight(own[i])]
        lines = graph.instructions[next(
            (i for i in of_weight or own if i in way), next(iter(own)))].lines
        names = list(dict.fromkeys(map(functions.of, lines)))
        entries = next((path.moved(name) for name in WEIGHTS
                        if of_weight and path.moved(name)), 0)
        if not entries:     # of a vector, then
            entries = max([
                n * size for (_, size), n in path.loads.items()] or [0])
        found.append(Loop(
            kernel, tuple(name for name in names if name),
            [functions.text(line) for line in lines
             if not functions.of(line)[:1].isupper()], path,
            entries / itemsize, bool(of_weight),
            not wanted.isdisjoint(way),
            functools.partial(surroundings, graph, head, frozenset(body)),
            registers))
    return found


def best_way(graph: Graph, head: int, body: set[int], arrays: dict[int, str],
             wanted: frozenset[int], unwanted: frozenset[int]) -> list[int]:
    """Returns the way of an iteration that counts; see above."""
    values = dict.fromkeys(body, -1.0)
    for i, array in arrays.items():     # those that are its own
        each = graph.instructions[i]
        values[i] += 1e4 * each.bytes * (100 if _is_weight(array) else 1)
        if each.is_load:
            for j in graph.readers(i, body):
                values[j] += 100
    for i in body:
        if graph.instructions[i].name == 'CALL':    # what is slow, and rare
            values[i] -= 1e3
        if i in unwanted:
            values[i] -= 1e6

    ways = [graph.way(head, i, body, lambda i: values[i], wanted)
            for i in graph.previous[head] if i in body]
    return max(ways, key=lambda way: (
        not wanted.isdisjoint(way), sum([values[i] for i in way])))


def _is_weight(array: str) -> bool:
    return not set(array.split('/')).isdisjoint(WEIGHTS)


def surroundings(
        graph: Graph, head: int, body: frozenset[int]) -> list[Instruction]:
    """Returns the shortest way to a loop and from it to the end."""
    everywhere = set(range(len(graph.instructions)))
    before = graph.way(0, head, everywhere, lambda i: -1)
    after = [
        graph.way(j, k, everywhere - body, lambda i: -1)
        for i in body for j in graph.next[i] if j not in body
        for k, each in enumerate(graph.instructions) if each.name == 'EXIT']
    return [graph.instructions[i] for i in before[:-1] + min(
        filter(None, after), key=len, default=[])]


# The model.


class Pass(NamedTuple):
    """One over an array, by a loop of a kernel."""

    where: str  # in the names of functions or the lines of the loop
    entries: int
    read: tuple[tuple[str, int], ...] = ()      # arrays and their bytes
    written: int = 0
    width: int = 0      # bits of a load of the weight, or any


class Launch(NamedTuple):
    """One of a kernel; without a kernel, one of a library."""

    kernel: str
    grid: int
    block: int
    passes: tuple[Pass, ...]
    steps: int = 0      # of a block, between passes


class Estimate(NamedTuple):
    """Of a launch, in seconds."""

    launch: Launch
    seconds: float
    bound: str          # what takes the most of it


def launches(shape: tuple[int, ...], is_backward: bool) -> list[Launch]:
    """Returns those of one call: K=1, exact gradient of W, float32."""
    m, n, A = shape[0], math.prod(shape[1:]), 4
    size = m * n
    w, gy = ('w', A * size), ('gy', A * size)
    width = 128 if n % 4 == 0 else 32   # bits that are read at once
    is_small = size <= _kernels.FUSED_SIZE
    plan = workspace.plan(
        1, m, n, 1, A, True, is_small, _kernels.BLOCK_SIZE)
    if is_small:
        block = _kernels.FUSED_BLOCK_SIZE
        transposed = Pass(r'\bgo_back\b' if is_backward else r'\biterate\b',
                          size, (w,))
        if not is_backward:
            return [Launch('sn_fused_fwd', 1, block, (
                transposed, transposed, Pass(
                    'multiply_all', size, (w,), A * size, 128)), steps=5)]
        return [Launch('sn_fused_bwd', 1, block, (
            Pass('inner_of_all', size, (w, gy), width=128), transposed,
            Pass('correct_all', size, (gy,), A * size, width)), steps=4)]

    def product(how: workspace.Product, is_transposed: bool, steps: int,
                *read: tuple[str, int]) -> list[Launch]:
        # The weight is (1, m, n), so W^T x is by columns.
        _, parts, is_wide = how.arguments
        where = 'product_by_' + ('columns' if is_transposed else 'rows')
        found = [Launch('sn_product', int(how.blocks), _kernels.BLOCK_SIZE, (
            Pass(where, size, read, width=128 if is_wide else 32),), steps)]
        if how.is_gathered:
            found.append(Launch(
                'sn_gather', int(how.n_sums), _kernels.BLOCK_SIZE, (
                    Pass('y_parts', how.n * int(parts)),), steps=2))
        return found

    if not is_backward:
        return [*product(plan.s, True, 2, w), *product(plan.t, False, 3, w),
                Launch('sn_finish_fwd', int(plan.blocks), _kernels.BLOCK_SIZE,
                       (Pass('multiply_all', size, (w,), A * size, 128),),
                       steps=2)]
    *_, blocks = map(int, plan.correct)
    return [*product(plan.s, True, 2, w, gy),
            Launch('sn_correct_bwd', blocks, _kernels.BLOCK_SIZE,
                   (Pass('correct_all', size, (gy,), A * size, width),),
                   steps=2)]


def floor(shape: tuple[int, ...], is_backward: bool) -> float:
    """The seconds that 3 reads and 1 write of the weight take."""
    size = 4 * math.prod(shape)
    arrays = 3 if is_backward else 2    # W and Y, or W, gY and gW
    again = L2 if arrays * size <= L2_SIZE else HBM
    return arrays * size / HBM + (4 - arrays) * size / again


def estimate(
        shape: tuple[int, ...], is_backward: bool,
        codes: dict[str, Code]) -> list[Estimate]:
    """Returns what each launch takes, without the gaps between them."""
    calls = launches(shape, is_backward)
    touched: dict[str, int] = {}
    for call in calls:
        for each in call.passes:
            touched.update(each.read)
    # What is written has the size of the weight, whatever its name.
    total = sum(touched.values()) + 4 * math.prod(shape)
    seen: set[str] = set()
    found = []
    for call in calls:
        seconds, parts = 0.0, {'steps': call.steps * STEP}
        for each in call.passes:
            bounds = bounds_of(call, each, codes, seen, total <= L2_SIZE)
            bound = max(bounds, key=lambda name: bounds[name])
            seconds += bounds[bound]
            parts[bound] = parts.get(bound, 0) + bounds[bound]
            seen |= {name for name, _ in each.read}
        found.append(Estimate(
            call, seconds + call.steps * STEP,
            max(parts, key=lambda name: parts[name])))
    return found


def bounds_of(call: Launch, each: Pass, codes: dict[str, Code],
              seen: set[str], fits: bool) -> dict[str, float]:
    """Returns the seconds that each resource needs for a pass."""
    again = [name in seen and fits for name, _ in each.read]
    bounds = {'bytes': each.written / HBM + sum(
        size / (L2 if is_again else HBM)
        for (_, size), is_again in zip(each.read, again))}
    latency = LATENCY['l2' if all(again) else 'hbm']
    bounds['latency'] = latency     # at the very least
    if not call.kernel:
        return bounds
    threads = call.grid * call.block
    loop = choose(codes[call.kernel], each, threads)
    iterations = each.entries / (threads * loop.entries)    # of a thread
    blocks = max(1, min(
        THREADS // call.block, BLOCKS,
        REGISTERS // (call.block * (-(-loop.registers // 8) * 8))))
    waves = math.ceil(call.grid / (PROCESSORS * blocks))
    # What surrounds the loop is worth a word where that hardly turns.
    around = loop.setup() if len(call.passes) == 1 else []
    setup = Path(around, [''] * len(around)).cycles[0]
    warps = max(each.entries / loop.entries / 32, 1)
    quarters = 4 * min(PROCESSORS, call.grid)
    cycles, unit = loop.path.cycles
    bounds[unit] = warps * (cycles + setup / max(iterations, 1)) / (
        quarters * CLOCK * UTILIZATION)
    # Vectors and numbers are small, and soon in L2.
    *_, waiting = loop.path.follow(lambda array: (
        latency if _is_weight(array) else LATENCY['l2']))
    bounds['latency'] = waves * max(math.ceil(iterations) * waiting, latency)
    return bounds


def choose(code: Code, each: Pass, threads: int) -> Loop:
    """Returns the loop of a pass: unrolled, if there is enough for it."""
    wanted = {name for name, _ in each.read}
    found = [loop for loop in code.loops
             if loop.entries and not loop.is_rare
             and loop.path.arrays.intersection(WEIGHTS) == wanted
             and re.search(each.where, ' '.join(
                 [*loop.functions, *loop.lines]))
             and each.width in (0, *[
                 8 * size for name, size in loop.path.loads
                 if _is_weight(name)])]
    if not found:
        raise LookupError(
            f'{code.kernel} has no loop of {wanted} at {each.where!r}')
    found = [loop for loop in found if loop.is_through] or found
    enough = [loop for loop in found
              if loop.entries * threads <= each.entries]
    return max(enough or found, key=lambda loop: (
        loop.entries if enough else -loop.entries,
        -len(loop.path.instructions)))


# What is printed.


def loop_rows(codes: Iterable[Code], everything: bool) -> Iterator[list[str]]:
    for code in codes:
        hot = [loop for loop in code.loops
               if loop.entries and not loop.is_rare]
        for loop in code.loops if everything else [
                loop for loop in hot if loop.is_of_weight] or hot:
            path, kinds = loop.path, loop.path.kinds
            n = len(path.instructions)
            yield [
                code.kernel, loop.name, loop.lines[0] if loop.lines else '',
                f'{loop.entries:g}', str(n),
                f'{n / loop.entries:.1f}' if loop.entries else '',
                str(kinds['integer'] + kinds['multiply']),
                str(kinds['float32']),
                str(kinds['float64'] + kinds['convert']),
                str(kinds['memory']), str(kinds['other']),
                _accesses(path.loads), _accesses(path.stores),
                f'{path.in_flight} ({path.bytes_in_flight} B)',
                f'{path.rounds:g}', str(code.registers)]


def _accesses(counter: collections.Counter[tuple[str, int]]) -> str:
    return ', '.join([
        f'{array} {n}x{8 * size}'
        for (array, size), n in sorted(counter.items())])


def code_rows(codes: Iterable[Code]) -> Iterator[list[str]]:
    for code in codes:
        yield [code.label, f'{code.size / 1024:.1f}', str(code.registers),
               f'{code.seconds:.2f}']


def time_of(calls: Iterable[Estimate]) -> float:
    """Seconds of launches in a graph."""
    return sum([each.seconds + GAP for each in calls])


def estimate_rows(codes: dict[str, Code], details: bool,
                  ) -> Iterator[list[str]]:
    for shape in SHAPES:
        ways = [estimate(shape, is_backward, codes)
                for is_backward in (False, True)]
        floors = [floor(shape, is_backward) for is_backward in (False, True)]
        times = [time_of(calls) for calls in ways]
        ratio = sum(times) / sum(floors)
        row = ['x'.join(map(str, shape)),
               ' + '.join([str(len(calls)) for calls in ways]),
               *[f'{1e6 * seconds:.1f}' for seconds in (
                   floors[0], times[0], floors[1], times[1])],
               f'{ratio:.2f}' if ratio < 10 else '']
        if details:
            row += [', '.join([
                f'{each.launch.kernel} {1e6 * each.seconds:.1f} '
                f'({each.bound})' for each in calls]) for calls in ways]
        yield row


def path_rows(codes: dict[str, Code]) -> Iterator[list[str]]:
    """Forward and backward by one block, and by many."""
    for k in range(10, 18):
        shape = (1 << k // 2, 1 << k - k // 2)
        row = [f'{1 << k}']
        for size in (1 << k, 0):
            with mock.patch.object(_kernels, 'FUSED_SIZE', size):
                row.append('{:.1f}'.format(1e6 * sum([
                    time_of(estimate(shape, is_backward, codes))
                    for is_backward in (False, True)])))
        yield row


def show(title: str, columns: tuple[str, ...], rows: Iterable[list[str]],
         style: str) -> None:
    rows = list(rows)
    print()
    if style != 'text':     # what is of the source is literal
        mark = '``' if style == 'rst' else '`'
        code = [columns.index(name) for name in columns
                if name in ('functions', 'line')]
        rows = [[f'{mark}{cell}{mark}' if k in code and cell else cell
                 for k, cell in enumerate(row)] for row in rows]
    rows.insert(0, list(columns))
    if style == 'rst':
        print(f'.. list-table:: {title}\n   :header-rows: 1\n')
        for row in rows:
            for k, cell in enumerate(row):
                print(f'   {"  -" if k else "* -"} {cell}'.rstrip())
        return
    print(f'{title}\n')
    if style == 'markdown':
        rows.insert(1, ['---'] * len(columns))
        for row in rows:
            print('| ' + ' | '.join(
                [cell.replace('|', '\\|') for cell in row]) + ' |')
        return
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join([cell.ljust(width) for cell, width in zip(
            row, widths)]).rstrip())


def cases(names: Iterable[str] = ()) -> list[nvrtc.Case]:
    """Returns those for float32, of the kernels so named or of all."""
    names = list(names)
    return [
        nvrtc.Case(signature, nvrtc.usual_layout(kernel), ARCH)
        for kernel in _kernels.ALL if not names or kernel.name in names
        for signature in nvrtc.signatures(kernel)
        if {char for _, char in signature.dtypes} == {'f'}]


def main() -> int:
    parser = argparse.ArgumentParser(
        'python -m tests.tools.sass', description=__doc__.split('\n')[0])
    parser.add_argument('kernels', nargs='*', metavar='KERNEL',
                        help='only these, and no estimate')
    parser.add_argument('--all', action='store_true',
                        help='show rare loops and those of vectors, too')
    parser.add_argument('--estimate', action='store_true',
                        help='only the estimate')
    style = parser.add_mutually_exclusive_group()
    style.add_argument('--markdown', dest='style', action='store_const',
                       const='markdown', default='text')
    style.add_argument('--rst', dest='style', action='store_const',
                       const='rst')
    args = parser.parse_args()
    try:
        nvrtc.load()
        find_nvdisasm()
    except nvrtc.Unavailable as e:
        print(e, file=sys.stderr)
        return 2
    codes = [analyze(case) for case in cases(args.kernels)]
    if not args.estimate:
        show(f'Loops that read or write a weight, float32, {ARCH}',
             COLUMNS, loop_rows(codes if args.all else by_kernel(
                 codes).values(), args.all), args.style)
        show('Machine code', ('kernel', 'KB', 'registers', 'NVRTC, s'),
             code_rows(codes), args.style)
    if not args.kernels:    # which has to follow launches()
        details = args.style == 'text'
        columns = ('weight', 'launches', 'floor', 'forward', 'floor ',
                   'backward', 'of the floors')
        show('Estimated, not measured: one weight on an H100 in a graph, us, '
             'float32, K=1', (*columns, 'forward: us (bound by)',
                              'backward') if details else columns,
             estimate_rows(by_kernel(codes), details), args.style)
        show('Estimated, not measured: forward and backward, us',
             ('entries', 'one block', 'many blocks'),
             path_rows(by_kernel(codes)), args.style)
    return 0


def by_kernel(codes: Iterable[Code]) -> dict[str, Code]:
    """Returns the first of each kernel: for one weight, with arrays."""
    found: dict[str, Code] = {}
    for code in codes:
        found.setdefault(code.kernel, code)
    return found


if __name__ == '__main__':
    sys.exit(main())
