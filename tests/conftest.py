"""For all tests. Kernels run on a GPU where there is one, else natively on the CPU.

With `TRITON_INTERPRET=1` in the environment they run in Triton's interpreter.
"""

from collections.abc import Iterator

import pytest
import torch

from lstm_triton import direct

# On a GPU PyTorch's setting for RNNs allows TF32, whose products have 10 bits.
torch.backends.cudnn.allow_tf32 = False
# Two threads that wait for each other cost more than they give at these sizes.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "interpreted: `make test` runs it in Triton's interpreter, too, with TRITON_INTERPRET=1"
    )


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Each test has the same seed and nothing prepared, and the threads that a command line asks for end with it."""
    torch.manual_seed(0)
    direct.forget()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
