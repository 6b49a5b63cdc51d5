"""A training's state as a checkpoint holds it: tensors and JSON values by their paths."""

from typing import Any

from torch import Tensor


def split_state(
    state: dict[str, Any], prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Nested dicts into tensors and JSON values, each by its path `a/b/c`."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for key, value in state.items():
        path = f"{prefix}{key}"
        if isinstance(value, Tensor):
            tensors[path] = value.detach()
        elif isinstance(value, dict) and value:
            inner_tensors, inner_values = split_state(value, f"{path}/")
            tensors.update(inner_tensors)
            values.update(inner_values)
        else:
            values[path] = value
    return tensors, values


def join_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split_state`."""
    state: dict[str, Any] = {}
    for path, value in {**values, **tensors}.items():
        *parents, leaf = path.split("/")
        inner = state
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = value
    return state
