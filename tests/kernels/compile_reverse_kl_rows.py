"""Compile the row kernel for chips that are not here and print what came out, one JSON object per line.

Run by test_compile.py in a process without TRITON_INTERPRET. Arguments: compute capabilities; with `--all`,
every row of the launch table and every variant, otherwise the widest row and the two extreme variants.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opcd_fast.kernels import reverse_kl_rows as rows

VARIANTS = {
    "plain": {},
    "statistics": {"ALL_STATISTICS": True},
    "loss_only": {"WRITE_GRADIENT": False},
    "everything": {
        "HAS_BIAS_S": True, "HAS_BIAS_T": True, "SOFTCAP_S": True, "SOFTCAP_T": True, "ALL_STATISTICS": True,
    },
}  # fmt: skip
POINTERS = {"statistics_ptr": "*fp32", "g_ptr": "*bf16"}
FLOATS = ("inner_s", "inner_t", "outer_s", "outer_t", "derivative")
# What the launcher's pitch guarantees. n_columns is deliberately not divisible by 16.
ALIGNED = ("stride_s", "stride_t", "stride_g")


def source(variant: dict, block: int) -> ASTSource:
    flags = dict.fromkeys(("HAS_BIAS_S", "HAS_BIAS_T", "SOFTCAP_S", "SOFTCAP_T", "ALL_STATISTICS"), False)
    constants = {**flags, "WRITE_GRADIENT": True, **variant, "BLOCK": block}
    kernel = rows._reverse_kl_rows_kernel
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*fp32")
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if name.endswith("_ptr") or name in ALIGNED:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


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


def report(capability: int, name: str, block: int, warps: int) -> dict:
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    compiled = triton.compile(source(VARIANTS[name], block), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    bodies = loops(sass)
    return {
        "capability": capability,
        "variant": name,
        "block": block,
        "warps": warps,
        **numbers,
        "sass": bool(sass),
        "loops": len(bodies),
        "wide_loads": [len(re.findall(r"LDG\.E\S*\.(?:128|256)", body)) for body in bodies],
        "loads": [len(re.findall(r"\bLDG\.", body)) for body in bodies],
        "synchronising": [len(re.findall(r"\b(?:BAR|SHFL)\.", body)) for body in bodies],
        "instructions": [len(body.splitlines()) for body in bodies],
    }


if __name__ == "__main__":
    capabilities = [int(argument) for argument in sys.argv[1:] if argument != "--all"]
    everything = "--all" in sys.argv
    for capability in capabilities:
        for _, block, warps in rows.LAUNCH if everything else rows.LAUNCH[-1:]:
            for name in VARIANTS if everything else ("plain", "everything"):
                print(json.dumps(report(capability, name, block, warps)), flush=True)
