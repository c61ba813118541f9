"""The files that AIMET's QuantAnalyzer leaves, under its names, so that scripts that read them keep working.

per_layer_quant_enabled.json, per_layer_quant_disabled.json and per_layer_mse_loss.json map layer to number, each with
a page beside it; min_max_ranges/weights.json and activations.json map tensor to the (min, max) of its grid, or of each
channel's; activations_pdf/ and weights_pdf/<layer>/ hold histograms. Where AIMET writes a page a channel, one page
shows the whole tensor. Several widths: the first has AIMET's names, others a suffix.
"""

import errno
import html
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from qlab.analysis.pictures import ranges_of, sensitivity_frame, stored_histogram
from qlab.analysis.report import require_writable, write_json

if TYPE_CHECKING:
    from qlab.analysis.analysis import Analysis

_PAGE = '<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n<body>{picture}</body></html>\n'


def export_files(analysis: "Analysis", folder: Path) -> Path:
    """Writes all files aside and moves them into `folder`; see Analysis.export."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(error.errno, f"cannot make '{folder.parent}': {reason}. Choose another folder.") from None
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"'{folder}' is a file, not a folder. Choose another folder.")
    require_writable(folder if folder.is_dir() else folder.parent)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        _write_scores(analysis, aside)
        _write_noise(analysis, aside)
        _write_ranges(analysis, aside / "min_max_ranges")
        _write_histograms(analysis, aside)
        for file in sorted(path for path in aside.rglob("*") if path.is_file()):
            target = folder / file.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def file_names(layers: Iterable[str]) -> dict[str, str]:
    """Each layer's name as a file name of its own: letters, digits and . _ - @ stay.

    >>> file_names(["../<b>conv", "layer1.0.conv@1", "a/b", "a_b"])
    {'../<b>conv': '_.__b_conv', 'layer1.0.conv@1': 'layer1.0.conv@1', 'a/b': 'a_b', 'a_b': 'a_b_'}
    """
    found: dict[str, str] = {}
    for layer in dict.fromkeys(layers):
        name = re.sub(r"^\.|[^\w.@-]", "_", layer, flags=re.ASCII) or "_"
        while name in found.values():
            name += "_"
        found[layer] = name
    return found


def _write_scores(analysis: "Analysis", folder: Path) -> None:
    from qlab import plots

    for mode in ("enabled", "disabled"):
        table = analysis.table(mode)
        for number, bits in enumerate(analysis.bits):
            rows = table[table.bits == bits]
            if not len(rows):
                continue
            frame, baseline = sensitivity_frame(rows, mode, analysis.summary)
            base = f"per_layer_quant_{mode}" + (f"_{bits}" if number else "")
            write_json(folder / f"{base}.json", dict(zip(frame.layer, rows.score.tolist(), strict=True)))
            plots.sensitivity(frame, baseline=baseline, score_name=analysis.score_name).save(folder / f"{base}.html")


def _write_noise(analysis: "Analysis", folder: Path) -> None:
    noise = analysis.noise
    write_json(folder / "per_layer_mse_loss.json", dict(zip(noise.layer, noise.mse.tolist(), strict=True)))
    analysis.plot("noise").save(folder / "per_layer_mse_loss.html")


def _write_ranges(analysis: "Analysis", folder: Path) -> None:
    folder.mkdir()
    found: dict[str, dict[str, Any]] = {"weight": {}, "output": {}}
    files = file_names(analysis.ranges.layer)
    ranges = analysis.ranges.dropna(subset=["grid_min", "grid_max"])
    for (layer, part), rows in ranges.groupby(["layer", "part"], sort=False):
        name = f"{layer}_weight" if part == "weight" else f"{layer}_output_0"
        pairs = rows[["grid_min", "grid_max"]].to_numpy().tolist()
        if all(pair == pairs[0] for pair in pairs):
            found[part][name] = pairs[0]
        else:
            found[part][name] = {f"{name}_{i}": pair for i, pair in enumerate(pairs)}
            picture = ranges_of(analysis.ranges, layer, part)
            _write_page(folder / f"{files[layer]}{name.removeprefix(layer)}.html", name, picture)
    for part, file in (("weight", "weights"), ("output", "activations")):
        write_json(folder / f"{file}.json", found[part])
        analysis.plot("ranges", part=part).save(folder / f"{file}.html")


def _write_histograms(analysis: "Analysis", folder: Path) -> None:
    files = file_names(analysis.histograms.layer)
    for layer, part in _tensors(analysis.histograms):
        if part == "weight":
            path = folder / "weights_pdf" / files[layer] / "weight_0.html"
        else:
            path = folder / "activations_pdf" / f"{files[layer]}_output_0.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_page(path, f"{layer} {part}", stored_histogram(analysis, layer, part))


def _write_page(path: Path, title: str, plot: Any) -> None:
    path.write_text(_PAGE.format(title=html.escape(title), picture=plot.to_svg()), encoding="utf-8")


def _tensors(frame: pd.DataFrame) -> Iterable[tuple[str, str]]:
    return dict.fromkeys(zip(frame.layer, frame.part, strict=True))
