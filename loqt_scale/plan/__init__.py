"""What a run will need, before it starts: bytes on a rank, bytes on the wire, what to change to make it fit."""

from loqt_scale.plan.report import Plan, plan_run, report
from loqt_scale.plan.vocabulary import vocabulary_size

__all__ = ["Plan", "plan_run", "report", "vocabulary_size"]
