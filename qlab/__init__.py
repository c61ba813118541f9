"""A workbench for quantizing PyTorch models inside Jupyter."""
