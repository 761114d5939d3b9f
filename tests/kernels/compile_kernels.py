"""Compile the row kernels for chips that are not here and print what came out, one JSON object per line.

Run by test_compile.py in a process without TRITON_INTERPRET. Arguments: compute capabilities and names of kernels
(none: all of them); with `--all`, every row of the launch table and every variant, otherwise the widest row and each
kernel's default variants.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opcd_fast.kernels.reference.divergence_merge import NORMALISERS, TERMS
from opcd_fast.kernels.reference.divergences import DIVERGENCES
from opcd_fast.kernels.triton import divergences as triton_divergence_rows
from opcd_fast.kernels.triton import logprobs as triton_logprob_rows
from opcd_fast.kernels.triton import reverse_kl as reverse_kl_rows
from opcd_fast.kernels.triton.launch_shapes import current_table

POINTERS = {"g_ptr": "*bf16", "token_ptr": "*i64"}  # the others are float32
FLOATS = ("inner", "outer", "derivative", "parameter")
# What the launcher's pitch guarantees. n_columns is deliberately not divisible by 16.
ALIGNED = ("stride_s", "stride_t", "stride_z", "stride_g")
TWO_SIDES = ("HAS_BIAS_S", "HAS_BIAS_T", "SOFTCAP_S", "SOFTCAP_T")
PLAIN, TRANSFORMED = dict.fromkeys(TWO_SIDES, False), dict.fromkeys(TWO_SIDES, True)


class Kernel(NamedTuple):
    """A kernel, the constants of each variant, which of those are compiled by default, and how many of its loops
    read the logits."""

    function: object
    variants: dict
    default: tuple
    reading_loops: dict
    shapes: str  # whose launch shapes it has


def _reverse_kl() -> Kernel:
    flags = {**PLAIN, "ALL_STATISTICS": False, "WRITE_GRADIENT": True}
    variants = {
        "plain": flags,
        "statistics": {**flags, "ALL_STATISTICS": True},
        "loss_only": {**flags, "WRITE_GRADIENT": False},
        "everything": {**flags, **TRANSFORMED, "ALL_STATISTICS": True},
    }
    kernel = reverse_kl_rows._reverse_kl_rows_kernel
    return Kernel(kernel, variants, ("everything",), dict.fromkeys(variants, 2), "reverse_kl_rows")


def _normalisers() -> Kernel:
    variants = {}
    for index, planes in ((0, len(NORMALISERS)), (1, len(NORMALISERS)), (2, 4)):
        name = DIVERGENCES[index] if index < 2 else "mixtures"
        for suffix, flags in (("", PLAIN), ("_everything", TRANSFORMED)):
            variants[name + suffix] = {**flags, "DIVERGENCE": index, "PLANES": planes}
    kernel = triton_divergence_rows._normaliser_kernel
    return Kernel(kernel, variants, ("reverse_kl_everything",), dict.fromkeys(variants, 1), "divergence_rows")


def _terms() -> Kernel:
    variants = {}
    for (index, name), everything in itertools.product(enumerate(DIVERGENCES), (False, True)):
        flags = {
            **(TRANSFORMED if everything else PLAIN),
            "DIVERGENCE": index, "PLANES": len(TERMS), "WRITE_TERMS": True, "WRITE_MOMENT": False,
            "WRITE_GRADIENT": False, "ALL_STATISTICS": everything,
        }  # fmt: skip
        if index < 2:
            passes = {"": {"WRITE_GRADIENT": True}}
        else:
            gradient = {"WRITE_TERMS": False, "WRITE_GRADIENT": True, "ALL_STATISTICS": False}
            passes = {"_terms": {"WRITE_MOMENT": True}, "_gradient": gradient}
        for suffix, extra in {**passes, "_loss_only": {}}.items():
            variants[name + suffix + "_everything" * everything] = {**flags, **extra}
    kernel = triton_divergence_rows._terms_kernel
    return Kernel(kernel, variants, ("jsd_terms_everything",), dict.fromkeys(variants, 1), "divergence_rows")


def _logprob() -> Kernel:
    flags = {"HAS_BIAS": False, "SOFTCAP": False, "WRITE_GRADIENT": True}
    variants = {
        "plain": flags,
        "statistics": {**flags, "WRITE_GRADIENT": False},
        "everything": {"HAS_BIAS": True, "SOFTCAP": True, "WRITE_GRADIENT": True},
    }
    loops_of = {"plain": 2, "statistics": 1, "everything": 2}
    return Kernel(triton_logprob_rows._logprob_rows_kernel, variants, ("everything",), loops_of, "logprob_rows")


KERNELS = {"reverse_kl": _reverse_kl(), "normalisers": _normalisers(), "terms": _terms(), "logprob": _logprob()}


def source(function, constants: dict) -> ASTSource:
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*fp32")
        else:
            signature[name] = "fp32" if name.startswith(FLOATS) else "i32"
        if name.endswith("_ptr") or name in ALIGNED:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constants, attributes)


def tool(name: str, *arguments: str) -> str:
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(binary), *arguments], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def loops(sass: str) -> list[str]:
    """Instructions between the target and the source of each backward branch."""
    lines = [line for line in sass.splitlines() if line.strip()]
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\.L_x_\d+):", line))}
    bodies = []
    for i, line in enumerate(lines):
        match = re.search(r"\bBRA\b.*\(?(\.L_x_\d+)", line)
        if match and labels.get(match[1], i) < i - 3:
            bodies.append("\n".join(lines[labels[match[1]] : i]))
    return bodies


def report(capability: int, kernel: str, variant: str, block: int, warps: int) -> dict:
    entry = KERNELS[kernel]
    compiled = triton.compile(
        source(entry.function, {**entry.variants[variant], "BLOCK": block}),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    bodies = loops(sass)
    return {
        "capability": capability,
        "kernel": kernel,
        "variant": variant,
        "block": block,
        "warps": warps,
        **numbers,
        "sass": bool(sass),
        "expected_reading_loops": entry.reading_loops[variant],
        "wide_loads": [len(re.findall(r"LDG\.E\S*\.(?:128|256)", body)) for body in bodies],
        "loads": [len(re.findall(r"\bLDG\.", body)) for body in bodies],
        "synchronising": [len(re.findall(r"\b(?:BAR|SHFL)\.", body)) for body in bodies],
        "instructions": [len(body.splitlines()) for body in bodies],
    }


if __name__ == "__main__":
    everything = "--all" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--all"]
    chosen = [argument for argument in arguments if argument in KERNELS] or list(KERNELS)
    for capability, name in itertools.product((int(a) for a in arguments if a.isdecimal()), chosen):
        shapes = current_table().shapes[KERNELS[name].shapes]
        for _, block, warps in shapes if everything else shapes[-1:]:
            for variant in KERNELS[name].variants if everything else KERNELS[name].default:
                print(json.dumps(report(capability, name, variant, block, warps)), flush=True)
