"""One process of rank_runs.py: runs the jobs of a JSON file, one after the other, each into its own folder.

Started by torchrun's environment variables, or alone without them.
"""

import faulthandler
import functools
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.tracking import GeneralTracker
from rank_runs import PROMPTS
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.rollout import Completion
from opcd_fast.training import Interrupted, OPCDTrainer
from opcd_fast.training.engines import shards
from opcd_fast.training.settings import OPCDConfig

faulthandler.dump_traceback_later(480, exit=True)  # a rank that waits for ever says where
torch.set_num_threads(1)
STOP = list("abcdefghijklmnopqrstuvw")  # answers of many lengths
ENGINES = {
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    },
}  # fmt: skip
RANK = int(os.environ.get("RANK", "0"))


class Killed(Exception):
    """In one process."""


def allow_sharding_on_the_cpu() -> None:
    """accelerate has FSDP on GPUs only; torch has it over gloo as well, and everything after this choice is its own."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    plain = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


def run(job: dict) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)
    for name in ENGINES["fsdp2"]:
        os.environ.pop(name, None)
    os.environ.update(ENGINES[job.get("engine", "ddp")])
    config = {
        "steps": 3, "batch_size": 5, "max_new_tokens": 7, "learning_rate": 1e-2, "eval_every": 3, "save_every": 1,
        "keep_checkpoints": 9, "device": "cpu", "dtype": "float32", "stop_tokens": STOP, **job["settings"],
    }  # fmt: skip
    stop_after = job.get("kill")

    def kill(record):
        if (record["kind"], record["step"]) == ("step", stop_after):
            raise Killed

    like = job.get("budget_of")  # the folder of a run that ended with a smaller budget
    if like is not None:
        config["micro_batch_tokens"] = json.loads((Path(like) / f"told-{RANK}.json").read_text())["budget"]
    tracker = StepsTracker()
    model = tiny_model(tie_word_embeddings=job.get("tied", False))
    if job.get("saved_parts"):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]))
    trainer = OPCDTrainer(
        model, tiny_tokenizer(), None, PROMPTS, OPCDConfig(**config), eval_prompts=PROMPTS[:3], quiet=True,
        teacher_model=tiny_model(seed=7) if job.get("teacher") else None, callbacks=[kill] if stop_after else [],
        scorer=score if job.get("scores") else None, trackers=[tracker],
    )  # fmt: skip
    if shards():
        assert {type(p).__name__ for p in trainer.model.parameters()} == {"DTensor"}
    if job.get("served"):
        trainer.rollout = served = Served(Path(config["output_dir"]).with_name("served"))
        trainer.samplers.student = trainer.samplers.held_out = served
    if job.get("stale"):
        say_other_logprobs(trainer.rollout)
    if job.get("breaks") and RANK == 0:
        trainer.rollout.generate = broken
    if job.get("signal") is not None and RANK == 1:
        signal_itself(trainer, job["signal"])
    if job.get("memory") is not None and RANK == 1:
        run_out_of_memory(trainer, job["memory"])
    empty = []
    rounds = trainer.ranks.rounds

    def counted(*args):
        for turn in rounds(*args):
            empty.append(turn.empty)
            yield turn

    trainer.ranks.rounds = counted
    try:
        result = trainer.train()
        told = {
            "best": [result.best_step, result.steps, result.stopped_early], "empty": empty,
            "budget": trainer.budget.tokens, "tracked": tracker.steps, "pushed": getattr(trainer.rollout, "pushed", []),
        }  # fmt: skip
        (Path(config["output_dir"]) / f"told-{RANK}.json").write_text(json.dumps(told))
    except Interrupted as stop:
        (Path(config["output_dir"]) / f"stopped-{RANK}").write_text(f"{stop.status} {stop}")
    except Exception as error:
        expected = job.get("error")
        if isinstance(error, Killed) or (stop_after and "Killed" in str(error)):
            return
        if not job.get("lost") and (expected is None or expected not in f"rank {RANK} {error}"):
            raise
        (Path(config["output_dir"]) / f"error-{RANK}").write_text(str(error))


class Served:
    """As a server would, it gets what the model saves; the answers are always the same."""

    uses_model = "saves"

    def __init__(self, folder):
        self.folder, self.pushed = folder, []

    def sync(self, model):
        assert RANK == 0
        self.pushed.append(f"{self.folder}/{len(self.pushed)}")
        model.save_pretrained(self.pushed[-1], save_embedding_layers=False)

    def generate(self, prompts, **sampling):
        return [Completion((7, 8 + i % 2, 9), None, False) for i, _ in enumerate(prompts)]


def score(messages, answer, row):
    assert RANK == 0, "a scorer may say something else on another rank"
    return len(answer)


class StepsTracker(GeneralTracker):
    name, requires_logging_directory, main_process_only = "steps", False, False

    def __init__(self):
        super().__init__()
        self.steps = []

    @property
    def tracker(self):
        return self.steps

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **options):
        self.steps.append(step)


def run_out_of_memory(trainer, call):
    """In the `call`-th backward pass, whose gradients are there by then, or where ranks meet in it: before it."""
    backward, count = trainer.engine.backward, [0]

    def failing(loss):
        count[0] += 1
        fails = count[0] == call
        if not (fails and trainer.engine.sharded):
            backward(loss)
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer.engine.backward = failing


def say_other_logprobs(rollout):
    """As a sampler with other weights would: importance weights are not 1."""
    generate = rollout.generate

    @functools.wraps(generate)
    def stale(*args, **kwargs):
        answers = generate(*args, **kwargs)
        return [
            replace(one, logprobs=tuple(p - 0.1 * (token % 3) for p, token in zip(one.logprobs, one.token_ids)))
            for one in answers
        ]

    rollout.generate = stale


def signal_itself(trainer, step):
    train_step = trainer._train_step

    def signalled(index, interruption):
        if index == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(index, interruption)

    trainer._train_step = signalled


def broken(prompts, *, only=None, **sampling):
    raise OSError("the disk of this rank is gone")


if __name__ == "__main__":
    allow_sharding_on_the_cpu()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
        print("done", job["settings"]["output_dir"], flush=True)
