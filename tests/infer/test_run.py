"""The command's engine: text streams whole characters, prompts and checkpoints are found, errors come first."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids import ModelConfig, Transformer
from minids.checkpoint import save
from minids.data.tokenizer import train_tokenizer
from minids.infer import generate
from minids.infer.run import GenerateConfig, run_generate
from minids.infer.text import TextStream

TOKENIZER = train_tokenizer(["héllo wörld 🎉 print(x)\n" * 5, "日本語 テキスト 🎉🚀" * 3], 300)
tokens_of_any_kind = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30)


def pieces(tokens: list[int]) -> list[str]:
    stream = TextStream(TOKENIZER)
    return [*(stream.push(token) for token in tokens), stream.flush()]


@settings(max_examples=200, deadline=None)
@given(tokens_of_any_kind)
def test_pieces_join_to_the_text_of_any_tokens(tokens):
    """Bytes that are no UTF-8 and special tokens included."""
    assert "".join(pieces(tokens)) == TOKENIZER.decode(tokens)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12))
def test_text_streams_without_a_broken_character(text):
    got = pieces(TOKENIZER.encode(text))
    assert "".join(got) == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(got[:-1])


def test_an_emoji_of_several_tokens_appears_at_its_last():
    tokens = TOKENIZER.encode("a🦜b")
    assert len(tokens) == 5  # the parrot is in no token: its first two bytes, which emojis share, are one, the others alone
    assert pieces(tokens) == ["a", "", "", "🦜", "b", ""]


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    tokens = TOKENIZER.encode("🦜")[:2]
    assert pieces(tokens) == ["", "", "\ufffd"]
    assert TextStream(TOKENIZER).flush() == ""


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab🎉", max_size=20), st.lists(st.text(alphabet="ab🎉", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_its_first_stop_string(text, stops):
    """Against the definition, token by token: the shortest beginning of the text that ends with a stop string."""
    stream, shown = TextStream(TOKENIZER, stops), ""
    for token in TOKENIZER.encode(text):
        shown += stream.push(token)
        assert not any(stop in shown for stop in stops)
        if stream.stopped:
            break
    shown += stream.flush()
    if not any(stop in text for stop in stops):
        assert shown == text and not stream.stopped
        return
    assert stream.stopped
    # All that is complete at a token's end is looked at together; the leftmost string there counts.
    assert text.startswith(shown) and any(text.startswith(shown + stop) for stop in stops)
    assert not any(stop in shown for stop in stops)


def test_a_stop_string_across_tokens_is_held_back_until_it_is_decided():
    tokens = [TOKENIZER.encode(letter)[0] for letter in "axbxc"]
    stream = TextStream(TOKENIZER, ["xc"])
    assert [stream.push(token) for token in tokens] == ["a", "", "xb", "", ""] and stream.stopped
    assert stream.flush() == ""
    stream = TextStream(TOKENIZER, ["xc"])
    assert [stream.push(token) for token in tokens[:2]] == ["a", ""] and stream.flush() == "x" and not stream.stopped


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "step-3"
    torch.manual_seed(0)
    config = ModelConfig.preset("toy", vocab_size=TOKENIZER.vocab_size, num_hidden_layers=2, initializer_range=0.2)
    save(Transformer(config), folder)
    TOKENIZER.save(folder / "tokenizer.json")
    (folder / "trainer.json").write_text("{}")
    (folder.parent / "latest").write_text("step-3\n")
    return folder


def run(folder, *prompts, **settings) -> tuple[list[str], str]:
    out = io.StringIO()
    return run_generate(GenerateConfig(folder, prompt=prompts, max_new_tokens=12, **settings), out), out.getvalue()


def expected(folder, prompt: str, **knobs) -> str:
    """The text by the shortest way: load, generate one row, decode."""
    from minids.checkpoint import load

    row = [TOKENIZER.bos_id, *TOKENIZER.encode(prompt)]
    [new] = generate(load(folder), [row], 12, eos_token_id=TOKENIZER.eos_id, **knobs)
    return TOKENIZER.decode([token for token in new if token != TOKENIZER.eos_id])


def test_one_prompt_is_continued_on_the_terminal(checkpoint, capsys):
    written, shown = run(checkpoint, "héllo", temperature=0.9, top_p=0.8, seed=5)
    assert written == [expected(checkpoint, "héllo", temperature=0.9, top_p=0.8, seed=5)]
    assert shown == "héllo" + written[0] + "\n"
    captured = capsys.readouterr()
    assert captured.out == "" and "tokens/s" in captured.err


def test_several_prompts_are_printed_one_after_the_other(checkpoint):
    written, shown = run(checkpoint, "print", "a longer prompt", temperature=0.7, seed=9)
    assert written == [expected(checkpoint, p, temperature=0.7, seed=9 + i, top_p=0.95)
                       for i, p in enumerate(("print", "a longer prompt"))]  # fmt: skip
    assert shown == (f"--- prompt 1 of 2 ---\nprint{written[0]}\n\n--- prompt 2 of 2 ---\na longer prompt{written[1]}\n\n")


@pytest.mark.parametrize("flag", [[], ["1"]])
def test_speculation_on_the_command_line(checkpoint, capsys, flag):
    """The same greedy text, streamed; what it gained on stderr. --speculate alone means all MTP modules."""
    from minids.cli import main

    arguments = ["generate", "--checkpoint", str(checkpoint), "--prompt", "print", "--temperature", "0"]
    main(arguments + ["--max-new-tokens", "12"])
    plain = capsys.readouterr()
    main(arguments + ["--max-new-tokens", "12", "--speculate", *flag])
    speculated = capsys.readouterr()
    assert speculated.out == plain.out == "print" + expected(checkpoint, "print", temperature=0.0) + "\n"
    assert "speculation" not in plain.err
    assert "speculation with 1 draft a step: acceptance by position" in speculated.err
    assert "tokens a step" in speculated.err and "tokens/s" in speculated.err


@pytest.mark.parametrize("flag", [["2"], ["-1"], ["many"], ["1", "1"]])
def test_wrong_numbers_of_drafts_are_refused_on_the_command_line(checkpoint, capsys, flag):
    from minids.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--checkpoint", str(checkpoint), "--prompt", "print", "--speculate", *flag])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert "speculate" in captured.err + captured.out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--max-new-tokens", "-10"], "max_new_tokens must be at least 1, got -10"),
        (["--device", "gpu"], "device='gpu' cannot be used (no such device); allowed are cpu, cuda, cuda:N"),
        (["--prompt-file", "nope.txt"], "prompt_file='nope.txt': no such file"),
    ],
)
def test_a_refused_setting_is_the_only_thing_that_is_written(checkpoint, capsys, words, line):
    from minids.cli import main

    with pytest.raises(SystemExit):
        main(["generate", "--checkpoint", str(checkpoint), "--prompt", "print", *words])
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {line}\n")  # not the prompt


def test_stop_strings_end_each_text(checkpoint):
    whole = expected(checkpoint, "héllo", temperature=0.0)
    stop = whole[3:5]
    written, shown = run(checkpoint, "héllo", temperature=0.0, stop=(stop,))
    assert written == [whole[: whole.index(stop)]] and shown == "héllo" + written[0] + "\n"
    both, _ = run(checkpoint, "héllo", "print", temperature=0.0, stop=(stop,), speculate=True)
    other = expected(checkpoint, "print", temperature=0.0)
    assert both == [written[0], other[: other.index(stop)] if stop in other else other]


def test_a_run_folder_gives_its_latest_checkpoint(checkpoint):
    assert run(checkpoint.parent, "x", temperature=0.0) == run(checkpoint, "x", temperature=0.0)


def test_a_tokenizer_beside_the_checkpoint_is_found(checkpoint):
    whole = run(checkpoint, "x", temperature=0.0)
    (checkpoint / "tokenizer.json").rename(checkpoint.parent / "tokenizer.json")
    try:
        assert run(checkpoint, "x", temperature=0.0) == whole
    finally:
        (checkpoint.parent / "tokenizer.json").rename(checkpoint / "tokenizer.json")


def test_a_prompt_file_is_one_more_prompt(checkpoint, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("wörld\nprint", encoding="utf-8")
    assert run(checkpoint, prompt_file=file, temperature=0.0) == run(checkpoint, "wörld\nprint", temperature=0.0)


def test_dtype_is_the_models(checkpoint, monkeypatch):
    seen = []
    from minids.infer import run as module

    real = module.generate
    monkeypatch.setattr(
        module, "generate", lambda model, *a, **k: (seen.append(model.lm_head.weight.dtype), real(model, *a, **k))[1]
    )
    run(checkpoint, "x", dtype="bfloat16")
    run(checkpoint, "x")
    assert seen == [torch.bfloat16, torch.float32]


def test_errors_before_anything_is_loaded(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("minids.infer.run.load", lambda *a, **k: pytest.fail("the model was loaded"))
    for change, error, message in [
        (dict(folder=checkpoint), ValueError, "no prompt given"),
        (dict(folder=tmp_path, prompt="x"), FileNotFoundError, "holds neither a checkpoint .* nor a training run"),
        (dict(folder=tmp_path / "none", prompt="x"), FileNotFoundError, "none' holds neither a checkpoint"),
        (dict(folder=checkpoint, prompt="x", prompt_file=tmp_path / "no.txt"), FileNotFoundError, "no.txt"),
        (dict(folder=checkpoint, prompt="x", temperature=-1.0), ValueError, "temperature must be .* got -1.0"),
        (dict(folder=checkpoint, prompt="x", top_p=2.0), ValueError, "top_p must be .* got 2.0"),
        (dict(folder=checkpoint, prompt="x", stop=("",)), ValueError, "stop must hold no empty string"),
        (dict(folder=checkpoint, prompt="x", seed=-1), ValueError, "seed must be .* got -1"),
        (dict(folder=checkpoint, prompt="x", device="quantum"), ValueError, "device='quantum'"),
    ]:
        prompt = (change.pop("prompt"),) if "prompt" in change else ()
        with pytest.raises(error, match=message):
            run_generate(GenerateConfig(change.pop("folder"), prompt=prompt, **change), io.StringIO())
