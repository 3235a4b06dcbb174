"""Perplexity against a computation written out in float64."""

import math

import pytest
import torch
from tiny import tiny_model

from leap_pl.errors import UserError
from leap_pl.evaluation import perplexity as room
from leap_pl.evaluation.perplexity import perplexity


def written_out(model, tokens, seq_length, stride, prefix=()):
    """NLL of each predicted token by hand: a token counts in the first whole window that predicts it."""
    length, before = min(seq_length - len(prefix), len(tokens)), len(prefix)
    losses: dict[int, float] = {}
    for start in range(0, len(tokens) - length + 1, stride):
        ids = torch.cat([torch.tensor(prefix, dtype=torch.int64), tokens[start : start + length]])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        # Without a prefix, the first token of a window that overlaps no other is never predicted.
        for at in range(max(1, before), before + length):
            if start + at - before not in losses:
                scores = logits[at - 1]
                losses[start + at - before] = float(torch.log(torch.exp(scores).sum()) - scores[ids[at]])
    return losses


@pytest.mark.parametrize(
    ("count", "seq_length", "stride"),
    [(64, 16, None), (70, 16, None), (70, 16, 4), (61, 16, 15), (9, 16, None), (64, 2, 1), (40, 16, 16)],
)
def test_is_what_the_protocol_says(count, seq_length, stride):
    model = tiny_model()
    tokens = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(1))
    losses = written_out(model, tokens, seq_length, stride or seq_length)
    for batch_size in (1, 3):
        found = perplexity(model, tokens, seq_length=seq_length, stride=stride, batch_size=batch_size)
        assert found.predicted == len(losses)
        assert found.nll == pytest.approx(sum(losses.values()) / len(losses), rel=1e-6)
        assert found.value == pytest.approx(math.exp(found.nll))
        assert (found.tokens, found.stride) == (count, stride or seq_length)


@pytest.mark.parametrize("prefix", [[257], [257, 258]])
@pytest.mark.parametrize(("count", "seq_length", "stride"), [(70, 16, None), (70, 16, 4), (9, 16, None), (1, 16, None)])
def test_every_token_of_the_windows_is_predicted_once_after_a_prefix(count, seq_length, stride, prefix):
    model, each = tiny_model(), seq_length - len(prefix)
    tokens = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(1))
    losses = written_out(model, tokens, seq_length, stride or each, prefix)
    found = perplexity(model, tokens, seq_length=seq_length, stride=stride, prefix=prefix, batch_size=3)
    windows = 1 + max(count - each, 0) // (stride or each)
    assert sorted(losses) == list(range(min(count, each) + (windows - 1) * (stride or each)))
    assert (found.predicted, found.tokens, found.stride) == (len(losses), count, stride or each)
    assert found.nll == pytest.approx(sum(losses.values()) / len(losses), rel=1e-6)
    assert len(found.window_nll) == windows


def test_the_loss_of_a_bfloat16_model_is_float32():
    model = tiny_model().bfloat16()
    tokens = torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(1))
    found = perplexity(model, tokens, seq_length=8, batch_size=1)
    for window, mean in zip(tokens.split(8), found.window_nll, strict=True):
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0, :-1].float()
        expected = torch.nn.functional.cross_entropy(logits, window[1:])
        assert mean == pytest.approx(float(expected), abs=5e-4)  # bfloat16 has steps of .03


def test_loss_in_pieces_is_the_loss(monkeypatch):
    model, tokens = tiny_model(), torch.arange(64) * 7 % 256
    whole = perplexity(model, tokens, seq_length=32)
    monkeypatch.setattr(room, "LOSS_ELEMENTS", 5 * 260)
    # A product of fewer rows, or in memory that is aligned otherwise, may round a float32 in another way.
    assert perplexity(model, tokens, seq_length=32).nll == pytest.approx(whole.nll, rel=1e-7)


def test_logits_of_a_piece_are_all_that_is_in_memory(monkeypatch):
    """Those of a batch would be larger than the model: 8 GiB for Gemma's vocabulary and the default windows."""
    model, tokens, rows = tiny_model(), torch.arange(64) * 7 % 256, []
    monkeypatch.setattr(room, "LOSS_ELEMENTS", 5 * 260)
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output[..., 0].numel()))
    perplexity(model, tokens, seq_length=32, stride=8)
    assert max(rows) <= 8  # with which the head is compared with the model's own logits; of the text, 5
    assert sum(row for row in rows if row <= 5) == 31 + 4 * 8  # none for tokens that are context alone


def test_standard_error_is_that_of_window_means():
    found = perplexity(tiny_model(), torch.arange(96) * 7 % 256, seq_length=16)
    windows = torch.tensor(found.window_nll, dtype=torch.float64)
    assert found.nll_stderr == pytest.approx(float(windows.std() / math.sqrt(len(windows))))
    assert found.stderr == pytest.approx(found.value * found.nll_stderr)
    assert perplexity(tiny_model(), torch.arange(16), seq_length=16).stderr is None


def test_standard_error_of_windows_that_predict_unequal_numbers_is_that_of_a_ratio():
    """With a stride the first window predicts more tokens than any other."""
    tokens = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(2))
    found = perplexity(tiny_model(), tokens, seq_length=16, stride=4)
    counts = torch.tensor([15.0] + [4.0] * (len(found.window_nll) - 1), dtype=torch.float64)
    assert int(counts.sum()) == found.predicted
    sums = torch.tensor(found.window_nll, dtype=torch.float64) * counts
    residuals = sums - sums.sum() / counts.sum() * counts
    n = len(counts)
    expected = (residuals.square().sum() / (n - 1) / n).sqrt() / counts.mean()
    assert found.nll_stderr == pytest.approx(float(expected), rel=1e-6)


def test_what_is_put_before_the_text_is_never_predicted():
    """Also where the tokenizer puts two tokens there, and they stand before the text alone (--bos first)."""
    model, text = tiny_model(), torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(3))
    tokens = torch.cat([torch.tensor([257, 258]), text])
    found = perplexity(model, tokens, seq_length=14, leading=2)
    assert found.predicted == 12 + 13 + 13
    with torch.no_grad():
        logits = model(input_ids=tokens[None, :14]).logits[0, 1:-1]
    first = torch.nn.functional.cross_entropy(logits, tokens[2:14])
    assert found.window_nll[0] == pytest.approx(float(first), rel=1e-6)
    whole = perplexity(model, text[:12], seq_length=14, prefix=[257, 258])
    assert whole.window_nll[0] == pytest.approx(float(first), rel=1e-6)
    with pytest.raises(UserError, match="begins with 2 that are not predicted"):
        perplexity(model, tokens, seq_length=2, leading=2)


def test_leaves_the_mode_of_the_model_alone():
    model = tiny_model().train()
    perplexity(model, torch.arange(16), seq_length=8)
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"seq_length": 1}, "seq_length must be at least 2"),
        ({"seq_length": 8, "stride": 9}, "stride from 1 to seq_length"),
        ({"seq_length": 8, "batch_size": 0}, "batch_size at least 1"),
        (
            {"seq_length": 8, "stride": 8, "prefix": [257]},
            "stride from 1 to seq_length − 1, without what the tokenizer",
        ),
        ({"seq_length": 2, "prefix": [257, 258]}, "seq_length must be at least 3"),
        ({"seq_length": 8, "prefix": [260]}, "the text contains token 260"),
        ({"seq_length": 129}, "--seq_length 128"),
    ],
)
def test_refuses(arguments, says):
    with pytest.raises(UserError, match=says):
        perplexity(tiny_model(), torch.arange(200), **arguments)


def test_refuses_a_text_of_one_token_and_broken_weights():
    with pytest.raises(UserError, match="needs two"):
        perplexity(tiny_model(), torch.arange(1), seq_length=8)
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite in 2 of 2 windows"):
        perplexity(model, torch.arange(16), seq_length=8)
