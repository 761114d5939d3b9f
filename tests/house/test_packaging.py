"""The package: lazy names, and a `kernels` folder that shadows nobody's package."""

import subprocess
import sys
from pathlib import Path

import opcd_fast

ROOT = Path(__file__).resolve().parents[2]


def python(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options)


def test_importing_the_package_imports_nothing_else():
    done = python("import sys, opcd_fast; assert not {'torch', 'triton', 'transformers'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_every_public_name_resolves():
    for name in opcd_fast.__all__:
        assert getattr(opcd_fast, name) is not None


def test_our_kernels_folder_does_not_shadow_a_package_called_kernels(tmp_path):
    assert not (ROOT / "kernels" / "__init__.py").exists()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'somebody else'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels, opcd_fast.kernels.reference as r"
    code += "; assert r.__file__; print(kernels.whose)"
    done = python(code, cwd=ROOT)
    assert done.stdout.strip() == "somebody else", done.stderr
