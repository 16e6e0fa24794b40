"""Pure tensor mathematics of LoQT: tensors in, tensors out; no modules, no process groups, no global state.

* `quantization` packs a matrix into 4-bit NF4 codes and byte-stored scales, in row groups that shard cleanly;
* `low_rank_linear` is the layer's autograd function;
* `projection` finds P from a gradient, dense or sketched;
* `compensation` fits a new (W_q, B) pair to a merged weight;
* `transport` rotates the optimizer's moments into a new basis;
* `orthogonal` finds Muon's step from a Gram matrix;
* `schedule` says at which steps merges happen.
"""
