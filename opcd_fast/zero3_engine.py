"""Weights, gradients and optimizer sharded by DeepSpeed's ZeRO-3.

Every module gathers its own weights when it runs, so ranks meet in each. The lm-head, whose weights the loss reads by
itself, is gathered when the forward of `WorkInside` begins, and again when its backward does.

An adapter's weights stay fp32 beside a base in the compute type, as in one process. Full fine-tuning runs on weights in
the compute type; the engine keeps fp32 masters of them. Gradients are summed in fp32 in both.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from opcd_fast import transformers_seam as seam
from opcd_fast.engine import ShardingEngine, WorkInside, of_parameter
from opcd_fast.errors import InputError
from opcd_fast.heads import LMHead
from opcd_fast.model_pair import ModelPair, is_peft
from opcd_fast.ranks import Ranks
from opcd_fast.weight_versions import HOME


class ZeRO3Engine(ShardingEngine):
    """Parameters keep their identity and are empty unless gathered.

    dtype: the compute type. max_grad_norm: the engine clips by itself, in `step`; None or 0 for not at all.
    """

    def __init__(
        self, accelerator: Any, ranks: Ranks, pair: ModelPair, optimizer: Any, dtype: torch.dtype, max_grad_norm: float
    ) -> None:
        self._limit = max_grad_norm or 0.0
        self._low = dtype != torch.float32
        super().__init__(accelerator, ranks, pair, optimizer)

    def _prepare(self, pair: ModelPair, optimizer: Any) -> None:
        self._groups = optimizer.state_dict()["param_groups"]
        self._in_order = [p for group in optimizer.param_groups for p in group["params"]]
        masters = not is_peft(pair.student)
        self._head = LMHead.from_model(pair.student)
        plugin = self.accelerator.state.deepspeed_plugin
        plugin.deepspeed_config.update(settings(self._low and masters, self._limit, self.ranks.world))
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        inside = WorkInside(pair)
        self._module, self.optimizer = self.accelerator.prepare(inside, optimizer)
        self._zero = self._module.optimizer
        self._offload = self._zero.parameter_offload
        self._everything: list[Any] = list(inside.parameters())
        for parameter in self._everything:
            setattr(parameter, HOME, parameter.ds_tensor)  # its own memory comes and goes
        self._register_heads(inside)
        self._guard_saving()

    def _register_heads(self, inside: WorkInside) -> None:
        from deepspeed.runtime.zero import register_external_parameter

        for model in inside.models:
            for weights in seam.head_weights(model):
                if weights is not None:
                    register_external_parameter(inside, weights)

    # ------------------------------------------------------------------------------------------ a step

    @contextmanager
    def _gathering(self) -> Iterator[None]:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(self._everything):
            # A module's hooks would give its weights back after the first token.
            for handle in (*self._offload.forward_hooks, *self._offload.backward_hooks):
                handle.remove()
            self._offload.forward_hooks, self._offload.backward_hooks = [], []
            try:
                yield
            finally:
                self._offload._register_deepspeed_module(self._offload.module)

    def autocast(self) -> AbstractContextManager[Any]:
        device = self._everything[0].device.type
        return torch.autocast(device, dtype=torch.bfloat16) if self._low else nullcontext()

    def student_head(self) -> LMHead:
        return self._head

    def zero_grad(self) -> None:
        self._zero.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Sends the gradients each time, and takes their mean over the ranks, where the sum is wanted."""
        self._module.set_gradient_accumulation_boundary(False)
        self._module.backward(loss * self.ranks.world, scale_wrt_gas=False)

    def clip(self, limit: float) -> float:
        """The norm over all ranks; `step` scales the gradients down."""
        from deepspeed.utils import safe_get_local_grad

        assert limit == (self._limit or math.inf)
        mine = [safe_get_local_grad(p).float().square().sum() for p in self._in_order]
        return math.sqrt(self.ranks.sum(float(torch.stack(mine).double().sum())))

    def step(self) -> None:
        self._module.set_gradient_accumulation_boundary(True)
        self._module.step()
        self._count_change()

    def _count_change(self) -> None:
        """The engine writes weights in ways that torch does not count, and samplers and teachers go by the count."""
        increment_version([*self._in_order, *(p.ds_tensor for p in self._in_order)])

    # ------------------------------------------------------------------------------------------ checkpoints

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self._zero.optimizer.state
        entries: dict[str, Any] = next(iter(inner.values()), {})
        flat = self._zero.fp32_partitioned_groups_flat[0]
        state = {
            index: {
                key: self._kept(safe_get_full_optimizer_state(p, key).view(p.ds_shape))
                if of_parameter(value, flat.shape)
                else _counter(value, torch.device("cpu"))
                for key, value in entries.items()
            }
            for index, p in enumerate(self._in_order if entries else ())
        }
        return self.gathered(self.parameters), {"state": state, "param_groups": self._groups}

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        for name, parameter in self.parameters.items():
            self._set(parameter, weights[name])
        self._count_change()
        if not optimizer["state"]:
            return
        # One process keeps none for a parameter that never had a gradient.
        index, first = next(iter(optimizer["state"].items()))
        shape = self._in_order[index].ds_shape
        inner, fused = self._zero.optimizer.state, self._groups[0].get("fused")
        for flat in self._zero.fp32_partitioned_groups_flat:
            place = flat.device if fused else torch.device("cpu")
            inner[flat] = {
                key: torch.zeros_like(flat) if of_parameter(value, shape) else _counter(value, place)
                for key, value in first.items()
            }
        for index, parameter in enumerate(self._in_order):
            for key, value in optimizer["state"].get(index, {}).items():
                if of_parameter(value, parameter.ds_shape):
                    safe_set_local_optimizer_state(parameter, self._mine(parameter, value), key)

    def _guard_saving(self) -> None:
        """Sharded weights are empty, and transformers would save them without a word."""
        save = self.student.save_pretrained

        def checked(folder: str | Path, *args: Any, state_dict: Any = None, **options: Any) -> None:
            if state_dict is None and not self._is_whole:
                raise InputError(
                    "the model's weights are sharded, and only empty ones could be saved; use trainer.save(folder), or "
                    "load the run's final/"
                )
            kinds = {one.dtype for one in (state_dict or {}).values() if one.is_floating_point()}  # saving empties it
            save(folder, *args, state_dict=state_dict, **options)
            config = Path(folder) / "config.json"
            if len(kinds) == 1 and config.is_file():  # where the model's type is said, not that of its fp32 masters
                told = json.loads(config.read_text(encoding="utf-8")) | {"dtype": str(kinds.pop())[6:]}
                config.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

        self.student.save_pretrained = checked

    def _full(self, tensor: Tensor) -> Tensor:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        if not hasattr(tensor, "ds_id"):
            return tensor
        if tensor.requires_grad:  # its fp32 master
            return safe_get_full_fp32_param(tensor).view(tensor.ds_shape)  # type: ignore[attr-defined]
        with GatheredParameters([tensor]):
            return tensor.detach().clone()

    def _mine(self, like: Tensor, full: Tensor) -> Tensor:
        """The last rank's part may be filled up with zeros: all have one length."""
        size = like.ds_tensor.numel()  # type: ignore[attr-defined]
        part = full.flatten()[size * self.ranks.rank : size * (self.ranks.rank + 1)]
        out = torch.zeros(size, dtype=torch.float32, device=like.device)
        out[: part.numel()] = part
        return out

    def _set(self, parameter: Tensor, weights: Tensor) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_local_fp32_param

        with GatheredParameters([parameter], modifier_rank=0):
            if self.ranks.main:
                parameter.data.copy_(weights)
        safe_set_local_fp32_param(parameter, self._mine(parameter, weights))


def _counter(value: Any, place: torch.device) -> Any:
    """What is no average of a parameter: the number of steps, which an optimizer counts up in place."""
    return value.detach().to(place, copy=True) if isinstance(value, Tensor) else value


def settings(low: bool, max_grad_norm: float, world: int) -> dict[str, Any]:
    """What a run decides of DeepSpeed's configuration. low: weights are bf16, with fp32 masters."""
    return {
        "train_batch_size": world,  # of no consequence: the loop makes its own micro-batches
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": low},
        "fp16": {"enabled": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "torch_autocast": {"enabled": False},
        "zero_force_ds_cpu_optimizer": False,
    }
