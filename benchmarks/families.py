"""Which model families qlab captures, and whether the captured and the prepared model are the user's bit for bit.

    python benchmarks/families.py             # prints the table; some minutes on one core
    python benchmarks/families.py --write     # and puts it into docs/families.md
    python benchmarks/families.py Swin Bert   # only those whose name has one of the words

Families are small models with random weights, in plain torch.nn and, where installed, of transformers (from
configurations, nothing is downloaded), torchvision and timm. Each is captured with 2 samples and compared on 5.
"""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import qlab
from qlab.graph.admission import readable, without_fused_attention
from qlab.graph.example import example_arguments
from tests.graph.families import FAMILIES
from tests.graph.families.family import Family, examine, images, same

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
BEGIN, END = "<!-- written by benchmarks/families.py -->", "<!-- end -->"
HEAD = ("family", "steps", "captured: equal", "prepared: equal", "quantized", "float, with the reason")

# Sizes that the architecture takes; the smallest of each line of models.
TORCHVISION = {
    **dict.fromkeys(("resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121"), 64),
    **dict.fromkeys(("shufflenet_v2_x0_5", "squeezenet1_1", "googlenet", "convnext_tiny", "regnet_x_400mf"), 64),
    **{"swin_t": 64, "vit_b_32": 224, "inception_v3": 96, "fcn_resnet50": 64, "deeplabv3_mobilenet_v3_large": 64},
}
TIMM = {
    **dict.fromkeys(("resnet18", "mobilenetv3_small_050", "efficientnet_lite0", "ghostnet_050", "repvgg_a0"), 64),
    **dict.fromkeys(("convnext_atto", "mixnet_s", "regnetx_002", "hardcorenas_a", "tinynet_e"), 64),
    **{
        "vit_tiny_patch16_224": 224,
        "swin_tiny_patch4_window7_224": 224,
        "mobilevit_xxs": 64,
        "deit_tiny_patch16_224": 224,
    },
}


def hugging_face() -> list[Family]:
    """Families of transformers, built from configurations."""
    from tests.graph.families.hugging_face import FAMILIES as FOUND

    return FOUND


def torchvision() -> list[Family]:
    """Models of torchvision without weights."""
    import torchvision.models as models

    def build(name: str) -> Callable[[], nn.Module]:
        return lambda: models.get_model(name, weights=None, **_without_backbone(name))

    return [Family(name, "torchvision", build(name), images(3, size, size)) for name, size in TORCHVISION.items()]


def timm() -> list[Family]:
    """Models of timm without weights."""
    from timm import create_model

    def build(name: str) -> Callable[[], nn.Module]:
        return lambda: create_model(name, pretrained=False)

    return [Family(name, "timm", build(name), images(3, size, size)) for name, size in TIMM.items()]


SOURCES = {"transformers": hugging_face, "torchvision": torchvision, "timm": timm}


def _without_backbone(name: str) -> dict[str, object]:
    settings: dict[str, object] = {"weights_backbone": None} if name.startswith(("fcn", "deeplab")) else {}
    return settings | ({"init_weights": False} if name in ("googlenet", "inception_v3") else {})


@torch.no_grad()
def prepared_equals(family: Family) -> bool:
    """Whether the prepared model equals the model bit for bit at the second batch size."""
    torch.manual_seed(0)
    model = family.build().eval()
    prepared = qlab.prepare(model, family.batch(2))
    args, kwargs = example_arguments(model, family.batch(5))
    with without_fused_attention():
        return same(readable(model(*args, **kwargs)), prepared(*args, **kwargs))


def row(family: Family) -> tuple[str, ...]:
    """One line of the table."""
    outcome = examine(family)
    said = "bit for bit" if outcome.exact else "**no**"
    prepared = "bit for bit" if prepared_equals(family) else "**no**"
    unexplained = f", {len(outcome.unexplained)} unexplained" if outcome.unexplained else ""
    numbers = (f"{outcome.layers - outcome.in_float}", f"{outcome.in_float}{unexplained}")
    return (family.name, str(outcome.layers), said, prepared, *numbers)


def table(words: list[str]) -> Iterator[str]:
    """The lines of the table, as they are found."""
    families = list(FAMILIES)
    absent = [name for name in SOURCES if importlib.util.find_spec(name) is None]
    for name, source in SOURCES.items():
        families += [] if name in absent else source()
    families = [family for family in families if not words or any(word in str(family) for word in words)]
    group, exact = "", 0
    for family in families:
        if family.group != group:
            group = family.group
            yield f"\n## {group[0].upper() + group[1:]}\n"
            yield "| " + " | ".join(HEAD) + " |"
            yield "|" + "---|" * len(HEAD)
        cells = row(family)
        exact += cells[2:4] == ("bit for bit", "bit for bit")
        yield "| " + " | ".join(cells) + " |"
    yield f"\n{exact} of {len(families)} families are captured and prepared bit for bit."
    for name in absent:
        yield f"\n{name} is not installed here: its families were skipped."


def main() -> None:
    """Prints the table, and writes it where asked."""
    torch.set_num_threads(1)
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    start, lines = time.perf_counter(), []
    for line in table(words):
        print(line, flush=True)
        lines.append(line)
    print(f"\n{time.perf_counter() - start:.0f} s")
    if "--write" in sys.argv:
        before, rest = PAGE.read_text().split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n\n{END}{after}")


if __name__ == "__main__":
    main()
