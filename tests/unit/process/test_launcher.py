"""What each launcher leaves out is filled in; what it has set stays."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys

import pytest

from loqt_scale.errors import ConfigError
from loqt_scale.process import launcher

DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
}


def test_without_a_launcher_nothing_changes() -> None:
    environment = {"PATH": "/bin"}
    launcher.join_launcher(environment)
    assert environment == {"PATH": "/bin"}


def test_torchruns_variables_stay() -> None:
    environment = {**DEEPSPEED, "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "7"}
    before = dict(environment)
    launcher.join_launcher(environment)
    assert environment == before


def test_deepspeeds_local_size_and_threads_are_filled_in() -> None:
    environment = dict(DEEPSPEED)
    launcher.join_launcher(environment)
    threads = str(launcher.threads_per_rank(2))
    assert environment == {**DEEPSPEED, "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": threads}


def test_a_single_rank_keeps_all_threads() -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "1"}
    launcher.join_launcher(environment)
    assert environment == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@pytest.mark.parametrize("said", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "100"}])
def test_waiting_threads_sleep_unless_the_caller_says_how_they_wait(said: dict[str, str]) -> None:
    environment = dict(said)
    launcher.wait_asleep(environment)
    assert environment == (said or {"OMP_WAIT_POLICY": "PASSIVE"})


def test_commands_say_so_before_torch_loads() -> None:
    """Its OpenMP reads the variable once, when it is loaded."""
    script = "import os, sys; from loqt_scale.cli import main; main(['plan', '--gpus', 'x']); "
    script += "print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "PASSIVE"]


def test_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert [launcher.threads_per_rank(ranks) for ranks in (1, 3, 16, 64)] == [16, 5, 1, 1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert launcher.threads_per_rank(2) == 1


@pytest.mark.parametrize("variable", launcher.MPI_VARIABLES)
def test_under_mpi_without_mpi4py_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match=r"pip install 'loqt-scale\[mpi\]', or start the ranks with torchrun"):
        launcher.join_launcher({variable: "2"})


def test_mpi_is_asked_once_and_a_given_address_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"}
    calls = []
    monkeypatch.setattr(launcher, "_ask_mpi", lambda environment: calls.append(1) or dict(answers))
    environment = {"PMI_SIZE": "2", "MASTER_ADDR": "192.168.0.9"}
    launcher.join_launcher(environment)
    launcher.join_launcher(environment)
    assert len(calls) == 1
    assert environment.items() >= {**answers, "MASTER_ADDR": "192.168.0.9"}.items()


SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "gpu[007-008,020]",
    "SLURM_JOB_ID": "1234567",
}


def test_sruns_variables_are_translated() -> None:
    environment = dict(SRUN)
    launcher.join_launcher(environment)
    expected = {"RANK": "9", "WORLD_SIZE": "20", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    assert environment.items() >= {**expected, "MASTER_ADDR": "gpu007", "MASTER_PORT": "34567"}.items()
    third = launcher.srun_variables({**SRUN, "SLURM_NODEID": "2", "SLURM_STEP_NODELIST": "node-a,node-b"})
    assert (third["LOCAL_WORLD_SIZE"], third["MASTER_ADDR"]) == ("4", "node-a")


def test_a_shell_inside_an_allocation_is_no_rank() -> None:
    environment = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}
    launcher.join_launcher(environment)
    assert "RANK" not in environment


def test_this_node_has_an_address() -> None:
    assert ipaddress.ip_address(launcher.outward_address()).version == 4
    assert 0 < launcher.free_port() < 65536


PMI_OF_SRUN = {**SRUN, "PMI_SIZE": "20", "PMI_RANK": "9", "PMI_FD": "7"}


def test_sruns_own_pmi_variables_do_not_lead_to_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun --mpi=pmi2` sets them for every program; mpi4py may be missing, or made for another MPI."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    environment = dict(PMI_OF_SRUN)
    launcher.join_launcher(environment)
    assert environment.items() >= {"RANK": "9", "WORLD_SIZE": "20", "LOCAL_WORLD_SIZE": "8"}.items()
    alone = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": "1", "PMI_RANK": "0"}
    launcher.join_launcher(alone)
    assert "RANK" not in alone


@pytest.mark.parametrize("change", [{"PMI_SIZE": "40"}, {"PMI_RANK": "3"}, {"OMPI_COMM_WORLD_SIZE": "20"}])
def test_an_mpirun_that_starts_its_helpers_by_srun_is_asked(monkeypatch: pytest.MonkeyPatch, change: dict) -> None:
    monkeypatch.setattr(launcher, "_ask_mpi", lambda environment: {"RANK": "1", "WORLD_SIZE": "3", **ADDRESS})
    environment = {**PMI_OF_SRUN, **change}
    launcher.join_launcher(environment)
    assert environment["WORLD_SIZE"] == "3"


ADDRESS = {"MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("variable", launcher.MPI_VARIABLES)
def test_an_mpi_that_sees_other_ranks_is_refused_with_both_numbers(variable: str) -> None:
    launcher.check_world({variable: "2"}, 2, "Open MPI v5")
    with pytest.raises(ConfigError, match=r"has started 2 ranks .*mpi4py sees 1: .*another MPI \(MPICH 4\).*torchrun"):
        launcher.check_world({variable: "2"}, 1, "MPICH 4\nmore")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "4"}, r"RANK=4, WORLD_SIZE=4, .*do not go together"),
        ({"RANK": "-1"}, r"RANK=-1, WORLD_SIZE=4, .*do not go together"),
        ({"RANK": "one"}, r"the variable RANK is 'one'"),
        ({"WORLD_SIZE": ""}, r"the variable WORLD_SIZE is ''"),
        ({"LOCAL_RANK": "x"}, r"the variable LOCAL_RANK is 'x'"),
        ({"LOCAL_WORLD_SIZE": "0"}, r"LOCAL_WORLD_SIZE=0 do not go together"),
        ({"MASTER_PORT": "99999"}, r"MASTER_PORT is 99999; set it to a port, 1 to 65535"),
        ({"MASTER_PORT": "http"}, r"the variable MASTER_PORT is 'http'"),
        ({"MASTER_ADDR": " "}, r"MASTER_ADDR is empty"),
    ],
)
def test_variables_that_cannot_work_are_named(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        launcher.join_launcher({**DEEPSPEED, **change})


def test_ranks_without_an_address_and_half_of_sruns_variables_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2, but MASTER_ADDR and MASTER_PORT not set"):
        launcher.join_launcher({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match=r"SLURM_STEP_NODELIST, .* is not set"):
        launcher.join_launcher({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"})
    with pytest.raises(ConfigError, match=r"SLURM_NODEID is 7, but .* lists 3 nodes"):
        launcher.join_launcher({**SRUN, "SLURM_NODEID": "7"})
