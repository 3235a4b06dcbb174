"""Sparsity logger: densities, changes of the mask, loss terms and schedules as metrics."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from leap_pl.callbacks.density_picture import draw_densities
from leap_pl.distributed.shards import gathered
from leap_pl.gates import FixedGate
from leap_pl.inputs.ranges import check_numbers, check_whole
from leap_pl.losses.objective import TOTAL
from leap_pl.masks.patterns import has_form
from leap_pl.masks.weight_groups import shares, split_name, sums
from leap_pl.training.finite import read_together
from leap_pl.training.live_settings import live_settings
from leap_pl.training.module import LeapModule

# Hyperparameters that change during a run: a logger that takes them before its first step takes no others later.
MOVING = {"steps", "data/tokens", "data/passes", "data/sha256"}
FEWEST_BITS = 256  # samples of a weight that are needed to call its density extreme

# TensorBoard's custom-scalars page: learning, budget, changes of the mask, densities by layer and projection.
_PAGE = {
    "run": {
        "perplexity: the exported mask, the prior and the dense model": ["Multiline", [r"at_a_glance/perplexity_.*"]],
        "loss a token, nats": ["Multiline", [r"loss/(lm|distillation)"]],
        "density: the relaxed mask against the target": ["Multiline", [r"density/.*"]],
        "share of mask bits that changed": ["Multiline", [r"mask/.*"]],
        "gradient norm, before clipping": ["Multiline", [r"gradient/norm"]],
    },
    "where it prunes": {
        "hard density by decoder layer": ["Multiline", [r"weights_by_layer/hard/.*"]],
        "hard density by projection": ["Multiline", [r"weights_by_projection/hard/.*"]],
        "soft density by decoder layer": ["Multiline", [r"weights_by_layer/soft/.*"]],
        "soft density by projection": ["Multiline", [r"weights_by_projection/soft/.*"]],
    },
    "schedules": {
        "logit scale": ["Multiline", [r"schedule/alpha"]],
        "temperature": ["Multiline", [r"schedule/tau"]],
        "learning rate": ["Multiline", [r"schedule/learning_rate.*"]],
    },
}


_PAGE_OF_WEIGHTS = {
    "where weights move": {
        "relative distance from the base model by decoder layer": ["Multiline", [r"moved/by_layer/.*"]],
        "relative distance from the base model by projection": ["Multiline", [r"moved/by_projection/.*"]],
    }
}


class SparsityLogger(L.Callback):
    """Callback that logs the state of the mask to every logger of the trainer, with histograms for TensorBoard.

    ==========================  ==========================================================================
    ``density/soft``            mean of the relaxed mask over all gated weights
    ``density/target``          ρ
    ``density/logits_above_0``  share of logits above 0: the density a cut at 0 would give (BernoulliGate)
    ``patterns/confidence``     mean probability of the most likely pattern (NMGate, TileGate in joint mode)
    ``tiles/logits_above_0``    share of tiles whose logit is above 0 (TileGate)
    ``loss/…``                  each term of the objective, unweighted, and their weighted sum ``total``
    ``gradient/norm``           norm of the logits' gradient before clipping (not with float16's scaler)
    ``mask/changed_…``          share of hard mask bits that differ from the prior (``from_prior``), if that is of the
                                gates' own form, and from the last log (``since_last_log``)
    ``perplexity/…``            perplexity of the hard mask and of the dense model, at validation (by the module)
    ``at_a_glance/…``           the curves that decide, first in TensorBoard: perplexity of the hard mask, of the dense
                                model and of the prior; ``density/soft`` minus its target
    ``schedule/…``              α, τ and the learning rate; that of weights apart, where masks and weights learn
    ``weights_by_layer/…``      soft and hard density of each decoder block
    ``weights_by_projection/…`` soft and hard density of each projection, over all blocks
    ``moved/…``                 how far kept weights have moved, ‖M⊙(W − W₀)‖/‖W₀‖ with the base model's W₀ and the hard
                                mask M last chosen: of all, by decoder block and by projection
    ==========================  ==========================================================================

    Hard metrics describe the mask at exactly the target sparsity, estimated from evenly spaced logits; ``moved/…`` of a
    run that also learns the mask ranks all logits. Soft metrics cover all weights, in the last micro-batch. TensorBoard
    also gets histograms of αθ/τ, pictures of the soft density by layer and projection, a custom-scalars page, and the
    hyperparameters with the final perplexities.

    There is one warning for each weight of which the hard mask keeps, or removes, almost nothing.
    """

    def __init__(self, every_n_steps: int = 10, histogram_every_n_steps: int = 100, samples: int = 1 << 19) -> None:
        """Set the intervals.

        Args:
            every_n_steps: Optimizer steps between logs.
            histogram_every_n_steps: Optimizer steps between histograms, and between pictures of the density.
            samples: Number of logits in the whole model from which hard metrics and histograms are estimated.
        """
        numbers = {
            "every_n_steps": every_n_steps,
            "histogram_every_n_steps": histogram_every_n_steps,
            "samples": samples,
        }
        check_numbers(numbers, "sparsity_log.")
        check_whole(numbers, "sparsity_log.")
        self.every_n_steps, self.histogram_every_n_steps = int(every_n_steps), int(histogram_every_n_steps)
        self.samples = int(samples)
        self.stride = 1  # set when a run starts
        self.prior_bits: dict[str, Tensor] = {}
        self.last_bits: dict[str, Tensor] = {}
        self.last_stride: int | None = None  # of last_bits, which a run with other ``samples`` may have taken
        self.last_kept: dict[str, float] = {}  # sum of the relaxed mask by weight
        self.last_step = -1
        self.widths: set[int] = set()  # columns of the gated weights
        self.warned: set[str] = set()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget the curves of an earlier run; those of a checkpoint are loaded later."""
        if stage == "fit":
            self.prior_bits, self.last_bits, self.last_kept = {}, {}, {}
            self.last_stride, self.last_step, self.warned = None, -1, set()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store samples of the prior's bits, and log TensorBoard's page or the hyperparameters."""
        assert isinstance(pl_module, LeapModule)
        self.widths = {gate.shape[-1] for gate in pl_module.gates.values()}
        self.stride = spread_stride(sum(pl_module.sizes.values()) // self.samples, self.widths)
        prior = pl_module.prior
        # From a mask of another form, as tiles start from, most bits differ by the form and not by what is learned.
        if prior is not None and has_form(
            str(prior.provenance.config.get("pattern", "unstructured")), pl_module.gates.form
        ):
            self.prior_bits = {n: m.reshape(-1)[:: self.stride].clone() for n, m in prior.masks.items()}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(_PAGE | (_PAGE_OF_WEIGHTS if pl_module.trained else {}))
            else:
                settings = _hyperparameters(trainer, pl_module)
                logger.log_hyperparams({name: value for name, value in settings.items() if name not in MOVING})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make TensorBoard drop the points that a stopped run logged after its checkpoint: they are logged again."""
        if trainer.global_step == 0 or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # no run without it needs the package

                beyond = Event(step=trainer.global_step + 1, session_log=SessionLog(status=SessionLog.START))
                logger.experiment.file_writer.add_event(beyond)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log once every ``every_n_steps`` optimizer steps, with each histogram, after the first and after the last."""
        step = trainer.global_step
        is_end = step in (1, trainer.max_steps)
        due = step % self.every_n_steps == 0 or step % self.histogram_every_n_steps == 0 or is_end
        assert isinstance(pl_module, LeapModule)
        # A resumed run has no figures of the step before it.
        if step == self.last_step or step == 0 or not due or not pl_module.rates:
            return
        pl_module.check_finite(logits=True)
        self.last_step = step
        metrics = self.measure(pl_module)
        rates = pl_module.rates  # of the step: the optimizer has those of the next one
        metrics["schedule/learning_rate"] = rates[0]
        if len(rates) > 1:  # of masks, and of weights
            metrics["schedule/learning_rate_of_weights"] = rates[1]
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        if step % self.histogram_every_n_steps == 0 or is_end:
            self._histograms(trainer, pl_module, step)
        if step % self.histogram_every_n_steps == 0 or step == trainer.max_steps:
            self._draw_densities(trainer, pl_module, step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the perplexities that decide."""
        assert isinstance(pl_module, LeapModule)
        if trainer.state.fn == TrainerFn.FITTING:
            figures = pl_module.validation.figures()
            perplexities = {f"at_a_glance/perplexity_{name}": value for name, value in figures.items()}
            for logger in trainer.loggers if perplexities else ():
                logger.log_metrics(perplexities, step=trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the hyperparameters with the final metrics to TensorBoard, if the run is finished."""
        assert isinstance(pl_module, LeapModule)
        if trainer.global_step < trainer.max_steps:
            return
        final = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("perplexity/")}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and final:
                named = {f"final_{name}": value for name, value in final.items()}
                logger.log_hyperparams(_hyperparameters(trainer, pl_module), named)

    @torch.no_grad()
    def measure(self, module: LeapModule) -> dict[str, float]:
        """Compute every metric of the class's table that does not come from validation."""
        terms = {f"loss/{'total' if name == TOTAL else name}": value for name, value in module.terms.items()}
        metrics = module.mean_over_ranks(read_together(terms))
        if module.gradient_norm is not None:
            metrics["gradient/norm"] = float(gathered(module.gradient_norm))
        metrics["schedule/alpha"], metrics["schedule/tau"] = float(module.state.alpha), float(module.state.tau)
        kept = self.last_kept = module.mean_over_ranks(read_together(module.gates.kept))
        metrics |= _densities("soft", kept, {name: module.sizes[name] for name in kept})
        metrics["density/soft"] = sum(kept.values()) / sum(module.sizes[name] for name in kept)
        metrics["density/target"] = 1 - module.sparsity
        metrics["at_a_glance/density_minus_target"] = metrics["density/soft"] - metrics["density/target"]

        metrics |= module.gates.curves(self.stride)
        samples = module.gates.sample_hard_masks(module.sparsity, self.stride)
        # One copy from the device, and bits of their own for each weight: a checkpoint stores them.
        parts = torch.cat(list(samples.values())).cpu().split([len(sample) for sample in samples.values()])
        bits = {name: part.clone() for name, part in zip(samples, parts, strict=True)}
        metrics |= _densities(
            "hard", {n: int(b.sum()) for n, b in bits.items()}, {n: b.numel() for n, b in bits.items()}
        )
        if not isinstance(module.gates.first, FixedGate):  # of which no setting of the run says anything
            self._warn_of_extremes(bits, 1 - module.sparsity)
            if module.trained.has_gated:
                module.gates.choose(module.sparsity)  # the masks of now, also after a resume
        metrics |= _movements(module.trained.movements())
        if self.prior_bits:
            metrics["mask/changed_from_prior"] = _difference(bits, self.prior_bits)
        if self.last_bits and self.last_stride == self.stride:
            metrics["mask/changed_since_last_log"] = _difference(bits, self.last_bits)
        self.last_bits, self.last_stride = bits, self.stride
        return metrics

    def _warn_of_extremes(self, bits: dict[str, Tensor], target: float) -> None:
        """Warn once for each weight whose density is close to 0 or 1, with what to do about it.

        Args:
            bits: Samples of the hard masks by weight name.
            target: Target density ρ; a weight is extreme if it keeps, or removes, at most a hundredth of the average.
        """
        for name, mask in bits.items():
            density = float(mask.float().mean())
            if name in self.warned or mask.numel() < FEWEST_BITS:
                continue
            if density <= target / 100:
                what = "almost nothing is kept, and the layer's output may vanish"
            elif 1 - density <= (1 - target) / 100:
                what = "almost nothing is removed, and other weights lose more instead"
            else:
                continue
            self.warned.add(name)
            rank_zero_warn(
                f"{name}: its density is {density:.4f}, and the model's target is {target:.4f}: {what}. If this is "
                "not intended, hold every layer to the target with --model.objective.budget_scope layer, leave this "
                f"weight dense with --model.ignore '[{name}]', or lower the learning rate."
            )

    def _histograms(self, trainer: L.Trainer, module: LeapModule, step: int) -> None:
        slope = float(module.state.slope)
        by_projection: dict[str, list[Tensor]] = {}
        for name, sample in module.gates.samples(spread_stride(self.stride * 4, self.widths)).items():
            by_projection.setdefault(split_name(name)[1], []).append(sample * slope)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for projection, parts in by_projection.items():
                    # Beyond ±20 a gate is fully open or closed in float32: clamping keeps the middle readable.
                    values = torch.cat(parts).clamp(-20, 20)
                    logger.experiment.add_histogram(f"weights_alpha_theta_over_tau/{projection}", values, step)

    def _draw_densities(self, trainer: L.Trainer, module: LeapModule, step: int) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                # Of the relaxed mask, over all of its weights: sampled bits are off by more than masks differ.
                picture = draw_densities({name: kept / module.sizes[name] for name, kept in self.last_kept.items()})
                logger.experiment.add_image("at_a_glance/density", picture, step, dataformats="HWC")

    def state_dict(self) -> dict[str, Any]:
        """Return the bits of the last log, so that the curve of a resumed run has no gap."""
        return {"last_bits": dict(self.last_bits), "last_stride": self.last_stride, "last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the bits of the last log."""
        self.last_bits, self.last_step = dict(state_dict["last_bits"]), state_dict["last_step"]
        self.last_stride = state_dict.get("last_stride")  # which earlier versions did not save


def spread_stride(least: int, widths: Collection[int]) -> int:
    """Return a stride of at least ``least`` by which samples of flattened matrices come from all of their columns.

    It has no factor in common with any of the ``widths``, the numbers of columns.
    """
    stride = max(1, least)
    while any(math.gcd(stride, width) > 1 for width in widths):
        stride += 1
    return stride


def _densities(kind: str, kept: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    def curves(name: str) -> list[str]:
        where, projection = _place(name)
        return [f"weights_by_layer/{kind}/{where}", f"weights_by_projection/{kind}/{projection}"]

    return shares({name: (count, sizes[name]) for name, count in kept.items()}, curves)


def _movements(squares: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return the relative distances of trained weights from Σ(W − W₀)² and ΣW₀² of each."""

    def curves(name: str) -> list[str]:
        where, projection = _place(name)
        return ["moved/all", f"moved/by_layer/{where}", f"moved/by_projection/{projection}"]

    return {key: math.sqrt(moved / max(base, 1e-30)) for key, (moved, base) in sums(squares, curves).items()}


def _place(name: str) -> tuple[str, str]:
    layer, projection = split_name(name)
    return "other" if layer is None else f"{layer:03d}", projection


def _difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    changed = sum(int((one[name] != other[name]).sum()) for name in one)
    return changed / sum(bits.numel() for bits in one.values())


def _hyperparameters(trainer: L.Trainer, module: LeapModule) -> dict[str, Any]:
    """Return the settings of the module, of its optimizer and text, and the number of steps, as plain values."""
    return _plain({**module.hparams, "max_steps": trainer.max_steps, **live_settings(trainer)})


def _plain(hparams: dict[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to ``a/b`` → plain values that a logger can show."""
    flat: dict[str, Any] = {}
    for key, value in hparams.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{inner}": shown for inner, shown in _plain(value).items()}
        elif not key.startswith("_"):
            flat[key] = value if isinstance(value, int | float | str) and not _nan(value) else str(value)
    return flat


def _nan(value: float | str) -> bool:
    return isinstance(value, float) and math.isnan(value)
