"""Techniques that win back accuracy, one file each; importing one here is all it takes to offer it."""

from qlab.techniques.adaround import AdaRound
from qlab.techniques.auto_quant import AutoQuant
from qlab.techniques.auto_quant_result import AutoQuantResult
from qlab.techniques.batch_norm_folding import BatchNormFolding
from qlab.techniques.batch_norm_reestimation import BatchNormReestimation
from qlab.techniques.bias_correction import BiasCorrection
from qlab.techniques.cross_layer_equalization import CrossLayerEqualization
from qlab.techniques.gptq import GPTQ
from qlab.techniques.mixed_precision import MixedPrecision
from qlab.techniques.qat import QAT
from qlab.techniques.sequential_mse import SequentialMSE
from qlab.techniques.stages import StageRecord, Steering
from qlab.techniques.technique import TECHNIQUES, Report, Technique
from qlab.techniques.training_control import TrainingControl, TrainingStep

__all__ = [
    "GPTQ",
    "QAT",
    "TECHNIQUES",
    "AdaRound",
    "AutoQuant",
    "AutoQuantResult",
    "BatchNormFolding",
    "BatchNormReestimation",
    "BiasCorrection",
    "CrossLayerEqualization",
    "MixedPrecision",
    "Report",
    "SequentialMSE",
    "StageRecord",
    "Steering",
    "Technique",
    "TrainingControl",
    "TrainingStep",
]
