"""N-step RNNs: links that use the weights of links that they never call.

``NStepLSTM`` and its siblings have a child for each layer and direction, which
holds the weights ``w0``, ``w1`` and so on.  They compute with a list of these
parameters, ``ws``, so a hook on a child is never called.  The hook here is on
the n-step link, and replaces ``ws`` for the time of a call.  Hooks on the
children hold the settings, so that each weight has its state where that of
any other weight is.
"""
from __future__ import annotations

import copy
import uuid
from typing import Any, Iterator

import chainer
from chainer.links.rnn import n_step_rnn

from sn_function import errors
from sn_function._links import call
from sn_function._links import scope as scopes
from sn_function._links.bypass import bypasses_hooks
from sn_function._links.local_hook import LocalHook

WEIGHTS = 'ws'
# What weight_name is where no name is given: here it stands for all weights.
_ALL = 'W'


def is_n_step(link: chainer.Link) -> bool:
    """Whether the link is an n-step RNN."""
    return is_n_step_class(type(link))


def is_n_step_class(cls: type) -> bool:
    """Whether the links of a class are n-step RNNs."""
    return issubclass(cls, n_step_rnn.NStepRNNBase)


def weight_names(link: chainer.Link) -> list[str]:
    """Returns the names of the matrices in each layer of an n-step RNN."""
    return [f'w{i}' for i in range(link.n_weights)]


def holds_weights(link: chainer.Link, weight_name: str) -> bool:
    """Whether the link is an n-step RNN, and the name none of its own."""
    return is_n_step(link) and weight_name not in link._params


def replace_hook(hook: Any, link: chainer.Link) -> None:
    """Puts a hook for all layers in the place of one that is just added.

    Args:
        hook: The hook, the last one of the link.
        link: An n-step RNN.

    Raises:
        NStepWeightError: The hook is for a certain weight.
        HookBypassedError: A call of the link calls no hooks.
        SpectralNormalizationError: A layer cannot have the hook.  The link is
            left as it was, without the hook, as with each of these errors.

    """
    # Link.add_hook has put the hook in before it calls this.
    name, _ = link.local_link_hooks.popitem()
    if hook.weight_name != _ALL:
        raise errors.NStepWeightError(link, hook.weight_name)
    if bypasses_hooks(link):
        raise errors.HookBypassedError([('', link)])
    hook_of_layers = HookOfLayers(hook)
    hook_of_layers.add_to_layers(link)
    link.local_link_hooks[name] = hook_of_layers


def is_hooked(link: chainer.Link) -> bool:
    """Whether an n-step RNN has a hook that normalizes its weights."""
    return any(isinstance(hook, HookOfLayers)
               for hook in link.local_link_hooks.values())


def is_of_layers(hook: Any, link: chainer.Link) -> bool:
    """Whether a hook on a layer is due to a hook of the n-step RNN."""
    return any(isinstance(own, HookOfLayers) and own.owns(hook)
               for own in link.local_link_hooks.values())


def is_in_use(link: chainer.Link) -> bool:
    """Whether an n-step RNN is being called, with other weights."""
    return call.original(link, WEIGHTS) is not vars(link)[WEIGHTS]


def collect_weights(link: chainer.Link) -> None:
    """Has an n-step RNN use the weights that its layers have now."""
    setattr(link, WEIGHTS, [
        [vars(layer)[name] for name in weight_names(link)]
        for layer in link.children()])


def put_back_weights(link: chainer.Link) -> None:
    """Has it use them again where, outside of a call, it has others."""
    ws = vars(link)[WEIGHTS]
    if call.original(link, WEIGHTS) is ws and not all(
            isinstance(w, chainer.Parameter) for layer in ws for w in layer):
        collect_weights(link)


class HookOfLayers(LocalHook):
    """Normalizes all weights of an n-step RNN in each call of it.

    Args:
        hook: A hook with the settings.

    Attributes:
        key: The same in a copy of this hook, and that of the hook on a chain
            which it is due to, if any.

    """

    def __init__(self, hook: Any) -> None:
        self.name = hook.name
        self.hook = hook
        self.key = getattr(hook, 'key', None) or uuid.uuid4().hex

    def add_to_layers(self, link: chainer.Link) -> None:
        """Adds a hook for each weight to its layer; to all, or to none."""
        hooks = [self._hook_of(name) for name in weight_names(link)]
        done = []
        try:
            for layer in link.children():
                for hook in hooks:
                    layer.add_hook(hook)
                    done.append((layer, hook.name))
        except BaseException:
            for layer, name in reversed(done):
                layer.delete_hook(name)
            raise

    def _hook_of(self, weight_name: str) -> Any:
        hook = copy.copy(self.hook)
        hook.weight_name = weight_name
        hook.vector_name = weight_name + '_u'
        hook.name = f'{self.name}_{weight_name}'
        hook.key_of_layers = self.key
        return hook

    def hooks_on(self, layer: chainer.Link) -> Iterator[Any]:
        """Yields the hooks that this one has on a layer."""
        return filter(self.owns, layer.local_link_hooks.values())

    def owns(self, hook: Any) -> bool:
        """Whether a hook on a layer is one of this, or a copy of one."""
        return getattr(hook, 'key_of_layers', None) == self.key

    def deleted(self, link: chainer.Link) -> None:
        """Deletes the hooks from the layers."""
        for layer in link.children():
            for hook in list(self.hooks_on(layer)):
                layer.delete_hook(hook.name)

    def forward_preprocess(self, cb_args: Any) -> None:
        """Replaces the weights by the normalized ones until the call ends."""
        link = cb_args.link
        call.replace_weight(
            cb_args, WEIGHTS, lambda: self.normalized_weights(link))

    def forward_postprocess(self, cb_args: Any) -> None:
        """Ensures that the weights are the parameters again."""
        call.restore_weight(cb_args.link, WEIGHTS)

    def normalized_weights(self, link: chainer.Link) -> list[list[Any]]:
        """Returns the list of weights with the normalized ones."""
        weights = [list(of_layer) for of_layer in vars(link)[WEIGHTS]]
        # All weights in one node, unless an outer scope has them already.
        scope = scopes.Scope(link.children(), type(self.hook))
        scopes.begin(scope)
        try:
            for layer, of_layer in zip(link.children(), weights):
                for hook in self.hooks_on(layer):
                    i = weight_names(link).index(hook.weight_name)
                    of_layer[i] = hook.normalize_weight(layer)
        finally:
            scopes.end(scope)
        return weights
