"""Writes files of named arrays, of the kinds of :mod:`.readers`.

A writer takes one entry at a time.  It writes to a temporary file beside the
output, which takes its name once everything is on the disk.
"""
from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import tempfile
import threading
import zipfile
from typing import Any, Callable, Iterator

import numpy
from numpy.lib import format as npy

from sn_function import errors
from sn_function._snapshots.readers import (
    HDF5Reader,
    NpzReader,
    Path,
    Reader,
    first_line,
    import_package,
)


class Writer:
    """A file of named arrays that is being written."""

    def __init__(self, path: str, compress: bool) -> None:
        raise NotImplementedError

    def can_hold(self, array: Any) -> bool:
        return array.dtype.kind in 'fiub'

    def write(self, key: str, array: Any) -> None:
        raise NotImplementedError

    def copy(self, reader: Reader, key: str, new_key: str) -> bool:
        """Copies an entry; returns False where this file cannot hold it."""
        if not reader.entry(key).is_plain:
            return False
        array = reader.read(key)
        if not self.can_hold(array):
            return False
        self.write(new_key, array)
        return True

    def finish(self) -> None:
        """Writes what is left to be written."""

    def close(self) -> None:
        pass


class NpzWriter(Writer):

    def __init__(self, path: str, compress: bool) -> None:
        self._compression = (
            zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED)
        self._zip = zipfile.ZipFile(path, 'w')

    def can_hold(self, array: Any) -> bool:
        return True

    def _open(self, filename: str) -> Any:
        info = zipfile.ZipInfo(filename)  # dated 1980: equal input and output
        info.compress_type = self._compression
        info.external_attr = 0o600 << 16
        return self._zip.open(info, 'w', force_zip64=True)

    def write(self, key: str, array: Any) -> None:
        with self._open(key + '.npy') as file:
            # This writes a pickle, and opens none: Chainer's None.
            npy.write_array(file, array, allow_pickle=array.dtype.hasobject)

    def copy(self, reader: Reader, key: str, new_key: str) -> bool:
        if isinstance(reader, NpzReader):
            name = reader.members[key].filename
            with self._open(new_key + name[len(key):]) as file:
                reader.guarded(key, lambda key: reader.copy(key, file))
            return True
        if isinstance(reader, HDF5Reader) and reader.is_empty(key):
            self.write(new_key, numpy.asarray(None))
            return True
        return super().copy(reader, key, new_key)

    def close(self) -> None:
        self._zip.close()


class HDF5Writer(Writer):

    def __init__(self, path: str, compress: bool) -> None:
        self._h5py = import_package('h5py', path)
        self._raw = _Forgiving(path, 'w+')
        self._file = self._h5py.File(self._raw, 'w')
        self._compression = 4 if compress else None  # as save_hdf5 has it

    def write(self, key: str, array: Any) -> None:
        self._create(
            key, data=array,
            compression=self._compression if array.size > 1 else None)

    def _create(self, key: str, **kwargs: Any) -> None:
        try:
            with _interrupts_after():
                self._file.create_dataset('/' + key, **kwargs)
        except (TypeError, ValueError) as e:
            raise OSError(
                f'HDF5 has no place for {key!r}: {first_line(e)}') from e
        self._raw.check()

    def copy(self, reader: Reader, key: str, new_key: str) -> bool:
        if isinstance(reader, HDF5Reader) and reader.is_empty(key):
            empty = self._h5py.Empty('f')
            self._create(new_key, data=empty)
            return True
        return super().copy(reader, key, new_key)

    def finish(self) -> None:
        with _interrupts_after():
            self._file.close()
        self._raw.check()

    def close(self) -> None:
        with _interrupts_after():
            self._file.close()
        self._raw.close()


class _Forgiving(io.FileIO):
    """Stores the first error of writing.

    HDF5 crashes if it sees one, and PyTorch does not say what it was.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        data = memoryview(data).cast('B')
        n = 0
        try:
            while n < len(data) and self.error is None:
                n += super().write(data[n:])
        except OSError as e:
            self.error = e
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as e:
            self.error = self.error or e
            return size or 0

    def check(self) -> None:
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def _interrupts_after() -> Iterator[None]:
    """Has an interrupt wait for the end, as HDF5 crashes in one."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or (
            threading.current_thread() is not threading.main_thread()):
        yield
        return
    seen: list[Any] = []
    signal.signal(signal.SIGINT, lambda *args: seen.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if seen:
            handler(*seen[0])


class SafetensorsWriter(Writer):
    # Both this format and the next are written in one piece.

    def __init__(self, path: str, compress: bool) -> None:
        self._save = import_package('safetensors.numpy', path).save_file
        self._path = path
        self._arrays: dict[str, Any] = {}

    def write(self, key: str, array: Any) -> None:
        self._arrays[key] = array

    def finish(self) -> None:
        try:
            self._save_all()
        except OSError:
            raise
        except Exception as e:  # that of safetensors
            raise OSError(first_line(e)) from e

    def _save_all(self) -> None:
        self._save(self._arrays, self._path)


class TorchWriter(SafetensorsWriter):

    def __init__(self, path: str, compress: bool) -> None:
        self._torch = import_package('torch', path)
        self._path = path
        self._arrays = {}

    def _save_all(self) -> None:
        # A copy: tensors are writable, and what was mapped may not be.
        with contextlib.closing(_Forgiving(self._path, 'w')) as file:
            with _interrupts_after():
                self._torch.save({
                    key: self._torch.from_numpy(array.copy())
                    for key, array in self._arrays.items()}, file)
            file.check()


_WRITERS: dict[str, Callable[[str, bool], Writer]] = {
    'npz': NpzWriter, 'hdf5': HDF5Writer, 'safetensors': SafetensorsWriter,
    'torch': TorchWriter}
_PACKAGES = {
    'hdf5': 'h5py', 'safetensors': 'safetensors', 'torch': 'torch'}
_KINDS = {'.npz': 'npz', '.h5': 'hdf5', '.hdf5': 'hdf5',
          '.safetensors': 'safetensors', '.pt': 'torch', '.pth': 'torch'}


def check_output(path: Path, source: Path, overwrite: bool) -> None:
    """Ensures that an output may be written, before any work is done.

    Raises:
        SnapshotOutputError: It exists and ``overwrite`` is false, or no file
            can be there.
        SnapshotPackageError: A file of its kind needs a package.

    """
    given = os.fspath(path)
    path = os.path.realpath(given)  # what a link points to
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise errors.SnapshotOutputError(
                given, 'it is not a file', 'Give the path of a file.')
        if not overwrite:
            is_input = (os.path.exists(source)
                        and os.path.samefile(path, source))
            raise errors.SnapshotOutputError(
                given, 'it is the input itself' if is_input
                else 'it exists already',
                'Give another path, or say that it is to be overwritten: '
                '--overwrite, or overwrite=True.')
    elif not os.path.isdir(os.path.dirname(path)):
        raise errors.SnapshotOutputError(
            given, 'its directory does not exist', 'Make the directory first.')
    kind = _kind(path)
    if kind in _PACKAGES:
        import_package(_PACKAGES[kind], given)


def _kind(path: str) -> str | None:
    return _KINDS.get(os.path.splitext(path)[1].lower())


@contextlib.contextmanager
def create(path: Path, reader: Reader, compress: bool | None
           ) -> Iterator[Writer]:
    """Writes to a temporary file, which becomes ``path`` if all went well.

    The kind is that of the extension, else that of the input; so is, by
    default, whether a .npz is compressed.
    """
    given = os.fspath(path)
    path = os.path.realpath(given)  # what a link points to
    kind = _kind(path) or reader.kind
    if compress is None:
        compress = getattr(reader, 'is_compressed', True)
    try:
        with _replacement(path, reader.path) as temporary:
            writer = _WRITERS[kind](temporary, compress)
            with contextlib.closing(writer):
                yield writer
                writer.finish()
    except OSError as e:
        raise errors.SnapshotOutputError(
            given, f'it cannot be written: {e.strerror or first_line(e)}',
            'Nothing was written.') from e


@contextlib.contextmanager
def _replacement(path: str, source: str) -> Iterator[str]:
    """Gives the path of a temporary file, which then takes the name ``path``.

    Its mode is that of the file it replaces, else that of ``source``.
    """
    is_replaced = os.path.exists(path)
    handle, temporary = tempfile.mkstemp(
        prefix='.sn-function.', suffix='.tmp', dir=os.path.dirname(path))
    os.close(handle)
    try:
        yield temporary
        shutil.copymode(path if os.path.exists(path) else source, temporary)
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        if os.path.exists(path) and not is_replaced:
            raise errors.SnapshotOutputError(
                path, 'another program has made it meanwhile',
                'Give another path.')
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
