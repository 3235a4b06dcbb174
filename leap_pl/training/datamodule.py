"""Text for a training run: a stream of packed blocks that resumes exactly after the last one used."""

import hashlib
from pathlib import Path
from secrets import token_hex
from typing import Any, cast, get_args

import torch
import torch.distributed as dist
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from leap_pl.base_model.prefix import Bos, prefix_of, record_of
from leap_pl.base_model.vocabulary import check_tokens, digest_of_tokenization, digest_of_vocabulary
from leap_pl.checkpoints.settings import DATA
from leap_pl.data.batches import BEGINNING, Batch, BlockLoader, Progress, RankBatches
from leap_pl.data.calibration import loaded_tokenizer
from leap_pl.data.documents import Share, warn
from leap_pl.data.exchange import Exchange
from leap_pl.data.held_out import (
    check_splits,
    evenly,
    held_out_blocks,
    splits_in,
    warn_of_overlap,
    warn_of_remainder,
)
from leap_pl.data.hub import DEFAULT_CONFIGS, HubDataset
from leap_pl.data.messages import for_validation
from leap_pl.data.packing import BlockStream, Position, Separator, digest_of_text
from leap_pl.data.source import TextSource
from leap_pl.distributed.strategy import check_as_rank_zero, data_rank
from leap_pl.errors import UserError
from leap_pl.inputs.hub import check_revision
from leap_pl.inputs.plain_values import display, plain_paths
from leap_pl.inputs.ranges import check_numbers, check_whole
from leap_pl.kernels.transfers import pinned
from leap_pl.training.data_state import (
    FORMAT,
    HELD_OUT,
    Stored,
    check_blocks,
    check_held_out,
    check_same_data,
    read_state,
    warn_of_hub_part,
)
from leap_pl.training.run_length import check_run_length

CHOICES: dict[str, tuple[str, ...]] = {"separator": get_args(Separator), "bos": get_args(Bos)}
TEXTS = ("tokenizer_name", "text", "validation_text")  # settings that may be paths


class TextDataModule(LightningDataModule):
    """Packed blocks of text to learn a mask on, and held-out blocks to validate it.

    Documents are joined by a ``separator`` and cut into blocks of exactly ``seq_length`` tokens, each beginning as
    the tokenizer begins a text (``bos``). The sequence of blocks depends on text, tokenizer, ``seq_length``,
    ``separator``, ``bos`` and ``seed`` alone; ranks and data workers
    share it without overlap, and a resumed run continues with the next block. A run is one epoch of
    ``trainer.max_steps`` × ``trainer.accumulate_grad_batches`` batches on every rank; a shorter text is
    repeated, with its files in another order.

    Sample configuration::

        data:
          text: [text/a.jsonl.gz, "text/more/*.parquet"]
          seq_length: 2048
          batch_size: 4

    Args:
        tokenizer: Base model whose tokenizer is used: hub id, local folder, or local GGUF file. None takes that of the
            module that is trained or validated, with its revision.
        text: Text to train on: local files (``.jsonl``, ``.jsonl.gz``, ``.parquet``: one document a line or row;
            ``.txt``: one continuous text a file), patterns such as ``text/*.jsonl``, or a list of them; or the
            hub id of a dataset, which is streamed and never downloaded whole.
        config_name: Configuration of a hub dataset; None is its only one, and ``en`` for ``allenai/c4``.
        split: Split of a hub dataset to train on.
        text_column: Column or JSON key that holds the text.
        validation_text: Text to validate on, as ``text``. None is the ``validation_split`` of a hub dataset; of local
            files it is about one document in twenty (of a ``.txt`` file the last twentieth), which training then
            excludes.
        validation_config_name: Configuration of the hub dataset that is validated on: of ``validation_text`` or,
            without one, of ``text``, whose own is then the default.
        validation_split: Split of a hub dataset to validate on. If split and configuration are those of training, one
            document in twenty is held out.
        seq_length: Tokens in a block, including BOS. It is never taken from the model, whose maximum may be far too
            long.
        batch_size: Blocks in a micro-batch on each rank.
        validation_sequences: Number of blocks to validate on, over all ranks; 0 disables it and holds out no text.
        num_workers: Processes of each rank that tokenize ahead, a share of the text each; 0 does it in the training
            process.
        separator: Separator after each document: the tokenizer's end token (``end_token``), as in pretraining, or a
            blank line (``blank_line``), as in the texts that perplexity is measured on. A mask learns to continue
            text after the separator that it is trained with.
        seed: Seed of the order of the files, or of the shards of a hub dataset; validation does not depend on it.
        tokenizer_revision: Branch, tag or commit of a ``tokenizer`` from the hub.
        bos: Blocks that begin with what the tokenizer puts before a text, which is BOS for Llama and Gemma and nothing
            for Qwen and SmolLM2: ``every`` block of training, calibration and validation; with ``first`` and ``none``
            no block, as in earlier versions. It is an input and never predicted.
    """

    def __init__(
        self,
        tokenizer: str | None = None,
        text: str | list[str] = "allenai/c4",
        config_name: str | None = None,
        split: str = "train",
        text_column: str = "text",
        validation_text: str | list[str] | None = None,
        validation_config_name: str | None = None,
        validation_split: str = "validation",
        seq_length: PositiveInt = 4096,
        batch_size: PositiveInt = 1,
        validation_sequences: NonNegativeInt = 64,
        num_workers: NonNegativeInt = 0,
        separator: Separator = "end_token",
        seed: int = 0,
        tokenizer_revision: str | None = None,
        bos: Bos = "every",
    ) -> None:
        super().__init__()
        if seq_length < 2:
            raise UserError(f"data.seq_length is {seq_length}; give 2 or more, to predict a token from one before it.")
        numbers = {"seq_length": seq_length, "batch_size": batch_size, "validation_sequences": validation_sequences}
        numbers |= {"num_workers": num_workers, "seed": seed}
        check_numbers(numbers, "data.")
        check_whole(numbers, "data.")
        self.tokenizer_name: Any = tokenizer  # Python code may pass a tokenizer instead of a name
        self._tokenizer_of_model, self._revision_of_model = tokenizer is None, None
        self._trusts_code = False  # set with the name of the model's tokenizer, by a user who trusts the model's
        self.text = text
        self.config_name = config_name
        self.split = split
        self.text_column = text_column
        self.validation_text = validation_text
        self.validation_config_name = validation_config_name
        self.validation_split = validation_split
        # Plain numbers, since checkpoints hold them and are read with weights_only.
        self.seq_length = int(seq_length)
        self.batch_size = int(batch_size)
        self.validation_sequences = int(validation_sequences)
        self.num_workers = int(num_workers)
        self.separator: Separator = separator
        self.bos: Bos = bos
        self.seed = int(seed)
        self.tokenizer_revision = tokenizer_revision
        self.vocabulary: int | None = None  # size of the model's embedding; the model sets it once it is loaded
        self._tokenizer: Any = None
        self._stream: BlockStream | None = None
        self._validation: Tensor | None = None
        self._identity: dict[str, Any] | None = None
        self._prefix: int | None = None  # tokens that a block begins with
        # Progress of the run after the current batch, and after the one before it.
        self._progress = self._progress_before = BEGINNING
        # The optimizer step in progress, and the progress of the run before its first micro-batch.
        self._step: int | None = None
        self._ready: int | None = None  # micro-batches that the trainer had taken before the last one
        self._progress_at_step = BEGINNING

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; after a setting has changed, the text is opened again when it is next used."""
        if name in CHOICES and value not in CHOICES[name]:
            raise UserError(f"data.{name} is {display(value)}; give one of {', '.join(CHOICES[name])}.")
        value = plain_paths(value) if name in TEXTS else value
        if name in ("text", "validation_text"):
            _check_names(name, value)
        changes = (name in DATA or name == "tokenizer_name") and vars(self).get(name, value) != value
        super().__setattr__(name, value)
        if changes:
            self._stream = self._validation = self._identity = self._prefix = None
            if name in ("tokenizer_name", "tokenizer_revision"):
                self._tokenizer = self.vocabulary = None
            if name == "tokenizer_name":  # another repository, which was not trusted, and has other revisions
                if self._tokenizer_of_model and self.tokenizer_revision == self._revision_of_model:
                    self.tokenizer_revision = None
                self._tokenizer_of_model, self._trusts_code = value is None, False

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer, which is loaded on first use.

        Raises:
            UserError: The tokenizer cannot be loaded, or none was named and there is no model yet to take it from.
        """
        if self.tokenizer_name is None:
            raise UserError(
                "data.tokenizer is not set, and no trainer has attached a LeapModule to take it from. "
                "Name a base model: TextDataModule(tokenizer, ...)."
            )
        if self._tokenizer is None:
            module = None if self.trainer is None else self.trainer.lightning_module
            # The model checks its own: a resumed run may have it from a local copy, with a revision of the hub.
            if isinstance(self.tokenizer_name, str) and self.tokenizer_name != getattr(module, "base_model", None):
                of = "model.revision or data.tokenizer_revision"  # the command line sets one by the other
                check_revision(self.tokenizer_name, self.tokenizer_revision, of)
            self._tokenizer = loaded_tokenizer(
                self.tokenizer_name, self.tokenizer_revision, trust_remote_code=self._trusts_code
            )
        return self._tokenizer

    @property
    def stream(self) -> BlockStream:
        """Return the stream of blocks to train on.

        Raises:
            UserError: The text cannot be found, or the tokenizer has no end token.
        """
        if self._stream is None:
            share: Share = "all" if self.validation_text is not None or not self.validation_sequences else "train"
            self._stream = self._stream_of(self.open_share(share))
        return self._stream

    def setup(self, stage: str) -> None:
        """Take the model's tokenizer if none was named; for a fit, read the first document and the validation text.

        So a missing text is reported before anything is computed.

        Raises:
            UserError: The text cannot be found or read, the tokenizer has no end token, or a setting of the trainer
                is not compatible with a run of one epoch.
        """
        self._take_tokenizer()
        if stage == "fit":
            if self.trainer is not None:
                check_run_length(self.trainer)
            self._progress = self._progress_before = BEGINNING  # a checkpoint is loaded later
            self._step = self._ready = None
            warn_of_hub_part(self, self.stream.source)
            self.stream.source.check_files()
            _, first = next(self.stream.source.documents())
            if self.trainer is not None:  # machines may have copies of their own
                begins = hashlib.sha256(first.text.encode(errors="surrogatepass")).hexdigest()
                check_as_rank_zero({"text": [self.identity(), len(self.stream.source.shards), begins]})
            if self.trainer is not None and self.trainer.limit_val_batches and self.validation_sequences:
                validated = self.stream.source if self.validation_text is None else self._open_validation()
                warn_of_hub_part(self, validated, validation=True)
                if self.validation_text is not None:
                    warn_of_overlap(self.stream.source, validated)
                elif not validated.is_local and self._one_configuration():
                    check_splits(self.split, self.validation_split)
                ranks = self._rank()[1]
                check_blocks(self._held_out_blocks())
                evenly(self._held_out_blocks(), ranks)  # raises if there are too few
                warn_of_remainder(self._held_out_blocks(), ranks)

    def _take_tokenizer(self) -> None:
        """Take the tokenizer from the base model of the trainer's module if none was named."""
        module = None if self.trainer is None else self.trainer.lightning_module
        name = getattr(module, "base_model", None)
        if name is None:
            return
        taken, of_model = (name, getattr(module, "revision", None)), self._tokenizer_of_model
        # One that is named as the model is, without a revision of its own, is the model's too.
        same = self.tokenizer_name == name and self.tokenizer_revision in (None, self._revision_of_model)
        if (of_model or same) and taken != (self.tokenizer_name, self.tokenizer_revision):
            # What was made with another model's tokenizer is discarded, if the data was used with that model before.
            self.tokenizer_name, self.tokenizer_revision = taken
        if of_model or same:
            self._tokenizer_of_model, self._revision_of_model = of_model, taken[1]
        # A user trusts the code of one revision.
        trusted = bool(getattr(module, "trust_remote_code", False))
        self._trusts_code = trusted and (self.tokenizer_name, self.tokenizer_revision) == taken

    def train_dataloader(self) -> BlockLoader:
        """Return a loader of this rank's remaining batches of the run, all of them if it is not resumed.

        Raises:
            UserError: There is no trainer.
        """
        if self.trainer is None:
            raise UserError("No trainer is attached to the data module. Without one, call train_loader(batches).")
        rank, world_size = self._rank()
        batches = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return self.train_loader(batches, rank=rank, world_size=world_size, exchange=self._exchange())

    def train_loader(
        self, batches: int, *, rank: int = 0, world_size: int = 1, exchange: Exchange | None = None
    ) -> BlockLoader:
        """Return a loader of ``batches`` micro-batches for one rank, without those before a loaded state.

        Each is ``{"input_ids": LongTensor[batch_size, seq_length], "position": ...}``; a batch counts as used once it
        is passed to :meth:`on_before_batch_transfer`. With an ``exchange`` the processes of the run share the
        tokenizing.
        """
        of_rank = RankBatches(
            self.stream, self.batch_size, batches, rank=rank, world_size=world_size, start=lambda: self._progress
        )
        return BlockLoader(of_rank, self.num_workers, exchange)

    def _exchange(self) -> Exchange | None:
        """Return the exchange of this loader with those of the other processes; None if there are none."""
        if self.trainer is None or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        return Exchange(self.trainer.strategy.broadcast(token_hex(8)), dist.get_rank(), dist.get_world_size())

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return a loader of this rank's held-out blocks, ``{"input_ids": LongTensor[batch_size, seq_length]}``.

        All ranks have the same number, since sharded models need every rank in every forward pass; the remainder is
        dropped.

        Raises:
            UserError: The validation text cannot be read, or makes fewer blocks than there are ranks.
        """
        if not self.validation_sequences:
            return []
        rank, world_size = self._rank()
        blocks = [{"input_ids": block} for block in evenly(self._held_out_blocks(), world_size)]
        # Without a distributed sampler Lightning would add its own, which duplicates blocks.
        sampler = DistributedSampler[Any](blocks, world_size, rank, shuffle=False)  # type: ignore[arg-type]
        return DataLoader(blocks, batch_size=self.batch_size, sampler=sampler)  # type: ignore[arg-type]

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Record the progress of the run with ``batch``, and return only its tensors for the model, ready to be copied.

        Lightning calls this when a batch is about to be trained on, so what workers have read ahead does not count.

        Raises:
            UserError: The batch has a token that the model has no embedding for.
        """
        if self.vocabulary is not None:
            check_tokens(batch["input_ids"], self.vocabulary, "the model")
        tensors = {name: value for name, value in batch.items() if name != "position"}
        if self.trainer is not None:
            device = self.trainer.strategy.root_device
            tensors = {name: pinned(value, device) for name, value in tensors.items()}
        if "position" not in batch:
            return tensors
        if self.trainer is not None:
            if self.trainer.global_step != self._step:
                self._step, self._progress_at_step = self.trainer.global_step, self._progress
            self._ready = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        self._progress_before, self._progress = self._progress, batch["position"]
        return tensors

    def state_dict(self) -> dict[str, Any]:
        """Return the identity of the text and the progress of training on it, as plain values."""
        progress = self._progress
        if self.trainer is not None:
            counts = self.trainer.fit_loop.epoch_loop.batch_progress.current
            # Saved before the micro-batch was processed, as while it is copied to the device: Lightning will repeat it.
            if counts.ready == self._ready or counts.ready > counts.processed:  # type: ignore[attr-defined]
                progress = self._progress_before
        return self._state_at(progress)

    def _state_at(self, progress: Progress) -> dict[str, Any]:
        rereadable = self.stream.source.shards.rereadable
        return {"format": FORMAT, "data": self.identity(), "rereadable": rereadable, **progress}

    def state_before_step(self) -> dict[str, Any] | None:
        """Return :meth:`state_dict` as of before the first micro-batch of the optimizer step in progress.

        None if no step is in progress: the last one is complete, and no micro-batch has been used since.
        """
        if self.trainer is None or self.trainer.global_step != self._step:
            return None
        return self._state_at(self._progress_at_step)

    def record(self) -> dict[str, Any]:
        """Return the record of the text for a mask's provenance: its name, the number of tokens used, and their digest.

        ``tokens`` counts the tokens that all ranks together have been trained on up to the last optimizer step, in so
        many ``passes`` over the text, the last one begun;
        ``sha256`` is a digest of every document, or stored line, that was read for them
        (:func:`leap_pl.data.packing.digest_of_text`), independent of the names of the files; None if unknown.
        """
        progress = self._progress
        if self.trainer is not None and self.trainer.global_step == self._step:
            progress = self._progress_at_step
        tokens, position = progress["consumed"] * self.batch_size * self.seq_length, progress["position"]
        passes = 0 if position is None else position["number"] + 1
        settings = self.record_of_text() | {"batch_size": self.batch_size}
        return {**settings, "tokens": tokens, "passes": passes, "sha256": digest_of_text(position)}

    def record_of_text(self) -> dict[str, Any]:
        """Return the settings that say which sequences are made of which text, for the provenance of a mask."""
        names = ("text", "validation_text", "seq_length", "separator", "seed")
        settings = {name: getattr(self, name) for name in names} | record_of(self.bos, self.tokenizer)
        # Validation opens no training text, which need not be there.
        local = self._stream is not None and self._stream.source.is_local
        of_text = {} if local else {"config_name": None, "split": "train"}
        of_text |= {"text_column": "text"}  # recorded if they are others
        settings |= {name: getattr(self, name) for name, usual in of_text.items() if getattr(self, name) != usual}
        if self.validation_text is None and not self.validation_sequences:
            settings["held_out"] = False
        return settings | ({} if self._stream is None else self._stream.source.record_of_files(self.text))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume after the last batch that was trained on; do nothing if the trainer does not fit.

        Files are compared by a digest of the text read so far, up to the document in which the run was interrupted, and
        not by their names, sizes and dates: a run can resume after files were moved, or have grown after that place,
        and gives the same result as an uninterrupted run on the files as they are now. Each file is read once for the
        digest, without being parsed. For a hub dataset, its name and the document in which the run was interrupted are
        compared.

        Raises:
            UserError: The run was on other data; the message names the setting with both values, or the file. Or the
                state is damaged.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            check_held_out(self, state_dict)
            return
        stored = self.read_state(state_dict)
        digests = stored["format"] == FORMAT  # of the text that was read
        by_content = digests and stored["rereadable"] and self.stream.source.shards.rereadable
        check_same_data(stored["data"], self.identity(), text_by_name=not by_content)
        position = cast(Position | None, stored["position"])
        if position is not None and digests:
            self.stream.check_unchanged(position)
        elif position is not None:
            warn(
                "the checkpoint is of a version that kept no digest of the text, so the text is compared by name and "
                "size only."
            )
            position = self.stream.with_digests(position)
        self._progress = self._progress_before = Progress(
            consumed=stored["consumed"], micro_batch=stored["micro_batch"], position=position
        )
        self._step = self._ready = None

    def read_state(self, state_dict: dict[str, Any]) -> Stored:
        """Return the state in a checkpoint, read by its schema (:func:`.data_state.read_state`)."""
        return read_state(state_dict)

    def identity(self) -> dict[str, Any]:
        """Return the settings that a position in the stream depends on, by name."""
        if self._identity is None:
            name = self.tokenizer_name if isinstance(self.tokenizer_name, str) else self.tokenizer.name_or_path
            shards = self.stream.source.shards
            self._identity = {
                "text": shards.identity(),
                "text_column": self.text_column,
                HELD_OUT: shards.share == "train",
                "seq_length": self.seq_length,
                "batch_size": self.batch_size,
                "seed": self.seed,
                "tokenizer": f"{Path(name).name} ({len(self.tokenizer)} tokens, separator {self.stream.end})",
                "vocabulary": digest_of_vocabulary(self.tokenizer),
                "tokenization": digest_of_tokenization(self.tokenizer),
                "bos": "every" if len(self.stream.prefix) else "first",  # by what blocks contain: other settings agree
            }
        return self._identity

    @property
    def first_target(self) -> int:
        """Return the index of the first token of a block that is predicted: after the first one, and the prefix."""
        if self._prefix is None:  # of the tokenizer alone: validation reads no training text
            self._prefix = len(prefix_of(self.tokenizer)) if self.bos == "every" else 0
        return max(self._prefix, 1)

    def _stream_of(self, source: TextSource) -> BlockStream:
        return BlockStream(source, self.tokenizer, self.seq_length, self.separator, self.bos)

    def open_share(self, share: Share) -> TextSource:
        """Open ``share`` of the text."""
        held_out = share == "held_out"
        of_validation = self.validation_config_name if self.validation_text is None else None
        return TextSource.open(
            self.text,
            config_name=(of_validation or self.config_name) if held_out else self.config_name,
            split=self.validation_split if held_out else self.split,
            text_column=self.text_column,
            share=share,
            divide_split=splits_in(self.validation_split) == splits_in(self.split) and self._one_configuration(),
            seed=None if held_out else self.seed,
        )

    def _one_configuration(self) -> bool:
        """Return whether the text of a hub dataset is learned from and validated on in one configuration."""
        of_validation = self.validation_config_name if self.validation_text is None else None
        if of_validation in (None, self.config_name):
            return True
        only = self.text[0] if isinstance(self.text, list) and len(self.text) == 1 else self.text
        learned = self.config_name or DEFAULT_CONFIGS.get(str(only))
        if learned is None:  # the only one, or the one that the dataset names as its default
            shards = TextSource.open(self.text, split=self.split, text_column=self.text_column).shards
            learned = shards.configuration() if isinstance(shards, HubDataset) else of_validation
        return learned == of_validation

    def _held_out_blocks(self) -> Tensor:
        """Return the validation blocks, LongTensor[at most validation_sequences, seq_length]; they are read once."""
        if self._validation is None:
            self._validation = self._held_out()
        return self._validation

    def open_validated(self) -> TextSource:
        """Open what is validated on: ``validation_text``, or the part of the text that is held out."""
        return self.open_share("held_out") if self.validation_text is None else self._open_validation()

    def _open_validation(self) -> TextSource:
        assert self.validation_text is not None
        try:
            return TextSource.open(
                self.validation_text,
                config_name=self.validation_config_name,
                split=self.validation_split,
                text_column=self.text_column,
            )
        except UserError as error:
            raise UserError(for_validation(str(error))) from error

    def _held_out(self) -> Tensor:
        if not self.validation_sequences:
            return torch.empty(0, self.seq_length, dtype=torch.int64, device="cpu")
        source = self.open_validated()
        other = not source.is_local and self.validation_text is None and self.validation_split != self.split
        remedy = f"--data.validation_split {self.split} holds out one document in twenty of it." if other else ""
        return held_out_blocks(self._stream_of(source), self.validation_sequences, remedy)

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else data_rank(self.trainer)


def _check_names(setting: str, value: Any) -> None:
    if value is None and setting == "validation_text":
        return
    names = value if isinstance(value, list) else [value]
    strange = [name for name in names if not isinstance(name, str)]
    if strange:
        raise UserError(
            f"data.{setting} is a {type(strange[0]).__name__}; give the names of files, or a hub dataset. Write a "
            "dataset that is in memory to a file first, as dataset.to_json('text.jsonl') does."
        )
