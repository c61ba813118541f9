"""Capture reproduces the model bit for bit, under the user's names, and says why where it cannot."""

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from qlab.errors import CaptureError, InputError, UnknownLayer
from qlab.graph import capture
from tests.graph.models import MODELS, Attention, Branching, Shared, TwoInputs, residual


def same(a, b) -> bool:
    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(left) == len(right) and all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_equals_the_model_at_another_batch_size(name):
    make, shape = MODELS[name]
    model = make().eval()
    before = copy.deepcopy(model.state_dict())
    graph = capture(model, torch.randn(2, *shape))
    x = torch.randn(5, *shape)
    torch.backends.mha.set_fastpath_enabled(False)  # the fused kernel's last bits differ from the code's
    try:
        with torch.no_grad():
            want, have = model(x), graph.run(graph.bind((x,), {}))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert type(want) is type(have)
    assert same(want, have)
    assert same(before, model.state_dict())


def test_module_calls_come_back_under_the_users_names():
    graph = capture(residual().eval(), torch.randn(2, 3, 12, 12))
    names = [layer.name for layer in graph]
    assert names == [
        "input", "0", "1.conv1", "1.bn1", "1.relu", "1.conv2", "1.bn2", "1.add", "1.relu@1", "2", "3", "4", "5",
    ]  # fmt: skip
    assert graph["1.conv1"].module is graph.root[1].conv1
    assert [user.name for user in graph["0"].users] == ["1.conv1", "1.add"]
    assert graph["1.add"].location.split(":")[0].endswith("models.py")


def test_the_users_model_is_not_touched_and_inplace_activations_do_not_overwrite():
    model = residual().train()
    graph = capture(model, torch.randn(2, 3, 12, 12))
    assert model.training
    assert model[1].relu.inplace is True
    assert graph["1.relu"].module.inplace is False


def test_a_module_called_twice_is_one_module_in_two_layers_and_ties_stay_tied():
    model = Shared().eval()
    tokens = torch.randint(0, 20, (3, 4))
    graph = capture(model, tokens)
    assert graph["layer"].module is graph["layer@1"].module
    assert graph.root.head.weight is graph.root.embedding.weight
    with torch.no_grad():
        assert torch.equal(graph.run(graph.bind((tokens,), {})), model(tokens))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_an_example_of_any_batch_size_gives_a_free_batch(batch):
    graph = capture(residual().eval(), torch.randn(batch, 3, 12, 12))
    assert graph.input_layers[0].shape == (None, 3, 12, 12)


def test_a_labelled_batch_is_taken_without_its_label():
    graph = capture(residual().eval(), [torch.randn(4, 3, 12, 12), torch.zeros(4, dtype=torch.long)])
    assert [layer.name for layer in graph.input_layers] == ["input"]


def test_inputs_by_position_and_by_name_are_the_same():
    model = TwoInputs().eval()
    x, y, scale = torch.randn(3, 4), torch.randn(3, 6), torch.randn(3, 4)
    with torch.no_grad():
        want = model(x, y)
        for example in ((x, y), {"x": x, "y": y}):
            graph = capture(model, example)
            for args, kwargs in (((x, y), {}), ((x,), {"y": y}), ((), {"y": y, "x": x})):
                assert torch.equal(graph.run(graph.bind(args, kwargs)), want)
        graph = capture(model, (x, y, scale))
        assert torch.equal(graph.run(graph.bind((x, y, scale), {})), model(x, y, scale))
        with pytest.raises(InputError, match="captured with inputs"):
            graph.bind((x, y), {})


def test_a_wrong_size_is_a_sentence_and_dynamic_axes_free_it():
    graph = capture(nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 12, 12))
    with pytest.raises(InputError, match=r"must have shape \['any', 3, 12, 12\]; got \[2, 3, 20, 12\].*dynamic=\(2,\)"):
        graph.bind((torch.randn(2, 3, 20, 12),), {})
    free = capture(nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 12, 12), dynamic=(2, 3))
    assert free.run(free.bind((torch.randn(2, 3, 20, 16),), {})).shape == (2, 4, 18, 14)


def test_a_branch_on_data_names_file_line_and_remedy():
    with pytest.raises(CaptureError, match=r"models\.py:\d+ \(if x\.sum\(\) > 0:\).*torch\.where"):
        capture(Branching(), torch.randn(2, 3))


def test_a_fixed_batch_size_says_so():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(4, -1)

    with pytest.raises(CaptureError, match="must stay free"):
        capture(Fixed(), torch.randn(4, 3))


def test_a_model_that_draws_random_numbers_is_refused_by_name():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x + torch.rand_like(x))

    with pytest.raises(CaptureError, match="'fc'"):
        capture(Noisy(), torch.randn(4, 3))


def test_what_is_not_a_module_is_refused():
    with pytest.raises(CaptureError, match=r"torch\.nn\.Module; got function"):
        capture(lambda x: x, torch.randn(2, 3))


def test_dropout_and_batch_norm_train_in_the_captured_graph():
    graph = capture(Attention().eval(), torch.randn(2, 5, 8))
    graph.root.train()
    x = torch.randn(4, 5, 8)
    assert not torch.equal(graph.run([x]), graph.run([x]))
    normed = capture(residual().eval(), torch.randn(2, 3, 12, 12))
    before = normed.root[1].bn1.running_mean.clone()
    normed.root.train()
    normed.run([torch.randn(4, 3, 12, 12)])
    assert not torch.equal(before, normed.root[1].bn1.running_mean)


def test_a_deep_copy_is_independent():
    graph = capture(residual().eval(), torch.randn(2, 3, 12, 12))
    twin = copy.deepcopy(graph)
    with torch.no_grad():
        twin.root[0].weight.zero_()
    assert twin["0"].module is twin.root[0]
    assert bool(graph.root[0].weight.any())


def test_an_unknown_layer_names_the_nearest():
    graph = capture(residual().eval(), torch.randn(2, 3, 12, 12))
    with pytest.raises(UnknownLayer, match=r"Did you mean '1\.conv2' or '1\.conv1'"):
        graph["1.conv"]


def test_replacing_a_module_is_recorded_and_computes_the_new_function():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6()).eval()
    graph = capture(model, torch.randn(2, 3, 4, 4))
    x = torch.randn(2, 3, 4, 4) * 50
    graph.replace_module("1", "relu")
    with torch.no_grad():
        assert torch.equal(graph.run([x]), torch.relu(model[0](x)))
    assert graph.edits == [("1", "relu")]
    assert graph["1"].kind == "relu"


class Plain(nn.Module):
    """A linear layer behind any signature."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Linear, "Pass an instance"),
        (torch.jit.script(nn.Linear(3, 3)), "TorchScript"),
        (nn.Sequential(nn.LazyLinear(3)), r"'0\.weight' has no shape yet.*Run model\(example\) once"),
        (nn.Sequential(nn.Linear(3, 3)).to("meta"), r"'0\.weight' is on the meta device"),
    ],
)
def test_a_model_without_code_or_weights_is_refused_in_one_sentence(model, says):
    with pytest.raises(CaptureError, match=says):
        capture(model, torch.randn(2, 3))


@pytest.mark.parametrize(
    ("example", "says"),
    [
        (torch.randn(2, 3).numpy(), r"no tensor with a batch axis \(it holds ndarray\)"),
        (torch.randn(0, 3), r"no sample: a tensor of shape \[0, 3\]"),
        (torch.randn(2, 3, device="meta"), "on the meta device"),
    ],
)
def test_an_example_without_data_is_refused_in_one_sentence(example, says):
    with pytest.raises(CaptureError, match=says):
        capture(nn.Sequential(nn.Linear(3, 3)), example)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers_are_taken_off(wrap):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval()
    graph = capture(wrap(model), torch.randn(2, 3))
    assert [layer.name for layer in graph] == ["input", "0", "1"]


def test_a_forward_that_raises_keeps_its_own_error_and_traceback():
    class Raises(Plain):
        def forward(self, x):
            return self.fc(x).view(7, 7)

    with pytest.raises(RuntimeError, match="invalid for input of size 6") as caught:
        capture(Raises(), torch.randn(2, 3))
    assert "return self.fc(x).view(7, 7)" in str(caught.traceback[-1].statement)
    assert "Raises(float32[2, 3])" in caught.value.__notes__[0]


def test_any_number_of_arguments_and_keywords_is_captured():
    class Collects(Plain):
        def forward(self, first, *rest, **named):
            return self.fc(first + sum(rest)) + sum(named.values())

    model = Collects().eval()
    x, y, z = torch.randn(3, 2, 3)
    graph = capture(model, (x, y, z))
    assert same(graph.run(graph.bind((y, y, x), {})), model(y, y, x))

    class Keywords(Plain):
        def forward(self, **named):
            return self.fc(named["a"]) + named["b"]

    model = Keywords().eval()
    graph = capture(model, {"a": x, "b": y})
    a = torch.randn(5, 3)
    assert same(graph.run(graph.bind((), {"b": a, "a": 2 * a})), model(a=2 * a, b=a))


def test_a_number_among_the_inputs_stays_what_it_was_and_another_is_refused():
    class Scaled(Plain):
        def forward(self, x, factor):
            return self.fc(x) * factor

    graph = capture(Scaled(), (torch.randn(2, 3), 2.0))
    graph.bind((torch.randn(5, 3), 2.0), {})
    with pytest.raises(InputError, match=r"'factor' was captured as 2\.0 and stays so; got 3\.0"):
        graph.bind((torch.randn(5, 3), 3.0), {})


def test_a_batch_along_another_axis_is_named_by_dynamic():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(4, 4)  # its length is fixed by export

        def forward(self, x):
            return self.gru(x)[0]

    model = TimeFirst().eval()
    with pytest.raises(CaptureError, match=r"dynamic=\(1,\)"):
        capture(model, torch.randn(3, 2, 4))
    graph = capture(model, torch.randn(3, 2, 4), dynamic=(1,))
    x = torch.randn(3, 7, 4)
    assert same(graph.run(graph.bind((x,), {})), model(x))
    with pytest.raises(InputError, match=r"must have shape \[3, 'any', 4\]"):
        graph.bind((torch.randn(5, 7, 4),), {})


def test_an_input_that_has_the_batchs_size_by_chance_stays_fixed():
    class Mixes(Plain):
        def forward(self, x, matrix):
            return self.fc(x @ matrix.view(3, 3))

    model = Mixes().eval()
    matrix = torch.randn(3, 3)
    graph = capture(model, (torch.randn(3, 3), matrix))
    x = torch.randn(6, 3)
    assert same(graph.run(graph.bind((x, matrix), {})), model(x, matrix))


def test_results_that_hold_no_tensor_to_see_are_left_out_and_named():
    class Cache:
        def __init__(self, value):
            self.value = value

    class Model(Plain):
        def forward(self, x):
            y = self.fc(x)
            return {"y": y, "cache": Cache(y)}

    model = Model().eval()
    graph = capture(model, torch.randn(2, 3))
    assert graph.left_out == ("Cache",)
    x = torch.randn(4, 3)
    result = graph.run(graph.bind((x,), {}))
    assert result["cache"] is None
    assert same(result["y"], model(x)["y"])
    assert "forward" not in graph.root.__dict__

    class Only(Plain):
        def forward(self, x):
            return Cache(self.fc(x))

    with pytest.raises(CaptureError, match="returns Cache, in which no tensor"):
        capture(Only(), torch.randn(2, 3))


def test_inputs_that_the_model_overwrites_are_left_as_they_are():
    class Writes(Plain):
        def forward(self, x):
            x.mul_(2).add_(1)
            return self.fc(x)

    model = Writes().eval()
    x = torch.randn(4, 3)
    given = x.clone()
    graph = capture(model, torch.randn(2, 3))
    result = graph.run(graph.bind((x,), {}))
    assert same(x, given)
    assert same(result, model(given))
