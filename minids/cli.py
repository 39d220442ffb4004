"""``python -m minids COMMAND``: one dataclass and one function a command; tyro makes the flags from the dataclass.

A command's module is imported only when it is called, so that help and counting do not wait for what they do not use.
"""

import contextlib
import difflib
import importlib
import io
import os
import sys
import traceback

from minids import __version__

# name -> (module, dataclass of its settings, function that runs them, what it does)
COMMANDS = {
    "train": ("minids.train.trainer", "TrainConfig", "train", "train a miniature DeepSeek-V3 on real text"),
    "generate": ("minids.infer.run", "GenerateConfig", "run_generate", "write text with a trained model"),
    "experiment": ("minids.experiments.run", "ExperimentConfig", "run_experiment", "run many small trainings"),
    "count": ("minids.count", "CountConfig", "run_count", "count a model's parameters, FLOPs, cache and FP8 scales"),
    "rl": ("minids.rl.run", "RLConfig", "run_rl", "teach a model to reason by rewards for right answers"),
    "r1": ("minids.rl.stages_run", "R1RunConfig", "run_r1", "the four stages of R1, from a base model to a reasoner"),
    "distill": ("minids.rl.stages_run", "DistillRunConfig", "run_distill", "a small model learns from a reasoner"),
    "schedule": ("minids.pipeline.command", "ScheduleConfig", "run_schedule", "draw and time a pipeline schedule"),
    "classroom": ("minids.classroom.course", "ClassroomConfig", "run_classroom", "write the exercises for nbgrader"),
}
POSITIONAL = {"count", "schedule"}  # their required settings are given without a flag: count v3, schedule dualpipe


def usage() -> str:
    lines = [f"  {name:<10} {what}" for name, (*_, what) in COMMANDS.items()]
    return "\n".join(["usage: python -m minids COMMAND [options]; COMMAND --help lists the options", *lines])


def wrong_command(word: str) -> str:
    """What to say to a command that is not there: the one that was meant, if one is like it, and all."""
    like = difflib.get_close_matches(word, COMMANDS, n=1)
    return f"error: unknown command {word!r}{f', did you mean {like[0]}?' if like else ''}\n{usage()}"


def read_settings(settings: type, command: str, what: str, words: list[str]) -> object:
    """`words` as the dataclass `settings`. Errors: SystemExit(2) with tyro's box, which shows the option, for a word that
    cannot be read; the ValueError of the dataclass, for a value that is refused."""
    import tyro

    style = [tyro.conf.PositionalRequiredArgs] if command in POSITIONAL else []
    box = io.StringIO()
    try:
        with flowing_help(), contextlib.redirect_stderr(box):
            return tyro.cli(settings, args=words, prog=f"python -m minids {command}",
                            description=what[0].upper() + what[1:] + ".", config=tuple(style))
    except SystemExit as stop:
        refused = stop.__context__
        while refused is not None and "__post_init__" not in [f.name for f in traceback.extract_tb(refused.__traceback__)]:
            refused = refused.__context__
        if isinstance(refused, ValueError):
            raise ValueError(str(refused)) from None
        sys.stderr.write(box.getvalue())
        raise


@contextlib.contextmanager
def flowing_help():
    """Fields' docstrings as one paragraph each. tyro 1.0 keeps the line breaks of the source, and help gets ragged."""
    import docstring_parser

    read = docstring_parser.parse_from_object

    def flowing(thing: object):
        found = read(thing)
        for field in found.params:
            field.description = " ".join((field.description or "").split()) or None
        return found

    docstring_parser.parse_from_object = flowing
    try:
        yield
    finally:
        docstring_parser.parse_from_object = read


def main(argv: list[str] | None = None) -> None:
    """Runs one command. Exit status 2 for bad input, with one line that says what is allowed; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        print(f"minids {__version__}")
        sys.exit(0)
    if argv[0] not in COMMANDS:
        print(wrong_command(argv[0]), file=sys.stderr)
        sys.exit(2)
    module_name, settings, function, what = COMMANDS[argv[0]]
    try:
        module = importlib.import_module(module_name)
        getattr(module, function)(read_settings(getattr(module, settings), argv[0], what, argv[1:]))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:  # a folder that cannot be written, a full disk: no fault of the program's
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\nstopped by Ctrl-C; {argv[0]} did not finish", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        name = type(error).__name__
        if name == "SafetensorError" and "I/O error" in str(error):  # how safetensors says that the disk is full
            print(f"error: {error}; checkpoints from before are whole", file=sys.stderr)
            sys.exit(2)
        if name != "TrainingStopped":  # that one is an answer, others are faults to be seen whole
            raise
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)
