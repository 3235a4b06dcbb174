"""First pages of the help of fit and recover: the options that most runs need, as text, so that it is shown at once."""

_DEVICES = """\
  --trainer.accumulate_grad_batches 1
                                     Add up the gradients of so many micro-batches in a step.
  --trainer.accelerator auto         Choose the hardware: cpu, gpu or auto.
  --trainer.devices auto             Use so many devices.
  --trainer.strategy auto            Spread a run over devices: ddp, or ModelParallelStrategy to shard the model."""

_CLIPPING_AND_VALIDATION = """\
  --trainer.gradient_clip_val 1.0    Clip the norm of the gradient.
  --trainer.val_check_interval N     Validate every N micro-batches and at the end, not about ten times a run."""


def _text(train: str) -> str:
    return f"""\
text
  --data.text allenai/c4             {train} on files (.jsonl, .parquet, .txt), patterns of files or a hub dataset.
  --data.validation_text TEXT        Validate on this text instead of a held-out share of the first.
  --data.text_column text            Name the column or JSON key of the text.
  --data.seq_length 4096             Cut the text into blocks of so many tokens.
  --data.batch_size 1                Read so many blocks in a micro-batch."""


def _results(files: str) -> str:
    return f"""\
results
  --checkpoint.dirpath FOLDER        Write checkpoints, {files} there.
  --trainer.logger.save_dir runs     Write the curves there, for tensorboard --logdir runs.
  --ckpt_path CHECKPOINT             Resume from a checkpoint; last: the newest in --checkpoint.dirpath, if any.
  --force                            Replace an earlier run in that folder."""


FIT = f"""\
usage: leap_pl fit --config RECIPE --model.base_model MODEL [options]
       leap_pl fit --config FILE [options]

Learn which weights of a language model to keep. Values shown are defaults, except those in capitals.

settings
  --config RECIPE                    Take a file or recipe: short or paper, then 2of4, low_memory, ddp or fsdp2.
model
  --model.base_model MODEL           Name a hub id, a local folder or a GGUF file.
  --model.sparsity 0.5               Remove this share of the gated weights, exactly.
  --model.gate BernoulliGate         Choose the kind of mask: BernoulliGate (any weights), NMGate (n:m) or TileGate.
  --model.ignore NAMES               Leave weights dense: '[re:.*down_proj, lm_head]'.
  --model.prior.method wanda         Start from the mask of a one-shot method, or from none.
  --model.objective.distillation 0.0 Weigh the distillation loss, beside --model.objective.lm 1.0.
  --model.activation_checkpointing false
                                     Recompute decoder blocks: less memory, a third more time.
{_text("Learn")}
schedule
  --tokens NUMBER                    Learn on so many tokens, as in 10M; it sets --trainer.max_steps.
  --model.annealing.alpha.start 25.0 Move the logit scale α from here to --model.annealing.alpha.end 350.0.
  --model.annealing.tau.start 4.0    Move the temperature τ from here to --model.annealing.tau.end 0.05.
  --model.optimizer.lr 0.001         Set the learning rate, after --model.warmup_steps 5 of warm-up.
trainer
  --trainer.max_steps 2000           Take so many optimizer steps.
{_DEVICES}
  --trainer.precision PRECISION      Compute in another precision, such as bf16-true.
{_CLIPPING_AND_VALIDATION}
  --trainer.max_time DD:HH:MM:SS     Stop each start after this time; --ckpt_path last resumes.
  --trainer.logger LOGGER            Log to CSVLogger or WandbLogger instead of TensorBoard, or to false.
{_results("prior.safetensors and mask.safetensors")}

leap_pl fit --help all lists every option. leap_pl fit ... --print_config prints the settings of a run as a config.
"""

RECOVER = f"""\
usage: leap_pl recover --model.base_model MODEL --model.mask MASK [options]
       leap_pl recover --config FILE [options]

Train the weights that a mask keeps; the mask stays as it is. Values shown are defaults, except those in capitals.

settings
  --config RECIPE                    Take a file or recipe: low_memory, ddp or fsdp2.
model
  --model.base_model MODEL           Name the model that the mask was made for, or one that it was applied to.
  --model.mask MASK                  Keep this mask: a MaskSet file, a folder that has one, or a hub id.
  --model.weights FOLDER             Start from the weights in a folder, as those that prune has updated.
  --model.train_weights kept         Train all kept weights and the norms (kept), low-rank updates (lora) or norms.
  --model.weight_training.lr RATE    Set the rate of the weights: 2e-4 under a mask of prune, 2e-5 under others, and
                                     where weights were trained before.
  --model.weight_training.warmup_steps 5
                                     Warm the rate up over so many steps.
  --model.weight_training.r 16       Set the rank of lora, whose scale is --model.weight_training.lora_alpha 32.0.
  --model.weight_training.target_modules NAMES
                                     Update these layers alone with lora: '[q_proj, v_proj]'.
  --model.objective.lm 0.5           Weigh the LM loss.
  --model.objective.distillation 0.5 Weigh the distillation loss, against the base model.
{_text("Train")}
trainer
  --tokens NUMBER                    Train on so many tokens, as in 10M; it sets --trainer.max_steps 2000.
{_DEVICES}
{_CLIPPING_AND_VALIDATION}
{_results("mask.safetensors and weights.safetensors")}

leap_pl recover --help all lists every option. leap_pl export --help says how the trained model is written.
"""
