"""Other libraries' fused reverse KL: the mean over rows of (h_s, w_s, h_t, w_t), whose gradients autograd gets.

Nothing of theirs is part of this repository and none is needed: each loader imports what the machine has, and
raises `Skip` with the reason where it has not. README.md says which are exact, read from the versions named there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.session import Skip

_TRL_ALIAS = "_benchmarked_trl"


def trl(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
    divergence, _entropy = load_trl().apply(h_s, w_s, None, h_t, w_t, None, 1.0)
    return divergence.mean()


def liger_fused(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
    if not h_s.is_cuda:
        raise Skip("Liger-Kernel's fused loss is a Triton kernel and needs a GPU")
    return load_liger("ops.fused_linear_jsd", "LigerFusedLinearJSDFunction").apply(h_s, w_s, h_t, w_t, None, 1.0)


def liger_chunked(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
    # Chunks and compilation are its defaults; the soft loss alone is the mean reverse KL.
    loss = load_liger("chunked_loss.jsd_loss", "LigerFusedLinearJSDLoss")(0.0, 1.0, beta=1.0)
    needs_compiler()
    return loss(h_s, w_s, h_t, w_t, torch.zeros(len(h_s), dtype=torch.long, device=h_s.device))  # no label is ignored


def vllm_answers(model: Any, folder: Path, longest: int) -> Callable[[Sequence[Sequence[int]], int], Any]:
    """vLLM in processes of its own over the same weights: (prompts, tokens) -> answers at temperature 1.

    folder: for the weights. longest: tokens of a prompt with its answer.
    """
    try:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    except ImportError as error:
        raise Skip(f"vllm: {error}") from None
    model.save_pretrained(folder)
    weight = next(model.parameters())
    memory = {"gpu_memory_utilization": 0.3} if weight.is_cuda else {}
    engine = LLM(str(folder), skip_tokenizer_init=True, dtype=str(weight.dtype).removeprefix("torch."),
                 max_model_len=longest, enable_prefix_caching=True, disable_log_stats=True, **memory)  # fmt: skip

    def answer(prompts: Sequence[Sequence[int]], tokens: int) -> Any:
        sampling = SamplingParams(temperature=1.0, min_tokens=tokens, max_tokens=tokens, ignore_eos=True,
                                  detokenize=False)  # fmt: skip
        engine.reset_prefix_cache()  # what one call reads, the next is not to find
        return engine.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False)

    return answer


@functools.cache
def load_liger(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(f"liger_kernel.{module}"), name)
    except ImportError as error:
        raise Skip(f"liger_kernel: {error}") from None


def liger_fused_is_exact(device: torch.device, dtype: torch.dtype) -> bool:
    if dtype == torch.float32:
        return True
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def needs_compiler() -> None:
    """torch.compile takes a C++ compiler for CPU kernels, and Triton a C compiler for GPU ones."""
    if not any(shutil.which(compiler) for compiler in ("g++", "clang++", "gcc", "clang")):
        raise Skip("torch.compile needs a C++ compiler, and none is on PATH")


@functools.cache
def load_trl() -> Any:
    """TRL's autograd function, from its own files but without TRL's package: importing that takes datasets,
    accelerate and more, and seconds, of which the function needs nothing.

    The one name it takes from there, a context that gathers weights sharded by DeepSpeed ZeRO-3 and does
    nothing otherwise, is a context that does nothing.
    """
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        raise Skip("trl is not installed")
    folder = Path(spec.submodule_search_locations[0])
    for name in ("", ".kernels", ".trainer", ".trainer.utils"):  # packages whose __init__.py does not run
        package = types.ModuleType(_TRL_ALIAS + name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[package.__name__] = package
    package.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()  # type: ignore[attr-defined]
    try:
        return importlib.import_module(f"{_TRL_ALIAS}.kernels.chunked_divergence").ChunkedDivergenceFunction
    except ImportError as error:
        raise Skip(f"trl, of which 1.16 is compared: {error}") from None
