"""The observable experiment: jobs, events, history and journal, without Jupyter."""
