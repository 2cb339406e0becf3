"""What Chainer needs of pkg_resources, built on importlib.metadata.

It has what Chainer uses, and looks at the named distributions only, while the
real one checks their dependencies, too.  :mod:`.loans` lends it to Chainer
where setuptools no longer has the real one.
"""
import operator
import re
from importlib import metadata
from typing import Any, List


class ResolutionError(Exception):
    pass


class DistributionNotFound(ResolutionError):
    pass


class VersionConflict(ResolutionError):
    pass


def _release(version: str) -> List[int]:
    leading = re.split(r'[^\d.]', version)[0]
    numbers = [int(n) for n in re.findall(r'\d+', leading)]
    while numbers and numbers[-1] == 0:
        numbers.pop()           # 2.0 is 2
    return numbers


def _satisfies(version: str, specifier: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        pass
    else:
        return SpecifierSet(specifier).contains(version, prereleases=True)
    # Without packaging the release numbers decide: 2.0rc1 counts as 2.0.
    compare = {'>=': operator.ge, '>': operator.gt, '==': operator.eq,
               '<=': operator.le, '<': operator.lt, '!=': operator.ne}
    for clause in filter(None, specifier.split(',')):
        match = re.fullmatch(r'\s*([<>=!]=|[<>])\s*([\d.]+\w*)\s*', clause)
        if match is None:
            raise ValueError(
                f'Cannot read {clause!r} of a requirement without the '
                f'packaging module. Install it: pip install packaging')
        if not compare[match[1]](_release(version), _release(match[2])):
            return False
    return True


def get_distribution(requirement: str) -> Any:
    match = re.match(r'\s*([\w.-]+)\s*(.*)', requirement)
    if match is None:
        raise ValueError(f'Not a requirement: {requirement!r}')
    name, specifier = match.groups()
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise DistributionNotFound(requirement) from None
    if not _satisfies(found.version, specifier):
        raise VersionConflict(found, requirement)
    return found


def require(*requirements: str) -> List[Any]:
    return [get_distribution(requirement) for requirement in requirements]


class WorkingSet:

    def require(self, *requirements: str) -> List[Any]:
        return require(*requirements)
