"""How hooks print."""
from __future__ import annotations

import inspect
from typing import Any

import chainer


def settings_text(hook: chainer.LinkHook) -> str:
    """Returns the settings of a hook, as its constructor takes them.

    Those that have their default values are left out, but for the first one.
    """
    parameters: dict[str, inspect.Parameter] = {}
    for cls in type(hook).__mro__:
        if cls is chainer.LinkHook:
            break
        # One that passes **settings on has those of its base.
        parameters = {**inspect.signature(cls).parameters, **parameters}
    texts = []
    for i, (name, parameter) in enumerate(parameters.items()):
        default = type(hook).name if name == 'name' else parameter.default
        # A hook from an old pickle may lack one; hook.axis is that of a link.
        value: Any = getattr(
            hook, 'given_axis' if name == 'axis' else name, default)
        if i == 0 or repr(value) != repr(default):
            texts.append(f'{name}={value!r}')
    return ', '.join(texts)
