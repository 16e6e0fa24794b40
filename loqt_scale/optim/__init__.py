"""AdamW in two forms, Muon, their schedule, and access to their moments."""

from loqt_scale.optim.create import (
    create_optimizer,
    create_scheduler,
    learning_rate_factor,
    low_rank_parameters,
    momentum_only,
    set_schedule_position,
)
from loqt_scale.optim.fragment import Fragment, Moment
from loqt_scale.optim.guarded import step_if_finite
from loqt_scale.optim.hooks import when_gradient_is_complete
from loqt_scale.optim.moments import ensure_state, moment_names, open_moments, set_update_count
from loqt_scale.optim.muon import WAVE_VALUES, StreamedMuon
from loqt_scale.optim.per_layer import UpdateInBackward
from loqt_scale.optim.shards import RowShards
from loqt_scale.optim.streamed import StreamedAdamW

__all__ = [
    "WAVE_VALUES",
    "Fragment",
    "Moment",
    "RowShards",
    "StreamedAdamW",
    "StreamedMuon",
    "UpdateInBackward",
    "create_optimizer",
    "create_scheduler",
    "ensure_state",
    "learning_rate_factor",
    "low_rank_parameters",
    "moment_names",
    "momentum_only",
    "open_moments",
    "set_schedule_position",
    "set_update_count",
    "step_if_finite",
    "when_gradient_is_complete",
]
