"""QuantSim: the model as the target would compute it, on floating-point hardware.

The simulation interprets the captured graph: a layer runs with its quantized weight, its output passes its quantizer.
Nothing is rewritten, so nothing has to be swapped back; switched off, it computes what the user's model computes.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlab.errors import UnknownLayer, nearest
from qlab.graph import Layer, call_layer, captured
from qlab.graph.kinds import WEIGHTED
from qlab.mapped import mapped_twins
from qlab.progress import Progress, Silent
from qlab.quantization import Quantizer
from qlab.sim.batches import flat_inputs
from qlab.sim.layer_step import LayerStep
from qlab.sim.log import LogEntry, Marks
from qlab.sim.placement import Role, matches_glob, place
from qlab.sim.presets import Preset, checked
from qlab.sim.quantized_layer import QuantizedLayer

if TYPE_CHECKING:
    from concurrent.futures import Executor

    import pandas as pd

    from qlab.export.export import Exported
    from qlab.export.loading import LoadedEncodings
    from qlab.sim.compiled import CompiledSim
    from qlab.sim.evaluate import Evaluation, Measurement


class QuantSim(nn.Module):
    """A copy of `model` that computes as the target would: an ordinary nn.Module that trains, copies and saves.

    model: any nn.Module; it is copied and never changed. example: one batch as the model takes it (tensor, tuple,
    dict, or the first batch of a loader). preset: what the target asks for, default 8 bits. dynamic: axes beside the
    batch whose size may change, such as (2, 3) for height and width. Raises CaptureError where the model cannot be
    captured; qlab.validate(model, example) then lists the places. With on_capture_failure="modules" the sim then calls
    the model as it is and quantizes its modules; what needs to know which layer feeds which raises NeedsCapture.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        preset: Preset | None = None,
        dynamic: Sequence[int] = (),
        on_capture_failure: str = "raise",
    ) -> None:
        super().__init__()
        self.preset = checked(preset)
        self.graph = captured(model, example, dynamic, on_capture_failure)
        self.origin = uuid.uuid4().hex
        self._install(self.graph.root)
        self.eval()
        marks = Marks.of(self)
        self.log = [LogEntry("new", None, None, marks, marks)]

    def _install(self, root: nn.Module) -> None:
        self.model = root
        self.placed = place(self.graph, self.preset)
        self.quantizers = nn.ModuleDict()
        for name, quantizer in self._distinct():
            self.quantizers[name] = quantizer
        self.quantization_enabled = True
        self.qat_mode: str | None = None
        self._steps: list[LayerStep] | None = None

    def _distinct(self) -> Iterator[tuple[str, Quantizer]]:
        """Each quantizer once, keyed by layer and part, with dots replaced as ModuleDict asks."""
        seen: set[int] = set()
        for name, entry in self.placed.items():
            for part, quantizer in (("weight", entry.weight), ("output", entry.output)):
                if quantizer is not None and id(quantizer) not in seen and (part == "weight" or quantizer.name == name):
                    seen.add(id(quantizer))
                    yield f"{name}:{part}".replace(".", "/"), quantizer

    # Layers and settings ----------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> QuantizedLayer:
        """The layer of that name; raises UnknownLayer with the nearest names."""
        try:
            return QuantizedLayer(self.placed[name])
        except KeyError:
            raise UnknownLayer(f"the model has no layer {name!r}. {nearest(name, self.placed)}") from None

    @property
    def layers(self) -> dict[str, QuantizedLayer]:
        """All layers by name, in order of execution."""
        return {name: QuantizedLayer(entry) for name, entry in self.placed.items()}

    def matching(self, pattern: str) -> list[QuantizedLayer]:
        """The layers whose names match a glob; raises UnknownLayer when there is none."""
        found = [QuantizedLayer(entry) for name, entry in self.placed.items() if matches_glob(name, pattern)]
        if not found:
            raise UnknownLayer(f"{pattern!r} matches no layer. {nearest(pattern, self.placed)}")
        return found

    def configure(
        self, pattern: str, weight: dict[str, Any] | None = None, output: dict[str, Any] | None = None
    ) -> None:
        """Changes the settings of every layer that matches the glob; of several calls, the later wins.

        weight, output: settings by name, as in `Quantizer.set`. Nothing is changed where one of them is refused.
        """
        targets: list[tuple[Quantizer, dict[str, Any]]] = []
        for layer in self.matching(pattern):
            if weight and layer.weight is not None:
                targets.append((layer.weight, weight))
            if output and layer.output is not None and layer.role is Role.QUANTIZED:
                targets.append((layer.output, output))
        before = [(quantizer, quantizer.spec, quantizer.enabled, quantizer.frozen) for quantizer, _ in targets]
        try:
            for quantizer, settings in targets:
                quantizer.set(**settings)
        except BaseException:
            for quantizer, spec, enabled, frozen in before:
                quantizer.spec, quantizer.enabled, quantizer.frozen = spec, enabled, frozen
            raise

    @contextmanager
    def quantization_off(self) -> Iterator["QuantSim"]:
        """Within the context nothing is quantized: the sim computes the float model, bit for bit."""
        before = self.quantization_enabled
        try:
            self.quantization_enabled = False
            yield self
        finally:
            self.quantization_enabled = before

    @contextmanager
    def evaluating(self) -> Iterator["QuantSim"]:
        """Within the context every module is in eval mode; afterwards each is in the mode it had."""
        before = {module: module.training for module in self.modules()}
        try:
            self.eval()
            yield self
        finally:
            for module, training in before.items():
                module.training = training

    # Execution --------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result with every enabled quantizer at work; called as the model is."""
        return self.run(self.graph.bind(args, kwargs))

    def run(self, flat: Sequence[Any]) -> Any:
        """The result for the flat inputs that `inputs` gives: what `forward` and `output` call."""
        if not self.quantization_enabled:
            return self.graph.run(flat, call_layer)
        steps = self._steps if self._steps is not None else self._prepared()
        return self.graph.run(flat, lambda layer, args, kwargs: steps[layer.index](layer, args, kwargs, overwrite=True))

    def call(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One layer with its quantized weight, its output rounded; no argument is changed."""
        steps = self._steps if self._steps is not None else self._prepared()
        return steps[layer.index](layer, args, kwargs)

    def compute(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One layer with its quantized weight, its output not rounded: what a quantizer sees."""
        steps = self._steps if self._steps is not None else self._prepared()
        return steps[layer.index].compute(layer, args, kwargs)

    def _prepared(self) -> list[LayerStep]:
        self._steps = [LayerStep(self, layer) for layer in self.graph]
        return self._steps

    def changed(self) -> None:
        """Changes the sim's own bookkeeping after the graph or the placement was edited."""
        self._steps = None

    def fingerprint(self, layer: Layer) -> tuple[Any, ...]:
        """What the layer's own computation depends on, beside its inputs; for `Replay`."""
        entry = self.placed[layer.name]
        parts: list[Any] = [self.quantization_enabled, id(layer.module)]
        if layer.module is not None:
            parts.append(tuple((t._version, t.data_ptr()) for t in _own_tensors(layer.module)))
        elif layer.owner is not None:
            value = getattr(layer.owner, layer.attribute)
            parts.append((value._version, value.data_ptr()))
        if entry.weight is not None:
            _ = entry.weight.encoding  # found now if the weight has changed, so that the version counts it
            parts.append(entry.weight.version)
        if self.preset.int32_bias and layer.kind in WEIGHTED | {"depthwise_conv", "add"}:
            parts += [grid.version for s in layer.inputs if (grid := self.placed[s.name].output) is not None]
            parts.append(-1 if entry.output is None else entry.output.version)
        if entry.role is Role.QUANTIZED and entry.output is not None:
            parts.append(entry.output.version)
        return tuple(parts)

    def input_quantizer(self, layer: Layer) -> Quantizer | None:
        """The quantizer on whose grid the layer's first input lies, None where that is float."""
        return next((self.placed[source.name].output for source in layer.inputs if source.is_float), None)

    def bias_scale(self, layer: Layer) -> Tensor | None:
        """The scale [] or [C] of the layer's int32 bias, input times weight; None where the bias stays float.

        Float it stays where input or weight are not quantized, where the weight has blocks (those have no single scale
        a channel), and where the bias has no place in 32 bits.
        """
        if not self.preset.int32_bias:
            return None
        entry, grid = self.placed[layer.name], self.input_quantizer(layer)
        if entry.weight is None or not entry.weight.enabled or grid is None or not grid.enabled:
            return None
        if grid.encoding is None or grid.encoding.scale.dim():
            return None
        scale = grid.encoding.scale * entry.weight.required_encoding().scale
        if scale.dim() > 1:
            return None
        bias = self.corrected_bias(layer)
        if scale.dim() and bias is not None and len(scale) != len(bias):  # of a transposed convolution in groups
            depthwise = entry.weight.axis == 0
            times = len(bias) // len(scale)
            scale = scale.repeat_interleave(times) if depthwise else scale.repeat(times)
        fits = bias is None or bool(((bias / scale).abs() < 2**31).all())
        return scale if fits else None

    def corrected_bias(self, layer: Layer) -> Tensor | None:
        """The bias of a layer that calls a module, in float, with its correction while the weight is quantized."""
        bias: Tensor | None = getattr(layer.module, "bias", None)
        weight = self.placed[layer.name].weight
        if weight is None or not weight.enabled or weight.bias_correction is None:
            return bias
        return weight.bias_correction if bias is None else bias + weight.bias_correction

    # Calibration and evaluation ---------------------------------------------------------------------------------------

    def calibrate(
        self,
        batches: Any,
        progress: Progress | None = None,
        max_bytes: int | None = None,
        executor: "Executor | None" = None,
    ) -> None:
        """Changes the sim: runs the float model over `batches`, keeps statistics, and finds every encoding.

        batches: any iterable of tensors, tuples, dicts; of (x, y) it takes x. Earlier statistics are replaced; frozen
        encodings stay. On an error or when cancelled the sim is as it was. max_bytes: all batches go through the layers
        together, one layer after the other, so that each weight is read once; activations beyond these bytes wait in a
        file. So it is, with 2 GiB, where weights are mapped (`qlab.map_weights`). executor: the batches are shared
        among its workers (concurrent.futures, dask), which send statistics back; the result is the same. Raises
        InputError for an empty iterable and NonFiniteData where a layer's values hold NaN or infinity, naming batch and
        layer.
        """
        from qlab.sim.calibrate import calibrate

        calibrate(self, batches, progress or Silent(), max_bytes, executor)

    def evaluate(self, score: "Evaluation | Callable[[nn.Module], Any]", quantized: bool = True) -> "Measurement":
        """The score of the sim, or of the float model when `quantized` is False.

        score: Accuracy, Agreement, SQNR, or any function of a model that returns a number.
        """
        from qlab.sim.evaluate import evaluate

        return evaluate(self, score, quantized)

    def float_output(self, batch: Any) -> Any:
        """The float model's result on one batch, labelled or not."""
        with self.quantization_off(), torch.no_grad():
            return self.graph.run(self.inputs(batch), call_layer)

    def output(self, batch: Any) -> Any:
        """The sim's result on one batch, labelled or not, without gradient."""
        with torch.no_grad():
            return self.run(self.inputs(batch))

    def compile(self) -> "CompiledSim":
        """The sim as it is now, through torch.compile: called as the sim is, for inference; later edits are not seen.

        Its results are those of the sim but for values that lie on the edge of a rounding step, which compiled kernels
        may round the other way. Raises InputError where there is no C++ compiler.
        """
        from qlab.sim.compiled import compiled

        return compiled(self)

    def inputs(self, batch: Any) -> list[Any]:
        """The model's flat inputs of one batch, on the sim's device."""
        return flat_inputs(self.graph, batch, self.device)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    # Training ---------------------------------------------------------------------------------------------------------

    def qat(self, mode: str | None, lsq: bool = False) -> list[str]:
        """Changes the sim so that it trains with quantization: call it before the optimizer is built.

        mode: 'regular' keeps activation ranges and finds weight ranges anew at each step; 'range_learning' makes all
        ranges parameters; None ends training, learned ranges stay as frozen encodings. lsq: scale the gradients of
        ranges as LSQ does. Returns what had to be given up (such as an earlier AdaRound), one sentence each.
        Raises NotCalibrated where an encoding is missing.
        """
        from qlab.sim import training

        if mode is None:
            training.stop(self)
            return []
        return training.start(self, mode, lsq)

    def range_parameters(self) -> Iterator[nn.Parameter]:
        """The ranges in training, for an optimizer group of their own; none outside range learning."""
        from qlab.sim.training import range_parameters

        return range_parameters(self)

    # Views of the state -----------------------------------------------------------------------------------------------

    def to_pandas(self) -> "pd.DataFrame":
        """Every quantizer as a row: layer, part, spec, state, scale, zero point, range and SQNR."""
        from qlab.sim.tables import quantizer_table

        return quantizer_table(self)

    def coverage(self) -> "pd.DataFrame":
        """Every tensor-producing step as a row: quantized, fused, inherits or float, with the reason."""
        from qlab.sim.tables import coverage_table

        return coverage_table(self)

    def __repr__(self) -> str:
        from qlab.sim.tables import text

        return text(self)

    def _repr_html_(self) -> str:
        from qlab.sim.tables import html

        return html(self)

    # Files ------------------------------------------------------------------------------------------------------------

    def save(self, path: Any) -> None:
        """Writes weights, quantizers, statistics and settings to one safetensors file, renamed into place."""
        from qlab.sim.files import save

        save(self, path)

    def export(
        self,
        path: Any,
        encodings: str = "1.0.0",
        weights: str = "float",
        formats: Sequence[str] = ("onnx", "encodings", "safetensors"),
        progress: Progress | None = None,
    ) -> "Exported":
        """Writes `path`.onnx and others for a target; on an error no file is new and none is lost. Returns the files.

        formats: 'onnx' writes path.onnx, with QuantizeLinear and DequantizeLinear, and path.float.onnx; 'encodings'
        path.encodings in AIMET's schema `encodings` ('0.6.1', '1.0.0' or '2.0.0'); 'safetensors' the updated weights
        under the model's own parameter names; 'program' path.pt2, a torch.export program. Tensors are called as layers
        are, in all of them. weights: 'float' (quantized on loading) or 'integer' (smaller) in path.onnx. Updated means
        that rounding each weight to nearest gives the integers a technique chose, and that biases are corrected.
        """
        from qlab.export.export import export

        self.graph.require_edges("Export")
        return export(self, path, encodings, weights, formats, progress)

    def load_encodings(
        self,
        path: Any,
        strict: bool = True,
        partial: bool = True,
        freeze: bool = False,
        names: Mapping[str, str] | None = None,
    ) -> "LoadedEncodings":
        """Changes the sim: its grids become those of an encodings file of AIMET or qlab, or none does. Says which.

        strict: an entry that has no place in the sim is an error, with the nearest names; else it is listed. partial:
        quantizers that the file says nothing of stay as they are; False switches them off. freeze: the grids stay when
        new data or a new weight is seen. names: layer or parameter names by the file's, where they cannot be guessed.
        """
        from qlab.export.loading import load_encodings

        return load_encodings(self, path, strict, partial, freeze, names)

    # nn.Module --------------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "QuantSim":
        super()._apply(fn, recurse)
        self._steps = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: None if key == "_steps" else value for key, value in self.__dict__.items()}

    def __reduce__(self) -> Any:
        from qlab.sim.transport import from_bytes, to_bytes

        return from_bytes, (to_bytes(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantSim":
        from copy import deepcopy

        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        memo.update({key: copy for key, copy in mapped_twins(self.model).items() if key not in memo})
        for key in ("_modules", *(k for k in self.__dict__ if k != "_modules")):  # the model before its quantizers
            twin.__dict__[key] = None if key == "_steps" else deepcopy(self.__dict__[key], memo)
        return twin


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
