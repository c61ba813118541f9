"""Hugging Face models built from small configurations: nothing is downloaded. Needs the extra `hub`."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

from tests.graph.families.family import Family, settled

_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
_NO_MARKS = {"bos_token_id": None, "eos_token_id": None}
_IMAGE = {"image_size": 32, "num_labels": 5}


def _from(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, model)(getattr(hf, config)(**settings))


def _settled_from(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: settled(_from(model, config, **settings)(), _pixels(8))


def _ids(n: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(n, 10, dtype=torch.long)
    mask[0, 7:] = 0
    return {"input_ids": torch.randint(0, 50, (n, 10)), "attention_mask": mask}


def _pixels(n: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(n, 3, 32, 32)}


def _family(name: str, build: Callable[[], nn.Module], batch: Callable[[int], Any]) -> Family:
    return Family(name, "Hugging Face", build, batch)


FAMILIES = [
    _family("Bert", _from("BertForSequenceClassification", "BertConfig", **_TEXT), _ids),
    _family(
        "DistilBert",
        _from("DistilBertModel", "DistilBertConfig", dim=16, hidden_dim=32, n_layers=2, n_heads=2, vocab_size=50),
        _ids,
    ),
    _family(
        "GPT-2",
        _from("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, vocab_size=50, **_NO_MARKS),
        _ids,
    ),
    _family("Llama", _from("LlamaForCausalLM", "LlamaConfig", **_TEXT, num_key_value_heads=1), _ids),
    _family("Qwen3", _from("Qwen3ForCausalLM", "Qwen3Config", **_TEXT, num_key_value_heads=1, head_dim=8), _ids),
    _family(
        "T5 encoder",
        _from("T5EncoderModel", "T5Config", d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50),
        _ids,
    ),
    _family("ViT", _from("ViTForImageClassification", "ViTConfig", **_TEXT | _IMAGE, patch_size=8), _pixels),
    _family(
        "MobileNetV2",
        _settled_from("MobileNetV2ForImageClassification", "MobileNetV2Config", **_IMAGE, depth_multiplier=0.25),
        _pixels,
    ),
    _family(
        "MobileViT",
        _settled_from(
            "MobileViTForImageClassification",
            "MobileViTConfig",
            **_IMAGE,
            hidden_sizes=[16, 16, 16],
            neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
            num_attention_heads=2,
            initializer_range=0.2,
        ),
        _pixels,
    ),
    _family(
        "Segformer",
        _settled_from(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            num_labels=5,
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 8, 16, 16],
            num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=16,
        ),
        _pixels,
    ),
    _family(
        "ResNet",
        _settled_from(
            "ResNetForImageClassification",
            "ResNetConfig",
            num_labels=5,
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
        ),
        _pixels,
    ),
]
