"""The quantized simulation of a captured model: placement, calibration, evaluation, snapshots."""
