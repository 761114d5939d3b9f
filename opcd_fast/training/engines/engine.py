"""What holds a run's weights and moves its gradients; this one keeps whole weights on every rank.

Plain data parallelism: ranks work through their micro-batches on their own and meet once a step, in the sum of the
gradients. How many micro-batches each has, or how often it tries, is its own business. torch's DDP would meet inside of
the last backward pass instead. With one process there is nobody to meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from opcd_fast.data import Sample
from opcd_fast.errors import InputError
from opcd_fast.loss import Drift, LossStats
from opcd_fast.training.engines.model_pair import ModelPair, is_peft
from opcd_fast.training.engines.ranks import Ranks, map_tensors

F = TypeVar("F", bound=Callable[..., Any])


class Engine:
    """`pair`'s models and the `optimizer` of what is trained, prepared by `accelerator`. schedule: of its rate, see
    `schedule_of`."""

    sharded = False
    """Whether ranks meet inside of every pass."""

    def __init__(
        self, accelerator: Any, ranks: Ranks, pair: ModelPair, optimizer: Any, schedule: Callable[[int], float]
    ) -> None:
        self.accelerator, self.ranks, self.student = accelerator, ranks, pair.student
        self._rate, self._schedule = optimizer.param_groups[0]["lr"], schedule
        self._prepare(pair, optimizer)
        self.parameters = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        """What is trained, by name."""

    def _prepare(self, pair: ModelPair, optimizer: Any) -> None:
        self.optimizer = self.accelerator.prepare(optimizer)
        if self.ranks.world > 1:  # the first weights of a fresh adapter were drawn by each
            for parameter in self.student.parameters():
                if parameter.requires_grad:
                    torch.distributed.broadcast(parameter.data, 0)

    # ------------------------------------------------------------------------------------------ a step

    def inside(self, work: F) -> F:
        """`work`, as it is called where the models' weights can be read, gradients included."""
        return work

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Every rank has all weights, for as long as the block is open: for generation, whose number of forward passes
        differs between ranks. They must fit one device in the compute type."""
        yield

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch."""
        self.accelerator.backward(loss)

    def _sum_gradients(self) -> None:
        if self.ranks.world == 1:
            return
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
        norm = self.accelerator.clip_grad_norm_(self.parameters.values(), limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def step(self, number: int) -> float:
        """Move the weights; returns the learning rate of this step, counted from 0."""
        rate = self._rate * self._schedule(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return rate

    def total(
        self, loss: float, statistics: list[LossStats], drift: Drift
    ) -> tuple[float, list[LossStats], Drift]:
        """What all ranks' shares of a step come to; their gradients too, which are summed in place."""
        self._sum_gradients()
        return sum(self.ranks.gather(loss)), self.ranks.gather_lists(statistics), Drift.total(self.ranks.gather(drift))

    # ------------------------------------------------------------------------------------------ teachers

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
            self.inside(teacher.read)(sorted({sample.context_index for sample in samples}))

    # ------------------------------------------------------------------------------------------ checkpoints

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Trained weights by name, and the optimizer's `state_dict`, of whole tensors; see `gathered`."""
        return self.gathered((self.parameters, self.optimizer.state_dict()))

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """Put whole weights and an optimizer's whole state back, however many ranks they came from."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self._mine(parameter, weights[name]))
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        in_order = [p for group in inner.param_groups for p in group["params"]]
        state = {
            index: {
                key: self._mine(in_order[index], value) if of_parameter(value, in_order[index].shape) else value
                for key, value in kept.items()
            }
            for index, kept in optimizer["state"].items()
        }
        self.optimizer.load_state_dict({**optimizer, "state": state})

    def weights_writer(self, tokenizer: Any) -> Callable[[Path], None]:
        """What writes the student's whole weights of now (the adapter, or the model) and `tokenizer` into a folder, on
        rank 0."""
        state = self._whole_student() if self.sharded else None

        def fill(folder: Path) -> None:
            model: Any = self.student
            # An adapter on linear layers leaves the embeddings alone; "auto" would ask the hub whether it did.
            options: dict[str, Any] = {"save_embedding_layers": False} if is_peft(model) else {}
            if state is not None:
                options["state_dict"] = state
            model.save_pretrained(folder, save_function=self.accelerator.save, **options)
            tokenizer.save_pretrained(folder)

        return fill

    @contextmanager
    def saving(self) -> Iterator[None]:
        """On rank 0 the student's `save_pretrained` writes its whole weights of now, for as long as the block is open.
        Nothing is gathered but what it writes, tensor by tensor."""
        if not self.sharded:
            yield
            return
        state, save = self._whole_student(), self.student.save_pretrained
        self.student.save_pretrained = partial(save, state_dict=state)
        try:
            yield
        finally:
            self.student.save_pretrained = save

    def _whole_student(self) -> dict[str, Any]:
        """What `save_pretrained` writes, `gathered`; weights that are tied are one tensor."""
        state = self._saved_tensors()
        found = self.gathered({id(tensor): tensor for tensor in state.values()})
        return {name: found[id(tensor)] for name, tensor in state.items()}

    def _saved_tensors(self) -> dict[str, Tensor]:
        """All of the student's tensors, or those that may belong to its adapter, trained or not."""
        state = self.student.state_dict(keep_vars=True)
        if not is_peft(self.student):
            return state
        parts = ("lora_", "modules_to_save.", "token_adapter.")
        return {name: p for name, p in state.items() if name in self.parameters or any(part in name for part in parts)}

    def gathered(self, value: Any) -> Any:
        """`value` with whole CPU tensors on rank 0 and None for every tensor on the others; as it is, where one process
        has all weights. Tensors are looked for inside of dicts, lists, tuples and dataclasses."""
        if self.ranks.world == 1 and not self.sharded:
            return value

        return map_tensors(value, lambda tensor: self._kept(self._full(tensor)))

    def _kept(self, full: Tensor) -> Tensor | None:
        return full.detach().cpu() if self.ranks.main else None

    def _full(self, tensor: Tensor) -> Tensor:
        return tensor

    def _mine(self, like: Tensor, full: Tensor) -> Tensor:
        """This rank's part of `full`, as it has one of `like`."""
        return full.to(like.device)


def of_parameter(value: Any, shape: torch.Size) -> bool:
    """Whether an entry of an optimizer's state belongs to the numbers of a parameter one by one."""
    return isinstance(value, Tensor) and value.shape == shape and value.ndim > 0
