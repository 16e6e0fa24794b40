"""AdamW in two forms, Muon, learning rates over a run, and access to their moments."""

from loqt_scale.optim.fragment import Fragment, Moment
from loqt_scale.optim.guarded import step_if_finite
from loqt_scale.optim.held import check_held, check_no_lbfgs, check_no_muon_of_experts, parameters_of
from loqt_scale.optim.hooks import when_gradient_is_complete
from loqt_scale.optim.learning_rates import LearningRates, create_scheduler, describe_rates, set_schedule_position
from loqt_scale.optim.moments import ensure_state, moment_names, open_moments, set_update_count
from loqt_scale.optim.muon import StreamedMuon
from loqt_scale.optim.optimizers import create_optimizer, low_rank_parameters, momentum_only
from loqt_scale.optim.per_layer import UpdateInBackward
from loqt_scale.optim.row_shards import RowShards
from loqt_scale.optim.states import forget_states, open_states, state_kinds
from loqt_scale.optim.streamed import StreamedAdamW

__all__ = [
    "Fragment",
    "LearningRates",
    "Moment",
    "RowShards",
    "StreamedAdamW",
    "StreamedMuon",
    "UpdateInBackward",
    "check_held",
    "check_no_lbfgs",
    "check_no_muon_of_experts",
    "create_optimizer",
    "create_scheduler",
    "describe_rates",
    "ensure_state",
    "forget_states",
    "low_rank_parameters",
    "moment_names",
    "momentum_only",
    "open_moments",
    "open_states",
    "parameters_of",
    "set_schedule_position",
    "set_update_count",
    "state_kinds",
    "step_if_finite",
    "when_gradient_is_complete",
]
