"""Every call of ours that no device has made yet, once, against float64. What fails here explains what fails later."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import launches
from benchmarks.gpu.launches import GRADIENT_ERROR, VALUE_ERROR, Launch, relative
from benchmarks.gpu.session import Session, Skip, Values, Wrong, error_row
from benchmarks.phase_rows import value
from opcd_fast.attention.sdpa import sdpa_without_cudnn
from opcd_fast.loss.chunks.products import scale_into
from opcd_fast.loss.chunks.workspace import pitch_of

OTHERS = ("forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl")
ATTENTION_ERROR = 6e-3  # bf16 rounds twice
PRODUCT_ERROR = 1e-4  # float32 sums of products of bf16 numbers


def run(session: Session) -> None:
    # N no multiple of 128, V none of 8.
    n, v, d = (5, 1003, 64) if session.dry else (259, 32_003, 256)
    _products(session, n, v, d)
    _kernels(session, n, v)
    _attention(session)
    session.row("loss in a CUDA graph", lambda: _graph(session, n, v, d), shape={"N": n, "V": v, "D": d})
    session.row("decoding, ragged prompts", lambda: _loop(session), settings={"model": "tiny Llama"})
    session.row("a training step", lambda: _step(session), settings={"model": "tiny Llama"})
    session.row("flex attention", lambda: _phase_1(session, "prefix_flex", 3.0), needs=30, settings={"softcap": 3.0})


# --- products: cuBLAS with another output type, into rows with a pitch --------------------------------------


def _products(session: Session, n: int, v: int, d: int) -> None:
    device, shape = session.device, {"N": n, "V": v, "D": d}

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator(device).manual_seed(0)
        h, w = (torch.randn(rows, d, generator=g, device=device).bfloat16() for rows in (n, v))
        grad = torch.randn(n, pitch_of(v), generator=g, device=device).bfloat16()[:, :v]
        return h, w, grad

    def logits() -> Values:
        session.on_device("mm with out_dtype")
        h, w, _ = inputs()
        z = torch.full((n, pitch_of(v)), float("nan"), device=device)[:, :v]
        torch.mm(h, w.t(), out_dtype=torch.float32, out=z)
        return error_row(relative(z, h.double() @ w.double().t()), PRODUCT_ERROR)

    def hidden() -> Values:
        session.on_device("mm with out_dtype")
        _, w, grad = inputs()
        found = torch.mm(grad, w, out_dtype=torch.float32)
        return error_row(relative(found, grad.double() @ w.double()), PRODUCT_ERROR)

    def weight(beta: float) -> Values:
        session.on_device("addmm with out_dtype")
        h, _, grad = inputs()
        exact = 0.5 * grad.double().t() @ h.double() + beta
        dw = torch.full((v, d), 1.0 if beta else float("nan"), device=device)  # beta 0: nothing is read
        torch.addmm(dw, grad.t(), h, beta=beta, alpha=0.5, out_dtype=torch.float32, out=dw)
        return error_row(relative(dw, exact), PRODUCT_ERROR)

    def scaled() -> Values:
        """As backward does it."""
        _, w, _ = inputs()
        exact = w.double() / 3
        out = scale_into(w, torch.tensor(1 / 3, device=device), w)
        return error_row(relative(out, exact), 2**-8)

    session.row("mm, float32 logits with a pitch", logits, shape=shape)
    session.row("mm, float32 dH", hidden, shape=shape)
    session.row("addmm, dW afresh", partial(weight, 0.0), shape=shape)
    session.row("addmm, dW added", partial(weight, 1.0), shape=shape)
    session.row("dW scaled where it lies", scaled, shape=shape)


# --- the Triton kernels -------------------------------------------------------------------------------------


def _kernels(session: Session, n: int, v: int) -> None:
    device = session.device
    few = min(n, 40)
    heads, width = (3, 16) if session.dry else (12, 128)
    rows: list[tuple[str, Callable[[], Launch], dict[str, int]]] = [
        ("reverse KL", lambda: launches.reverse_kl(device, n, v), {"n": n, "V": v}),
        ("reverse KL, softcap and bias", lambda: launches.reverse_kl(device, few, v, 5.0), {"n": few, "V": v}),
        ("reverse KL, split rows", lambda: launches.divergence(device, few, v, "reverse_kl"), {"n": few, "V": v}),
        *((name.replace("_", " "), partial(launches.divergence, device, few, v, name), {"n": few, "V": v})
          for name in OTHERS),
        ("logprob", lambda: launches.logprob(device, n, v), {"n": n, "V": v}),
        ("merge", lambda: launches.merge(device, n, heads, width), {"n": n, "heads": heads, "width": width}),
    ]  # fmt: skip
    for name, build, shape in rows:
        session.row(f"kernel: {name}", partial(_kernel, build), shape=shape)


def _kernel(build: Callable[[], Launch]) -> Values:
    launch = build()
    launch.call()
    rounded, exact = launch.error()
    values = {"gradient": value(rounded, "1"), "value": value(exact, "1")}
    if not (rounded <= GRADIENT_ERROR and exact <= VALUE_ERROR):
        raise Wrong(f"errors {rounded:.1e} and {exact:.1e}; at most {GRADIENT_ERROR} and {VALUE_ERROR}", values)
    return values


# --- attention ----------------------------------------------------------------------------------------------


def _attention(session: Session) -> None:
    for name in ("prefix_flash", "prefix_efficient"):
        session.row(f"attention: {name}", partial(_phase_1, session, name), settings={"part": "phase 1"})
    for window in (None, 40):
        session.row(f"attention: varlen, window {window}", partial(_varlen, session, window))
    session.row("attention: padded rows", lambda: _grid(session))
    for masked in (False, True):
        session.row(f"attention: decoding, {'mask' if masked else 'no mask'}", partial(_decoding, session, masked))


def _qkv(session: Session, n: int, m: int, d: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(n + m)
    shapes = ((1, 8, n, d), (1, 2, m, d), (1, 2, m, d))
    return [torch.randn(shape, generator=g).to(session.device, torch.bfloat16) for shape in shapes]


def _phase_1(session: Session, name: str, softcap: float | None = None) -> Values:
    from opcd_fast.attention import kernels as attention_kernels
    from opcd_fast.attention.blocked import blocked_attention

    session.on_device(name)
    kernel = getattr(attention_kernels, name)
    worst = 0.0, 0.0
    for n, m, d in ((200, 513, 128), (1, 1000, 128), (65, 2, 64)):
        q, k, v = _qkv(session, n, m, d)
        out, lse = kernel(q, k, v, d**-0.5, softcap)
        exact, exact_lse = blocked_attention(q.double(), k.double(), v.double(), d**-0.5, softcap=softcap)
        worst = _worse(worst, out, lse, exact, exact_lse)
    return _judged(*worst)


def _varlen(session: Session, window: int | None) -> Values:
    from opcd_fast.attention import kernels as attention_kernels
    from opcd_fast.attention.blocked import blocked_attention

    session.on_device("varlen_attn")
    if not attention_kernels.varlen_ready():
        raise Skip("this torch's varlen_attn takes no windows")
    sizes = [(5, 120), (1, 1), (64, 64), (33, 700)]
    queries, keys = zip(*sizes, strict=True)
    q, k, v = _qkv(session, sum(queries), sum(keys), 128)
    cu_q, cu_k = (torch.tensor([0, *x], device=session.device).cumsum(0, dtype=torch.int32) for x in (queries, keys))
    bounds = attention_kernels.Bounds(cu_q, cu_k, max(queries), max(keys))
    out, lse = attention_kernels.varlen_torch(q, k, v, bounds, 0.1, None, window, True)
    if lse is None:
        raise RuntimeError("no logsumexp came back")
    pieces = zip(q.split(queries, 2), k.split(keys, 2), v.split(keys, 2), strict=True)
    exact = [
        blocked_attention(a.double(), b.double(), c.double(), 0.1, causal=True, window=window) for a, b, c in pieces
    ]
    return _judged(*_worse((0.0, 0.0), out, lse, torch.cat([x for x, _ in exact]), torch.cat([x for _, x in exact])))


def _grid(session: Session) -> Values:
    """Sequences padded to a grid, as where there is no varlen kernel."""
    from opcd_fast.attention import kernels as attention_kernels
    from opcd_fast.attention.rows import packed_row

    row = packed_row(torch.tensor([0, 5, 5, 69, 102]), 102, session.device)
    q, k, v = _qkv(session, 102, 102, 64)
    out, lse = attention_kernels.row_on_grid(q, k, v, row, 0.125, None, 0.0, True)
    exact = attention_kernels.row_blocked(q.double(), k.double(), v.double(), row, 0.125, None, 0.0, True)
    return _judged(*_worse((0.0, 0.0), out, lse, *exact))


def _decoding(session: Session, masked: bool) -> Values:
    """One query a head over growing keys, as decoding.py calls it: two query heads folded into their key head."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(session.device, torch.bfloat16)  # noqa: E731
    worst = 0.0
    for keys in (64, 65, 200):
        q, k, v = draw(4, 2, 2, 64), draw(4, 2, keys, 64), draw(4, 2, keys, 64)
        mask = torch.zeros(4, 1, 1, keys, device=session.device, dtype=torch.bfloat16) if masked else None
        if mask is not None:
            mask[1:, ..., : keys // 3] = float("-inf")
        with sdpa_without_cudnn():
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.125)
        scores = q.double() @ k.double().transpose(-1, -2) * 0.125
        exact = (scores if mask is None else scores + mask.double()).softmax(-1) @ v.double()
        worst = max(worst, relative(out, exact))
    return error_row(worst, ATTENTION_ERROR)


def _loop(session: Session) -> Values:
    """The decoding loop, its masked prefill with shared heads included, against plain forward passes."""
    from benchmarks.step_cases import SHAPES, random_model
    from opcd_fast.rollout.check import check_decoding
    from opcd_fast.rollout.decoding import decode

    model = random_model(SHAPES["tiny Llama"], torch.bfloat16, session.device)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 200, (length,), generator=draw).tolist() for length in (9, 3, 40, 17)]
    uniform = torch.zeros(len(prompts), 5, dtype=torch.float64)
    loop = lambda: decode(model, prompts, uniform, stop_token_ids=[-1], temperature=0.0, top_p=1.0)  # noqa: E731
    good, figures = check_decoding(model, loop, prompts)
    if not good:
        raise Wrong(f"log-probabilities differ by {figures}", {})
    return {"answers": value(len(prompts), "1")}


def _worse(
    worst: tuple[float, float], out: Tensor, lse: Tensor, exact: Tensor, exact_lse: Tensor
) -> tuple[float, float]:
    if out.shape != exact.shape or lse.shape != exact_lse.shape:
        raise RuntimeError(f"shapes {tuple(out.shape)} and {tuple(lse.shape)}; expected "
                           f"{tuple(exact.shape)} and {tuple(exact_lse.shape)}")  # fmt: skip
    return max(worst[0], relative(out, exact)), max(worst[1], float((lse.double() - exact_lse).abs().max()))


def _judged(out: float, lse: float) -> Values:
    values = {"out": value(out, "1"), "lse": value(lse, "nats")}
    if not (out <= ATTENTION_ERROR and lse <= 2e-3):
        raise Wrong(f"errors {out:.1e} and {lse:.1e}; at most {ATTENTION_ERROR} and 2e-3", values)
    return values


# --- whole calls --------------------------------------------------------------------------------------------


def _graph(session: Session, n: int, v: int, d: int) -> Values:
    """Captured once, replayed on other inputs."""
    from opcd_fast.loss import fused_linear_reverse_kl

    session.on_device("a CUDA graph")
    g = torch.Generator(session.device).manual_seed(0)
    h = torch.randn(n, d, generator=g, device=session.device).bfloat16()
    w = (torch.randn(v, d, generator=g, device=session.device) / d**0.5).bfloat16()
    h_t = (h.float() + 0.1 * torch.randn(n, d, generator=g, device=session.device)).bfloat16()
    weights = torch.ones(n, device=session.device)

    def call() -> tuple[Tensor, Tensor]:
        leaf = h.detach().requires_grad_()
        loss = fused_linear_reverse_kl(leaf, w, h_t, w, token_weights=weights)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = call()
    weights[5:9] = 0
    h[20] *= 1.5
    graph.replay()
    torch.cuda.synchronize()
    wanted_loss, wanted = call()
    difference = abs(float(loss) - float(wanted_loss)) / float(wanted_loss)
    return error_row(max(difference, relative(gradient, wanted.double())), 1e-3, "difference from a plain call")


def _step(session: Session) -> Values:
    """The whole trainer on a tiny model."""
    from benchmarks.step_cases import cases, make_job
    from benchmarks.step_worker import opcd

    case = cases(session.device, quick=True)[0]
    with tempfile.TemporaryDirectory() as folder:
        run_steps, _ = opcd(case, make_job(case, session.device), Path(folder), steps=2)
        ended, tokens, _parts = run_steps()
    return {"step": value(1e3 * (ended[1] - ended[0]), "ms"), "tokens": value(tokens[-1], "1")}
