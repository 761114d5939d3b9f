"""Packing: every position that should predict a response token does, and nothing is lost."""

import random

import pytest
import torch

from opcd_fast import InputError
from opcd_fast.data import Sample, micro_batches, pack, total_weight


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


@pytest.mark.parametrize("logprobs", [[-0.5], [-0.5] * 3])
def test_logprobs_of_another_length_are_refused(logprobs):
    with pytest.raises(ValueError, match=r"samples\[1\].*logprobs"):
        pack([Sample([1], [2], 0, [3, 4], [-0.5, -1.5]), Sample([1], [2], 0, [3, 4], logprobs)])


def test_one_sample_without_logprobs_leaves_the_batch_without():
    assert pack([Sample([1], [2], 0, [3], [-0.5]), Sample([1], [2], 0, [3])]).behaviour_logprobs is None


@pytest.mark.parametrize("count", [lambda s, n: pack(s, normalize=n), total_weight])
def test_another_normalize_is_refused(count):
    with pytest.raises(ValueError, match="normalize.*'sequence'.*'token'"):
        count(random_samples(2), "tokens")


@pytest.mark.parametrize("share_prompts", [False, True])
def test_tensors_are_packed_as_lists_are(share_prompts):
    lists = [Sample([1, 2], [3], 0, [4, 5], [-0.5, -1.5]), Sample([1, 2], [3], 0, [6], [-0.25])]
    tensors = [
        Sample(**{name: torch.tensor(v) if isinstance(v, list | tuple) else v for name, v in vars(sample).items()})
        for sample in lists
    ]
    for found, wanted in zip(*(vars(pack(s, share_prompts=share_prompts)).values() for s in (tensors, lists))):
        assert (found is None and wanted is None) or torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["student_prompt", "teacher_prompt", "response"])
@pytest.mark.parametrize("wrong", [[3.7], torch.tensor([3.7]), [True], "text", [-1], None])
def test_what_are_no_token_ids_is_refused(name, wrong):
    with pytest.raises(InputError, match=name):
        Sample(**{"student_prompt": [1], "teacher_prompt": [2], "context_index": 0, "response": [3], name: wrong})


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


BEGINNING = list(range(20, 30))


def test_a_beginning_of_all_prompts_occurs_once():
    prompts, answers = [[1, 2], [3], [1, 4, 5]], [[6, 7, 8], [9], [11, 12]]
    samples = [Sample([*BEGINNING, *p], [2], 0, a) for p, a in zip(prompts, answers, strict=True)]
    batch = pack(samples, share_prompts=True)
    bounds = batch.student_cu_seqlens.tolist()
    segments = [batch.student_ids[a:b].tolist() for a, b in zip(bounds[:-1], bounds[1:])]
    assert segments == [BEGINNING, [1, 2, 6, 7], [3], [1, 4, 5, 11]]
    assert batch.student_parent.tolist() == [-1, 0, 0, 0]
    predicting = batch.student_ids[batch.response_index_student].tolist()
    assert predicting == [2, 6, 7, 3, 5, 11]  # the token before each one of the answers
    assert batch.response_index_student.tolist() == [11, 12, 13, 14, 17, 18]


@pytest.mark.parametrize(
    ("beginning", "prompts", "answers", "parents"),
    [
        (BEGINNING[:8], [[1], [2]], 4, [-1, 0, 0]),
        (BEGINNING[:7], [[1], [2]], 4, None),  # shorter than an extra phase of attention is worth
        (BEGINNING[:8], [[1], [2]], 40, None),  # a small part of the row
        (BEGINNING[:8], [[1] * 20, [1] * 20, [2]], 4, [-1, 0, 0, -1]),  # an equal prompt saves 28, the beginning 16
        (BEGINNING[:8], [[1], [1], [2]], 4, [-1, 0, 0, 0]),  # 9 and 16
        (BEGINNING, [[1], [1]], 4, [-1, 0, 0]),
        (BEGINNING, [[1]], 4, None),
        ([], [[1], [2]], 1, None),
    ],
)
def test_what_is_shared_is_what_saves_most(beginning, prompts, answers, parents):
    samples = [Sample([*beginning, *p], [2], 0, [3] * answers) for p in prompts]
    batch = pack(samples, share_prompts=True)
    assert (None if batch.student_parent is None else batch.student_parent.tolist()) == parents
    one_by_one = pack(samples)
    tokens = lambda b: b.student_ids[b.response_index_student].tolist()  # noqa: E731
    assert tokens(batch) == tokens(one_by_one) and len(batch.student_ids) <= len(one_by_one.student_ids)


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
    assert moved.student_ids.device.type == moved.response_index_student.device.type == "meta"
    host = (moved.student_parent, moved.student_cu_seqlens, moved.teacher_cu_seqlens, moved.context_index)
    assert {x.device.type for x in (*host, moved.response_index_teacher)} == {"cpu"}  # rows are cut up there
    assert apart.to(torch.device("meta")).student_parent is None
