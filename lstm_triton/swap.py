"""`convert` and `revert`: every `nn.LSTM`, `nn.GRU` and `nn.RNN` of a model to a Triton module and back."""

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lstm_triton.base import TritonRNNBase
from lstm_triton.cells.cell import of
from lstm_triton.module import TritonGRU, TritonLSTM, TritonRNN

_PAIRS: tuple[tuple[type[nn.Module], type[TritonRNNBase]], ...] = (
    (nn.LSTM, TritonLSTM), (nn.GRU, TritonGRU), (nn.RNN, TritonRNN),
)  # fmt: skip
# What the Triton modules have beyond PyTorch's, and what each has by itself.
_OPTIONS = ("recurrent_dropout", "recurrent_dropout_mode", "weight_dropout", "backend", "recompute")
_OWN = (*_OPTIONS, "cell", "zoneout", "forget_bias")


def convert(model: nn.Module, **options: Any) -> nn.Module:
    """Swaps every `torch.nn.LSTM`, `nn.GRU` and `nn.RNN` in `model` for a Triton module, in place.

    The new modules share the old ones' parameters, buffers, hooks, parametrizations and training
    mode, so optimizers go on working. Subclasses are left alone: what they change cannot be known.

    Args:
        model: searched through and changed in place.
        options: keyword arguments of `TritonRNNBase` beyond those of PyTorch's modules, for all of them:
            `recurrent_dropout`, `recurrent_dropout_mode`, `weight_dropout`, `backend`, `recompute`; and `zoneout`
            for LSTMs.

    Returns:
        `model`, or its replacement where it is such a module itself.

    Raises:
        TypeError, ValueError: `options` has an unknown name or a value that the modules refuse.
    """
    known = TritonLSTM(1, 1, device="meta", **options)  # one place that checks them
    unknown = set(options) - {*_OPTIONS, "zoneout"}
    if unknown:
        accepted = ", ".join((*_OPTIONS, "zoneout"))
        raise TypeError(f"convert takes the options {accepted}, got {', '.join(sorted(unknown))}")
    for old, new in _PAIRS:
        attributes = {name: getattr(known, name) for name in _OPTIONS}
        attributes["zoneout"] = known.zoneout if new is TritonLSTM else (0.0, 0.0)
        if new is TritonLSTM:
            attributes["forget_bias"] = None
        model = _swap(model, old, new, attributes)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Swaps every Triton module in `model` for PyTorch's, in place; the inverse of `convert`.

    Args:
        model: searched through and changed in place.

    Returns:
        `model`, or its replacement where it is such a module itself.

    Raises:
        ValueError: a module has what PyTorch's lacks: recurrent dropout, zoneout, weight dropout or a cell of its own;
            nothing is changed then.
    """
    for name, module in model.named_modules():
        if _kind(module) in [new for _, new in _PAIRS]:
            _check_revertible(name or "the model", module)  # type: ignore[arg-type]
    for old, new in _PAIRS:
        model = _swap(model, new, old, {})
    return model


def _check_revertible(name: str, module: TritonRNNBase) -> None:
    kind = next(old.__name__ for old, new in _PAIRS if new is _kind(module))
    if module.cell.operator is None:
        raise ValueError(f"{name} has the cell {module.cell.name!r}, which nn.{kind} lacks")
    for option, nothing in (("recurrent_dropout", 0.0), ("zoneout", (0.0, 0.0)), ("weight_dropout", 0.0)):
        value = getattr(module, option)
        if value != nothing:
            raise ValueError(
                f"{name} has {option}={value}, which nn.{kind} lacks; set it to {nothing} to revert without it"
            )


def _kind(module: nn.Module) -> type:
    """The module's class, before parametrizations made one of their own of it."""
    return parametrize.type_before_parametrizations(module)


def _swap(model: nn.Module, old: type[nn.Module], new: type[nn.Module], attributes: dict[str, Any]) -> nn.Module:
    made: dict[nn.Module, nn.Module] = {}

    def replacement(module: nn.Module) -> nn.Module:
        if module not in made:
            made[module] = _as_class(module, new, attributes)
        return made[module]

    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and _kind(child) is old:
                parent._modules[name] = replacement(child)
    return replacement(model) if _kind(model) is old else model


def _as_class(module: nn.Module, new: type[nn.Module], attributes: dict[str, Any]) -> nn.Module:
    """A module of class `new` that shares everything with `module`."""
    own = type(module)
    name = new.__name__
    if parametrize.is_parametrized(module):
        # The class that parametrizations made has the parametrized weights as properties.
        kept = {k: v for k, v in vars(own).items() if k not in ("__dict__", "__weakref__", "__module__", "__doc__")}
        new = type(f"Parametrized{name}", (new,), kept)
    swapped = new.__new__(new)
    # Its own dicts and lists of the shared parameters, as `copy.copy` would not give it.
    state = {k: v.copy() if isinstance(v, (dict, list)) else v for k, v in module.__dict__.items() if k not in _OWN}
    if issubclass(new, TritonRNNBase):
        attributes = attributes | {"cell": of(str(module.mode).lower().replace("_", "-"))}
    swapped.__dict__.update(state, **attributes)
    return swapped
