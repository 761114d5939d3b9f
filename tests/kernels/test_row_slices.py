"""The row operations on slices of a vocabulary: threads stand for the ranks of a process group."""

import itertools
import threading

import pytest
import torch
from row_oracle import FEW, INF, error, implementation, inputs, oracle, run

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
SLICES = [(0, 650, 1101), (0, 1, 520, 1101)]


class Ranks:
    """gather stacks what each rank brings, in rank order. Triton's interpreter runs one program at a time in one
    thread, so the ranks take turns between gathers."""

    def __init__(self, world):
        self.barrier, self.turn = threading.Barrier(world, timeout=60), threading.Lock()
        self.brought, self.calls = [None] * world, [0] * world

    def gather(self, rank):
        def gathered(planes):
            self.calls[rank] += 1
            self.brought[rank] = planes.clone()
            self.turn.release()
            try:
                self.barrier.wait()
                together = torch.stack(self.brought)
                self.barrier.wait()
            finally:
                self.turn.acquire()
            return together

        return gathered


def sharded(rows, case, student, teacher, weights, bounds):
    """What each rank of a head cut at `bounds` computes, and how often each gathered."""
    world = len(bounds) - 1
    ranks, results, failures = Ranks(world), [None] * world, []

    def work(rank):
        piece = slice(bounds[rank], bounds[rank + 1])
        sides = (
            side._replace(z=side.z[:, piece], bias=None if side.bias is None else side.bias[piece])
            for side in (student, teacher)
        )
        try:
            with ranks.turn:
                options = {"gather": ranks.gather(rank), "first_column": bounds[rank]}
                results[rank] = run(rows, case, *sides, weights, **options)
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


@pytest.mark.parametrize(("case", "bounds"), zip(FEW, itertools.cycle(SLICES)), ids=str)
@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_slices_of_the_vocabulary_are_as_good_as_all_of_it(case, bounds, kind):
    """Row 0 is finite, its top tokens are each the first of a slice; in rows 1 and 2 one side forbids a token of the
    last slice; in row 3 the first slice's tokens do not exist."""
    student, teacher, weights = inputs(4, 1101, 0.5, temperature=0.9)
    bias = torch.randn(1101, generator=torch.Generator().manual_seed(1))
    student = student._replace(bias=bias, scale=0.8)
    student.z[0, 0] = teacher.z[0, bounds[1]] = 20.0
    teacher.z[1, 1050] = student.z[2, 1060] = -INF
    student.z[3, : bounds[1]] = teacher.z[3, : bounds[1]] = -INF
    results, calls = sharded(implementation(kind), case, student, teacher, weights, bounds)
    exact_statistics, exact_g = oracle(case, student, teacher, weights)
    for statistics, _ in results:
        assert torch.equal(statistics, results[0][0])
        torch.testing.assert_close(statistics, exact_statistics.float(), rtol=1e-4, atol=1e-6)
    assert error(torch.cat([g for _, g in results], 1), exact_g) < 1e-4
    assert calls == [2] * len(calls)
