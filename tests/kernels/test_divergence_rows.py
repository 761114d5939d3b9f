"""The row operation of every divergence, in PyTorch and in Triton, against float64 autograd of its definition."""

import itertools
import threading

import pytest
import torch

from opcd_fast.kernels.reference import divergences as specification

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
TINY = torch.finfo(torch.float32).tiny
PLAIN = {"scale_s": 1.0, "scale_t": 1.0, "softcap_s": None, "softcap_t": None, "temperature": 1.0}
CASES = [
    ("reverse_kl", 0.0), ("forward_kl", 0.0), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.97), ("skew_reverse_kl", 0.1),
    ("skew_reverse_kl", 0.9), ("skew_forward_kl", 0.1), ("skew_forward_kl", 0.9),
]  # fmt: skip
FEW = [CASES[0], CASES[1], CASES[3], CASES[5], CASES[7]]


def torch_rows(*arguments, splits=None, **options):
    specification.divergence_rows(*arguments, **options)


def triton_rows(splits):
    def rows(*arguments, **options):
        from opcd_fast.kernels.triton import divergences as triton_divergence_rows

        triton_divergence_rows.divergence_rows(*arguments, splits=splits, **options)

    return rows


@pytest.fixture(params=["torch", "triton"])
def rows(request):
    """One implementation of divergence_rows."""
    if request.param == "torch":
        return torch_rows
    pytest.importorskip("triton")
    return triton_rows(splits=2)


def kl(log_a, log_b):
    """KL(a || b) per row; a token to which a gives (almost) nothing counts as 0."""
    said = log_a.exp() >= TINY
    log_a, log_b = torch.where(said, log_a, 0.0), torch.where(said, log_b, 0.0)
    return torch.where(said, log_a.exp() * (log_a - log_b), 0.0).sum(-1)


def definition(divergence, parameter, z_s, z_t):
    log_p, log_q = z_s.log_softmax(-1), z_t.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if divergence == "reverse_kl":
        return kl(log_p, log_q)
    if divergence == "forward_kl":
        return kl(log_q, log_p)
    if divergence == "jsd":
        log_m = ((1 - parameter) * p + parameter * q).clamp(min=1e-300).log()
        return parameter * kl(log_q, log_m) + (1 - parameter) * kl(log_p, log_m)
    if divergence == "skew_reverse_kl":
        return kl(log_p, (parameter * p + (1 - parameter) * q).clamp(min=1e-300).log())
    return kl(log_q, (parameter * q + (1 - parameter) * p).clamp(min=1e-300).log())


def logits(z, bias, scale, softcap, temperature):
    z = z.double() if bias is None else z.double() + bias.double()
    z = z * scale
    return (z if softcap is None else torch.tanh(z / softcap) * softcap) / temperature


def oracle(
    divergence, parameter, z_s, z_t, bias_s, bias_t, weights,
    *, scale_s, scale_t, softcap_s, softcap_t, temperature,
):  # fmt: skip
    """Statistics (5, n) and gradient (n, V) in float64; infinite rows have gradient 0."""
    leaf = z_s.double().clone().requires_grad_()
    student = logits(leaf, bias_s, scale_s, softcap_s, temperature)
    teacher = logits(z_t, bias_t, scale_t, softcap_t, temperature)
    value = definition(divergence, parameter, student, teacher)
    (value * weights.double()).sum().backward()
    gradient = leaf.grad.masked_fill((value == INF).unsqueeze(-1), 0.0)
    log_p = student.detach().log_softmax(-1)
    entropy = -torch.where(log_p > -700, log_p.exp() * log_p, 0.0).sum(-1)
    agreement = student.argmax(-1) == teacher.argmax(-1)
    lse_s, lse_t = student.detach().logsumexp(-1), teacher.logsumexp(-1)
    return torch.stack([value.detach(), entropy, lse_s, lse_t, agreement.double()]), gradient


def run(rows, case, z_s, z_t, bias_s=None, bias_t=None, weights=None, gradient=True, all_statistics=True, **options):
    """Statistics and gradient (or None) from copies of the inputs."""
    divergence, parameter = case
    n = len(z_s)
    weights = torch.ones(n) if weights is None else weights
    arguments = [None if x is None else x.clone().to(DEVICE, z_s.dtype) for x in (z_s, z_t, bias_s, bias_t, weights)]
    statistics = torch.zeros(5, n, dtype=z_s.dtype, device=DEVICE)
    g = torch.full(z_s.shape, 7.0, dtype=z_s.dtype, device=DEVICE) if gradient else None
    rows(
        *arguments, statistics, g, divergence=divergence, parameter=parameter, all_statistics=all_statistics,
        **{**PLAIN, **options},
    )  # fmt: skip
    return statistics.cpu(), None if g is None else g.cpu()


def inputs(n, columns, spread=0.3, offset=0.0):
    g = torch.Generator().manual_seed(columns)
    z_s = torch.randn(n, columns, generator=g) * 3
    z_t = z_s + spread * torch.randn(n, columns, generator=g) + offset
    biases = torch.randn(2, columns, generator=g)
    return z_s, z_t, *biases, torch.rand(n, generator=g) + 0.1


def error(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm())


def check(rows, case, z_s, z_t, bias_s=None, bias_t=None, weights=None, tolerance=2e-5, **options):
    weights = torch.ones(len(z_s)) if weights is None else weights
    statistics, g = run(rows, case, z_s, z_t, bias_s, bias_t, weights, **options)
    exact_statistics, exact_g = oracle(*case, z_s, z_t, bias_s, bias_t, weights, **{**PLAIN, **options})
    torch.testing.assert_close(statistics, exact_statistics.float(), rtol=1e-4, atol=1e-6)
    assert error(g, exact_g) < tolerance
    return statistics, g


@pytest.mark.parametrize("case", CASES, ids=str)
def test_statistics_and_gradient_from_far_apart_to_almost_equal(case, rows):
    """KL around 1, 1e-4 and 1e-6: float32 keeps the digits of each, also where all logits are large."""
    z_s, z_t, _, _, weights = inputs(3, 1030, torch.tensor([[1.0], [0.01], [0.001]]), offset=3.0)
    z_s, z_t = z_s + 40.0, z_t + 40.0
    statistics, g = run(rows, case, z_s, z_t, weights=weights)
    exact_statistics, exact_g = oracle(*case, z_s, z_t, None, None, weights, **PLAIN)
    torch.testing.assert_close(statistics[1:], exact_statistics[1:].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics[0], exact_statistics[0].float(), rtol=1e-3, atol=1e-10)
    for row, tolerance in enumerate((1e-5, 2e-4, 1e-3)):
        assert error(g[row], exact_g[row]) < tolerance
    assert (statistics[0] >= 0).all()


@pytest.mark.parametrize("case", FEW, ids=str)
def test_how_often_a_row_is_split_changes_nothing_but_rounding(case):
    pytest.importorskip("triton")
    z_s, z_t, _, _, weights = inputs(1, 1541)
    statistics, g = check(triton_rows(splits=1), case, z_s, z_t, weights=weights)
    split_statistics, split_g = run(triton_rows(splits=3), case, z_s, z_t, weights=weights)
    torch.testing.assert_close(split_statistics, statistics, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(split_g, g, rtol=1e-4, atol=1e-9)


def test_of_equally_likely_tokens_the_first_is_the_top_one(rows):
    z_s, z_t, *_ = inputs(2, 1030)
    z_s[:, [5, 900]] = 20.0
    z_t[0, 5] = z_t[1, 900] = 20.0
    statistics, _ = run(rows, CASES[0], z_s, z_t)
    assert statistics[4].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("columns", [1, 511, 512, 513])
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_every_remainder_of_the_block(case, columns, rows):
    z_s, z_t, _, _, weights = inputs(1, columns)
    statistics, g = run(rows, case, z_s, z_t, weights=weights)
    exact_statistics, exact_g = oracle(*case, z_s, z_t, None, None, weights, **PLAIN)
    torch.testing.assert_close(statistics, exact_statistics.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(g, exact_g.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_transforms_of_either_side(case, rows):
    z_s, z_t, bias_s, bias_t, weights = inputs(1, 520)
    options = {"scale_s": 0.5, "scale_t": 1.5, "temperature": 0.7}
    check(rows, case, z_s, z_t, bias_s, None, weights, softcap_s=4.0, softcap_t=None, **options)
    check(rows, case, z_s, z_t, None, bias_t, weights, softcap_s=None, softcap_t=7.0, **options)


def test_float64_is_exact():
    z_s, z_t, bias_s, bias_t, weights = (x.double() for x in inputs(5, 700))
    options = {"scale_s": 0.5, "scale_t": 1.5, "softcap_s": 4.0, "softcap_t": 7.0, "temperature": 0.7}
    for case in CASES:
        statistics, g = run(torch_rows, case, z_s, z_t, bias_s, bias_t, weights, **options)
        exact_statistics, exact_g = oracle(*case, z_s, z_t, bias_s, bias_t, weights, **options)
        torch.testing.assert_close(statistics, exact_statistics, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(g, exact_g, rtol=1e-9, atol=1e-15)


def test_blocks_of_rows_change_nothing():
    z_s, z_t, _, _, weights = inputs(7, 300)
    for case in FEW:
        whole, blocks = (
            run(torch_rows, case, z_s, z_t, weights=weights, softcap_s=5.0, scratch=torch.empty(4, block, 300))
            for block in (7, 2)
        )
        for a, b in zip(whole, blocks, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_far_apart(case, rows):
    """l of +-200: exponentials overflow or vanish, the value stays finite and right."""
    z_s, z_t, _, _, weights = inputs(4, 520)
    z_s[0, 5] += 200.0
    z_t[1, 515] += 200.0
    z_s[2, 7] -= 200.0
    z_t[3, 9] -= 200.0
    z_s[2, 8] = -1e4
    z_t[3, 8] = -1e4
    statistics, g = check(rows, case, z_s, z_t, weights=weights)
    assert statistics.isfinite().all() and g.isfinite().all()


@pytest.mark.parametrize("case", FEW, ids=str)
def test_forbidden_tokens(case, rows):
    """Rows: only the teacher forbids; only the student; both the same token; neither; the teacher forbids a token to
    which the student gives less than the smallest normal number, and the other way round."""
    z_s, z_t, _, _, weights = inputs(6, 520)
    z_t[0, 3] = z_s[1, 515] = -INF
    z_s[2, 200:220] = z_t[2, 200:220] = -INF
    z_s[4, 4], z_t[4, 4] = -200.0, -INF
    z_s[5, 4], z_t[5, 4] = -INF, -200.0
    statistics, g = check(rows, case, z_s, z_t, weights=weights)
    infinite = {"reverse_kl": 0, "forward_kl": 1}.get(case[0])
    for row in range(6):
        assert (float(statistics[0, row]) == INF) == (row == infinite)
        assert bool(g[row].any()) != (row == infinite)
    assert not statistics.isnan().any() and not g[2, 200:220].any()


@pytest.mark.parametrize("case", FEW, ids=str)
def test_lowest_finite_number_on_both_sides_is_as_good_as_forbidden(case, rows):
    z_s, z_t, _, _, weights = inputs(1, 1030)
    z_s[:, 500:] = z_t[:, 500:] = torch.finfo(torch.float32).min
    check(rows, case, z_s, z_t, weights=weights)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_nan_stays_in_its_row(case, rows):
    z_s, z_t, _, _, weights = inputs(4, 520)
    z_t[0, 7] -= 300.0
    z_s[3, 8] -= 300.0
    exact_statistics, exact_g = oracle(*case, z_s, z_t, None, None, weights, **PLAIN)
    z_s[1, 519] = z_t[2, 0] = float("nan")
    statistics, g = run(rows, case, z_s, z_t, weights=weights)
    assert statistics[0, 1:3].isnan().all() and g[1:3].isnan().any(1).all()
    for row in (0, 3):
        torch.testing.assert_close(statistics[:, row], exact_statistics[:, row].float(), rtol=1e-4, atol=1e-6)
        assert error(g[row], exact_g[row]) < 2e-5


@pytest.mark.parametrize("case", FEW, ids=str)
def test_in_place_without_gradient_and_without_statistics(case, rows):
    z_s, z_t, _, _, weights = inputs(2, 520)
    statistics, g = run(rows, case, z_s, z_t, weights=weights)
    value_only, none = run(rows, case, z_s, z_t, weights=weights, gradient=False, all_statistics=False)
    assert none is None and not value_only[1:].any()
    torch.testing.assert_close(value_only[0], statistics[0], rtol=1e-6, atol=0)
    in_place, other = z_s.clone().to(DEVICE), z_t.clone().to(DEVICE)
    again = torch.zeros(5, 2, device=DEVICE)
    rows(
        in_place, other, None, None, weights.to(DEVICE), again, in_place, divergence=case[0], parameter=case[1],
        all_statistics=True, **PLAIN,
    )  # fmt: skip
    assert torch.equal(in_place.cpu(), g) and torch.equal(again.cpu(), statistics)
    if rows is not torch_rows:
        assert torch.equal(other.cpu(), z_t)


def test_a_gradient_of_another_dtype_and_its_neighbours_in_memory(rows):
    z_s, z_t, _, _, weights = inputs(2, 700)
    _, exact = oracle(*CASES[2], z_s, z_t, None, None, weights, **PLAIN)
    # bf16 stores truncate in Triton's interpreter; fp16 rounds
    buffer = torch.full((2, 704), 9.0, device=DEVICE, dtype=torch.float16)
    arguments = [x.to(DEVICE) for x in (z_s.clone(), z_t.clone(), weights)]
    rows(
        *arguments[:2], None, None, arguments[2], torch.zeros(5, 2, device=DEVICE), buffer[:, :700],
        divergence="jsd", parameter=0.5, all_statistics=False, **PLAIN,
    )  # fmt: skip
    assert (buffer[:, 700:] == 9).all() and error(buffer[:, :700].cpu(), exact) < 2e-3


class Ranks:
    """Threads that stand for the ranks of a process group; gather stacks what each brings, in rank order."""

    def __init__(self, world):
        self.barrier = threading.Barrier(world, timeout=60)
        self.brought = [None] * world
        self.calls = [0] * world

    def gather(self, rank):
        def gathered(planes):
            self.calls[rank] += 1
            self.brought[rank] = planes.clone()
            self.barrier.wait()
            together = torch.stack(self.brought)
            self.barrier.wait()
            return together

        return gathered


def sharded(rows, case, z_s, z_t, bias_s, weights, bounds, **options):
    """What each rank of a head cut at `bounds` computes, and how often each gathered."""
    world = len(bounds) - 1
    ranks, results, failures = Ranks(world), [None] * world, []

    def work(rank):
        piece = slice(bounds[rank], bounds[rank + 1])
        try:
            results[rank] = run(
                rows, case, z_s[:, piece], z_t[:, piece], None if bias_s is None else bias_s[piece], None, weights,
                gather=ranks.gather(rank), first_column=bounds[rank], **options,
            )  # fmt: skip
        except BaseException as problem:  # a rank that fails must not leave the others waiting
            failures.append(problem)
            ranks.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results, ranks.calls


SLICES = [(0, 650, 1101), (0, 1, 520, 1101)]


@pytest.mark.parametrize(("case", "bounds"), zip(FEW, itertools.cycle(SLICES)), ids=str)
@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_slices_of_the_vocabulary_are_as_good_as_all_of_it(case, bounds, kind, monkeypatch):
    """Row 0 is finite, its top tokens are each the first of a slice; in rows 1 and 2 one side forbids a token of the
    last slice; in row 3 the first slice's tokens do not exist."""
    rows = torch_rows
    if kind == "triton":
        pytest.importorskip("triton")
        rows = triton_rows(2)
    z_s, z_t, bias_s, _, weights = inputs(4, 1101, 0.5)
    z_s[0, 0] = z_t[0, bounds[1]] = 20.0
    z_t[1, 1050] = z_s[2, 1060] = -INF
    z_s[3, : bounds[1]] = z_t[3, : bounds[1]] = -INF
    options = {"temperature": 0.9, "scale_s": 0.8}
    if kind == "triton":
        # Triton's interpreter runs one program at a time in one thread: the ranks take turns between gathers.
        lock = threading.Lock()
        monkeypatch.setattr(Ranks, "gather", _unlocked(Ranks.gather, lock))
        rows = _locked(rows, lock)
    results, calls = sharded(rows, case, z_s, z_t, bias_s, weights, bounds, **options)
    exact_statistics, exact_g = oracle(*case, z_s, z_t, bias_s, None, weights, **{**PLAIN, **options})
    for statistics, _ in results:
        assert torch.equal(statistics, results[0][0])
        torch.testing.assert_close(statistics, exact_statistics.float(), rtol=1e-4, atol=1e-6)
    assert error(torch.cat([g for _, g in results], 1), exact_g) < 2e-5
    assert calls == [2] * len(calls)


def _locked(rows, lock):
    def taking_turns(*arguments, **options):
        with lock:
            rows(*arguments, **options)

    return taking_turns


def _unlocked(gather, lock):
    def make(self, rank):
        gathered = gather(self, rank)

        def meanwhile(planes):
            lock.release()
            try:
                return gathered(planes)
            finally:
                lock.acquire()

        return meanwhile

    return make


def test_few_rows_are_split_and_many_are_not():
    pytest.importorskip("triton")
    from opcd_fast.kernels.triton.divergences import PROGRAMS, split_blocks

    for rows, columns in itertools.product((1, 5, 100, 255, 256, 10_000), (1, 2048, 5000, 151_936)):
        splits, blocks = split_blocks(rows, columns, 2048)
        whole = columns // 2048
        assert (splits - 1) * blocks < max(whole, 1) <= splits * blocks  # all blocks, and none of the splits empty
        assert splits == 1 or rows * (splits - 1) < PROGRAMS
    assert split_blocks(1, 151_936, 2048)[0] == 74 and split_blocks(64, 151_936, 2048)[0] == 4


@pytest.mark.parametrize(
    ("case", "words"),
    [(("kl", 0.0), "'kl'"), (("jsd", 0.0), "parameter is 0.0"), (("skew_reverse_kl", 1.0), "parameter is 1.0")],
)
def test_what_the_rows_cannot_do_is_refused(case, words, rows):
    z_s, z_t, *_ = inputs(1, 8)
    with pytest.raises(ValueError, match=words):
        run(rows, case, z_s, z_t)


def test_a_divergence_added_to_the_table_alone_is_not_another_one(rows, monkeypatch):
    more = (*specification.DIVERGENCES, "hellinger")
    monkeypatch.setattr(specification, "DIVERGENCES", more)
    if rows is not torch_rows:
        from opcd_fast.kernels.triton import divergences as triton_divergence_rows

        monkeypatch.setattr(triton_divergence_rows, "DIVERGENCES", more)
    z_s, z_t, *_ = inputs(2, 8)
    with pytest.raises(Exception, match="unknown divergence"):
        run(rows, ("hellinger", 0.5), z_s, z_t)


def test_no_rows(rows):
    for case in FEW:
        statistics, g = run(rows, case, torch.empty(0, 8), torch.empty(0, 8))
        assert statistics.shape == (5, 0) and g.shape == (0, 8)
