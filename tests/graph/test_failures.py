"""What keeps a model from being captured is listed whole, each place with the user's file and line."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

import qlab


class Scripted(nn.Module):
    """A module whose forward is given as a function."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def two_branches(model, x):
    if x.sum() > 0:
        x = x + 1
    x = model.fc(x)
    if x.mean() > 3:
        x = x * 2
    return x


def branch_and_size(model, x):
    if x.sum() > 0:
        x = x + 1
    return model.fc(x).view(4, 3)


def uses_numpy(model, x):
    return model.fc(torch.from_numpy(np.sqrt(x.detach().numpy() ** 2)))


def draws(model, x):
    return model.fc(x + torch.rand_like(x))


def raises(model, x):
    return model.fc(x).view(7, 7)


def plain(model, x):
    return model.fc(x)


def line_of(function, code: str) -> str:
    lines, first = inspect.getsourcelines(function)
    number = next(number for number, line in enumerate(lines, first) if code in line)
    return f"{__file__}:{number}"


def errors_of(model, example):
    return [(finding.code, finding.location) for finding in qlab.validate(model, example).of("error")]


def test_every_branch_is_listed_and_not_the_first_alone():
    found = errors_of(Scripted(two_branches), torch.randn(4, 3))
    assert found == [
        ("QL104", line_of(two_branches, "if x.sum() > 0")),
        ("QL104", line_of(two_branches, "if x.mean() > 3")),
    ]


def test_a_branch_and_a_fixed_size_are_told_apart():
    found = errors_of(Scripted(branch_and_size), torch.randn(4, 3))
    assert ("QL104", line_of(branch_and_size, "if x.sum() > 0")) in found
    assert ("QL105", line_of(branch_and_size, "view(4, 3)")) in found


@pytest.mark.parametrize(
    ("forward", "code", "line"),
    [(uses_numpy, "QL107", "np.sqrt"), (raises, "QL103", "view(7, 7)"), (draws, "QL108", None)],
)
def test_other_failures_have_their_own_code(forward, code, line):
    found = errors_of(Scripted(forward), torch.randn(4, 3))
    assert [c for c, _ in found] == [code]
    assert line is None or found[0][1] == line_of(forward, line)


def test_a_custom_operator_without_a_fake_kernel_is_named():
    @torch.library.custom_op("qlab_tests::opaque", mutates_args=())
    def opaque(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    finding = qlab.validate(Scripted(lambda model, x: model.fc(opaque(x))), torch.randn(4, 3)).of("error")[0]
    assert finding.code == "QL106"
    assert "qlab_tests" in finding.what
    opaque.register_fake(torch.empty_like)
    assert qlab.validate(Scripted(lambda model, x: model.fc(opaque(x))), torch.randn(4, 3)).ok


def test_a_model_that_can_be_captured_has_no_error():
    assert errors_of(Scripted(plain), torch.randn(4, 3)) == []


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda x: x, "got function"),
        (nn.Linear, "Pass an instance"),
        (torch.jit.script(nn.Linear(3, 3)), "TorchScript"),
        (nn.Sequential(nn.LazyLinear(3)), r"Run model\(example\) once"),
        (nn.Sequential(nn.Linear(3, 3)).to("meta"), "meta device"),
    ],
    ids=["function", "class", "scripted", "lazy", "meta"],
)
def test_what_is_no_model_with_weights_is_one_finding(model, says):
    (finding,) = qlab.validate(model, torch.randn(2, 3))
    assert finding.code == "QL101"
    assert qlab.validate(nn.Linear(3, 3), torch.randn(2, 3)).where("QL101").ok
    with pytest.raises(qlab.errors.CaptureError, match=says):
        qlab.QuantSim(model, torch.randn(2, 3))
    assert finding.what in str(_error(model))


def _error(model) -> Exception:
    try:
        qlab.capture(model, torch.randn(2, 3))
    except qlab.errors.CaptureError as error:
        return error
    raise AssertionError("captured")


@pytest.mark.parametrize("example", [np.ones((2, 3)), torch.ones(0, 3), torch.ones(2, 3, device="meta"), None], ids=str)
def test_an_example_without_data_is_one_finding(example):
    (finding,) = qlab.validate(nn.Sequential(nn.Linear(3, 3)), example)
    assert finding.code == "QL102"


def test_wrappers_are_taken_off_and_said_so():
    model = nn.Sequential(nn.Linear(3, 3))
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        found = qlab.validate(wrapped, torch.randn(2, 3))
        assert found.ok
        assert [finding.code for finding in found.where("QL114")] == ["QL114"]
    assert not qlab.validate(model, torch.randn(2, 3)).where("QL114")


def test_a_module_called_by_a_keyword_is_told_to_be_renamed():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"in": nn.Linear(3, 3)})

        def forward(self, x):
            return self.parts["in"](x)

    (finding,) = qlab.validate(Keyword(), torch.randn(2, 3)).of("error")
    assert finding.code == "QL107"
    assert "'in'; rename it" in finding.what


def test_a_model_in_distributed_data_parallel_is_taken_out(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(3, 32)))
        found = qlab.validate(model, torch.randn(2, 3))
        assert [finding.code for finding in found] == ["QL114"]
        assert [layer.name for layer in qlab.capture(model, torch.randn(2, 3))] == ["input", "0"]
    finally:
        dist.destroy_process_group()
