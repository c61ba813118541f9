"""Moments against the values themselves: errors of outputs as the layers' own functions compute them."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qlab
from qlab.analysis.moment_store import InputKeys, MomentStore
from qlab.analysis.moments import MomentSums, collect_moments
from qlab.errors import InputError
from qlab.graph import linear_form
from tests.analysis.small import branches, calibrated, data

KINDS = {
    "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 7, 7)),
    "same padding, dilated": (nn.Conv1d(4, 6, 2, padding="same", dilation=2), (4, 9)),
    "reflecting": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 6, 6)),
    "grouped": (nn.Conv2d(4, 6, (1, 3), groups=2), (4, 5, 6)),
    "volume": (nn.Conv3d(2, 3, 2), (2, 3, 4, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (4, 4, 4)),
    "transposed, grouped": (nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2), (4, 6)),
    "linear": (nn.Linear(5, 3), (5,)),
    "linear over tokens": (nn.Linear(5, 3), (4, 5)),
}


def noisy(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(7))


def outputs(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What the module computes with another weight and no bias, in float64, flattened to [n, outputs]."""
    twin = copy.deepcopy(module).double()
    twin.weight.data, twin.bias.data = weight.double(), torch.zeros_like(twin.bias)
    y = twin(x.double())
    return (y if isinstance(module, nn.Linear) else y.movedim(1, -1)).reshape(-1, twin.bias.numel())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_error_of_any_weight_is_the_reconstruction_error_of_the_layer(kind):
    module, size = KINDS[kind]
    x = torch.randn(6, *size)
    as_function = kind in ("grouped", "transposed, grouped", "linear over tokens")  # a model that is one layer has none
    sim = qlab.QuantSim(module if as_function else nn.Sequential(module), x)
    layer = next(layer for layer in sim.graph if layer.weight_source is not None)
    assert (layer.module is None) == as_function
    form = linear_form(layer)
    assert form is not None
    sums = MomentSums(layer, batches=2)
    for part in x.split(3):
        sums.add(form.rows(part), form.rows(noisy(part)))
    moments = sums.moments()
    assert moments is not None
    weight = module.weight + 0.1 * torch.randn(module.weight.shape)
    xh = torch.cat([noisy(part) for part in x.split(3)])
    exact, other = outputs(module, module.weight, x), outputs(module, weight, xh)
    assert moments.rows == len(exact)
    error = moments.error(form.matrix(weight)).flatten()
    torch.testing.assert_close(error, (exact - other).square().mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.energy.flatten().double(), exact.square().mean(0), rtol=1e-4, atol=1e-6)
    mean = (form.matrix(module.weight) @ moments.mean_float[..., None]).flatten()
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=1e-3, atol=1e-5)
    back = form.weight(form.matrix(weight), weight.shape)
    assert torch.equal(back, weight)


@torch.no_grad()
def test_collected_moments_are_those_of_both_models_and_nothing_is_changed():
    sim, batches = calibrated(), [x for x, _ in data()]
    before = {name: value.clone() for name, value in sim.state_dict().items()}
    found = collect_moments(sim, batches)
    assert set(found) == {"stem.0", "depthwise.0", "left", "right", "head"}
    assert all(torch.equal(value, before[name]) for name, value in sim.state_dict().items())
    model, x = branches(), torch.cat(batches)
    rounded = functional.conv2d(sim["x"].output(x), sim["stem.0"].weight.quantized(), padding=1)
    rounded = sim["stem.2"].output(sim.model.stem[1](rounded).relu())
    moments, form = found["depthwise.0"], linear_form(sim.graph["depthwise.0"])
    assert form is not None
    rows, rows_rounded = form.rows(model.stem(x)), form.rows(rounded)
    gram = rows_rounded.transpose(1, 2) @ rows_rounded / rows.shape[1]
    torch.testing.assert_close(moments.gram, gram, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.mean_float, rows.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.mean_quantized, rows_rounded.mean(1), rtol=1e-4, atol=1e-5)
    exact_only = collect_moments(sim, batches, ["depthwise.0"], quantized=False)["depthwise.0"]
    assert torch.equal(exact_only.mean_float, exact_only.mean_quantized)
    torch.testing.assert_close(exact_only.mean_float, found["depthwise.0"].mean_float)


def test_a_memory_bound_reads_the_data_more_often_and_finds_the_same():
    sim, batches, reads = calibrated(), [x for x, _ in data()], []

    class Counted:
        def __iter__(self):
            reads.append(1)
            return iter(batches)

    whole = collect_moments(sim, batches)
    parted = collect_moments(sim, Counted(), max_bytes=1)
    assert len(reads) >= 5  # a pass for each of the five layers
    assert list(parted) == list(whole)
    assert all(torch.equal(parted[name].gram, whole[name].gram) for name in whole)


def test_rows_are_sampled_by_seed_when_there_are_more_than_asked_for():
    sim, batches = calibrated(), [x for x, _ in data(batches=4, size=40)]
    whole = collect_moments(sim, batches, ["left"])["left"]
    assert whole.rows == whole.seen == 155 * 64
    part = collect_moments(sim, batches, ["left"], max_rows=2000)["left"]
    assert part.rows == 2000
    assert part.seen == whole.seen
    assert not torch.equal(part.gram, whole.gram)
    torch.testing.assert_close(part.gram, whole.gram, rtol=0.2, atol=0.1 * float(whole.gram.abs().max()))
    again, other = (collect_moments(sim, batches, ["left"], max_rows=2000, seed=seed)["left"] for seed in (0, 1))
    assert torch.equal(part.gram, again.gram)
    assert not torch.equal(part.gram, other.gram)


def test_what_has_no_moments_is_left_out_or_said():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, codes: Tensor) -> Tensor:
            return self.head(self.table(codes))

    sim = qlab.QuantSim(Odd(), torch.randint(7, (3, 5)))
    assert list(collect_moments(sim, [torch.randint(7, (3, 5))])) == ["head"]
    with pytest.raises(InputError, match="'table'"):
        MomentSums(sim.graph["table"], 1)
    with pytest.raises(InputError, match="at least one batch"):
        collect_moments(sim, [])


def test_kept_moments_are_found_only_for_the_weights_and_inputs_that_they_belong_to():
    sim, batches = calibrated(), [x for x, _ in data()]
    moments = collect_moments(sim, batches, ["left", "right"])
    store = MomentStore.of(sim)
    assert store is MomentStore.of(sim)
    assert store.keep("left", "key", "inputs", moments["left"], max_bytes=1 << 20)
    assert store.find("left", "key") is moments["left"]
    assert store.find("left", "other") is None
    assert store.find("right", "key") is None
    assert store.are_of("left", "inputs")
    assert not store.are_of("left", "others")
    assert not store.are_of("right", "inputs")
    assert store.bytes == moments["left"].bytes
    assert not store.keep("right", "key", "inputs", moments["right"], max_bytes=store.bytes)
    assert len(store) == 1
    assert MomentStore.of(copy.deepcopy(sim)).find("left", "key") is moments["left"]


def test_the_key_of_an_input_holds_roundings_and_bits_before_it_and_no_ranges():
    sim, batches = calibrated(), [x for x, _ in data()]
    source = sim.graph["left"].args[0]

    def key(change=lambda sim: None) -> str:
        twin = copy.deepcopy(sim)
        change(twin)
        return InputKeys(twin).of(twin.graph[source.name])

    assert key() == key()
    assert key(lambda sim: sim.calibrate([2 * x for x in batches])) == key()
    assert key(lambda sim: sim.configure("left", weight={"bits": 3})) == key()  # it comes after
    assert key(lambda sim: sim.configure("stem.0", weight={"bits": 3})) != key()
    assert key(lambda sim: sim.configure("stem.2", output={"bits": 3})) != key()
    lazily = InputKeys(sim)
    early = lazily.of(sim.graph["x"])
    sim["stem.0"].weight.bits = 3  # before it is asked for what follows
    assert lazily.of(sim.graph["x"]) == early
    assert lazily.of(source) == InputKeys(sim).of(source)


def test_with_equal_inputs_the_error_is_that_of_the_weight_alone():
    sim, batches = calibrated(), [x for x, _ in data()]
    moments = collect_moments(sim, batches, ["head"])["head"]
    weight = sim.model.head.weight.detach()
    other = weight + 0.1 * torch.randn(weight.shape)
    equal = moments.of_equal_inputs(weight[None])
    assert float(equal.error(weight[None]).max()) < 1e-5 * float(equal.energy.max())
    gram = moments.gram[0].double()
    wanted = torch.stack([e @ gram @ e for e in (other - weight).double()])
    torch.testing.assert_close(equal.error(other[None])[0], wanted, rtol=1e-3, atol=1e-6)
    assert torch.equal(equal.mean_float, moments.mean_quantized)
