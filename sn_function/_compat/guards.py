"""What Chainer, onnx_chainer and ChainerMN must know of the hooks.

The hooks lie above this wing, so they register what is asked of them:
see `sn_function/_guards.py`.  It is looked up in each call, so the order of
imports does not matter.
"""
from typing import Any, Collection


class Guards:
    """The questions, answered as if there were no hooks."""

    def check_export(self, model: Any) -> None:
        """Raises an error if hooks normalize weights of the model."""

    def refuse_node(self) -> None:
        """Raises an error: the exporter met the node of this package."""

    def vector_names(self, link: Any) -> Collection[str]:
        """Names of the persistent values that ranks must not average."""
        return ()

    def hook(self) -> Any:
        """The hook that takes the place of Chainer's."""
        raise NotImplementedError

    def check_hook(self, link: Any, hook: Any) -> None:
        """Raises an error if another hook has the place of this one."""


registered = Guards()


def register(guards: Guards) -> None:
    global registered
    registered = guards
