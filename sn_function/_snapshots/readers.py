"""Files of named arrays: .npz, HDF5, safetensors and PyTorch's .pt.

A reader gives the shape of an entry without reading its data, and reads one
entry at a time.  Nothing is unpickled: a pickle in a .npz is copied as bytes,
and a .pt is read by PyTorch, with ``weights_only=True``.  :mod:`.writers`
writes such files.
"""
from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import stat
import zipfile
from typing import Any, Callable, Iterator, NamedTuple

import numpy
from numpy.lib import format as npy

from sn_function import errors

Path = Any  # str or os.PathLike
_CHUNK = 1 << 20
# What gzip makes of one byte at most.  No writer of snapshots packs denser.
_EXPANSION = 1032
# Those of weights, by their names in NumPy and PyTorch, and in safetensors.
_FLOATS = ('float16', 'float32', 'float64', 'bfloat16',
           'F16', 'F32', 'F64', 'BF16')


class Entry(NamedTuple):
    """What is known of an entry without reading it.

    ``shape`` is ``None`` where it holds no plain array: a pickled object, as
    Chainer's ``None`` is in a .npz, or an empty dataset of HDF5.
    """

    shape: tuple[int, ...] | None
    dtype: str
    nbytes: int = 0

    @property
    def is_plain(self) -> bool:
        return self.shape is not None

    @property
    def is_float(self) -> bool:
        return self.dtype in _FLOATS


class Reader:
    """A file of named arrays; its methods raise SnapshotError alone."""

    kind = ''

    def __init__(self, path: Path) -> None:
        self.path = os.fspath(path)
        self.keys: list[str] = []
        self.ignored: list[str] = []  # keys of what is no array

    def close(self) -> None:
        pass

    def entry(self, key: str) -> Entry:
        entry: Entry = self.guarded(key, self._entry)
        # Or a small file takes all memory, or fills the disk.
        if entry.nbytes > _EXPANSION * os.path.getsize(self.path):
            raise errors.SnapshotEntryError(
                self.path, key, f'it would be {entry.nbytes} bytes, more than '
                f'a file of this size can hold')
        return entry

    def read(self, key: str) -> Any:
        """Returns an array of the machine's byte order, C-contiguous."""
        if not self.entry(key).is_plain:
            raise errors.SnapshotPickleError(self.path, key)
        array = self.guarded(key, self._read)
        return array.astype(
            array.dtype.newbyteorder('='), order='C', copy=False)

    def verify(self, key: str) -> None:
        """Reads an entry to its end, if that shows whether it is damaged."""

    def guarded(self, key: str, function: Callable[[str], Any]) -> Any:
        try:
            return function(key)
        except (errors.SnapshotError, MemoryError):
            raise
        except Exception as e:  # a damaged file may raise anything
            raise errors.SnapshotEntryError(
                self.path, key, first_line(e)) from e

    def _entry(self, key: str) -> Entry:
        raise NotImplementedError

    def _read(self, key: str) -> Any:
        raise NotImplementedError


class NpzReader(Reader):

    kind = 'npz'

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._zip = zipfile.ZipFile(self.path)
        self._entries: dict[str, Entry] = {}
        self.members = {_key_of(each.filename): each
                        for each in self._zip.infolist()
                        if not each.is_dir()}
        self.keys = list(self.members)
        if len(self.keys) != sum(
                not each.is_dir() for each in self._zip.infolist()):
            self.close()
            raise zipfile.BadZipFile('two entries have the same name')

    @property
    def is_compressed(self) -> bool:
        return any(each.compress_type != zipfile.ZIP_STORED
                   for each in self.members.values())

    def close(self) -> None:
        self._zip.close()

    def _entry(self, key: str) -> Entry:
        if key not in self._entries:
            info = self.members[key]
            # zipfile unpacks the others in one go, whatever their size.
            if info.compress_type not in (
                    zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError('it is compressed as no .npz is')
            if not info.filename.endswith('.npy'):
                self._entries[key] = Entry(None, 'bytes', info.file_size)
            else:
                with self._zip.open(info) as file:
                    self._entries[key] = _header(file, info.file_size)
        return self._entries[key]

    def _read(self, key: str) -> Any:
        with self._zip.open(self.members[key]) as file:
            array = npy.read_array(file, allow_pickle=False)
            if file.read(1):  # at the end the checksum is compared
                raise ValueError('there is more data than its header says')
        return array

    def verify(self, key: str) -> None:
        self.guarded(key, lambda key: self.copy(key, None))

    def copy(self, key: str, file: Any) -> None:
        """Copies the bytes of an entry, whatever they are."""
        self.entry(key)     # raises where it is compressed too much
        with self._zip.open(self.members[key]) as source:
            for chunk in iter(lambda: source.read(_CHUNK), b''):
                if file is not None:
                    file.write(chunk)


def _key_of(filename: str) -> str:
    return filename[:-4] if filename.endswith('.npy') else filename


def _header(file: Any, size: int) -> Entry:
    version = npy.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = npy.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = npy.read_array_header_2_0(file)
    else:
        return Entry(None, 'structure', size)
    if dtype.hasobject:
        return Entry(None, 'object', size)
    nbytes = math.prod(shape) * dtype.itemsize
    # Checked before memory is allocated for what a damaged header says.
    if any(n < 0 for n in shape) or nbytes != size - file.tell():
        raise ValueError(f'its header says shape {shape} and dtype {dtype}, '
                         f'which is not the size of the data')
    return Entry(tuple(shape), dtype.name, nbytes)


class HDF5Reader(Reader):

    kind = 'hdf5'

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        h5py = import_package('h5py', self.path)
        self._file = h5py.File(self.path, 'r')

        def add(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                self.keys.append(name)

        self._file.visititems(add)

    def close(self) -> None:
        self._file.close()

    def _entry(self, key: str) -> Entry:
        dataset = self._file[key]
        if dataset.external or dataset.is_virtual:
            raise ValueError('its data is in another file, which is not read')
        if dataset.shape is None or dataset.dtype.hasobject:
            return Entry(None, 'object')
        return Entry(dataset.shape, dataset.dtype.name,
                     dataset.size * dataset.dtype.itemsize)

    def _read(self, key: str) -> Any:
        return numpy.asarray(self._file[key][()])

    @property
    def is_compressed(self) -> bool:
        return any(self._file[key].compression_opts for key in self.keys)

    def verify(self, key: str) -> None:
        # What is compressed by gzip has a checksum.
        if self.entry(key).is_plain:
            self.guarded(key, self._read)

    def is_empty(self, key: str) -> bool:
        """Whether it is the dataset that Chainer writes for None."""
        return self._file[key].shape is None


class SafetensorsReader(Reader):

    kind = 'safetensors'

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        safetensors = import_package('safetensors', self.path)
        self._file = safetensors.safe_open(self.path, framework='numpy')
        self.keys = list(self._file.keys())

    def _entry(self, key: str) -> Entry:
        part = self._file.get_slice(key)
        shape = tuple(part.get_shape())
        return Entry(shape, part.get_dtype(), 4 * math.prod(shape))

    def _read(self, key: str) -> Any:
        if self._file.get_slice(key).get_dtype() == 'BF16':
            return self._read_bfloat16(key)
        return self._file.get_tensor(key)

    def _read_bfloat16(self, key: str) -> Any:
        # NumPy has none; float32 holds all of its values.
        with open(self.path, 'rb') as file:
            n = int.from_bytes(file.read(8), 'little')
            about = json.loads(file.read(n))[key]
            begin, end = about['data_offsets']
            file.seek(8 + n + begin)
            x = numpy.frombuffer(file.read(end - begin), '<u2')
        return (x.astype('<u4') << 16).view('<f4').reshape(about['shape'])


class TorchReader(Reader):

    kind = 'torch'

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        torch = import_package('torch', self.path)
        found = self._load(torch)
        self._tensors = {
            key: value for key, value in found.items()
            if isinstance(key, str) and isinstance(value, torch.Tensor)
        } if isinstance(found, dict) else {}
        if not self._tensors:
            names = ', '.join(map(repr, found)) if isinstance(
                found, dict) else f'a {type(found).__name__}'
            raise errors.SnapshotFileError(
                self.path, f'it holds no tensors, but {names}',
                'Save the state dict by itself: '
                'torch.save(model.state_dict(), path)')
        self.keys = list(self._tensors)
        self.ignored = [str(key) for key in found if key not in self._tensors]

    def _load(self, torch: Any) -> Any:
        version = tuple(map(int, torch.__version__.split('.')[:2]))
        if version < (2, 10):
            # CVE-2025-32434, CVE-2026-24747: there weights_only is not safe.
            raise errors.SnapshotFileError(
                self.path, f'PyTorch {torch.__version__} may run code that '
                f'is in a .pt file', 'Install PyTorch 2.10 or newer, or save '
                'the state dict by safetensors.torch.save_file.')
        is_zip = zipfile.is_zipfile(self.path)
        if is_zip:
            # PyTorch does not compare the checksums of what it maps.
            with zipfile.ZipFile(self.path) as file:
                if any(each.compress_type for each in file.infolist()):
                    raise ValueError('it is compressed as no .pt is')
                damaged = file.testzip()
            if damaged:
                raise ValueError(f'its part {damaged} is damaged')
        return torch.load(self.path, map_location='cpu', weights_only=True,
                          **({'mmap': True} if is_zip else {}))

    def _entry(self, key: str) -> Entry:
        x = self._tensors[key]
        return Entry(tuple(x.shape), str(x.dtype).split('.')[-1],
                     x.numel() * x.element_size())

    def _read(self, key: str) -> Any:
        x = self._tensors[key].detach()
        # NumPy has no bfloat16; float32 holds all of its values.
        return (x.float() if str(x.dtype) == 'torch.bfloat16' else x).numpy()


_READERS = {each.kind: each for each in (
    NpzReader, HDF5Reader, SafetensorsReader, TorchReader)}


def _kind_of_content(path: str) -> str:
    """Returns the kind of a file, by its first bytes."""
    if stat.S_ISFIFO(os.stat(path).st_mode):
        raise errors.SnapshotFileError(
            path, 'it is a pipe, which can be read once only',
            'Give the path of a file.')
    with open(path, 'rb') as file:
        head = file.read(16)
    if not head:
        raise errors.SnapshotFileError(
            path, 'it is empty', 'Save the snapshot again.')
    if head.startswith(b'\x89HDF\r\n\x1a\n'):
        return 'hdf5'
    if head.startswith(b'PK'):
        with contextlib.suppress(Exception), zipfile.ZipFile(path) as file:
            if any(name.endswith('/data.pkl') for name in file.namelist()):
                return 'torch'
        return 'npz'
    if head[8:9] == b'{':
        return 'safetensors'
    if path.endswith(('.pt', '.pth')):
        return 'torch'
    known = {b'\x93NUMPY': 'one array in a .npy file',
             b'\x1f\x8b': 'compressed by gzip; run gunzip on it first',
             b'\x80': 'a pickle, which may run code and is never opened'}
    what = next((f' but {what}' for magic, what in known.items()
                 if head.startswith(magic)), '')
    raise errors.SnapshotFileError(
        path, f'it is no .npz, HDF5, safetensors or .pt file{what}',
        'Give a snapshot by chainer.serializers.save_npz or save_hdf5, or by '
        'the trainer, or a state dict.')


@contextlib.contextmanager
def open_snapshot(path: Path) -> Iterator[Reader]:
    """Opens a file, of the kind that its first bytes show.

    Raises:
        SnapshotFileError: It is not there, damaged, or nothing of this kind.

    """
    path = os.fspath(path)
    try:
        kind = _kind_of_content(path)
        reader = _READERS[kind](path)
    except errors.SnapshotError:
        raise
    except OSError as e:
        if e.errno is None:  # of HDF5, without a number
            raise _damaged(path, e) from e
        raise errors.SnapshotFileError(
            path, f'it cannot be opened: {e.strerror}',
            'Give the path of a snapshot.') from e
    except Exception as e:  # a damaged file may raise anything
        raise _damaged(path, e) from e
    with contextlib.closing(reader):
        yield reader


def _damaged(path: str, e: Exception) -> errors.SnapshotFileError:
    return errors.SnapshotFileError(
        path, f'it is truncated or damaged: {first_line(e)}',
        'Take another copy of the file, or save it again.')


def first_line(e: BaseException) -> str:
    text = str(e).strip() or type(e).__name__
    return text.splitlines()[0].rstrip('.')[:200]


def import_package(package: str, path: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise errors.SnapshotPackageError(
            path, package, first_line(e)) from e
