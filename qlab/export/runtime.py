"""An exported ONNX file as ONNX Runtime computes it on this machine's CPU, called as the model is called."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlab.errors import InputError
from qlab.graph import Layer
from qlab.sim import QuantSim

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


class Target(nn.Module):
    """The file behind the model's own signature; results have the model's structure.

    source: the path of a file, or a serialised model. optimised: with the runtime's graph optimisations, which turn
    Q/DQ into integer kernels; without them every operator runs as written. threads: of the runtime. written_to: where
    the runtime puts the graph that it runs in the end.
    """

    def __init__(
        self,
        sim: QuantSim,
        source: str | os.PathLike[str] | bytes,
        optimised: bool = True,
        threads: int = 1,
        written_to: Path | None = None,
    ) -> None:
        super().__init__()
        self._graph = sim.graph
        self._device = sim.device
        self._session = _session(source, optimised, threads, written_to)
        self._inputs = [layer for layer in sim.graph.input_layers if layer.shape is not None]
        self._outputs = [output for output in sim.graph.outputs if isinstance(output, Layer)]
        taken = [slot.name for slot in self._session.get_inputs()]
        strange = [name for name in taken if name not in {layer.name for layer in self._inputs}]
        if strange or len(self._session.get_outputs()) < len(self._outputs):
            raise InputError(
                f"the file takes {', '.join(map(repr, taken))} and gives {len(self._session.get_outputs())} results; "
                f"the sim takes {', '.join(repr(layer.name) for layer in self._inputs)} and gives "
                f"{len(self._outputs)}. Export this sim: sim.export(path)."
            )
        self._taken = set(taken)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result for its own arguments."""
        return self.of(self._graph.bind(args, kwargs))

    def of(self, flat: list[Any]) -> Any:
        """The model's result for its flat inputs."""
        return self._structured(self.run(flat))

    def run(self, flat: list[Any], names: list[str] | None = None) -> list[Tensor]:
        """The values of the file's results, or of those named."""
        wanted = names or [slot.name for slot in self._session.get_outputs()[: len(self._outputs)]]
        return [torch.from_numpy(value) for value in self._session.run(wanted, self.feeds(flat))]

    def feeds(self, flat: list[Any]) -> dict[str, Any]:
        """The flat inputs as the runtime takes them."""
        given = zip(self._graph.input_layers, flat, strict=True)
        return {layer.name: v.detach().cpu().numpy() for layer, v in given if layer.name in self._taken}

    def results(self, output: Any) -> list[Tensor]:
        """The tensors of the model's result (of the sim, say) in the order of `run`."""
        from torch.utils import _pytree as pytree

        leaves = pytree.tree_leaves(output, is_leaf=lambda v: v is None)
        return [v for v, o in zip(leaves, self._graph.outputs, strict=True) if isinstance(o, Layer)]

    @property
    def outputs(self) -> list[Layer]:
        """The layers whose values are the results."""
        return self._outputs

    @property
    def session(self) -> "InferenceSession":
        """The runtime's session."""
        return self._session

    def _structured(self, tensors: list[Tensor]) -> Any:
        values: list[Any] = [None] * len(self._graph)
        for layer, value in zip(self._outputs, tensors, strict=True):
            values[layer.index] = value.to(self._device)
        return self._graph.result(values)


def version() -> str:
    """What runs the files, with its version."""
    import onnxruntime

    return f"ONNX Runtime {onnxruntime.__version__}"


def _session(
    source: str | os.PathLike[str] | bytes, optimised: bool, threads: int, written_to: Path | None
) -> "InferenceSession":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    if written_to is not None:
        options.optimized_model_filepath = str(written_to)
    given = source if isinstance(source, bytes) else os.fspath(source)
    if isinstance(given, str) and not Path(given).is_file():
        raise InputError(f"there is no file {given!r}. sim.export(path) writes path.onnx.")
    try:
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        first = str(error).splitlines()[0][:300]
        raise InputError(
            f"ONNX Runtime cannot run {'the model' if isinstance(given, bytes) else given}: {first}"
        ) from (error)
