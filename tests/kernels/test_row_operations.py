"""The row operation of every divergence, in PyTorch, Triton and C++, against float64 autograd of its definition."""

import dataclasses
import itertools
import math

import pytest
import torch
from row_oracle import (
    CASES,
    DEVICE,
    FEW,
    INF,
    KINDS,
    LEVELS,
    check,
    error,
    implementation,
    inputs,
    keywords,
    oracle,
    pairs,
    run,
)

from opcd_fast.kernels.csrc import native
from opcd_fast.kernels.reference import DIVERGENCES, Logits

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
GATED = [case for case in CASES if case[0] == "gated_kl"]
each = pytest.mark.parametrize(("kind", "case"), pairs(FEW), ids=str)


def test_every_row_of_the_table_is_tried_here():
    assert {name for name, row in DIVERGENCES.items() if row.code is not None} == {name for name, _ in FEW}


@pytest.mark.parametrize(("kind", "case"), pairs(CASES), ids=str)
def test_from_far_apart_to_almost_equal(kind, case):
    """KL around 1, 1e-4 and 1e-6: float32 keeps the digits of each, also where all logits are large."""
    student, teacher, weights = inputs(3, 1030, torch.tensor([[1.0], [0.01], [0.001]]), offset=3.0)
    student, teacher = student._replace(z=student.z + 40.0), teacher._replace(z=teacher.z + 40.0)
    statistics, g = run(implementation(kind), case, student, teacher, weights)
    exact_statistics, exact_g = oracle(case, student, teacher, weights)
    torch.testing.assert_close(statistics[1:], exact_statistics[1:].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics[0], exact_statistics[0].float(), rtol=1e-3, atol=1e-10)
    for row, tolerance in enumerate((1e-5, 2e-4, 2e-3)):
        assert error(g[row], exact_g[row]) < tolerance
    assert (statistics[0] >= 0).all()


@pytest.mark.parametrize("columns", [700, 40_000])
@pytest.mark.parametrize("level", LEVELS)
def test_a_kl_of_1e_minus_9_keeps_its_digits_in_cpp(level, columns):
    for softcap in (None, 30.0):
        student, teacher, weights = inputs(2, columns, 4e-5, softcap=softcap)
        statistics, g = run(implementation(level), CASES[0], student, teacher, weights)
        exact_statistics, exact_g = oracle(CASES[0], student, teacher, weights)
        assert float(exact_statistics[0].max()) < 1e-8 and (statistics[0] >= 0).all()
        torch.testing.assert_close(statistics[0].double(), exact_statistics[0], rtol=0.1 if softcap else 1e-3, atol=0)
        assert error(g, exact_g) < (0.05 if softcap else 1e-3)


@pytest.mark.parametrize("columns", [1, 3, 16, 17, 511, 512, 513, 1025, 4097])
@pytest.mark.parametrize(("kind", "case"), pairs([CASES[0], CASES[2], *GATED]), ids=str)
def test_every_remainder_of_the_block(kind, case, columns):
    student, teacher, weights = inputs(2, columns)
    statistics, g = run(implementation(kind), case, student, teacher, weights)
    exact_statistics, exact_g = oracle(case, student, teacher, weights)
    torch.testing.assert_close(statistics, exact_statistics.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(g, exact_g.float(), rtol=1e-4, atol=1e-6)


@each
def test_transforms_of_either_side(kind, case):
    student, teacher, weights = inputs(2, 1100)
    bias = torch.randn(2, 1100, generator=torch.Generator().manual_seed(1))
    flags = itertools.product([False, True], repeat=4) if kind in LEVELS else ((1, 0, 0, 1), (0, 1, 1, 0))
    for cap_s, cap_t, bias_s, bias_t in flags:
        one = Logits(student.z, bias[0] if bias_s else None, 0.5, 4.0 if cap_s else None, 0.7)
        other = Logits(teacher.z, bias[1] if bias_t else None, 1.5, 7.0 if cap_t else None, 0.7)
        check(implementation(kind), case, one, other, weights)


@each
def test_how_the_work_is_cut_changes_nothing_but_rounding(kind, case):
    """Blocks of rows in PyTorch, splits of a row in Triton, threads in C++, where not a bit may change."""
    student, teacher, weights = inputs(7 if kind == "torch" or kind in LEVELS else 1, 1541, softcap=5.0)
    found, before = [], torch.get_num_threads()
    for pieces in (1, 3):
        options = {}
        if kind == "torch":
            options["scratch"] = torch.empty(4, 8 - 2 * pieces, 1541)
        elif kind == "triton":
            options["splits"] = pieces
        try:
            torch.set_num_threads(pieces)
            found.append(run(implementation(kind), case, student, teacher, weights, **options))
        finally:
            torch.set_num_threads(before)
    exact = kind in LEVELS
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-7)


@each
def test_far_apart(kind, case):
    """l of +-200: exponentials overflow or vanish, the value stays finite and right."""
    student, teacher, weights = inputs(5, 1030)
    z_s, z_t = student.z, teacher.z
    z_s[0, 5] += 200.0
    z_t[1, 515] += 200.0
    z_s[2, 7] -= 200.0
    z_t[3, 9] -= 200.0
    z_s[2, 8] = -1e4
    z_t[3, 8] = -1e4
    z_s[4, 500:] = z_t[4, 500:] = torch.finfo(torch.float32).min  # as good as forbidden
    # l is rounded at 200 where a KL is, unless E_p[z_s - z_t] is known beforehand.
    tolerance = 2e-5 if kind == "triton" else 5e-4
    statistics, g = check(implementation(kind), case, student, teacher, weights, tolerance)
    assert statistics.isfinite().all() and g.isfinite().all()


@each
def test_forbidden_tokens(kind, case):
    """Rows: only the teacher forbids; only the student; both the same tokens; neither; the teacher forbids a token to
    which the student gives less than the smallest normal number, and the other way round; the same where e^(z - max) is
    a normal number still."""
    student, teacher, weights = inputs(7, 1050)
    z_s, z_t = student.z, teacher.z
    z_t[0, 3] = z_s[1, 1049] = -INF
    z_s[2, 10:900] = z_t[2, 10:900] = -INF
    z_s[4, 4], z_t[4, 4] = -200.0, -INF
    z_s[5, 4], z_t[5, 4] = -INF, -200.0
    z_s[6, 4], z_t[6, 4] = (float(z_s[6].max()) + float(z_s[6].logsumexp(0))) / 2 - 87.34, -INF
    statistics, g = check(implementation(kind), case, student, teacher, weights)
    infinite = {"teacher": 0, "student": 1}.get(DIVERGENCES[case[0]].infinite)
    for row in range(7):
        assert (float(statistics[0, row]) == INF) == (row == infinite)
        assert bool(g[row].any()) != (row == infinite)
    assert not statistics.isnan().any() and not g[2, 10:900].any()


@pytest.mark.parametrize(("kind", "case"), pairs(GATED), ids=str)
def test_the_gate_is_closed_by_the_least_likely_of_forbidden_tokens(kind, case):
    """Rows, of equal models but for one token at 1e-35: the teacher forbids it, the student does, neither; and one at
    which the student's probability is no normal number, which the teacher forbids."""
    student, teacher, weights = inputs(4, 1050, spread=0.0)
    lse = student.z.logsumexp(-1)
    student.z[:, 1049] = teacher.z[:, 1049] = lse + math.log(1e-35)
    student.z[3, 1049] = teacher.z[3, 1049] = lse[3] - 95.0
    teacher.z[0, 1049] = teacher.z[3, 1049] = student.z[1, 1049] = -INF
    statistics, g = run(implementation(kind), case, student, teacher, weights)
    assert statistics[5, 0] == 1.0 and (statistics[5, 1:] < 1e-5).all()
    assert statistics[0, 1] == INF and (statistics[0, [0, 2, 3]] < 1e-6).all()
    assert not g[1].any() and g.abs().max() < 1e-6


@pytest.mark.parametrize(("kind", "case"), pairs(GATED), ids=str)
def test_where_the_gate_is_one_the_reverse_kl_has_no_part(kind, case):
    """It is infinite in the first row. In the second, of the gate "kl", it is beyond what exp and float32 hold."""
    student, teacher, weights = inputs(2, 1050, spread=3.0)
    teacher.z[0, 3] = -INF
    teacher.z[1, 500:] = torch.finfo(torch.float32).min
    student.z[1, 500] += 20.0
    statistics, g = run(implementation(kind), case, student, teacher, weights)
    forward, exact = oracle(CASES[1], student, teacher, weights)
    rows = slice(0, 2 if case[1] == "kl" else 1)
    assert (statistics[5, rows] == 1.0).all() and g[rows].isfinite().all()
    torch.testing.assert_close(statistics[0, rows], forward[0, rows].float(), rtol=1e-5, atol=0)
    assert error(g[rows], exact[rows]) < 1e-5


@pytest.mark.parametrize(("kind", "case"), pairs(GATED), ids=str)
def test_without_all_statistics_the_gate_is_not_written(kind, case):
    statistics, _ = run(implementation(kind), case, *inputs(2, 700), all_statistics=False)
    assert statistics[0].all() and not statistics[1:].any()


@each
def test_nan_stays_in_its_row(kind, case):
    student, teacher, weights = inputs(4, 1061)
    teacher.z[0, 7] -= 300.0
    student.z[3, 8] -= 300.0
    exact_statistics, exact_g = oracle(case, student, teacher, weights)
    student.z[1, 1060] = teacher.z[2, 0] = float("nan")
    statistics, g = run(implementation(kind), case, student, teacher, weights)
    assert statistics[0, 1:3].isnan().all() and g[1:3].isnan().any(1).all()
    for row in (0, 3):
        torch.testing.assert_close(statistics[:, row], exact_statistics[:, row].float(), rtol=1e-4, atol=1e-6)
        assert error(g[row], exact_g[row]) < 2e-5


@pytest.mark.parametrize("value", [torch.nan, 0x7FFFFFFF, INF])
@pytest.mark.parametrize("level", LEVELS)
def test_what_is_no_number_stays_none_when_cpp_rounds_it(level, value):
    """A NaN all of whose bits are set: rounding it to bf16 by an addition would make it a zero."""
    value = torch.tensor(value, dtype=torch.int32).view(torch.float32) if isinstance(value, int) else value
    for side in (0, 1):
        both = inputs(3, 1061)
        both[side].z[1, 500] = value
        for dtype in (torch.float32, torch.bfloat16):
            statistics, g = run(implementation(level), CASES[0], *both, dtype=dtype)
            assert statistics[0].isnan().tolist() == [False, True, False] and statistics[2 + side, 1].isnan()
            assert g.isnan().all(-1).tolist() == [False, True, False] and g[::2].isfinite().all()


def test_of_equally_likely_tokens_the_first_is_the_top_one():
    student, teacher, weights = inputs(3, 3000)
    student.z[:, [5, 2500]] = 20.0
    teacher.z[0, 5] = teacher.z[1, 2500] = teacher.z[2, 10] = 20.0
    for kind in KINDS:
        statistics, _ = run(implementation(kind), CASES[0], student, teacher, weights)
        assert statistics[4].tolist() == [1.0, 0.0, 0.0], kind


@each
def test_in_place_without_gradient_and_without_statistics(kind, case):
    rows, (student, teacher, weights) = implementation(kind), inputs(2, 1100)
    statistics, g = run(rows, case, student, teacher, weights)
    value_only, none = run(rows, case, student, teacher, weights, gradient=False, all_statistics=False)
    assert none is None and not value_only[1:].any()
    torch.testing.assert_close(value_only[0], statistics[0], rtol=1e-6, atol=0)
    in_place, other = student.z.clone().to(DEVICE), teacher.z.clone().to(DEVICE)
    again = torch.zeros(6, 2, device=DEVICE)
    rows(Logits(in_place), Logits(other), weights.to(DEVICE), again, in_place, **keywords(case))
    assert torch.equal(in_place.cpu(), g) and torch.equal(again.cpu(), statistics)
    if kind != "torch":
        assert torch.equal(other.cpu(), teacher.z)


@pytest.mark.parametrize("kind", KINDS)
def test_wider_buffers_and_a_gradient_of_another_dtype(kind):
    case = CASES[2]
    student, teacher, weights = inputs(2, 700)
    _, exact = oracle(case, student, teacher, weights)
    # bf16 stores truncate in Triton's interpreter; fp16 rounds
    dtype = torch.bfloat16 if kind in LEVELS else torch.float16
    wide, buffer = torch.full((2, 768), 9.0, device=DEVICE), torch.full((2, 704), 9.0, device=DEVICE, dtype=dtype)
    planes = torch.full((6, 8), 9.0, device=DEVICE)
    wide[:, :700] = student.z
    implementation(kind)(
        Logits(wide[:, :700]), Logits(teacher.z.to(DEVICE)), weights.to(DEVICE), planes[:, 2:4], buffer[:, :700],
        **keywords(case),
    )  # fmt: skip
    assert (buffer[:, 700:] == 9).all() and (planes[:, :2] == 9).all() and (planes[:, 4:] == 9).all()
    assert error(buffer[:, :700].cpu(), exact) < (2e-3 if dtype == torch.float16 else 4e-3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_cpp_reads_and_writes_bf16(level, case):
    rows, (student, teacher, weights) = implementation(level), inputs(3, 1061, spread=1.0)
    for one, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2):
        both = Logits(student.z.to(one)), Logits(teacher.z.to(other))
        _, g = check(rows, case, *both, weights)
        _, rounded = run(rows, case, *both, weights, dtype=torch.bfloat16)
        assert torch.equal(rounded, g.bfloat16()), "not rounded to nearest even"
    z = student.z.bfloat16()
    native.divergence_rows(Logits(z), both[1], weights, torch.zeros(6, 3), z, **keywords(case))
    torch.testing.assert_close(z, rounded, rtol=2**-7, atol=1e-7)


def test_few_rows_are_split_and_many_are_not():
    pytest.importorskip("triton")
    from opcd_fast.kernels.triton.divergences import PROGRAMS, split_blocks

    for rows, columns in itertools.product((1, 5, 100, 255, 256, 10_000), (1, 2048, 5000, 151_936)):
        splits, blocks = split_blocks(rows, columns, 2048)
        whole = columns // 2048
        assert (splits - 1) * blocks < max(whole, 1) <= splits * blocks  # all blocks, and none of the splits empty
        assert splits == 1 or rows * (splits - 1) < PROGRAMS
    assert split_blocks(1, 151_936, 2048)[0] == 74 and split_blocks(64, 151_936, 2048)[0] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_or_parameter_that_is_not_known_is_refused(kind, monkeypatch):
    """Also one that was added to the table alone: it must not come out as another."""
    rows, problem = implementation(kind), inputs(1, 8)
    for case, words in (
        (("kl", 0.0), "'kl'"), (("topk_reverse_kl", 3.0), "'topk_reverse_kl'"), (("jsd", 0.0), "parameter is 0.0"),
        (("skew_reverse_kl", 1.0), "parameter is 1.0"), (("gated_kl", "lk"), "gate is 'lk'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            run(rows, case, *problem)
    monkeypatch.setitem(DIVERGENCES, "toy", dataclasses.replace(DIVERGENCES["jsd"], name="toy", code=77))
    with pytest.raises(Exception, match="unknown divergence|failed with code 2"):
        run(rows, ("toy", 0.5), *problem)


def test_codes_are_those_of_the_library_and_are_given_once():
    codes = [row.code for row in DIVERGENCES.values() if row.code is not None]
    assert sorted(codes) == list(range(len(codes)))


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind):
    for _, case in pairs(FEW, [kind]):
        nothing = Logits(torch.empty(0, 8))
        statistics, g = run(implementation(kind), case, nothing, nothing, torch.empty(0))
        assert statistics.shape == (6, 0) and g.shape == (0, 8)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "torch"])
def test_tensors_that_a_kernel_cannot_read_are_refused(kind):
    rows, (student, teacher, weights) = implementation(kind), inputs(4, 64)
    bias = torch.zeros(64)
    good = {
        "z_s": student.z, "z_t": teacher.z, "bias_s": bias, "bias_t": bias, "row_weights": weights,
        "statistics": torch.zeros(6, 4), "gradient": torch.empty(4, 64),
    }  # fmt: skip
    wrong = {"z_s": [student.z.double(), student.z.T.contiguous().T], "z_t": [teacher.z.half()]}
    if kind in LEVELS:
        wrong |= {
            "z_t": [teacher.z[:, :63], teacher.z[:3]], "bias_s": [bias.bfloat16(), bias[:5]],
            "bias_t": [torch.zeros(128)[::2]], "row_weights": [weights.double(), torch.zeros(8)[::2]],
            "statistics": [torch.zeros(4, 6).T, torch.zeros(5, 4)],
            "gradient": [torch.empty(4, 64, dtype=torch.half), torch.empty(4, 128)[:, ::2]],
        }  # fmt: skip
    for name, value in ((name, value) for name, values in wrong.items() for value in values):
        given = {**good, name: value}
        with pytest.raises(ValueError, match=f"^{name} is "):
            rows(
                Logits(given["z_s"], given["bias_s"]), Logits(given["z_t"], given["bias_t"]), given["row_weights"],
                given["statistics"], given["gradient"], divergence="reverse_kl", parameter=0.0,
            )  # fmt: skip
