"""Loss and gradient of the same rollouts in TRL's own trainer and in ours, for every setting that both have.

Ours starts from TRL's model too: the policy is a small Llama of transformers, and both sides score the same padded rollouts
with it, so what is compared is temperature, ratio, clip, KL, mask and averaging, down to every parameter's gradient.
"""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
trl = pytest.importorskip("trl", reason="needs trl (pip install trl==1.16.0), the independent GRPO to compare with")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets", reason="needs datasets, which trl trains from")

from minids.rl.grpo import GRPOConfig, grpo_loss, token_logprobs  # noqa: E402

VOCAB, PROMPT, ANSWER, ROWS = 32, 4, 6, 8
CASES = {
    "paper": ({"loss_type": "grpo", "beta": 0.04}, GRPOConfig(beta=0.04), 1.0),
    "no reference": ({"loss_type": "grpo", "beta": 0.0}, GRPOConfig(beta=0.0), 1.0),
    "temperature": ({"loss_type": "grpo", "beta": 0.04, "temperature": 0.7}, GRPOConfig(beta=0.04), 0.7),
    "clip-higher": ({"loss_type": "grpo", "beta": 0.0, "epsilon": 0.1, "epsilon_high": 0.28},
                    GRPOConfig(beta=0.0, clip_low=0.1, clip_high=0.28), 1.0),
    "dapo": ({"loss_type": "dapo", "beta": 0.0, "epsilon_high": 0.28},
             GRPOConfig(beta=0.0, clip_high=0.28, length="token"), 1.0),
    "dr_grpo": ({"loss_type": "dr_grpo", "beta": 0.0},
                GRPOConfig(beta=0.0, length="constant", length_scale=ANSWER, std=None), 1.0),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=2, max_position_embeddings=32, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config).double()


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")


def rollouts():
    """Left-padded prompts, right-padded answers, and old and reference scores some way off the policy's."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, ANSWER + 1, (ROWS, 1), generator=g)
    prompt_mask = (torch.arange(PROMPT) >= torch.randint(0, PROMPT - 1, (ROWS, 1), generator=g)).long()
    return {
        "prompt_ids": torch.randint(2, VOCAB, (ROWS, PROMPT), generator=g) * prompt_mask, "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(2, VOCAB, (ROWS, ANSWER), generator=g),
        "completion_mask": (torch.arange(ANSWER) < lengths).long(),
        "advantages": torch.randn(ROWS, generator=g, dtype=torch.float64),
        "num_items_in_batch": lengths.sum(),
    }, 0.3 * torch.randn(2, ROWS, ANSWER, generator=g, dtype=torch.float64)  # fmt: skip


def score(model, batch, temperature):
    """(B, T) log-probabilities of the answers' tokens in float64, as TRL scores them."""
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, PROMPT - 1 : -1]
    return token_logprobs(logits, batch["completion_ids"], temperature)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_trl(name, model, tokenizer, tmp_path):
    theirs, config, temperature = CASES[name]
    args = trl.GRPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, per_device_train_batch_size=ROWS,
                          num_generations=ROWS, max_completion_length=ANSWER, bf16=False,
                          use_bias_correction_kl=False,  # V3.2's KL times the ratio; R1's is plain
                          **theirs | {"beta": 0.0})  # fmt: skip
    dataset = [{"prompt": "w2 w3"}] * 8
    trainer = trl.GRPOTrainer(model, lambda completions, **_: [0.0] * len(completions), args=args,
                              train_dataset=datasets.Dataset.from_list(dataset), processing_class=tokenizer)  # fmt: skip
    trainer.model.train()
    trainer.beta = theirs["beta"]  # set here, or it would look for a reference model by name; the batch holds its scores
    trainer.current_gradient_accumulation_steps = 1
    batch, noise = rollouts()
    with torch.no_grad():
        exact = score(model, batch, temperature)
    batch |= {"old_per_token_logps": exact + noise[0], "ref_per_token_logps": exact + noise[1]}

    found = []
    for run in ("theirs", "ours"):
        model.zero_grad()
        if run == "theirs":
            loss = trainer._compute_loss(model, batch)
        else:
            loss, stats = grpo_loss(score(model, batch, temperature), batch["old_per_token_logps"], batch["advantages"],
                                    batch["completion_mask"].bool(), batch["ref_per_token_logps"], config)  # fmt: skip
        loss.backward()
        found.append((loss.detach().double(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (wanted, wanted_grad), (loss, grad) = found
    assert 0 < stats["clipped"] < 1  # the case tells something: some ratios lie outside the clip range
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-7)  # scores are float32 on both sides
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-4, atol=1e-6)
    assert grad.abs().max() > 1e-2
