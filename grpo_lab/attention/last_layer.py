"""The last layer, and after it only what is predicted from.

Of a place whose logits nobody needs (a prompt's but its end, a completion's end) the last layer has to give keys and
values, and nothing else: what comes after attention is left out there.
"""

import inspect
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_lab.attention.interface import packed_arguments
from grpo_lab.attention.packed import PackedAttention
from grpo_lab.attention.trial import given

# x = x + attention(norm(x)), x = x + mlp(norm(x)): what a layer of this form speaks of, in this order, and nothing else.
_SPOKEN_OF = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


@given
def _forward(self: Any, hidden_states: Tensor, **options: Any) -> Tensor:
    if not isinstance(options.get("attending"), PackedAttention):
        return type(self).forward(self, hidden_states, **options)  # type: ignore[no-any-return]
    needed = partial(_needed, self, **options)
    if self.gradient_checkpointing and self.training:  # as transformers' layers do it
        return self._gradient_checkpointing_func(needed, hidden_states)  # type: ignore[no-any-return]
    return needed(hidden_states)


def _needed(self: Any, hidden_states: Tensor, *, attending: PackedAttention, **options: Any) -> Float[Tensor, "1 R E"]:
    """What the layer computes, of the places whose logits are needed."""
    normed = self.input_layernorm(hidden_states)
    attended, _ = self.self_attn(hidden_states=normed, attending=attending.in_last_layer(), **options)
    places = attending.packed.predicted_at
    states = hidden_states.index_select(1, places) + attended.index_select(1, places)
    return states + self.mlp(self.post_attention_layernorm(states))  # type: ignore[no-any-return]


def cut(decoder: Any) -> None:
    """Have a decoder's last layer leave out what is not predicted from, where the layer is of the usual form."""
    layer = _last_layer(decoder)
    if not isinstance(layer, GradientCheckpointingLayer):
        return
    theirs = inspect.unwrap(type(layer).forward)
    if isinstance(theirs, FunctionType) and theirs.__code__.co_names == _SPOKEN_OF:
        layer.forward = MethodType(_forward, layer)


def predicted_states(decoder: nn.Module, attending: PackedAttention) -> Float[Tensor, "R E"]:
    """The final hidden states of a packed batch at the places whose logits are needed, in the order of `predicted_at`."""
    packed = attending.packed
    arguments = packed_arguments(packed.ids[None], packed.positions[None], attending)
    hidden: Tensor = decoder(**arguments).last_hidden_state[0]
    forward = vars(_last_layer(decoder) or decoder).get("forward")
    is_cut = isinstance(forward, MethodType) and forward.__func__ is _forward
    return hidden if is_cut else hidden.index_select(0, packed.predicted_at)


def _last_layer(decoder: Any) -> nn.Module | None:
    layers = dict(decoder.named_children()).get("layers")
    return layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) == decoder.config.num_hidden_layers else None
