"""Stands in for the hook: its settings, without the hook itself."""
import dataclasses
from typing import Optional

import chainer

from sn_function._links import vector
from sn_function._links.state import LinkState


@dataclasses.dataclass(eq=False)
class Hook(chainer.LinkHook):
    """What `sn_function._links` asks of a hook, which normalizes nothing."""

    name: str = 'Hook'
    weight_name: str = 'W'
    n_power_iteration: int = 1
    n_warmup: int = 0
    detach_uv: bool = False
    factor: Optional[float] = None
    eps: float = 1e-6
    cap: Optional[float] = None
    groups: Optional[str] = None
    n_vectors: int = 1
    rtol: Optional[float] = None
    max_iterations: int = 200
    given_axis: Optional[int] = None
    update_u: str = 'train'

    def added(self, link):
        LinkState(self.weight_name, None).put(link)
        for name in vector.names(self, link):
            link.add_persistent(name, None)
