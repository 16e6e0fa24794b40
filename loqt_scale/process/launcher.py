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

from loqt_scale.errors import ConfigError
from loqt_scale.process.environment import OWN
from loqt_scale.process.notice import given_notice

# set for each rank by: Open MPI; MPICH, Intel MPI and others that start with Hydra; MVAPICH
MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ADDRESS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
LOCAL_SIZE_VARIABLES = ("LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")


def join_launcher(environment: MutableMapping[str, str] = OWN) -> None:
    """Completes this rank's variables. Under MPI: every rank. Without a launcher, or a second time, it does nothing.

    An existing MASTER_ADDR, MASTER_PORT or OMP_NUM_THREADS is kept.

    Args:
        environment: What is read and completed.

    Raises:
        ConfigError: MPI has started us, but mpi4py cannot be used, or sees other ranks; a variable that cannot work.
    """
    for name, value in _found(environment).items():
        if name not in ("MASTER_ADDR", "MASTER_PORT") or name not in environment:
            environment[name] = value
    check_variables(environment)
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return
    environment.setdefault("LOCAL_RANK", "0" if environment["WORLD_SIZE"] == "1" else environment["RANK"])
    given = (environment[name] for name in LOCAL_SIZE_VARIABLES if name in environment)
    environment.setdefault("LOCAL_WORLD_SIZE", next(given, environment["WORLD_SIZE"]))
    if environment["LOCAL_WORLD_SIZE"] != "1":
        environment.setdefault("OMP_NUM_THREADS", str(threads_per_rank(int(environment["LOCAL_WORLD_SIZE"]))))


def wait_asleep(environment: MutableMapping[str, str] = OWN) -> None:
    """Lets threads sleep that wait for one another, unless variables say how they wait. Before torch loads.

    Torch's OpenMP threads meet after every operator, and spin for up to some 20 ms until all are there. Where another
    process has the core of one of them, the others burn theirs: with two threads on two cores that were shared, steps
    took 13 to 37 times as long as with sleeping threads, merges 34 times and more (docs/performance.md).
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & environment.keys():
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def _found(environment: Mapping[str, str]) -> dict[str, str]:
    """What MPI or srun say, where RANK says nothing."""
    if "RANK" in environment:
        return {}
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", 1) if "SLURM_PROCID" in environment else 1
    # An mpirun may have started its helpers by srun, whose variables the ranks then inherit; so MPI is asked first.
    if any(name in environment for name in MPI_VARIABLES) and not _is_slurms_pmi(environment):
        return _ask_mpi(environment)
    return srun_variables(environment) if tasks > 1 else {}


def _is_slurms_pmi(environment: Mapping[str, str]) -> bool:
    """Whether srun itself set PMI's variables (`--mpi=pmi2`): they say of size and rank what its own do."""
    if any(name in environment for name in MPI_VARIABLES if name != "PMI_SIZE"):
        return False
    pairs = (("PMI_SIZE", "SLURM_STEP_NUM_TASKS"), ("PMI_RANK", "SLURM_PROCID"))
    return all(environment.get(pmi) is not None and environment.get(pmi) == environment.get(s) for pmi, s in pairs)


def check_variables(environment: Mapping[str, str]) -> None:
    """Checks those of torchrun's variables that are set, and LOQT_SCALE_NOTICE_SECONDS.

    Raises:
        ConfigError: One is no number, or they contradict each other.
    """
    given_notice(environment)
    size, port = _number(environment, "WORLD_SIZE", 1), _number(environment, "MASTER_PORT", 1)
    rank, local = _number(environment, "RANK", 0), _number(environment, "LOCAL_RANK", 0)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", 1)
    if size < 1 or local_size < 1 or rank < 0 or local < 0 or ("WORLD_SIZE" in environment and rank >= size):
        said = ", ".join(f"{name}={environment[name]}" for name in RANK_VARIABLES if name in environment)
        raise ConfigError(
            f"{said} do not go together; ranks are 0 to WORLD_SIZE - 1: look at how the ranks are started"
        )
    if not 1 <= port <= 65535:
        raise ConfigError(f"MASTER_PORT is {port}; set it to a port, 1 to 65535 (one that is free on rank 0's node)")
    if "MASTER_ADDR" in environment and not environment["MASTER_ADDR"].strip():
        raise ConfigError("MASTER_ADDR is empty; set it to rank 0's address")
    if size > 1 and (missing := [name for name in ADDRESS_VARIABLES if name not in environment]):
        raise ConfigError(
            f"WORLD_SIZE is {size}, but {' and '.join(missing)} not set; start the ranks with torchrun, or set them to "
            "rank 0's address and a free port there"
        )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip()):
        raise ConfigError(f"the variable {name} is {text!r}; the launcher, or you, must set it to a whole number")
    return int(text)


def threads_per_rank(local_ranks: int) -> int:
    """This rank's share of the node's cores, no more than the launcher has bound it to, at least 1."""
    cores = os.cpu_count() or 1
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return max(1, min(cores // local_ranks, bound))


def srun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables from those that srun sets for each task of a step."""
    needed = ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID")
    if missing := [name for name in needed if name not in environment]:
        raise ConfigError(f"srun started this process, but {', '.join(missing)} is not set; start it with torchrun")
    nodes = environment["SLURM_STEP_NODELIST"]
    first = re.match(r"(?P<name>[^,\[]+)(?:\[(?P<number>\d+))?", nodes)  # node-a,node-b or node[007-012,020]
    if first is None:
        raise ConfigError(f"SLURM_STEP_NODELIST is {nodes!r}, which names no node; set MASTER_ADDR to rank 0's address")
    # 8(x2),4: as many nodes as in brackets with as many tasks each; ranks fill the nodes in order
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"])
    per_node = [int(tasks) for tasks, nodes in counts for _ in range(int(nodes or 1))]
    node, job = _number(environment, "SLURM_NODEID", 0), _number(environment, "SLURM_JOB_ID", 0)
    step = _number(environment, "SLURM_STEP_ID", 0)
    if not 0 <= node < len(per_node):
        raise ConfigError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE lists {len(per_node)} nodes")
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node[node]),
        "MASTER_ADDR": first["name"] + (first["number"] or ""),
        "MASTER_PORT": str(20000 + (job + 7919 * step) % 20000),  # two jobs may share a node, two steps of one job too
    }


def _ask_mpi(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables from MPI. Every rank; MPI is over afterwards."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # not installed; or it finds no MPI library
        raise ConfigError(
            f"an MPI launcher has started this process, but mpi4py cannot be used ({error}); run "
            "pip install 'loqt-scale[mpi]', or start the ranks with torchrun"
        ) from None
    world = MPI.COMM_WORLD
    check_world(environment, world.size, MPI.Get_library_version())
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


def check_world(environment: Mapping[str, str], seen: int, library: str) -> None:
    """Compares MPI's number of ranks with that of its launcher.

    Args:
        environment: Where the launcher has left its number.
        seen: Ranks that mpi4py sees.
        library: What mpi4py says of the MPI library that it has loaded.

    Raises:
        ConfigError: They differ: mpi4py was made for another MPI, each rank would believe to be alone.
    """
    name = next((name for name in MPI_VARIABLES if name in environment), None)
    if name is None or (said := _number(environment, name, seen)) == seen:
        return
    raise ConfigError(
        f"the launcher has started {said} ranks ({name}), but mpi4py sees {seen}: it was made for another MPI "
        f"({library.partition(chr(10))[0].strip()[:60]}); run pip install --force-reinstall --no-binary mpi4py mpi4py "
        "with the launcher's MPI on the PATH, or start the ranks with torchrun"
    )


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
