"""The console command: `loqt-scale COMMAND [--config FILE] [--key VALUE ...]`.

A command is one line in `COMMANDS`: a function of the remaining arguments, imported when it is called, so that `--help`
answers without loading torch. What the user can mend (a wrong setting, a run folder in the way) ends as one line on
stderr and exit status 2; anything else keeps its traceback.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loqt_scale.command_options import (
    ExportOptions,
    GenerateOptions,
    PlanOptions,
    parse_options,
    split_checkpoint,
    take_options,
)
from loqt_scale.config_io import parse_run_config
from loqt_scale.config_keys import ConfigError
from loqt_scale.launcher import join_launcher
from loqt_scale.stopping import StopRequest

USER_ERROR = 2
TRACEBACK_VARIABLE = "LOQT_SCALE_TRACEBACK"


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand: what it runs, and its line in `--help`."""

    run: Callable[[Sequence[str], str], None]
    summary: str


def _train(argv: Sequence[str], prog: str) -> None:
    with StopRequest() as stop:
        join_launcher()  # first: of several ranks only one reports a wrong setting
        try:
            config = parse_run_config(argv, prog=prog)
        except ConfigError as error:
            _tell_other_ranks(error)
            raise
        with stop.patience():  # torch, interrupted while it loads, could not be loaded again to tell the other ranks
            from loqt_scale.job import train  # late: torch takes seconds to import, --help and errors should not
        train(config, stop)


def _export(argv: Sequence[str], prog: str) -> None:
    options = parse_options(ExportOptions, argv, prog)
    from loqt_scale.export import export_checkpoint

    done = export_checkpoint(options, progress=print)
    print(f"exported to {done.folder}: {done.files} file(s), {done.size / 2**20:.1f} MiB")


def _generate(argv: Sequence[str], prog: str) -> None:
    options = parse_options(GenerateOptions, argv, prog)
    from loqt_scale.inference import generate

    generate(options)


def _eval(argv: Sequence[str], prog: str) -> None:
    join_launcher()
    if {"-h", "--help"} & set(argv):
        about = "Held-out loss of --checkpoint PATH: a checkpoint's folder, a run's, or an exported model's."
        parse_run_config(["--help"], prog=f"{prog} --checkpoint PATH", about=about)
    path, settings = split_checkpoint(argv)
    from loqt_scale.inference import evaluate_saved

    evaluate_saved(path, settings)


def _plan(argv: Sequence[str], prog: str) -> None:
    if {"-h", "--help"} & set(argv):
        about = "Memory and traffic of a run: [--gpus N] [--gpu-memory 24GB] and the settings of train."
        parse_run_config(["--help"], prog=prog, about=about)
    ours, rest = take_options(PlanOptions, argv)
    options, config = parse_options(PlanOptions, ours, prog), parse_run_config(rest, prog=prog)
    from loqt_scale.plan import report, vocabulary_size

    vocab_size, note = vocabulary_size(config, options.vocab_size)
    print(report(config, options, vocab_size=vocab_size, note=note))


COMMANDS: dict[str, Command] = {
    "train": Command(run=_train, summary="Train a model; one process, or one per rank under a launcher."),
    "plan": Command(run=_plan, summary="What a run needs, before it starts: memory, traffic, what makes it fit."),
    "export": Command(run=_export, summary="Write a checkpoint as a plain Hugging Face model."),
    "generate": Command(run=_generate, summary="Continue a text with a checkpoint or an exported model."),
    "eval": Command(run=_eval, summary="Held-out loss of a checkpoint or an exported model."),
}


def main(argv: Sequence[str] | None = None, prog: str = "loqt-scale") -> int:
    """Run a subcommand.

    Args:
        argv: Arguments without the program name; default `sys.argv[1:]`.
        prog: Program name shown in messages.

    Returns:
        Exit status: 0, or 2 after an error that the user can mend (its message is on stderr).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview(prog), file=sys.stdout if words else sys.stderr)
        return 0 if words else USER_ERROR
    name = words[0]
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"write one of: {', '.join(COMMANDS)}"
        return _fail(prog, f"unknown command '{name}'; {hint}")
    return run_command(name, words[1:], prog=f"{prog} {name}")


def run_command(name: str, argv: Sequence[str], prog: str) -> int:
    """Run one subcommand by name with the arguments that follow it; returns the exit status as `main` does."""
    try:
        COMMANDS[name].run(argv, prog)
    except ConfigError as error:
        return _fail(prog, str(error))
    except (ValueError, OSError, ArithmeticError) as error:
        if TRACEBACK_VARIABLE in os.environ or not (place := _raised_here(error)):
            raise
        # Not once per host as above: a rank may fail alone (its disk, its share of the data).
        return _fail(prog, f"{error} ({place}; {TRACEBACK_VARIABLE}=1 shows the traceback)", every_rank=True)
    return 0


def _overview(prog: str) -> str:
    lines = [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([f"usage: {prog} COMMAND ...", "", *lines, "", f"{prog} COMMAND --help lists the settings."])


def _tell_other_ranks(error: ConfigError) -> None:
    """One rank's file may be missing, or be another one: the others would wait for it."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from loqt_scale.together import leave_word

        leave_word(error)


def _fail(prog: str, message: str, every_rank: bool = False) -> int:
    """Print one error line. Ranks of one host read the same files, so the first speaks for all unless told not to."""
    rank = os.environ.get("RANK", "0")
    if every_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        who = f"{prog} [rank {rank}]" if "RANK" in os.environ else prog
        print(f"{who}: error: {message}", file=sys.stderr, flush=True)
    return USER_ERROR


def _raised_here(error: BaseException) -> str | None:
    """Return module:line if the error was raised by this package itself: then its message is written for the user.

    The same types raised inside torch or the standard library are somebody's bug, and need their traceback.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return None
    frame, line = frames[-1]
    module = str(frame.f_globals.get("__name__", ""))
    return f"{module}:{line}" if module.startswith("loqt_scale.") else None


if __name__ == "__main__":
    sys.exit(main())
