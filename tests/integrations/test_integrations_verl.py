"""The verl plugin: its parts by themselves, and, where verl is installed, inside verl's own functions.

verl is not among the development packages (it wants Ray and an older transformers). The tests marked by `real` were run
against verl 0.9.1, imported on a CPU beside the transformers used here.
"""

import importlib
import logging
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from loss_oracle import divergence64, relative_error

pytest.importorskip("transformers")
pytest.importorskip("peft")
from tiny import TEMPLATE, lora_model, tiny_model, tiny_tokenizer

from opcd_fast.integrations import verl as ours
from opcd_fast.loss import LMHead

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = "You are a pirate captain called Ann. Answer in one short sentence, and never say please. "
ASKED = (("Hello?", 7), ("Where is it, then?", 3), ("Why?", 5))  # prompt, tokens of the answer


def real(name="verl"):
    return pytest.importorskip(name, reason="needs verl 0.9")


def rows(tokenizer, system=None):
    """[(prompt ids, the same with the context, answer ids)]"""
    generator, result = torch.Generator().manual_seed(0), []
    for text, length in ASKED:
        user = {"role": "user", "content": text}
        prompt, seen = (
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            for messages in ([user], [{"role": "system", "content": CONTEXT}, user])
        )
        result.append((prompt, seen, torch.randint(3, 200, (length,), generator=generator).tolist()))
    return result


def packed(sequences):
    ids = [torch.tensor([*prompt, *answer]) for prompt, _, answer in sequences]
    positions = torch.cat([torch.arange(len(row)) for row in ids])
    return {"input_ids": torch.cat(ids)[None], "position_ids": positions[None]}


def response_kl(model, sequences, temperature, which="reverse_kl"):
    """[(T,) value at every token of every answer], float64 and differentiable in the student, by plain forwards."""
    result = []
    for prompt, seen, answer in sequences:
        z_s = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        with torch.no_grad(), model.disable_adapter():
            z_t = model(torch.tensor([[*seen, *answer]])).logits[0, len(seen) - 1 : -1]
        result.append(divergence64(z_s.double() / temperature, z_t.double() / temperature, which))
    return result


def fused(self, input_ids=None, position_ids=None, temperature=1.0, return_dict=None, **kwargs):
    """As verl's: a packed row, no logits, log-probabilities and entropies of the row."""
    hidden = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
    return SimpleNamespace(log_probs=hidden.sum(-1), entropy=hidden.sum(-1))


def answers_of(row, sequences):
    """The KLs that verl reads: those of the tokens that predict an answer's."""
    parts, begin = [], 0
    for prompt, _, answer in sequences:
        parts.append(row[0, begin + len(prompt) - 1 : begin + len(prompt) + len(answer) - 1])
        begin += len(prompt) + len(answer)
    return parts


@pytest.mark.parametrize(
    ("temperature", "which"), [(1.0, "reverse_kl"), (torch.full((1, 3), 0.7), "gated_kl")], ids=["one", "tensor"]
)
def test_the_forwards_kl_is_that_of_plain_forwards(temperature, which):
    model, tokenizer = lora_model(), tiny_tokenizer()
    sequences = rows(tokenizer)
    base = model.get_base_model()
    head = LMHead.from_model(base)
    forward = ours.with_divergence(fused, ours.ContextInFront(tokenizer, CONTEXT), lambda _: head, which)
    model.train()
    output = forward(base, **packed(sequences), temperature=temperature, return_dict=True)
    aux = output.fused_linear_aux
    assert aux.distillation_losses.shape == aux.student_mass.shape == packed(sequences)["input_ids"].shape
    assert bool((aux.student_mass == 1).all() and (aux.teacher_mass == 1).all())
    got = answers_of(aux.distillation_losses, sequences)
    wanted = response_kl(model, sequences, float(torch.as_tensor(temperature).flatten()[0]), which)
    for mine, theirs in zip(got, wanted, strict=True):
        assert float(theirs.detach().max()) > 1e-2
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = (torch.autograd.grad(sum(kl.double().sum() for kl in side), parameters) for side in (got, wanted))
    flat = [torch.cat([g.flatten() for g in side]) for side in gradients]
    assert relative_error(*flat) < 1e-4


def test_another_divergence_than_the_losss_is_refused(monkeypatch):
    monkeypatch.setattr(ours, "_computed", "reverse_kl")
    settings = SimpleNamespace(distillation_loss=SimpleNamespace(loss_mode="opcd_gated_kl"))
    with pytest.raises(RuntimeError, match="OPCD_VERL_DIVERGENCE=gated_kl"):
        ours.kl_of_response(SimpleNamespace(strategy="fsdp"), settings, {"distillation_losses": None}, {})
    with pytest.raises(ValueError, match="OPCD_VERL_DIVERGENCE.*'jsd'"):
        ours.with_divergence(fused, None, None, "jsd")


def test_old_answers_are_scored_without_the_teacher():
    def teach(*_):
        raise AssertionError("the teacher ran")

    model = lora_model().get_base_model()
    forward = ours.with_divergence(fused, teach, LMHead.from_model)
    row = packed(rows(tiny_tokenizer()))
    with torch.no_grad():
        assert not hasattr(forward(model.train(), **row), "fused_linear_aux")
    assert not hasattr(forward(model.eval(), **row), "fused_linear_aux")
    with pytest.raises(AssertionError, match="the teacher ran"):
        forward(model.train(), **row)


def test_swap_finds_what_the_context_changes():
    tokenizer = tiny_tokenizer()
    swap = ours.Swap.of(tokenizer, CONTEXT)
    assert tokenizer.decode(swap.student + swap.lead) == "<|user|>"
    assert tokenizer.decode(swap.teacher + swap.lead) == f"<|system|>{CONTEXT}<|end|><|user|>"
    # A template with a system message of its own: that is exchanged.
    own = "{% if messages[0].role != 'system' %}<|system|>Be kind.<|end|>{% endif %}" + TEMPLATE
    tokenizer = tiny_tokenizer(own)
    swap = ours.Swap.of(tokenizer, CONTEXT)
    for prompt, seen, _ in rows(tokenizer):
        assert tuple(prompt[: len(swap.student)]) == swap.student
        assert [*swap.teacher, *prompt[len(swap.student) :]] == seen
    inside = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="does not stand in front"):  # it goes into the user's message
        ours.Swap.of(tiny_tokenizer(inside), CONTEXT)
    with pytest.raises(ValueError, match="context changes nothing"):
        ours.Swap.of(tiny_tokenizer("{{ messages[-1].content[-1:] }}"), CONTEXT)
    behind = inside + "{{ messages[0].content }}{% if messages|length > 1 %}!{% endif %}<|assistant|>"
    with pytest.raises(ValueError, match="does not stand in front"):
        ours.Swap.of(tiny_tokenizer(behind), CONTEXT)


def test_refuses_what_would_be_wrong():
    tokenizer = tiny_tokenizer()
    teach = ours.ContextInFront(tokenizer, CONTEXT)
    row = packed(rows(tokenizer))
    model = tiny_model(1).train()
    forward = ours.with_divergence(fused, teach, LMHead.from_model)
    with pytest.raises(RuntimeError, match="set actor_rollout_ref.model.lora_rank"):
        forward(model, **row)
    own = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    ids = tokenizer.apply_chat_template(own, add_generation_prompt=True, return_dict=False)
    with pytest.raises(RuntimeError, match="system message of their own"):
        forward(model, **packed([(ids, ids, [5, 6])]))
    with pytest.raises(RuntimeError, match="use_remove_padding=True"):
        forward(model, input_ids=row["input_ids"].expand(2, -1), position_ids=row["position_ids"].expand(2, -1))
    with pytest.raises(RuntimeError, match="begins inside a sequence"):
        forward(model, input_ids=row["input_ids"][:, 3:], position_ids=row["position_ids"][:, 3:])
    with pytest.raises(ValueError, match="[Tt]oo many values|not enough values"):
        forward(model, **row, temperature=torch.tensor([0.7, 0.8]))


def test_the_entry_point_is_a_module_that_does_nothing_unasked(monkeypatch):
    entry = r'^\[project\.entry-points\."verl\.plugins"\]\nopcd_fast = "([\w.]+)"$'
    (name,) = re.findall(entry, (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    monkeypatch.delenv("OPCD_VERL_CONTEXT", raising=False)
    code = f"import sys; before = set(sys.modules); import {name}; "
    code += "assert not {'verl', 'torch', 'transformers'} & (set(sys.modules) - before)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def stub(monkeypatch):
    """The three names of verl 0.9.1 that registering uses, with its signatures."""
    registry = {}

    class DistillationLossSettings:
        def __init__(self, names=(), use_topk=False, use_estimator=False):
            if sum([use_topk, use_estimator]) != 1:
                raise ValueError("exactly one")
            self.names, self.use_topk = names, use_topk

    def register_distillation_loss(loss_settings):
        def decorator(function):
            for name in loss_settings.names:
                if name in registry:
                    raise ValueError("already registered")
                registry[name] = function
            return function

        return decorator

    for name in ("verl", "verl.trainer", "verl.trainer.distillation", "verl.trainer.distillation.losses"):
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["verl.trainer.distillation"].losses = module
    module.DISTILLATION_LOSS_REGISTRY = registry
    module.DistillationLossSettings = DistillationLossSettings
    module.register_distillation_loss = register_distillation_loss
    return registry


def test_registers_its_own_name_once(monkeypatch):
    registry = stub(monkeypatch)
    ours.register()
    ours.register()
    assert registry == dict.fromkeys(("opcd_reverse_kl", "opcd_gated_kl"), ours.kl_of_response)


def test_a_plugin_that_fails_says_so(monkeypatch, caplog):
    """verl drops the exception of a plugin at the level of debugging."""
    stub(monkeypatch)
    monkeypatch.setenv("OPCD_VERL_CONTEXT", "no_such_file.txt")
    monkeypatch.delitem(sys.modules, "opcd_fast.integrations.verl_plugin", raising=False)
    with caplog.at_level(logging.ERROR, "opcd_fast"), pytest.raises(Exception, match="."):
        importlib.import_module("opcd_fast.integrations.verl_plugin")
    assert "the verl plugin did not load" in caplog.text


# ------------------------------------------------------------------------------------------ inside verl itself


@pytest.fixture
def engine(monkeypatch):
    """verl's FSDP engine with a tiny actor that has no FSDP around it, and its fused forward with our loss in it."""
    real()
    pytest.importorskip("tensordict")
    from transformers import LlamaForCausalLM
    from verl.models.transformers import monkey_patch
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    plain = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", plain)  # put back at the end
    monkeypatch.setattr(monkey_patch, "is_trl_available", lambda: False)  # verl 0.9.1 imports what TRL 1.16 has not
    model = lora_model()
    take_back = ours.teach_with_context(CONTEXT, tokenizer=tiny_tokenizer())
    try:
        monkey_patch.apply_monkey_patch(
            model.get_base_model(), use_remove_padding=True, use_fused_kernels=True, fused_kernels_backend="torch"
        )
    finally:
        take_back()
    engine = object.__new__(FSDPEngineWithLMHead)
    engine.module, engine.pad_to_length, engine.use_ulysses_sp = model, False, False
    engine.plain_forward = plain
    return engine


def micro_batch(sequences, temperature):
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import DatasetPadMode

    def jagged(lists, dtype=torch.long):
        return torch.nested.as_nested_tensor([torch.tensor(x, dtype=dtype) for x in lists], layout=torch.jagged)

    whole = [[*prompt, *answer] for prompt, _, answer in sequences]
    tokens = sum(len(answer) for *_, answer in sequences)
    batch = TensorDict(
        {
            "input_ids": jagged(whole),
            "position_ids": jagged([list(range(len(row))) for row in whole]),
            "prompts": jagged([prompt for prompt, *_ in sequences]),
            "responses": jagged([answer for *_, answer in sequences]),
            "response_mask": jagged([[1] * len(answer) for *_, answer in sequences]),
        },
        batch_size=[len(sequences)],
    )
    settings = {
        "use_remove_padding": True, "use_fused_kernels": True, "pad_mode": DatasetPadMode.NO_PADDING,
        "temperature": temperature, "distillation_use_topk": True, "distillation_only": True,
        "calculate_entropy": False, "dp_size": 1, "batch_num_tokens": tokens, "global_batch_size": len(sequences),
    }  # fmt: skip
    tu.assign_non_tensor(batch, **settings)
    return batch


def verl_loss(model_output, data, **changes):
    """`distillation_ppo_loss` as verl's worker calls it, with this loss and no task rewards."""
    from verl.trainer.distillation import distillation_ppo_loss
    from verl.workers.config import DistillationConfig, DistillationLossConfig

    settings = DistillationLossConfig(
        loss_mode="opcd_reverse_kl", use_task_rewards=False, use_policy_gradient=False, loss_max_clamp=None, **changes
    )
    actor = SimpleNamespace(strategy="fsdp2", loss_agg_mode="token-mean", global_batch_info={}, loss_scale_factor=None)
    return distillation_ppo_loss(actor, DistillationConfig(distillation_loss=settings), model_output, data)


def test_real_verl_computes_the_reverse_kl(engine):
    from verl.trainer.distillation.losses import get_distillation_loss_settings

    ours.register()
    assert get_distillation_loss_settings("opcd_reverse_kl").use_topk
    sequences = rows(tiny_tokenizer())
    data = micro_batch(sequences, 0.7)
    engine.module.train()
    inputs, arguments = engine.prepare_model_inputs(data)
    output = engine.module(**inputs, use_cache=False)
    model_output = engine.prepare_model_outputs(output, arguments, data, logits_processor_func=None)
    loss, metrics = verl_loss(model_output, data)
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    mine = torch.autograd.grad(loss, parameters)

    plain = lora_model()  # the same weights, and transformers' own forward
    type(plain.get_base_model()).forward = engine.plain_forward
    wanted = torch.cat(response_kl(plain, sequences, 0.7)).mean()
    theirs = torch.autograd.grad(wanted, [p for p in plain.parameters() if p.requires_grad])
    assert float(wanted) > 1e-2 and float(loss) == pytest.approx(float(wanted), rel=1e-4)
    assert metrics["distillation/reverse_kl"] == pytest.approx(float(wanted), rel=1e-4)
    assert relative_error(*(torch.cat([g.flatten().double() for g in side]) for side in (mine, theirs))) < 1e-4


def test_real_verls_own_topk_is_never_taken_for_ours(engine):
    ours.register()
    data = micro_batch(rows(tiny_tokenizer()), 1.0)
    row = torch.ones(int(data["input_ids"].offsets()[-1]))
    there = torch.nested.nested_tensor_from_jagged(row, data["input_ids"].offsets())
    for output in ({}, {"distillation_losses": there, "overlap_count": there}):
        with pytest.raises(RuntimeError, match="did not compute it.*OPCD_VERL_CONTEXT"):
            verl_loss(output, data)


def test_real_verls_config_takes_the_documented_options():
    verl = real()
    hydra = pytest.importorskip("hydra")
    from verl.utils.config import omega_conf_to_dataclass

    ours.register()
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    block = re.search(r"```bash\n(.*?)```", page[page.index("## verl") :], re.DOTALL).group(1)
    options = [word for word in block.split() if re.match(r"[a-z_.]+\.[a-z_.]+=", word)]
    assert len(options) == 11
    with hydra.initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        config = hydra.compose("ppo_trainer", overrides=options)
    distillation = omega_conf_to_dataclass(config.distillation)
    loss = distillation.distillation_loss
    assert distillation.enabled and loss.loss_settings.use_topk and loss.loss_mode == "opcd_reverse_kl"
    assert not loss.use_policy_gradient and loss.loss_max_clamp is None
    assert config.actor_rollout_ref.actor.strategy in ("fsdp", "fsdp2")
