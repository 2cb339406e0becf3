"""Packages that a machine without a network may lack, from ``gpu-bundle/``.

``make gpu-bundle`` collects their wheels.  These are zip files: no pip is
needed.  What is installed is left alone.
"""
from __future__ import annotations

import importlib.metadata
import pathlib
import shutil
import zipfile


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def unpack(folder: pathlib.Path) -> list[str]:
    """Unpacks what is missing into ``site`` in it; returns the names."""
    site = folder / 'site'
    shutil.rmtree(site, ignore_errors=True)
    names = []
    for path in sorted(folder.glob('*.whl')):
        name = path.name.split('-')[0]
        if not is_installed(name):
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(site)
            names.append(name)
    return names
