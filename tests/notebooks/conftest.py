"""The hooks for other processes are not collected: one imported here would refuse us the network, or Bokeh."""

collect_ignore = ["bare", "offline", "refresh.py"]
