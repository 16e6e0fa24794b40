"""What a run needs, before it starts: bytes on a rank and on the wire, seconds, what to change to make it fit."""

from loqt_scale.plan.devices import Machine, find_machine
from loqt_scale.plan.planner import Plan, plan_run
from loqt_scale.plan.tables import describe_plan
from loqt_scale.plan.vocabulary import vocabulary_size

__all__ = ["Machine", "Plan", "describe_plan", "find_machine", "plan_run", "vocabulary_size"]
