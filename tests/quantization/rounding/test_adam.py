"""Adam against PyTorch's."""

import torch

from qlab.quantization.rounding import Adam


def test_its_steps_are_those_of_torch():
    target = torch.linspace(-2, 3, 20)
    mine, theirs = torch.zeros(20), torch.zeros(20, requires_grad=True)
    adam, optimizer = Adam(mine, rate=0.02), torch.optim.Adam([theirs], lr=0.02)
    for _ in range(150):
        adam.step(2 * (mine - target) * mine.cos())
        theirs.grad = (2 * (theirs - target) * theirs.cos()).detach()
        optimizer.step()
    torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-6)
    assert float((mine - target).abs().mean()) < 1  # it went somewhere
