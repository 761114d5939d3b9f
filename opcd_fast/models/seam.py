"""The one place that knows transformers' (and peft's) version-dependent parts; checked on 5.17, 5.23 and 5.24.

Everything here takes a model and hides how this version of transformers spells a thing: where the body under
the lm-head is, how the attention function is chosen, what a cache layer must implement, how gradient
checkpointing is switched. Nothing here knows what is computed with it.

The context managers set private attributes of the model and put back exactly what they found, also after an
exception. They are not safe for two threads that run the same model at once.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache

from opcd_fast.attention import sdpa_without_cudnn

PACKED_ATTENTION = "opcd_packed"
"""Name under which `using_attention` registers its function. transformers builds no mask for a name that its
mask registry lacks, which is what a packed row needs."""

_CACHE_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on, and before


# --- finding the parts of a model ---------------------------------------------------------------------------


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside data-parallel and PEFT wrappers (adapters stay in its layers)."""
    inner: Any = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        elif hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            return inner


def body_of(model: nn.Module) -> nn.Module:
    """The part of a causal LM that ends in `last_hidden_state`, without the lm-head.

    Of a model that also takes images or sound, the language model alone: given token ids only, the rest does nothing.
    Raises TypeError when `model` is not a transformers model.
    """
    lm = causal_lm(model)
    body: Any = getattr(lm, "base_model", None)
    if body is lm and hasattr(lm, "lm_head"):
        body = getattr(lm, "model", None)  # base_model_prefix of Llama-4 names an attribute that it does not have
    if not isinstance(body, nn.Module) or not hasattr(body, "config"):
        raise TypeError(f"model: expected a transformers causal LM (or PEFT around one), got {type(model).__name__}")
    return _language_model(body)


def _language_model(body: Any) -> nn.Module:
    text = body.config.get_text_config()
    decoder: Any = body.get_decoder() if text is not body.config and hasattr(body, "get_decoder") else None
    return decoder if getattr(decoder, "config", None) is text else body


def head_weights(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the lm-head as they are now."""
    layer: Any = causal_lm(model).get_output_embeddings()  # type: ignore[operator]
    return layer.weight, getattr(layer, "bias", None)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The modules that the architecture says must stay whole: its decoder layers."""
    names = set(getattr(causal_lm(model), "_no_split_modules", None) or ())
    # Ancestors too: FSDP2 puts a class of its own in front of a layer's.
    return [module for module in model.modules() if not names.isdisjoint(c.__name__ for c in type(module).__mro__)]


def run_body(
    body: nn.Module,
    input_ids: Tensor,
    *,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Last hidden state (B, T, D) of `input_ids` (B, T); after the final norm, what the lm-head reads.

    Without cuDNN's attention, also where checkpointed layers are recomputed.
    """
    kwargs: dict[str, Any] = {"input_ids": input_ids, "use_cache": cache is not None, "return_dict": True}
    # Passed only when given and known: some architectures take neither argument, and count positions themselves.
    if position_ids is not None and "position_ids" in inspect.signature(body.forward).parameters:
        kwargs["position_ids"] = position_ids
    if attention_mask is not None:
        kwargs["attention_mask"] = attention_mask
    if cache is not None:
        kwargs.update(cache_argument(body, cache))
    with sdpa_without_cudnn():
        if not torch.is_grad_enabled():
            return body(**kwargs).last_hidden_state
        with recomputing_under(body, sdpa_without_cudnn):
            return body(**kwargs).last_hidden_state


def takes_cache(model: nn.Module) -> str | None:
    """The name under which `forward` of `model` (in its wrappers, or a body) takes a cache; None when it takes none."""
    inner: Any = causal_lm(model)
    # The class's own as well: what replaces a method of one object may say (*args, **kwargs) and nothing else.
    for forward in (inner.forward, type(inner).forward):
        names = inspect.signature(forward).parameters
        found = next((name for name in _CACHE_NAMES if name in names), None)
        if found is not None:
            return found
    return None


def cache_argument(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """The keyword argument of `forward` of `model` that hands over `cache`. Raises TypeError when it takes none."""
    name = takes_cache(model)
    if name is None:
        raise TypeError(f"model: {type(causal_lm(model)).__name__} takes no cache of keys and values")
    return {name: cache}


def config_of(body: nn.Module) -> Any:
    """transformers' configuration object of `body`."""
    return body.config


def setting(config: Any, name: str) -> Any:
    """`config.name`, None where there is none, and a list of every layer's where layers differ (Gemma-4)."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def num_layers(body: nn.Module) -> int:
    return int(config_of(body).num_hidden_layers)


def embedding_rows(body: nn.Module) -> int | None:
    """How many token ids the input embedding knows; None when it cannot tell."""
    weight = getattr(body.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    return None if weight is None else int(weight.shape[0])


def longest_input(body: nn.Module) -> int | None:
    """`max_position_embeddings` of the model in tokens, or None where the architecture has no such limit."""
    return longest_input_of(config_of(body))


def longest_input_of(config: Any) -> int | None:
    """The same, of a text model's configuration."""
    limit = setting(config, "max_position_embeddings")
    return int(limit) if isinstance(limit, int) and limit > 0 else None


# --- attention function -------------------------------------------------------------------------------------


def _configs(body: nn.Module) -> list[Any]:
    """Every distinct config object a submodule consults when it picks its attention function."""
    # A failing getattr on a module costs 10 times as much.
    found = [body.config, *(vars(module).get("config") for module in body.modules())]
    return list({id(one): one for one in found if hasattr(one, "_attn_implementation_internal")}.values())


def using_attention(body: nn.Module, function: Callable[..., Any]) -> Callable[[], AbstractContextManager[None]]:
    """Opens blocks in which every attention layer of `body` runs through `function`, as often as it is called: the
    modules, thousands of them, are gone through only once."""
    return partial(_using_attention, _configs(body), function)


@contextmanager
def _using_attention(configs: list[Any], function: Callable[..., Any]) -> Iterator[None]:
    # transformers keeps what was registered last, and with it whatever that holds: a cache of gigabytes, for one.
    outer: Any = AttentionInterface._global_mapping.get(PACKED_ATTENTION, _no_call)
    AttentionInterface.register(PACKED_ATTENTION, function)
    try:
        with holding((config, "_attn_implementation_internal", PACKED_ATTENTION) for config in configs):
            yield
    finally:
        AttentionInterface.register(PACKED_ATTENTION, outer)


def _no_call(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    raise RuntimeError("packed attention was called outside of a packed forward pass")


# --- training state -----------------------------------------------------------------------------------------


@contextmanager
def holding(changes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes, each (owner, name, value), while the block is open; all as they were afterwards."""
    changes = [*changes]
    before = [getattr(owner, name) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(changes, before, strict=True):
            setattr(owner, name, value)


def scoring_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Dropout and gradient checkpointing off; every module's own flags back afterwards.

    A layer that checkpoints replaces its cache by None, so a teacher that shares a model in training would
    run without its context. Flags are set directly: `model.eval()` may run overridden code, and `train()`
    afterwards would not know which modules had been in eval mode.
    """
    flags = ("training", "gradient_checkpointing")
    return holding((module, flag, False) for module in model.modules() for flag in flags if vars(module).get(flag))


def recomputing_under(body: nn.Module, reopen: Callable[[], Any]) -> AbstractContextManager[None]:
    """Layers that are checkpointed while the block is open recompute inside `reopen()`, a `ContextDecorator`.

    Recomputation happens in the backward pass, long after the forward's own context managers were closed
    (and, on CUDA, in another thread, which sees no context variables of this one).
    """

    def wrap(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        return lambda function, *args: checkpoint(reopen()(function), *args)

    name = "_gradient_checkpointing_func"
    return holding((one, name, wrap(vars(one)[name])) for one in body.modules() if name in vars(one))


# --- adapters -----------------------------------------------------------------------------------------------


def prompt_learner(model: nn.Module) -> Any:
    """The PEFT model whose adapter puts virtual tokens in front of the input, outside of the body; None without one."""
    inner: Any = model
    if isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
        inner = inner.module
    config: Any = getattr(inner, "active_peft_config", None) if hasattr(inner, "peft_config") else None
    return inner if getattr(config, "is_prompt_learning", False) else None


def refuse_virtual_tokens(model: nn.Module) -> None:
    """Raise ValueError for PEFT methods that put tokens in front of the input, outside of the body."""
    learner = prompt_learner(model)
    if learner is not None:
        raise ValueError(
            f"model: {type(learner.active_peft_config).__name__} adds virtual tokens, which the body alone leaves out; "
            "use LoRA or another method that acts inside the layers"
        )


def trained_prefix(model: nn.Module) -> list[tuple[Tensor, Tensor]] | None:
    """Each layer's keys and values (1, H_kv, p, d) of a model with PEFT prefix tuning, as PEFT makes them.

    Differentiable, in the base model's dtype. None for a model without virtual tokens, or while they are disabled.
    Raises ValueError for virtual tokens of another kind.
    """
    learner = prompt_learner(model)
    if learner is None or getattr(learner, "_adapters_disabled", False):
        return None
    config = learner.active_peft_config
    if str(getattr(config.peft_type, "value", config.peft_type)) != "PREFIX_TUNING":
        refuse_virtual_tokens(model)
    cache = learner.get_prompt(batch_size=1)
    return [(layer.keys, layer.values) for layer in cache.layers]


def generation_inputs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Any, dict[str, Any], Cache | None]:
    """What to call `generate` on, its inputs, and the cache among them, for prompts (B, T) padded on the left.

    Of a model with a trained prefix of p tokens: the base model, a cache that holds the prefix, and p ids of no meaning
    in front, (B, p + T), where `generate` looks for what the cache holds. PEFT's own `generate` puts the prefix under
    a cache's old name beside transformers' new one, and from transformers 5.24 on that is dropped (peft 0.21).
    Whether `generate` took the cache shows in its length, which grows.
    """
    if trained_prefix(model) is None:
        return model, {"input_ids": input_ids, "attention_mask": attention_mask}, None
    cache = prompt_learner(model).get_prompt(batch_size=len(input_ids))
    before = input_ids.new_zeros(len(input_ids), cache.get_seq_length())
    lm: Any = causal_lm(model)
    inputs = {
        "input_ids": torch.cat([before, input_ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(before), attention_mask], dim=1),
        **cache_argument(lm, cache),
    }
    return lm, inputs, cache


def adapter_modules(model: nn.Module) -> list[nn.Module]:
    """PEFT's layers inside `model`: adapters around a base layer, and trained copies of whole modules."""
    if importlib.util.find_spec("peft") is None:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    # The cheap test first: thousands of modules, looked through on every call of a teacher.
    return [m for m in model.modules() if hasattr(type(m), "enable_adapters") and isinstance(m, kinds)]


def without_adapters(model: nn.Module) -> AbstractContextManager[None]:
    """The base model alone while the block is open.

    Sets the layers' flags instead of calling peft's `disable_adapter()`, which enables afterwards what was
    disabled before and rewrites `requires_grad` of the adapter. Raises RuntimeError when an adapter is merged
    into the base weights: then the base model does not exist at the moment.
    """
    learner = prompt_learner(model)
    if learner is not None:
        return learner.disable_adapter()
    modules = adapter_modules(model)
    if any(getattr(module, "merged", False) for module in modules):
        raise RuntimeError(
            "the adapter is merged into the base weights, so the model without it cannot be run; "
            "call model.unmerge_adapter() first, or pass adapter='active'"
        )
    return holding((module, "_disable_adapters", True) for module in modules)


def adapter_state(model: nn.Module) -> tuple[Any, ...]:
    """Which adapters act on the forward pass now, and how strongly; compares unequal after a change."""
    modules: list[Any] = list(adapter_modules(model))
    return tuple(
        (
            tuple(module.active_adapters),
            bool(module._disable_adapters),
            bool(getattr(module, "merged", False)),
            str(getattr(module, "scaling", None)),
        )
        for module in modules
    )


# --- caches -------------------------------------------------------------------------------------------------


def fill_cache(body: nn.Module, input_ids: Tensor) -> tuple[list[tuple[Tensor, Tensor]], list[Any], Tensor]:
    """Run `input_ids` (1, P), P >= 1, with stock attention: each layer's (keys, values), cache layers, hidden states.

    Keys and values are (1, H_kv, kept, d) in storage of their own; kept is P, or min(P, W - 1) for a layer
    with a sliding window of W tokens; (1, 0, 0, 0) for a layer without any. The hidden states are (1, P, D).
    """
    cache = DynamicCache(config=config_of(body))
    hidden = run_body(body, input_ids, cache=cache)
    layers = []
    layer: Any
    for layer in cache.layers:
        if getattr(layer, "keys", None) is None:
            layers.append((hidden.new_zeros(1, 0, 0, 0), hidden.new_zeros(1, 0, 0, 0)))
            continue
        window = getattr(layer, "sliding_window", None)
        kept = input_ids.shape[1] if window is None else min(input_ids.shape[1], window - 1)
        start = layer.keys.shape[-2] - kept
        # A slice would keep the storage of the whole context alive.
        keys, values = (x[..., start:, :].contiguous().clone() for x in (layer.keys, layer.values))
        layers.append((keys, values))
    return layers, list(cache.layers), hidden
