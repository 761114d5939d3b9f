"""The fused loss in somebody else's training loop: two small networks, one learns the other's distribution.

Needs torch alone. `python examples/loss_in_a_plain_loop.py`
"""

import torch

from opcd_fast.loss import fused_linear_reverse_kl

torch.manual_seed(0)
V, D, N = 5_000, 64, 256
features = torch.randn(N, 32)
teacher_body, teacher_head = torch.nn.Linear(32, D), torch.randn(V, D) / 4
student_body, student_head = torch.nn.Linear(32, D), torch.nn.Parameter(torch.randn(V, D) / 4)
optimizer = torch.optim.Adam([*student_body.parameters(), student_head], lr=3e-3)

with torch.no_grad():
    h_t = teacher_body(features)  # (N, D)
for step in range(101):
    h_s = student_body(features)  # (N, D)
    loss, stats = fused_linear_reverse_kl(h_s, student_head, h_t, teacher_head, return_stats=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 25 == 0:
        print(f"step {step:3d}  KL {loss.item():.4f}  same first choice {stats.top1_agreement.mean().item():.0%}")
