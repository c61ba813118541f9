"""What becomes of activation ranges when a technique has changed the values they were measured on."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from qlab.graph import Layer
from qlab.progress import Progress
from qlab.quantization import Quantizer
from qlab.sim import QuantSim
from qlab.sim.batches import Batches


def renew_ranges(sim: QuantSim, layers: Iterable[Layer], batches: Batches | None, progress: Progress) -> str:
    """Changes `sim`: ranges of `layers`, whose values have changed, are measured again or forgotten.

    With `batches` the whole sim is calibrated on them; without, what was measured of these layers is forgotten, so that
    nothing computes on a stale grid. Frozen ranges thaw. A sim that was not calibrated is left alone. Returns what to
    tell the person, '' where nothing was stale.
    """
    stale: dict[Quantizer, None] = {}
    for layer in layers:
        quantizer = sim.placed[layer.name].output
        if quantizer is not None and quantizer.spec.known_range is None and quantizer.encoding is not None:
            stale[quantizer] = None
    if not stale:
        return ""
    frozen = [quantizer.name for quantizer in stale if quantizer.frozen]
    thawed = f" Frozen ranges thawed, for their values have changed: {', '.join(frozen)}." if frozen else ""
    for quantizer in stale:
        quantizer.keep_learned_range()
        quantizer.frozen = False
    if batches is not None:
        sim.calibrate(batches, progress)
        return f"activation ranges were measured again on the batches given.{thawed}"
    for quantizer in stale:
        quantizer.reset()
    return (
        f"the values of {len(stale)} activation quantizers have changed and their ranges are forgotten: run "
        f"sim.calibrate(batches), or give batches to apply.{thawed}"
    )


def hand_over_ranges(sim: QuantSim, source: Layer, layers: Sequence[Layer]) -> tuple[list[Layer], str]:
    """Changes `sim`: `layers` now have the values that `source` had, so their quantizers take over what it knows.

    Returns the layers for which `source` knows nothing, and what to tell the person.
    """
    known = sim.placed[source.name].output
    thawed: dict[str, None] = {}
    unknown = []
    for layer in layers:
        quantizer = sim.placed[layer.name].output
        if quantizer is None or quantizer is known:
            continue
        if known is None or (known.encoding is None and quantizer.encoding is not None):
            unknown.append(layer)
            continue
        state, same = known.state(), quantizer.spec == known.spec
        held = same and (state.frozen or state.learned is not None)
        if quantizer.frozen and not held:
            thawed[quantizer.name] = None
        quantizer.set_state(replace(state, spec=quantizer.spec, enabled=quantizer.enabled, frozen=held, learned=None))
        quantizer.refresh()
    return unknown, f"frozen ranges thawed, for their values have changed: {', '.join(thawed)}." if thawed else ""
