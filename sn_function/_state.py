"""Pickles of versions before 0.2 name it here.  Delete in version 0.3."""
from sn_function._links.state import _unpickle as _unpickle
