"""The measurement behind docs/why-bf16-logits.md, on small states, and that the page says what was measured."""

import re
from pathlib import Path

import pytest
import torch
from loss_oracle import logits64, states, token_kl64

from benchmarks import bf16_logits, schema
from opcd_fast.loss import LMHead

ROOT = Path(__file__).resolve().parents[2]


def test_errors_of_each_format():
    h_s, weight, h_t = states(48, 32, 1501, 0.28)
    h_t = h_t.bfloat16()
    fractions = (1.0, 1e-2, 1e-3)
    found = bf16_logits.measure(h_s, h_t, weight, fractions)
    whole = float(token_kl64(*(logits64(h, LMHead(weight)) for h in (h_s, h_t))).mean())
    assert [kl for kl, _ in found] == pytest.approx([whole * f for f in fractions], rel=0.05)
    assert all(list(errors) == ["bf16-logits", "fp16-logits", "fp32-logits", "opcd_fast"] for _, errors in found)
    bf16, fp16, fp32, ours = zip(*(errors.values() for _, errors in found))
    assert bf16[0] > 5e-3 and bf16[1] > 5 * bf16[0] and bf16[2] > bf16[1]
    assert all(4 < b / f < 16 for b, f in zip(bf16, fp16))  # 8 mantissa bits against 11
    assert max(fp32) < 1e-3 and max(ours) < 3e-3


def test_states_are_those_that_predict_the_answer():
    pytest.importorskip("transformers")
    from tiny import tiny_model, tiny_tokenizer

    model = tiny_model(1)
    h_s, h_t = bf16_logits.states(model, tiny_tokenizer(), ["Why?", "Where is it?"], 5)
    assert h_s.shape == h_t.shape == (10, model.config.hidden_size)
    assert not torch.allclose(h_s, h_t)
    assert not torch.allclose(h_s[:5], h_s[5:])


def test_the_page_quotes_the_stored_result():
    page = (ROOT / "docs" / "why-bf16-logits.md").read_text(encoding="utf-8")
    (name,) = set(re.findall(r"bf16_logits_[\w.-]+\.jsonl", page))
    run = schema.read(ROOT / "benchmarks" / "results" / name)
    (head,) = run.heads.values()
    assert run.ends() and (ROOT / "docs" / "images" / "bf16_logits_cpu_error_kl.svg").is_file()
    quoted = [re.findall(r"[\d.]+(?:e-\d+)?", line) for line in page.splitlines() if re.match(r"\| \d", line)]
    wanted = [
        [f"{case[0].get('mean_kl'):.1e}".replace("e-0", "e-"), *(percent(row.get("dL/dh")) for row in case)]
        for case in schema.by_case(run.of("bf16_logits"))
    ]
    assert quoted == wanted
    for fact in (head.device.name, head.date[:10], head.versions["torch"], "python -m benchmarks bf16_logits"):
        assert fact in page, fact


def percent(error):
    """Two significant digits, in per cent."""
    return f"{float(f'{100 * error:.2g}'):.10g}"
