"""Random sequences of what may happen to links with the hook.

:mod:`links` makes links that tell what they compute with, :mod:`oracle` says
in float64 what they must compute, :mod:`states` where u and gamma may be then,
:mod:`record` what else must be true of them, and :mod:`checks` and
:mod:`gradients` call them and compare.  The other modules hold the
rules of the machine, by subject; :mod:`machine` puts them together.
"""
