"""Walk over the decoder blocks, in which each block's inputs are the outputs of the blocks already pruned.

Nothing here depends on the model family. A forward pass of the model is recorded: the inputs of the first block for
every batch, and the other arguments with which each block is called (attention masks differ from block to block in
models with sliding windows). The blocks are then called separately, one after another, with those arguments and the
walk's own hidden states.

Shapes: N sequences, B sequences in a batch, T tokens, D hidden features.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from leap_pl.base_model.backbone import body_of, evaluating
from leap_pl.base_model.weights import decoder_blocks
from leap_pl.errors import UserError
from leap_pl.kernels.transfers import to_device, to_host
from leap_pl.oneshot.inputs import ERROR_TOKENS, InputStatistics, Matrix, ProductWatch
from leap_pl.oneshot.methods import INSTEAD

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class WalkOptions:
    """Batch size and devices of a walk, and what is predicted in it.

    Attributes:
        batch_size: Number of sequences in one forward pass of a block.
        device: Device on which a block, its Hessians and the solvers are while it is pruned; None: the model's.
        offload: Keep the activations between blocks in CPU memory.
        keep: Restore each block's own tensors after it was visited, and discard whatever was written into its tensors
            on the compute device: nothing is copied back, and memory-mapped weights stay memory-mapped.
        first_target: Index of the first token of a sequence that is predicted, where a loss is computed.
        instead: What to type where the model cannot be walked, for the messages: a setting that needs no walk.
    """

    batch_size: int = 4
    device: torch.device | str | None = None
    offload: bool = True
    keep: bool = False
    first_target: int = 1
    instead: str = INSTEAD


@dataclass(frozen=True)
class _Call:
    """Arguments of one block's call.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        place: Index or name of the argument that holds the hidden states.
        size: Number of sequences.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str
    size: int

    @classmethod
    def of(cls, block: str, args: tuple[Any, ...], kwargs: dict[str, Any], instead: str) -> "_Call":
        if args and isinstance(args[0], Tensor):
            return cls(args, kwargs, 0, args[0].shape[0])
        if isinstance(kwargs.get("hidden_states"), Tensor):
            return cls(args, kwargs, "hidden_states", kwargs["hidden_states"].shape[0])
        raise UserError(
            f"{block} does not take hidden states as its first argument, so leap_pl cannot run this model block by "
            f"block. {instead}."
        )

    @property
    def hidden(self) -> Tensor:
        return self.args[self.place] if isinstance(self.place, int) else self.kwargs[self.place]

    def with_hidden(self, hidden_BTD: Tensor | None) -> "_Call":
        if isinstance(self.place, int):
            return replace(self, args=(hidden_BTD, *self.args[1:]))
        return replace(self, kwargs={**self.kwargs, self.place: hidden_BTD})

    def to(self, device: torch.device) -> "_Call":
        def move(x: Any) -> Any:
            return to_device(x, device) if isinstance(x, Tensor) else x

        return replace(self, args=tree_map(move, self.args), kwargs=tree_map(move, self.kwargs))


class _Stop(Exception):  # noqa: N818  (not an error: it ends a forward pass whose rest is not needed)
    pass


class Walk:
    """State of a walk: the hidden states of every batch before the current block.

    Use it as ``with Walk(model, tokens) as walk: for index in walk: ...``. Within the loop the block is on the compute
    device; :meth:`observe` collects the input statistics of its matrices, and :meth:`advance`, called once the block's
    weights are final, replaces the hidden states by the block's outputs.
    """

    def __init__(self, model: "PreTrainedModel", tokens_NT: Tensor, options: WalkOptions | None = None) -> None:
        """Prepare a walk of ``model`` over ``tokens_NT``.

        Args:
            model: Causal language model, on one device.
            tokens_NT: Calibration tokens, LongTensor.
            options: Settings; None: the defaults.
        """
        self.model, self.options = model, options or WalkOptions()
        self.prefix, self.blocks = decoder_blocks(model)
        self.home = next(model.parameters()).device
        self.device = self.home if self.options.device is None else torch.device(self.options.device)
        self.batches = list(tokens_NT.split(self.options.batch_size))
        self.states: list[Tensor] = []
        self._calls: list[dict[int, _Call]] = [{} for _ in self.blocks]
        self._exit = ExitStack()

    def __enter__(self) -> "Walk":
        """Record the first block's inputs and every block's other arguments from forward passes of the model."""
        self._exit.enter_context(torch.no_grad())
        self._exit.enter_context(evaluating(self.model))
        self._exit.enter_context(eager_experts(self.model))
        try:
            self._record()
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """Restore the model's mode and release the activations."""
        self.states.clear()
        self._exit.close()

    def __iter__(self) -> Iterator[int]:
        """Yield the index of each block, while the block is on the compute device."""
        for index, block in enumerate(self.blocks):
            with on_device(block, self.device, keep=self.options.keep):
                yield index

    def __len__(self) -> int:
        return len(self.blocks)

    # -- interface for pruners ------------------------------------------------------------------------------

    def observe(
        self, index: int, matrices: Sequence[Matrix], *, gram: bool, advance: bool = False
    ) -> dict[str, InputStatistics]:
        """Run block ``index`` in its current state and collect the input statistics of ``matrices``.

        Args:
            index: Index of the block.
            matrices: Matrices of the block.
            gram: Compute Hessians, in addition to mean squares.
            advance: Replace the hidden states by the block's outputs in the same pass; for blocks that are not changed.

        Returns:
            Matrix name → its statistics. Matrices with the same input tensor share one object; an expert that no token
            was routed to is missing.

        Raises:
            UserError: Inputs are not finite, or no product with a matrix was seen.
        """
        collector = _Collector(gram, -(-ERROR_TOKENS // len(self.batches)))
        watch = ProductWatch(matrices, collector)
        for number in range(len(self.batches)):
            with watch:
                output_BTD = self._call(index, number, self.states[number])
            if advance:
                self._keep(index, number, output_BTD)
            collector.end_batch()
        seen = {matrix.weight.name for matrix in matrices if matrix.name in collector.found}
        for matrix in matrices:
            statistics = collector.found.get(matrix.name)
            if matrix.weight.name not in seen:
                raise UserError(
                    f"{matrix.weight.name}: no product of inputs with it was seen while its block ran, so it cannot be "
                    f"calibrated. {self.options.instead}, or leave it out with --ignore."
                )
            if statistics is not None and not statistics.finite():
                raise UserError(
                    f"{matrix.name}: its inputs are not finite (NaN, infinity or beyond 1e19). "
                    "Load the model in another --dtype, and check the model and the blocks before this one."
                )
        return collector.found

    def advance(self, index: int) -> None:
        """Replace the hidden states by the outputs of block ``index`` in its current state.

        Raises:
            UserError: The outputs are not finite.
        """
        for number, state_BTD in enumerate(self.states):
            self._keep(index, number, self._call(index, number, state_BTD))

    # -- implementation -------------------------------------------------------------------------------------

    def _keep(self, index: int, number: int, output_BTD: Tensor) -> None:
        if not bool(torch.isfinite(output_BTD).all()):
            raise UserError(
                f"{self.prefix}.{index}: its outputs are not finite. Load the model in another --dtype "
                "(float16 overflows beyond 65504), and check the model."
            )
        self.states[number] = self._stored(output_BTD)

    def _stored(self, state_BTD: Tensor) -> Tensor:
        return to_host(state_BTD) if self.options.offload else to_device(state_BTD, self.device)

    def _call(self, index: int, number: int, state_BTD: Tensor) -> Tensor:
        call = self._calls[index][state_BTD.shape[0]].with_hidden(state_BTD).to(self.device)
        output = self.blocks[index](*call.args, **call.kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def _record(self) -> None:
        """Run the first and the last batch through all blocks, and the others only up to the first block's input."""
        first_BT, *others = self.batches
        first = self._calls_of(first_BT)
        # Two batches of different tokens must give the same arguments: a single one is also run with its text reversed.
        given = self.options.first_target
        reversed_BT = torch.cat([first_BT[:, :given], first_BT[:, given:].flip(1)], 1)
        last = self._calls_of(others[-1] if others else reversed_BT)
        self.states.append(self._stored(first[0].hidden))
        for tokens_BT in others[:-1]:
            self.states.append(self._stored(self._calls_of(tokens_BT, whole=False)[0].hidden))
        if others:
            self.states.append(self._stored(last[0].hidden))
        for index in range(len(self.blocks)):
            _check_same(f"{self.prefix}.{index}", first[index], last[index], self.options.instead)
            for call in (first[index], last[index]):
                self._calls[index][call.size] = call.with_hidden(None)

    def _calls_of(self, tokens_BT: Tensor, *, whole: bool = True) -> list[_Call]:
        """Run the model, and return the calls of its blocks, or of the first alone; the first has its hidden states.

        Raises:
            UserError: The blocks are not called once each, in order.
        """
        calls: list[_Call] = []
        order: list[int] = []
        homes: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):

                def before(module: nn.Module, args: Any, kwargs: Any, index: int = index) -> Any:
                    call = _Call.of(f"{self.prefix}.{index}", args, kwargs, self.options.instead)
                    calls.append(call.with_hidden(None) if order else call)  # the states of all blocks are many
                    order.append(index)
                    if not whole:
                        raise _Stop
                    homes[module] = _tensors(module)
                    module.to(self.device)
                    moved = call.to(self.device)
                    return moved.args, moved.kwargs

                def after(module: nn.Module, args: Any, output: Any) -> Any:
                    _put_back(homes.pop(module))
                    module.to(self.home)
                    return tree_map(lambda x: x.to(self.home) if isinstance(x, Tensor) else x, output)

                stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(after).remove)
            with suppress(_Stop):  # without the head, whose logits are many
                body_of(self.model)(input_ids=tokens_BT.to(self.home), use_cache=False)
        if order != list(range(len(self.blocks) if whole else 1)):
            raise UserError(
                f"{self.prefix}: the model's forward pass does not run its blocks once each, in order, so leap_pl "
                f"cannot run it block by block. {self.options.instead}."
            )
        return calls


class _Collector:
    """Accumulator of input statistics; matrices with the same input tensor share one object."""

    def __init__(self, gram: bool, sample: int) -> None:
        self.gram, self.sample = gram, sample
        self.found: dict[str, InputStatistics] = {}
        self.seen: list[tuple[Tensor, InputStatistics]] = []

    def __call__(self, matrix: Matrix, inputs: Tensor, *output: Any) -> None:
        if inputs.numel() == 0:
            return
        shared = next((s for tensor, s in self.seen if tensor is inputs), None)
        own = self.found.get(matrix.name)
        if shared is not None and (own is None or own is shared):
            self.found[matrix.name] = shared
            return
        statistics = own or InputStatistics(self.gram)
        self.found[matrix.name] = statistics
        self.seen.append((inputs, statistics))
        statistics.add(inputs.reshape(-1, inputs.shape[-1]), sample=self.sample)

    def end_batch(self) -> None:
        """Release the input tensors, which are compared by identity within one batch."""
        self.seen.clear()


def _tensors(module: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    return [(parameter, parameter.data) for parameter in module.parameters()]


def _put_back(tensors: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, tensor in tensors:
        parameter.data = tensor


def _check_same(block: str, first: _Call, last: _Call, instead: str) -> None:
    """Check that the arguments other than the hidden states do not depend on the tokens.

    A mapping that is no dict, and not empty after the run, is how blocks pass keys and values to later ones (Gemma 4).
    """
    sides, passed = [], False
    for call in (first, last):
        others = call.with_hidden(None)
        leaves, _ = tree_flatten((others.args, others.kwargs))
        sides.append([(x, call.size) for x in leaves if isinstance(x, Tensor)])
        passed |= any(isinstance(x, Mapping) and len(x) > 0 for x in leaves)
    same = (
        not passed
        and len(sides[0]) == len(sides[1])
        and all(
            torch.equal(a, b) if a.shape == b.shape else torch.equal(_first(a, size_a), _first(b, size_b))
            for (a, size_a), (b, size_b) in zip(*sides, strict=True)
        )
    )
    if not same:
        raise UserError(
            f"{block} has arguments that depend on the tokens, other than its hidden states, so leap_pl cannot run "
            f"this model block by block. {instead}."
        )


def _first(tensor: Tensor, size: int) -> Tensor:
    """Return the part of an argument for the first of ``size`` sequences; biases may be (size·heads, …)."""
    if tensor.ndim == 0 or tensor.shape[0] % size:
        return tensor
    return tensor[: tensor.shape[0] // size]


@contextmanager
def on_device(module: nn.Module, device: torch.device, *, keep: bool) -> Iterator[None]:
    """Move ``module`` to ``device``, and back on exit; with ``keep`` restore the same parameter tensors as before."""
    first = next(module.parameters(), None)
    if first is None:
        yield
        return
    home = first.device
    before = _tensors(module) if keep else []
    module.to(device)
    try:
        yield
    finally:
        _put_back(before)
        module.to(home)


@contextmanager
def eager_experts(model: "PreTrainedModel") -> Iterator[None]:
    """Compute stacked experts by one product each: fused implementations hide which tokens an expert gets."""
    before = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else None
    if before is None or all(kind in (None, "eager") for kind in before.values()):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation({key: kind for key, kind in before.items() if kind is not None})
