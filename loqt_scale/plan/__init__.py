"""What a run needs, before it starts: bytes on a rank and on the wire, seconds, what to change to make it fit.

shapes, spread      every parameter; how ranks share it out; `zero` what DeepSpeed makes of that
activations         a pass on tensors without storage: `operations` counts what it does
memory, updates, traffic, speed (on `devices`)     bytes and seconds from these; `planner` has all of it
advice              settings that save memory, until it fits
tables, speed_table     in words; `vocabulary` where there is no tokenizer yet
"""

from loqt_scale.plan.devices import Machine, find_machine
from loqt_scale.plan.planner import Plan, plan_run
from loqt_scale.plan.tables import describe_plan
from loqt_scale.plan.vocabulary import vocabulary_size

__all__ = ["Machine", "Plan", "describe_plan", "find_machine", "plan_run", "vocabulary_size"]
