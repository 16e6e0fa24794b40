"""ZeRO: the model inside a DeepSpeed engine, stages 1 to 3.

What DeepSpeed shards, and therefore what a rank holds:

    stage   moments, fp32 masters of B ...   gradients   B, embeddings ...   codes and scales of W and P
    1       1/N                                  whole       whole               whole
    2       1/N                                  1/N         whole               whole
    3       1/N                                  1/N         1/N                 1/N, as bytes

DeepSpeed cuts tensors by elements, not by rows, so a rank's shard is of no use to a merge. A merge therefore takes one
layer at a time out of the shards (`editing`: its packed bytes, never a dense weight), shares its rows out over the
ranks as DDP does, and puts the layer back. B has three copies in the engine that must agree afterwards: the parameter
(16 bit under bf16), its float32 master, and the moments. The master is the true one: it is what `gather` reads and
`store` writes, beside the parameter. Access is by DeepSpeed's public calls (GatheredParameters, safe_get_* and
safe_set_*), which know float32 moments only. Moments in 8 bits are `StreamedAdamW`'s, of the fragments of parameters
that this rank's flat masters hold (`flat`): decoded, summed into a whole and encoded again, a parameter at a time.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store

from loqt_scale.config import RunConfig
from loqt_scale.errors import ConfigError, UserError, explained
from loqt_scale.layers import LoQTLinear
from loqt_scale.optim import Fragment, RowShards, StreamedAdamW, ensure_state, moment_names
from loqt_scale.process.environment import launched_world_size
from loqt_scale.strategies.base import DTYPES
from loqt_scale.strategies.process_group import DistributedStrategy
from loqt_scale.strategies.zero.config import deepspeed_config, size_buckets
from loqt_scale.strategies.zero.flat import link_states, master_fragments, masters


def import_deepspeed(device: torch.device, log_level: str) -> ModuleType:
    """DeepSpeed, set up for this device and quiet.

    Args:
        device: Where this rank computes: DeepSpeed must not pick another one by itself.
        log_level: Least severe messages of DeepSpeed that are shown.

    Raises:
        ValueError: It is not installed.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    if device.index is not None:  # DeepSpeed takes these for the GPU's number, which a rank that sees one GPU calls 0
        for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
            if name in os.environ:
                os.environ[name] = str(device.index)
    try:
        import deepspeed
        from deepspeed.utils.logging import logger
    except ModuleNotFoundError as error:
        raise UserError(
            f"parallel.strategy is 'zero', but {error.name} is not installed; "
            "run pip install 'loqt-scale[deepspeed]', or write parallel.strategy: fsdp"
        ) from None
    logger.setLevel(log_level.upper())
    for handler in logger.handlers:
        handler.setLevel(log_level.upper())
    if log_level == "error":  # torch 2.13 renamed the collectives that DeepSpeed 0.19 calls, and says so at every call
        renamed = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
        warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
    # Its shared-memory all-reduce for CPUs is compiled at the first run and leaves tens of megabytes in /dev/shm for
    # each rank of every run. DeepSpeed looks the operator up in this table; gloo serves without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class ZeroStrategy(DistributedStrategy):
    """See the module's docstring.

    Args:
        device: Where this rank computes.
        config: The run; its settings become DeepSpeed's (see `config`).
        store: What only this job's ranks see; default: the launcher's.

    Raises:
        ValueError: DeepSpeed is not installed, or the settings cannot work; nothing has been joined yet.
    """

    name = "zero"

    def __init__(self, device: torch.device, config: RunConfig, *, store: Store | None = None) -> None:
        self._deepspeed: Any = import_deepspeed(device, config.parallel.zero_log_level)
        self.settings = deepspeed_config(config, world_size=launched_world_size())
        self.stage = int(self.settings["zero_optimization"]["stage"])
        super().__init__(device, DTYPES[config.model.dtype], config.parallel.timeout_seconds, store=store)
        # DeepSpeed's own view of the group that has just been joined
        self._deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        self._config_file = config.parallel.zero_config
        self._engine: Any = None
        self._scheduler: Any = None
        self._linked = False
        self._fragments: dict[int, Fragment] = {}  # by id of the parameter, where the moments are a StreamedAdamW's

    @property
    def description(self) -> str:
        """`zero stage 2`."""
        return f"zero stage {self.stage}"

    @property
    def engine_settings(self) -> dict[str, object]:
        """DeepSpeed's configuration; sizes of buckets once there is a model."""
        return self.settings

    # ---- placement ---------------------------------------------------------------------------------------------

    def shard(self, model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """Sizes DeepSpeed's buckets; under stage 3 allocates and shards the model, module by module."""
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        size_buckets(self.settings, trained)
        if self.stage == 3:
            # the layer reads the parameters of its two FrozenMatrix children: they are gathered as one unit with it
            self._deepspeed.utils.set_z3_leaf_modules(model, [LoQTLinear], raise_if_not_found=False)
            self._allocate_shards(model)
        return model

    def _allocate_shards(self, model: nn.Module) -> None:
        """Gives a meta-device model storage of which each rank keeps 1/N: never more than one module's whole."""
        placed: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the old one is kept so that its id stays its own
        for module in reversed(list(model.modules())):  # children first: `zero.Init` goes down from where it is called
            own = list(module.named_parameters(recurse=False))
            for name, parameter in own:
                if id(parameter) not in placed:
                    dtype = self.compute_dtype if parameter.dtype.is_floating_point else parameter.dtype
                    whole = torch.zeros(parameter.shape, dtype=dtype, device=self.device)
                    placed[id(parameter)] = parameter, nn.Parameter(whole, requires_grad=parameter.requires_grad)
                module.register_parameter(name, placed[id(parameter)][1])
            if own:
                self._deepspeed.zero.Init(module=module, config_dict_or_path=self.settings)

    def wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Makes the engine, which takes over the optimizer's parameters and keeps its groups' settings. Every rank."""
        with self._naming_file():
            self._engine, _, _, self._scheduler = self._deepspeed.initialize(
                model=model, optimizer=optimizer, config=self.settings, dist_init_required=False
            )
        if isinstance(optimizer, StreamedAdamW):
            for flat, fragments in master_fragments(self._engine, self.stage, self.rank):
                optimizer.adopt(flat, fragments)
                self._fragments |= {id(fragment.parameter): fragment for fragment in fragments if fragment.values}
        engine: nn.Module = self._engine
        return engine

    def _naming_file(self) -> AbstractContextManager[object]:
        """DeepSpeed checks some values (the parity of a bucket's size) only where it uses them."""
        if self._config_file is None:
            return nullcontext()
        what = f"{self._config_file}: DeepSpeed cannot train with it"
        return explained(what, of=(AssertionError, ValueError), kind=ConfigError)

    @property
    def schedules_learning_rate(self) -> bool:
        """Whether the DeepSpeed configuration names a scheduler."""
        return "scheduler" in self.settings

    @property
    def row_shards(self) -> RowShards:
        """Every rank stores consecutive values, of masters that may lie in host memory."""
        return RowShards(lambda tensor: self.sum(tensor.to(self.device)).to(tensor.device), self.rank, self.world_size)

    def set_schedule_position(self, steps: int) -> None:
        """Steps DeepSpeed's scheduler as the engine does, once an update."""
        for _ in range(steps if self.schedules_learning_rate else 0):
            self._scheduler.step()

    # ---- work shares in a merge ----------------------------------------------------------------------------------

    def editing(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        """Stage 3: gathers the parameters; at the end each rank keeps its shard of rank 0's values. Every rank."""
        if self.stage < 3:
            return nullcontext()
        context: AbstractContextManager[object] = self._deepspeed.zero.GatheredParameters(
            list(parameters), modifier_rank=0
        )
        return context

    def read(self, parameter: Tensor) -> Tensor:
        """This rank's work share; of the float32 master, where there is one. Every rank."""
        start, stop = self.rows(parameter.shape[0])
        return self.gather(parameter)[start:stop]

    def gather(self, parameter: Tensor) -> Tensor:
        """The whole parameter; the float32 master, where there is one. Every rank."""
        if not self._has_master(parameter):
            return parameter.detach()
        master: Tensor = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
        return master

    def store(self, parameter: Tensor, whole: Tensor) -> None:
        """Replaces a parameter and its float32 master by a value that every rank holds whole. No communication."""
        parameter.copy_(whole)
        if self._has_master(parameter):
            self._set_state(parameter, whole, None)

    def edit_moments(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, edit: Callable[..., None]
    ) -> None:
        """Gathers the moments of a low-rank parameter, edits them on every rank, keeps the shards. Every rank."""
        if not _has_moments(optimizer):
            return
        names = moment_names(optimizer, parameter)
        moments = [self._whole_moment(optimizer, parameter, key) for key in names]
        edit(*moments)
        for key, moment in zip(names, moments, strict=True):
            self._keep_moment(optimizer, parameter, key, moment)

    def read_moments(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[Tensor, ...] | None:
        """Work shares of the moments, gathered whole one after the other. Every rank."""
        if not _has_moments(optimizer):
            return None
        self._ensure_states(optimizer)
        start, stop = self.rows(_shape(parameter)[0])
        names = moment_names(optimizer, parameter)
        return tuple(self._whole_moment(optimizer, parameter, key)[start:stop].clone() for key in names)

    def write_moments(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, moments: Sequence[Tensor]
    ) -> None:
        """Gathers each moment whole; each rank keeps its shard. Every rank."""
        self._ensure_states(optimizer)
        rows = _shape(parameter)[0]
        ranges = [self.rows(rows, rank) for rank in range(self.world_size)]
        for key, piece in zip(moment_names(optimizer, parameter), moments, strict=True):
            self._keep_moment(optimizer, parameter, key, self.gather_pieces(piece, ranges))

    def _whole_moment(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str) -> Tensor:
        """One of a parameter's moments, float32, on every rank. Every rank."""
        if not isinstance(optimizer, StreamedAdamW):
            moment: Tensor = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
            return moment
        whole = torch.zeros(_shape(parameter), dtype=torch.float32, device=self.device)
        fragment = self._fragments.get(id(parameter))
        if fragment is not None:
            optimizer.state[parameter][key].read(fragment.within_whole(whole))
        return self.sum(whole)

    def _keep_moment(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        """Replaces this rank's part of one of a parameter's moments by that of a whole one. Local."""
        if not isinstance(optimizer, StreamedAdamW):
            self._set_state(parameter, whole, key)
            return
        fragment = self._fragments.get(id(parameter))
        if fragment is not None:
            optimizer.state[parameter][key].write(fragment.within_whole(whole.contiguous()))

    def _ensure_states(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes float32 states, of the flat masters, where there has been no update yet; lets DeepSpeed find them."""
        if isinstance(optimizer, StreamedAdamW):
            return
        if not optimizer.state:
            for flat in masters(self._engine, self.stage):
                ensure_state(optimizer, flat)
        if self.stage < 3 and not self._linked:
            link_states(self._engine)
            self._linked = True

    def _has_master(self, parameter: Tensor) -> bool:
        return self._engine is not None and parameter.requires_grad

    def _set_state(self, parameter: Tensor, whole: Tensor, key: str | None) -> None:
        """Sets this rank's part of the master (key None) or of an optimizer state from the whole value. Local."""
        utils, whole = self._deepspeed.utils, whole.float()
        if self.stage < 3:
            if key is None:
                utils.safe_set_full_fp32_param(parameter, whole)
            else:
                utils.safe_set_full_optimizer_state(parameter, whole, key)
            return
        # DeepSpeed's call for whole values needs numbers of elements that N divides; its shards are padded to that
        size = -(-whole.numel() // self.world_size)
        part = whole.flatten()[self.rank * size : (self.rank + 1) * size]
        part = F.pad(part, (0, size - part.numel()))
        if key is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, key)

    # ---- a step ----------------------------------------------------------------------------------------------------

    def micro_step(self, model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """Tells the engine whether gradients are complete after this pass."""
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def forward_alone(self, model: nn.Module) -> nn.Module | None:
        """See `Strategy.forward_alone`: stage 3 gathers each module for its forward pass."""
        return model if self.stage < 3 else None

    def autocast(self) -> AbstractContextManager[object]:
        """None: under bf16 the engine's parameters are bf16 copies of float32 masters."""
        return nullcontext()

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        """The engine averages over ranks; our gradients are sums, so the loss is scaled up first. Every rank."""
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def update(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        *,
        max_norm: float,
    ) -> Tensor:
        """The engine clips (to its settings' norm) and applies; it skips what is not finite. Every rank."""
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=self.device)

    # ---- end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Takes the engine's hooks off and leaves the process group if this strategy joined it. Every rank."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None
        if self._joined and self._deepspeed.comm.is_initialized():
            self._deepspeed.comm.destroy_process_group()
        super().close()


def _has_moments(optimizer: torch.optim.Optimizer) -> bool:
    """False before the first update, on every rank alike; a `StreamedAdamW` has them, of zeros, from the beginning."""
    return isinstance(optimizer, StreamedAdamW) or bool(optimizer.state)


def _shape(parameter: Tensor) -> torch.Size:
    """The whole parameter's shape; stage 3 leaves an empty tensor in its place."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
