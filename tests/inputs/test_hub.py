"""A hub that cannot be reached is found out by one request, before clients that retry for a minute."""

import huggingface_hub
import pytest
from huggingface_hub import constants

from leap_pl.base_model.config import load_config
from leap_pl.base_model.tokenizer import load_tokenizer
from leap_pl.data.hub import HubDataset
from leap_pl.errors import UserError
from leap_pl.inputs.hub import TIMEOUT, check_reachable


class Unreachable(OSError):  # noqa: N818
    """Stands for the client's error where there is no network."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Addresses and patience of the requests, each of which fails; no retrying client is called behind it."""
    seen: list[tuple[str, float]] = []

    def request(url: str, timeout: float) -> None:
        seen.append((url, timeout))
        raise Unreachable("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", request)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("it would retry"))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("it would retry"))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("it would retry"))
    check_reachable.cache_clear()
    return seen


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_a_model_on_a_hub_that_is_out_of_reach(load, asked: list[tuple[str, float]]) -> None:
    with pytest.raises(
        UserError, match=r"org/none could not be fetched from the hub: .*not known.* give a local folder"
    ):
        load("org/none")
    assert asked == [(huggingface_hub.hf_hub_url("org/none", "config.json", repo_type="model"), TIMEOUT)]


def test_a_dataset_on_a_hub_that_is_out_of_reach(asked: list[tuple[str, float]]) -> None:
    with pytest.raises(UserError, match=r"'org/none' could not be reached .*--data.text FILE.jsonl"):
        len(HubDataset("org/none"))
    assert [url for url, _ in asked] == [huggingface_hub.hf_hub_url("org/none", "README.md", repo_type="dataset")]


def test_nothing_is_asked_offline(asked: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_reachable("org/none")
    assert asked == []
