"""Attention with shared prompts by explicit scores."""

from __future__ import annotations

import torch

from opcd_fast.attention import TreeCall

# Prompts with three children, with none, with two (one of a single token); a sequence between a prompt and its child;
# an empty child; and a child that does not stand next to its siblings.
LENGTHS = [4, 3, 0, 1, 5, 2, 6, 1, 2]
PARENT = [-1, 0, 0, 0, -1, -1, 5, 5, 0]
HEADS = [(4, 4), (4, 2), (3, 1)]


def make_qkv(tokens, heads=(4, 2), d=8, dtype=torch.float64):
    torch.manual_seed(3)
    query = torch.randn(1, heads[0], tokens, d, dtype=torch.float64) * 2
    key, value = (torch.randn(1, heads[1], tokens, d, dtype=torch.float64) for _ in range(2))
    return [x.to(dtype).requires_grad_() for x in (query, key, value)]


def dense(query, key, value, scale, window=None, lengths=LENGTHS, parent=PARENT):
    """Explicit scores in the order of the caller's row; (1, H, N, d) -> (N, H_q, d)."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    seen = torch.zeros(starts[-1], starts[-1], dtype=torch.bool)
    for i, length in enumerate(lengths):
        before = range(0) if parent[i] < 0 else range(starts[parent[i]], starts[parent[i] + 1])
        sequence = [*before, *range(starts[i], starts[i] + length)]
        for at, token in enumerate(sequence[len(before) :], len(before)):
            first = 0 if window is None else max(0, at - window + 1)
            seen[token, sequence[first : at + 1]] = True
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value)[0].transpose(0, 1)


class Layer(torch.nn.Module):
    layer_idx = 2


def in_given_order(query, key, value, row, scale, window=None):
    ordered = (x[:, :, row.order] for x in (query, key, value))
    out, _ = TreeCall(row).attend(Layer(), *ordered, None, scaling=scale, sliding_window=window)
    return out[0, row.back]
