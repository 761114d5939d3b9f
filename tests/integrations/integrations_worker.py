"""One of two processes on the CPU (gloo): trains with an integration and prints what came out.

Called as `integrations_worker.py JOB FOLDER` with the environment of torch.distributed; prints one JSON line.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "support")]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def differ(model):
    """The largest difference between the processes' trained weights."""
    mine = weights(model)
    others = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    return max(float((other - mine).abs().max()) for other in others)


def transformers_trainer(folder):
    """Given answers: two processes make the step of one."""
    from test_integrations_transformers import make
    from tiny import tiny_model

    trainer = make(
        folder, tiny_model(1), tiny_model(2), per_device_train_batch_size=2, max_steps=1, optim="sgd",
        learning_rate=1.0,
    )  # fmt: skip
    loss = trainer.train().training_loss
    return {"differ": differ(trainer.model), "loss": loss, "weights": weights(trainer.model).tolist()}


def trl_trainer(kind, folder, fused):
    from trl_runs import TRAINERS

    from opcd_fast.integrations.trl import use_fused_loss

    more = {"max_steps": 2, "per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 0.5}
    trainer = TRAINERS[kind](folder, **more)
    if fused:
        use_fused_loss(trainer)
    loss = trainer.train().training_loss
    return {"differ": differ(trainer.model), "loss": loss, "weights": weights(trainer.model).tolist()}


def context_trainer(folder):
    """On-policy, so each process has answers of its own; the step is that of the mean over all of their tokens."""
    from test_integrations_trl_context import CONTEXT, _Base, make, oracle
    from tiny import lora_model

    trainer = make(folder, lora_model(), others={}, max_steps=1, optim="sgd", learning_rate=1.0)
    before = weights(trainer.model)
    seen, ours = {}, trainer._compute_loss

    def both(student, inputs, num_items):
        total, count = oracle(trainer, student, _Base(student), inputs, lambda text: CONTEXT)
        parameters = [p for p in student.parameters() if p.requires_grad]
        seen["gradient"] = torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])
        seen["count"] = torch.tensor(float(count))
        return ours(student, inputs, num_items)

    trainer._compute_loss = both
    trainer.train()
    for value in seen.values():
        dist.all_reduce(value)
    wanted = seen["gradient"] / seen["count"]
    moved = before - weights(trainer.model)
    return {"differ": differ(trainer.model), "error": float((moved - wanted).norm() / wanted.norm())}


def verl_forward(folder):
    """The forward that verl would be given, under FSDP2."""
    import test_integrations_verl as alone
    from tiny import lora_model, tiny_tokenizer
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaForCausalLM

    from opcd_fast.integrations import verl
    from opcd_fast.integrations.forward import Heads

    dist.init_process_group("gloo")
    model, tokenizer = lora_model(), tiny_tokenizer()
    sequences = alone.rows(tokenizer)
    wanted = torch.cat([kl.detach() for kl in alone.response_kl(lora_model(), sequences, 1.0)])
    teach, head = verl.ContextInFront(tokenizer, alone.CONTEXT), Heads(LlamaForCausalLM.forward)
    LlamaForCausalLM.forward = verl.with_divergence(alone.fused, teach, head)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.train(), mesh=mesh)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses, error = [], None
    for _ in range(4):
        output = model(**alone.packed(sequences), return_dict=True)
        kl = torch.cat(alone.answers_of(output.fused_linear_aux.distillation_losses, sequences))
        if error is None:
            error = float((kl.detach() - wanted).norm() / wanted.norm())
        losses.append(float(kl.mean().detach()))
        optimizer.zero_grad()
        kl.mean().backward()
        optimizer.step()
    return {"error": error, "losses": losses}


JOBS = {
    "transformers": transformers_trainer,
    "context": context_trainer,
    "verl": verl_forward,
    **{
        f"{kind} {name}": lambda folder, kind=kind, fused=fused: trl_trainer(kind, folder, fused)
        for kind in ("distillation", "gkd", "sdft")
        for name, fused in (("ours", True), ("theirs", False))
    },
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    print("RESULT " + json.dumps(JOBS[sys.argv[1]](Path(sys.argv[2]))))
    if dist.is_initialized():
        dist.destroy_process_group()
