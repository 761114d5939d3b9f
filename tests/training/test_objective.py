"""What is minimised, context_kl and answer_nll: the loss of plain float64 forwards, for both weightings, and for heads
padded to different lengths."""

import pytest
import torch
from loss_oracle import relative_error, token_kl64
from tiny import tiny_model

from opcd_fast.data import Sample, pack, total_weight
from opcd_fast.teacher import ContextTeacher
from opcd_fast.training.step import answer_nll, context_kl

TOKENS = 261
TEMPERATURE = 0.8
CONTEXTS = [list(range(20, 45)), list(range(90, 97))]
SAMPLES = [
    Sample([3, 5, 7], [2, 5, 7, 9], 0, [11, 12, 13, 14, 15]),
    Sample([4], [6], 1, [21]),
    Sample([8, 9], [8, 9], 1, [31, 32, 33]),
    Sample([3, 5], [2, 5, 7], 0, [41, 256]),
]


def student_model(dtype=torch.float32):
    return tiny_model(seed=0, dtype=dtype).requires_grad_(True)


def teacher_model(dtype=torch.float32):
    return tiny_model(seed=7, hidden_size=48, num_hidden_layers=3, dtype=dtype)


def padded(model, rows):
    """The model with `rows` rows in head and embeddings; if the new ones counted, they would dominate."""
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    old = [weight.detach().clone() for weight in (head, embeddings)]
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer, values in zip((model.get_output_embeddings(), model.get_input_embeddings()), old, strict=True):
            layer.weight.fill_(2.0)[:TOKENS] = values
    return model


def loss_of(student, teacher, objective="kl", normalize="sequence"):
    """(loss, values of all tokens, their weights)."""
    batch = pack(SAMPLES, normalize=normalize)
    options = {
        "temperature": TEMPERATURE, "denominator": total_weight(SAMPLES, normalize), "compute_dtype": torch.float32
    }
    if objective == "nll":
        loss, stats = answer_nll(batch, student, **options)
        return loss, stats.token_nll, batch.token_weights
    loss, stats = context_kl(batch, student, ContextTeacher(teacher, CONTEXTS, adapter="active"), **options)
    return loss, stats.token_kl, batch.token_weights


def by_hand(objective, normalize):
    """(loss, float64 student) of one plain forward per model and sequence, with gradients."""
    student, teacher = student_model(torch.float64), teacher_model(torch.float64)
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for sample in SAMPLES:
        sides = []
        for model, prompt in (
            (student, sample.student_prompt),
            (teacher, [*CONTEXTS[sample.context_index], *sample.teacher_prompt]),
        ):
            ids = torch.tensor([[*prompt, *sample.response]])
            with torch.set_grad_enabled(model is student):
                sides.append(model(ids).logits[0, len(prompt) - 1 : -1])
        if objective == "nll":
            answer = torch.tensor(sample.response)
            values = torch.nn.functional.cross_entropy(sides[0] / TEMPERATURE, answer, reduction="none")
        else:
            values = token_kl64(*sides, TEMPERATURE)
        weight = 1 / len(sample.response) if normalize == "sequence" else 1.0
        total, weights = total + weight * values.sum(), weights + weight * len(sample.response)
    loss = total / weights
    loss.backward()
    return loss.item(), student


@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("objective", ["kl", "nll"])
def test_loss_and_gradient_are_those_of_plain_forwards(objective, normalize):
    wanted, exact = by_hand(objective, normalize)
    assert wanted > 0.1
    student = student_model()
    loss, values, weights = loss_of(student, teacher_model(), objective, normalize)
    loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert values.shape == (11,) and float((values * weights).sum() / weights.sum()) == pytest.approx(wanted, rel=1e-5)
    for (name, parameter), reference in zip(student.named_parameters(), exact.parameters(), strict=True):
        assert relative_error(parameter.grad, reference.grad) < 1e-4, name


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(261, 264), (264, 261), (320, 264)])
def test_heads_padded_to_different_lengths(student_rows, teacher_rows):
    """As in Qwen2.5, where 0.5B and 7B share a tokenizer but not the length of the head."""
    cut, both = student_model(), padded(student_model(), student_rows).requires_grad_(True)
    teacher = padded(teacher_model(), teacher_rows)
    size = min(student_rows, teacher_rows)
    if size > TOKENS:  # padding that both heads have cannot be told from tokens, so it stays
        cut = padded(cut, size).requires_grad_(True)
    wanted, wanted_values, _ = loss_of(cut, padded(teacher_model(), size))
    got, values, _ = loss_of(both, teacher)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(values, wanted_values, rtol=1e-5, atol=1e-7)
    wanted.backward(), got.backward()
    gradient, expected = both.get_output_embeddings().weight.grad, cut.get_output_embeddings().weight.grad
    torch.testing.assert_close(gradient[:size], expected, rtol=1e-5, atol=1e-7)
    assert not gradient[size:].any()
