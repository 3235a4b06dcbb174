"""Answers that begin alike are read once, and score what they score one by one."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny import FAMILIES, byte_tokenizer, tiny_model
from torch import nn

from leap_pl.base_model.backbone import head_of
from leap_pl.base_model.loading import load_model
from leap_pl.errors import UserError, warn_once
from leap_pl.evaluation import answers as room
from leap_pl.evaluation.answers import SharedPrefixes, attention_span, reads_rows
from leap_pl.evaluation.harness import PrefixSharingLM
from leap_pl.evaluation.prefix_rows import Answer, arrange, batches

Request = tuple[tuple[str, str] | None, list[int], list[int]]


def question(seed: int, context: int, answers: Sequence[int]) -> list[Request]:
    """One context with answers of the given lengths."""
    drawn = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 256, (count,), generator=drawn).tolist()

    shared = tokens(context)
    return [((str(seed), str(n)), shared, tokens(length)) for n, length in enumerate(answers)]


# Answers of several tokens, of one, that differ at the last alone, with nothing in common, longer than a sliding window
# of 16.
REQUESTS = [
    *question(1, 7, [3, 1, 5]),
    *question(2, 9, [1, 1, 1, 1]),
    *question(3, 1, [2]),
    *(((str(n), "x"), [5, 6, 7, n], [9, 8]) for n in range(3)),
    *(((str(n), "y"), [5, 6, 7], [1, 2, n]) for n in range(3)),
    *question(4, 20, [2, 30]),
    *question(5, 2, [1, 1]),
    *question(6, 20, [1, 1]),
    *(((str(n), "z"), [*range(20, 40)], answer) for n, answer in enumerate([[3, 9], [5]])),
]


def test_windows_that_a_short_row_does_not_show() -> None:
    """GPT-Neo's local layers see the last tokens of the row, whichever branch they are of."""
    config = transformers.GPTNeoConfig(
        vocab_size=64,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=64,
    )
    assert not reads_rows(transformers.GPTNeoForCausalLM(config).eval())


@pytest.mark.parametrize(
    ("settings", "span"),
    [({}, room.UNLIMITED), ({"sliding_window": 32}, 32), ({"attention_chunk_size": 16}, 16)],
)
def test_layers_that_see_a_part_of_a_sequence(settings: dict[str, int], span: int) -> None:
    """Windows that slide, and chunks, as Llama 4 has them."""
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**{"sliding_window": None, **settings}))
    assert attention_span(SimpleNamespace(config=config)) == span


def scored(lm: HFLM, requests: list[Request]) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    return found


def close(found: list[tuple[float, bool]], expected: list[tuple[float, bool]], **tolerance: float) -> None:
    assert [likely for _, likely in found] == [likely for _, likely in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], **tolerance)


def most_likely(model: nn.Module, context: list[int], length: int) -> list[int]:
    """Greedy continuation."""
    tokens = list(context)
    for _ in range(length):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(context) :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_are_those_of_each_answer_alone(family: str, attention: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    assert SharedPrefixes.of(model) is not None
    best = [(None, [3, 4, 5], most_likely(model, [3, 4, 5], 4))]
    requests = [*REQUESTS, *best]
    tokenizer = byte_tokenizer()
    expected = scored(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), requests)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scored(PrefixSharingLM(pretrained=model, tokenizer=tokenizer, batch_size=2), requests)
    close(found, expected, rel=1e-5, abs=1e-4)
    assert found[-1][1]
    assert not all(likely for _, likely in found)


def test_answers_of_several_chunks_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 262,144 leaves 128 tokens for a chunk; here there are five."""
    model, tokenizer = tiny_model(), byte_tokenizer()
    lm = PrefixSharingLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    whole = scored(lm, REQUESTS)
    monkeypatch.setattr(room, "LOSS_ELEMENTS", 5 * model.config.vocab_size)
    close(scored(lm, REQUESTS), whole, rel=1e-5, abs=1e-5)


def test_the_loss_of_a_bfloat16_model_is_float32() -> None:
    model = tiny_model().bfloat16()
    (request,) = question(4, 20, [8])
    (_, context, answer) = request
    with torch.inference_mode():
        logits = model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1].float()
    expected = float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())
    found = scored(PrefixSharingLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1), [request])
    assert found[0][0] == pytest.approx(expected, abs=2e-3)  # of each token bfloat16 has steps of .03


def test_a_common_beginning_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = tiny_model(), []
    states = room.row_states

    def counted(model: nn.Module, rows: Sequence[object]) -> torch.Tensor:
        read.append(sum(row.length for row in rows))  # type: ignore[attr-defined]
        return states(model, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "row_states", counted)
    requests = question(0, 40, [1, 1, 1, 1])
    lm = PrefixSharingLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1)
    scored(lm, requests)
    assert read[-1] == 40  # after the probe: the answers are never inputs
    scored(lm, question(0, 40, [3, 4]))
    assert read[-1] == 40 + 2 + 3


def test_what_does_not_fit_into_a_window_is_scored_in_float32_too() -> None:
    """lm-eval adds log-likelihoods of bfloat16 in bfloat16, in steps of .25 at 32 and more."""
    model = tiny_model("gemma3").bfloat16()  # whose window is 16
    request = question(4, 20, [30])
    (_, context, answer) = request[0]
    with torch.inference_mode():
        logits = model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1].float()
    expected = float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())
    found = scored(PrefixSharingLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1), request)
    assert found[0][0] == pytest.approx(expected, abs=2e-2)


def test_a_head_of_its_own_stays_whatever_the_config_says(tmp_path: Path) -> None:
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = load_model(str(tmp_path))
    head = model.lm_head.weight.clone()
    PrefixSharingLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1)
    assert torch.equal(model.lm_head.weight, head)
    assert not torch.equal(head, model.get_input_embeddings().weight)
    assert "tie_weights" not in vars(model)


def test_a_tokenizer_of_another_class_is_taken() -> None:
    """As that of mistral-common."""

    class Delegate:
        def __init__(self) -> None:
            self.inner = byte_tokenizer()

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        def __call__(self, *arguments: object, **options: object) -> object:
            return self.inner(*arguments, **options)

        def __len__(self) -> int:
            return len(self.inner)

    lm = PrefixSharingLM(pretrained=tiny_model(), tokenizer=Delegate(), batch_size=1)
    assert lm.tok_encode("abc") == byte_tokenizer().encode("abc", add_special_tokens=False)


def test_bfloat16_is_near_float32() -> None:
    model = tiny_model()
    exact = scored(PrefixSharingLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=2), REQUESTS)
    rounded = scored(PrefixSharingLM(pretrained=model.bfloat16(), tokenizer=byte_tokenizer(), batch_size=2), REQUESTS)
    tokens = [len(answer) for _, _, answer in REQUESTS]
    for (value, _), (near, _), count in zip(exact, rounded, tokens, strict=True):
        assert near == pytest.approx(value, abs=0.15 * count)


def mamba() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=258, hidden_size=32, state_size=4, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config).eval()


def blind_to(argument: str) -> nn.Module:
    """A model that takes an argument, and does without it."""
    model = tiny_model("gpt2")
    forward = model.transformer.forward

    def without(*inputs: object, **given: object) -> object:
        return forward(*inputs, **{name: value for name, value in given.items() if name != argument})

    model.transformer.forward = without
    return model


@pytest.mark.parametrize(
    ("make", "name"),
    [(mamba, "Mamba"), (lambda: blind_to("attention_mask"), "GPT2"), (lambda: blind_to("position_ids"), "GPT2")],
    ids=["no attention", "mask ignored", "positions ignored"],
)
def test_a_model_that_cannot_read_rows_is_scored_one_by_one_with_a_warning(make, name) -> None:
    warn_once.cache_clear()
    model = make()
    assert not reads_rows(model)
    tokenizer = byte_tokenizer()
    with pytest.warns(UserWarning, match=rf"{name}\w* cannot read several answers at once"):
        found = scored(PrefixSharingLM(pretrained=model, tokenizer=tokenizer, batch_size=2), REQUESTS[:8])
    assert found == scored(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2), REQUESTS[:8])


@pytest.mark.filterwarnings("ignore:.*cannot read several answers at once")
def test_logits_that_are_no_numbers_are_no_answers() -> None:
    """Of answers that are all NaN lm-eval would take the first."""
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    lm = PrefixSharingLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=4)
    with pytest.raises(UserError, match=r"the model's logits are not finite for 3 of 3 answers\. Evaluate in another"):
        lm._loglikelihood_tokens(question(1, 7, [3, 1, 5]), disable_tqdm=True)


def test_logits_that_are_not_finite_continue_no_prompt() -> None:
    """Their most likely token would be the first of the vocabulary."""
    model, more = tiny_model(vocab_size=257), {"until": ["x"], "max_gen_toks": 2, "do_sample": False}
    lm = PrefixSharingLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1)
    request = Instance("generate_until", {}, ("a question", more), 0)
    assert len(lm.generate_until([request])) == 1
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(UserError, match="the model's logits are not finite"):
        lm.generate_until([request])


def test_flash_attention_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads such a mask as indices, and on a GPU nothing works after that."""
    model = tiny_model()
    assert reads_rows(model)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    monkeypatch.setattr(room, "_probe", lambda model: pytest.fail("it was tried"))
    assert not reads_rows(model)


def test_a_prompt_with_a_token_that_the_model_has_no_embedding_for() -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    lm = PrefixSharingLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    more = {"until": ["x"], "max_gen_toks": 2, "do_sample": False}
    assert len(lm.generate_until([Instance("generate_until", {}, ("a question", more), 0)])) == 1
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match="the text contains token 257"):
        lm.generate_until([Instance("generate_until", {}, ("a <new> question", more), 0)])


def test_a_context_that_is_too_long_loses_its_earliest_tokens_and_keeps_the_prefix() -> None:
    model = tiny_model(max_position_embeddings=64)
    tokenizer = byte_tokenizer(prefix=1)
    requests: list[Request] = [
        (text, [257, *context], answer)
        for text, context, answer in [
            *question(0, 80, [1, 3]),
            *question(1, 61, [3]),
            *question(2, 5, [2, 3]),
            *question(3, 10, [64]),  # of which the prefix alone is left
        ]
    ]
    lm = PrefixSharingLM(pretrained=model, tokenizer=tokenizer, batch_size=1, prefix=[257])
    # 64 positions: all tokens but the last of an answer are read.
    cuts = [max(len(context) + len(answer) - 65, 0) for _, context, answer in requests]
    fitted = [
        (text, [257, *context[1 + cut :]], answer) for (text, context, answer), cut in zip(requests, cuts, strict=True)
    ]
    assert [len(context) + len(answer) for _, context, answer in fitted][:3] == [65, 65, 65]
    expected = scored(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), fitted)
    close(scored(lm, requests), expected, abs=1e-4)
    without = PrefixSharingLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1)
    plain = scored(HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1), requests)
    close(scored(without, requests), plain, abs=1e-4)


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_windows_of_a_text_begin_with_one_prefix(prefix: int) -> None:
    model = tiny_model(max_position_embeddings=16)
    tokenizer = byte_tokenizer(prefix=prefix)
    text = "a text longer than the window"
    lm = PrefixSharingLM(pretrained=model, tokenizer=tokenizer, batch_size=2, prefix=[257] * prefix)
    (found,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    tokens, begin = tokenizer(text, add_special_tokens=False).input_ids, lm.prefix_token_id
    expected = log_likelihood(model, [begin, *tokens[:16]], 16)
    # The last window has as many tokens as the model has positions, and counts those that no other one has.
    rest = len(tokens) - 16
    expected += log_likelihood(model, tokens[-17:], rest)
    assert found == pytest.approx(expected, abs=1e-3)


def log_likelihood(model: nn.Module, tokens: list[int], count: int) -> float:
    """Of the last ``count`` tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    return float(sum(logits[at - 1, tokens[at]] for at in range(len(tokens) - count, len(tokens))))


def test_an_unknown_head_is_not_taken() -> None:
    model = tiny_model()
    forward = model.forward

    def doubled(*inputs: object, **named: object) -> object:
        found = forward(*inputs, **named)
        found.logits = 2 * found.logits
        return found

    model.forward = doubled
    assert head_of(model) is None
    assert SharedPrefixes.of(model) is None


answers = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=8), st.lists(st.integers(0, 2), min_size=1, max_size=4)),
    min_size=1,
    max_size=12,
)


@given(answers, st.integers(1, 40), st.integers(1, 60))
def test_rows_hold_every_answer_once_and_no_more_tokens(
    drawn: list[tuple[list[int], list[int]]], longest: int, budget: int
) -> None:
    given_ = [Answer(n, (*context, *answer), len(answer)) for n, (context, answer) in enumerate(drawn)]
    rows = arrange(given_, longest)
    seen = []
    for row in rows:
        tokens, positions, branches = row.tokens(), row.positions(), row.branches()
        assert len(tokens) == len(positions) == len(branches) == row.length
        alone = max(len(answer.inputs) for answer in row.answers)
        assert row.length <= max(longest, 1.25 * alone)
        for answer, places in row.scored():
            seen.append(answer.index)
            for place, target in zip(places, answer.tokens[-answer.scored :], strict=True):
                # What the place attends to is the answer before its target: the prefix and its own branch, in order.
                before = [at for at in range(place + 1) if branches[at] in (0, branches[place])]
                assert [positions[at] for at in before] == list(range(len(before)))
                history = [tokens[at] for at in before]
                assert (*history, target) == answer.tokens[: len(history) + 1]
    assert sorted(seen) == list(range(len(given_)))
    assert sum(row.length for row in rows) <= sum(len(answer.inputs) for answer in given_)
    together = list(batches(rows, budget))
    assert [row for batch in together for row in batch] == rows
    assert all(len(batch) == 1 or len(batch) * batch[0].length <= budget for batch in together)


def test_what_a_long_question_begins_with_is_read_once() -> None:
    """However long it is: a row of one answer takes a forward pass anyway."""
    requests = [*question(1, 600, [1, 1, 1, 1]), *question(2, 600, [2, 2])]
    rows = arrange([Answer(n, (*asked, *answer), len(answer)) for n, (_, asked, answer) in enumerate(requests)], 512)
    assert [(row.length, len(row.answers)) for row in rows] == [(602, 2), (600, 4)]
    several = [answer for row in rows if row.length > row.shared for answer in row.answers]
    assert [len(row.answers) for row in arrange(several, None)] == [1, 1]


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_what_is_longer_than_a_window_takes_no_logits_of_all_positions(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval makes those of each position of each request, in batches of any length."""
    model, tokenizer = tiny_model(family, sliding_window=16), byte_tokenizer()
    span = attention_span(model)
    requests = [*question(1, 3 * span, [2, 3, 1]), *question(2, 4 * span, [1, 1]), *question(3, span // 2, [2, 2])]
    expected = scored(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), requests)
    lm = PrefixSharingLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    assert lm._scores is not None
    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", lambda *_: pytest.fail("left to lm-eval"))
    close(scored(lm, requests), expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_that_share_nothing_need_no_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would have as many elements as a row has pairs of tokens."""
    model, tokenizer = tiny_model(family), byte_tokenizer()
    lm = PrefixSharingLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    assert lm._scores is not None
    requests: list[Request] = [(None, [n, *range(20 + 3 * n)], [n + 1, n + 2]) for n in range(1, 6)]
    expected = scored(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), requests)
    monkeypatch.setattr(room, "_states", lambda *arguments: pytest.fail("a mask was made"))
    close(scored(lm, requests), expected, rel=1e-5, abs=1e-4)


def test_a_prompt_that_is_truncated_keeps_the_prefix() -> None:
    lm = PrefixSharingLM(pretrained=tiny_model(), tokenizer=byte_tokenizer(prefix=2), batch_size=2, prefix=[257, 258])
    words, letters = (byte_tokenizer()(text).input_ids for text in (" words", "abc"))
    tokens, attention = lm.tok_batch_encode(["a question of many words", "abc"], left_truncate_len=8)
    whole, padded = tokens.tolist()
    assert tokens.shape == (2, 8)
    assert whole == [257, 258, *words]
    assert padded[3:] == [257, 258, *letters]
    assert attention.tolist() == [[1] * 8, [0] * 3 + [1] * 5]
    longer = lm.tok_batch_encode(["a question of many words"])[0]  # which is not truncated
    assert longer[0, :3].tolist() == [257, 258, byte_tokenizer()("a").input_ids[0]]
