"""Each rule on the model and its graph: a tiny model that triggers it, and one that does not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import qlab
from qlab.graph.findings import Findings, Severity
from qlab.graph.model_rules import Subject, rules
from qlab.graph.observed import Observed
from tests.graph.models import Shared


class Fn(nn.Module):
    """A linear layer and a forward given as a function of (module, inputs)."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self._forward = forward

    def forward(self, *args: Any) -> Any:
        return self._forward(self, *args)


class Dropping(nn.Module):
    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.functional, self.dropout = functional, nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, self.training) if self.functional else self.dropout(x)


class AsksForTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 1
        return x * 2


class Opaque:
    """A result that PyTorch does not know as a container."""


def normed(groups: int = 1, between: nn.Module | None = None) -> nn.Module:
    middle = [] if between is None else [between]
    return nn.Sequential(nn.Conv2d(3, 32, 1, groups=groups), *middle, nn.BatchNorm2d(32), nn.ReLU())


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 3))


def half(x: Any) -> Any:
    return copy.deepcopy(x).to(torch.bfloat16)


def filled(value: float) -> nn.Module:
    model = plain()
    with torch.no_grad():
        model[0].weight[0, 0] = value
    return model


def write(model: Fn, x: Tensor) -> Tensor:
    x.mul_(2)
    return model.fc(x)


def count(model: Fn, x: Tensor) -> Tensor:
    model.calls.add_(1)
    return model.fc(x)


X, IMAGE = torch.randn(4, 3), torch.randn(2, 3, 6, 6)

# code: (model that triggers it, its example, model that does not, its example)
CASES: dict[str, tuple[Any, Any, Any, Any]] = {
    "QL109": (plain(), X[:1], plain(), X),
    "QL110": (Fn(lambda m, x, k: m.fc(x) * k), (X, 2.0), Fn(lambda m, x, k: m.fc(x) * k), (X, X)),
    "QL111": (Fn(lambda m, x: (m.fc(x), Opaque())), X, Fn(lambda m, x: {"y": m.fc(x)}), X),
    "QL112": (Fn(write), X, Fn(lambda m, x: m.fc(x * 2)), X),
    "QL113": (Fn(count, calls=torch.zeros(())), X, Fn(lambda m, x: m.fc(x) + m.calls, calls=torch.zeros(())), X),
    "QL201": (Fn(lambda m, x: m.fc(m.fc(x))), X, plain(), X),
    "QL202": (Shared(), torch.randint(0, 20, (2, 4)), plain(), X),
    "QL203": (Dropping(functional=True), X, Dropping(functional=False), X),
    "QL204": (AsksForTraining(), X, Dropping(functional=True), X),
    "QL205": (filled(float("nan")), X, Fn(lambda m, x: m.fc(x) + m.mask, mask=torch.tensor([0.0, 0.0, -torch.inf])), X),
    "QL206": (half(plain()), half(X), plain(), X),
    "QL207": (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 32))), X, plain(), X),
    "QL208": (Fn(lambda m, x: (m.fc(x) - 1e9).log()), X, Fn(lambda m, x: m.fc(x).square().add(1).log()), X),
    "QL301": (normed(between=nn.ReLU()), IMAGE, normed(), IMAGE),
    "QL302": (nn.Sequential(nn.Linear(3, 32), nn.ReLU6(), nn.Linear(32, 3)), X, plain(), X),
    "QL305": (nn.Sequential(nn.Linear(3, 32), nn.Softmax(-1)), X, nn.Sequential(nn.Tanh(), nn.Softmax(-1)), X),
    "QL306": (nn.Sequential(nn.Linear(3, 48), nn.Linear(48, 3)), X, plain(), X),
}


def codes(found: Findings) -> set[str]:
    return {finding.code for finding in found}


@pytest.mark.parametrize("code", CASES)
def test_a_rule_finds_what_it_looks_for_and_nothing_else(code):
    model, example, clean, clean_example = CASES[code]
    found = qlab.validate(model, example).where(code)
    assert found
    assert all(finding.what and finding.why and finding.remedy for finding in found)
    assert code not in codes(qlab.validate(clean, clean_example))


def test_a_clean_model_has_no_finding_and_is_not_changed():
    model = plain()
    before = copy.deepcopy(model.state_dict())
    assert list(qlab.validate(model, X)) == []
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_findings_point_into_the_users_code():
    found = qlab.validate(Fn(lambda m, x: m.fc(m.fc(x))), X).where("QL201")[0]
    assert found.layer == "fc"
    assert found.location.rpartition(":")[0] == __file__
    tied = qlab.validate(Shared(), torch.randint(0, 20, (2, 4))).where("QL202")[0]
    assert tied.location.rpartition(":")[0].endswith("models.py")


def test_a_module_reused_without_weights_is_a_hint_and_with_weights_a_warning():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 32), relu, nn.Linear(32, 32), relu)
    assert [f.severity for f in qlab.validate(model, X).where("QL201")] == [Severity.HINT]
    assert [f.severity for f in qlab.validate(Fn(lambda m, x: m.fc(m.fc(x))), X).where("QL201")] == [Severity.WARNING]


def test_dropout_inside_attention_is_frozen_too():
    layer = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.1, batch_first=True)
    found = qlab.validate(layer, torch.randn(2, 5, 8)).where("QL203")
    assert [finding.layer for finding in found] == ["self_attn"]
    without = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, batch_first=True)
    assert not qlab.validate(without, torch.randn(2, 5, 8)).where("QL203")


def test_a_result_without_any_tensor_is_an_error():
    found = qlab.validate(Fn(lambda m, x: Opaque()), X)
    assert not found.ok
    assert codes(found.of("error")) == {"QL111"}


def test_the_reason_why_batch_norm_stays_is_given():
    (found,) = qlab.validate(normed(between=nn.ReLU()), IMAGE).where("QL301")
    assert found.layer == "2"
    assert "'1' (ReLU) stands before it" in found.what
    without = nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32, track_running_stats=False))
    assert "no running statistics" in qlab.validate(without, IMAGE).where("QL301")[0].what


def test_the_range_before_a_softmax_is_that_of_the_example():
    logits = torch.tensor([[-3.0, 7.2, 0.0], [1.0, 2.0, 3.0]])
    (found,) = qlab.validate(nn.Sequential(nn.Identity(), nn.Softmax(-1)), logits).where("QL305")
    assert "from -3 to 7.2" in found.what  # (7.2 + 3) / 255 = 0.04, exp(0.04) = 1.0408
    assert "factor of 1.04" in found.what


def test_a_mask_before_a_softmax_is_no_value():
    mask = torch.tensor([0.0, -torch.inf, 0.0])
    (found,) = qlab.validate(Fn(lambda m, x: (x + m.mask).softmax(-1), mask=mask), X).where("QL305")
    assert f"from {float(X.min()):.3g} to {float(X.max()):.3g}" in found.what


def test_another_device_is_a_hint():
    model, seen = Fn(lambda m, x: m.fc(x)), Observed((), (), ())
    with FakeTensorMode():
        elsewhere = torch.empty(4, 3, device="cuda")
    (rule,) = (rule for rule in rules if rule.code == "QL115")
    (found,) = rule.apply(Subject(model, model, (elsewhere,), {}, X, seen))
    assert found.what == "the model is on cpu, the example on cuda:0"
    assert rule.apply(Subject(model, model, (X,), {}, X, seen)) == []


@torch.no_grad()
def test_folding_in_float_computes_the_same_function():
    from qlab.graph.folding import fold_in_float

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
    ).double()
    for norm in (model[1], model[3]):
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.normal_(), norm.bias.normal_()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    graph = qlab.capture(model, x)
    want = model.eval()(x)
    fold_in_float(graph)
    assert [layer.kind for layer in graph if layer.kind == "batch_norm"] == []
    assert torch.allclose(graph.run([x]), want, rtol=1e-12, atol=1e-12)
