"""What all hooks of this package have in common."""
from __future__ import annotations

from typing import Any

from chainer import link_hook

from sn_function._links.printing import settings_text


class LocalHook(link_hook.LinkHook):
    """A hook that belongs on a link."""

    def __enter__(self) -> None:
        raise NotImplementedError(
            f'This hook is not supposed to be used as context manager. Add '
            f'it to a link: link.add_hook({type(self).__name__}()).')

    def __exit__(self, *_: Any) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f'{type(self).__name__}({settings_text(self)})'
