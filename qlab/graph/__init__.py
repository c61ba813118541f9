"""A captured model as named layers: capture, patterns, validation and incremental replay."""
