"""The check of a path against sequences run alone, on small random models of the same kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from opcd_fast.attention import packed_row
from opcd_fast.models import seam
from opcd_fast.runtime import full_precision
from opcd_fast.teacher.paths.forward import concat_forward, merge_forward, pad_forward
from opcd_fast.teacher.paths.twin import VOCABULARY, has_window, twin_of
from opcd_fast.teacher.prefix import SharedPrefix

_TOLERANCE_FP32 = 1e-4  # max |difference| of hidden states of order 1
_TOLERANCE_HALF = 0.05  # relative RMS; a missing or wrong key gives differences of order 1


def verify(body: nn.Module, path: str, prefix_device: torch.device | None = None) -> tuple[str, bool | None]:
    """Run `path` ("merge", "pad" or "concat") on tiny random models of `body`'s kind: outcome, agreement.

    Against each sequence alone after its context, a plain forward without padding.

    In fp32, and once more in the model's own dtype when that is shorter, because other kernels run there. With
    windows smaller and larger than the contexts, and prefixes on `prefix_device`. A path that raises does not agree;
    None where there is no such tiny model to try it on, or where tensors have no data.
    """
    if detect_fake_mode() is not None:
        return "tensors have no data here", None
    worst, worst_half = 0.0, 0.0
    dtype, device = next(body.parameters()).dtype, next(body.parameters()).device
    try:
        for window in (5, 4096) if has_window(body) else (None,):
            try:
                twin = twin_of(type(body), seam.config_of(body), device, window=window)
            except Exception as error:  # noqa: BLE001 - configurations refuse small sizes in ways of their own
                return f"{type(error).__name__}: {error}".splitlines()[0], None
            for kind in dict.fromkeys((torch.float32, dtype)):
                twin = twin.to(kind)
                with torch.no_grad(), full_precision(device):
                    got, oracle = both(path, twin, device, prefix_device)
                if kind == torch.float32:
                    worst = max(worst, float((got - oracle).abs().max()))
                else:
                    worst_half = max(worst_half, float((got - oracle).norm() / oracle.norm()))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - any failure of a model of unknown kind means: not this path
        return f"{type(error).__name__}: {error}".splitlines()[0], False
    text = f"max difference {worst:.1e} in fp32"
    if dtype != torch.float32:
        text += f", relative {worst_half:.1e} in {dtype}"
    return text, worst <= _TOLERANCE_FP32 and worst_half <= _TOLERANCE_HALF


def both(
    path: str, twin: nn.Module, device: torch.device, prefix_device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Hidden states of a ragged batch after three contexts, one of them empty: by `path`, and of each row alone."""
    contexts = [torch.arange(9) * 7 % VOCABULARY, torch.arange(5) * 11 % VOCABULARY, torch.arange(0)]
    lengths, index = [1, 4, 7, 2], [1, 0, 0, 2]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    ids = (torch.arange(sum(lengths)) * 5 % VOCABULARY).to(device)
    row = packed_row(bounds, ids.numel(), device)
    if path == "concat":
        got = concat_forward(twin, contexts, ids, row, index)
    else:
        # In chunks, as long contexts are read on merge, so that the check covers that too.
        chunk = 4 if path == "merge" else 0
        prefixes = {
            i: SharedPrefix.build(twin, c, chunk_tokens=chunk, device=prefix_device) for i, c in enumerate(contexts)
        }
        forward = {"merge": merge_forward, "pad": pad_forward}[path]
        got = forward(twin, prefixes, ids, row, index)
    return got.double(), concat_forward(twin, contexts, ids, row, index, alone=True).double()
