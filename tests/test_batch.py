"""Packing: every position that should predict a response token does, and nothing is lost."""

import random

import pytest
import torch

from opcd_fast.batch import Sample, micro_batches, pack


def random_samples(count, seed=0):
    draw = random.Random(seed)
    ids = lambda low, high: [draw.randrange(1000) for _ in range(draw.randint(low, high))]  # noqa: E731
    return [Sample(ids(1, 9), ids(1, 5), draw.randrange(3), ids(1, 7)) for _ in range(count)]


def test_positions_predict_exactly_the_response():
    samples = random_samples(11)
    batch = pack(samples)
    row = 0
    for index, sample in enumerate(samples):
        for side, prompt in (("student", sample.student_prompt), ("teacher", sample.teacher_prompt)):
            ids = getattr(batch, f"{side}_ids")
            start, end = getattr(batch, f"{side}_cu_seqlens")[index : index + 2].tolist()
            assert ids[start:end].tolist() == [*prompt, *sample.response[:-1]]
            for offset, token in enumerate(sample.response):
                position = int(getattr(batch, f"response_index_{side}")[row + offset])
                following = [*ids[start:end].tolist(), sample.response[-1]][position - start + 1]
                assert following == token == int(batch.response_ids[row + offset])
        row += len(sample.response)
    assert batch.response_cu_seqlens.tolist()[-1] == row == batch.token_weights.numel()
    assert batch.context_index.tolist() == [sample.context_index for sample in samples]
    assert batch.behaviour_logprobs is None


def test_weights_make_the_sum_a_mean_over_sequences():
    samples = random_samples(5, seed=1)
    batch = pack(samples)
    kl = torch.rand(batch.token_weights.numel())
    by_hand = sum(float(part.mean()) for part in kl.split([len(s.response) for s in samples]))
    assert float((batch.token_weights * kl).sum()) == pytest.approx(by_hand, rel=1e-5)
    assert pack(samples, normalize="token").token_weights.unique().tolist() == [1.0]


def test_logprobs_travel_with_their_tokens():
    samples = [Sample([1], [2], 0, [3, 4], [-0.5, -1.5]), Sample([1], [2], 0, [5], [-2.0])]
    assert pack(samples).behaviour_logprobs.tolist() == [-0.5, -1.5, -2.0]
    assert pack(samples).behaviour_logprobs.dtype == torch.float32


def test_micro_batches_keep_order_and_respect_the_bound():
    samples = random_samples(20, seed=2)
    size = lambda s: len(s.student_prompt) + len(s.teacher_prompt) + 2 * (len(s.response) - 1)  # noqa: E731
    groups = list(micro_batches(samples, 40))
    assert [s for group in groups for s in group] == samples
    assert all(sum(map(size, group)) <= 40 for group in groups if len(group) > 1)
    assert len(groups) > 3
    assert list(micro_batches(samples, None)) == [samples]
    assert list(micro_batches(samples, 1)) == [[sample] for sample in samples]


@pytest.mark.parametrize("bad", [[], [Sample([1], [2], 0, [])], [Sample([], [2], 0, [1])], [Sample([1], [], 0, [1])]])
def test_empty_parts_are_refused(bad):
    with pytest.raises(ValueError, match="empty"):
        pack(bad)


def test_shared_prompts_occur_once_and_every_position_predicts_its_token():
    prompts = [[7, 8, 9], [4], [5, 6]]
    which, answers = [0, 1, 0, 2, 0, 1], [[1, 2, 3], [4], [5], [6, 7], [8, 9], [10, 11, 12]]
    samples = [Sample(prompts[w], [2], 0, answer) for w, answer in zip(which, answers)]
    batch = pack(samples, share_prompts=True)
    bounds = batch.student_cu_seqlens.tolist()
    segments = [batch.student_ids[a:b].tolist() for a, b in zip(bounds[:-1], bounds[1:])]
    assert segments == [[7, 8, 9], [1, 2], [], [8], [4], [], [10, 11], [5, 6, 6]]
    assert batch.student_parent.tolist() == [-1, 0, 0, 0, -1, 4, 4, -1]
    first_of = [2, 6, 2, 10, 2, 6]  # the prompt's last position, which siblings share
    rest = [[3, 4], [], [], [11], [5], [7, 8]]
    expected = [[first, *others] for first, others in zip(first_of, rest)]
    assert batch.response_index_student.tolist() == [position for positions in expected for position in positions]
    apart = pack(samples)
    assert apart.student_parent is None
    for name in ("teacher_ids", "response_index_teacher", "token_weights", "response_ids", "response_cu_seqlens"):
        assert getattr(batch, name).equal(getattr(apart, name)), name
    moved = batch.to(torch.device("meta"))
    assert moved.student_parent.device.type == "meta" and apart.to(torch.device("meta")).student_parent is None
