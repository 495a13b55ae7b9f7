"""`convert` and `revert`: every `nn.LSTM` of a model to a `TritonLSTM` and back."""

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lstm_triton.module import TritonLSTM

# What a TritonLSTM has beyond an nn.LSTM.
_OPTIONS = ("recurrent_dropout", "recurrent_dropout_mode", "backend", "recompute")


def convert(model: nn.Module, **options: Any) -> nn.Module:
    """Swaps every `torch.nn.LSTM` in `model` for a `TritonLSTM`, in place.

    The new modules share the old ones' parameters, buffers, hooks, parametrizations and training
    mode, so optimizers go on working. Subclasses of `nn.LSTM` are left alone: what they change
    cannot be known.

    Args:
        model: searched through and changed in place.
        options: keyword arguments of `TritonLSTM` beyond those of `nn.LSTM`, for all of them:
            `recurrent_dropout`, `recurrent_dropout_mode`, `backend`, `recompute`.

    Returns:
        `model`, or its replacement where it is an `nn.LSTM` itself.

    Raises:
        TypeError, ValueError: `options` has an unknown name or a value that `TritonLSTM` refuses.
    """
    known = TritonLSTM(1, 1, device="meta", **options)  # one place that checks them
    unknown = set(options) - set(_OPTIONS)
    if unknown:
        raise TypeError(f"convert takes the options {', '.join(_OPTIONS)}, got {', '.join(sorted(unknown))}")
    return _swap(model, nn.LSTM, TritonLSTM, {name: getattr(known, name) for name in _OPTIONS})


def revert(model: nn.Module) -> nn.Module:
    """Swaps every `TritonLSTM` in `model` for a `torch.nn.LSTM`, in place; the inverse of `convert`.

    Args:
        model: searched through and changed in place.

    Returns:
        `model`, or its replacement where it is a `TritonLSTM` itself.

    Raises:
        ValueError: a module has recurrent dropout, which `nn.LSTM` lacks; nothing is changed then.
    """
    for name, module in model.named_modules():
        if _kind(module) is TritonLSTM and module.recurrent_dropout:
            raise ValueError(
                f"{name or 'the model'} has recurrent_dropout={module.recurrent_dropout}, which nn.LSTM lacks; "
                "set it to 0 to revert without it"
            )
    return _swap(model, TritonLSTM, nn.LSTM, {})


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
    if parametrize.is_parametrized(module):
        # The class that parametrizations made has the parametrized weights as properties.
        kept = {k: v for k, v in vars(own).items() if k not in ("__dict__", "__weakref__", "__module__", "__doc__")}
        new = type(f"Parametrized{new.__name__}", (new,), kept)
    swapped = new.__new__(new)
    # Its own dicts and lists of the shared parameters, as `copy.copy` would not give it.
    state = {k: v.copy() if isinstance(v, (dict, list)) else v for k, v in module.__dict__.items() if k not in _OPTIONS}
    swapped.__dict__.update(state, **attributes)
    return swapped
