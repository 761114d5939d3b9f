"""Two processes of DeepSpeed's ZeRO-3, over gloo, make the steps that one process makes."""

import json
from pathlib import Path

import pytest
import torch
from rank_runs import (
    SLOW_ZERO3_JOBS,
    assert_same_adapter,
    assert_same_run,
    checkpoint,
    records,
    slow_zero3_runs,
    told,
    zero3_runs,
)
from safetensors.torch import load_file

from opcd_fast.acceleration import make_accelerator
from opcd_fast.errors import InputError

pytest.importorskip("deepspeed", reason="needs deepspeed")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return zero3_runs(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("name", ["zero3-lora", "zero3-full"])
def test_two_ranks_make_the_steps_of_one(runs, name):
    assert_same_run(runs / "two" / name, runs / "one" / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SLOW_ZERO3_JOBS if "bf16" not in name])
def test_two_ranks_make_the_steps_of_one_in_other_runs(tmp_path_factory, name):
    runs = slow_zero3_runs(tmp_path_factory.getbasetemp())
    assert_same_run(runs / "two" / name, runs / "one" / name)
    if name == "zero3-saved-parts":
        assert_same_adapter(runs / "two" / name, runs / "one" / name)


def test_a_checkpoint_is_continued_as_if_nothing_had_happened(runs):
    assert_same_run(runs / "two" / "cut", runs / "two" / "zero3-full")
    assert_same_run(runs / "two" / "cut-bf16", runs / "two" / "zero3-bf16")


def test_a_checkpoint_is_continued_by_one_process(runs):
    assert_same_run(runs / "two" / "cut-for-one", runs / "one" / "zero3-full")


def test_gradients_are_scaled_down_to_the_bound(runs):
    """Or else the job above would not show that they are: Adam's steps hardly depend on their size."""
    assert all(record["grad_norm"] > 0.02 for record in records(runs / "two" / "zero3-lora"))
    moments = [state["exp_avg"] for state in checkpoint(runs / "two" / "zero3-lora")[1].values()]
    assert 0 < float(torch.cat([m.flatten() for m in moments]).norm()) < 0.011


def test_ranks_with_fewer_micro_batches_run_fillers(runs):
    turns = [one["empty"] for one in told(runs / "two" / "zero3-full")]
    assert len(turns[0]) == len(turns[1]) and sum(map(sum, turns)) > 0


def test_final_weights_are_whole(runs):
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(runs / "two" / "zero3-full" / "final").state_dict()
    trained, _ = checkpoint(runs / "two" / "zero3-full")
    assert all(torch.equal(saved[key], value) for key, value in trained.items())
    assert_same_adapter(runs / "two" / "zero3-lora", runs / "one" / "zero3-lora")


def test_the_type_in_the_config_is_that_of_the_masters(runs):
    for name in ("zero3-bf16", "fsdp2-bf16", "zero3-full"):
        assert json.loads((runs / "two" / name / "final" / "config.json").read_text())["dtype"] == "float32", name


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_server_gets_the_weights_of_every_step(runs, engine):
    folder = runs / "two" / f"{engine}-served"
    pushed, nothing = (one["pushed"] for one in told(folder))
    assert len(set(pushed)) == 3 and nothing == []
    trained = load_file(sorted((folder / "checkpoints").iterdir())[1] / "trainable.safetensors")  # of step 2
    served = load_file(Path(pushed[-1]) / "adapter_model.safetensors")
    assert {name.replace(".default", ""): weight for name, weight in trained.items()}.keys() == served.keys()
    assert all(torch.equal(served[name.replace(".default", "")], weight) for name, weight in trained.items())


def masters_of(folder):
    weights, state = checkpoint(folder)
    for name, weight in weights.items():
        assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float()), name
    return weights, torch.cat([one["exp_avg"].flatten() for one in state.values()])


def test_bf16_weights_have_fp32_masters_and_make_the_steps_of_fsdp2(runs):
    masters_of(runs / "two" / "zero3-bf16")
    assert_same_run(runs / "two" / "zero3-bf16", runs / "two" / "fsdp2-bf16")


@pytest.mark.slow
def test_an_adapter_on_a_bf16_base_is_fp32_as_in_one_process(tmp_path_factory):
    folder, name = slow_zero3_runs(tmp_path_factory.getbasetemp()), "zero3-bf16-lora"
    (weights, moments), (wanted, expected) = (masters_of(folder / world / name) for world in ("two", "one"))
    for ours, alone in zip(records(folder / "two" / name), records(folder / "one" / name), strict=True):
        assert ours["loss"] == pytest.approx(alone["loss"], rel=0.02)
    assert all(float((weights[name] - wanted[name]).abs().median()) < 1e-3 for name in wanted)  # steps of 1e-2
    assert float((moments - expected).norm() / expected.norm()) < 0.05


def test_what_is_refused(monkeypatch, tmp_path):
    folder, zero3 = tmp_path, {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
    for name, more in (("optimizer", {"optimizer": {"type": "Adam"}}), ("tensors", {"tensor_parallel": {}})):
        (folder / f"{name}.json").write_text(json.dumps(zero3 | more))
    (folder / "empty.json").write_text("{}")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value, said in [
        ("ZERO_STAGE", "2", "ZeRO stage 2 is not supported; set zero_stage: 3"),
        ("OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer is not supported; set offload_optimizer_device: none"),
        ("OFFLOAD_PARAM_DEVICE", "cpu", "offload_param is not supported"),
        ("ZERO_STAGE", "3", "on GPUs only"),
        ("CONFIG_FILE", str(folder / "optimizer.json"), "has 'optimizer', which a run does not go with"),
        ("CONFIG_FILE", str(folder / "tensors.json"), "has 'tensor_parallel'"),
        ("CONFIG_FILE", str(folder / "empty.json"), "DeepSpeed's config: Please specify the ZeRO"),
    ]:
        with monkeypatch.context() as patch:
            patch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
            patch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
            with pytest.raises(InputError, match=said):
                make_accelerator(torch.device("cpu"), torch.float32)
