"""How the loss cuts its workspace on a device that is not here: whole waves, bounded bytes, sizes without N."""

import random
import re
from pathlib import Path

import pytest
import torch

from opcd_fast.loss.chunks import Side, Spec, Wanted, make_plan, pitch_of
from opcd_fast.loss.chunks.workspace import (
    DEFAULT_DEVICE_WORKSPACE,
    DEFAULT_WORKSPACE,
    MULTIPROCESSORS,
    output_tiles,
    wave_fill,
)
from opcd_fast.loss.scratch import Shape as Seen

FROZEN, TRAINED, NOTHING = Wanted(True, False, False), Wanted(True, True, False), Wanted(False, False, False)


def plan_of(rows, v, width, wanted, *, multiprocessors=132, bytes_=None, backend="triton", dtype=torch.bfloat16):
    side = Side(Seen((rows, width), dtype, True, 1), Seen((v, width), dtype, True, 2))
    spec = Spec(v, bytes_, backend)
    return make_plan(rows, [side, side], v, spec, wanted, 0, multiprocessors)


def held(plan, v, width, wanted, size):
    """Bytes of the buffers, of the hidden states that are copied, and of dH before and after its rounding."""
    logits = plan.logit_rows * (2 * pitch_of(v) * 4 + width * size)
    gradient = plan.gradient_rows * (pitch_of(v) * size + width * (size + 4 + size))
    return logits + (gradient if any(wanted) else plan.gradient_rows * width * size)


def fill(plan, width, multiprocessors):
    return wave_fill(output_tiles(plan.gradient_rows, width), multiprocessors)


@pytest.mark.parametrize("wanted", [FROZEN, TRAINED])
@pytest.mark.parametrize("width", [1024, 1536, 2048, 2304, 2560, 3072, 3584, 4096])
@pytest.mark.parametrize("v", [32_000, 151_936, 256_000])
def test_the_default_fills_the_multiprocessors(v, width, wanted):
    for multiprocessors in (MULTIPROCESSORS[capability] for capability in ((8, 0), (8, 9), (9, 0), (10, 0))):
        plan = plan_of(16_384, v, width, wanted, multiprocessors=multiprocessors)
        assert fill(plan, width, multiprocessors) >= 0.9, plan
        assert plan.logit_rows >= 256 and plan.logit_rows % 128 == plan.gradient_rows % 128 == 0
        assert held(plan, v, width, wanted, 2) <= DEFAULT_DEVICE_WORKSPACE
    # Without a gradient nothing has to be collected.
    assert held(plan_of(16_384, v, width, NOTHING), v, width, NOTHING, 2) <= DEFAULT_WORKSPACE


def test_the_buffers_stay_in_the_workspace_whatever_the_shapes():
    numbers = random.Random(0)
    for _ in range(3000):
        v, width = numbers.randrange(1, 300_000), numbers.randrange(1, 9000)
        rows, multiprocessors = numbers.randrange(1, 70_000), numbers.randrange(1, 300)
        wanted = Wanted(*(numbers.random() < 0.5 for _ in range(3)))
        dtype = numbers.choice((torch.bfloat16, torch.float32))
        size = dtype.itemsize
        row = 2 * pitch_of(v) * 4 + pitch_of(v) * size + 16 * width
        bytes_ = row * int(10 ** numbers.uniform(0, 4))
        plan = plan_of(rows, v, width, wanted, multiprocessors=multiprocessors, bytes_=bytes_, dtype=dtype)
        assert held(plan, v, width, wanted, size) <= bytes_, (plan, v, width, wanted, bytes_)
        assert 1 <= plan.logit_rows <= plan.gradient_rows


@pytest.mark.parametrize("wanted", [FROZEN, TRAINED, NOTHING])
@pytest.mark.parametrize("bytes_", [None, 1 << 29, 1 << 26])
def test_two_numbers_of_rows_make_the_same_buffers(bytes_, wanted):
    sizes = {plan_of(rows, 151_936, 2048, wanted, bytes_=bytes_)[:2] for rows in (8192, 9001, 65_536)}
    assert len(sizes) == 1


def test_fewer_rows_than_a_chunk_take_one_of_few_sizes():
    plans = [plan_of(rows, 151_936, 1024, FROZEN) for rows in range(1, 5000, 7)]
    assert len({plan[:2] for plan in plans}) <= 7
    assert all(plan.gradient_rows >= min(rows, 4224) for plan, rows in zip(plans, range(1, 5000, 7), strict=True))
    assert plan_of(1, 151_936, 1024, FROZEN).gradient_rows == 128


def test_a_cpu_allocates_for_the_rows_there_are():
    side = Side(torch.randn(3, 8), torch.randn(701, 8))
    for backend in ("torch", "native"):
        plan = make_plan(3, [side, side], 701, Spec(701, backend=backend), TRAINED, 3, 132)
        assert plan.logit_rows == plan.gradient_rows == plan.block_rows == 3


def test_the_page_says_what_is_cut():
    """The table of docs/loss.md."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "loss.md").read_text()
    rows = re.findall(r"^\| ([\d,]+) \| ([\d,]+) \| (\D+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) >= 5
    for *sizes, heads, logit_rows, gradient_rows, gib in rows:
        v, width = (int(size.replace(",", "")) for size in sizes)
        for head in heads.split(" or "):
            wanted = {"frozen": FROZEN, "trained": TRAINED}[head]
            plan = plan_of(16_384, v, width, wanted)
            assert [f"{plan.logit_rows:,}", f"{plan.gradient_rows:,}"] == [logit_rows, gradient_rows]
            assert f"{held(plan, v, width, wanted, 2) / 2**30:.1f}" == gib
