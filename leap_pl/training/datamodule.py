"""Text for a training run: a stream of packed blocks that goes on exactly where it stopped."""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from leap_pl.base_model.vocabulary import check_tokens
from leap_pl.data.batches import BEGINNING, Batch, BlockLoader, Progress, RankBatches
from leap_pl.data.calibration import loaded_tokenizer
from leap_pl.data.documents import Share, warn
from leap_pl.data.packing import BlockStream, Separator, digest_of_text
from leap_pl.data.source import TextSource
from leap_pl.errors import UserError
from leap_pl.inputs.ranges import check_numbers
from leap_pl.training.run_length import check_run_length

FORMAT = 2  # 1 had no digests of the text


class TextDataModule(LightningDataModule):
    """Packed blocks of text to learn a mask on, and held-out blocks to validate it.

    Documents are joined by a ``separator`` and cut in blocks of exactly ``seq_length`` tokens. The
    sequence of blocks follows from text, tokenizer, ``seq_length`` and ``seed`` alone; ranks and data workers
    share it without overlap, and a resumed run goes on with the block that comes next. A run is one epoch of
    ``trainer.max_steps`` × ``trainer.accumulate_grad_batches`` batches on every rank; a text that is shorter
    repeats, its files in another order.

    Sample configuration::

        data:
          text: [text/a.jsonl.gz, "text/more/*.parquet"]
          seq_length: 2048
          batch_size: 4

    Args:
        tokenizer: Base model whose tokenizer is used: hub id, local folder, or local GGUF file. None takes that of the
            module that is trained or validated, with its revision.
        text: What to train on. Local files (``.jsonl``, ``.jsonl.gz``, ``.parquet``: one document a line or row;
            ``.txt``: one running text a file), patterns such as ``text/*.jsonl``, or a list of them; or the
            hub id of a dataset, which is streamed and never downloaded whole.
        config_name: Configuration of a hub dataset; None is its only one, and ``en`` for ``allenai/c4``.
        split: Split of a hub dataset to train on.
        text_column: Column or JSON key that holds the text.
        validation_text: What to validate on, as ``text``. None is the ``validation_split`` of a hub dataset, and
            of local files about one document in twenty (of a ``.txt`` file the last twentieth), which
            training then never sees.
        validation_config_name: Configuration of ``validation_text`` where that is a hub dataset.
        validation_split: Split of a hub dataset to validate on. If it is the same as ``split``, one document in
            twenty of it is held out.
        seq_length: Tokens in a block. It is never taken from the model, whose longest may be far too long.
        batch_size: Blocks in a micro-batch on each rank.
        validation_sequences: Blocks to validate on, of all ranks together; 0 holds nothing out.
        num_workers: Processes of each rank that read and tokenize ahead; 0 does it in the training process.
        separator: What follows each document: the tokenizer's end token (``end_token``), as in pretraining, or a
            blank line (``blank_line``), as in the texts that perplexity is measured on. A mask learns to go on after
            what it has seen.
        seed: Order of the files, or of the shards of a hub dataset; validation does not depend on it.
        tokenizer_revision: Branch, tag or commit of a ``tokenizer`` from the hub.
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
    ) -> None:
        super().__init__()
        if seq_length < 2:
            raise UserError(f"data.seq_length is {seq_length}, and a block of 2 tokens is the least that predicts one.")
        numbers = {"seq_length": seq_length, "batch_size": batch_size, "validation_sequences": validation_sequences}
        check_numbers({**numbers, "num_workers": num_workers, "seed": seed}, "data.")
        self.tokenizer_name: Any = tokenizer  # Python code may pass a tokenizer instead of a name
        self._tokenizer_of_model = tokenizer is None
        self.text = text
        self.config_name = config_name
        self.split = split
        self.text_column = text_column
        self.validation_text = validation_text
        self.validation_config_name = validation_config_name
        self.validation_split = validation_split
        # Plain numbers: they go into checkpoints, which are read with weights_only.
        self.seq_length = int(seq_length)
        self.batch_size = int(batch_size)
        self.validation_sequences = int(validation_sequences)
        self.num_workers = int(num_workers)
        self.separator: Separator = separator
        self.seed = seed
        self.tokenizer_revision = tokenizer_revision
        self.vocabulary: int | None = None  # tokens that the model has embeddings for; it says so once it is loaded
        self._tokenizer: Any = None
        self._stream: BlockStream | None = None
        self._validation: Tensor | None = None
        self._identity: dict[str, Any] | None = None
        # How far the run is after the batch in training, and after the one before it.
        self._progress = self._progress_before = BEGINNING
        # The optimizer step that is being worked on, and how far the run was before its first micro-batch.
        self._step: int | None = None
        self._progress_at_step = BEGINNING

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when it is first asked for.

        Raises:
            UserError: It cannot be loaded, or none was named and there is no model yet to take it from.
        """
        if self.tokenizer_name is None:
            raise UserError(
                "data.tokenizer is not given, and is then that of the LeapModule which a trainer fits or validates. "
                "Without a trainer, name a base model: TextDataModule(tokenizer, ...)."
            )
        if self._tokenizer is None:
            self._tokenizer = loaded_tokenizer(self.tokenizer_name, self.tokenizer_revision)
        return self._tokenizer

    @property
    def stream(self) -> BlockStream:
        """The blocks to train on.

        Raises:
            UserError: The text cannot be found, or the tokenizer has no end token.
        """
        if self._stream is None:
            share: Share = "all" if self.validation_text or not self.validation_sequences else "train"
            self._stream = BlockStream(self._open(share), self.tokenizer, self.seq_length, self.separator)
        return self._stream

    def setup(self, stage: str) -> None:
        """Take the model's tokenizer where none was named, and read the first document of a fit.

        So what is missing is said before anything is computed.

        Raises:
            UserError: The text cannot be found or read, the tokenizer has no end token, or a setting of the trainer
                does not go with a run of one epoch.
        """
        self._take_tokenizer()
        if stage == "fit":
            if self.trainer is not None:
                check_run_length(self.trainer)
            self._progress = self._progress_before = BEGINNING  # what a checkpoint says comes after
            self._step = None
            next(self.stream.source.documents())

    def _take_tokenizer(self) -> None:
        """Take the base model of the trainer's module for the tokenizer, where none was named."""
        module = None if self.trainer is None else self.trainer.lightning_module
        name = getattr(module, "base_model", None)
        if not self._tokenizer_of_model or name is None:
            return
        taken = (name, getattr(module, "revision", None))
        if taken != (self.tokenizer_name, self.tokenizer_revision):
            self.tokenizer_name, self.tokenizer_revision = taken
            # What came of another model's, if the data was used with one before.
            self._tokenizer = self._stream = self._validation = self._identity = None

    def train_dataloader(self) -> BlockLoader:
        """The batches of this rank in the whole run, from where it was stopped.

        Raises:
            UserError: The trainer has no ``max_steps``.
        """
        if self.trainer is None:
            raise UserError("No trainer is attached to the data. Call train_loader(batches) to read it without one.")
        if self.trainer.max_steps < 0:
            raise UserError(
                "A run on streamed text has no natural end, and trainer.max_steps is not set. "
                "Give the number of optimizer steps with --trainer.max_steps."
            )
        rank, world_size = self._rank()
        batches = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return self.train_loader(batches, rank=rank, world_size=world_size)

    def train_loader(self, batches: int, *, rank: int = 0, world_size: int = 1) -> BlockLoader:
        """``batches`` micro-batches for one rank, less those before the state that was loaded.

        Each is ``{"input_ids": LongTensor[batch_size, seq_length], "position": ...}``; what is passed to
        :meth:`on_before_batch_transfer` counts as used.
        """
        dataset = RankBatches(
            self.stream, self.batch_size, batches, rank=rank, world_size=world_size, start=self._progress
        )
        return BlockLoader(dataset, self.num_workers)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The held-out blocks of this rank, ``{"input_ids": LongTensor[batch_size, seq_length]}``.

        All ranks have equally many, since sharded models need every rank in every forward pass; the few
        blocks that do not divide are left out.

        Raises:
            UserError: The text to validate on cannot be read, or makes no block for some rank.
        """
        if not self.validation_sequences:
            return []
        if self._validation is None:
            self._validation = self._held_out()
        rank, world_size = self._rank()
        even = len(self._validation) // world_size * world_size
        if not even:
            raise UserError(
                f"The text to validate on makes {len(self._validation)} blocks, fewer than the {world_size} ranks. "
                "Name more with --data.validation_text, or lower --data.seq_length."
            )
        blocks = [{"input_ids": block} for block in self._validation[:even]]
        # Lightning puts a sampler of its own, which doubles blocks, only where there is none for ranks yet.
        sampler = DistributedSampler[Any](blocks, world_size, rank, shuffle=False)  # type: ignore[arg-type]
        return DataLoader(blocks, batch_size=self.batch_size, sampler=sampler)  # type: ignore[arg-type]

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Note how far the run has come with ``batch``, and leave the model only its tensors.

        Lightning calls this when a batch leaves the loader to be trained on, whatever workers have read ahead.

        Raises:
            UserError: It holds a token that the model has no embedding for.
        """
        if self.vocabulary is not None:
            check_tokens(batch["input_ids"], self.vocabulary, "the model")
        if "position" not in batch:
            return batch
        if self.trainer is not None and self.trainer.global_step != self._step:
            self._step, self._progress_at_step = self.trainer.global_step, self._progress
        self._progress_before, self._progress = self._progress, batch["position"]
        return {name: value for name, value in batch.items() if name != "position"}

    def state_dict(self) -> dict[str, Any]:
        """Which text this is and how far it has been trained on, in plain Python."""
        progress = self._progress
        if self.trainer is not None:
            counts = self.trainer.fit_loop.epoch_loop.batch_progress.current
            # Saved amid a step, which Lightning will do again.
            if counts.ready > counts.processed:  # type: ignore[attr-defined]
                progress = self._progress_before
        return self._stated(progress)

    def _stated(self, progress: Progress) -> dict[str, Any]:
        rereadable = self.stream.source.shards.rereadable
        return {"format": FORMAT, "data": self.identity(), "rereadable": rereadable, **progress}

    def state_before_step(self) -> dict[str, Any] | None:
        """As :meth:`state_dict`, before the first micro-batch of the optimizer step that is being worked on.

        None where there is no such step: the last one is done, and no micro-batch has been used since.
        """
        if self.trainer is None or self.trainer.global_step != self._step:
            return None
        return self._stated(self._progress_at_step)

    def record(self) -> dict[str, Any]:
        """Return what a mask's provenance tells of the text: its name, how much of it was read, and what that was.

        ``tokens`` counts those that all ranks together have been trained on up to the last optimizer step;
        ``sha256`` is a digest of every document, or stored line, that was read for them
        (:func:`leap_pl.data.packing.digest_of_text`), whatever the files are called; None where it is not known.
        """
        progress = self._progress
        if self.trainer is not None and self.trainer.global_step == self._step:
            progress = self._progress_at_step
        told = {key: getattr(self, key) for key in ("text", "validation_text", "seq_length", "batch_size", "seed")}
        tokens = progress["consumed"] * self.batch_size * self.seq_length
        return {**told, "tokens": tokens, "sha256": digest_of_text(progress["position"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the last batch that was trained on; validation alone has nothing to go on with.

        Files are compared by a digest of what was read so far, up to the document in which the run was stopped, and
        not by their names, sizes and dates: a run goes on where they were moved, or have grown behind that place, and
        ends as a run from the beginning on the files as they are now would end. Each is read once for that, without
        being parsed. Of a hub dataset, its name and the document in which the run was stopped are compared.

        Raises:
            UserError: The run was on other data; with the setting, what it was and what it is, or with the file.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        version = state_dict.get("format")
        if version not in (1, FORMAT):
            raise UserError(
                f"The checkpoint's data position has format {version}, and this version of leap_pl reads {FORMAT}. "
                "Resume with the version that wrote it."
            )
        by_content = version == FORMAT and state_dict["rereadable"] and self.stream.source.shards.rereadable
        before, now = state_dict["data"], self.identity()
        changed = [
            f"{name} was {before.get(name)!r} and is {now[name]!r}"
            for name in now
            if now[name] != before.get(name) and not (name == "text" and by_content)
        ]
        if changed:
            raise UserError(
                f"The run cannot go on with other data: {'; '.join(changed)}. "
                "Set it as it was, or start a new run without --ckpt_path."
            )
        position = state_dict["position"]
        if position is not None and version == FORMAT:
            self.stream.check_unchanged(position)
        elif position is not None:
            warn(
                "the checkpoint is of a version that kept no digest of the text: whether it is the same is told by its "
                "name and size alone."
            )
            position = self.stream.with_digests(position)
        self._progress = self._progress_before = Progress(
            consumed=state_dict["consumed"], micro_batch=state_dict["micro_batch"], position=position
        )
        self._step = None

    def identity(self) -> dict[str, Any]:
        """The settings that a position in the stream depends on, by name."""
        if self._identity is None:
            name = self.tokenizer_name if isinstance(self.tokenizer_name, str) else self.tokenizer.name_or_path
            shards = self.stream.source.shards
            self._identity = {
                "text": shards.identity(),
                "text_column": self.text_column,
                "held_out (of validation_text and validation_sequences)": shards.share == "train",
                "seq_length": self.seq_length,
                "batch_size": self.batch_size,
                "seed": self.seed,
                "tokenizer": f"{Path(name).name} ({len(self.tokenizer)} tokens, separator {self.stream.end})",
            }
        return self._identity

    def _open(self, share: Share) -> TextSource:
        held_out = share == "held_out"
        return TextSource.open(
            self.text,
            config_name=self.config_name,
            split=self.validation_split if held_out else self.split,
            text_column=self.text_column,
            share=share,
            divide_split=self.validation_split == self.split,
            seed=None if held_out else self.seed,
        )

    def _held_out(self) -> Tensor:
        """LongTensor[at most validation_sequences, seq_length]."""
        if self.validation_text is None:
            source = self._open("held_out")
        else:
            source = TextSource.open(
                self.validation_text,
                config_name=self.validation_config_name,
                split=self.validation_split,
                text_column=self.text_column,
            )
        stream = BlockStream(source, self.tokenizer, self.seq_length, self.separator)
        try:
            blocks = [block.tokens for block in islice(stream.blocks(repeat=False), self.validation_sequences)]
        except UserError as error:
            raise UserError(
                f"No text to validate on: {error} Or name another with --data.validation_text, or go without: "
                "--data.validation_sequences 0."
            ) from error
        if len(blocks) < self.validation_sequences:
            warn(
                f"{source.name}: the text to validate on makes {len(blocks)} blocks of {self.seq_length} tokens, not "
                f"the {self.validation_sequences} of data.validation_sequences; those are used."
            )
        return torch.tensor(blocks, device="cpu")

    def _rank(self) -> tuple[int, int]:
        """Rank and number of ranks that need data of their own (tensor-parallel ranks share theirs)."""
        shared = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (shared["rank"], shared["num_replicas"]) if shared else (0, 1)
