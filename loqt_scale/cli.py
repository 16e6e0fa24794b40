"""The console command: `loqt-scale COMMAND [--config FILE] [--key VALUE ...]`.

A command is one line in `COMMANDS`: a function of the remaining arguments, imported when it is called, so that `--help`
answers without loading torch. `run_command` alone decides what a person sees of an exception, whatever raised it:

    UserError                     one line, status 2: something that the person can mend
    full memory, a disk           one line, status 2, and the traceback in the error log
    anything else                 one line, status 1, and the traceback in the error log: a bug of ours

The error log is in the run's folder, one for each rank (`process.error_log`); LOQT_SCALE_TRACEBACK=1 shows tracebacks.
"""

from __future__ import annotations

import difflib
import errno
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from loqt_scale.config.commands import (
    ExportOptions,
    GenerateOptions,
    PlanOptions,
    parse_options,
    split_checkpoint,
    take_options,
)
from loqt_scale.config.yaml import override_run_config, parse_run_config
from loqt_scale.errors import ConfigError, UserError, advice_on, explained, machine_error, reason_of, shortened
from loqt_scale.process.environment import has_peers, has_rank, rank_label, speaks_for_its_node, wants_tracebacks
from loqt_scale.process.error_log import keep_errors_in, log_error
from loqt_scale.process.launcher import join_launcher, wait_asleep
from loqt_scale.process.streams import CLOSED, Watch, warn, watched_stdout
from loqt_scale.training.stopping import StopRequest

USER_ERROR, BUG = 2, 1


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
            from loqt_scale.training.job import (
                train,  # late: torch takes seconds to import, --help and errors should not
            )
        train(config, stop)


def _export(argv: Sequence[str], prog: str) -> None:
    options = parse_options(ExportOptions, argv, prog)
    from loqt_scale.export import export_checkpoint
    from loqt_scale.metrics import Console

    console = Console()  # the work is a folder: nobody need read of it
    advice = "make room on its disk, or write another --out"
    with explained(f"{options.checkpoint} cannot be exported to {options.out}", advice, of=(OSError,)):
        done = export_checkpoint(**asdict(options), progress=console.line)
    console.line(f"exported to {done.folder}: {done.files} file(s), {done.size / 2**20:.1f} MiB")
    console.close()


def _generate(argv: Sequence[str], prog: str) -> None:
    options = parse_options(GenerateOptions, argv, prog)
    from loqt_scale.inference import generate

    generate(**asdict(options))


def _eval(argv: Sequence[str], prog: str) -> None:
    join_launcher()
    if {"-h", "--help"} & set(argv):
        about = "Held-out loss of --checkpoint PATH: a checkpoint's folder, a run's, or an exported model's."
        parse_run_config(["--help"], prog=f"{prog} --checkpoint PATH", about=about)
    path, settings = split_checkpoint(argv)
    from loqt_scale.inference import evaluate_saved

    evaluate_saved(path, lambda saved: override_run_config(saved, settings, prog))


def _plan(argv: Sequence[str], prog: str) -> None:
    if {"-h", "--help"} & set(argv):
        about = (
            "Memory, traffic and speed of a run: [--gpus N] [--gpu-memory 24GB] [--gpu H100] [--interconnect ib400] "
            "[--devices FILE] [--tokens 20e9] and the settings of train."
        )
        parse_run_config(["--help"], prog=prog, about=about)
    ours, rest = take_options(PlanOptions, argv)
    options, config = parse_options(PlanOptions, ours, prog), parse_run_config(rest, prog=prog)
    from loqt_scale.plan import describe_plan, find_machine, vocabulary_size

    on = None
    if options.gpu is not None:
        on = find_machine(options.gpu, gpus=options.gpus, interconnect=options.interconnect, path=options.devices)
    vocab_size, note = vocabulary_size(config.data, config.model, options.vocab_size)
    tokens = None if options.tokens is None else int(options.tokens)
    said = describe_plan(
        config,
        ranks=options.gpus,
        vocab_size=vocab_size,
        gpu_memory=options.gpu_memory,
        note=note,
        on=on,
        tokens=tokens,
    )
    print(said)


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
        Exit status: 0; 2 after an error that a person can mend; 1 after a bug. Its line is on stderr. 141, without a
        line, if whoever read standard output has gone.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        if not words:
            warn(_overview(prog))
            return USER_ERROR
        with watched_stdout() as watch, suppress(OSError):
            print(_overview(prog))
        return _delivered(watch, prog)
    name = words[0]
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"write one of: {', '.join(COMMANDS)}"
        return _fail(prog, f"unknown command '{name}'; {hint}")
    return run_command(name, words[1:], prog=f"{prog} {name}")


def run_command(name: str, argv: Sequence[str], prog: str) -> int:
    """Run one subcommand by name with the arguments that follow it; returns the exit status as `main` does."""
    keep_errors_in(None)
    wait_asleep()
    with watched_stdout() as watch:
        try:
            COMMANDS[name].run(argv, prog)
            return _delivered(watch, prog)
        except KeyboardInterrupt:
            return _fail(prog, "interrupted", status=128 + signal.SIGINT)
        except SystemExit as end:  # with 0 after --help, --print_config
            if not end.code and (status := _delivered(watch, prog)):
                return status
            raise
        except Exception as error:
            if _may_be_of_stdout(error) and (status := _delivered(watch, prog)):
                return status
            if wants_tracebacks():
                raise
            return _report(prog, error)


def _may_be_of_stdout(error: Exception) -> bool:
    return isinstance(error, OSError) and not isinstance(error, UserError) and error.filename is None


def _delivered(watch: Watch, prog: str) -> int:
    """0 if standard output has taken all that was printed; where its reader has gone, nobody is told."""
    error = watch.undelivered()
    if error is None:
        return 0
    if isinstance(error, BrokenPipeError):
        return CLOSED
    advice = "let it lead somewhere, to /dev/null say" if error.errno == errno.EBADF else advice_on(error)
    return _fail(prog, f"standard output cannot be written to ({reason_of(error)}); {advice}", every_rank=True)


def _report(prog: str, error: Exception) -> int:
    """Say what happened on one line; keep the traceback of what no message was written for."""
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))  # where the run goes on, say
    if isinstance(error, UserError):
        # ranks of one host read the same settings; but a rank may be alone with its disk, its share of the data
        return _fail(prog, f"{error}{notes}", every_rank=not isinstance(error, ConfigError))
    log, machine = log_error(error), machine_error(error)
    where = f"the traceback is in {log}" if log else "its traceback is above, there is nowhere to keep it"
    if log is None:
        traceback.print_exception(error)
    if machine is not None:
        return _fail(prog, f"{machine}{notes} ({where})", every_rank=True)
    what = f"{type(error).__name__}: {shortened(' '.join(str(error).split()), 300)}"
    return _fail(prog, f"{what}{notes}; a bug, please report it: {where}", every_rank=True, status=BUG)


def _overview(prog: str) -> str:
    lines = [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([f"usage: {prog} COMMAND ...", "", *lines, "", f"{prog} COMMAND --help lists the settings."])


def _tell_other_ranks(error: ConfigError) -> None:
    """One rank's file may be missing, or be another one: the others would wait for it."""
    if has_peers():
        from loqt_scale.training.together import leave_word

        leave_word(error)


def _fail(prog: str, message: str, every_rank: bool = False, status: int = USER_ERROR) -> int:
    """Print one error line. Ranks of one host read the same files, so the first speaks for all unless told not to."""
    if every_rank or speaks_for_its_node():
        who = f"{prog} [rank {rank_label()}]" if has_rank() else prog
        line = f"{who}: error: {' '.join(message.split())}"
        warn(line.encode("utf-8", "backslashreplace").decode())
    return status


if __name__ == "__main__":
    sys.exit(main())
