"""What the launcher has told this process: torchrun's variables, which `launcher` completes under every other launcher.

    RANK, WORLD_SIZE               this process and how many there are; neither is set without a launcher
    LOCAL_RANK, LOCAL_WORLD_SIZE   which of its node's processes it is, and how many these are
    MASTER_ADDR, MASTER_PORT       where the ranks meet
    TORCHELASTIC_USE_AGENT_STORE   the key-value store there is torchrun's, not rank 0's
    TORCHELASTIC_RESTART_COUNT, SLURM_RESTART_COUNT, SLURM_JOB_ID

Nobody else reads them. `launcher.check_variables` has seen that they are numbers, except where a label will do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

Environment = Mapping[str, str]


def is_launched(environment: Environment = os.environ) -> bool:
    """Whether a launcher started this process, perhaps as the only one."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def launched_world_size(environment: Environment = os.environ) -> int:
    """Ranks that the launcher started; 1 without a launcher."""
    return int(environment.get("WORLD_SIZE", "1"))


def launched_rank(environment: Environment = os.environ) -> int:
    """This process's rank. Under a launcher only."""
    return int(environment["RANK"])


def local_rank(environment: Environment = os.environ) -> int:
    """Which of its node's ranks this process is; 0 without a launcher."""
    return int(environment.get("LOCAL_RANK", "0"))


def node_size(environment: Environment = os.environ) -> int:
    """Ranks of this process's node; all of them if the launcher does not say."""
    return int(environment.get("LOCAL_WORLD_SIZE", environment.get("WORLD_SIZE", "1")))


def meeting_place(environment: Environment = os.environ) -> tuple[str, int]:
    """Host and port at which the ranks find each other. Under a launcher only."""
    return environment["MASTER_ADDR"], int(environment["MASTER_PORT"])


def has_peers(environment: Environment = os.environ) -> bool:
    """Whether there are other ranks, as far as the variables say that have not been checked yet."""
    return environment.get("WORLD_SIZE", "1") != "1"


def rank_label(environment: Environment = os.environ) -> str:
    """The rank as it is written, for names and messages; `0` without a launcher."""
    return environment.get("RANK", "0")


def has_rank(environment: Environment = os.environ) -> bool:
    """Whether this process has a rank to name."""
    return "RANK" in environment


def speaks_for_its_node(environment: Environment = os.environ) -> bool:
    """Whether this is the first rank of its node: of what all of them see, one tells."""
    return environment.get("LOCAL_RANK", "0") == "0"


def job_label(environment: Environment = os.environ) -> str | None:
    """What the ranks of one job have in common, and those of another do not; None without a launcher."""
    address = [environment.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")]
    return None if None in address else ":".join(map(str, address))


def slurm_job(environment: Environment = os.environ) -> str | None:
    """SLURM's number of the job, the same in all of its restarts; None outside of SLURM."""
    return environment.get("SLURM_JOB_ID")


def is_restart(environment: Environment = os.environ) -> bool:
    """Whether the launcher has started this job before."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(environment.get(name, "0") not in ("", "0") for name in names)


def agent_hosts_store(environment: Environment = os.environ) -> bool:
    """Whether the ranks' store lives in torchrun's agent, which outlives them."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def hosts_store(environment: Environment = os.environ) -> bool:
    """Whether the store lives in this process: on rank 0, unless torchrun's agent keeps it."""
    return environment["RANK"] == "0" and not agent_hosts_store(environment)


def is_bound_to_one_gpu(environment: Environment = os.environ) -> bool:
    """Whether the launcher has left this rank one GPU to see. (Two ranks that see the same one: NCCL refuses that.)"""
    shown = [entry for entry in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    return len(shown) == 1
