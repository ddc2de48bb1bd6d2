"""Optional kernels: the right part of the model gets them, a missing package is named, nothing else in the process changes."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.backbones.common import embed, mixed_items
from vlm2vec.backbones import load_backbone, registry
from vlm2vec.backbones.kernels import language_model
from vlm2vec.config import ModelConfig
from vlm2vec.errors import ModelError

NAME = "liger_kernel.transformers.monkey_patch"


def options(family: str = "llava_next", **keys: Any) -> ModelConfig:
    return ModelConfig(path=f"builtin/tiny-{family}", **{"kernels": "liger", **keys})


class Stub:
    """Stands for the package: notes its calls, and replaces what the real one replaces for this model type."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        self.calls: list[dict[str, Any]] = []
        module = ModuleType(NAME)
        module.MODEL_TYPE_TO_APPLY_LIGER_FN = {kind: self.apply}  # type: ignore[attr-defined]
        for name in ("liger_kernel", "liger_kernel.transformers"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, NAME, module)
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # as if there were a GPU

    def apply(
        self, model: Any, rope: bool = False, rms_norm: bool = False, swiglu: bool = False, fused_linear_cross_entropy: bool = True
    ) -> None:
        self.calls.append(
            {"model": model, "rope": rope, "rms_norm": rms_norm, "swiglu": swiglu, "head": fused_linear_cross_entropy},
        )
        sys.modules[type(model).__module__].MistralRMSNorm = torch.nn.Identity  # type: ignore[attr-defined]


def test_the_package_gets_the_language_model_and_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub(monkeypatch, "mistral")
    backbone = load_backbone(options())
    assert stub.calls == [
        {"model": backbone.model.model.language_model, "rope": True, "rms_norm": True, "swiglu": True, "head": False},
    ]


def test_later_models_are_built_of_their_own_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_backbone(options(kernels=None))
    rows = mixed_items(before)
    Stub(monkeypatch, "mistral")
    load_backbone(options())
    after = load_backbone(options(kernels=None))
    assert torch.equal(embed(after, rows), embed(before, rows))


def test_no_kernels_asks_for_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    load_backbone(options(kernels=None))


@pytest.mark.parametrize("model_type", sorted(registry()))
def test_every_family_has_a_language_model(model_type: str) -> None:
    """One module with all weights of that part, and with no other."""
    backbone = load_backbone(options(model_type, kernels=None))
    parameters = {id(parameter) for parameter in language_model(backbone).parameters()}
    parts = {backbone.part_of(name) for name, parameter in backbone.model.named_parameters() if id(parameter) in parameters}
    assert "language" in parts and (parts == {"language"} or model_type == "phi3_v")  # which has its projector inside
    outside = [name for name, parameter in backbone.model.named_parameters() if id(parameter) not in parameters]
    assert not [name for name in outside if backbone.part_of(name) == "language"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ModelError, match=r"model.kernels: liger needs a package.*pip install 'vlm2vec\[kernels\]'"):
        load_backbone(options())


def test_a_model_that_the_package_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Stub(monkeypatch, "qwen2")
    with pytest.raises(ModelError, match="liger has none for a mistral language model, only for qwen2; write null"):
        load_backbone(options())


def test_a_package_for_another_transformers_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub(monkeypatch, "mistral")

    def imports(model: Any) -> None:
        raise ImportError("cannot import name 'Gone'")

    sys.modules[NAME].MODEL_TYPE_TO_APPLY_LIGER_FN["mistral"] = imports  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="does not fit this transformers.*'Gone'"):
        load_backbone(options())
    assert not stub.calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Stub(monkeypatch, "mistral")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ModelError, match="model.kernels: liger needs a GPU"):
        load_backbone(options())


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llava_next", "internvl", "smolvlm", "mllama"])
def test_fused_kernels_compute_the_same(model_type: str) -> None:
    pytest.importorskip("liger_kernel")
    found = []
    for kernels in (None, "liger"):
        backbone = load_backbone(options(model_type, kernels=kernels))
        backbone.model.cuda().eval()
        batch = {name: tensor.cuda() for name, tensor in backbone.processor.collate(mixed_items(backbone)).items()}
        hidden = backbone.hidden(batch) * batch["attention_mask"][..., None]
        hidden.square().sum().backward()
        gradients = [parameter.grad for parameter in language_model(backbone).parameters()]
        found.append([hidden.detach(), *(gradient for gradient in gradients if gradient is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for plain, fused in zip(*found, strict=True):
        assert (plain - fused).norm() <= 1e-4 * plain.norm()


@pytest.mark.gpu
def test_flash_attention_computes_the_same() -> None:
    """In half precision, which is all that it knows: as near to float32 as the other kernel in half precision is."""
    pytest.importorskip("flash_attn")
    rows = mixed_items(load_backbone(options(kernels=None)))
    found = {}
    for attention, dtype in (("sdpa", "float32"), ("sdpa", "bfloat16"), ("flash_attention_2", "bfloat16")):
        backbone = load_backbone(options(kernels=None, attention=attention, dtype=dtype))
        backbone.model.cuda().eval()
        batch = {name: tensor.cuda() for name, tensor in backbone.processor.collate(rows).items()}
        with torch.no_grad():
            found[attention, dtype] = (backbone.hidden(batch) * batch["attention_mask"][..., None]).float()
    exact = found["sdpa", "float32"]
    assert (found["flash_attention_2", "bfloat16"] - exact).norm() <= 2 * (found["sdpa", "bfloat16"] - exact).norm()


def test_flash_attention_without_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm2vec.backbones.kernels.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"model.attention: flash_attention_2 needs a package; run pip install 'vlm2vec\[flash\]'"):
        load_backbone(options(kernels=None, attention="flash_attention_2"))
