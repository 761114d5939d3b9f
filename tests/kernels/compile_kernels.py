"""Compile the kernels for chips that are not here and print what came out, one JSON object per line.

Run by test_compile.py in a process without TRITON_INTERPRET. Arguments: compute capabilities and names of kernels
(none: all of them); with `--all`, every variant at every launch shape and head size, otherwise each kernel's default.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opcd_fast.kernels.reference import DIVERGENCES, NORMALISERS, TERMS
from opcd_fast.kernels.triton import attention, divergences, logprobs, statistics, variation
from opcd_fast.kernels.triton.launch_shapes import current_table
from opcd_fast.kernels.triton.logits import MOST_REGISTERS

# The others are float32 (row kernels) or, of the merge's outputs, bf16.
POINTERS = {
    "g_ptr": "*bf16", "token_ptr": "*i64", "a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*bf16", "has_a_ptr": "*i8",
    "has_b_ptr": "*i8",
}  # fmt: skip
FLOATS = ("inner", "outer", "derivative", "parameter", "remainder")
# What launchers guarantee: the pitch of logits, whole heads. n_columns is deliberately not divisible by 16, logsumexps
# may lie any way.
ALIGNED = [*(f"stride_{x}" for x in "stzg"), *(f"stride_{x}_{y}" for x in ("a", "b", "out") for y in "nh")]
TWO_SIDES = ("HAS_BIAS_S", "HAS_BIAS_T", "SOFTCAP_S", "SOFTCAP_T")
PLAIN, TRANSFORMED = dict.fromkeys(TWO_SIDES, False), dict.fromkeys(TWO_SIDES, True)
# What lies in the teacher's place is another kernel; it has neither bias nor softcap.
SIDES = {
    "": {**PLAIN, "DIFFERENCE": False},
    "_difference": {**PLAIN, "DIFFERENCE": True},
    "_everything": {**TRANSFORMED, "DIFFERENCE": False},
}
KERNEL_ROWS = [row for row in DIVERGENCES.values() if row.code is not None]


def launch_shapes_of(name: str) -> list[tuple[dict, int]]:
    """(constants, warps) of a row kernel, the widest rows first."""
    return [({"BLOCK": block}, warps) for _, block, warps in reversed(current_table().shapes[name])]


class Kernel(NamedTuple):
    function: Any
    variants: dict[str, dict]  # constants
    default: tuple[str, ...]
    loops: Callable[[dict], int]  # how many of a variant's loops read the logits
    shapes: list[tuple[dict, int]]  # the default one first


def with_pieces(shapes: list[tuple[dict, int]]) -> list[tuple[dict, int]]:
    """Each shape where one program has seen a row, and where many have."""
    return [({**constants, "PIECES": pieces}, warps) for constants, warps in shapes for pieces in (1, 256)]


def planes_of(row: Any) -> int:
    return len(NORMALISERS) if row.infinite else 4


def _normalisers() -> Kernel:
    variants = {}
    for row, (suffix, flags) in itertools.product(KERNEL_ROWS, SIDES.items()):
        variants[row.name + suffix] = {**flags, "DIVERGENCE": row.code, "PLANES": planes_of(row)}
    shapes = launch_shapes_of("divergence_rows")
    default = ("gated_kl_everything", "gated_kl_difference")
    return Kernel(divergences._normaliser_kernel, variants, default, lambda _: 1, shapes)


def _variation() -> Kernel:
    shapes = with_pieces(launch_shapes_of("divergence_rows"))
    default = ("_everything", "_difference")
    variants = {name: {**flags, "PLANES": len(NORMALISERS)} for name, flags in SIDES.items()}
    return Kernel(variation._variation_kernel, variants, default, lambda _: 1, shapes)


def _terms() -> Kernel:
    variants = {}
    for row, (name, sides) in itertools.product(KERNEL_ROWS, SIDES.items()):
        flags = {
            **sides, "DIVERGENCE": row.code, "PLANES": planes_of(row), "TERMS": len(TERMS), "VARIATION": False,
            "WRITE_TERMS": True, "WRITE_MOMENT": False, "WRITE_GRADIENT": False, "ALL_STATISTICS": name != "",
        }  # fmt: skip
        passes = {"": {"WRITE_GRADIENT": True}}
        if not row.two_passes:
            gradient = {"WRITE_TERMS": False, "WRITE_GRADIENT": True, "ALL_STATISTICS": False}
            passes = {"_terms": {"WRITE_MOMENT": True}, "_gradient": gradient}
        for suffix, extra in {**passes, "_loss_only": {}}.items():
            variants[row.name + suffix + name] = {**flags, **extra}
    variants["gated_kl_variation"] = {**variants["gated_kl_everything"], "VARIATION": True}
    shapes = with_pieces(launch_shapes_of("divergence_rows"))
    default = ("jsd_terms_everything", "gated_kl_everything", "jsd_terms_difference", "gated_kl_difference")
    return Kernel(divergences._terms_kernel, variants, default, lambda _: 1, shapes)


def _statistics() -> Kernel:
    flags = {"TERMS": len(TERMS), "DIFFERENCE": True, "VARIATION": False, "ALL_STATISTICS": True}
    variants = {row.name: {**flags, "DIVERGENCE": row.code, "PLANES": planes_of(row)} for row in KERNEL_ROWS}
    variants["variation"] = {**variants["gated_kl"], "VARIATION": True}
    shapes = with_pieces([({}, 1)])
    return Kernel(statistics._statistics_kernel, variants, ("gated_kl",), lambda _: 0, shapes)


def _logprob() -> Kernel:
    flags = {"HAS_BIAS": False, "SOFTCAP": False, "WRITE_GRADIENT": True}
    variants = {
        "plain": flags,
        "statistics": {**flags, "WRITE_GRADIENT": False},
        "everything": {"HAS_BIAS": True, "SOFTCAP": True, "WRITE_GRADIENT": True},
    }
    shapes = launch_shapes_of("logprob_rows")
    loops = lambda constants: 1 + constants["WRITE_GRADIENT"]  # noqa: E731
    return Kernel(logprobs._logprob_rows_kernel, variants, ("everything",), loops, shapes)


def _merge() -> Kernel:
    plain = {"HAS_B": True, "HAS_SINK": False, "HAS_FLAG_A": False, "HAS_FLAG_B": False, "WRITE_LSE": False}
    variants = {
        "plain": plain,
        "sink": {**plain, "HAS_SINK": True},
        "sink_alone": {**plain, "HAS_SINK": True, "HAS_B": False},
        "everything": dict.fromkeys(plain, True),
    }
    shapes = []
    for width in (128, 64, 80, 256):
        pairs, block, warps = attention.launch_shape(width)
        shapes.append(({"HEADS": 32, "WIDTH": width, "PAIRS": pairs, "BLOCK": block}, warps))
    return Kernel(attention._merge_attention_kernel, variants, ("plain", "everything"), lambda _: 0, shapes)


KERNELS = {
    "normalisers": _normalisers(), "variation": _variation(), "terms": _terms(),
    "statistics": _statistics(), "logprob": _logprob(), "merge": _merge(),
}  # fmt: skip


def source(function, constants: dict) -> ASTSource:
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            half = constants.get("DIFFERENCE") and name in ("z_s_ptr", "z_t_ptr")
            signature[name] = "*fp16" if half else POINTERS.get(name, "*fp32")
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


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def report(capability: int, kernel: str, variant: str, shape: tuple[dict, int]) -> dict:
    entry = KERNELS[kernel]
    constants, warps = {**entry.variants[variant], **shape[0]}, shape[1]
    registers = MOST_REGISTERS if kernel == "terms" else None
    compiled = triton.compile(
        source(entry.function, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": True, "maxnreg": registers},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    bodies = loops(sass)
    return {
        "capability": capability, "kernel": kernel, "variant": variant, "constants": constants, "warps": warps,
        **numbers, "sass": bool(sass),
        "expected_reading_loops": entry.loops(constants),
        "wide_loads": [count(r"LDG\.E\S*\.(?:128|256)", body) for body in bodies],
        "loads": [count(r"\bLDG\.", body) for body in bodies],
        "spills": [count(r"\b(?:STL|LDL)\b", body) for body in bodies],
        "synchronising": [count(r"\b(?:BAR|SHFL)\.", body) for body in bodies],
        "all_wide_loads": count(r"LDG\.E\S*\.(?:128|256)", sass),
        "all_wide_stores": count(r"STG\.E\S*\.(?:128|256)", sass),
        "half_loads": count(r"LDG\.E\S*\.U16", sass) + count(r"ld\.global\S*\.b16", compiled.asm["ptx"]),
    }  # fmt: skip


if __name__ == "__main__":
    everything = "--all" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--all"]
    chosen = [argument for argument in arguments if argument in KERNELS] or list(KERNELS)
    for capability, name in itertools.product((int(a) for a in arguments if a.isdecimal()), chosen):
        shapes = KERNELS[name].shapes
        for shape in shapes if everything else shapes[: 1 + ("PIECES" in shapes[0][0])]:
            for variant in KERNELS[name].variants if everything else KERNELS[name].default:
                print(json.dumps(report(capability, name, variant, shape)), flush=True)
