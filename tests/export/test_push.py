"""``leap_pl export --push``, and masks by hub id: the hub's own client, on a stand-in of the hub."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, refused
from hub_stand_in import COMMIT, Hub
from huggingface_hub import constants
from safetensors.torch import load_file

from leap_pl.base_model.loading import load_model
from leap_pl.cli.main import main
from leap_pl.comparison.entries import read_entries
from leap_pl.export.hub import check_push
from leap_pl.inputs.hub import check_reachable
from leap_pl.inputs.records import MASK, write_record
from leap_pl.masks import MaskSet
from leap_pl.masks.exported import exported_record

NAME = "alice/llama-half"


def words(run: Run, place: Path, *more: str) -> list[str]:
    return ["export", f"--mask={run.mask}", f"--output_dir={place}", *more]


def code_of(card: bytes) -> str:
    found = re.search(r"```python\n(.*?)```", card.decode(), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def masked(hub: Hub, finished: Run) -> Hub:
    """The hub, with the mask of the finished run in a repository."""
    hub.files[NAME] = {MASK: finished.mask.read_bytes()}
    return hub


# -- publish ------------------------------------------------------------------------------------------------


def test_a_mask_alone(hub: Hub, finished: Run, model_folder: Path, tmp_path: Path, capsys) -> None:
    main(words(finished, tmp_path / "out", "--format=mask", f"--push={NAME}"))
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"{hub.address}/{NAME}: uploaded."
    assert "recorded as llama, which is no hub id" in said.err
    files = hub.files[NAME]
    assert sorted(files) == ["README.md", "leap_pl.json", MASK]
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for name, content in files.items():
        assert b"/tmp" not in content, name
        assert str(finished.folder).encode() not in content, name
    assert NAME not in hub.private
    assert MaskSet.load(NAME).digest_of_bits() == MaskSet.load(finished.mask).digest_of_bits()
    code = code_of(files["README.md"]).replace("BASE_MODEL", str(model_folder))
    assert f'"{NAME}"' in code
    made: dict[str, Any] = {}
    exec(code, made)
    weights = made["model"].state_dict()
    assert not any(bool(weights[name][~mask].any()) for name, mask in made["masks"].masks.items())


@pytest.mark.parametrize("format", ["huggingface", "packed"])
def test_a_model_that_replaces_an_earlier_one(format: str, hub: Hub, finished: Run, tmp_path: Path, capsys) -> None:
    """Weights and mask of the earlier one go, since a reader would take them for the new one's; nothing else does."""
    hub.files[NAME] = {"model-00001-of-00002.safetensors": b"1", MASK: b"2", "notes.txt": b"mine", "README.md": b"3"}
    main(words(finished, tmp_path / "out", f"--format={format}", f"--push={NAME}"))
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.files[NAME] == written | {"notes.txt": b"mine"}
    assert not [name for name, content in written.items() if str(tmp_path.parent).encode() in content]
    assert NAME not in hub.private  # it was public
    exec(code_of(written["README.md"]))  # as a reader of the card would, from the hub
    assert len(capsys.readouterr().out.split("\n")[-2]) > 10


def test_files_of_an_earlier_export_go_with_it(hub: Hub, finished: Run, tmp_path: Path) -> None:
    """By its record: the chat template of another base model would be taken for this one's."""
    (tmp_path / "earlier").mkdir()
    for name in ("chat_template.jinja", "old[1].py"):
        (tmp_path / "earlier" / name).write_bytes(b"old")
    write_record(tmp_path / "earlier", "export")
    hub.files[NAME] = {path.name: path.read_bytes() for path in (tmp_path / "earlier").iterdir()} | {"old1.py": b"mine"}
    main(words(finished, tmp_path / "out", f"--push={NAME}"))
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.files[NAME] == written | {"old1.py": b"mine"}


def test_a_private_repository(hub: Hub, finished: Run, tmp_path: Path) -> None:
    for _ in range(2):  # also one that exists
        main(words(finished, tmp_path / "out", "--format=mask", f"--push={NAME}", "--private", "--force"))
        assert hub.private == {NAME}


def test_a_public_repository_is_not_taken_for_a_private_one(
    hub: Hub, finished: Run, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Before anything is written; and, if it became public meanwhile, before anything is uploaded."""
    hub.files[NAME] = {"notes.txt": b"mine"}
    command = words(finished, tmp_path / "out", "--format=mask", f"--push={NAME}", "--private")
    says = f"--push {NAME} exists and is public, and --private is given. Make it private"
    assert says in refused(command, capsys)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("leap_pl.export.hub.check_push", lambda *_, **__: None)
    assert says in refused(command, capsys)
    assert hub.files[NAME] == {"notes.txt": b"mine"}


def test_a_base_model_of_the_hub(hub: Hub, finished: Run, model_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Given for the local copy that the mask was made with, it is recorded, with the licence that its card states."""
    card = '---\nlicense: other\nlicense_name: "llama3.2"\nlicense_link: LICENSE.txt\n---\nlicense: mine\n'
    hub.files["alice/base"] = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    hub.files["alice/base"]["README.md"] = card.encode()
    main(words(finished, tmp_path / "out", "--model=alice/base", "--revision=v1"))
    made = MaskSet.load(tmp_path / "out" / MASK).provenance
    assert (made.base_model, made.revision) == ("alice/base", "v1")
    published = (tmp_path / "out" / "README.md").read_text()
    assert published.split("---\n")[1].splitlines()[2:6] == [
        "base_model: alice/base",
        "license: other",
        "license_name: llama3.2",
        "license_link: LICENSE.txt",
    ]
    assert "[alice/base](https://huggingface.co/alice/base) at revision `v1` with 7,680 of" in published
    main(words(finished, tmp_path / "alone", "--format=mask", "--model=alice/base", "--revision=v1"))
    alone = (tmp_path / "alone" / "README.md").read_bytes()
    assert 'from_pretrained("alice/base", revision="v1", dtype="auto")' in code_of(alone)
    assert b"license" not in alone


def test_a_base_model_of_the_hub_is_exported_as_it_is_stored(
    hub: Hub, finished: Run, model_folder: Path, tmp_path: Path
) -> None:
    """Its config.json names a data type that would round it."""
    hub.files["alice/rounded"] = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    config = json.loads(hub.files["alice/rounded"]["config.json"])
    hub.files["alice/rounded"]["config.json"] = json.dumps(config | {"dtype": "float16"}).encode()
    main(words(finished, tmp_path / "out", "--model=alice/rounded"))
    written, stored = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", model_folder))
    for name, mask in MaskSet.load(finished.mask).masks.items():
        assert written[name].dtype == torch.float32
        assert torch.equal(written[name], stored[name] * mask), name
    assert "bit for bit" in (tmp_path / "out" / "README.md").read_text()


def test_a_base_model_whose_local_path_looks_like_one_of_the_hub(
    hub: Hub, finished: Run, model_folder: Path, tmp_path: Path
) -> None:
    """As models/llama does, once the export runs in another folder: what is typed is recorded."""
    hub.files["alice/base"] = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    MaskSet.load(finished.mask).with_provenance(base_model="models/llama").save(tmp_path / "pruned.safetensors")
    command = ["export", f"--mask={tmp_path / 'pruned.safetensors'}", "--model=alice/base"]
    main([*command, f"--output_dir={tmp_path / 'out'}"])
    assert MaskSet.load(tmp_path / "out" / MASK).provenance.base_model == "alice/base"
    assert "models/llama" not in (tmp_path / "out" / "README.md").read_text()


def test_a_mask_alone_does_not_replace_a_model(hub: Hub, finished: Run, tmp_path: Path, capsys) -> None:
    model = {"config.json": b"{}", "model.safetensors": b"", "leap_pl.json": b"{}", MASK: b"of another mask"}
    hub.files[NAME] = dict(model)
    message = refused(words(finished, tmp_path / "out", "--format=mask", f"--push={NAME}"), capsys)
    assert f"--push {NAME} has a model, whose mask and record a mask alone would replace. Push the mask to" in message
    assert "hf upload" not in message
    assert message.endswith("out is complete.")
    assert hub.files[NAME] == model


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("alice", "--push alice is no repository of the hub. Give USER/NAME."),
        ("alice/half/llama", "is no repository of the hub"),
        ("alice/half--llama", "that is no name of a repository. Give USER/NAME, of letters"),
        (
            "bob/llama",
            "the hub answers 403: .* no right to create a model .* With a token that may do this, run `hf auth",
        ),
    ],
)
def test_a_repository_that_cannot_be(name: str, says: str, hub: Hub, finished: Run, tmp_path: Path, capsys) -> None:
    message = refused(words(finished, tmp_path / "out", "--format=mask", f"--push={name}"), capsys)
    assert re.search(says, message), message
    complete = name == "bob/llama"
    assert (f"`hf upload {name} {tmp_path / 'out'} .`" in message) == complete
    assert (tmp_path / "out" / MASK).exists() == complete


def test_what_is_wrong_is_said_before_the_export(hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Before the mask is read: it does not exist."""
    missing = ["export", "--mask=missing.safetensors", "--output_dir=out"]
    assert "--private is for a repository of the hub" in refused([*missing, "--private"], capsys)
    monkeypatch.setenv("HF_TOKEN", "")
    assert "needs an access token of the hub that may write: run `hf auth login`" in refused(
        [*missing, f"--push={NAME}"], capsys
    )
    monkeypatch.setenv("HF_TOKEN", "some")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set. Unset it." in refused([*missing, f"--push={NAME}"], capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.close_at_once()
    message = refused([*missing, f"--push={NAME}"], capsys)
    assert re.search(rf"--push {NAME}: .*refused.* Check the network", message), message


def test_an_upload_that_fails_leaves_the_folder(hub: Hub, finished: Run, tmp_path: Path, monkeypatch, capsys) -> None:
    hub.failing = 403
    message = refused(words(finished, tmp_path / "out", "--format=mask", f"--push={NAME}"), capsys)
    assert f"could not be uploaded to {NAME}: the hub answers 403: The quota is used up. With a token" in message
    assert message.endswith(f"out is complete: upload it later with `hf upload {NAME} {tmp_path / 'out'} .`.")
    where = tmp_path / "with a space"
    hub.private = {NAME}
    message = refused(words(finished, where, "--format=huggingface", "--private", f"--push={NAME}"), capsys)
    again = (
        f"`hf upload {NAME} '{where}' . --private --delete 'model*.safetensors' --delete model.safetensors.index.json"
    )
    assert f"{again} --delete {MASK}`." in message
    hub.private = set()
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    message = refused(words(finished, tmp_path / "out", "--format=mask", "--force", f"--push={NAME}"), capsys)
    assert "the hub answers 401: Invalid username or password. With a token that may do this, run `hf auth" in message


def test_a_folder_that_is_called_as_the_repository(hub: Hub, finished: Run, tmp_path: Path, monkeypatch) -> None:
    """It is the output, and no input of the command."""
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--force"]):
        main(words(finished, Path(NAME), "--format=mask", f"--push={NAME}", *more))
    assert MASK in hub.files[NAME]


# -- masks by hub id ----------------------------------------------------------------------------------------


def test_a_mask_by_hub_id(masked: Hub, finished: Run, model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Wherever a mask is taken: they all load it in one place."""
    bits = MaskSet.load(finished.mask).digest_of_bits()
    for name in (NAME, f"{NAME}@v1", f"{NAME}@{COMMIT}"):
        assert MaskSet.load(name).digest_of_bits() == bits
    asked = [request for request in masked.requests if request.startswith("GET") and MASK in request]
    assert len(asked) == 1  # the others have it from the cache
    evaluated = main(["evaluate", f"--mask={NAME}", f"--perplexity={text_file}", "--seq_length=32", "--max_tokens=100"])
    assert evaluated["model"]["mask_digest"] == bits
    (entry,) = read_entries([NAME])
    assert (entry.source, entry.bits) == (NAME, bits)
    main(["export", f"--mask={NAME}@v1", f"--output_dir={tmp_path / 'out'}"])
    assert load_model(str(tmp_path / "out")).config.model_type == "llama"


def test_a_mask_of_the_cache_needs_no_hub(masked: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = MaskSet.load(NAME)
    masked.close_at_once()
    assert MaskSet.load(NAME).digest_of_bits() == online.digest_of_bits()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert MaskSet.load(NAME).digest_of_bits() == online.digest_of_bits()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "alice/none",
            "there is no such repository, or it is private. Check the name; for a private one, run `hf auth",
        ),
        ("alice/gated", "its owner must grant access. Ask for it on the repository's page, and run `hf auth login`"),
        (
            "alice/empty",
            "the repository has no mask.safetensors. A sparse model's is read off: leap_pl export --model NAME",
        ),
        (f"{NAME}@v2", "the repository has no such revision. Check the branch, tag or commit after @."),
        ("alice/a..b", "that is no name of a repository. Give USER/NAME"),
        ("alice/damaged", "is truncated or damaged"),
    ],
)
def test_a_mask_that_is_not_on_the_hub(name: str, says: str, masked: Hub, capsys) -> None:
    masked.files |= {"alice/gated": {}, "alice/empty": {}, "alice/damaged": {MASK: b"no mask"}}
    masked.gated = {"alice/gated"}
    message = refused(["evaluate", f"--mask={name}", "--perplexity=wikitext2"], capsys)
    assert says in message
    assert name in message or says == "is truncated or damaged"
    if "no such repository" in says:
        assert message.startswith(
            f"leap_pl evaluate: mask {name} is no local file, and could not be fetched from the hub"
        )


def test_a_gated_model_says_how_to_get_it(masked: Hub, capsys) -> None:
    """Where it is fetched by a library, whose own error is longer than a line."""
    masked.files["alice/gated"] = {}
    masked.gated = {"alice/gated"}
    message = refused(["evaluate", "--model=alice/gated", "--perplexity=wikitext2"], capsys)
    assert message == (
        "leap_pl evaluate: base model alice/gated could not be fetched from the hub: its owner must grant access. Ask "
        "for it on the repository's page, and run `hf auth login`, or set HF_TOKEN."
    )


def test_a_hub_that_refuses_or_does_not_answer(masked: Hub, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    command = ["evaluate", f"--mask={NAME}", "--perplexity=wikitext2"]
    masked.private = {NAME}
    monkeypatch.setenv("HF_TOKEN", "")
    assert "there is no such repository, or it is private" in refused(command, capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    assert "the hub answers 401: Invalid credentials" in refused(command, capsys)
    masked.close_at_once()
    check_reachable.cache_clear()
    message = refused(command, capsys)
    assert re.search(r"from the hub: .*refused.* Check the network", message), message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused(command, capsys)
    assert "it is not in the local cache, and HF_HUB_OFFLINE is set. Name a local copy" in message


def test_a_local_path_wins(masked: Hub, finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("alice").mkdir()
    Path(NAME).write_bytes(finished.mask.read_bytes())
    MaskSet.load(NAME)
    for missing in ("runs/mask.safetensors", "runs/last.ckpt", Path("alice/none")):
        with pytest.raises(ValueError, match=r"no such MaskSet file|is a checkpoint"):
            MaskSet.load(missing)
    assert masked.requests == []


def test_the_name_of_a_repository(hub: Hub) -> None:
    check_push(NAME)
    assert hub.requests[-1] == f"HEAD /{NAME}/resolve/main/README.md"


# -- models by hub id ---------------------------------------------------------------------------------------


@pytest.fixture
def pushed(hub: Hub, finished: Run, tmp_path: Path) -> Path:
    """An exported folder, and the same in a repository of the hub."""
    folder = tmp_path / "exported"
    main(words(finished, folder))
    hub.files[NAME] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return folder


def test_an_export_by_hub_id_is_known_as_its_folder_is(
    hub: Hub, pushed: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its record; where neither the hub nor the cache says whether there is one, with a warning."""

    def evaluated(name: str) -> dict[str, Any]:
        return main(["evaluate", f"--model={name}", f"--perplexity={text_file}", "--seq_length=32", "--max_tokens=64"])

    hub.requests.clear()
    assert exported_record(NAME, revision="v1") == exported_record(pushed)
    assert any("/resolve/v1/leap_pl.json" in request for request in hub.requests)  # of those weights, not of main's
    local, found = evaluated(str(pushed)), evaluated(NAME)
    assert found["method"] == "leap"
    assert found["model"] == local["model"] | {"name": NAME}
    assert [found[key] for key in ("method", "config", "sparsity")] == [
        local[key] for key in ("method", "config", "sparsity")
    ]
    record = hub.files[NAME].pop("leap_pl.json")
    hub.files["alice/plain"] = dict(hub.files[NAME])
    assert evaluated("alice/plain")["method"] == "unknown"
    hub.files["alice/damaged"] = hub.files[NAME] | {"leap_pl.json": record[:-9]}
    with pytest.raises(SystemExit):
        evaluated("alice/damaged")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert exported_record(NAME)["mask_digest"] == local["model"]["mask_digest"]
    assert exported_record("alice/plain") == {}  # as the hub said before
    assert exported_record("alice/none") == {}  # loading it says why there is none
    (place,) = (tmp for tmp in Path(constants.HF_HUB_CACHE).glob("models--alice--plain/.no_exist/*/leap_pl.json"))
    place.unlink()
    with pytest.warns(UserWarning, match=r"leap_pl.json of alice/plain .* HF_HUB_OFFLINE .* used without it"):
        assert exported_record("alice/plain") == {}


def test_a_model_of_the_hub_is_of_the_revision_that_is_named(
    hub: Hub, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """The weights too, of every verb that takes one."""
    hub.files["alice/base"] = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    place, text = tmp_path / "pruned", f"--text={text_file}"
    for words in (
        ["evaluate", "--model=alice/base", f"--perplexity={text_file}", "--seq_length=32", "--max_tokens=64"],
        ["prune", "--model=alice/base", text, "--seq_length=32", "--sequences=2", f"--output_dir={place}"],
        ["export", "--model=alice/base", f"--mask={place}", "--force", f"--output_dir={tmp_path / 'out'}"],
        ["generate", "--model=alice/base", "--prompt=a", "--max_new_tokens=2", "--device=cpu"],
    ):
        hub.requests.clear()
        shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
        main([*words, "--revision=v1"])
        assert any("/resolve/v1/model.safetensors" in request for request in hub.requests), words[0]
        assert not any("/resolve/main/" in request for request in hub.requests), words[0]
    # And by the record of a mask, where nothing is typed, or the model that it names.
    mask = f"--mask={tmp_path / 'out' / MASK}"
    measured = ["evaluate", mask, f"--perplexity={text_file}", "--seq_length=32", "--max_tokens=64"]
    for words in (
        ["export", mask, f"--output_dir={tmp_path / 'again'}"],
        ["export", mask, f"--output_dir={tmp_path / 'named'}", "--model=alice/base"],
        measured,
        [*measured, "--model=alice/base"],
    ):
        hub.requests.clear()
        shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
        main(words)
        assert any("/resolve/v1/model.safetensors" in request for request in hub.requests), words[0]
        assert not any("/resolve/main/" in request for request in hub.requests), words[0]


def test_a_sparse_model_of_the_hub_is_packed_as_its_folder_is(hub: Hub, pushed: Path, tmp_path: Path) -> None:
    """Method, mask and base model are those of its record; and a packed one of the hub is unpacked."""
    main(["export", f"--model={NAME}", f"--output_dir={tmp_path / 'packed'}", "--format=packed"])
    main(["export", f"--model={pushed}", f"--output_dir={tmp_path / 'local'}", "--format=packed"])
    files = [{path.name: path.read_bytes() for path in (tmp_path / of).iterdir()} for of in ("packed", "local")]
    assert files[0].keys() == files[1].keys()
    differ = [name for name in files[0] if files[0][name] != files[1][name]]
    assert differ in ([], ["tokenizer_config.json"])  # transformers notes in it whether the tokenizer is local
    hub.files["alice/packed"] = files[0]
    main(["export", "--model=alice/packed", f"--output_dir={tmp_path / 'unpacked'}"])
    for name in ("mask.safetensors", "model.safetensors", "leap_pl.json"):
        assert (tmp_path / "unpacked" / name).read_bytes() == (pushed / name).read_bytes()
