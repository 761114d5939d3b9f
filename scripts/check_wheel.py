"""Build the wheel and the source archive, see that they hold this checkout and nothing else, and use the wheel.

Everything is built from a copy of the tracked files: setuptools keeps `build/` and file lists between builds, so a
renamed module would stay in the next wheel built in place, and an untracked one would be in it without being in git.
The wheel is then installed into a new environment that sees this one's torch (a second download of it would prove
nothing) but not this checkout; there the public names are imported and one loss is run.

`--print-check` prints what is run there.

Needs git for the list of files; a tree without .git (an unpacked source archive) is copied as it is.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = "opcd_fast/kernels"  # leads to kernels/, which the wheel holds in its place
NOT_SOURCES = (".*", "build", "dist", "runs", "site", "__pycache__", "*.egg-info", "*.so", "*.dylib", "*.dll")
COMPLAINTS = ("Package would be ignored", "the CPU library did not build")
CHECK = """
import sys
import opcd_fast, opcd_fast.kernels.reference.divergences, opcd_fast.kernels.triton.divergences  # noqa: F401
from opcd_fast.loss import LMHead, fused_linear_reverse_kl  # noqa: F401
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
assert abs(loss.item() - wanted.item()) < 1e-5 * wanted.item(), (loss, wanted)
assert hidden.grad.abs().sum() > 0
print("wheel check: public names import, one loss equals the plain one")
"""


def main() -> None:
    if sys.argv[1:] == ["--print-check"]:  # for another environment
        print(CHECK)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        copy = folder / "copy"
        files = copy_sources(copy)
        expected = {installed_name(name): (copy / name).read_bytes() for name in files if installed_name(name)}

        # Without a choice `build` makes the archive and then the wheel from the unpacked archive, never from the tree.
        build(copy, folder / "from_archive")
        (archive,) = (folder / "from_archive").glob("*.tar.gz")
        check_archive(archive, files)
        build(copy, folder / "from_tree", "--wheel")
        wheels = [next((folder / source).glob("*.whl")) for source in ("from_tree", "from_archive")]
        for wheel in wheels:
            check_wheel(wheel, expected)
        print(f"wheel check: {len(files)} files; the wheels of tree and archive hold the same {len(expected)}")

        use(wheels[0], folder)


def copy_sources(copy: Path) -> list[str]:
    """Copy the tracked files (links as links) to `copy`; their names."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
        # A file that was removed but is still in the index is on its way out.
        names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    else:
        print("wheel check: no git here, so the whole tree stands for the tracked files")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCES))
        names = [path.relative_to(copy).as_posix() for path in copy.rglob("*")]
    return sorted(name for name in names if name != LINK and not (copy / name).is_dir())


def installed_name(name: str) -> str | None:
    """Where the wheel has the tracked file `name`; None if it does not belong there."""
    if name.startswith("kernels/"):
        return f"opcd_fast/{name}" if name.endswith((".py", ".json")) else None
    return name if name.startswith("opcd_fast/") else None


def build(source: Path, target: Path, *options: str) -> None:
    # --no-isolation: an isolated build would download setuptools, and with other back ends torch, once more.
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(target), str(source)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    heard = [complaint for complaint in COMPLAINTS if complaint in done.stdout]
    if done.returncode or heard:
        sys.exit(f"{done.stdout}\nwheel check: building failed, exit code {done.returncode}, complaints: {heard}")


def check_archive(archive: Path, files: list[str]) -> None:
    """Every tracked file is in the source archive, but for what only a checkout needs."""
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    missing = [name for name in files if name not in held and not name.startswith(".")]
    if missing:
        sys.exit(f"wheel check: {archive.name} lacks {', '.join(missing)}; add them to MANIFEST.in")


def check_wheel(wheel: Path, expected: dict[str, bytes]) -> None:
    """The wheel holds the `expected` files, byte for byte, and besides them only metadata and the CPU library."""
    with zipfile.ZipFile(wheel) as opened:
        held = {name: opened.read(name) for name in opened.namelist() if ".dist-info/" not in name}
    libraries = [name for name in held if Path(name).stem == "libopcd_native"]
    wrong = {
        "lacks": sorted(expected.keys() - held.keys()),
        "should not hold": sorted(held.keys() - expected.keys() - set(libraries)),
        "has another version of": sorted(n for n in expected.keys() & held.keys() if expected[n] != held[n]),
    }
    for verb, names in wrong.items():
        if names:
            sys.exit(f"wheel check: {wheel.parent.name}/{wheel.name} {verb} {', '.join(names)}")
    can_compile = shutil.which("cmake") and any(map(shutil.which, ("c++", "g++", "clang++", "cl")))  # as in setup.py
    if can_compile and not libraries:
        sys.exit(f"wheel check: {wheel.parent.name}/{wheel.name} lacks the CPU library, though CMake is here")


def use(wheel: Path, folder: Path) -> None:
    """Install the wheel in a new environment and run CHECK and `opcd info` there."""
    venv.create(folder / "env", with_pip=True)
    python = str(folder / "env" / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel))
    # As a plain sys.path entry: .pth files in there (this checkout's editable install) are not read.
    (Path(packages_of(python)) / "torch_from_outside.pth").write_text(packages_of(sys.executable) + "\n")
    run(python, "-c", CHECK, cwd=folder)
    run(python, "-m", "opcd_fast.cli", "info", cwd=folder)


def packages_of(python: str) -> str:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def run(*command: str, cwd: Path | None = None) -> None:
    subprocess.run(command, check=True, cwd=cwd)


if __name__ == "__main__":
    main()
