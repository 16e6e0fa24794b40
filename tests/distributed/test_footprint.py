"""What sharding promises, measured: bytes held, bytes allocated in passing, bytes on the wire.

    held      of every kind of tensor a rank holds 1/N of what one process holds, plus one row group a tensor
    passing   start-up and merges add one layer's dense float32 *shard*, packed copies of it, low-rank tensors, chunks
    wire      steps and merges send what shapes predict: packed bytes and low-rank tensors, never a dense weight

Every expectation comes from shapes or from the single process, every measurement from live storages, the allocator's
log and the collectives themselves (see `footprint_tasks`). The model is wide and its rank small, so that one dense
layer is larger than all that may take its place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loqt_scale.config import SubspaceConfig
from loqt_scale.functional.low_rank_linear import resolve_side
from loqt_scale.functional.projection import VALIDATION_COLUMNS, sketch_width
from loqt_scale.functional.quantization import MatrixLayout
from loqt_scale.model import weights
from tests.distributed.pool import RankPool

HIDDEN, INTERMEDIATE, BLOCKS, RANK, ROUNDS = 512, 1376, 2, 8, 2
WIDE: dict[str, Any] = {
    "model.overrides": {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "loqt.rank": RANK,
    "loqt.merge.gap": 2,
    "loqt.merge.compensation_rounds": ROUNDS,
    "train.global_batch_size": 6,
    "train.micro_batch_size": 2,
}
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]  # (O, I) in a block
DENSE_VALUES = [rows * cols for rows, cols in SHAPES]
FLOAT = 4  # bytes
ENDS = 3  # units that are no block: each is gathered once a pass
Run = Callable[..., list[Any]]


@pytest.fixture
def run(ranks: RankPool, tmp_path: Path, text_file: Path, cache_dir: Path) -> Run:
    """Runs a task of `footprint_tasks` on the wide model; results by rank."""

    return run_on(ranks, tmp_path, text_file, cache_dir)


@pytest.fixture
def run_on_three(three_ranks: RankPool, tmp_path: Path, text_file: Path, cache_dir: Path) -> Run:
    """The same in the processes for ZeRO stage 3 on 3 ranks."""
    return run_on(three_ranks, tmp_path, text_file, cache_dir)


def run_on(pool: RankPool, tmp_path: Path, text_file: Path, cache_dir: Path) -> Run:
    def call(task: str, world_size: int, strategy: str, **settings: Any) -> list[Any]:
        common = {"data.files": [str(text_file)], "data.cache_dir": str(cache_dir), "train.run_dir": str(tmp_path)}
        arguments = {**WIDE, **common, "parallel.strategy": strategy, **settings}
        return pool.run(world_size, f"tests.distributed.footprint_tasks:{task}", **arguments)

    return call


@pytest.fixture(scope="module")
def whole_known() -> dict[str, dict[str, Any]]:
    """What one process holds, once it has been measured."""
    return {}


@pytest.fixture
def wholes(run: Run, whole_known: dict[str, dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """What one process holds under some settings."""

    def call(**settings: Any) -> dict[str, Any]:
        key = repr(settings)
        if key not in whole_known:
            whole_known[key] = run("held_bytes", 1, "single", **settings)[0]
        return whole_known[key]

    return call


@pytest.fixture
def whole(wholes: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What one process holds."""
    return wholes()


@pytest.fixture(scope="module")
def traffic_known() -> dict[Any, dict[str, Any]]:
    """Runs of `traffic` that more than one test looks at."""
    return {}


@pytest.fixture
def fsdp_traffic(run: Run, traffic_known: dict[Any, dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
    """Rank 0's collectives on 2 ranks (float32, blocks gathered twice) or on 3 (bfloat16, blocks stay gathered)."""

    def call(world_size: int) -> dict[str, Any]:
        if world_size not in traffic_known:
            settings = {} if world_size == 2 else {"model.dtype": "bfloat16", "parallel.reshard_after_forward": False}
            traffic_known[world_size] = run("traffic", world_size, "fsdp", **settings)[0]
        return traffic_known[world_size]

    return call


# ---- held --------------------------------------------------------------------------------------------------------


def test_a_rank_holds_its_share_of_every_kind(run: Run, whole: dict[str, Any]) -> None:
    """1/N of each kind plus a row group a tensor, after merges; and no tensor hides beside the model and optimizer."""
    kinds = {"codes", "scales", "projection", "factor", "full_precision", "gradients", "adam"}
    assert set(whole["held"]) == kinds and all(whole["held"].values())
    for world_size in (2, 3):
        for rank, result in enumerate(run("held_bytes", world_size, "fsdp")):
            for kind in kinds:
                held, limit = result["held"][kind], whole["held"][kind] / world_size + whole["rows"][kind]
                assert held <= limit, f"rank {rank} of {world_size} holds {held} bytes of {kind}, allowed are {limit}"
            named = sum(size for kind, size in result["held"].items() if kind != "gradients")
            extra = result["live"] - named
            # the weight source keeps its last drawn chunk; rotary tables and a few scalars are replicated
            allowed = FLOAT * weights.CHUNK_ELEMENTS + 16 * 1024
            assert extra <= allowed, f"rank {rank} of {world_size}: {extra} bytes beside the model, allowed {allowed}"


INT8 = {"optim.states": "int8", "loqt.rank": 32}
STAGES = [(2, 1, {}), (2, 2, {}), (2, 3, {}), (2, 3, INT8)]
STAGES_LONG = [
    pytest.param(*case, marks=pytest.mark.long) for case in [(3, 3, {}), (2, 1, INT8), (2, 2, INT8), (3, 3, INT8)]
]


@pytest.mark.parametrize(("world_size", "stage", "settings"), [*STAGES, *STAGES_LONG])
def test_a_rank_holds_what_its_zero_stage_says(
    run: Run,
    run_on_three: Run,
    wholes: Callable[..., dict[str, Any]],
    world_size: int,
    stage: int,
    settings: dict[str, Any],
) -> None:
    """Stage 3: 1/N of every kind plus padding. Stages 1 and 2: states and masters; the packed base is whole.

    Under stage 3 no parameter is sent when a run starts, nor when it takes a checkpoint's values.
    Moments in 8 bits are a quarter of those in float32, and a scale for every 32 values of B (256 of other rows).
    """
    call = run_on_three if world_size == 3 else run
    whole = wholes(**settings)
    sharded = {"adam", "masters"}
    if stage == 3:
        sharded |= {"codes", "scales", "projection", "factor", "full_precision"}
    sizes = {**whole["held"], "masters": whole["held"]["factor"] + whole["held"]["full_precision"]}
    rows = {**whole["rows"], "masters": whole["rows"]["factor"] + whole["rows"]["full_precision"]}
    for rank, result in enumerate(call("held_bytes", world_size, "zero", **{"parallel.zero_stage": stage}, **settings)):
        held = result["held"]
        in_float32 = 2 * held["masters"]
        assert held["adam"] <= in_float32 * (0.29 if settings else 1.0)
        for kind in sizes.keys() - {"gradients"}:
            limit = sizes[kind] / world_size + rows[kind] if kind in sharded else sizes[kind]
            assert 0 < held[kind] <= limit, f"rank {rank}: {held[kind]} bytes of {kind}, allowed are {limit}"
        if stage < 3:
            assert held["codes"] == sizes["codes"] and held["scales"] == sizes["scales"]
        extra = result["live"] - sum(size for kind, size in held.items() if kind != "gradients")
        # the weight source's last chunk, rotary tables; DeepSpeed's bucket, in which it reduces gradients, and under
        # stage 3 its shard of them, which it keeps between steps
        buffers = sizes["masters"] * (1 if stage < 3 else 1 + 1 / world_size)
        allowed = FLOAT * weights.CHUNK_ELEMENTS + 32 * 1024 + buffers
        assert extra <= allowed, f"rank {rank}: {extra} bytes beside the model, allowed {allowed}"
        for begun, words in (("start", 8 * 1024), ("filled", 0)):  # a run's settings are compared in words
            sent = sum(size for _, size, _ in result[begun])
            assert sent <= words if stage == 3 else sent > sizes["codes"], f"{begun}: {sent} bytes"


# ---- passing -----------------------------------------------------------------------------------------------------

CHUNK_VALUES = 2**13
CHUNK_BYTES = 32 * CHUNK_VALUES  # a chunk's weight, target, low-rank rows, residual and what quantize_4bit makes of it
PACKED_SHARDS = 3  # codes and scales of a shard: the best round's, and this round's in pieces and joined
LOW_RANK_COPIES = 4  # of P and of B, whole: old, new, its pseudo-inverse; old, zero, best, new
# W itself: a merge adds no second dense shard
DENSE_SHARDS = 1


def passing_limit(world_size: int) -> int:
    """Bytes that a merge may add on a rank: the largest layer's dense shard and the scratch named above."""
    shard = FLOAT * -(-max(DENSE_VALUES) // world_size)
    packed = shard * 9 // 64  # half a byte a value and four bytes a block of 64
    low_rank = FLOAT * RANK * (HIDDEN + INTERMEDIATE)
    return DENSE_SHARDS * shard + PACKED_SHARDS * packed + LOW_RANK_COPIES * low_rank + CHUNK_BYTES


def test_startup_and_merges_pass_through_one_shard_at_a_time(run: Run) -> None:
    world_size = 2
    shard = FLOAT * max(DENSE_VALUES) // world_size
    all_shards = FLOAT * BLOCKS * sum(DENSE_VALUES) // world_size
    limit = passing_limit(world_size)
    assert limit < all_shards / 3, "the model is too small to tell one layer from all"
    for rank, result in enumerate(run("transient_bytes", world_size, "fsdp", chunk_values=CHUNK_VALUES)):
        for name, made in result.items():
            allowed = shard if name == "build" else limit
            assert 0 < made.passing <= allowed, (
                f"rank {rank}: {name} allocated {made.passing} bytes in passing, allowed are {allowed}; one layer's "
                f"dense shard is {shard}, all layers' are {all_shards}; largest at the peak: {made.largest}"
            )
            # the weight source keeps its last chunk, gloo's thread may still hold the last B that it summed
            left = FLOAT * (2 * CHUNK_VALUES + RANK * (HIDDEN + INTERMEDIATE))
            assert name == "build" or made.kept <= left, f"{name} left {made.kept} bytes behind, allowed are {left}"


# ---- wire --------------------------------------------------------------------------------------------------------


def padded_bytes(parameter: dict[str, Any], world_size: int, float_bytes: int = FLOAT) -> int:
    """Bytes of a parameter on the wire: dim 0 padded to N equal shards, floats in the dtype of the message."""
    first, *rest = parameter["shape"]
    values = -(-first // world_size) * world_size * math.prod(rest)
    return values * (float_bytes if parameter["floating"] else parameter["itemsize"])


def units_of(parameters: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Parameters by FSDP2's unit of communication: the embedding's, the last norm's, the head's, then each block's."""
    units: dict[str, list[dict[str, Any]]] = {"embed_tokens": [], "norm": [], "lm_head": []}
    for parameter in parameters:
        outside, found, after = parameter["name"].partition("layers.")
        units.setdefault(after.partition(".")[0] if found else outside.split(".")[-2], []).append(parameter)
    return list(units.values())


def predicted_step(result: dict[str, Any], world_size: int, *, reshard: bool, gathered_float: int) -> Counter[Any]:
    """(kind, bytes) of every collective of an fsdp step, from shapes alone."""
    parameters = result["parameters"]
    messages: Counter[Any] = Counter()
    for index, unit in enumerate(units_of(parameters)):
        gathers = result["micro_steps"] * (2 if reshard and index >= ENDS else 1)
        messages["all_gather", sum(padded_bytes(p, world_size, gathered_float) for p in unit)] += gathers
        messages["reduce_scatter", sum(padded_bytes(p, world_size) for p in unit if p["trains"])] += 1
    messages["all_reduce", 3 * FLOAT] += 1  # the loss, where the rank believes to be, whether it was told to stop
    messages["all_reduce", FLOAT] += 1  # the gradient's norm
    return messages


def sent(messages: list[tuple[str, int, str]]) -> Counter[Any]:
    """(kind, bytes) of every collective that was seen."""
    return Counter((kind, size) for kind, size, _ in messages)


def assert_all_seen(messages: list[Any], backend: dict[str, int]) -> None:
    """The counter saw as many collectives as gloo ran (gloo runs a reduce-scatter as an all-reduce)."""
    seen = Counter("all_reduce" if kind == "reduce_scatter" else kind for kind, _, _ in messages)
    assert seen == Counter(backend)


@pytest.mark.parametrize(("world_size", "gathered_float", "reshard"), [(2, 4, True), (3, 2, False)])
def test_a_step_sends_packed_bytes_and_low_rank_tensors(
    fsdp_traffic: Callable[[int], dict[str, Any]], world_size: int, gathered_float: int, reshard: bool
) -> None:
    result = fsdp_traffic(world_size)
    expected = predicted_step(result, world_size, reshard=reshard, gathered_float=gathered_float)
    assert sent(result["step"]) == expected
    assert_all_seen(result["step"], result["step_backend"])
    smallest_dense, dense_block = 2 * min(DENSE_VALUES), 2 * sum(DENSE_VALUES)  # bfloat16
    for unit in units_of(result["parameters"])[ENDS:]:
        floats = sum(padded_bytes(p, world_size) for p in unit if p["floating"])
        assert floats < smallest_dense, "B and norms of a block: less than one dense weight"
        assert sum(padded_bytes(p, world_size) for p in unit) < dense_block / 2
    reduced = [size for kind, size, _ in result["step"] if kind == "reduce_scatter"]
    assert sum(size < smallest_dense for size in reduced) == BLOCKS + 1, "no dense gradient in a block's, or the root's"


def test_full_rank_training_sends_the_dense_weights_and_the_counter_sees_them(run: Run) -> None:
    result = run("traffic", 2, "fsdp", method="full")[0]
    assert sent(result["step"]) == predicted_step(result, 2, reshard=True, gathered_float=FLOAT)
    assert_all_seen(result["step"], result["step_backend"])
    dense = [(kind, size) for kind, size, _ in result["step"] if size > FLOAT * sum(DENSE_VALUES)]
    gathers = BLOCKS * 2 * result["micro_steps"]
    assert Counter(kind for kind, _ in dense) == {"all_gather": gathers, "reduce_scatter": BLOCKS}


def test_ddp_sums_the_gradients_of_what_trains(run: Run) -> None:
    overrides = {**WIDE["model.overrides"], "num_hidden_layers": 1}
    result = run("traffic", 2, "ddp", **{"model.overrides": overrides})[0]
    trained = sum(padded_bytes(p, 1) for p in result["parameters"] if p["trains"])
    reduced = sum(size for kind, size, _ in result["step"] if kind == "all_reduce")
    # and the loss, where the rank believes to be, whether it was told to stop, rank 0's norm
    assert reduced == trained + 4 * FLOAT
    assert_all_seen(result["step"], result["step_backend"])


def low_rank_merge_bytes(
    world_size: int, shapes: list[tuple[int, int]], rank: int, rounds: int, micro_steps: int
) -> int:
    """Most bytes of payload that the merge of layers (O, I) may need, from low-rank shapes only."""
    total = 0
    for rows, cols in shapes:
        side = resolve_side("auto", rows, cols)
        p_rows, b_rows = (cols, rows) if side == "input" else (rows, cols)
        layout = MatrixLayout(p_rows, rank, "nf4")
        packed = (layout.groups + world_size) * (layout.codes_shape[1] + (layout.scales_shape or (0, 0))[1])
        factor = FLOAT * (b_rows + world_size * layout.group_rows) * rank
        # output side: B gathered, then summed a round; input side: B gathered and sent back where rows do not align
        exchanges = 1 + rounds if side == "output" else 2
        aligned = side == "input" and rows % world_size == 0 and cols % layout.block_size == 0
        sketch = FLOAT * p_rows * sketch_width(rank, rows, cols, oversampling=SubspaceConfig().oversampling)
        scalars = FLOAT * (1 + VALIDATION_COLUMNS * rank + 3 * rounds + 2)  # energy, what is kept, rounds, survival
        total += micro_steps * sketch + 2 * packed + (0 if aligned else exchanges * factor) + scalars
    return total


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_merge_sends_low_rank_tensors(fsdp_traffic: Callable[[int], dict[str, Any]], world_size: int) -> None:
    result = fsdp_traffic(world_size)
    messages = result["merge"]
    assert_all_seen(messages, result["merge_backend"])
    total = sum(size for _, size, _ in messages)
    limit = low_rank_merge_bytes(world_size, SHAPES * BLOCKS, RANK, ROUNDS, result["micro_steps"])
    dense = FLOAT * BLOCKS * sum(DENSE_VALUES)
    assert 0.5 * limit < total <= limit < dense / 4, f"{total} bytes, predicted at most {limit}, dense {dense}"
    largest = max(size for _, size, _ in messages)
    assert largest < FLOAT * min(DENSE_VALUES) / 4, f"a message of {largest} bytes: that is no low-rank tensor"


def test_a_merge_of_unaligned_rows_is_low_rank_too(run: Run) -> None:
    """96 columns bind rows in groups of two and 3 ranks cut 258 rows unevenly: B travels, W does not."""
    hidden, intermediate = 96, 258
    overrides = {**WIDE["model.overrides"], "hidden_size": hidden, "intermediate_size": intermediate}
    overrides |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
    result = run("traffic", 3, "fsdp", **{"model.overrides": overrides})[0]
    shapes = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    total = sum(size for _, size, _ in result["merge"])
    limit = low_rank_merge_bytes(3, shapes, RANK, ROUNDS, result["micro_steps"])
    assert 0.5 * limit < total <= limit, f"{total} bytes, predicted at most {limit}"
    assert max(size for _, size, _ in result["merge"]) < FLOAT * hidden * hidden / 2


FRUGAL = {"optim.states": "int8", "model.dtype": "bfloat16", "model.trained_dtype": "bfloat16", "loqt.rank": 32}


@pytest.mark.parametrize(
    ("world_size", "strategy", "settings"),
    [(1, "single", {}), (2, "ddp", {}), (2, "fsdp", {}), (1, "single", FRUGAL), (2, "fsdp", FRUGAL)],
)
def test_a_step_does_not_make_the_host_wait(run: Run, world_size: int, strategy: str, settings: dict[str, Any]) -> None:
    """Nothing reads a tensor's value before it has left for the host: on a GPU that would wait for all work before."""
    reads = run("numbers_read_by_the_host", world_size, strategy, **{"loqt.merge.gap": 50}, **settings)
    assert reads == [[]] * world_size, reads[0][0]
