"""What an engine does for the training loop, and the engine that copies: every rank holds all weights and the whole optimizer.

The loop calls six verbs and never asks where a tensor lives: `embed` a chunk, `backward` through it, `reduce` once per step, `clip`,
`step`, and `whole` for the weights as one process would hold them.

Each rank computes the whole loss from the gathered embeddings and continues backward through its own items only. So the SUM over ranks of a
gradient of the encoder is the gradient of the global batch; the loss's own parameters have it on every rank already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlm2vec import dist
from vlm2vec.collate import moved
from vlm2vec.config import TrainConfig
from vlm2vec.encoder import Encoder
from vlm2vec.errors import NonFiniteError
from vlm2vec.losses import InfoNCE

Parameters = dict[str, nn.Parameter]
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter, beside its step count


def trainable(encoder: Encoder, loss: nn.Module) -> Parameters:
    """Every trained parameter by a stable name: the encoder's, then the loss's own (a learnable temperature)."""
    named = {f"encoder.{name}": parameter for name, parameter in encoder.model.named_parameters() if parameter.requires_grad}
    return named | {f"loss.{name}": parameter for name, parameter in loss.named_parameters() if parameter.requires_grad}


def parameter_groups(options: TrainConfig, encoder: Encoder, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Groups of an optimizer: the projector has its own learning rate, biases, norms and the temperature do not decay.

    Tensors of different kinds never share a group, because torch updates a group in one call.
    """
    groups: dict[tuple[type, float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        projector = name.startswith("encoder.") and encoder.backbone.part_of(name.removeprefix("encoder.")) == "projector"
        ratio = options.projector_lr / options.lr if projector and options.projector_lr else 1.0
        decay = options.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((type(parameter.data), ratio, decay), []).append(parameter)
    return [{"params": members, "lr_ratio": ratio, "weight_decay": decay} for (_, ratio, decay), members in groups.items()]


def make_optimizer(options: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) on `parameter_groups`."""
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas)


class Engine:
    """All weights on every rank. Subclasses move some of them; the parameters they leave alone are handled here.

    `parameters` are all trained ones by stable name, `replicated` those of them that are ordinary tensors, whole on every rank.
    """

    name: ClassVar[str] = "ddp"
    meets: ClassVar[bool] = False  # whether ranks meet inside a forward or backward pass: then all must make equally many

    def __init__(self, encoder: Encoder, loss: InfoNCE, options: TrainConfig) -> None:
        self.encoder, self.loss, self.options = encoder, loss, options
        self.prepare()

    def prepare(self) -> None:
        """Place weights and make the optimizer."""
        self.parameters = self.replicated = trainable(self.encoder, self.loss)
        self.optimizer = self._optimizer(self.parameters)

    # -- one step ------------------------------------------------------------------------------------------------------------------------

    def embed(self, inputs: dict[str, Tensor]) -> Tensor:
        """Unit rows (C, D) of a collated chunk."""
        return self.encoder.embed(moved(inputs, self.encoder.device))

    def backward(self, rows_CD: Tensor, gradient_CD: Tensor, last: bool) -> None:
        """Add to the gradients what `gradient_CD` at these rows gives; `last` marks the final chunk of the step."""
        if rows_CD.requires_grad:  # not where a chunk of text meets no trained weight
            rows_CD.backward(gradient_CD)

    def reduce(self) -> None:
        """Sum the encoder's gradients over ranks. A parameter that nothing used has gradient zero, on any number of ranks."""
        for parameter in self.replicated.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce_sum([grad for name, grad in self._gradients() if name.startswith("encoder.")])

    def clip(self, limit: float) -> float:
        """Scale all gradients to a joint norm of at most `limit` (0: as they are); return the norm before. Raises NonFiniteError."""
        grads, shards = [grad for _, grad in self._gradients()], self._shards()
        norm = torch.nn.utils.get_total_norm(grads)
        if shards:
            norm = (norm.square() + _square_over_ranks(shards)).sqrt()
        if limit and grads + shards:
            torch._foreach_mul_(grads + shards, (limit / (norm + 1e-6)).clamp(max=1.0))
        found = norm.item()  # the one wait for the device; nothing was updated yet
        if not math.isfinite(found):
            raise NonFiniteError(f"gradient norm={found}")
        return found

    def step(self, lr: float) -> None:
        """Update the weights and forget the gradients."""
        set_rate(self.optimizer, lr)
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drop all gradients: the step is over, or is tried again."""
        for parameter in self.parameters.values():
            parameter.grad = None

    # -- weights and state ---------------------------------------------------------------------------------------------------------------

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, `encoder` on rank 0 can be saved like that of a single process. Every rank enters."""
        yield

    def trained(self, reload: Callable[[], Encoder]) -> Encoder:
        """The encoder after the last step, as one process holds it; `reload` reads it from the checkpoint of that step."""
        return self.encoder

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state, whole and on the CPU, as `<parameter>/<moment>`; empty on other ranks than 0. Every rank calls."""
        found = {}
        for name, parameter in self._stepped():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensor = self._gathered(torch.as_tensor(value))
                if dist.is_main():
                    found[f"{name}/{key}"] = tensor.detach().cpu()
        return found

    def optimizer_layout(self) -> dict[str, Tensor]:
        """What `optimizer_tensors` gives after any step, without data: names, shapes and number formats, the same under every engine.

        No trained parameter is left out, because `reduce` gives each a gradient. AdamW counts steps in float32 whatever the parameter is.
        """
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            moment = torch.empty(self._whole_shape(parameter), dtype=parameter.dtype, device="meta")
            found |= {f"{name}/{key}": moment for key in MOMENTS}
            found[f"{name}/step"] = torch.empty((), dtype=torch.float32, device="meta")
        return found

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `optimizer_tensors` gave, under any engine and any number of ranks: the tensors of `optimizer_layout`, or
        none, from before the first step.
        """
        for name, parameter in self._stepped() if tensors else ():
            moments = {key: self._placed(tensors[f"{name}/{key}"], parameter) for key in MOMENTS}
            self.optimizer.state[parameter] = {"step": tensors[f"{name}/step"], **moments}

    # -- what subclasses say -------------------------------------------------------------------------------------------------------------

    def _optimizer(self, parameters: Parameters) -> torch.optim.Optimizer:
        return make_optimizer(self.options, parameter_groups(self.options, self.encoder, parameters))

    def _stepped(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The parameters that `optimizer` updates."""
        return self.parameters.items()

    def _shards(self) -> list[Tensor]:
        """This rank's parts of the reduced gradients that are spread over ranks; they may be scaled in place."""
        return []

    def _whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        """The shape that one process would see; a DTensor says it itself."""
        return parameter.shape

    def _gathered(self, tensor: Tensor) -> Tensor:
        """A tensor of the optimizer, whole."""
        return tensor

    def _placed(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        """A whole tensor of the optimizer, where and how `parameter` lives."""
        return tensor.to(parameter.device)

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.replicated.items():
            if parameter.grad is not None:
                yield name, parameter.grad


def set_rate(optimizer: Any, lr: float) -> None:
    """Give each group of an optimizer its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


def _square_over_ranks(shards: list[Tensor]) -> Tensor:
    """Squared norm of tensors of which each rank holds a part."""
    square = torch.nn.utils.get_total_norm(shards).square()
    dist.all_reduce_sum([square])
    return square
