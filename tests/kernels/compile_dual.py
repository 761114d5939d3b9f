"""Compile the dual kernels for chips that are not here and print what came out, one JSON object per line.

Run by test_compile_dual.py in a process without TRITON_INTERPRET. Arguments: compute capabilities; with `--all`,
every variant, otherwise what a training step uses (on sm_90 also with two heads).
"""

import json
import re
import sys
import tempfile

import triton
from compile_kernels import loops, tool
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opcd_fast.kernels import dual_projection, dual_rows

TRANSFORMS = dict.fromkeys(("HAS_BIAS_S", "HAS_BIAS_T", "SOFTCAP_S", "SOFTCAP_T"), True)
SOFTCAPS = {"SOFTCAP_S": True, "SOFTCAP_T": True}
PROJECTIONS = {
    "gradient": {"SHARED": True, "STORE": True},
    "gradient_two_heads": {"SHARED": False, "STORE": True},
    "loss_only": {"SHARED": True, "STORE": False},
    "statistics": {"SHARED": True, "STORE": False, "ALL_STATISTICS": True},
    "loss_only_two_heads": {"SHARED": False, "STORE": False},
    "gradient_softcap": {"SHARED": True, "STORE": True, **SOFTCAPS},
    "gradient_two_heads_softcap": {"SHARED": False, "STORE": True, **SOFTCAPS},
    "loss_only_softcap": {"SHARED": True, "STORE": False, **SOFTCAPS},
    "gradient_transforms": {"SHARED": True, "STORE": True, **TRANSFORMS},
    "gradient_statistics": {"SHARED": True, "STORE": True, "ALL_STATISTICS": True},
    "gradient_everything": {"SHARED": True, "STORE": True, **TRANSFORMS, "ALL_STATISTICS": True},
    "gradient_two_heads_everything": {"SHARED": False, "STORE": True, **TRANSFORMS, "ALL_STATISTICS": True},
    "statistics_two_heads": {"SHARED": False, "STORE": False, "ALL_STATISTICS": True},
    "statistics_everything": {"SHARED": True, "STORE": False, **TRANSFORMS, "ALL_STATISTICS": True},
}
COMMON = ("gradient", "gradient_two_heads")
FLOATS = ("inner_s", "inner_t", "outer_s", "outer_t", "inverse_outer")
# What the launchers demand. The widths are multiples of 16 in every model; one that is not only costs vector loads.
ALIGNED = ("pitch", "stride_s", "stride_delta", "stride_g", "stride_h_s", "stride_w_s", "stride_h_t", "stride_w_t",
           "D_s", "D_t")  # fmt: skip


def source(kernel, constants: dict, types: dict, aligned: tuple) -> ASTSource:
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        default = "*fp32" if name.endswith("_ptr") else "fp32" if name in FLOATS else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, default)
        if signature[name].startswith("*") or name in aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def projection(capability: int, name: str) -> tuple[ASTSource, dual_projection.Launch]:
    flags = dict.fromkeys((*TRANSFORMS, "ALL_STATISTICS"), False)
    constants = {**flags, "DESCRIPTOR": capability >= 90, **PROJECTIONS[name]}
    wide = constants["HAS_BIAS_S"] or constants["ALL_STATISTICS"]
    plain = not wide and (constants["STORE"] or not constants["SOFTCAP_S"])
    launch = dual_projection.choose_launch(capability // 10, constants["SOFTCAP_S"], plain, 2)
    types = {"s_ptr": "*fp16", "delta_ptr": "*fp16"}
    for matrix, rows in (("h_s", launch.block_n), ("w_s", 128), ("h_t", launch.block_n), ("w_t", 128)):
        descriptor = f"tensordesc<bf16[{rows}, {launch.block_k}]>"
        types[matrix] = descriptor if constants["DESCRIPTOR"] else "*bf16"
    constants |= {"BLOCK_N": launch.block_n, "BLOCK_K": launch.block_k}
    return source(dual_projection._dual_projection_kernel, constants, types, ALIGNED), launch


def waits(body: str) -> dict:
    """HGMMA instructions of a loop, and its waits until all of them have finished."""
    return {
        "hgmma": len(re.findall(r"\bHGMMA\b", body)),
        "full_waits": len(re.findall(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x0\b", body)),
    }


def report(capability: int, name: str, compiled_source: ASTSource, warps: int, stages: int) -> dict:
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(compiled_source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    # Waits for a copy loop from behind the last EXIT back into the code; they are not loops of the program.
    bodies = [body for body in loops(sass) if "EXIT" not in body]
    return {
        "triton": triton.__version__, "capability": capability, "kernel": name,
        "warps": warps, "stages": stages, **numbers,
        "SHARED": compiled.metadata.shared, "sass": bool(sass),
        "mma": len(re.findall(r"\b(?:HGMMA|UTCHMMA|HMMA)\b", sass)),
        "mainloops": [waits(body) for body in bodies if "HGMMA" in body],
        "spills": [len(re.findall(r"\b(?:LDL|STL)\b", body)) for body in bodies],
        "loads": [len(re.findall(r"\bLDG\.", body)) for body in bodies],
        "wide_loads": [len(re.findall(r"LDG\.E\S*\.128", body)) for body in bodies],
        "synchronising": [len(re.findall(r"\b(?:BAR|SHFL)\.", body)) for body in bodies],
    }  # fmt: skip


def gradient(capability: int, softcap: bool) -> dict:
    constants = {"SOFTCAP": softcap, "TILES": dual_rows.TILES}
    types = {"s_ptr": "*fp16", "delta_ptr": "*fp16", "g_ptr": "*bf16"}
    rows = source(dual_rows._dual_gradient_kernel, constants, types, ALIGNED)
    return report(capability, "rows_softcap" if softcap else "rows", rows, dual_rows.WARPS, 3)


if __name__ == "__main__":
    everything = "--all" in sys.argv
    for capability in (int(argument) for argument in sys.argv[1:] if argument != "--all"):
        for name in PROJECTIONS if everything else COMMON if capability == 90 else COMMON[:1]:
            kernel, launch = projection(capability, name)
            print(json.dumps(report(capability, name, kernel, launch.warps, launch.stages)), flush=True)
        for softcap in (False, True) if everything else (False,):
            print(json.dumps(gradient(capability, softcap)), flush=True)
