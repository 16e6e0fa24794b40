"""The variables that this process was started with, and those that it sets for libraries.

From launchers, as torchrun sets them; `launcher` completes them under every other one:

    RANK, WORLD_SIZE               this process and how many there are; neither is set without a launcher
    LOCAL_RANK, LOCAL_WORLD_SIZE   which of its node's processes it is, and how many these are
    MASTER_ADDR, MASTER_PORT       where the ranks meet
    TORCHELASTIC_USE_AGENT_STORE   the key-value store there is torchrun's, not rank 0's
    TORCHELASTIC_RESTART_COUNT, SLURM_RESTART_COUNT, SLURM_JOB_ID

`launcher.check_variables` has seen that they are numbers, except where a label will do. From people and programs:

    LOQT_SCALE_TRACEBACK           tracebacks in the place of one line (`notice` reads LOQT_SCALE_NOTICE_SECONDS)
    XDG_CACHE_HOME                 where caches lie
    FSDP_CPU_RAM_EFFICIENT_LOADING Accelerate's: only rank 0 has loaded the model

The linter refuses `os.environ` everywhere else in the package: what a program does must not hang on hidden readers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

Environment = Mapping[str, str]
OWN: MutableMapping[str, str] = os.environ
"""This process's variables, for functions that take any."""

TRACEBACK = "LOQT_SCALE_TRACEBACK"


def is_launched(environment: Environment = OWN) -> bool:
    """Whether a launcher started this process, perhaps as the only one."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def launched_world_size(environment: Environment = OWN) -> int:
    """Ranks that the launcher started; 1 without a launcher."""
    return int(environment.get("WORLD_SIZE", "1"))


def launched_rank(environment: Environment = OWN) -> int:
    """This process's rank. Under a launcher only."""
    return int(environment["RANK"])


def local_rank(environment: Environment = OWN) -> int:
    """Which of its node's ranks this process is; 0 without a launcher."""
    return int(environment.get("LOCAL_RANK", "0"))


def node_size(environment: Environment = OWN) -> int:
    """Ranks of this process's node; all of them if the launcher does not say."""
    return int(environment.get("LOCAL_WORLD_SIZE", environment.get("WORLD_SIZE", "1")))


def meeting_place(environment: Environment = OWN) -> tuple[str, int]:
    """Host and port at which the ranks find each other. Under a launcher only."""
    return environment["MASTER_ADDR"], int(environment["MASTER_PORT"])


def has_peers(environment: Environment = OWN) -> bool:
    """Whether there are other ranks, as far as the variables say that have not been checked yet."""
    return environment.get("WORLD_SIZE", "1") != "1"


def rank_label(environment: Environment = OWN) -> str:
    """The rank as it is written, for names and messages; `0` without a launcher."""
    return environment.get("RANK", "0")


def has_rank(environment: Environment = OWN) -> bool:
    """Whether this process has a rank to name."""
    return "RANK" in environment


def speaks_for_its_node(environment: Environment = OWN) -> bool:
    """Whether this is the first rank of its node: of what all of them see, one tells."""
    return environment.get("LOCAL_RANK", "0") == "0"


def job_label(environment: Environment = OWN) -> str | None:
    """What the ranks of one job have in common, and those of another do not; None without a launcher."""
    address = [environment.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")]
    return None if None in address else ":".join(map(str, address))


def slurm_job(environment: Environment = OWN) -> str | None:
    """SLURM's number of the job, the same in all of its restarts; None outside of SLURM."""
    return environment.get("SLURM_JOB_ID")


def is_restart(environment: Environment = OWN) -> bool:
    """Whether the launcher has started this job before."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(environment.get(name, "0") not in ("", "0") for name in names)


def agent_hosts_store(environment: Environment = OWN) -> bool:
    """Whether the ranks' store lives in torchrun's agent, which outlives them."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def hosts_store(environment: Environment = OWN) -> bool:
    """Whether the store lives in this process: on rank 0, unless torchrun's agent keeps it."""
    return environment["RANK"] == "0" and not agent_hosts_store(environment)


def is_bound_to_one_gpu(environment: Environment = OWN) -> bool:
    """Whether the launcher has left this rank one GPU to see. (Two ranks that see the same one: NCCL refuses that.)"""
    shown = [entry for entry in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    return len(shown) == 1


def wants_tracebacks(environment: Environment = OWN) -> bool:
    """Whether a person asked for tracebacks of errors."""
    return environment.get(TRACEBACK, "0") not in ("", "0")


def has_variable(name: str, environment: Environment = OWN) -> bool:
    """Whether there is a variable of this name, for texts that name one."""
    return name in environment


def cache_home(environment: Environment = OWN) -> Path:
    """Where programs keep what they can make again: $XDG_CACHE_HOME, or ~/.cache."""
    base = environment.get("XDG_CACHE_HOME")
    return Path(base) if base else Path.home() / ".cache"


def only_rank_zero_loads(environment: Environment = OWN) -> bool:
    """Whether Accelerate has had the model loaded by rank 0 alone, for FSDP to send it to the others."""
    return environment.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true"


def tell_deepspeed(device: str, index: int | None, environment: MutableMapping[str, str] = OWN) -> None:
    """Tells DeepSpeed, before it is imported, where this rank computes: it must not pick another place by itself.

    Args:
        device: "cpu" or "cuda".
        index: Of the GPU. DeepSpeed takes the local rank for it, which a rank that sees one GPU calls 0.
        environment: What is changed.
    """
    environment["DS_ACCELERATOR"] = device
    if index is not None:
        for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
            if name in environment:
                environment[name] = str(index)


def tell_tokenizers(environment: MutableMapping[str, str] = OWN) -> None:
    """Tells Hugging Face's tokenizers to start no threads: there is a process for each core."""
    environment["TOKENIZERS_PARALLELISM"] = "false"
