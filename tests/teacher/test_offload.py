"""A teacher in the host's memory: up for each call, gone before the student runs, and the same numbers.

A copy on the CPU stands in for the GPU here: other memory, the same arithmetic. The last test needs a GPU.
"""

import gc
import weakref

import pytest
import torch
import training_runs
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.errors import InputError
from opcd_fast.models import seam
from opcd_fast.planning.rehearsal import Job, rehearse
from opcd_fast.teacher import ContextTeacher, Offload, OffloadedTeacher
from opcd_fast.training.settings import OPCDConfig

CPU = torch.device("cpu")
IDS, BOUNDS = torch.tensor([3, 4, 5, 7, 8, 9]), torch.tensor([0, 3, 6], dtype=torch.int32)


def frozen(**changes):
    return tiny_model(seed=5, **changes).requires_grad_(False)


@pytest.mark.parametrize("tied", [False, True])
def test_numbers_are_those_of_a_teacher_that_stays(tied):
    context = [60, 61, 62, 63]
    plain = ContextTeacher(frozen(tie_word_embeddings=tied), context)
    model = frozen(tie_word_embeddings=tied)
    moves = Offload(model, CPU)
    with moves.on_device():
        made = ContextTeacher(model, context)
    moved = OffloadedTeacher(made, moves)
    assert moved.path == plain.path == "merge" and "merge" in moved.explain()
    for _ in range(2):
        assert torch.equal(moved.hidden_states_packed(IDS, BOUNDS), plain.hidden_states_packed(IDS, BOUNDS))
    assert torch.equal(moved.head.weight, plain.head.weight)
    assert torch.equal(moved.prefixes[0].last_hidden_state, plain.prefixes[0].last_hidden_state)


def test_it_is_there_for_the_call_alone_and_contexts_stay():
    model = frozen()
    home = [p.data_ptr() for p in model.parameters()]
    moves = Offload(model, CPU)
    with moves.on_device():
        teacher = OffloadedTeacher(ContextTeacher(model, [60, 61]), moves)
        with moves.on_device():  # nested: up once
            inside = [p.data_ptr() for p in model.parameters()]
        assert [p.data_ptr() for p in model.parameters()] == inside
        assert not set(inside) & set(home)
        copies = [weakref.ref(p.untyped_storage()) for n, p in model.named_parameters() if "layers" in n]
    assert [p.data_ptr() for p in model.parameters()] == home
    gc.collect()
    assert all(copy() is None for copy in copies), "what was on the device is still held"
    first, head = teacher.prefixes[0], teacher.head
    teacher.hidden_states_packed(IDS, BOUNDS)
    assert teacher.prefixes[0] is first and teacher.head is head, "moving is no change of the weights"
    with pytest.raises(RuntimeError, match="inside"), moves.on_device():
        raise RuntimeError("inside")
    assert [p.data_ptr() for p in model.parameters()] == home
    with pytest.raises(ValueError, match="trained cannot be offloaded"):
        Offload(tiny_model(), CPU)


# --- runs ---------------------------------------------------------------------------------------------------


def make(folder, teacher_model=None, **settings):
    if teacher_model is not None:
        settings.update(teacher_model=teacher_model, teacher_tokenizer=tiny_tokenizer())
    return training_runs.make(tiny_tokenizer(), folder, steps=3, micro_batch_tokens=90, save_every=0, **settings)


@pytest.mark.parametrize("whole", [False, True])
def test_a_run_is_the_same_and_the_student_never_meets_the_teachers_weights(tmp_path, monkeypatch, whole):
    """whole: full fine-tuning, whose frozen copy is offloaded; else another model as the teacher."""
    settings = {"lora_rank": 0} if whole else {}

    def teacher():
        return None if whole else frozen(hidden_size=48)

    wanted = make(tmp_path / "plain", teacher_model=teacher(), **settings).train()
    monkeypatch.setattr("opcd_fast.training.engines.model_pair.refuse_useless_offload", lambda shares, device: None)
    trainer = make(tmp_path / "run", teacher_model=teacher(), teacher_offload=True, **settings)
    assert type(trainer.teacher) is OffloadedTeacher
    home = [p.data_ptr() for p in trainer.teacher.model.parameters()]
    away = {"student": set(), "teacher": set()}  # whether the teacher's weights were up when these ran

    def watch(name, model):
        def look(*_):
            if name == "teacher" or torch.is_grad_enabled():
                away[name].add([p.data_ptr() for p in trainer.teacher.model.parameters()] != home)

        seam.body_of(model).register_forward_pre_hook(look)

    watch("student", trainer.model)
    watch("teacher", trainer.teacher.model)
    got = trainer.train()
    assert away == {"student": {False}, "teacher": {True}}
    assert [r["loss"] for r in got.history] == [r["loss"] for r in wanted.history]
    assert [e["fixed_kl"] for e in got.evaluations] == [e["fixed_kl"] for e in wanted.evaluations]


def test_where_there_is_nothing_to_gain_it_is_refused(tmp_path):
    with pytest.raises(InputError, match="the run is on the CPU"):
        make(tmp_path / "run", teacher_model=frozen(), teacher_offload=True)
    with pytest.raises(InputError, match="shares the student's weights"):
        make(tmp_path / "run", teacher_offload=True)
    for name, value in (("teacher_mode", "live"), ("teacher_device", "cpu"), ("teacher_quantization", "4bit")):
        with pytest.raises(InputError, match=f"teacher_offload is set, but {name}="):
            OPCDConfig(teacher_offload=True, **{name: value})
    assert not (tmp_path / "run").exists()


def test_the_plan_has_the_teacher_in_its_own_phase_alone():
    sizes = {"hidden_size": 96, "num_hidden_layers": 3}
    job, student, teacher = Job((60,), ((20, 20, 0),)), tiny_model(**sizes).config, tiny_model(**sizes).config
    options = {"device": "cuda", "dtype": torch.bfloat16, "backend": "torch"}
    base = {"batch_size": 4, "max_new_tokens": 8, "lora_rank": 4}
    stays = rehearse(OPCDConfig(**base), job, student, teacher, **options)
    moves = rehearse(OPCDConfig(**base, teacher_offload=True), job, student, teacher, **options)
    whole = sum(2 * p.numel() for p in tiny_model(**sizes).parameters())
    head = 2 * 261 * 96
    for phase in ("rollout", "student", "loss", "backward", "optimizer"):
        assert stays.peaks[phase].parts["teacher weights"] == whole
        assert moves.peaks[phase].parts["teacher weights"] == head, phase
    assert moves.peaks["teacher"].parts["teacher weights"] == whole + head
    with pytest.raises(InputError, match="shares the student's weights"):
        rehearse(OPCDConfig(**base, teacher_offload=True), job, student, **options)
    with pytest.raises(InputError, match="on the CPU"):
        rehearse(OPCDConfig(**base, teacher_offload=True), job, student, teacher, **{**options, "device": "cpu"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_memory_is_free_between_calls():
    model, device = frozen(hidden_size=512, intermediate_size=2048, num_hidden_layers=4), torch.device("cuda", 0)
    whole = sum(p.nbytes for p in model.parameters())
    before = torch.cuda.memory_allocated()
    moves = Offload(model, device)
    with moves.on_device():
        assert torch.cuda.memory_allocated() - before >= whole
        teacher = OffloadedTeacher(ContextTeacher(model, [60, 61]), moves)
    assert all(p.is_pinned() for p in model.parameters())
    hidden = teacher.hidden_states_packed(IDS.to(device), BOUNDS)
    assert hidden.is_cuda and teacher.head.weight.is_cuda
    assert torch.cuda.memory_allocated() - before < whole / 2
    stays = ContextTeacher(frozen(hidden_size=512, intermediate_size=2048, num_hidden_layers=4).to(device), [60, 61])
    torch.testing.assert_close(hidden, stays.hidden_states_packed(IDS.to(device), BOUNDS))
