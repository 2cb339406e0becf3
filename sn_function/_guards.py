"""Tells Chainer, onnx_chainer and ChainerMN of the hooks of this package.

The modules that it asks need Chainer, so they are imported when it is asked.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Collection

from sn_function._compat import guards

if TYPE_CHECKING:
    import chainer


class HookGuards(guards.Guards):
    """Refuses to export hooks, and keeps their vectors from averages."""

    def check_export(self, model: chainer.Link) -> None:
        from sn_function import _models, errors
        paths = [path for path, _ in _models.hooked_links(
            model, _models.OURS)]
        if paths:
            raise errors.HookedExportError(paths)

    def refuse_node(self) -> None:
        # A link may hide from its model, and a function has none.
        from sn_function import errors
        raise errors.HookedExportError([])

    def vector_names(self, link: chainer.Link) -> Collection[str]:
        from sn_function import _models
        return _models.vector_names(link)

    def hook(self) -> Any:
        from sn_function import link_hooks
        return link_hooks.SpectralNormalization

    def check_hook(self, link: chainer.Link, hook: Any) -> None:
        from sn_function import _models, errors
        if isinstance(hook, self.hook()) and _models.is_hooked(
                link, hook.weight_name):
            raise errors.BothHooksError(link, hook.weight_name)


def register() -> None:
    """Has the repaired onnx_chainer and ChainerMN ask here."""
    guards.register(HookGuards())
