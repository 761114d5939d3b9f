"""Teachers that follow the student: the averages are right, nothing is stale, and a stopped run goes on bit for bit."""

from functools import partial

import pytest
import torch
from resumption import cut_and_resumed
from tiny import lora_model, tiny_model, tiny_tokenizer
from training_runs import losses, make

from opcd_fast.errors import InputError
from opcd_fast.teacher import ContextTeacher, MovingWeights, copy_of_trained
from opcd_fast.training.step import divergence

MODES = {
    "live": {"teacher_mode": "live"},
    "ema": {"teacher_mode": "ema", "teacher_ema_decay": 0.7},
    "periodic": {"teacher_mode": "periodic", "teacher_sync_every": 3},
}
EVERY_MODE = pytest.mark.parametrize("mode", MODES)
LORA_AND_WHOLE = pytest.mark.parametrize("lora_rank", [4, 0])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def fast(lora_rank):
    """Rates at which five steps change the teacher visibly."""
    return {"lora_rank": lora_rank, "learning_rate": 1e-2 if lora_rank else 3e-3, "steps": 5}


def averages(values, decay, every):
    """Float64 oracle: the teacher's weight after each step, from the student's first and later weights."""
    average, seen = values[0].double(), []
    for step, value in enumerate(values[1:], start=1):
        if step % every == 0:
            average = decay * average + (1 - decay) * value.double()
        seen.append(average)
    return seen


@pytest.mark.parametrize(("decay", "every"), [(0.9, 1), (0.5, 1), (0.0, 1), (0.0, 3), (1.0, 1), (0.99, 2)])
def test_the_average_is_the_formula(decay, every):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    teacher.load_state_dict(student.state_dict())
    moving = MovingWeights(dict(student.named_parameters()), teacher, decay, every)
    values = [student.weight.detach().clone()]
    for step in range(1, 8):
        with torch.no_grad():
            student.weight.copy_(torch.randn(3, 5, generator=generator))
        values.append(student.weight.detach().clone())
        assert moving.follow(step) is (step % every == 0)
        expected = averages(values, decay, every)[-1]
        assert torch.allclose(teacher.weight.double(), expected, atol=1e-6)
        if decay in (0.0, 1.0):
            assert torch.equal(teacher.weight.double(), expected)


def test_a_bf16_teacher_is_a_rounded_fp32_average():
    """Each update is far below the spacing of bf16 numbers around 1, and a hundred of them are not."""
    student, teacher = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        student.weight.fill_(1.0)
        teacher.weight.fill_(1.0)
    moving = MovingWeights(dict(student.named_parameters()), teacher, 0.99, 1)
    with torch.no_grad():
        student.weight.fill_(1.1)
    for step in range(1, 101):
        moving.follow(step)
    assert float(teacher.weight) == pytest.approx(1.1 - 0.1 * 0.99**100, abs=2**-8)
    assert moving.state()["weight"].dtype == torch.float32


def test_the_copy_of_a_lora_model_shares_its_base():
    model = lora_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    copied = copy_of_trained(model)
    theirs = dict(copied.named_parameters())
    for name, parameter in model.named_parameters():
        assert (theirs[name].data_ptr() == parameter.data_ptr()) == ("lora_" not in name), name
        assert torch.equal(theirs[name], parameter)
    ids = torch.arange(5, 25)[None]
    before = model(ids).logits
    with torch.no_grad():
        for name, parameter in theirs.items():
            if "lora_B" in name:
                parameter.zero_()
    assert torch.equal(model(ids).logits, before)
    with model.disable_adapter():
        assert torch.allclose(copied(ids).logits, model(ids).logits, atol=1e-6)


@LORA_AND_WHOLE
def test_limits_of_the_modes_are_each_other(tokenizer, tmp_path, lora_rank):
    """An update follows each optimizer step, so a copy made at every step is the live teacher, with no step between."""

    def run(name, **settings):
        settings = {**fast(lora_rank), **settings, "eval_prompts": None}
        return losses(make(tokenizer, tmp_path / name, **settings).train())

    frozen, live = run("frozen"), run("live", **MODES["live"])
    assert frozen[0] == live[0] and frozen[1] != pytest.approx(live[1], rel=1e-3)
    assert run("ema0", teacher_mode="ema", teacher_ema_decay=0.0) == live
    assert run("periodic1", teacher_mode="periodic", teacher_sync_every=1) == live
    assert run("ema1", teacher_mode="ema", teacher_ema_decay=1.0) == frozen
    assert run("periodic6", teacher_mode="periodic", teacher_sync_every=6) == frozen
    still = {"learning_rate": 1e-30, "steps": 3}  # a student that stands still is followed nowhere
    assert run("still live", **{**MODES["live"], **still}) == run("still", **still)
    ema, periodic = run("ema", **MODES["ema"]), run("periodic", **MODES["periodic"])
    assert ema[0] == frozen[0] and ema[1] not in (frozen[1], live[1])
    assert periodic[:3] == frozen[:3] and periodic[3] != frozen[3]


@EVERY_MODE
@LORA_AND_WHOLE
def test_the_context_is_read_again_once_for_each_move(tokenizer, tmp_path, mode, lora_rank):
    settings = {**fast(lora_rank), **MODES[mode], "micro_batch_tokens": 60}
    trainer = make(tokenizer, tmp_path / "run", **settings)
    scored = []
    inner = trainer.teacher.hidden_states_packed
    trainer.teacher.hidden_states_packed = lambda *a, **o: scored.append(1) or inner(*a, **o)
    trainer.train()
    assert len(scored) > 5, "one micro-batch a step would prove nothing"
    assert trainer.teacher._prefixes.built == {"live": 5, "ema": 5, "periodic": 2}[mode]
    assert trainer.teachers.reference._prefixes.built == 1


@EVERY_MODE
@LORA_AND_WHOLE
def test_no_prefix_is_stale_whatever_the_optimizer(tokenizer, tmp_path, mode, lora_rank):
    """A fused optimizer changes weights without torch's counters; path "concat" keeps nothing that could be stale."""

    def run(path):
        settings = {**fast(lora_rank), **MODES[mode], "teacher_path": path, "eval_prompts": None}
        trainer = make(tokenizer, tmp_path / path, **settings)
        rate = settings["learning_rate"]
        trainer.engine.optimizer = torch.optim.AdamW(trainer.parameters.values(), lr=rate, fused=True)
        return losses(trainer.train())

    assert run("merge") == pytest.approx(run("concat"), rel=1e-4)


@EVERY_MODE
@LORA_AND_WHOLE
def test_resume_is_bit_identical(tokenizer, tmp_path, mode, lora_rank):
    settings = {**fast(lora_rank), **MODES[mode], "steps": 7}
    whole = make(tokenizer, tmp_path / "whole", **settings).train()
    resumed = cut_and_resumed(partial(make, tokenizer, **settings), tmp_path / "cut", ("step", 5))
    assert losses(resumed) == losses(whole)
    assert [e["own_kl"] for e in resumed.evaluations] == [e["own_kl"] for e in whole.evaluations]


@EVERY_MODE
@LORA_AND_WHOLE
def test_evaluations_are_against_the_first_weights(tokenizer, tmp_path, mode, lora_rank):
    settings = {**fast(lora_rank), "eval_every": 5}
    trainer = make(tokenizer, tmp_path / "run", **settings, **MODES[mode])
    result = trainer.train()
    frozen = make(tokenizer, tmp_path / "frozen", **settings).train()
    assert result.evaluations[0] == frozen.evaluations[0]
    original = ContextTeacher(tiny_model(), [torch.tensor(prefix) for prefix in trainer.prefixes], path="concat")
    trainer.folder.resume = True  # the fixed sequences as they are on disk
    options = {"temperature": 1.0, "compute_dtype": torch.float32, "device": torch.device("cpu")}
    samples = trainer.folder.read_samples()
    found = result.evaluations[-1]["fixed_kl"]
    assert found == pytest.approx(divergence(samples, trainer.model, original, **options)["kl"], rel=1e-5)
    moved = divergence(samples, trainer.model, trainer.teacher, **options)["kl"]
    assert found != pytest.approx(moved, rel=1e-3)


@EVERY_MODE
@LORA_AND_WHOLE
def test_bf16_teachers_run_as_the_student_does(tokenizer, tmp_path, mode, lora_rank):
    """After a few steps, every path gives what a plain forward of the present weights in bf16 gives."""
    trainer = make(tokenizer, tmp_path / "run", dtype="bfloat16", eval_prompts=None, **fast(lora_rank), **MODES[mode])
    trainer.train()
    assert trainer.teacher.path == "merge"
    kinds = set()
    for name, layer in trainer.teacher.model.named_modules():
        if name.endswith("q_proj"):
            layer.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    ids = torch.arange(40, 75)
    hidden = trainer.teacher.hidden_states_packed(ids, torch.tensor([0, 20, 35]), context_index=[0, 0])
    assert kinds == {torch.bfloat16}, "fp32 masters have to run under autocast"
    whole = trainer.teachers.pair.teacher
    fp64 = {name: p.detach().double() for name, p in whole.named_parameters()}
    exact = torch.func.functional_call
    rows = []
    for part in (ids[:20], ids[20:]):
        both = torch.tensor([*trainer.prefixes[0], *part.tolist()])[None]
        with torch.no_grad():
            out = exact(whole, fp64, (both,), {"output_hidden_states": True}).hidden_states[-1]
        rows.append(out[0, -len(part) :])
    wanted = torch.cat(rows)
    error = (hidden.double() - wanted).norm() / wanted.norm()
    assert error < 0.03, f"relative error {error:.3f}"


def test_the_saved_adapter_is_the_students(tokenizer, tmp_path):
    from peft import PeftModel

    trainer = make(tokenizer, tmp_path / "run", **fast(4), **MODES["ema"])
    trainer.train()
    saved = dict(PeftModel.from_pretrained(tiny_model(), tmp_path / "run" / "final").named_parameters())
    assert all(torch.equal(saved[name], p) for name, p in trainer.parameters.items())
    assert any(not torch.equal(saved[name], p) for name, p in trainer.teachers.state().items())
    assert list(trainer.model.peft_config) == ["default"]


@EVERY_MODE
def test_a_moving_teacher_cannot_be_another_model(tokenizer, tmp_path, mode):
    with pytest.raises(InputError, match="drop teacher_model, or set teacher_mode='frozen'"):
        make(tokenizer, tmp_path / "run", teacher_model=tiny_model(seed=7), **MODES[mode])
    assert not (tmp_path / "run").exists()
