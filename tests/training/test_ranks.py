"""Two processes over gloo make the steps that one process makes: DDP and FSDP2, LoRA and whole models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_runs import (
    JOBS,
    SLOW_JOBS,
    assert_same_adapter,
    assert_same_run,
    checkpoint,
    default_runs,
    records,
    slow_runs,
    told,
)
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.data import Sample
from opcd_fast.errors import InputError
from opcd_fast.training.engines import Ranks, join, make_accelerator, student_and_teacher
from opcd_fast.training.engines.parallel import refuse_sharded
from opcd_fast.training.settings import OPCDConfig


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return default_runs(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("name", [name for name in JOBS if not name.startswith("running")])
def test_two_ranks_make_the_steps_of_one(runs, name):
    assert_same_run(runs / "two" / name, runs / "one" / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_JOBS)
def test_two_ranks_make_the_steps_of_one_with_other_teachers(tmp_path_factory, name):
    runs = slow_runs(tmp_path_factory.getbasetemp())
    assert_same_run(runs / "two" / name, runs / "one" / name)
    if name == "saved-parts":
        assert_same_adapter(runs / "two" / name, runs / "one" / name)


def test_sharded_ranks_with_fewer_micro_batches_run_fillers(runs):
    turns = [one["empty"] for one in told(runs / "two" / "fsdp2-full")]
    assert len(turns[0]) == len(turns[1]) and sum(map(sum, turns)) > 0


def test_final_weights_are_whole(runs):
    from transformers import AutoModelForCausalLM

    for name in ("ddp-full", "fsdp2-full"):
        saved = AutoModelForCausalLM.from_pretrained(runs / "two" / name / "final").state_dict()
        trained, _ = checkpoint(runs / "two" / name)
        assert all(torch.equal(saved[key], value) for key, value in trained.items())
    assert_same_adapter(runs / "two" / "fsdp2-lora", runs / "one" / "fsdp2-lora")


def test_gradients_are_scaled_down_to_the_bound(runs):
    """Or else the job above would not show that they are: Adam's steps hardly depend on their size."""
    assert all(record["grad_norm"] > 0.02 for record in records(runs / "two" / "fsdp2-lora"))
    moments = [state["exp_avg"] for state in checkpoint(runs / "two" / "fsdp2-lora")[1].values()]
    assert 0 < float(torch.cat([m.flatten() for m in moments]).norm()) < 0.011


def test_bf16_runs_have_fp32_masters_and_the_gradient_of_one_process(runs):
    weights, _ = checkpoint(runs / "two" / "bf16")
    for name, weight in weights.items():
        assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float()), name
    config = json.loads((runs / "two" / "bf16" / "final" / "config.json").read_text())
    assert config["dtype"] == "float32"  # that of the masters
    # Two ranks round other things than one, norms and gathered weights. From the second step on weights differ.
    ours, alone = (records(runs / world / "bf16")[0] for world in ("two", "one"))
    eps = torch.finfo(torch.bfloat16).eps
    assert ours["loss"] == pytest.approx(alone["loss"], rel=eps)
    assert ours["grad_norm"] == pytest.approx(alone["grad_norm"], rel=4 * eps)


def test_sharded_ranks_find_the_decoding_loop_right(runs):
    """Its check runs the layers in float32, whatever FSDP2 has made of their classes."""
    kept = json.loads((runs / "two" / "bf16-lora" / "rollout.json").read_text())
    assert kept["values"]["engine"] == "decode", kept["reasons"]


def test_a_server_gets_the_weights_of_every_step(runs):
    folder = runs / "two" / "served"
    pushed, nothing = (one["pushed"] for one in told(folder))
    assert len(set(pushed)) == 3 and nothing == []
    trained = load_file(sorted((folder / "checkpoints").iterdir())[1] / "trainable.safetensors")  # of step 2
    served = load_file(Path(pushed[-1]) / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): weight for name, weight in trained.items()}
    assert trained.keys() == served.keys()
    assert all(torch.equal(served[name], weight) for name, weight in trained.items())


def test_a_checkpoint_is_continued_by_any_number_of_ranks(runs):
    assert_same_run(runs / "two" / "cut-full", runs / "two" / "fsdp2-full")


@pytest.mark.slow
def test_sharded_ranks_continue_their_checkpoint(tmp_path_factory):
    runs = slow_runs(tmp_path_factory.getbasetemp())
    assert_same_run(runs / "two" / "cut", runs / "one" / "fsdp2-lora")


def test_an_error_of_one_rank_ends_all_with_its_words(runs):
    said = [(runs / "two" / "broken" / f"error-{rank}").read_text() for rank in range(2)]
    assert said[0] == "the disk of this rank is gone"
    assert said[1] == "rank 0 failed: OSError: the disk of this rank is gone"


# ---------------------------------------------------------------------------------- shares, without processes


def ranks_of(world):
    made = [Ranks(alone=True) for _ in range(world)]
    for rank, one in enumerate(made):
        one.rank, one.world = rank, world
    return made


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_are_all_items_once_and_in_order(world):
    generator = torch.Generator().manual_seed(world)
    for count in (0, 1, 4, 17):
        costs = torch.randint(1, 100, (count,), generator=generator).tolist()
        shares = [one.share(range(count), costs) for one in ranks_of(world)]
        assert sorted(i for share in shares for i in share) == list(range(count))
        assert all(share == sorted(share) for share in shares)
        loads = [sum(costs[i] for i in share) for share in shares]
        assert max(loads) - min(loads) <= max(costs, default=0)  # no rank could give its smallest away and gain
        parts = [one.part(count) for one in ranks_of(world)]
        assert [i for part in parts for i in part] == list(range(count))


def test_answers_of_one_prompt_stay_together():
    samples = [Sample((1, prompt), (2,), 0, (3,) * (prompt + 1)) for prompt in range(5) for _ in range(3)]
    for one in ranks_of(2):
        prompts = [sample.student_prompt for sample in one.share_samples(samples)]
        assert all(prompts.count(prompt) == 3 for prompt in prompts)


# ------------------------------------------------------------------------------------------- the command line


def accelerate(arguments, folder, *options):
    """`accelerate launch` with two CPU processes; (exit status, what was said)."""
    words = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", *options,
        "-m", "opcd_fast.cli", "train", *arguments,
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, cwd=folder, env=env)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_opcd_train_under_accelerate_launch(tmp_path):
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    (tmp_path / "context.txt").write_text("always answer with zzz")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(6)))
    job = [
        "--model", str(model), "--context", "context.txt", "--prompts", "prompts.jsonl", "--steps", "2", "--batch-size",
        "3", "--max-new-tokens", "5", "--lora-rank", "4", "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    code, said = accelerate([*job, "--output-dir", "two"], tmp_path)
    assert code == 0, said[-3000:]
    assert said.count("trained 2 steps") == 1
    alone = subprocess.run(
        [sys.executable, "-m", "opcd_fast.cli", "train", *job, "--output-dir", "one"], cwd=tmp_path, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, capture_output=True,
    )  # fmt: skip
    assert b"trained 2 steps" in alone.stdout
    assert_same_run(tmp_path / "two", tmp_path / "one")
    # An edited context, from the weights of the run before, with some prompts that keep the old one.
    (tmp_path / "new.txt").write_text("never say anything but q")
    (tmp_path / "fresh.jsonl").write_text("".join(json.dumps({"prompt": f"fresh {i}"}) + "\n" for i in range(3)))
    edited = [*job, "--context", "new.txt", "--prompts", "fresh.jsonl", "--init", "one", "--replay", "0.4"]
    edited = [word for pair in zip(edited[::2], edited[1::2]) if pair[0] != "--lora-rank" for word in pair]
    code, said = accelerate([*edited, "--output-dir", "two-edited"], tmp_path)
    assert code == 0 and said.count("2 replayed prompts keep the context of one") == 1, said[-3000:]
    alone = subprocess.run(
        [sys.executable, "-m", "opcd_fast.cli", "train", *edited, "--output-dir", "one-edited"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, capture_output=True,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert_same_run(tmp_path / "two-edited", tmp_path / "one-edited")
    # What cannot work ends both, in a line.
    code, said = accelerate([*job, "--output-dir", "two"], tmp_path)
    assert code != 0 and said.count("opcd: output_dir='two' already holds a run") == 1
    assert "Traceback (most recent call last):\n  File \"" + str(Path(__file__).parents[2] / "opcd_fast") not in said


def test_shipped_configurations_are_what_accelerate_reads(tmp_path):
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file

    import opcd_fast

    folder = Path(opcd_fast.__file__).parent / "engines"
    kinds = {}
    for file in sorted(folder.glob("*.yaml")):
        config = load_config_from_file(str(file))  # refuses keys that accelerate does not know
        kinds[file.stem] = str(config.distributed_type.value)
        assert yaml.safe_load(file.read_text())["mixed_precision"] == "no"
    assert kinds == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    assert load_config_from_file(str(folder / "fsdp2.yaml")).fsdp_config["fsdp_version"] == 2


# --------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"teacher_mode": "ema"}, "teacher_mode does not go with sharded weights"),
        ({"teacher_batch_bytes": 1000}, "teacher_batch_bytes does not go with sharded weights"),
        ({"merge_for_rollout": True}, "merge_for_rollout does not go with"),
        ({"teacher_path": "concat"}, "teacher_path does not go with"),
    ],
)
def test_settings_that_sharded_weights_do_not_go_with(settings, said):
    model = tiny_model()
    config = OPCDConfig(lora_rank=4, device="cpu", dtype="float32", **settings)
    pair = student_and_teacher(model, None, config, torch.device("cpu"), torch.float32)
    with pytest.raises(InputError, match=said):
        refuse_sharded(pair, config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"teacher_offload": True}, "teacher_offload does not go with"),
        ({"num_virtual_tokens": 4}, "num_virtual_tokens does not go with"),
        ({"optimizer": "adafactor"}, "optimizer does not go with.*adamw_torch"),
    ],
)
def test_settings_that_are_about_whole_weights(settings, said):
    plain = OPCDConfig(lora_rank=4, device="cpu", dtype="float32")
    pair = student_and_teacher(tiny_model(), None, plain, torch.device("cpu"), torch.float32)
    with pytest.raises(InputError, match=said):
        refuse_sharded(pair, OPCDConfig(device="cpu", **settings))


def test_engines_that_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for version, said in (("1", "FSDP version 1 is not supported"), ("2", "on GPUs only")):
        monkeypatch.setenv("FSDP_VERSION", version)
        with pytest.raises(InputError, match=said):
            make_accelerator(torch.device("cpu"), torch.float32)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for starts in (lambda: make_accelerator(torch.device("cpu"), torch.float32), lambda: join("cpu")):
        with pytest.raises(InputError, match="DeepSpeed.*not supported.*FSDP2.*fsdp2.yaml"):
            starts()


def test_deepspeed_is_refused_in_one_line(tmp_path):
    job = ["--model", "nowhere", "--context", "c", "--prompts", "p", "--output-dir", "out", "--device", "cpu"]
    said = ""
    for rank in ("0", "1"):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RANK": rank, "WORLD_SIZE": "2"}
        done = subprocess.run(
            [sys.executable, "-m", "opcd_fast.cli", "train", *job], cwd=tmp_path, capture_output=True, text=True,
            env={**env, "ACCELERATE_USE_DEEPSPEED": "true"}, timeout=120,
        )  # fmt: skip
        assert done.returncode != 0
        said += done.stdout + done.stderr
    assert len(said.splitlines()) == 1 and "FSDP2" in said, said
