"""What a recurrent module's gates and states are at every time step: for plots, probes and debugging."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from lstm_triton import ops
from lstm_triton.base import States, TritonRNNBase
from lstm_triton.padding import unpack
from lstm_triton.swap import convert


@torch.no_grad()
def trace(
    module: nn.Module,
    x: Tensor | PackedSequence,
    hx: States | None = None,
    lengths: Tensor | Sequence[int] | None = None,
) -> list[dict[str, Tensor]]:
    """What each layer and direction of a module computes at each time step of an input.

    As in evaluation, whatever mode the module is in: nothing is dropped, zoneout takes its expectation. It runs in
    PyTorch operations on the input's device, whatever the module's backend, and has no gradients; the module stays as
    it is.

    Args:
        module: a `TritonRNNBase`, or an `nn.LSTM`, `nn.GRU` or `nn.RNN` itself.
        x, hx, lengths: as of a call of the module; PyTorch's modules may have `lengths`, too.

    Returns:
        A dictionary for each layer and direction, in the order of layers, then directions. Its tensors (T, B, H), of
        unbatched input (T, H), with the module's `batch_first` (B, T, H), are in time order in both directions; a
        `PackedSequence` gives them padded, with zeros past a row's end, its rows as they were before packing.

        They are what the cell keeps of a step, under the names in `module.cell.saved`: of an LSTM the activated gates
        "i", "f", "g", "o", of a GRU "r", "z", "n" and "h_n", the product with h that r is multiplied by; "c", the cell
        state after the step, of cells that carry one; and "h", the output, (T, B, K), K `proj_size` or H. The dtype of
        "h" is that of x, that of the others float32, or float64 for float64.

    Raises:
        TypeError: the module is none of these.
        RuntimeError, ValueError: as of a call; or the batch is empty.
    """
    model = module
    if parametrize.type_before_parametrizations(module) in (nn.LSTM, nn.GRU, nn.RNN):
        model = convert(module)  # a new one, which shares its parameters
    if not isinstance(model, TritonRNNBase):
        raise TypeError(
            f"module should be a TritonRNNBase, or an nn.LSTM, nn.GRU or nn.RNN itself, got {type(module).__name__}"
        )
    model._update_flat_weights()
    weights: list[Tensor] = list(model._flat_weights)  # type: ignore[arg-type]
    batch_first, states = model.batch_first, model._states(hx)
    batched = isinstance(x, PackedSequence) or x.dim() != 2
    places, leading, batch_sizes = None, torch.Size(), None
    if states is not None and not batched:
        states = [s.unsqueeze(1) for s in states]
    if lengths is not None:
        packed, places = model._pack(x, lengths)
        assert isinstance(x, Tensor)
        leading, x = x.shape[:2], packed
    if isinstance(x, PackedSequence):
        data, batch_sizes, order, _ = x
        if states is not None and order is not None:
            states = [s.index_select(1, order) for s in states]
        if places is None:
            places, leading = _places(x, batch_first)
    else:
        data = x if batched else x.unsqueeze(0 if batch_first else 1)
    h, c = _checked(model, data, batch_sizes, states)
    if batch_sizes is None and batch_first:
        data = data.transpose(0, 1)
    with torch.autocast(data.device.type, enabled=False):
        output, *_, kept = ops.forward(
            data.contiguous(), batch_sizes, h.contiguous(), c.contiguous(), weights, model.num_layers,
            model.bias, 0.0, None, None, 0.0, True, "eager", 0, True, model.cell.name,
            list(model.zoneout) if model.zoneout != (0.0, 0.0) else None, False,
        )  # fmt: skip

    def placed(rows: Tensor) -> Tensor:
        """Of the rows (N, ·) of all steps what is returned."""
        if places is not None:
            return unpack(rows, places, leading)
        found = rows.unflatten(0, data.shape[:2]).contiguous()
        if not batched:
            return found.squeeze(1)
        return found.transpose(0, 1) if batch_first else found

    layers, size = model.num_layers, h.size(2)
    outputs = [*kept[: layers - 1], output.flatten(0, -2)]
    found = []
    for y, gates, cells in zip(outputs, kept[layers - 1 : 2 * layers - 1], kept[2 * layers - 1 :], strict=True):
        for d, (own, c) in enumerate(zip(gates.unflatten(2, (-1, model.hidden_size)), cells, strict=True)):
            named = {name: placed(own[:, k]) for k, name in enumerate(model.cell.saved)}
            if model.cell.carries:
                named["c"] = placed(c)
            found.append(named | {"h": placed(y[:, d * size : (d + 1) * size])})
    return found


def _checked(
    model: TritonRNNBase, data: Tensor, batch_sizes: Tensor | None, states: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """h and c before the first step, (L * D, B, K) and (L * D, B, H), of a batch whose shapes are right."""
    model.check_input(data, batch_sizes)
    if data.numel() == 0:
        raise ValueError(f"the batch is empty: input has the shape {tuple(data.shape)}")
    count, batch, size = model.get_expected_hidden_size(data, batch_sizes)
    sizes = [size, model.hidden_size][: 1 + model.cell.carries]
    if states is None:
        states = [data.new_zeros(count, batch, n) for n in sizes]
    for state, n in zip(states, sizes, strict=True):
        model.check_hidden_size(state, (count, batch, n))
    return states[0], states[-1]


def _places(packed: PackedSequence, batch_first: bool) -> tuple[Tensor, torch.Size]:
    """Where the rows of a packed batch are among those of the padded one, and the leading sizes of that."""
    sizes, order, device = packed.batch_sizes, packed.sorted_indices, packed.data.device
    steps, batch = sizes.numel(), int(sizes[0])
    row = torch.arange(batch) if order is None else order.cpu()
    live = torch.arange(batch) < sizes.unsqueeze(1)
    of_row, of_step = (steps, 1) if batch_first else (1, batch)
    places = (torch.arange(steps).unsqueeze(1) * of_step + row * of_row)[live].to(device)
    return places, torch.Size((batch, steps) if batch_first else (steps, batch))
