"""One rank of test_sharded_heads.py: rank, world size, rendezvous, backend."""

import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from opcd_fast.loss import LMHead, fused_linear_divergence, fused_linear_logprobs

torch.set_num_threads(1)
rank, world, rendezvous, backend = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
group = dist.group.WORLD

V, D, N = 701, 16, 9
SIZES = (300, 401)  # slices need not be equal
generator = torch.Generator().manual_seed(0)
h, h_t = (torch.randn(N, D, generator=generator) for _ in range(2))
w = torch.randn(V, D, generator=generator) / 4
h_t = h + 0.3 * h_t
bias = torch.randn(V, generator=generator)
weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 0.0, 1.0, 3.0, 1.0])
first = sum(SIZES[:rank])
mine = slice(first, first + SIZES[rank])
# The longest sums run over the vocabulary, on both sides of a comparison, each in an order of its own.
ROUNDING = 2 * torch.finfo(torch.float32).eps * V**0.5


def close(ours, theirs, what, least=1e-12):
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=least))
    assert error <= ROUNDING, f"{what}: {error}"


def run(hidden, head, teacher_head, **options):
    hidden = hidden.clone().requires_grad_()
    loss, stats = fused_linear_divergence(
        hidden, head, h_t, teacher_head, token_weights=weights, return_stats=True, temperature=0.8, **options
    )
    (loss * 2).backward()
    return hidden.grad, loss.detach(), stats


CASES = [
    *({"divergence": name} for name in ("reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl")),
    *({"divergence": "gated_kl", "gate": gate} for gate in ("kl", "tv")),
]
for case in CASES:
    name = " ".join(case.values())
    # Triton's interpreter is slow.
    for options in ({}, {"workspace_bytes": 60_000}) if backend == "torch" else ({"workspace_bytes": 60_000},):
        whole_w, whole_b = w.clone().requires_grad_(), bias.clone().requires_grad_()
        head = LMHead(whole_w, whole_b, softcap=8.0)
        dh, loss, stats = run(h, head, LMHead(w), backend=backend, **case, **options)
        part_w, part_b = w[mine].clone().requires_grad_(), bias[mine].clone().requires_grad_()
        head = LMHead(part_w, part_b, softcap=8.0, group=group)
        sharded = LMHead(w[mine].clone(), group=group)
        dh2, loss2, stats2 = run(h, head, sharded, backend=backend, **case, **options)
        close(loss2, loss, f"{name} loss")
        close(dh2, dh, f"{name} dH")
        close(part_w.grad, whole_w.grad[mine], f"{name} dW")
        close(part_b.grad, whole_b.grad[mine], f"{name} db")
        assert ("gate" in case) == (stats.gate is not None) == (stats2.gate is not None)
        for field, value in vars(stats).items():
            if value is not None:
                close(getattr(stats2, field), value, f"{name} {field}")

# One head in float16: the rank that has a row's token tells the others its logit. One row has none.
half_h, half_t, half_w = h.bfloat16().requires_grad_(), h_t.bfloat16(), w.bfloat16()
ids = torch.arange(N) * 87
ids[3] = -100
for case in CASES:
    results = []
    for part, b, g in ((half_w, bias, None), (half_w[mine].clone(), bias[mine].clone(), group)):
        head = LMHead(part, b, group=g)
        loss, stats = fused_linear_divergence(
            half_h, head, half_t, head, token_weights=weights, return_stats=True, backend=backend, token_ids=ids,
            projection="difference", **case,
        )  # fmt: skip
        assert stats.projection == "difference"
        results.append((loss.detach(), *torch.autograd.grad(loss, half_h), stats))
    name = f"differences, {' '.join(case.values())}"
    assert results[0][2].repeated == results[1][2].repeated < 7
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0.02, atol=1e-4)
    for field, value in vars(results[0][2]).items():
        if value is not None:
            torch.testing.assert_close(getattr(results[1][2], field), value, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="float16"):  # on every rank, though one alone has the number
        large = half_w[mine].clone()
        large[5, 2] = 70_000.0 if rank else 1.0
        head = LMHead(large, group=group)
        fused_linear_divergence(half_h, head, half_t, head, token_ids=ids, projection="difference", backend=backend)

# The top token of some rows lies on the other rank for one model only, in the same place of its slice: agreement must
# be global.
peaked = torch.zeros(V, D)
peaked[5, 0] = peaked[600, 0] = peaked[SIZES[0] + 5, 1] = 50.0
for student_row, teacher_row in ((0, 0), (0, 1), (1, 1)):
    a, b = torch.zeros(1, D), torch.zeros(1, D)
    a[0, student_row], b[0, teacher_row] = 1.0, 1.0
    results = [
        fused_linear_divergence(a, LMHead(x, group=g), b, LMHead(x, group=g), return_stats=True, backend=backend)[1]
        for x, g in ((peaked, None), (peaked[mine].clone(), group))
    ]
    close(results[1].top1_agreement, results[0].top1_agreement, "agreement")
    assert float(results[0].top1_agreement) == float(student_row == teacher_row)

# Tokens that exist in one rank's slice alone.
absent = bias.clone()
absent[: SIZES[0]] = -float("inf")
for case in CASES:
    name = " ".join(case.values())
    heads = LMHead(w, absent), LMHead(w[mine].clone(), absent[mine].clone(), group=group)
    (dh, loss, _), (dh2, loss2, _) = (run(h, head, head, backend=backend, **case) for head in heads)
    assert loss2.isfinite()
    close(loss2, loss, f"{name} loss")
    close(dh2, dh, f"{name} dH")

# A forbidden token on one rank makes the row infinite on every rank, with gradient 0.
forbidden = torch.zeros(V)
forbidden[650] = -float("inf")
part = w[mine].clone()
dh, loss, _ = run(h, LMHead(part, group=group), LMHead(part, forbidden[mine].clone(), group=group))
assert loss == float("inf") and not dh.any()
for gate in ("kl", "tv"):
    options = {"divergence": "gated_kl", "gate": gate, "backend": backend}
    some = LMHead(part, forbidden[mine].clone(), group=group)
    dh, loss, _ = run(h, some, LMHead(part, group=group), **options)
    assert loss == float("inf") and not dh.any()
    dh, loss, stats = run(h, LMHead(part, group=group), some, **options)
    assert loss.isfinite() and (stats.gate == (weights != 0)).all()

# A gradient known only in backward.
for divergence in ("reverse_kl", "jsd"):
    results = []
    for head in (LMHead(w), LMHead(w[mine].clone(), group=group)):
        leaf = h.clone().requires_grad_()
        kl = fused_linear_divergence(leaf, head, h_t, head, divergence=divergence, reduction="none", backend=backend)
        kl.backward(weights)
        results.append((kl.detach(), leaf.grad))
    close(results[1][0], results[0][0], "late value", least=1.0)
    close(results[1][1], results[0][1], "late dH")

sharded = LMHead(w, group=group)
for call in (
    lambda: fused_linear_divergence(h, sharded, h_t, LMHead(w)),
    lambda: fused_linear_divergence(h, sharded, h_t, sharded, divergence="topk_reverse_kl"),
    lambda: fused_linear_logprobs(h, sharded, torch.zeros(N, dtype=torch.long)),
):
    with pytest.raises(ValueError, match="group"):
        call()

# What the ranks disagree in is an error on all of them, not a rank that waits for ever.
part = w[mine].clone()
for options in ({"workspace_bytes": 60_000 + rank}, {"token_weights": torch.ones(N) if rank else torch.zeros(N)}):
    with pytest.raises(ValueError, match="ranks of a sharded head differ"):
        fused_linear_divergence(h, LMHead(part, group=group), h_t, LMHead(part, group=group), **options)
with pytest.raises(ValueError, match="differ in head weights that require grad"):
    trained = LMHead(part.clone().requires_grad_(rank == 0), group=group)
    fused_linear_divergence(h.clone().requires_grad_(), trained, h_t, LMHead(part, group=group))
os.environ["OPCD_CHECK"] = "1"
if rank == 0:
    part[3, 2] = float("nan")
with pytest.raises(ValueError, match="vocabulary row 3" if rank == 0 else r"rank\(s\) \[0\]"):
    fused_linear_divergence(h, LMHead(part, group=group), h_t, LMHead(part, group=group))
del os.environ["OPCD_CHECK"]

# FSDP2 keeps parameters as DTensors. Each rank has its own rows; the gradient is the mean over ranks, sharded.
mesh = init_device_mesh("cpu", (world,))
parameter = torch.nn.Parameter(distribute_tensor(w.clone(), mesh, [Shard(0)]))
rows = slice(rank * 4, rank * 4 + 4)
calls = []
plain_gather = DTensor.full_tensor
DTensor.full_tensor = lambda self, **o: calls.append(1) or plain_gather(self, **o)
loss = fused_linear_divergence(
    h[rows], LMHead(parameter), h_t[rows], LMHead(parameter), reduction="sum", workspace_bytes=60_000, backend=backend
)
DTensor.full_tensor = plain_gather
assert len(calls) == 1, f"the head was gathered {len(calls)} times"
loss.backward()
whole_w = w.clone().requires_grad_()
fused_linear_divergence(h[:8], whole_w, h_t[:8], w, reduction="sum", backend=backend).backward()
assert isinstance(parameter.grad, DTensor) and parameter.grad.placements == (Shard(0),)
close(parameter.grad.to_local(), (whole_w.grad / world).chunk(world)[rank], "FSDP2 dW")

dist.destroy_process_group()
print("all equal")
