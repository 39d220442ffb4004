"""The rollout benchmark compares the same model, draws the same number of tokens, and says so when it does not."""

import pytest
import torch

from minids.bench import rollout
from minids.bench.peer import transformers_twin
from minids.rl.policy import new_policy, tiny_config
from minids.rl.tasks import character_tokenizer


def test_both_sides_draw_as_many_tokens_from_one_model(monkeypatch):
    monkeypatch.setattr(rollout, "NEW_TOKENS", 5)
    monkeypatch.setattr(rollout, "GROUP", 2)
    model = new_policy(tiny_config(character_tokenizer()), 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    twin = transformers_twin(model)
    prompts = torch.randint(2, 60, (3, rollout.PROMPT_TOKENS))
    rollout.check_equal(model, twin, prompts)
    ours, theirs = rollout.contestants(model, twin, prompts)
    assert ours() == theirs() == 3 * 2 * 5
    with torch.no_grad():
        twin.model.norm.weight.mul_(1.01)
    with pytest.raises(RuntimeError, match="nothing was timed"):
        rollout.check_equal(model, twin, prompts)
