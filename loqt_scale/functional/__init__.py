"""Pure tensor mathematics of LoQT: tensors in, tensors out; no modules, no process groups, no global state.

what is stored   `quantization` packs a matrix into codes and scales, in row groups that shard cleanly; `schemes` has
                 the ways to do so, `nf4_cpu` a fast one; `blockwise` 8-bit moments, `rounding` bfloat16 at random
a layer          `low_rank_linear` is its autograd function, `low_rank_experts` that of experts, on `grouped` products;
                 `dense_weight` is W_eff for who reads it; `linear_cross_entropy` is the loss of the head
a merge          `merge_steps` says at which steps; `projection` finds P from a gradient, dense or sketched;
                 `compensation` fits a new (W_q, B) to the merged weight, `loftq` does so at the start; `transport`
                 rotates moments; `survival` says how much of the update is left
an optimizer     `orthogonal` finds Muon's step from a Gram matrix
all              `seeding` (random numbers), `shares` (what N ranks divide), `operator_flops`, `defaults` (torch's)
"""
