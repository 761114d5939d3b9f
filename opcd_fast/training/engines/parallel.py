"""The engine of a run, as accelerate was launched: one process, plain data parallelism or FSDP2.

What all of them have in common is in `opcd_fast.training.engines.engine`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from opcd_fast.errors import InputError
from opcd_fast.models import is_quantized, virtual_tokens
from opcd_fast.training.engines.acceleration import shards
from opcd_fast.training.engines.engine import Engine
from opcd_fast.training.engines.fsdp2 import FSDP2Engine
from opcd_fast.training.engines.model_pair import ModelPair, is_peft
from opcd_fast.training.engines.optimizers import make_optimizer, schedule_of
from opcd_fast.training.engines.ranks import Ranks
from opcd_fast.training.settings import OPCDConfig, settings_of


def make_engine(accelerator: Any, ranks: Ranks, pair: ModelPair, config: OPCDConfig, device: torch.device) -> Engine:
    """`pair`'s models on the engine of `accelerator`, with the optimizer of what is trained.

    device: where the models will run. Collective, as all methods of what it returns.

    Raises InputError for settings that the engine does not go with.
    """
    sharded = shards()
    if sharded:
        refuse_sharded(pair, config)
    student = pair.student
    trained = [p for p in student.parameters() if p.requires_grad]
    prefix = virtual_tokens(student) > 0
    optimizer = make_optimizer(config, trained, device, adapter=is_peft(student), prefix=prefix)
    return (FSDP2Engine if sharded else Engine)(accelerator, ranks, pair, optimizer, schedule_of(config))


class SharedSampler:
    """A sampler whose prompts are shared out among the ranks, and whose answers all ranks get.

    One whose `generate` takes `only` (a range of the prompts) answers each rank's part there, with the random numbers
    that it would have used for all; any other runs on rank 0 alone. One whose `uses_model` is "saves" knows the model
    by what that writes in `sync`, one with "no" not at all, and neither needs whole weights on the ranks.
    """

    def __init__(self, sampler: Any, engine: Engine) -> None:
        self._sampler, self._engine, self._ranks = sampler, engine, engine.ranks
        self._takes_part = "only" in inspect.signature(sampler.generate).parameters
        self._uses_model = getattr(sampler, "uses_model", "runs")

    def generate(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Any]:
        part = self._ranks.part(len(prompts))

        def answers() -> list[Any]:
            if self._takes_part:
                return self._sampler.generate(prompts, only=part, **sampling)
            return self._sampler.generate(prompts, **sampling) if self._ranks.main else []

        with self._engine.whole() if self._uses_model == "runs" else nullcontext():
            return self._ranks.gather_lists(self._ranks.together(answers))

    def sync(self, model: Any = None) -> None:
        if self._takes_part:
            self._sampler.sync(model)
            return
        around: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "runs": self._engine.whole, "saves": self._engine.saving, "no": nullcontext,
        }  # fmt: skip
        with around[self._uses_model]():
            self._ranks.on_main(lambda: self._sampler.sync(model))


def refuse_sharded(pair: ModelPair, config: OPCDConfig) -> None:
    """Raise InputError for what would hang, or be wrong, where ranks meet in every layer of every forward pass."""

    def wrong(what: str, reason: str, remedy: str = "") -> InputError:
        ddp = "use plain data parallelism (DDP)"
        return InputError(f"{what} does not go with sharded weights: {reason}; {remedy}{ddp}")

    for field, known in settings_of(type(config)):
        value, good = getattr(config, field.name), known.sharded
        if good is not None and value not in good.values:
            fitting = " or ".join(map(repr, good.values))
            raise wrong(field.name, good.reason, f"it is {value!r}, set it to {fitting}, or ")
    if any(m is not None and is_quantized(m) for m in (pair.student, pair.teacher, pair.reference)):
        raise wrong("weights in 4 bits", "their blocks cannot be cut")
    if virtual_tokens(pair.student):
        raise wrong("a trained prefix", "it is made outside of the modules that gather weights")
