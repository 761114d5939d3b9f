"""use_fused_loss in TRL's own trainers: TRL's loss and gradients, without logits."""

import sys
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl", reason="needs the trl extra: pip install 'opcd-fast[trl]'")
from tiny import tiny_model
from trl_runs import METHOD, TRAINERS, NoVocabulary, compare, heads_that_refuse

from opcd_fast.integrations.trl import use_fused_loss
from opcd_fast.loss import LMHead, fused_linear_reverse_kl

OTHER = {  # every divergence that the trainers know, with the settings around it
    "distillation reverse": ("distillation", {"beta": 1.0, "temperature": 1.0}),
    "distillation forward": ("distillation", {"beta": 0.0}),
    "distillation accumulated": ("distillation", {"gradient_accumulation_steps": 2}),
    "gkd reverse": ("gkd", {"beta": 1.0}),
    "gkd forward": ("gkd", {"beta": 0.0}),
    "gkd on-policy": ("gkd", {"lmbda": 1.0}),
    "gkd accumulated": ("gkd", {"gradient_accumulation_steps": 2}),
    "sdft reverse": ("sdft", {"distillation_alpha": 1.0}),
    "sdft forward": ("sdft", {"distillation_alpha": 0.0}),
    "sdft accumulated": ("sdft", {"gradient_accumulation_steps": 2}),
    "sdft skipping": ("sdft", {"num_loss_tokens_to_skip": 4}),
    "sdft top-k": ("sdft", {"distillation_mode": "topk_logits", "distillation_alpha": 1.0, "distillation_topk": 9}),
    "sdft top-k tail": (
        "sdft",
        {"distillation_mode": "topk_logits", "distillation_alpha": 1.0, "distillation_topk": 9,
         "distillation_add_tail": True},
    ),
    "sdft sampled": ("sdft", {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}),
    "sdft reused": ("sdft", {"num_iterations": 3, "max_steps": 3, "distillation_is_clip": 0.9}),
    "sdft reused sampled": (
        "sdft",
        {"num_iterations": 3, "max_steps": 3, "distillation_mode": "sampled_token", "distillation_alpha": 1.0,
         "distillation_is_clip": 0.6},
    ),
}  # fmt: skip


def run(tmp_path, kind, *, lora=False, normalize="trl", **more):
    trainer = TRAINERS[kind](tmp_path, lora=lora, **more)
    original = getattr(type(trainer), METHOD[kind])
    use_fused_loss(trainer, normalize=normalize)
    entries = compare(trainer, METHOD[kind], original)
    trainer.train()
    return trainer, entries


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_trains_with_trls_loss_and_gradients(tmp_path, kind, lora):
    trainer, entries = run(tmp_path, kind, lora=lora)
    assert len(entries) == 2
    trainer.model.eval()
    assert trainer.evaluate()["eval_loss"] > 1e-3 and len(entries) > 2
    for ours, theirs, gradient_error, got, wanted in entries:
        assert theirs > 1e-3 and ours == pytest.approx(theirs, rel=1e-4)
        assert gradient_error < 1e-4
        if kind == "distillation":  # its metrics
            assert float(got[1]) == pytest.approx(float(wanted[1]), rel=1e-4) and got[2] == wanted[2]
    before = tiny_model(1).state_dict()
    if not lora:
        assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize(("kind", "more"), OTHER.values(), ids=OTHER)
def test_every_divergence_and_setting(tmp_path, kind, more):
    _, entries = run(tmp_path, kind, **more)
    assert len(entries) == more.get("max_steps", 2) * more.get("gradient_accumulation_steps", 1)
    for ours, theirs, gradient_error, *_ in entries:
        assert abs(theirs) > 1e-5 and ours == pytest.approx(theirs, rel=1e-4)
        assert gradient_error < 1e-4


def test_the_rollouts_logprobs_are_trls_and_make_no_logits(tmp_path):
    trainer = TRAINERS["sdft"](tmp_path, num_iterations=3)
    original = type(trainer)._compute_rollout_logps
    use_fused_loss(trainer)
    torch.manual_seed(0)
    prompt, answer = torch.randint(3, 200, (2, 5)), torch.randint(3, 200, (2, 4))
    masks = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    batch = {"prompt_ids": prompt, "prompt_mask": masks[0], "completion_ids": answer, "completion_mask": masks[1]}
    with heads_that_refuse(trainer.model):
        ours = trainer._compute_rollout_logps(**batch)
    torch.testing.assert_close(ours, original(trainer, **batch) * masks[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", TRAINERS)
def test_no_tensor_of_tokens_by_vocabulary(tmp_path, kind):
    """The default workspace holds all rows of so small a loss, so it is made smaller here: one row or two."""
    length = {} if kind == "gkd" else {"max_completion_length": 20}
    trainer = TRAINERS[kind](tmp_path, max_steps=1, per_device_train_batch_size=4, **length)
    vocabulary = trainer.model.config.vocab_size
    original = getattr(type(trainer), METHOD[kind])
    use_fused_loss(trainer, workspace_bytes=12_000, backend="torch")
    name, seen = METHOD[kind], []
    ours = getattr(trainer, name)

    def watched(model, inputs, *rest, **more):
        mask = inputs["labels"][:, 1:] != -100 if "labels" in inputs else inputs["completion_mask"]
        rows = trainer.model.config.hidden_size + 8  # more than the head's own weight has
        assert mask.sum() > rows
        bound = NoVocabulary(rows, vocabulary)
        ours(model, inputs, *rest, **more)  # the head is looked at once, on three rows
        with bound:
            loss = ours(model, inputs, *rest, **more)
        value = loss[0] if isinstance(loss, tuple) else loss
        with pytest.raises(AssertionError, match="made"), bound:  # TRL's own makes them
            original(trainer, model, inputs, *rest, **more)
        seen.append((bound.seen, value))
        return loss

    setattr(trainer, name, watched)
    trainer.train()
    assert len(seen) == 1 and seen[0][0] > 50


def test_exact_counts_the_tokens_that_are_scored(tmp_path):
    """On-policy GKD: TRL divides by the data set's labels, whatever was generated."""
    ratios = []
    for normalize in ("trl", "exact"):
        trainer = TRAINERS["gkd"](tmp_path, lmbda=1.0, beta=1.0, gradient_accumulation_steps=2, max_steps=1)
        use_fused_loss(trainer, normalize=normalize)
        ours, seen = trainer.compute_loss, []

        def watched(model, inputs, *rest, ours=ours, seen=seen, teacher=trainer.teacher_model, **more):
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            with torch.no_grad():
                heads = [LMHead.from_model(m) for m in (model, teacher)]
                states = [m.base_model(ids, attention_mask=mask)[0][:, :-1] for m in (model, teacher)]
                kl = fused_linear_reverse_kl(
                    states[0], heads[0], states[1], heads[1], token_weights=inputs["labels"][:, 1:] != -100
                )
            loss = ours(model, inputs, *rest, **more)
            seen.append(float(loss.detach() / kl))
            return loss

        trainer.compute_loss = watched
        trainer.train()
        ratios.append(seen)
    assert ratios[1] == pytest.approx([0.5, 0.5], rel=1e-4)  # two micro-batches, each the mean over its tokens
    assert all(abs(ratio - 0.5) > 0.02 for ratio in ratios[0])


def test_exact_leaves_sequences_without_a_scored_token_out(tmp_path):
    losses = {}
    for normalize in ("trl", "exact"):
        trainer = TRAINERS["sdft"](tmp_path, num_loss_tokens_to_skip=3)
        use_fused_loss(trainer, normalize=normalize)
        torch.manual_seed(0)
        ids, mask = torch.randint(3, 200, (2, 4)), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        inputs = {
            "prompt_ids": ids, "prompt_mask": torch.ones_like(ids), "completion_ids": ids, "completion_mask": mask,
            "teacher_input_ids": torch.cat([ids.flip(0), ids], 1),
            "teacher_attention_mask": torch.cat([torch.ones_like(ids), mask], 1),
        }  # fmt: skip
        trainer.model.eval()
        losses[normalize] = float(trainer.compute_loss(trainer.model, inputs).detach())
    assert losses["exact"] == pytest.approx(2 * losses["trl"], rel=1e-5) and losses["trl"] > 1e-4


@pytest.mark.parametrize("kind", TRAINERS)
def test_restore_gives_trls_loss_back(tmp_path, kind):
    trainer = TRAINERS[kind](tmp_path)
    name, cls = METHOD[kind], type(trainer)
    original = vars(cls)[name]
    with use_fused_loss(trainer):
        assert getattr(trainer, name).__func__ is not original
        with pytest.raises(ValueError, match="already"):
            use_fused_loss(trainer)
    assert getattr(trainer, name).__func__ is original
    handle = use_fused_loss(cls)
    try:
        assert vars(cls)[name] is not original
        for target in (cls, trainer):
            with pytest.raises(ValueError, match="already"):
                use_fused_loss(target)
        entries = compare(trainer, name, original)
        trainer.train()
        assert len(entries) == 2
        assert entries[1][0] == pytest.approx(entries[1][1], rel=1e-4)
    finally:
        handle.restore()
    handle.restore()
    assert vars(cls)[name] is original


def test_refuses_what_it_cannot_follow(tmp_path):
    distillation, sdft = TRAINERS["distillation"](tmp_path), TRAINERS["sdft"](tmp_path)
    for trainer, setting, value, message in (
        (distillation, "use_liger_kernel", True, "use_liger_kernel"),
        (sdft, "distillation_mode", "topk_logits", "distillation_alpha=1.0"),
        (sdft, "distillation_mode", "sampled_token", "distillation_alpha=1.0"),
        (sdft, "distillation_mode", "other", "full_logits"),
    ):
        before = getattr(trainer.args, setting)
        setattr(trainer.args, setting, value)
        with pytest.raises(ValueError, match=message):
            use_fused_loss(trainer)
        assert not hasattr(vars(trainer).get("compute_loss"), "fused")
        setattr(trainer.args, setting, before)
    sdft.use_teacher_server = True
    with pytest.raises(ValueError, match="server sends no hidden states"):
        use_fused_loss(sdft)
    with pytest.raises(ValueError, match="normalize is 'tokens'"):
        use_fused_loss(distillation, normalize="tokens")

    class WithItsOwn(type(distillation)):
        def _compute_loss(self, *args, **kwargs):
            return super()._compute_loss(*args, **kwargs)

    with pytest.raises(ValueError, match="WithItsOwn has its own _compute_loss"):
        use_fused_loss(WithItsOwn)
    from trl.experimental.gold import GOLDTrainer
    from trl.experimental.server_distillation import ServerDistillationTrainer

    for other in (GOLDTrainer, ServerDistillationTrainer, int):
        with pytest.raises(TypeError, match=f"{other.__name__} is not one of TRL's DistillationTrainer"):
            use_fused_loss(other)
    gkd = TRAINERS["gkd"](tmp_path)
    use_fused_loss(gkd)
    with pytest.raises(ValueError, match="return_outputs=True"):
        gkd.compute_loss(gkd.model, {}, return_outputs=True)
    # A class is checked when its first loss is computed.
    with use_fused_loss(type(distillation)):
        distillation.args.use_liger_kernel = True
        with pytest.raises(ValueError, match="use_liger_kernel"):
            distillation._compute_loss(distillation.model, {}, None)


@pytest.mark.parametrize("found", ["1.15.2", "2.16.0", "1.160.0"])
def test_another_trl_is_refused_with_the_remedy(monkeypatch, found):
    module = sys.modules["opcd_fast.integrations.trl_loss"]
    assert version("trl").startswith("1.16.")
    monkeypatch.setattr(module, "version", lambda name: found)
    with pytest.raises(ImportError, match=rf"trl {found}.*pip install 'trl>=1.16,<1.17'"):
        use_fused_loss(object())
