"""The command line: every mistake gets one line or tyro's box, never a traceback, and help is whole."""

import contextlib
import io
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import pytest
from safetensors import SafetensorError

from minids import cli


def called(*words: str) -> tuple[int, str]:
    """Exit status and stderr of ``python -m minids words``."""
    done = subprocess.run([sys.executable, "-m", "minids", *words], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def refused(capsys, *words: str) -> str:
    """What stderr says when main refuses `words` with status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_wrong_command_is_answered_with_the_one_that_was_meant(capsys) -> None:
    said = refused(capsys, "trian")
    assert said.startswith("error: unknown command 'trian', did you mean train?\n")
    assert all(f"  {name} " in said for name in cli.COMMANDS)
    assert "did you mean" not in refused(capsys, "zzz")


@pytest.mark.parametrize("words", [["help"], ["--help"], ["-h"], ["--version"]])
def test_help_and_version_succeed(words, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0
    assert ("minids 0." if words == ["--version"] else "usage: ") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "--device", "gpu"], "error: device = 'gpu': must be cpu, cuda or cuda:N"),
        (["train", "--preset", "nope"], "error: preset='nope': allowed are toy, small, v2_lite, v3"),
        (["train", "--recipe.tokens", "-5"], "error: Recipe.total_tokens = -5: must be >= 1"),
        (["train", "--data.corpus", "folder"], "error: DataConfig.path=None: "),  # a nested dataclass
        (["train", "--model", "hiden_size=64"], "error: ModelConfig has no field hiden_size; did you mean hidden_size?"),
        (["train", "--micro-batch", "0"], "error: micro_batch = 0: must be at least 1"),
    ],
)
def test_a_refused_value_is_one_line_of_text(words, line, capsys) -> None:
    said = refused(capsys, *words)
    assert said.startswith(line), said
    assert said.count("\n") == 1


def test_a_word_that_cannot_be_read_shows_its_option(capsys) -> None:
    said = refused(capsys, "train", "--recipe.lr", "abc")
    assert "--recipe.lr FLOAT" in said and "'abc'" in said
    assert "--length INT" in refused(capsys, "count", "toy", "--lenght", "3")  # the one that was meant


def test_help_keeps_no_line_break_of_the_source(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "fp16 with loss scaling. auto: fp32 on the CPU" in text
    words = re.sub(r"\n *│", "", text)
    assert "--optim.loss-scaling, --optim.no-loss-scaling" in words  # both, or the sentence beside it says the opposite


@dataclass
class Settings:
    pass


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (PermissionError(13, "Permission denied", "runs/toy"), 2, "error: [Errno 13] Permission denied: 'runs/toy'"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), 2,
         "error: Error while serializing: I/O error: No space left on device (os error 28); "
         "checkpoints from before are whole"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C; broken did not finish"),
    ],
)
def test_faults_of_the_machine_are_one_line(error, status, line, capsys, monkeypatch) -> None:
    def fail(_):
        raise error

    monkeypatch.setattr(sys.modules[__name__], "fail", fail, raising=False)
    monkeypatch.setitem(cli.COMMANDS, "broken", (__name__, "Settings", "fail", "fails"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["broken"])
    assert stop.value.code == status
    assert capsys.readouterr().err.strip() == line


def test_a_reader_that_leaves_is_no_fault() -> None:
    """`python -m minids count v3 | head -1`"""
    program = subprocess.Popen([sys.executable, "-m", "minids", "count", "toy"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    program.stdout.close()
    assert program.stderr.read() == "" and program.wait(timeout=60) == 1
    program.stderr.close()


def test_faults_of_the_program_are_seen_whole(monkeypatch) -> None:
    def fail(_):
        raise RuntimeError("a fault")

    monkeypatch.setattr(sys.modules[__name__], "fail", fail, raising=False)
    monkeypatch.setitem(cli.COMMANDS, "broken", (__name__, "Settings", "fail", "fails"))
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(["broken"])


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    status, said = called("classroom", "--out", str(tmp_path / "file" / "course"))
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said


def test_the_tables_of_r1_say_what_their_columns_are(tmp_path: Path, capsys) -> None:
    from minids.rl.stages_run import COLUMNS, R1RunConfig, open_stages, run_stages, write_atomic

    config = R1RunConfig()
    made = open_stages(tmp_path, {}, overwrite=False)
    settings = json.loads(json.dumps(asdict(config), default=str))
    del settings["out"], settings["overwrite"]
    made |= {"settings": settings, "stages": {"sft": {"cpu_seconds": 2.0, **dict.fromkeys(COLUMNS, 0.5)}}}
    write_atomic(tmp_path / "stages.json", json.dumps(made))
    run_stages(tmp_path, config, [("sft", None, 0)], ("accuracy", "mixed"))
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["stage", "CPU", "s", "accuracy", "mixed"]
    assert said[1].split() == ["sft", "2.0", "0.500", "0.500"]
    assert said[3:5] == [f"{name:<10}{COLUMNS[name]}" for name in ("accuracy", "mixed")]
    assert said[5] == f"ask it    python -m minids generate --checkpoint {tmp_path / 'sft'} --prompt 7+1+6+2+6:"


def test_the_readme_s_python_runs_and_its_commands_are_there(tmp_path: Path, monkeypatch) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall("```python\n(.*?)```", text, re.DOTALL)
    exec(block, {})
    assert (tmp_path / "runs" / "mine" / "config.json").exists()
    lines = [line.split("#")[0].split() for line in "".join(re.findall("```bash\n(.*?)```", text, re.DOTALL)).splitlines()]
    called = {line[line.index("minids") + 1] for line in lines if "minids" in line}
    assert called >= {"train", "generate", "count", "schedule", "rl", "r1", "classroom"} and called <= set(cli.COMMANDS)
    for line in lines:
        if "minids" in line:  # every option is one of its command's
            name, words = line[line.index("minids") + 1], line[line.index("minids") + 2:]
            shown = help_of(name)
            assert not [w for w in words if w.startswith("--") and not re.search(rf"{re.escape(w)}\b", shown)], line


@cache
def help_of(command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return out.getvalue()
