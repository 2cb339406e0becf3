"""Compiles CUDA C++ for the host, and loads it.

A module is compiled once: it is kept in the process and in the folder
``.cache/cuda_on_host`` under a hash of all that went into it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile

_HERE = os.path.dirname(os.path.abspath(__file__))
INCLUDE = os.path.join(_HERE, 'include')
CACHE = os.path.join(
    os.path.dirname(os.path.dirname(_HERE)), '.cache', 'cuda_on_host')

_FLAGS = (
    '-O1', '-ffp-contract=off', '-fno-strict-aliasing', '-fPIC',
    '-fvisibility=hidden', '-fwrapv', '-w',
    '-fstack-clash-protection')  # no frame steps over the guard of a stack
# What the compiler of CUDA takes and what makes no difference here.
_IGNORED = re.compile(
    r'--?(use_fast_math|fmad|ftz|prec-div|prec-sqrt|lineinfo|G|O\d|'
    r'device-debug|generate-line-info|maxrregcount|restrict|'
    r'extra-device-vectorization|gpu-architecture|arch|w|'
    r'default-device|split-compile)(=.*)?$')


class CompileError(RuntimeError):
    """The compiler refuses a source."""


@functools.lru_cache(maxsize=None)
def _compiler():
    """Return the command of the compiler and what it says of itself."""
    if not sys.platform.startswith('linux'):
        raise RuntimeError(
            'kernels run on the host under Linux only: their shared memory '
            'is found in ELF files')
    candidates = [os.environ.get('CXX'), 'g++', 'c++', 'clang++']
    for candidate in filter(None, candidates):
        words = candidate.split()
        path = words and shutil.which(words[0])
        if path:
            command = (path, *words[1:])
            version = subprocess.run(
                [*command, '--version'], stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, check=False).stdout
            return command, version
    raise RuntimeError(
        'no C++ compiler found: install g++ (the package "g++" of Debian '
        'and Ubuntu, "gcc-c++" of Fedora) or clang++, or name one in $CXX')


def available():
    """Tell whether kernels can be compiled here."""
    try:
        _compiler()
    except RuntimeError:
        return False
    return True


@functools.lru_cache(maxsize=None)
def _headers():
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(INCLUDE):
        folders.sort()
        for name in sorted(names):
            with open(os.path.join(folder, name), 'rb') as f:
                digest.update(name.encode() + b'\0' + f.read() + b'\0')
    return digest.digest()


def _run(command, source):
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        check=False)
    if result.returncode:
        raise CompileError('{}\n{}'.format(
            result.stdout.decode(errors='replace'), source))


# The variables of functions that outlive a call and start as zeros; what is
# __shared__ is among them.
_STATIC = re.compile(
    r'(\.comm\s+_ZZ\w+,)(\d+)()'
    r'|(\.size\s+_ZZ\w+,\s*)(\d+)(\s+_ZZ\w+:\s+\.zero\s+)\d+'
    r'|(\b_ZZ\w+:\s+\.zero\s+)(\d+)(\s+\.size\s+_ZZ\w+,\s*)\d+')
_GUARD = 4096


def _guarded(assembly):
    """Add bytes behind the shared variables; no write may reach them."""
    def add(match):
        # g++ says the size before, clang++ behind.
        head, size, middle = [
            g for g in match.groups() if g is not None]
        size = int(size) + _GUARD
        return '{}{}{}'.format(
            head, size, f'{middle}{size}' if middle else '')
    return _STATIC.sub(add, assembly)


def _build(source, flags, link):
    """Return the path of the library, compiled if it is not there."""
    command, version = _compiler()
    key = hashlib.sha256(repr(
        (source, flags, link, command, version, _headers())).encode())
    name = key.hexdigest()[:40]
    path = os.path.join(CACHE, name + '.so')
    if os.path.exists(path):
        return path
    os.makedirs(CACHE, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        text = os.path.join(folder, 'kernel.cpp')
        made = os.path.join(folder, 'kernel.s')
        library = os.path.join(folder, 'kernel.so')
        with open(text, 'w', encoding='utf-8') as f:
            f.write(source)
        _run([*command, *flags, '-I', INCLUDE, '-S', '-o', made, text],
             source)
        with open(made, encoding='utf-8') as f:
            assembly = f.read()
        with open(made, 'w', encoding='utf-8') as f:
            f.write(_guarded(assembly))
        # Linked without -fsanitize: its functions are in the runtime.
        _run([*command, '-shared', '-Wl,-soname,' + name + '.so', '-o',
              library, made, *link], source)
        # Whole or not at all; the first one stays, as it may be loaded.
        with contextlib.suppress(FileExistsError):
            os.link(library, path)
    return path


@functools.lru_cache(maxsize=None)
def _runtime_path():
    with open(os.path.join(INCLUDE, 'runtime.cpp'), encoding='utf-8') as f:
        source = f.read()
    flags = ('-std=c++17', '-O2', '-fPIC', '-fno-strict-aliasing',
             '-U_FORTIFY_SOURCE', '-Wall')
    return _build(source, flags, ('-pthread',))


@functools.lru_cache(maxsize=None)
def runtime():
    """Return the library that runs kernels."""
    # The lock of the interpreter is held: there is one launch at a time.
    library = ctypes.PyDLL(_runtime_path())
    library.coh_launch.argtypes = [ctypes.c_void_p]
    library.coh_launch.restype = ctypes.c_int
    return library


def _symbols(path):
    """Yield name, address, size of the objects of an ELF file."""
    with open(path, 'rb') as f:
        data = f.read()
    if data[:5] != b'\x7fELF\x02':
        raise RuntimeError('not a library of 64 bits: ' + path)
    order = '<' if data[5] == 1 else '>'
    table, = struct.unpack_from(order + 'Q', data, 40)
    entry_size, n = struct.unpack_from(order + 'HH', data, 58)
    sections = [
        struct.unpack_from(order + 'IIQQQQIIQQ', data, table + i * entry_size)
        for i in range(n)]
    for section in sections:
        if section[1] != 2:  # SHT_SYMTAB
            continue
        names = sections[section[6]][4]
        start, size, step = section[4], section[5], section[9]
        for at in range(start, start + size, step):
            name, info, _, index, address, length = struct.unpack_from(
                order + 'IBBHQQ', data, at)
            end = data.index(b'\0', names + name)
            text = data[names + name:end].decode()
            zeros = 0 < index < n and sections[index][1] == 8  # SHT_NOBITS
            yield text, info & 15, address, length, zeros


class Parameter:
    """A parameter of a kernel, as the compiler sees it."""

    __slots__ = ('code', 'const', 'name', 'pointer', 'size')

    def __init__(self, pointer, const, code, size):
        self.pointer = bool(pointer)
        self.const = bool(const)
        self.code = chr(code)
        self.size = size
        self.name = None

    def __str__(self):
        if self.code == 'v':
            name = 'void'
        elif self.code == 'x':
            name = f'a type of {self.size} bytes'
        elif self.code == 'b':
            name = 'bool'
        else:
            name = '{}{}'.format(
                {'i': 'int', 'u': 'uint', 'f': 'float'}[self.code],
                8 * self.size)
        if self.const:
            name = 'const ' + name
        return name + ' *' if self.pointer else name


class Function:
    """A compiled kernel, ready to be launched."""

    def __init__(self, library, path, name):
        self.name = name
        self.library = library  # keeps it loaded
        self.thunk = ctypes.cast(library.coh_thunk, ctypes.c_void_p).value
        room = (ctypes.c_int64 * (4 * 1024))()  # 4 KB of parameters
        n = library.coh_describe(ctypes.byref(room))
        self.parameters = [
            Parameter(*room[4 * i:4 * i + 4]) for i in range(n)]
        statics = []
        base = None
        for text, kind, address, size, zeros in _symbols(path):
            if text == 'coh_thunk':
                base = self.thunk - address
            elif (kind == 1 and size > _GUARD and zeros
                    and text.startswith('_ZZ')):
                statics.append((address, size - _GUARD))
        flat = [x for a, size in statics for x in (base + a, size, _GUARD)]
        self.statics = (ctypes.c_int64 * max(1, len(flat)))(*flat)
        self.n_statics = len(statics)
        self.static_size = sum(size for _, size in statics)


_DYNAMIC = re.compile(
    r'\bextern\s+'
    r'((?:__align__|alignas)\s*\([^()]*(?:\([^()]*\))?[^()]*\)\s*)?'
    r'__shared__\s+'
    r'((?:__align__|alignas)\s*\([^()]*(?:\([^()]*\))?[^()]*\)\s*)?'
    r'([A-Za-z_][\w:<>,\s]*?)\s*\b(\w+)\s*\[\s*\]\s*;')


def _dynamic(match):
    lines = '\n' * match.group(0).count('\n')
    kind, name = ' '.join(match.group(3).split()), match.group(4)
    return (f'{kind} *const {name} = '
            f'reinterpret_cast<{kind} *>(coh_dynamic_shared);{lines}')


def _translate_options(options):
    if isinstance(options, str):
        raise TypeError('options must be a tuple of str')
    standard, others = '-std=c++17', []
    rest = list(options)
    while rest:
        option = rest.pop(0)
        match = re.match(r'--?std=(\S+)$', option)
        if match:
            standard = '-std=' + match.group(1)
        elif re.match(r'-[DUI]$', option) and rest:
            others += [option, rest.pop(0)]
        elif re.match(r'-[DUI].', option):
            others.append(option)
        elif not _IGNORED.match(option):
            raise ValueError(f'option {option!r} is not known here')
    return (standard, *others)


_find_races = [False]


@contextlib.contextmanager
def races():
    """Let launches in a block fail where two threads race for memory.

    It finds two accesses, one of them a write, with no barrier between,
    in whichever order the threads happen to run.  Between blocks nothing is
    a barrier, but an atomic operation behind a __threadfence() shows what
    was done before it to blocks that do one on the same place later.  It is
    slow.
    """
    saved = _find_races[0]
    _find_races[0] = True
    try:
        yield
    finally:
        _find_races[0] = saved


def variant():
    """Return what decides, besides its source, how a kernel is compiled."""
    return _find_races[0]


def load(source, name, options=()):
    """Compile the source of CUDA and return its kernel `name`."""
    return _load(source, name, tuple(options), variant())


@functools.lru_cache(maxsize=None)
def _load(source, name, options, find_races):
    text = _DYNAMIC.sub(_dynamic, source)
    match = re.search(r'\bextern\s[^;{}]*__shared__[^;]*;', text)
    if match:
        raise CompileError(
            'cannot read this declaration: ' + match.group(0))
    text = f'#include "cuda_on_host.h"\n#line 1\n{text}\nCOH_EXPORT({name})\n'
    flags = (*_translate_options(options), *_FLAGS,
             '-fsanitize=bounds,alignment')
    if find_races:
        flags = (*flags, '-fsanitize=thread', '-DCOH_RACES')
    if 'clang' not in _compiler()[1].decode(errors='replace'):
        flags = (*flags, '-fno-gnu-unique')
    runtime()
    folder, base = os.path.split(_runtime_path())
    link = ('-L' + folder, '-l:' + base, '-Wl,-rpath,$ORIGIN',
            '-Wl,-Bsymbolic')
    path = _build(text, flags, link)
    function = Function(ctypes.PyDLL(path), path, name)
    names = parameter_names(source, name, len(function.parameters))
    for parameter, text in zip(function.parameters, names):
        parameter.name = text
    return function


def parameter_names(source, name, n):
    """Return the names of the parameters, as far as they can be read."""
    source = re.sub(r'//[^\n]*|/\*.*?\*/', ' ', source, flags=re.S)
    for match in re.finditer(r'\b' + re.escape(name) + r'\s*\(', source):
        depth, pieces, start = 1, [], match.end()
        for at in range(match.end(), len(source)):
            c = source[at]
            depth += (c in '(<[{') - (c in ')>]}')
            if (c == ',' and depth == 1) or depth == 0:
                pieces.append(source[start:at])
                start = at + 1
            if depth == 0:
                break
        found = [re.search(r'(\w+)\s*(\[\w*\])?\s*$', p) for p in pieces]
        if len(pieces) == n and all(found):
            return [m.group(1) for m in found]
    return [str(i) for i in range(n)]
