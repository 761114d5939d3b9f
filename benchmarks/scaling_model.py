"""`python -m benchmarks.scaling_model`: what one training step costs, and what each rank of a cluster holds.

Arithmetic, unmeasured on a device. A dense decoder; B answers of S tokens to prompts of Q tokens, a context of P
tokens that is read already, W ranks that share the answers out evenly. Counted:

- FLOPs of the bodies as in `benchmarks/teacher_model.py` (Kaplan et al., arXiv 2001.08361, section 2.1). A backward
  pass costs two forward passes, one where the weights are frozen (LoRA): the products with the weights' gradients fall
  away. Gradient checkpointing adds one forward pass.
- The loss: 2 N V D for each of its products, 4 of them, 3 with a frozen head.
- Bytes held by mixed-precision Adam: 2 for the bf16 weight that is gathered, and of what is trained 4 for the master
  copy, 4 for the gradient and 8 for both moments (Rajbhandari et al., arXiv 1910.02054, section 3.1).
- Bytes sent, of an all-gather or a reduce-scatter of M bytes over W ranks: M (W - 1) / W by each rank; of an all-reduce
  twice that (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009).
- Decoding: every token of the batch reads the weights once, and the keys and values before it.

Left out: norms, activations other than those kept for backward, launches, fragmentation, overlap of sending and
computing, waiting for the longest answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.models import SHAPES, Shape
from benchmarks.teacher_model import shared_flops

FLOPS, BANDWIDTH = 800e12, 3.0e12  # of an H100, assumed: of a large bf16 product; bytes read and written per second
LINK = 50e9  # bytes per second that one GPU sends to another machine: a port of 400 Gbit/s for each GPU


@dataclass(frozen=True)
class Job:
    """One step: W `ranks`, B `answers` of S `response` tokens to `prompt` tokens after a `context`."""

    shape: Shape
    ranks: int
    answers: int
    response: int
    prompt: int = 128
    context: int = 4096
    lora_rank: int = 0  # 0: the whole model is trained, and a frozen copy of it teaches
    micro_batches: int = 1  # of each rank
    sharded: bool = True  # FSDP2; otherwise DDP

    @property
    def head(self) -> int:
        """Weights of the lm-head; the embeddings have as many, untied."""
        return self.shape.vocabulary * self.shape.hidden

    @property
    def layer(self) -> int:
        """Weights of one layer."""
        return sum(a * b for a, b in self.shape.products)

    @property
    def parameters(self) -> int:
        return self.shape.layers * self.layer + 2 * self.head

    @property
    def trained(self) -> int:
        if not self.lora_rank:
            return self.parameters
        return self.shape.layers * self.lora_rank * sum(a + b for a, b in self.shape.products)

    @property
    def batch(self) -> int:
        """Answers of a rank."""
        return -(-self.answers // self.ranks)

    def flops(self) -> dict[str, float]:
        """Of one step on all ranks, with gradient checkpointing."""
        length = self.prompt + self.response
        forward = shared_flops(self.shape, 0, length, self.answers, build=False)
        return {
            "teacher": shared_flops(self.shape, self.context, length, self.answers, build=False),
            "student": forward,
            "loss": (3 if self.lora_rank else 4) * 2.0 * self.answers * self.response * self.head,
            "backward": forward * (2 if self.lora_rank else 3),
        }

    def seconds(self) -> dict[str, float]:
        """Of one step, each part by itself; nothing overlaps."""
        parts = {part: flops / self.ranks / FLOPS for part, flops in self.flops().items()}
        return {"rollout": self.rollout_seconds(), **parts, "sending": self.sent_bytes()["all"] / LINK}

    def rollout_seconds(self) -> float:
        """All of a rank's answers at once, on whole weights in bf16."""
        keys = self.shape.kv_bytes(self.prompt + self.response // 2, 2) * self.batch
        weights = 2 * (self.parameters - self.head)  # embeddings are looked up, not read
        arithmetic = self.batch * (self.shape.flops_per_token + 2 * self.head) / FLOPS
        return self.response * max((weights + keys) / BANDWIDTH, arithmetic)

    def sent_bytes(self) -> dict[str, float]:
        """By one rank in one step. "all" is the sum."""
        share = (self.ranks - 1) / self.ranks
        if not self.sharded:
            return {"gradients": 8.0 * self.trained * share, "all": 8.0 * self.trained * share}
        gathered = 2.0 * self.parameters * share
        parts = {
            "teacher's weights": self.micro_batches * gathered,
            "student's weights": self.micro_batches * 2 * gathered,  # forward, and again for backward
            "gradients": self.micro_batches * 4.0 * self.trained * share,
            "weights for rollouts": gathered,
        }
        return {**parts, "all": sum(parts.values())}

    def held_bytes(self) -> dict[str, float]:
        """By one rank while it scores and trains, by part."""
        over = self.ranks if self.sharded else 1
        # A frozen base stays in bf16, and teaches as well; a model that is trained has a frozen copy.
        student = 2.0 * self.parameters + 4.0 * self.trained if self.lora_rank else 4.0 * self.parameters
        copies = 0 if self.lora_rank else 1
        tokens = -(-self.answers // (self.ranks * self.micro_batches)) * (self.prompt + self.response)
        parts = {
            "student's weights": student / over,
            "teacher's weights": copies * 2.0 * self.parameters / over,
            "gradients": 4.0 * self.trained / over,
            "optimizer": 8.0 * self.trained / over,
            "context": float(self.shape.kv_bytes(self.context, 2)),
            "activations": 2.0 * tokens * self.shape.hidden * self.shape.layers,
        }
        if self.sharded:  # two layers, one of them on its way, and what lies outside of the layers
            parts["gathered weights"] = 2 * 2.0 * self.layer + (1 + copies) * 2 * 2.0 * self.head
        return parts

    def rollout_bytes(self) -> dict[str, float]:
        """By one rank in addition to its shards while it answers: whole weights in bf16, and keys of its answers."""
        whole = 2.0 * self.parameters if self.sharded else 0.0
        keys = self.batch * self.shape.kv_bytes(self.prompt + self.response, 2)
        return {"whole weights": whole, "keys": float(keys)}


QWEN_8B = Job(SHAPES["Qwen3-8B"], ranks=8, answers=128, response=512, lora_rank=16, sharded=False)
LORA_70B = Job(SHAPES["Llama-3-70B"], ranks=64, answers=512, response=1024, lora_rank=16)
FULL_70B = Job(SHAPES["Llama-3-70B"], ranks=64, answers=512, response=1024, micro_batches=2)
JOBS = {"8B, LoRA, DDP on 8": QWEN_8B, "70B, LoRA, FSDP2 on 64": LORA_70B, "70B, full, FSDP2 on 64": FULL_70B}


def markdown() -> list[str]:
    """The tables of docs/scaling.md."""

    def table(title: str, parts_of: Callable[[Job], dict[str, float]], unit: float) -> list[str]:
        lines = [f"| {title} | {' | '.join(JOBS)} |", "|---|" + "---|" * len(JOBS)]
        for part in parts_of(FULL_70B) | parts_of(QWEN_8B):
            cells = [f"{parts_of(job).get(part, 0) / unit:.2f}" for job in JOBS.values()]
            lines.append(f"| {part} | {' | '.join(cells)} |")
        return lines

    def held(job: Job) -> dict[str, float]:
        training = job.held_bytes()
        rollouts = {f"rollouts in this process: {part}": size for part, size in job.rollout_bytes().items()}
        return {**training, "**while training**": sum(training.values()), **rollouts}

    return [*table("GiB held by a rank", held, 2**30), "", *table("seconds of a step", Job.seconds, 1.0), "",
            *table("GiB sent by a rank in a step", Job.sent_bytes, 2**30)]  # fmt: skip


if __name__ == "__main__":
    print("\n".join(markdown()))
