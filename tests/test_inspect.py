"""`lstm_triton.inspect.trace`: gates and states at each time step, against cells that are stepped by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lstm_triton import TritonGRU, TritonLSTM, TritonRNN
from lstm_triton.inspect import trace

STEPS, BATCH, FEATURES, HIDDEN = 5, 3, 4, 6
LENGTHS = [2, 5, 3]

MODULES = {
    "lstm": lambda **options: TritonLSTM(FEATURES, HIDDEN, **options),
    "projections": lambda **options: TritonLSTM(FEATURES, HIDDEN, proj_size=2, **options),
    "layer norm": lambda **options: TritonLSTM(FEATURES, HIDDEN, layer_norm=True, **options),
    "peephole": lambda **options: TritonLSTM(FEATURES, HIDDEN, peephole=True, **options),
    "coupled": lambda **options: TritonLSTM(FEATURES, HIDDEN, coupled_gates=True, **options),
    "1997": lambda **options: TritonLSTM(FEATURES, HIDDEN, forget_gate=False, **options),
    "zoneout": lambda **options: TritonLSTM(FEATURES, HIDDEN, zoneout=(0.3, 0.6), **options),
    "gru": lambda **options: TritonGRU(FEATURES, HIDDEN, **options),
    "rnn": lambda **options: TritonRNN(FEATURES, HIDDEN, **options),
    "nn.LSTM": lambda **options: nn.LSTM(FEATURES, HIDDEN, **options),
    "nn.GRU": lambda **options: nn.GRU(FEATURES, HIDDEN, **options),
    "nn.RNN": lambda **options: nn.RNN(FEATURES, HIDDEN, nonlinearity="relu", **options),
}


def states_of(module: nn.Module, batch: int | None) -> Tensor | tuple[Tensor, Tensor]:
    """Drawn initial states as the module takes them."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    leading = [count] if batch is None else [count, batch]
    h = torch.randn(*leading, module.proj_size or module.hidden_size, device=module.weight_ih_l0.device)
    carries = isinstance(module, (nn.LSTM, TritonLSTM))
    return (h, torch.randn(*leading, module.hidden_size, device=h.device)) if carries else h


def last_layer(found: list[dict[str, Tensor]], module: nn.Module, name: str) -> Tensor:
    """Both directions' side by side."""
    return torch.cat([traced[name] for traced in found[-2 if module.bidirectional else -1 :]], -1)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("form", ["batched", "unbatched", "packed", "lengths"])
@pytest.mark.parametrize("kind", MODULES)
def test_h_is_the_output(kind: str, form: str, batch_first: bool, device: torch.device) -> None:
    module = MODULES[kind](num_layers=2, bidirectional=True, batch_first=batch_first).to(device).eval()
    shape = (BATCH, STEPS) if batch_first else (STEPS, BATCH)
    x = torch.randn(*([STEPS] if form == "unbatched" else shape), FEATURES, device=device)
    hx = states_of(module, None if form == "unbatched" else BATCH)
    packed = (
        pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first, enforce_sorted=False) if form == "packed" else x
    )
    if form == "lengths":
        own = pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first, enforce_sorted=False)
        output, states = module(own, hx)
        found = trace(module, x, hx, lengths=LENGTHS)
    else:
        output, states = module(packed, hx)
        found = trace(module, packed, hx)
    if isinstance(output, PackedSequence):
        output, _ = pad_packed_sequence(output, batch_first)
    assert len(found) == 4
    torch.testing.assert_close(last_layer(found, module, "h"), output)
    # The final states are those of each row's last step; in reverse that is its first.
    steps = [STEPS] if form in ("batched", "unbatched") else LENGTHS
    finals = states if isinstance(states, tuple) else (states,)
    for name, final in zip(("h", "c"), finals, strict=False):
        for k, traced in enumerate(found):
            values = traced[name].transpose(0, 1) if batch_first and form != "unbatched" else traced[name]
            if form == "unbatched":
                assert torch.allclose(values[STEPS - 1 if k % 2 == 0 else 0], final[k], atol=1e-6)
                continue
            for row in range(BATCH):
                end = steps[row % len(steps)]
                torch.testing.assert_close(values[end - 1 if k % 2 == 0 else 0, row], final[k, row])
                assert not values[end:, row].any()


@pytest.mark.parametrize("triton", [False, True], ids=["nn.LSTM", "TritonLSTM"])
def test_gates_of_an_lstm_stepped_by_hand(triton: bool, device: torch.device) -> None:
    """i, f, g, o and c against the formulas and an `nn.LSTMCell` for each layer and direction."""
    make = TritonLSTM if triton else nn.LSTM
    module = make(FEATURES, HIDDEN, num_layers=2, bidirectional=True, device=device, dtype=torch.float64)
    x = torch.randn(STEPS, BATCH, FEATURES, device=device, dtype=torch.float64)
    h0, c0 = (s.double() for s in states_of(module, BATCH))
    found = trace(module, x, (h0, c0))
    layer_input = x
    for layer in range(2):
        outputs = []
        for d in range(2):
            suffix, k = f"_l{layer}" + "_reverse" * d, 2 * layer + d
            weights = [getattr(module, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            cell = nn.LSTMCell(layer_input.size(2), HIDDEN, device=device, dtype=torch.float64)
            with torch.no_grad():
                for own, given in zip(
                    (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh), weights, strict=True
                ):
                    own.copy_(given)
                h, c = h0[k], c0[k]
                expected: dict[int, dict[str, Tensor]] = {}
                for t in range(STEPS)[:: -1 if d else 1]:
                    sums = layer_input[t] @ weights[0].T + weights[2] + h @ weights[1].T + weights[3]
                    i, f, g, o = sums.chunk(4, 1)
                    h, c = cell(layer_input[t], (h, c))
                    expected[t] = dict(i=i.sigmoid(), f=f.sigmoid(), g=g.tanh(), o=o.sigmoid(), c=c, h=h)
            assert list(found[k]) == ["i", "f", "g", "o", "c", "h"]
            for name, values in found[k].items():
                torch.testing.assert_close(values, torch.stack([expected[t][name] for t in range(STEPS)]))
            outputs.append(found[k]["h"])
        layer_input = torch.cat(outputs, 2)


def test_gates_of_a_gru(device: torch.device) -> None:
    module = TritonGRU(FEATURES, HIDDEN, device=device, dtype=torch.float64)
    x = torch.randn(STEPS, BATCH, FEATURES, device=device, dtype=torch.float64)
    (found,) = trace(module, x)
    assert list(found) == ["r", "z", "n", "h_n", "h"]
    h_prev = torch.cat([torch.zeros_like(found["h"][:1]), found["h"][:-1]])
    x_r, x_z, x_n = (x @ module.weight_ih_l0.T + module.bias_ih_l0).chunk(3, 2)
    h_r, h_z, h_n = (h_prev @ module.weight_hh_l0.T + module.bias_hh_l0).chunk(3, 2)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    expected = dict(r=r, z=z, n=n, h_n=h_n, h=(1 - z) * n + z * h_prev)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


@pytest.mark.parametrize("backend", ["auto", "eager", "triton"])
def test_module_in_training_is_traced_as_in_evaluation(backend: str, device: torch.device) -> None:
    """All that drops is off, zoneout takes its expectation; mode, parameters and random numbers stay as they are."""
    module = TritonLSTM(
        FEATURES, HIDDEN, num_layers=2, dropout=0.5, recurrent_dropout=0.5, weight_dropout=0.5, zoneout=(0.5, 0.5),
        backend=backend, device=device,
    )  # fmt: skip
    before, x = copy.deepcopy(module.state_dict()), torch.randn(STEPS, BATCH, FEATURES, device=device)
    drawn = torch.random.get_rng_state()
    found = trace(module, x)
    assert module.training and torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(values.requires_grad for traced in found for values in traced.values())
    output, _ = module.eval()(x)
    torch.testing.assert_close(found[-1]["h"], output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    module = TritonLSTM(FEATURES, HIDDEN, device=device, dtype=dtype, backend="eager")
    x = torch.randn(STEPS, BATCH, FEATURES, device=device, dtype=dtype)
    with torch.autocast(device.type, torch.bfloat16):
        (found,) = trace(module, x)
    assert {name: values.dtype for name, values in found.items()} == {
        "i": torch.float32, "f": torch.float32, "g": torch.float32, "o": torch.float32, "c": torch.float32, "h": dtype,
    }  # fmt: skip
    assert torch.equal(found["h"], module(x)[0])


def test_parametrized_module(device: torch.device) -> None:
    """Weights that parametrizations make, of PyTorch's module and ours."""
    for make in (nn.LSTM, TritonLSTM):
        module = parametrizations.weight_norm(make(FEATURES, HIDDEN, device=device), "weight_hh_l0")
        x = torch.randn(STEPS, BATCH, FEATURES, device=device)
        torch.testing.assert_close(trace(module, x)[0]["h"], module(x)[0])


def test_errors(device: torch.device) -> None:
    x = torch.randn(STEPS, BATCH, FEATURES, device=device)
    model = nn.Sequential(nn.LSTM(FEATURES, HIDDEN)).to(device)
    with pytest.raises(TypeError, match="nn.LSTM, nn.GRU or nn.RNN itself, got Sequential"):
        trace(model, x)
    assert type(model[0]) is nn.LSTM  # and is left alone
    with pytest.raises(TypeError, match="got LSTMCell"):
        trace(nn.LSTMCell(FEATURES, HIDDEN), x[0])
    module = TritonLSTM(FEATURES, HIDDEN, device=device)
    with pytest.raises(RuntimeError, match="Expected 4, got 5"):
        trace(module, torch.randn(STEPS, BATCH, 5, device=device))
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 3, 6\)"):
        trace(module, x, (torch.randn(1, 2, HIDDEN, device=device), torch.randn(1, 3, HIDDEN, device=device)))
    with pytest.raises(RuntimeError, match="3 dimensions"):
        trace(module, x[None])
    with pytest.raises(ValueError, match="does not match weight dtype"):
        trace(module, x.double())
    with pytest.raises(ValueError, match="batch is empty"):
        trace(module, x[:, :0])
    with pytest.raises(ValueError, match="lengths should be 3 integers"):
        trace(module, x, lengths=[1, 2])
