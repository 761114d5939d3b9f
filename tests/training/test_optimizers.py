"""Optimizers: the one asked for moves the weights, goes on bit for bit, and is refused where it cannot run."""

import json

import pytest
import torch
from resumption import check_resume
from tiny import tiny_model
from training_runs import make

from opcd_fast.errors import InputError
from opcd_fast.training.engines import optimizers
from opcd_fast.training.settings import OPCDConfig

HERE = ["adamw_torch", "adafactor", "adamw_8bit"]
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # matrices of 4,096 numbers and more: smaller ones keep 32 bits


def need(optimizer):
    if optimizer.endswith("8bit"):
        pytest.importorskip("bitsandbytes")


def one(optimizer, shape=(64, 80), **settings):
    """A parameter, and its optimizer."""
    need(optimizer)
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, **settings}
    parameter = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    config = OPCDConfig(optimizer=optimizer, **settings)
    return parameter, optimizers.make_optimizer(config, [parameter], torch.device("cpu"), adapter=False)


def gradients(parameter, steps=5):
    generator = torch.Generator().manual_seed(1)
    slope = torch.randn(parameter.shape, generator=generator)
    return [slope + 0.3 * torch.randn(parameter.shape, generator=generator) for _ in range(steps)]


def adamw_by_hand(start, grads, rate, decay):
    p, m, v = start.double(), 0.0, 0.0
    for t, g in enumerate(grads, 1):
        g = g.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p * (1 - rate * decay) - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return p


def adafactor_by_hand(start, grads, rate, decay):
    """Algorithm 4 of arXiv 1804.04235 with a fixed rate and decoupled weight decay."""
    p, rows, columns = start.double(), 0.0, 0.0
    for t, g in enumerate(grads, 1):
        g, keep = g.double(), 1 - t**-0.8
        square = g * g + 1e-30
        rows = keep * rows + (1 - keep) * square.mean(-1)
        columns = keep * columns + (1 - keep) * square.mean(-2)
        update = g / (rows[:, None] * columns[None] / rows.mean()).sqrt()
        update = update / max(1.0, float(update.pow(2).mean().sqrt()))
        p = p * (1 - rate * decay) - rate * update
    return p


@pytest.mark.parametrize("optimizer", HERE)
def test_each_moves_weights_as_its_paper_says(optimizer):
    parameter, stepper = one(optimizer)
    start, grads = parameter.detach().clone(), gradients(parameter)
    for grad in grads:
        parameter.grad = grad.clone()
        stepper.step()
    by_hand = adafactor_by_hand if optimizer == "adafactor" else adamw_by_hand
    wanted = by_hand(start, grads, 1e-2, 0.1)
    moved = (wanted - start).norm()
    bound = 0.05 if optimizer == "adamw_8bit" else 1e-4  # the state is rounded to 8 bits
    assert (parameter.detach() - wanted).norm() < bound * moved
    if optimizer == "adamw_8bit":
        assert not torch.allclose(parameter.detach().double(), wanted, rtol=0, atol=1e-7), "not rounded at all"


@pytest.mark.parametrize("optimizer", HERE)
def test_bytes_of_the_state(optimizer):
    parameter, stepper = one(optimizer, (256, 512))
    parameter.grad = torch.ones_like(parameter)
    stepper.step()
    state = stepper.state[parameter].items()
    held = sum(x.nbytes for name, x in state if isinstance(x, torch.Tensor) and not name.startswith("qmap"))
    wanted = {"adamw_torch": 8, "adamw_8bit": 2 + 2 * 4 / 256, "adafactor": 4 * (256 + 512) / (256 * 512)}
    assert held / parameter.numel() == pytest.approx(wanted[optimizer], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("lora_rank", [0, 48])
@pytest.mark.parametrize("optimizer", HERE)
def test_resume_is_bit_identical(tokenizer, tmp_path, optimizer, lora_rank):
    need(optimizer)
    settings = {"lora_rank": lora_rank, "learning_rate": 3e-3, "eval_every": 0}

    def made(folder, **more):
        return make(tokenizer, folder, tiny_model(**WIDE), **{**settings, "optimizer": optimizer, **more})

    whole, _ = check_resume(made, tmp_path)
    kind = {"adamw_torch": "AdamW", "adafactor": "Adafactor", "adamw_8bit": "AdamW8bit"}[optimizer]
    assert type(whole.optimizer.optimizer).__name__ == kind
    assert json.loads((tmp_path / "run" / "config.json").read_text())["optimizer"] == optimizer
    other = "adafactor" if optimizer == "adamw_torch" else "adamw_torch"
    with pytest.raises(InputError, match="optimizer differs"):
        made(tmp_path / "run", resume=True, steps=6, optimizer=other).train()


def test_paging_without_a_gpu_is_refused(tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(InputError, match="the run is on cpu; use 'adamw_8bit'"):
        make(tokenizer, tmp_path / "run", optimizer="paged_adamw_8bit")
    assert not (tmp_path / "run").exists()


def test_a_device_without_the_kernel_is_refused(tokenizer, tmp_path, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")

    def none(*_, **__):
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(bnb.functional, "optimizer_update_8bit_blockwise", none)
    with pytest.raises(InputError, match="cannot do it on cpu .*no kernel.*use 'adafactor'"):
        make(tokenizer, tmp_path / "run", optimizer="adamw_8bit")
