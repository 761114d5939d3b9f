"""Build the wheel, install it into a new environment, import the public names and run one loss there.

The new environment sees this one's torch (a second download of it would prove nothing) but not this checkout.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECK = """
import sys
import opcd_fast, opcd_fast.loss, opcd_fast.kernels.reference, opcd_fast.kernels.reverse_kl_rows  # noqa: F401
assert "site-packages" in opcd_fast.__file__, opcd_fast.__file__
assert "transformers" not in sys.modules, "import opcd_fast.loss must need torch alone"
import torch
for name in opcd_fast.__all__:
    getattr(opcd_fast, name)
torch.manual_seed(0)
hidden, other, head = torch.randn(5, 16, requires_grad=True), torch.randn(5, 16), torch.randn(37, 16)
loss = opcd_fast.fused_linear_reverse_kl(hidden, head, other, head)
loss.backward()
p, q = (hidden @ head.T).log_softmax(-1), (other @ head.T).log_softmax(-1)
wanted = (p.exp() * (p - q)).sum(-1).mean()
assert abs(float(loss) - float(wanted)) < 1e-5 * float(wanted), (loss, wanted)
assert hidden.grad.abs().sum() > 0
print("wheel check: public names import, one loss equals the plain one")
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            scratch,
            str(ROOT),
        )
        (wheel,) = folder.glob("*.whl")
        venv.create(folder / "env", with_pip=True)
        python = str(folder / "env" / "bin" / "python")
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel))
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        ours = subprocess.run(
            [sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        # As a plain sys.path entry: .pth files in there (this checkout's editable install) are not read.
        (Path(site) / "torch_from_outside.pth").write_text(ours + "\n")
        run(python, "-c", CHECK, cwd=scratch)
        run(python, "-m", "opcd_fast.cli", "info", cwd=scratch)


def run(*command: str, cwd: str | None = None) -> None:
    subprocess.run(command, check=True, cwd=cwd)


if __name__ == "__main__":
    main()
