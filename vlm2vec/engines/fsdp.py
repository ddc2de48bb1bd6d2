"""Weights, gradients and optimizer state spread over ranks by torch's fully_shard (FSDP2; Zhao et al. 2023, arXiv 2304.11277).

A layer's weights are put together when it runs and taken apart again. Its gradient is kept whole on each rank until the last chunk of a
step and is then reduced once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vlm2vec import dist
from vlm2vec.encoder import Encoder
from vlm2vec.engines.base import Engine, trainable
from vlm2vec.engines.units import check_backward, exchanged, find_units, owners, retie


class FullyShardedEngine(Engine):
    """The layers that every chunk runs are spread, all else is replicated."""

    name: ClassVar[str] = "fsdp2"
    meets: ClassVar[bool] = True

    def prepare(self) -> None:
        """Spread the layers, then make the optimizer on this rank's parts."""
        model, units = self.encoder.model, find_units(self.encoder)
        check_backward(self.encoder, units, self.name)
        mesh, before = init_device_mesh(self.encoder.device.type, (dist.world_size(),)), owners(model)
        self.shards: list[FSDPModule] = [fully_shard(part, mesh=mesh, reshard_after_forward=True) for part in units.parts]
        if units.root is not None:  # it owns no weights, but lets the layers share streams and fetch ahead
            fully_shard(units.root, mesh=mesh, ignored_params=set(units.root.parameters()))
        retie(before)
        for shard in self.shards:
            shard.set_gradient_divide_factor(1.0)  # the sum over ranks, not the mean
            shard.set_force_sum_reduction_for_comms(True)
        self.parameters = trainable(self.encoder, self.loss)
        self.replicated = {name: parameter for name, parameter in self.parameters.items() if not isinstance(parameter, DTensor)}
        self.optimizer = self._optimizer(self.parameters)

    def backward(self, rows_CD: Tensor, gradient_CD: Tensor, last: bool) -> None:
        """Keep gradients whole and to this rank until the last chunk."""
        for shard in self.shards:
            shard.set_requires_gradient_sync(last, recurse=False)
        rows_CD.backward(gradient_CD)

    def reduce(self) -> None:
        """The spread gradients were summed by the last backward pass."""
        super().reduce()
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Rank 0 holds the weights that will be saved, whole and on the CPU: those trained, or all where there is no adapter."""
        spread = [parameter for parameter in self.encoder.model.parameters() if isinstance(parameter, DTensor)]
        tensors = {}
        for parameter in spread:
            if parameter.requires_grad or self.encoder.adapter is None:
                tensor = self._gathered(parameter.detach())
                if dist.is_main():
                    tensors[id(parameter)] = tensor.cpu()
        with exchanged(self.encoder.model, tensors):
            yield

    def trained(self, reload: Callable[[], Encoder]) -> Encoder:
        """Read back what was published: the layers here stay spread."""
        return reload().to(self.encoder.device)

    def _shards(self) -> list[Tensor]:
        return [parameter.grad.to_local() for parameter in self.parameters.values() if isinstance(parameter.grad, DTensor)]

    def _gathered(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _placed(self, tensor: Tensor, parameter: nn.Parameter) -> Tensor:
        if not isinstance(parameter, DTensor):
            return super()._placed(tensor, parameter)
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
