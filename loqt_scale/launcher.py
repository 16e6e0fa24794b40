"""What the launcher has not said: ranks under MPI and srun, and the variables that some launchers leave out.

Everything below this module reads torchrun's variables: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR,
MASTER_PORT. `torchrun` sets them all, `deepspeed` all but one, `srun` others that say the same, `mpirun` none. Under
`mpirun` the ranks ask MPI itself, which is then left at once (torch.distributed does the talking), so that a rank that
fails ends the job instead of waiting in MPI's finalizer for the others. This module imports no torch: OMP_NUM_THREADS
is read when torch is loaded.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping

from loqt_scale.config_keys import ConfigError

# set for each rank by: Open MPI; MPICH, Intel MPI and others that start with Hydra; MVAPICH
MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_SIZE_VARIABLES = ("LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")


def join_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Completes this rank's variables. Under MPI: every rank. Without a launcher, or a second time, it does nothing.

    An existing MASTER_ADDR, MASTER_PORT or OMP_NUM_THREADS is kept.

    Args:
        environment: What is read and completed.

    Raises:
        ConfigError: MPI has started us, but mpi4py cannot be used.
    """
    found: Mapping[str, str] = {}
    if "RANK" not in environment:
        if any(name in environment for name in MPI_VARIABLES):  # first: an mpirun may have started its helpers by srun
            found = _ask_mpi()
        elif "SLURM_PROCID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            found = srun_variables(environment)
    for name, value in found.items():
        if name not in ("MASTER_ADDR", "MASTER_PORT") or name not in environment:
            environment[name] = value
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return
    environment.setdefault("LOCAL_RANK", "0" if environment["WORLD_SIZE"] == "1" else environment["RANK"])
    given = (environment[name] for name in LOCAL_SIZE_VARIABLES if name in environment)
    environment.setdefault("LOCAL_WORLD_SIZE", next(given, environment["WORLD_SIZE"]))
    if environment["LOCAL_WORLD_SIZE"] != "1":
        environment.setdefault("OMP_NUM_THREADS", str(threads_per_rank(int(environment["LOCAL_WORLD_SIZE"]))))


def threads_per_rank(local_ranks: int) -> int:
    """This rank's share of the node's cores, no more than the launcher has bound it to, at least 1."""
    cores = os.cpu_count() or 1
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return max(1, min(cores // local_ranks, bound))


def srun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables from those that srun sets for each task of a step."""
    nodes = environment["SLURM_STEP_NODELIST"]
    first = re.match(r"(?P<name>[^,\[]+)(?:\[(?P<number>\d+))?", nodes)  # node-a,node-b or node[007-012,020]
    if first is None:
        raise ConfigError(f"SLURM_STEP_NODELIST is {nodes!r}, which names no node; set MASTER_ADDR to rank 0's address")
    # 8(x2),4: as many nodes as in brackets with as many tasks each; ranks fill the nodes in order
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"])
    per_node = [int(tasks) for tasks, nodes in counts for _ in range(int(nodes or 1))]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": first["name"] + (first["number"] or ""),
        "MASTER_PORT": str(20000 + int(environment["SLURM_JOB_ID"]) % 20000),  # two jobs may share a node
    }


def _ask_mpi() -> dict[str, str]:
    """torchrun's variables from MPI. Every rank; MPI is over afterwards."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # not installed; or it finds no MPI library
        raise ConfigError(
            f"an MPI launcher has started this process, but mpi4py cannot be used ({error}); run "
            "pip install 'loqt-scale[mpi]', or start the ranks with torchrun"
        ) from None
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    found = {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(node.rank),
        "LOCAL_WORLD_SIZE": str(node.size),
    }
    address = ("127.0.0.1" if node.size == world.size else outward_address(), free_port()) if world.rank == 0 else None
    host, port = world.bcast(address)
    MPI.Finalize()
    return found | {"MASTER_ADDR": host, "MASTER_PORT": str(port)}


def outward_address() -> str:
    """The address under which other nodes reach this one: that of the interface with the default route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation; connecting a UDP socket sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostbyname(socket.gethostname())


def free_port() -> int:
    """A TCP port that is free on this node now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
