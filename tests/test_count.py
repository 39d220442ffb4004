"""Counting: formula and built model agree for every preset and for random shapes, quickly and in little memory."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids import ModelConfig, Transformer
from minids.config import PRESETS
from minids.count import count, count_on_meta


@pytest.mark.parametrize("name", PRESETS)
def test_presets_agree_with_the_built_model(name):
    figures = count(ModelConfig.preset(name))
    assert count_on_meta(ModelConfig.preset(name)) == {"main": figures["main"], "mtp": figures["mtp"]}


@settings(max_examples=40)
@given(layers=st.integers(1, 4), dense=st.integers(0, 4), q_rank=st.sampled_from([None, 5]), shared=st.integers(0, 2),
       depth=st.integers(0, 2), tied=st.booleans(), method=st.sampled_from(["noaux_tc", "greedy"]))
def test_random_shapes_agree(layers, dense, q_rank, shared, depth, tied, method):
    cfg = ModelConfig.preset("toy", num_hidden_layers=layers, first_k_dense_replace=min(dense, layers), q_lora_rank=q_rank,
                             n_shared_experts=shared, num_nextn_predict_layers=depth, tie_word_embeddings=tied,
                             topk_method=method)
    figures = cfg.count()
    assert count_on_meta(cfg) == {"main": figures["main"], "mtp": figures["mtp"]}


def test_activated_is_what_one_token_touches():
    """Gradients tell: of one token's pass, count the expert rows and other parameters that received any."""
    torch.manual_seed(0)
    cfg = ModelConfig.preset("toy", num_nextn_predict_layers=0)
    model = Transformer(cfg)
    model(torch.tensor([[5]])).logits.square().sum().backward()
    touched = 0
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            touched += sum(grad.numel() for grad in parameter.grad if grad.abs().sum() > 0)
        else:
            touched += parameter.numel()
    biases = sum(gate.e_score_correction_bias.numel() for gate in model.routers())
    assert touched + biases == cfg.count()["activated"]


def test_command_prints_the_issue_figures_in_under_a_gigabyte():
    # VmHWM is this program's own peak; ru_maxrss, where there is no /proc, also counts that of the process that started it.
    code = ("import os, resource, sys; from minids.cli import main; main(['count', 'v3', '--json']);"
            "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
            "status = open('/proc/self/status').read() if os.path.exists('/proc/self/status') else '';"
            "print(status.split('VmHWM:')[1].split()[0] if status else peak, file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert figures["main"] == 671026419200 and figures["flops_per_token"] == 250456015872
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stderr.split()[-1]) * unit < 1e9


def test_command_refuses_bad_input(capsys):
    from minids.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["count", "v4"])
    assert stopped.value.code == 2 and "preset='v4'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["kount"])
    assert stopped.value.code == 2 and "unknown command 'kount'" in capsys.readouterr().err
