"""``python -m minids COMMAND``: one dataclass and one function a command; tyro makes the flags from the dataclass.

A command's module is imported only when it is called, so that help and counting do not wait for what they do not use.
"""

import importlib
import sys

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


def main(argv: list[str] | None = None) -> None:
    """Runs one command. Exit status 2 for bad input, with one line that says what is allowed."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if argv else 2)
    if argv[0] not in COMMANDS:
        print(f"error: unknown command {argv[0]!r}\n{usage()}", file=sys.stderr)
        sys.exit(2)
    import tyro

    module_name, settings, function, what = COMMANDS[argv[0]]
    module = importlib.import_module(module_name)
    style = (tyro.conf.FlagCreatePairsOff, *([tyro.conf.PositionalRequiredArgs] if argv[0] in POSITIONAL else []))
    try:
        config = tyro.cli(getattr(module, settings), args=argv[1:], prog=f"python -m minids {argv[0]}",
                          description=what[0].upper() + what[1:] + ".", config=style)
        getattr(module, function)(config)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "TrainingStopped":  # that one is an answer, others are faults to be seen whole
            raise
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(1)
