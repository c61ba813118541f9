"""The observable experiment in plain Python: verbs, events, jobs, history and a script; no Jupyter."""

from qlab.lab.events import LabEvents
from qlab.lab.histogram import HistogramData
from qlab.lab.jobs import Job, JobState
from qlab.lab.lab import Lab
from qlab.lab.rows import LayerRow
from qlab.lab.scores import ScoreRow, Scores

__all__ = ["HistogramData", "Job", "JobState", "Lab", "LabEvents", "LayerRow", "ScoreRow", "Scores"]
