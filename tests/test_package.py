"""The package as installed: its import name, what it imports, and life without Triton."""

import importlib.metadata
import importlib.resources
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

WITHOUT_TRITON = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Gone())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else found(name, package)
import torch
import lstm_triton
x = torch.randn(4, 3, 5)
for backend in ("auto", "eager", "torch"):
    y, _ = lstm_triton.TritonLSTM(5, 7, backend=backend)(x)
    y.sum().backward()
try:
    lstm_triton.TritonLSTM(5, 7, backend="triton")(x)
except RuntimeError as error:
    print(error)
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_without_triton() -> None:
    assert "needs the package triton, which is not installed" in run(WITHOUT_TRITON)


IMPORT = """
import subprocess, sys
import torch
before = "triton" in sys.modules
subprocess.Popen = None
import lstm_triton
print(before or "triton" not in sys.modules, [m for m in sys.modules if m.startswith("lstm_triton.kernels")])
"""


def test_import_leaves_triton_alone() -> None:
    """`TRITON_INTERPRET` can be set after the import, and the import stays cheap: no Triton, no compiler started."""
    assert run(IMPORT).strip() == "True []"


def test_kernels_are_part_of_the_package() -> None:
    """Installed as lstm_triton.kernels, never as a top-level `kernels`, which is another project's name."""
    import lstm_triton.kernels

    assert Path(lstm_triton.kernels.__file__).parent.name == "kernels"
    top = importlib.metadata.distribution("lstm-triton").read_text("top_level.txt")
    assert top is not None and top.split() == ["lstm_triton"]


SOURCES = {"__init__.py", "build.py", "lower.py", "runtime.py", "kernel.h", "program.h", "runtime.c"}


def test_c_sources_are_beside_the_cpu_target() -> None:
    import lstm_triton.cpu

    folder = importlib.resources.files(lstm_triton.cpu)
    assert {path.name for path in folder.iterdir()} >= SOURCES


def test_wheel_has_c_sources_and_kernels(tmp_path: Path) -> None:
    """What an installation that is not editable has; built from a copy, which the build writes to."""
    pytest.importorskip("setuptools", minversion="77")  # what pyproject.toml needs
    root = Path(__file__).parents[1]
    for name in ("lstm_triton", "kernels"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", "dist", "."]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for package, folder in (("lstm_triton", "lstm_triton"), ("lstm_triton/kernels", "kernels")):
        sources = [path for path in (root / folder).rglob("*") if path.suffix in (".py", ".c", ".h")]
        assert sources
        missing = {f"{package}/{path.relative_to(root / folder).as_posix()}" for path in sources} - names
        assert not missing


def test_public_names() -> None:
    import lstm_triton

    assert all(getattr(lstm_triton, name).__doc__ for name in lstm_triton.__all__)
    assert importlib.metadata.version("lstm-triton") == lstm_triton.__version__
