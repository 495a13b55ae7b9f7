"""The README's cell of one's own: the same as in bench/own_cell.py, right, and it learns."""

import re
import subprocess
import sys
from pathlib import Path

import torch

from bench.own_cell import MGU, MinimalGatedUnit

ROOT = Path(__file__).resolve().parents[1]


def test_readme_shows_the_file() -> None:
    code = (ROOT / "bench" / "own_cell.py").read_text()
    code = code[code.index("from lstm_triton import") :]
    for annotation in (": int", ": Any", " -> None"):
        code = code.replace(annotation, "")
    (block,) = re.findall(
        r"```python\n(from lstm_triton import TritonRNNBase.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    assert block.strip() == code.strip()
    assert len([line for line in code.splitlines() if line and not line.startswith("#")]) < 40


def test_it_learns() -> None:
    """Which of two rows of numbers had the larger sum: by kernels, and by PyTorch operations to the same weights."""
    torch.manual_seed(0)
    x = torch.randn(12, 64, 2)
    target = (x[..., 0].sum(0) > x[..., 1].sum(0)).float()
    losses = {}
    for backend in ("triton", "eager"):
        torch.manual_seed(1)
        layer, output = MinimalGatedUnit(2, 16, backend=backend), torch.nn.Linear(16, 1)
        optimizer = torch.optim.Adam([*layer.parameters(), *output.parameters()], lr=0.02)
        losses[backend] = []
        for _ in range(60):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(output(layer(x)[1][0])[:, 0], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    assert losses["triton"][-1] < 0.3 * losses["triton"][0]
    torch.testing.assert_close(losses["triton"], losses["eager"], rtol=2e-2, atol=1e-3)


def test_it_is_no_other_cell() -> None:
    assert MinimalGatedUnit(2, 3).cell is MGU and not MGU.is_plain and MGU.operator is None


def test_no_cell_takes_the_name_of_another() -> None:
    """Not even where the cells that come along weren't used before."""
    program = """
from dataclasses import replace
from bench.own_cell import MGU
from lstm_triton import TritonGRU
from lstm_triton.cells import register
try:
    register(replace(MGU, name="gru"))
except ValueError as error:
    print(error)
print(TritonGRU(2, 3))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "another cell is called 'gru'" in done.stdout and "TritonGRU(2, 3)" in done.stdout
