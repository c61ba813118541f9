"""A function as a module: what `prepare` puts in the place of an addition, a concatenation, a product in forward."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from qlab.graph.layer_graph import Layer


class Step(nn.Module):
    """One call of a function, with everything but the values of other layers fixed.

    `forward` takes those values in the order of `Layer.inputs`. Capture gives the call the step's own name.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.function = function
        self._args, self._kwargs = args, kwargs

    @classmethod
    def of(cls, layer: Layer) -> "Step":
        """The layer's function with its constants."""
        assert layer.function is not None
        places = {id(source): _Place(number) for number, source in enumerate(layer.inputs)}

        def placed(tree: Any) -> Any:
            return pytree.tree_map(lambda v: places.get(id(v), v), tree, is_leaf=lambda v: isinstance(v, Layer))

        return cls(layer.function, placed(layer.args), placed(layer.kwargs))

    def forward(self, *values: Any) -> Any:
        """The function's result."""

        def filled(tree: Any) -> Any:
            return pytree.tree_map(lambda v: values[v.number] if isinstance(v, _Place) else v, tree)

        return self.function(*filled(self._args), **filled(self._kwargs))

    def _get_name(self) -> str:
        name = getattr(self.function, "__name__", type(self).__name__).split(".")[0]
        return "".join(word.capitalize() for word in name.split("_") if word)

    def extra_repr(self) -> str:
        """The constants, named as the function names them."""
        schema = getattr(self.function, "_schema", None)
        names = [argument.name for argument in schema.arguments] if schema is not None else []
        told = []
        for number, value in enumerate(self._args):
            if not isinstance(value, _Place):
                told.append(f"{names[number]}={value}" if number < len(names) else repr(value))
        told += [f"{name}={value}" for name, value in self._kwargs.items() if not isinstance(value, _Place)]
        return ", ".join(told)


class _Place:
    """Where the value with this number goes."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"#{self.number}"
