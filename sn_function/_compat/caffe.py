"""Repairs `chainer.links.caffe` and `chainer.exporters.caffe` when imported.

The messages of both are in a module that protoc 3 generated.  From protobuf 4
on, its implementation in C refuses such code, which describes each field by
itself.  The module also has the serialized description of all its messages,
which is read first, and which protobuf accepts.  The messages are built from
that.

Before a program imports one of the two, protobuf is not imported.
"""
import contextlib
import sys
from typing import Iterator, List

from sn_function._compat import trials
from sn_function._compat.trials import Repair

MODULE = 'chainer.links.caffe.protobuf3.caffe_pb2'

# Names of the repairs that were made in this process.
applied: List[str] = []


@contextlib.contextmanager
def reading_the_description() -> Iterator[None]:
    """Executes the module as far as protobuf accepts it."""
    try:
        yield
    except TypeError:
        if not hasattr(sys.modules[MODULE], 'DESCRIPTOR'):
            raise


def _try_messages() -> None:
    vars(sys.modules[MODULE])['NetParameter']


def _repair_messages() -> None:
    from google.protobuf.internal import builder
    names = vars(sys.modules[MODULE])
    builder.BuildMessageAndEnumDescriptors(names['DESCRIPTOR'], names)
    builder.BuildTopDescriptorsAndMessages(
        names['DESCRIPTOR'], 'caffe_pb2', names)


# It goes with the support of Chainer 7.
REPAIRS = (
    Repair('caffe',
           'chainer.links.caffe and chainer.exporters.caffe cannot be '
           'imported', 'with protobuf 4 or newer',
           _try_messages, KeyError, _repair_messages),
)


def repair() -> None:
    """Repairs the messages, after :func:`reading_the_description`."""
    applied.extend(trials.repair(REPAIRS))
