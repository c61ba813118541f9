"""An analysis on one page that opens offline, and its tables as JSON beside it."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from qlab.analysis.analysis import Analysis

TABLES = ("summary", "enabled", "disabled", "noise", "estimate", "correlation", "ranges", "histograms")
_SCORES = ["layer", "part", "bits", "score", "error", "change", "change_error", "sqnr", "sqnr_error", "kl", "note"]


def save_report(analysis: "Analysis", path: Path) -> Path:
    """Writes `path` and the tables to the same name with .json; see Analysis.save."""
    require_writable(path.parent)
    from qlab.plots import save_html

    save_html(path, f"Quantization analysis: {analysis.score_name}", _sections(analysis))
    write_json(path.with_suffix(".json"), to_json(analysis), indent=None)
    return path


def to_json(analysis: "Analysis") -> dict[str, Any]:
    """The analysis as plain values: tables as {"columns", "rows"}, NaN as null, infinity as "inf"."""
    tables = {name: _table(getattr(analysis, name)) for name in TABLES}
    return {
        "format": "qlab-analysis-1",
        "score": {"name": analysis.score_name, "unit": analysis.score_unit},
        "bits": list(analysis.bits),
        "samples": analysis.samples,
        "seconds": analysis.seconds,
        "forwards": analysis.work.forwards,
        "forwards_of_full_runs": analysis.brute_force.forwards,
        "notes": list(analysis.notes),
        "units": [{"layer": unit.layer, "part": unit.part, "layers": list(unit.layers)} for unit in analysis.units],
        **tables,
    }


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Writes strict JSON beside `path` and renames it into place."""
    text = json.dumps(plain(value), indent=indent, allow_nan=False)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        Path(beside).chmod(0o666 & ~mask)  # mkstemp's are the owner's alone: a colleague could not read them
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def plain(value: Any) -> Any:
    """`value` as JSON knows it: NaN becomes null, infinities become words."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def require_writable(folder: Path) -> None:
    """Raises OSError saying what to do where nothing can be written, before any work is done."""
    try:
        handle, beside = tempfile.mkstemp(dir=folder, prefix=".qlab.", suffix=".part")
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(
            error.errno, f"cannot write to '{folder}': {reason}. Choose a folder that exists and is writable."
        ) from None
    os.close(handle)
    os.unlink(beside)


def _sections(analysis: "Analysis") -> list[Any]:
    from qlab.plots import Section

    work, full = analysis.work.forwards, analysis.brute_force.forwards
    told = (
        f"{analysis.score_name} on {analysis.samples} samples; {len(analysis.units)} layers at "
        f"{', '.join(analysis.bits)} bits. Errors are standard errors; changes are paired, sample by sample. The "
        f"sweeps took the work of {work:.0f} forwards; {full:.0f} full runs give the same numbers."
    )
    sections = [
        Section("Weights or activations", [told, *analysis.notes, analysis.plot("summary"), _shown(analysis.summary)])
    ]
    for mode, title in (("enabled", "Only this layer quantized"), ("disabled", "All but this layer quantized")):
        table = analysis.table(mode)
        if len(table):
            sections.append(Section(title, [analysis.plot(mode), _shown(table)]))
    sections.append(Section("Noise of layers", [analysis.plot("noise"), analysis.noise]))
    if len(analysis.estimate):
        note = "Estimated from one pass; the rank correlation says how far the estimate can be trusted here."
        sections.append(Section("Estimate", [note, analysis.correlation, analysis.plot("estimate"), analysis.estimate]))
    ranges = [analysis.plot("ranges", part=part) for part in ("weight", "output")]
    return [*sections, Section("Ranges of channels", ranges)]


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    columns = ["mode", *_SCORES[2:]] if len(table) and not any(table.layer) else _SCORES
    return table[columns].reset_index(drop=True)


def _table(frame: pd.DataFrame) -> dict[str, Any]:
    return {"columns": list(frame.columns), "rows": frame.to_numpy(dtype=object).tolist()}
