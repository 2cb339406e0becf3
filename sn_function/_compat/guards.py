"""What onnx_chainer and ChainerMN must know of the hooks of this package.

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


registered = Guards()


def register(guards: Guards) -> None:
    global registered
    registered = guards
