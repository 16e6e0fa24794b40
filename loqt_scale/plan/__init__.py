"""What a run will need, before it starts: bytes on a rank, bytes on the wire, what to change to make it fit."""

from loqt_scale.plan.planner import Plan, plan_run
from loqt_scale.plan.tables import describe_plan
from loqt_scale.plan.vocabulary import vocabulary_size

__all__ = ["Plan", "describe_plan", "plan_run", "vocabulary_size"]
