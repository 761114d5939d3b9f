"""Whether the decoding loop computes what the model computes, by log-probabilities of plain forward passes.

Rounding hides faults: in bfloat16 two right ways of running a model differ by as much as a key that is missing in some
layers makes. So the loop first runs in float32 over the same weights, where the bound is a hundred times smaller, and
then in the model's own type, where it may be off by a small multiple of what a plain forward pass is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opcd_fast.attention import sdpa_without_cudnn
from opcd_fast.models import is_quantized, seam
from opcd_fast.runtime import full_precision

Answers = Sequence[tuple[Sequence[int], Sequence[float]]]

NARROW = (torch.bfloat16, torch.float16)
ROUNDINGS = 32  # of float32, for each layer and all of one sign: what they can add up to
OF_PLAIN = 4  # in the model's own type: how many times as far off as a plain forward pass


def check_decoding(
    model: Any, loop: Callable[[], Answers], prompts: Sequence[Sequence[int]], vocab_size: int | None = None,
    theirs: Callable[[], Answers] | None = None,
) -> tuple[bool, str]:  # fmt: skip
    """Whether `loop`, which answers `prompts` with the most probable tokens, agrees with `model`; and the figures.

    Compared are natural log-probabilities of the tokens that the loop took. In float32 they may differ by
    ROUNDINGS * layers * eps * the largest logit. A model of 16 bits also runs as it is: the loop may then be as far
    from the float32 values as OF_PLAIN times a plain forward pass of the same tokens, and one spacing of the largest
    logit more, which is rounded itself. Packed weights have no float32 products of their own: only the second holds.

    theirs: answers the prompts as `loop` does, by transformers' `generate`. Some recurrent layers compute one token in
    another way than many (Nemotron-H and Zamba-2 bound the time step for many alone). What is further off than the
    bound in float32 is then right where it agrees with `generate`, and so much is added to the other bound.
    """
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    packed = is_quantized(model)
    said, apart = [], 0.0
    if not packed:
        with torch.no_grad(), full_precision(device), in_float32(model):
            answers = loop()
            exact, largest = scored(model, prompts, answers, vocab_size)
            others = theirs() if theirs is not None else ()
        eps = torch.finfo(torch.float32).eps  # of float64 models too: a draw's log-probabilities are float32
        bound = ROUNDINGS * seam.num_layers(seam.body_of(model)) * eps * largest
        difference = float((_drawn(answers) - exact).abs().max())
        said.append(f"{difference:.1e} at most in float32 (bound {bound:.1e})")
        if not difference <= bound:  # NaN, too
            same = [list(ids) for ids, _ in answers] == [list(ids) for ids, _ in others]
            if not same or not float((_drawn(answers) - _drawn(others)).abs().max()) <= bound:
                return False, said[0]
            apart = difference
            said[0] += " from a plain pass, as generate's do"
    if packed or torch.finfo(dtype).bits == 16:
        answers = loop()
        plain, largest = scored(model, prompts, answers, vocab_size)
        with torch.no_grad(), full_precision(device), in_float32(model):
            exact, _ = scored(model, prompts, answers, vocab_size)
        stock, ours = float((plain - exact).abs().max()), float((_drawn(answers) - exact).abs().max())
        bound = OF_PLAIN * stock + torch.finfo(dtype).eps * largest + apart
        name = str(dtype).removeprefix("torch.")
        said.append(f"{ours:.1e} in {name}, a plain forward {stock:.1e} (bound {bound:.1e})")
        if not ours <= bound:
            return False, said[-1]
    return True, "; ".join(said)


@torch.no_grad()
def scored(
    model: Any, prompts: Sequence[Sequence[int]], answers: Answers, vocab_size: int | None = None
) -> tuple[Tensor, float]:
    """Log-probabilities (all answers' tokens,) in float64, and the largest logit's size.

    Each sequence alone, in one forward pass: no padding, no shared prefix, no cache but the one that holds a trained
    prefix.
    """
    lm: Any = seam.causal_lm(model)
    device = next(model.parameters()).device
    rows, largest = [], 0.0
    for prompt, (ids, _) in zip(prompts, answers, strict=True):
        whole = torch.tensor([[*prompt, *ids]], device=device)
        with sdpa_without_cudnn():
            logits = lm(input_ids=whole, logits_to_keep=len(ids) + 1, **_behind_prefix(model, whole.shape[1])).logits
        logits = logits[0, -len(ids) - 1 : -1, :vocab_size].double()
        largest = max(largest, float(logits.abs().max()))
        rows.append(logits.log_softmax(-1).gather(1, whole[0, len(prompt) :, None])[:, 0])
    return torch.cat(rows).cpu(), largest


def _behind_prefix(model: Any, length: int) -> dict[str, Any]:
    if seam.trained_prefix(model) is None:
        return {"use_cache": False}
    cache = seam.prompt_learner(model).get_prompt(batch_size=1)
    positions = cache.get_seq_length() + torch.arange(length, device=next(model.parameters()).device)[None]
    return {"position_ids": positions, "use_cache": True, **seam.cache_argument(model, cache)}


def _drawn(answers: Answers) -> Tensor:
    return torch.tensor([value for _, logprobs in answers for value in logprobs], dtype=torch.float64)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Forward passes of `model` in float32 meanwhile, without a second copy of its weights.

    A layer's weights are widened while it runs, so that memory for the largest one (or the head) is enough; tables of
    embeddings stay as they are, and what is read from them is widened.
    """
    kept: dict[tuple[nn.Module, str], nn.Parameter | None] = {}

    def widen(part: nn.Module, _: Any) -> None:
        for module in part.modules():
            for name, weight in module._parameters.items():
                if weight is not None and weight.dtype in NARROW:
                    kept[module, name] = weight
                    module._parameters[name] = weight.float()  # type: ignore[assignment]

    def put_back(*_: Any) -> None:
        for (module, name), weight in kept.items():
            module._parameters[name] = weight
        kept.clear()

    hooks = []
    for part in _parts(seam.causal_lm(model), set(seam.layers_of(model))):
        if isinstance(part, nn.Embedding):
            hooks.append(part.register_forward_hook(_widen_output))
        else:
            hooks.append(part.register_forward_pre_hook(widen))
            hooks.append(part.register_forward_hook(put_back, always_call=True))
    packed = (module for module in model.modules() if "compute_dtype" in vars(module))  # bitsandbytes'
    try:
        with seam.holding((module, "compute_dtype", torch.float32) for module in packed):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        put_back()


def _parts(module: nn.Module, layers: set[nn.Module]) -> Iterator[nn.Module]:
    """The layers, and the largest modules that hold none of them: they run one after the other."""
    if module in layers or layers.isdisjoint(module.modules()):
        yield module
    else:
        for child in module.children():
            yield from _parts(child, layers)


def _widen_output(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    return output.float() if output.dtype in NARROW else output
