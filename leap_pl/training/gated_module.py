"""GatedModule: LightningModule of a frozen language model with gates on its weights."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import lightning as L
import torch
from torch import Tensor, nn

from leap_pl.base_model.backbone import Head, check_checkpointing, checkpoint_activations, set_modes, split_model
from leap_pl.base_model.buffers import keeping_buffers
from leap_pl.base_model.fast_dtype import fast_dtype
from leap_pl.base_model.loading import Dtype, load_model
from leap_pl.base_model.weights import (
    Weight,
    check_finite_weights,
    decoder_blocks,
    find_weights,
    is_sparse,
    model_fingerprint,
    rest_fingerprint,
)
from leap_pl.checkpoints import layout as checkpoints
from leap_pl.checkpoints.identity import Identity, check_same, read_identity
from leap_pl.checkpoints.settings import comparable
from leap_pl.distributed.shards import gathered
from leap_pl.distributed.strategy import (
    RankZero,
    broadcast_from_rank_zero,
    check_as_rank_zero,
    check_inside_blocks,
    has_buckets,
    reduce_only,
    shard,
    sharding_mesh,
    validate_without_inference_mode,
)
from leap_pl.errors import UserError, listing
from leap_pl.gates import Gate, Gates, GateState, attach, guard_saving
from leap_pl.gates.attach import check_settings as check_settings_of_gate
from leap_pl.kernels.norms import norm_of
from leap_pl.prior.settings import Calibration, Prior, SharedPrior
from leap_pl.training import finite
from leap_pl.training.base_model_checks import check_data, warn_if_sparse, warn_of_start
from leap_pl.training.datamodule import TextDataModule
from leap_pl.training.fixed_mask import FixedMask
from leap_pl.training.run_prior import RunPrior
from leap_pl.training.trained_weights import TrainedWeights
from leap_pl.training.trainer_checks import check_float16
from leap_pl.training.validation import Validation
from leap_pl.training.weights import NONE, WeightTraining, norms_in, norms_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from leap_pl.masks import MaskSet


class GatedModule(L.LightningModule):
    """Base class of modules that learn a mask, or weights, or both: the gated model, its prior and its mask.

    The model is loaded when the run starts; its weights are frozen and gated, and sharded over the ranks if the
    strategy requires it. :class:`.ResumableModule` adds its checkpoints, :class:`.ValidatedModule` its validation and
    :class:`.LeapModule` how it learns.

    Attributes:
        fixed_mask: Mask that stays as it is, if one was named.
    """

    fixed_mask: FixedMask | None = None

    def __init__(
        self,
        base_model: str,
        sparsity: float,
        gate: Callable[[Weight, GateState], Gate],
        *,
        prior: Prior,
        targets: list[str] | None = None,
        ignore: Sequence[str] = (),
        dtype: Dtype = "auto",
        logits_dtype: torch.dtype = torch.float32,
        activation_checkpointing: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        seed: int = 0,
        train_weights: str = NONE,
        weight_training: WeightTraining = WeightTraining(),  # noqa: B008  (frozen)
        start_weights: str | None = None,
    ) -> None:
        """Store the settings, which :class:`leap_pl.training.module.LeapModule` documents."""
        super().__init__()
        self.base_model, self.revision = base_model, revision
        # Not every kind of mask can have the requested sparsity; configure_model sets the one that it has.
        self.sparsity = self.asked_sparsity = sparsity
        self.targets, self.ignore = targets, list(ignore)
        self.make_gate, self.run_prior = gate, RunPrior(prior)
        self.dtype_name, self.logits_dtype = dtype, logits_dtype
        self.activation_checkpointing = activation_checkpointing
        self.trust_remote_code = trust_remote_code
        self.strict_loading = False  # checkpoints lack the frozen model; on_load_checkpoint compares names and shapes
        self.state = GateState(seed=seed)
        self.trained = TrainedWeights(train_weights, weight_training, start_weights, self.state, logits_dtype)
        self.model: PreTrainedModel | None = None
        self._halves: tuple[Callable[[Tensor], Tensor], Head] | None = None
        self.mesh: DeviceMesh | None = None  # device mesh that decoder blocks are sharded over
        self.gates: Gates[Any] = Gates({})
        self.has_mask = False  # whether the logits are of a fit, or of a checkpoint, and not those before any
        self.resumes_from: str | None = None
        self.gated_before: list[str] = []  # names of the weights that the run gates whose checkpoint was read
        self.when_loaded: list[Callable[[PreTrainedModel], object]] = []  # called for a fit, before the prior is made
        self.register_state_dict_post_hook(checkpoints.keep_learned_only)
        self.validation = Validation()

    @property
    def attached(self) -> L.Trainer | None:
        """Return the trainer that runs this module, or None."""
        try:
            return self.trainer
        except RuntimeError:
            return None

    @property
    def first_target(self) -> int:
        """Return the index of the first token of a sequence that is predicted, which the data module says, or 1."""
        return getattr(getattr(self.attached, "datamodule", None), "first_target", 1)

    @property
    def prior(self) -> "MaskSet | None":
        """Return the mask that learning starts from, on rank zero after the model was loaded for a fit; else None.

        For a resumed run, this is the mask that the run started from, or None if it is unavailable.
        """
        return self.run_prior.masks.get("prior")

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle, without the functions that run this module's own model."""
        return {**super().__getstate__(), "_halves": None}

    @property
    def states(self) -> Callable[[Tensor], Tensor]:
        """Return the function from input_ids to the last hidden states of the model."""
        return self._split()[0]

    @property
    def head(self) -> Head:
        """Return the function from hidden states to logits, of the model as its gates are."""
        return self._split()[1]

    # -- the gated model ----------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the base model, make the prior of a fit and attach the gates. A second call checks the data alone."""
        mesh = sharding_mesh(self.attached)
        if mesh is not None:
            validate_without_inference_mode(self.trainer)
        if self.model is not None:
            check_data(getattr(self.attached, "datamodule", None), self.model, self.base_model)
            return
        self.mesh = mesh
        # Measured, so ranks may find different results.
        dtype = (
            broadcast_from_rank_zero(fast_dtype(self._device_of_run()))
            if self.dtype_name == "auto"
            else self.dtype_name
        )
        if self._fitting():
            check_float16(self.trainer, dtype)
        with torch.device("cpu"):  # Lightning's context names the run's, which transformers takes for a device map
            model = load_model(
                self.base_model,
                revision=self.revision,
                dtype=dtype,
                dropout=False,
                trust_remote_code=self.trust_remote_code,
            )
        check_finite_weights(model, f"base model {self.base_model}")
        check_data(getattr(self.attached, "datamodule", None), model, self.base_model)
        self.weights = self._gated_of(model)
        if self.mesh is not None:
            check_inside_blocks(self.weights)
        self.fingerprint, self.rest = model_fingerprint(model), rest_fingerprint(model)
        check_as_rank_zero({"base model": [self.fingerprint, self.rest]})
        self.sizes = {name: weight.parameter.numel() for name, weight in self.weights.items()}
        self.layers = {name: weight.layer for name, weight in self.weights.items()}
        self.dense_norm = sum(float(norm_of(weight.parameter)) for weight in self.weights.values())
        self.validation.sparse_base = is_sparse(self.weights)
        probe = self.probe()
        fixed = not probe.learned()
        if self._fitting():
            check_as_rank_zero(comparable({"model.gate": probe.describe()}))
            check_settings_of_gate(probe.first)
        self.trained.check(self.weights, fixed=fixed, sharded=self.mesh is not None)
        if self._fitting():
            self.trained.check_trains(model, fixed=fixed)
        if self.activation_checkpointing:  # first, since a prior may take minutes
            check_checkpointing(model)
        if self._fitting() and not fixed:
            warn_if_sparse(self.weights, self.base_model)
        prior = self._make_prior(model, probe)
        if self._fitting() and fixed and self.resumes_from is None:  # last, since the mask may be refused
            warn_of_start(self.weights, self.base_model, self.prior, self.trained.start, self.trained.kind)
        if self._fitting() and self.trained.kind != NONE and self.resumes_from is None:
            self.trained.find_texts_before(self.base_model, self.revision, sparse=self.validation.sparse_base)
        model.requires_grad_(False)
        if self._fitting() and self.resumes_from is None:  # a resumed run has its own
            self.trained.read_start(model, trust_remote_code=self.trust_remote_code)
        if self.mesh is None:
            model.to(self._device_of_run())  # not before: the prior is made of one block at a time on the device
            self._put_gates(self.weights, prior)
            self.trained.train_norms(norms_of(model))
            self.trained.train_embeddings(model)
        else:
            self._shard(model, self.mesh, prior)
        prior.close()
        self.has_mask = self._fitting()
        self.trained.release_start()
        self.model, self.dtype_name = model, dtype  # as it is loaded again: Lightning may convert it to its precision
        guard_saving(model)
        if self.attached is not None:  # else not before it is on its device
            self._split()
        if self.activation_checkpointing:
            checkpoint_activations(model)
        model.train()  # until on_train_start: Lightning warns of modules in eval mode
        learned = self._learned()
        reduce_only(self, {checkpoints.path_of(*place) for place in learned})
        if self._fitting() and has_buckets(self.attached):
            for parameter in learned.values():  # which DDP makes views of its buckets
                parameter.grad = torch.zeros_like(parameter)
        if self.mesh is not None and self.resumes_from is not None:
            # Lightning loads a sharded run's optimizer before it calls on_load_checkpoint.
            checkpoint = checkpoints.load_checkpoint(self.resumes_from)
            check_same(read_identity(checkpoint, self.resumes_from), self.identity())

    def _split(self) -> tuple[Callable[[Tensor], Tensor], Head]:
        """Return both halves of the model, which are found by running it, when they are used first."""
        if self._halves is None:
            assert self.model is not None
            with self.state.passing("dense"):
                self._halves = split_model(self.model)
        return self._halves

    def on_train_start(self) -> None:
        """Set the modes in which the base model computes the same in every pass."""
        assert self.model is not None
        set_modes(self.model, recomputing=self.activation_checkpointing)

    def probe(self) -> Gates[Any]:
        """Return a gate for the first weight alone, which answers for its kind before all are attached."""
        name, weight = next(iter(self.weights.items()))
        return Gates.of({name: self.make_gate(weight, self.state)})

    def _gated_of(self, model: "PreTrainedModel") -> dict[str, Weight]:
        """Return the weights to gate: those of the checkpoint that was read, whatever its version selected by."""
        if self.fixed_mask is not None:
            self.fixed_mask.check_names(model)
        if self.gated_before and set(self.gated_before) <= set(dict(model.named_parameters())):
            return find_weights(model, self.gated_before)
        return find_weights(model, self.targets, self.ignore)

    def _put_gates(self, weights: dict[str, Weight], prior: SharedPrior) -> None:
        gates = attach(weights, self.make_gate, self.state, self.logits_dtype)
        for name, gate in gates.items():
            masks = prior.of(name, weights[name])
            gate.start_from(masks.pop("prior", None), self.state.seed, **masks)
            self.trained.train(weights[name], gate)
        self.gates |= gates

    def _shard(self, model: "PreTrainedModel", mesh: "DeviceMesh", prior: SharedPrior) -> None:
        of_text = {weight.name for weight in norms_of(model)}

        def prepare(index: int, block: nn.Module) -> None:
            self._put_gates({name: weight for name, weight in self.weights.items() if weight.layer == index}, prior)
            own = norms_in(block, f"{name_of_blocks}.{index}")
            self.trained.train_norms(weight for weight in own if weight.name in of_text)
            # Lightning converts later, when FSDP2 would not notice the new dtype; that call then changes nothing.
            convert(block)

        def convert(module: nn.Module) -> nn.Module:
            with keeping_buffers(module):
                return self.trainer.precision_plugin.convert_module(module)

        name_of_blocks, blocks = decoder_blocks(model)
        outside = (norm for norm in norms_of(model) if not norm.name.startswith(f"{name_of_blocks}."))
        others = [convert(module) for module in self.trained.train_norms(outside)]
        shard(model, blocks, mesh, prepare, others)
        convert(model).to(self._device_of_run())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what is learned, which is all that :meth:`state_dict` has: the frozen model stays.

        Args:
            state_dict: Tensors by their names in the module.
            strict: Whether the state must have all that is learned, and nothing else.
            assign: Whether to take the tensors themselves and not their values.

        Raises:
            UserError: With ``strict``, it has not.
        """
        other = {checkpoints.path_of(*place) for place in self.stored()} ^ set(state_dict)
        if strict and other:
            names = listing(sorted(other), 3)
            raise UserError(
                f"the state is not that of this module: it lacks, or has beyond what is learned, {names}. Give what "
                "state_dict returned; of a checkpoint LeapModule.load_from_checkpoint makes the module."
            )
        if strict:
            self.trained.make_room(checkpoints.by_weight(state_dict))
        self.has_mask |= strict and bool(state_dict)
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the module, but keep the precision of the base model's buffers, as transformers does."""
        with keeping_buffers(self):
            return super()._apply(fn, recurse)

    def _make_prior(self, model: "PreTrainedModel", gates: Gates[Any]) -> SharedPrior:
        """Return the prior that the gates start from, for all ranks: an empty one if they do not start here."""
        # First, since a prior may take minutes: raises if this kind of mask cannot have the requested sparsity.
        self.sparsity = gates.exact_sparsity(self.sparsity)
        if not self._fitting():
            return SharedPrior({}, RankZero())
        calls, self.when_loaded = self.when_loaded, []
        for call in calls:
            call(model)
        data = getattr(self.trainer, "datamodule", None)
        calibration = Calibration(
            base_model=self.base_model,
            data=data,
            device=self._device_of_run(),
            progress=self.trainer.progress_bar_callback is not None,
            revision=self.revision,
            record=data.record_of_text() if isinstance(data, TextDataModule) else None,
        )
        if self.resumes_from is not None and Path(self.resumes_from).exists():
            path = Path(self.resumes_from)
            return self.run_prior.find(path, model, self.weights, gates, self.fingerprint, calibration)
        return self.run_prior.make(model, self.weights, gates, self.sparsity, calibration)

    def _fitting(self) -> bool:
        return self.attached is not None and self.trainer.state.fn == "fit"

    def _device_of_run(self) -> torch.device:
        return self.trainer.strategy.root_device if self.attached is not None else torch.device("cpu")

    def _learned(self) -> dict[tuple[str, str], nn.Parameter]:
        """Return the learned parameters: (weight name, attribute of its gate) → parameter."""
        return self.gates.learned() | self.trained.without_gate()

    def stored(self) -> dict[tuple[str, str], Tensor]:
        """Return the tensors that a checkpoint stores: (weight name, attribute of its gate) → tensor."""
        without_gate = self.trained.without_gate()
        return self.gates.stored() | {place: parameter.detach() for place, parameter in without_gate.items()}

    @abstractmethod
    def identity(self) -> Identity:
        """Return what identifies the run in its checkpoints, and in the provenance of its mask."""

    # -- the mask -----------------------------------------------------------------------------------------

    def check_finite(self, *, logits: bool = False) -> None:
        """Check that values to be used or saved are finite; this class checks the logits, if requested.

        Raises:
            NonFiniteError: A logit is infinite or NaN.
        """
        if logits:
            finite.check_logits(self._learned(), self.state.step)

    def choose_hard_masks(self) -> None:
        """Choose the hard mask of every gate at exactly the target sparsity.

        Raises:
            UserError: Nothing was learned.
        """
        if not self.has_mask:
            raise UserError(
                "this module has no mask before a fit. Fit it, or load one: LeapModule.load_from_checkpoint, or "
                "trainer.validate with ckpt_path."
            )
        self.check_finite(logits=True)
        self.gates.choose(self.sparsity)

    def mask_set(self) -> "MaskSet":
        """Return the hard mask at exactly the target sparsity, as exported: complete on every rank.

        In a sharded run every rank must call it.

        Raises:
            UserError: Nothing was learned: the model is not loaded.
        """
        from leap_pl.masks import MaskSet

        self.choose_hard_masks()
        masks = {name: self._hard_mask(name) for name in self.gates}
        return MaskSet(masks, checkpoints.provenance(self.identity(), self.gates))

    def save_mask(self, path: str | Path) -> tuple[int, int]:
        """Write :meth:`mask_set` to the MaskSet file ``path`` with the mask of only one weight in memory at a time.

        All ranks must call this; rank zero writes the file.

        Returns:
            Number of kept weights, and number of all gated weights.
        """
        from leap_pl.masks.mask_set import write_masks

        self.choose_hard_masks()
        if self._writes():
            provenance = checkpoints.provenance(self.identity(), self.gates)
            return write_masks(path, self.gates.shapes, self._hard_mask, provenance)
        counts = [(int(part.sum()), part.numel()) for part in map(self._hard_mask, sorted(self.gates))]
        return sum(kept for kept, _ in counts), sum(total for _, total in counts)

    def save_weights(self, path: str | Path, mask: str | Path) -> None:
        """Write the trained weights, with exact zeros where ``mask`` removes them, beside the MaskSet file ``mask``.

        All ranks must call this, after :meth:`save_mask` has written ``mask``; rank zero writes the file.
        """
        self.trained.save(path, mask, self._hard_mask, writes=self._writes())

    def _hard_mask(self, name: str) -> Tensor:
        return gathered(self.gates[name].hard_mask()).cpu()

    def _writes(self) -> bool:
        return self.attached is None or self.trainer.is_global_zero
