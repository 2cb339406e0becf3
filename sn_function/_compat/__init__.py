"""Makes Chainer 7.8.1, the last release (2022), import and work today.

`sn_function/__init__.py` imports this module before anything of Chainer.  It
looks at what is there instead of comparing version numbers, and replaces only
what it finds missing or broken, in two ways:

* :mod:`.loans`: what Chainer misses while it is imported is lent
  to it and taken back afterwards (one of them is
  :mod:`.pkg_resources`).
* :mod:`.repairs`: a function of Chainer that fails a tiny trial
  run is mended in Chainer.

:mod:`.onnx_chainer` does both for `onnx_chainer`, when a program
imports that, and :mod:`.chainermn` the latter for ChainerMN.

No other file of the package knows of NumPy, Chainer or Python versions.

`applied` names what was done.  On the stacks of Chainer's own time that is
the bug of Deconvolution2D alone, which every stack has.

Import `sn_function` before `chainer`.  The other order works as well where
Chainer can be imported by itself.  A worker process started by `spawn` or
`forkserver` imports Chainer anew, but the script that started it first: so
that script has to import `sn_function` before `chainer`, at its top level.
"""
import os
import sys
from typing import Tuple


def _repair() -> Tuple[str, ...]:
    from sn_function._compat import loans
    names = loans.import_chainer()
    # It imports Chainer, which can be done only now.
    from sn_function._compat import chainermn, onnx_chainer
    from sn_function._compat import repairs as _repairs
    onnx_chainer.install()
    chainermn.install()
    return (*names, *_repairs.repair())


def explain(name: str) -> Tuple[str, str]:
    """What is wrong without `name` of `applied`, and when it is needed.

    And so of `_exporter.applied` and `_chainermn.applied`.
    """
    from sn_function._compat import chainermn, loans, onnx_chainer
    from sn_function._compat import repairs as _repairs
    repairs = {each.name: (each.fault, each.needed) for each in (
        *_repairs.REPAIRS, *onnx_chainer.REPAIRS, *chainermn.REPAIRS)}
    return {**loans.REASONS, **repairs}[name]


def _see_doctor() -> None:
    from sn_function import doctor
    sys.exit(doctor.main(sys.argv[1:]))


# `python -m sn_function doctor` imports this package before its __main__, with
# '-m' for a script.  What may be broken is not imported then, as it may end
# the process.  Before Python 3.10 nothing tells which module was named: there
# the doctor is seen once an import has failed.
_is_asked = sys.argv[:2] == ['-m', 'doctor']
_is_named = 'sn_function' in getattr(sys, 'orig_argv', ())
# So does `sn-function doctor`.
_is_script = (os.path.basename(sys.argv[0]) == 'sn-function'
              and sys.argv[1:2] == ['doctor'])
if (_is_asked and _is_named) or _is_script:
    _see_doctor()

try:
    # Names of what was lent or mended in this process.  A reload finds nothing
    # left to do, and keeps the record.
    applied: Tuple[str, ...] = globals().get('applied', ()) + _repair()
except Exception:
    if _is_asked and not hasattr(sys, 'orig_argv'):
        _see_doctor()
    raise
