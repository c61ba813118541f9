"""Specs, encodings, statistics, range rules and quantizers: everything that knows tensors only."""

from qlab.quantization.encoding import Encoding
from qlab.quantization.fake_quantize import dequantize, fake_quantize, fake_quantize_, quantize
from qlab.quantization.learned_range import LearnedRange
from qlab.quantization.quantizer import Quantizer, QuantizerState
from qlab.quantization.ranges import encoding_of_range, error_of_range, find_encoding
from qlab.quantization.spec import (
    PER_CHANNEL,
    PER_TENSOR,
    RULE_NAMES,
    SCHEME_NAMES,
    Granularity,
    QuantSpec,
    RangeRule,
    Scheme,
    per_block,
)
from qlab.quantization.statistics import Sample, Statistics
from qlab.quantization.weight_quantizer import WeightQuantizer

__all__ = [
    "PER_CHANNEL",
    "PER_TENSOR",
    "RULE_NAMES",
    "SCHEME_NAMES",
    "Encoding",
    "Granularity",
    "LearnedRange",
    "QuantSpec",
    "Quantizer",
    "QuantizerState",
    "RangeRule",
    "Sample",
    "Scheme",
    "Statistics",
    "WeightQuantizer",
    "dequantize",
    "encoding_of_range",
    "error_of_range",
    "fake_quantize",
    "fake_quantize_",
    "find_encoding",
    "per_block",
    "quantize",
]
