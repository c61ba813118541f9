"""The devices of this machine: tests that take `device` run on each of them."""

import pytest
import torch


def present() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=present())
def device(request) -> torch.device:
    return torch.device(request.param)
