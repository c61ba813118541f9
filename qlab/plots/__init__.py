"""DataFrame in, Bokeh figure out."""
