"""The package as installed: its import name, what it imports, and life without Triton."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

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


def test_import_leaves_triton_alone() -> None:
    """`TRITON_INTERPRET` can be set after the import, and the import stays cheap."""
    program = "import sys, lstm_triton; print([m for m in sys.modules if m.startswith('lstm_triton.kernels')])"
    assert run(program).strip() == "[]"


def test_kernels_are_part_of_the_package() -> None:
    """Installed as lstm_triton.kernels, never as a top-level `kernels`, which is another project's name."""
    import lstm_triton.kernels

    assert Path(lstm_triton.kernels.__file__).parent.name == "kernels"
    top = importlib.metadata.distribution("lstm-triton").read_text("top_level.txt")
    assert top is not None and top.split() == ["lstm_triton"]


def test_public_names() -> None:
    import lstm_triton

    assert all(getattr(lstm_triton, name).__doc__ for name in lstm_triton.__all__)
    assert importlib.metadata.version("lstm-triton") == lstm_triton.__version__
