"""How long launchers wait for ranks that were told to stop, and the line of a run that needs longer."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest

from loqt_scale.errors import ConfigError
from loqt_scale.process.launcher import join_launcher
from loqt_scale.process.notice import RANKS_ONLY, Notice, knows_shutdown_timeout, launchers_notice

GIVEN = "whoever stops it (LOQT_SCALE_NOTICE_SECONDS)"
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
DEEPSPEED = ["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30=", "launch/train.py"]


@pytest.mark.parametrize(
    ("environment", "command", "seconds", "killer"),
    [
        ({}, ["bash"], math.inf, ""),
        (TORCHRUN, ["torchrun", "--nproc-per-node", "2", "launch/train.py"], 30.0, "torchrun"),
        (TORCHRUN, ["torchrun", "--shutdown-timeout", "90", "launch/train.py"], 90.0, "torchrun"),
        (TORCHRUN, ["torchrun", "--shutdown_timeout=90"], 90.0, "torchrun"),
        (TORCHRUN | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}, ["torchrun"], 600.0, "torchrun"),
        (TORCHRUN | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}, ["torchrun", "--shutdown-timeout=5"], 5.0, "torchrun"),
        ({"RANK": "0"}, DEEPSPEED, 30.0, "deepspeed"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ["prted"], 1.0, "mpirun"),
        (TORCHRUN | {"LOQT_SCALE_NOTICE_SECONDS": "120"}, ["torchrun"], 120.0, GIVEN),
        ({"LOQT_SCALE_NOTICE_SECONDS": "inf"}, ["bash"], math.inf, GIVEN),
    ],
)
def test_what_each_launcher_gives(environment, command, seconds, killer):
    if killer == "torchrun" and not knows_shutdown_timeout():
        seconds = 30.0
    notice = launchers_notice(environment, command)
    assert (notice.seconds, notice.killer) == (seconds, killer)


def test_what_is_sent_to_the_ranks_does_not_reach_their_launchers():
    """SIGUSR1 ends torchrun, in whose process the ranks' store is, and with it the run: nothing is saved then."""
    launchers = [
        ["python", ".venv/bin/torchrun", "--standalone", "--nproc-per-node", "2", "launch/train.py"],
        ["python", "-m", "torch.distributed.run", "--standalone", "launch/train.py"],
        ["python", ".venv/bin/deepspeed", "--num_gpus", "2", "launch/train.py", "--train.steps", "9"],
        DEEPSPEED,
    ]
    ranks = [["python3", "-u", "launch/train.py", "--train.steps", "9"], ["python3", "-u", "/home/me/launch/train.py"]]
    found = [bool(re.search(RANKS_ONLY, " ".join(words))) for words in (*launchers, *ranks)]
    assert found == [False] * len(launchers) + [True] * len(ranks)


def test_the_parent_is_looked_up():
    """The launcher's option is in no variable: a child of this process sees it on its parent's command line."""
    child = "from loqt_scale.process.notice import *; print(launchers_notice({'OMPI_COMM_WORLD_SIZE': '2'}).killer)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    for word, killer in (("deepspeed.launcher.launch", "deepspeed"), ("other", "mpirun")):
        done = subprocess.run([sys.executable, "-c", parent, word], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == killer


def test_torchruns_option_is_there_where_it_is_said_to_be():
    """The version is a guess until torch itself agrees."""
    fields = pytest.importorskip("torch.distributed.launcher.api").LaunchConfig.__dataclass_fields__
    assert ("shutdown_timeout" in fields) is knows_shutdown_timeout()


def test_a_run_that_needs_longer_says_so_once():
    told: list[str] = []
    notice = Notice(30.0, "torchrun", "write torchrun --shutdown-timeout {}")
    notice.compare(10.0, 10.0, told.append)
    assert not told
    for _ in range(3):
        notice.compare(10.0, 12.0, told.append)
    assert told == [
        "WARNING: told to stop, this run needs about 32 s for two steps and a save, but torchrun kills it after 30 s: "
        "what came after the last checkpoint would be lost; write torchrun --shutdown-timeout 70"
    ]
    Notice().compare(1e9, 1e9, told.append)
    assert len(told) == 1
    launchers_notice({"LOQT_SCALE_NOTICE_SECONDS": "0.5"}, []).compare(0.2, 0.2, told.append)
    assert f"needs about 1 s for two steps and a save, but {GIVEN} kills it after 0.5 s" in told[1]


@pytest.mark.parametrize("text", ["", "soon", "-1", "nan"])
def test_no_number_is_refused_before_anything_else(text):
    with pytest.raises(ConfigError, match=r"LOQT_SCALE_NOTICE_SECONDS is .*; write a number of seconds, 0 or more"):
        join_launcher({"LOQT_SCALE_NOTICE_SECONDS": text})
