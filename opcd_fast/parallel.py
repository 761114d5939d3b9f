"""The student on the engine that accelerate was launched with: one process, plain data parallelism, or FSDP2.

Plain data parallelism keeps a whole model on every rank. Ranks work through their micro-batches on their own and
meet once a step, in the sum of the gradients (`total`): how many micro-batches each has, or how often it tries, is its
own business. torch's DDP would meet inside of the last backward pass instead.

FSDP2 meets in every layer. Whatever reads the models' weights runs inside of one module's forward (`Parallel.run`). A
decoder layer is gathered when that layer runs, and what lies outside of the layers (embeddings, last norm, lm-head)
when that module's forward begins: the head is gathered once per micro-batch, not for every chunk of the loss, and its
gradient takes the engine's own way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from opcd_fast import transformers_seam as seam
from opcd_fast.batch import Sample
from opcd_fast.config import OPCDConfig
from opcd_fast.errors import InputError
from opcd_fast.importance import Drift
from opcd_fast.loss import LossStats
from opcd_fast.model_pair import ModelPair, is_peft
from opcd_fast.optimizers import make_optimizer
from opcd_fast.quantized import is_quantized
from opcd_fast.ranks import Ranks, map_tensors
from opcd_fast.virtual_tokens import virtual_tokens

T = TypeVar("T")


class WorkInside(nn.Module):
    """The models of a run as one module, whose forward is the work it is given."""

    def __init__(self, models: list[Any]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        # What accelerate asks a transformers model for: the layers that are gathered one by one.
        self._no_split_modules = sorted({type(layer).__name__ for m in models for layer in seam.layers_of(m)})

    def forward(self, work: Callable[[], T]) -> T:
        return work()


class Parallel:
    """`pair`'s models, prepared by `accelerator`, with the optimizer of what is trained; `device`: where that will be.

    Where weights are sharded that happens here, in place: the models keep their identity, their parameters become
    other tensors. Collective, as are all methods.

    Raises InputError for settings that the engine does not go with.
    """

    def __init__(
        self,
        accelerator: Any,
        ranks: Ranks,
        pair: ModelPair,
        config: OPCDConfig,
        device: torch.device,
    ) -> None:
        self._accelerator, self.ranks = accelerator, ranks
        kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
        self.sharded = kind == "FSDP"  # FSDP2: acceleration.py refuses the first version
        student = pair.student
        if self.sharded:
            refuse_sharded(pair, config)
        trained = [p for p in student.parameters() if p.requires_grad]
        prefix = virtual_tokens(student) > 0
        optimizer = make_optimizer(config, trained, device, adapter=is_peft(student), prefix=prefix)
        self.module: Any = None
        if self.sharded:
            models = {id(m): m for m in (student, pair.teacher, pair.reference) if m}
            self.module, self.optimizer = accelerator.prepare(WorkInside(list(models.values())), optimizer)
            self._reshard = [(m, m is not self.module) for m in self.module.modules() if _is_fsdp(m)]
        else:
            self.optimizer = accelerator.prepare(optimizer)
        self._student = student
        self.parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
        if ranks.world > 1 and not self.sharded:  # the first weights of a fresh adapter were drawn by each
            for parameter in self.parameters.values():
                torch.distributed.broadcast(parameter.data, 0)
        self._whole = False

    # ------------------------------------------------------------------------------------------ a step

    def run(self, work: Callable[[], T]) -> T:
        """`work()` where the models' weights can be read, gradients included."""
        return work() if self.module is None or self._whole else self.module(work)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch. FSDP2 sends them each time, because whole gradients would need the memory
        that sharding is there to save; and it takes the mean over the ranks, where the sum is wanted."""
        self._accelerator.backward(loss * self.ranks.world if self.sharded else loss)

    def total(
        self, loss: float, statistics: list[LossStats], drift: Drift
    ) -> tuple[float, list[LossStats], Drift]:
        """What all ranks' shares of a step come to; their gradients too, which are summed in place."""
        if not self.sharded and self.ranks.world > 1:
            self._sum_gradients()
        return self.ranks.sum(loss), self.ranks.gather_lists(statistics), Drift.total(self.ranks.gather(drift))

    def _sum_gradients(self) -> None:
        mine = [p.grad is not None for p in self.parameters.values()]  # none at all without a micro-batch
        anywhere = [any(found) for found in zip(*self.ranks.gather(mine))]
        wanted = [p for p, found in zip(self.parameters.values(), anywhere) if found]
        for parameter in wanted:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sums = [torch.distributed.all_reduce(p.grad, async_op=True) for p in wanted]
        for one in sums:
            one.wait()

    def clip(self, limit: float) -> float:
        """Scale gradients down to the norm `limit` over all parameters of all ranks; returns the norm before that."""
        norm = self._accelerator.clip_grad_norm_(self.parameters.values(), limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Every rank has all weights, for as long as the block is open: for generation, whose number of forward passes
        differs between ranks. They must fit one device in the compute type."""
        if not self.sharded or self._whole:
            yield
            return
        self.module(lambda: None)  # the first forward decides which module is the root
        try:
            for module, _ in self._reshard:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
            self._whole = True
            yield
        finally:
            self._whole = False
            for module, reshard in self._reshard:
                module.reshard()
                module.set_reshard_after_forward(reshard, recurse=False)

    def sampler(self, sampler: Any) -> Any:
        """`sampler` as all ranks use it together."""
        return SharedSampler(sampler, self) if self.sharded or self.ranks.world > 1 else sampler

    def check_teacher(self, *teachers: Any) -> None:
        """Raise InputError where a teacher's number of forward passes would differ between ranks that meet in each."""
        for teacher in teachers:
            if self.sharded and teacher is not None and not teacher.run_once_a_call():
                raise InputError(
                    f"this model's teacher runs on path {teacher.path!r}, once per context or sequence, which differ "
                    "between ranks; sharded weights do not go with that: use plain data parallelism (DDP)"
                )

    def read_contexts(self, teacher: Any, samples: Sequence[Sample]) -> None:
        """Where weights are sharded, all ranks read the contexts of all samples now, in one order: each reading runs
        the model, and none may run it alone."""
        if self.sharded:
            self.run(lambda: teacher.read(sorted({sample.context_index for sample in samples})))

    # ------------------------------------------------------------------------------------------ checkpoints

    def gathered(self, value: Any) -> Any:
        """`value` with whole CPU tensors for sharded ones on rank 0; on the other ranks with None for every tensor."""
        if self.ranks.world == 1 and not self.sharded:
            return value

        def whole(tensor: Tensor) -> Tensor | None:
            full = tensor.detach()
            if hasattr(full, "full_tensor"):
                full = full.full_tensor()
            return full.cpu() if self.ranks.main else None

        return map_tensors(value, whole)

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """Put whole weights and an optimizer's whole state back, however many ranks they came from."""
        for name, parameter in self.parameters.items():
            parameter.copy_(_sharded_like(parameter, weights[name]))
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        in_order = [p for group in inner.param_groups for p in group["params"]]
        state = {
            index: {
                key: _sharded_like(in_order[index], value) if _of_parameter(value, in_order[index]) else value
                for key, value in kept.items()
            }
            for index, kept in optimizer["state"].items()
        }
        self.optimizer.load_state_dict({**optimizer, "state": state})

    def weights_writer(self, tokenizer: Any) -> Callable[[Path], None]:
        """What writes the student's whole weights of now (the adapter, or the model) and `tokenizer` into a folder, on
        rank 0."""
        state = self.gathered(self._student.state_dict()) if self.sharded else None

        def fill(folder: Path) -> None:
            model = self._accelerator.unwrap_model(self._student)
            # An adapter on linear layers leaves the embeddings alone; "auto" would ask the hub whether it did.
            options: dict[str, Any] = {"save_embedding_layers": False} if is_peft(model) else {}
            if state is not None:
                options["state_dict"] = state
            model.save_pretrained(folder, save_function=self._accelerator.save, **options)
            tokenizer.save_pretrained(folder)

        return fill


class SharedSampler:
    """A sampler whose prompts are shared out among the ranks, and whose answers all ranks get.

    One whose `generate` takes `only` (a range of the prompts) answers each rank's part there, with the random numbers
    that it would have used for all; any other runs on rank 0 alone.
    """

    def __init__(self, sampler: Any, parallel: Parallel) -> None:
        self._sampler, self._parallel, self._ranks = sampler, parallel, parallel.ranks
        self._takes_part = "only" in inspect.signature(sampler.generate).parameters

    def generate(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Any]:
        part = self._ranks.part(len(prompts))

        def answers() -> list[Any]:
            if self._takes_part:
                return self._sampler.generate(prompts, only=part, **sampling)
            return self._sampler.generate(prompts, **sampling) if self._ranks.main else []

        with self._parallel.whole():
            return self._ranks.gather_lists(self._ranks.together(answers))

    def sync(self, model: Any = None) -> None:
        if self._takes_part:
            self._sampler.sync(model)
            return
        with self._parallel.whole():
            self._ranks.on_main(lambda: self._sampler.sync(model))


def refuse_sharded(pair: ModelPair, config: OPCDConfig) -> None:
    """Raise InputError for what would hang, or be wrong, where ranks meet in every layer of every forward pass."""

    def wrong(setting: str, reason: str, remedy: str = "use plain data parallelism (DDP)") -> InputError:
        return InputError(f"{setting} does not go with sharded weights: {reason}; {remedy}")

    if pair.moving is not None:
        raise wrong(f"teacher_mode={config.teacher_mode!r}", "the teacher is a second copy that must follow")
    models = (pair.student, pair.teacher, pair.reference)
    if any(m is not None and is_quantized(m) for m in models):
        raise wrong("4-bit weights", "their blocks cannot be cut")
    if config.teacher_device != "auto" or config.teacher_offload:
        setting = "teacher_offload" if config.teacher_offload else "teacher_device"
        raise wrong(setting, "the teacher is sharded with the student", "drop it")
    if config.num_virtual_tokens or virtual_tokens(pair.student):
        raise wrong("num_virtual_tokens", "the prefix is made outside of the modules that gather weights")
    if config.optimizer != "adamw_torch":
        raise wrong(f"optimizer={config.optimizer!r}", "it does not know them", "use 'adamw_torch'")
    for name in ("prefix_store", "max_prefix_bytes", "teacher_batch_bytes"):
        if getattr(config, name) is not None:
            raise wrong(name, "ranks would run the teacher at different times", "drop it")
    if config.merge_for_rollout:
        raise wrong("merge_for_rollout=True", "the merged copy would be a whole model on every rank", "drop it")
    if config.teacher_path not in ("auto", "merge", "mask"):
        raise wrong(
            f"teacher_path={config.teacher_path!r}", "it runs the model once per context or sequence, which differ "
            "between ranks", "use 'auto', or plain data parallelism (DDP)",
        )  # fmt: skip


def _is_fsdp(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _of_parameter(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0


def _sharded_like(like: Tensor, full: Tensor) -> Tensor:
    """`full`, the same on every rank, sharded as `like` is."""
    full = full.to(like.device)
    if not hasattr(like, "full_tensor"):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(full.to(like.dtype), like.device_mesh, like.placements)
