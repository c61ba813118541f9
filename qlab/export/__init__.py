"""ONNX and encodings files, and the check that the target computes what the simulation did."""
