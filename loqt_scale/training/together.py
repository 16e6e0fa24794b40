"""A job of several ranks ends on all of them, at once, and with the same reason: that of the rank which began it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from loqt_scale.errors import one_line
from loqt_scale.process.environment import agent_hosts_store, hosts_store, launched_rank, launched_world_size
from loqt_scale.strategies import (
    LostRankError,
    RollCall,
    StoppedElsewhere,
    StoreLine,
    open_store,
)
from loqt_scale.training.rescue import TOGETHER
from loqt_scale.training.stopping import Stopped

LOOK_SECONDS = 20.0  # for rank 0, by a rank that only has to say why it ends


@contextmanager
def one_for_all(timeout_seconds: float) -> Iterator[RollCall]:
    """Context of a job on this rank, from before it joins a process group until it has left it. Every rank.

    Args:
        timeout_seconds: How long to wait for the other ranks, and how long one of them may hang.

    Raises:
        LostRankError: What went wrong here was another rank's end, or absence.
        Stopped: Another rank was told to stop, and none of them had anything to save.
    """
    roll = _open(timeout_seconds)
    try:
        with _as_stopped(), _its_word(roll):
            roll.start()
            yield roll
    finally:
        roll.close()


def leave_word(error: BaseException) -> None:
    """Tells the other ranks of an error that came before `one_for_all`, if they can be reached. One rank or several.

    torchrun needs no such word: its agent ends the others itself.
    """
    if launched_world_size() == 1 or agent_hosts_store():
        return
    with suppress(ConnectionError, RuntimeError, ValueError, KeyError):
        roll = _open(LOOK_SECONDS)
        roll.end("failed", one_line(error))
        roll.close()


def _open(timeout_seconds: float) -> RollCall:
    store = open_store(timeout_seconds)
    line = StoreLine()
    return RollCall(
        store,
        launched_rank(),
        launched_world_size(),
        timeout_seconds=timeout_seconds,
        keeps_store=hosts_store(),
        store_lives=line.alive,
    )


@contextmanager
def _its_word(roll: RollCall) -> Iterator[None]:
    """Leaves word of how this rank ends; turns a failure that another rank began into an error which says so."""
    try:
        yield
    except Stopped as stopped:
        roll.end("done" if _together(stopped) else "stopped", number=stopped.number)
        raise
    except LostRankError:
        roll.end("lost")
        raise
    except RuntimeError as error:  # what torch.distributed raises; this rank's own failure too
        guilty = roll.blame()
        if guilty is None:
            roll.end("failed", one_line(error))
            raise
        roll.end("lost")
        raise guilty from error
    except BaseException as error:
        roll.end("done" if _together(error) else "failed", one_line(error))
        raise
    roll.end("done")


def _together(error: BaseException) -> bool:
    """Whether all ranks raise this, each by itself: then none waits for another."""
    return isinstance(error, TOGETHER) or (isinstance(error, Stopped) and error.together)


@contextmanager
def _as_stopped() -> Iterator[None]:
    try:
        yield
    except StoppedElsewhere as elsewhere:
        raise Stopped(elsewhere.number) from elsewhere
