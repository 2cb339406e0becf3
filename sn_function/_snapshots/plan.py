"""What becomes of each entry of a snapshot in the file that is written.

A plan is made first, without a look at any array; :meth:`Plan.write` then
goes through the input once, in its order.
"""
from __future__ import annotations

import functools
from typing import Any, Callable, Iterable

from sn_function import errors
from sn_function._snapshots import writers
from sn_function._snapshots.readers import Path, Reader

Entries = Iterable['tuple[str, Any]']  # names, and their arrays
Progress = Callable[[Iterable[Any]], Iterable[Any]]  # passes them on


class Plan:
    """Entries are dropped, renamed or replaced; all others are copied.

    Only what is below ``prefix`` is in the output, without that prefix.  Here
    all names have it, also new ones (or one of the same length, with other
    separators).
    """

    def __init__(self, prefix: str = '') -> None:
        self.prefix = prefix
        self._names: dict[str, str] = {}
        self._replacements: dict[str, Callable[[], Entries]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._replacements

    def drop(self, keys: Iterable[str]) -> None:
        self._replacements.update(dict.fromkeys(keys, tuple))

    def rename(self, key: str, name: str) -> None:
        self._names[key] = name

    def put(self, key: str, array: Any) -> None:
        """Gives an entry another array."""
        self._replacements[key] = lambda: [(key, array)]

    def replace(
            self, key: str, make: Callable[..., Entries], *args: Any) -> None:
        """Calls ``make(*args)`` for what takes the place of an entry.

        That is when its turn to be written comes: so one weight at a time is
        in memory.
        """
        self._replacements[key] = functools.partial(make, *args)

    def name_of(self, key: str) -> str:
        """Returns the name without the prefix."""
        return key[len(self.prefix):]

    def write(
            self, reader: Reader, path: Path, compress: bool | None,
            progress: Progress) -> list[str]:
        """Writes the output, and returns the entries that it cannot hold.

        Args:
            reader: The input.
            path: The output.
            compress: Whether a .npz or HDF5 file is compressed; ``None``: as
                the input is.
            progress: Given the entries, passes them on.

        Raises:
            SnapshotNameError: Two entries would get one name.

        """
        left_out = list(reader.ignored)
        taken: dict[str, str] = {}  # entries of the input, by new names

        def take(new: str, key: str) -> str:
            name = self.name_of(new)
            if name in taken:
                raise errors.SnapshotNameError(
                    reader.path, name, taken[name], key)
            taken[name] = key
            return name

        key: str
        with writers.create(path, reader, compress) as writer:
            for key in progress(reader.keys):
                if key in self._replacements:
                    for new, array in self._replacements[key]():
                        writer.write(take(new, key), array)
                elif key.startswith(self.prefix):
                    name = take(self._names.get(key, key), key)
                    if not writer.copy(reader, key, name):
                        left_out.append(key)
        return left_out
