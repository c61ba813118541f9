"""A prepared model computes what the model computes, with a name for every step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qlab
from qlab.errors import CaptureError, InputError
from tests.graph.models import MODELS, Attention, Branching, Functional, Recurrent, Shared, TwoInputs, residual


def same(a, b) -> bool:
    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(left) == len(right) and all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


@pytest.fixture(autouse=True)
def _plain_attention():
    torch.backends.mha.set_fastpath_enabled(False)  # the fused kernel's last bits differ from the code's
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_equals_the_model_bit_for_bit_at_another_batch_size_and_has_the_same_coverage(name):
    make, shape = MODELS[name]
    model, example, x = make().eval(), torch.randn(2, *shape), torch.randn(5, *shape)
    before = copy.deepcopy(model.state_dict())
    prepared = qlab.prepare(model, example)
    assert type(prepared(x)) is type(model(x))
    assert same(prepared(x), model(x))
    assert same(copy.deepcopy(prepared)(x), model(x))
    assert same(before, model.state_dict())
    columns = ["layer", "role", "grid", "bits", "weight_bits", "reason"]
    want = qlab.QuantSim(model, example).coverage()[columns].replace(r"@(\d)", r"_\1", regex=True)
    have = qlab.QuantSim(prepared, example).coverage()[columns]
    assert have.values.tolist() == want.values.tolist()


def test_steps_are_modules_and_reused_ones_are_split():
    prepared = qlab.prepare(residual(), torch.randn(2, 3, 12, 12))
    kinds = {name: type(module) for name, module in prepared.named_modules()}
    assert kinds["1.relu"] is kinds["1.relu_1"] is nn.ReLU
    assert prepared.get_submodule("1.relu") is not prepared.get_submodule("1.relu_1")
    functional = qlab.prepare(Functional(), torch.randn(2, 3, 6, 6))
    names = dict(functional.named_modules())
    assert isinstance(names["hardswish"], nn.Hardswish)
    assert isinstance(names["softmax"], nn.Softmax)
    assert {"add", "cat", "mul", "matmul", "einsum", "linear"} <= names.keys()
    assert torch.equal(names["cat"](torch.ones(1, 2), torch.zeros(1, 2)), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))


def test_the_parameters_keep_their_names():
    for model, example in ((residual(), torch.randn(2, 3, 12, 12)), (Recurrent(), torch.randn(2, 5, 6))):
        prepared = qlab.prepare(model, example)
        assert set(prepared.state_dict()) == set(model.state_dict())
        fresh = qlab.prepare(copy.deepcopy(model), example)
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.zero_()
        fresh.load_state_dict(prepared.state_dict())
        kept = fresh.state_dict()
        assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


def test_it_prints_one_line_a_step_with_what_the_step_takes():
    lines = str(qlab.prepare(residual(), torch.randn(2, 3, 12, 12))).splitlines()
    assert lines[0] == "Sequential, prepared: 12 steps, each a module"
    assert len(lines) == 13
    assert lines[7].split() == ["1.add", "from", "1.bn2,", "0", "Add()"]


def test_a_module_with_weights_called_twice_shares_them():
    model, tokens = Shared().eval(), torch.randint(0, 20, (2, 4))
    prepared = qlab.prepare(model, tokens)
    assert prepared.layer_1.weight is prepared.layer.weight
    assert prepared.layer_1 is not prepared.layer
    twin = copy.deepcopy(prepared)
    assert twin.layer_1.weight is twin.layer.weight
    assert twin.layer.weight is not prepared.layer.weight


def test_batch_norm_called_twice_gets_statistics_of_its_own():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.bn(x) * 3 + 1)

    prepared = qlab.prepare(Twice(), torch.randn(4, 3)).train()
    prepared(torch.randn(8, 3) + 5)
    assert prepared.bn_1.weight is prepared.bn.weight
    assert float(prepared.bn.running_mean.mean()) > float(prepared.bn_1.running_mean.mean()) + 0.1


class Dropping(nn.Module):
    """Dropout as a function, frozen by self.training, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.head = nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(F.relu(self.bn(self.fc(x))), 0.5, self.training))


def test_dropout_as_a_function_lives_again():
    prepared = qlab.prepare(Dropping().eval(), torch.randn(4, 3))
    x = torch.randn(8, 3)
    assert isinstance(prepared.dropout, nn.Dropout)
    assert prepared.dropout.p == 0.5
    assert torch.equal(prepared(x), prepared(x))
    prepared.train()
    assert not torch.equal(prepared(x), prepared(x))
    before = prepared.bn.running_mean.clone()
    prepared(x)
    assert not torch.equal(before, prepared.bn.running_mean)


def test_a_prepared_model_stands_in_eval_mode_and_trains_like_any_other():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)).train()
    prepared = qlab.prepare(model, torch.randn(4, 3))
    x, y = torch.randn(32, 3), torch.randn(32, 1)
    results = []
    for each in (model, prepared):
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            F.mse_loss(each(x), y).backward()
            optimizer.step()
        results.append(each(x))
    assert torch.equal(*results)


def test_validation_of_the_prepared_model_is_clean_of_what_was_mended():
    model, example = Dropping(), torch.randn(4, 3)
    assert {"QL203"} <= {finding.code for finding in qlab.validate(model, example)}
    left = {finding.code for finding in qlab.validate(qlab.prepare(model, example), example)}
    assert left <= {"QL306"}  # 16 channels: a hint about the architecture stays
    reused, x = residual(), torch.randn(2, 3, 12, 12)
    assert qlab.validate(reused, x).where("QL201")
    assert not qlab.validate(qlab.prepare(reused, x), x).where("QL201")


def test_findings_on_a_prepared_model_still_point_into_the_users_code():
    prepared = qlab.prepare(Functional(), torch.randn(2, 3, 6, 6))
    (found,) = qlab.validate(prepared, torch.randn(2, 3, 6, 6)).where("QL305")
    assert found.location.rpartition(":")[0].endswith("models.py")


def test_arguments_and_results_are_the_models():
    model = TwoInputs().eval()
    x, y = torch.randn(3, 4), torch.randn(3, 6)
    prepared = qlab.prepare(model, {"x": x, "y": y})
    with torch.no_grad():
        assert torch.equal(prepared(x=x, y=y), model(x, y))
        assert torch.equal(prepared(x, y), model(x, y))
    heads, shape = MODELS["heads"]
    found = qlab.prepare(heads().eval(), torch.randn(2, *shape))(torch.randn(3, *shape))
    assert found["found"].scores.shape == (3, 4)


class Between(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where((x > 0) & (x < 1), x, x * 2)


def test_functions_called_by_a_keyword_have_a_name_all_the_same():
    prepared, x = qlab.prepare(Between(), torch.randn(2, 3)), torch.randn(5, 3)
    assert torch.equal(prepared(x), Between()(x))
    assert "and_" in dict(prepared.named_modules())
    assert "and_" in qlab.QuantSim(prepared, torch.randn(2, 3)).graph


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.fc = nn.SiLU(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(self.fc(self.act(self.act(x))))


@torch.no_grad()
def test_silu_and_hardswish_become_the_layers_a_target_computes_them_by():
    model, x = Gates().eval(), torch.randn(5, 4)
    prepared = qlab.prepare(model, torch.randn(2, 4), decompose=("silu", "hardswish"))
    names = [name for name, module in prepared.named_modules() if not list(module.children())]
    wanted = ["act.sigmoid", "act.mul", "act_1.sigmoid", "act_1.mul", "fc", "hardswish.hardsigmoid", "hardswish.mul"]
    assert sorted(names) == sorted(wanted)
    assert torch.allclose(prepared(x), model(x), rtol=1e-6, atol=1e-6)
    sim = qlab.QuantSim(prepared, torch.randn(2, 4))
    assert sim["act.sigmoid"].output.spec.known_range == (0.0, 1.0)
    assert sim["act_1.mul"].role.value == "quantized"


class Attending(nn.Module):
    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask, self.q = mask, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
        if self.mask == "causal":
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)
        if self.mask == "bool":
            return F.scaled_dot_product_attention(q, q, q, attn_mask=x[:, None, None, :, 0] > -1)
        if self.mask == "float":
            return F.scaled_dot_product_attention(q, q, q, attn_mask=x[:, None, None, :, 0], scale=0.3)
        return F.scaled_dot_product_attention(q, q, q)


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
@torch.no_grad()
def test_attention_becomes_scores_softmax_and_product(mask):
    model, x = Attending(mask).double().eval(), torch.randn(3, 5, 8).double()
    prepared = qlab.prepare(model, torch.randn(2, 5, 8).double(), decompose="attention")
    assert torch.allclose(prepared(x), model(x), rtol=1e-12, atol=1e-12)
    sim = qlab.QuantSim(prepared, torch.randn(2, 5, 8).double())
    assert {"matmul", "softmax"} <= {layer.kind for layer in sim.graph}
    assert "attention" not in {layer.kind for layer in sim.graph}
    assert not qlab.validate(prepared, torch.randn(2, 5, 8).double()).where("QL403")


def test_attention_of_torch_is_decomposed_inside_its_module():
    prepared = qlab.prepare(Attention(), torch.randn(2, 5, 8), decompose="attention")
    assert "attention.scaled_dot_product_attention.softmax" in dict(prepared.named_modules())


def test_what_cannot_be_captured_or_decomposed_is_refused():
    with pytest.raises(CaptureError, match=r"torch\.where"):
        qlab.prepare(Branching(), torch.randn(2, 3))
    with pytest.raises(InputError, match=r"decompose takes silu, hardswish, attention; got 'gelu'"):
        qlab.prepare(residual(), torch.randn(2, 3, 12, 12), decompose=("gelu",))
