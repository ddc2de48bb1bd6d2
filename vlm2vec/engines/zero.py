"""DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054): optimizer (stage 1), gradients too (2), weights too (3) spread over ranks.

DeepSpeed keeps the optimizer, and in stage 3 puts the weights of a layer together when it runs. Its reduction during backward passes is
switched off: gradients stay whole on each rank until the last chunk of a step, and are then reduced once, in one order on all ranks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vlm2vec import dist
from vlm2vec.encoder import Encoder
from vlm2vec.engines import base
from vlm2vec.engines.base import MOMENTS, Engine, trainable
from vlm2vec.engines.units import check_backward, exchanged, find_units
from vlm2vec.errors import EnvError, RecipeError
from vlm2vec.losses import InfoNCE


def deepspeed() -> Any:
    """The library. Raises EnvError if it is not installed."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed as library
        import deepspeed.ops as ops
    except ImportError as error:
        raise EnvError("train.engine: ZeRO needs deepspeed; pip install 'vlm2vec[deepspeed]'") from error
    if on_cpu:  # an all-reduce in shared memory that takes a compiler and a minute to build; gloo does the same
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return library


class _Spread(nn.Module):
    """What DeepSpeed sees of a model: some parameters, or some layers, which run when the model runs.

    It is never called itself, so that DeepSpeed records no order of layers to fetch ahead by: that order differs between first and second
    passes.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameters)
        self.layers = nn.ModuleList(layers)


class ZeroEngine(Engine):
    """Stages 1 and 2 spread the optimizer of the encoder's trained parameters; stage 3 the layers that every chunk runs, frozen or not."""

    def __init__(self, encoder: Encoder, loss: InfoNCE, options: base.TrainConfig) -> None:
        self.stage = int(str(options.engine)[-1])
        self.name, self.meets = str(options.engine), self.stage == 3  # type: ignore[misc]  # of this object, which is one of three engines
        super().__init__(encoder, loss, options)

    def prepare(self) -> None:
        """Hand the parameters to DeepSpeed, and keep the others here."""
        self.parameters = trainable(self.encoder, self.loss)
        self._check_types()
        library, spread = deepspeed(), self._spread()
        inside = {id(parameter) for parameter in spread.parameters()}
        self.spread = {name: parameter for name, parameter in self.parameters.items() if id(parameter) in inside}
        self.replicated = {name: parameter for name, parameter in self.parameters.items() if name not in self.spread}
        self.optimizer = self._optimizer(self.replicated) if self.replicated else base.make_optimizer(self.options, [_nothing()])
        self.held = list(spread.parameters())
        optimizer = self._optimizer(self.spread)
        self.zero, *_ = library.initialize(model=spread, optimizer=optimizer, config=self._config(), dist_init_required=False)
        self.zero.enable_backward_allreduce = False
        for hook in (*self.zero.optimizer._grad_acc_hooks, *getattr(self.zero.optimizer, "_leaf_module_hooks", ())):
            hook.remove()

    def backward(self, rows_CD: Tensor, gradient_CD: Tensor, last: bool) -> None:
        """Let go of layers whose input needs no gradient too: DeepSpeed overlooks them, and ranks with text alone have one more of them."""
        super().backward(rows_CD, gradient_CD, last)
        if self.stage == 3:
            self.zero.empty_partition_cache()

    def reduce(self) -> None:
        """Reduce all gradients in one go; a parameter that nothing used counts as zero, so that ranks agree on what they send."""
        super().reduce()
        for parameter in self.spread.values():
            if parameter.grad is None:
                with self._put_together(parameter):
                    parameter.grad = torch.zeros_like(parameter)
            parameter.grad.mul_(dist.world_size())  # DeepSpeed takes the mean over ranks
        with self.zero.coalesce_grad_reduction():
            pass

    def step(self, lr: float) -> None:
        """Update both kinds of parameters."""
        base.set_rate(self.zero.optimizer, lr)
        self.zero.step()
        super().step(lr)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Stage 3: rank 0 holds the weights that will be saved, whole and on the CPU: those trained, or all where there is no adapter."""
        tensors = {}
        for parameter in self.held if self.stage == 3 else ():
            if parameter.requires_grad or self.encoder.adapter is None:
                with self._put_together(parameter):
                    if dist.is_main():
                        tensors[id(parameter)] = parameter.detach().cpu().clone()
        with exchanged(self.encoder.model, tensors):
            yield

    def trained(self, reload: Callable[[], Encoder]) -> Encoder:
        """Stage 3: read back what was published, the layers here stay spread."""
        return reload().to(self.encoder.device) if self.stage == 3 else self.encoder

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """As in every engine, whatever is spread here."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found = super().optimizer_tensors()
        step = _state(self.zero)
        self._link()
        for name, parameter in self.spread.items() if step else ():
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            if dist.is_main():
                found |= {f"{name}/{key}": tensor.detach().cpu().clone() for key, tensor in moments.items()}
                found[f"{name}/step"] = step[0]["step"].cpu().clone()
        return found

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill the state of both optimizers."""
        from deepspeed.utils import safe_set_full_optimizer_state

        super().load_optimizer(tensors)
        if not tensors:
            return
        self._make_state()
        for name, parameter in self.spread.items():
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, tensors[f"{name}/{key}"].to(self.encoder.device), key)
            for held in _state(self.zero):
                held["step"].fill_(tensors[f"{name}/step"].item())

    def _make_state(self) -> None:
        """An optimizer makes its state in its first step: take one with gradient zero and rate zero, which changes nothing."""
        for parameter in self.spread.values():
            parameter.grad = None
        self.reduce()
        base.set_rate(self.zero.optimizer, 0.0)
        self.zero.step()
        self.forget()
        self._link()

    def _link(self) -> None:
        """Tell parameters where their optimizer state is: stages 1 and 2 do so after stepping the first group, when others have none."""
        if self.stage < 3 and _state(self.zero):
            self.zero.optimizer._hp_optimizer_states_linked = False
            self.zero.optimizer._lazy_init_hp_params_optimizer_state()

    def _put_together(self, parameter: nn.Parameter) -> AbstractContextManager[None]:
        """Inside, a parameter that stage 3 took apart is whole on every rank. Every rank enters."""
        return deepspeed().zero.GatheredParameters([parameter]) if self.stage == 3 else nullcontext()

    def _spread(self) -> nn.Module:
        if self.stage < 3:
            return _Spread([parameter for name, parameter in self.parameters.items() if name.startswith("encoder.")], [])
        from deepspeed.utils import set_z3_leaf_module

        units = find_units(self.encoder)
        check_backward(self.encoder, units, self.name)
        for layer in units.parts:  # its weights come and go together: some modules read those of others, which then must be there
            set_z3_leaf_module(layer, True)
        return _Spread([], units.parts)

    def _stepped(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self.replicated.items()

    def _whole_shape(self, parameter: nn.Parameter) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)  # stage 3 leaves an empty tensor in the parameter

    def _shards(self) -> list[Tensor]:
        return [part for parts in self.zero.optimizer.averaged_gradients.values() for part in parts]

    def _check_types(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                raise RecipeError(
                    f"train.engine: {self.name} updates float32 weights only, and {name} is {parameter.dtype}; write model.dtype: float32 "
                    "with train.precision: bf16, or take another engine"
                )

    def _config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self.stage,
                "overlap_comm": False,
                "stage3_param_persistence_threshold": 0,  # small weights come and go with their layer too
                "memory_efficient_linear": False,  # it replaces torch's linear layer, also under autocast, and rounds otherwise
            },
        }


def _nothing() -> dict[str, Any]:
    return {"params": [torch.zeros(0)], "lr_ratio": 1.0}


def _state(engine: Any) -> list[dict[str, Tensor]]:
    """What DeepSpeed's inner optimizer keeps, per flat group; empty before its first step."""
    return list(engine.optimizer.optimizer.state.values())
