"""The plan for seven billion parameters: its figures are computed, its code runs."""

import doctest
import re
from pathlib import Path

import torch
from torch import nn

import qlab
from qlab.quantization.statistics import BINS
from qlab.sim.tensor_file import write_tensors
from qlab.sim.transport import to_bytes
from qlab.techniques.layer_rounding import _BYTES_AN_ENTRY

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def test_every_figure_of_the_page_is_computed_there():
    text = re.sub(r"^```.*$", "", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    page = doctest.DocTestParser().get_doctest(text, {}, "scale.md", str(PAGE), 0)
    found = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(page)
    assert found.attempted > 35
    assert found.failed == 0


def test_the_page_counts_with_the_sizes_that_the_code_has():
    text = PAGE.read_text(encoding="utf-8")
    assert f"{BINS:,} counts" in text
    assert f"{_BYTES_AN_ENTRY} bytes\nfor every pair" in text
    assert qlab.GPTQ().memory == qlab.AdaRound().memory == 2048
    assert re.search(r"2 GiB unless given", text)


def test_a_block_has_the_parameters_that_the_page_says():
    width, wide = 4096, 11008
    with torch.device("meta"):
        block = nn.ModuleList(
            [nn.Linear(width, width, bias=False) for _ in range(4)]
            + [nn.Linear(width, wide, bias=False), nn.Linear(width, wide, bias=False)]
            + [nn.Linear(wide, width, bias=False), nn.RMSNorm(width), nn.RMSNorm(width)]
        )
    assert round(sum(p.numel() for p in block.parameters()) / 1e6) == 202


def test_a_mapped_sim_travels_to_workers_with_its_weights(tmp_path):
    """What the page says of executors: the bytes sent hold the model."""
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    path, x = tmp_path / "weights.safetensors", torch.randn(2, 256)
    write_tensors(path, dict(model.state_dict()), {})
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    qlab.map_weights(empty, path)
    size = sum(p.numel() * 4 for p in model.parameters())
    sim = qlab.QuantSim(empty, x)
    sim.calibrate([x])
    assert size < len(to_bytes(sim)) < 2 * size
