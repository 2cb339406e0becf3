"""On PYTHONPATH, this directory has Chainer repaired in each Python started.

:mod:`sn_function._run` puts it there; :mod:`.sitecustomize` is what Python
then runs.
"""
