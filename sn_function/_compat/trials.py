"""Repairs that are made where a trial run shows that they are needed.

Each repair is two functions.  `try_...` runs the code that may be broken, on
as little data as shows the fault; `repair_...` replaces it where that raised
the expected error.  Nothing is decided by version numbers.
"""
import warnings
from typing import Callable, Iterable, List, NamedTuple, Tuple, Type, Union

import numpy


class WrongResultError(Exception):
    """A trial ran, but what it computed is wrong."""


class Repair(NamedTuple):
    name: str
    fault: str      # what is wrong without it
    needed: str     # with what it is needed
    attempt: Callable[[], None]
    error: Union[Type[Exception], Tuple[Type[Exception], ...]]
    apply: Callable[[], None]

    def is_needed(self) -> bool:
        # What only warns is not broken; and floating point errors are looked
        # for in the result.
        with warnings.catch_warnings(), numpy.errstate(all='ignore'):
            warnings.simplefilter('ignore')
            try:
                self.attempt()
            except Exception as error:
                # Another error is not what `apply` can repair.
                return isinstance(error, self.error)
        return False


def repair(repairs: Iterable[Repair]) -> List[str]:
    """Applies the repairs that are needed, and returns their names."""
    needed = [each for each in repairs if each.is_needed()]
    for each in needed:
        each.apply()
    return [each.name for each in needed]
