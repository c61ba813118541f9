"""One thread and fixed seeds for every test; browser tests need a Chromium and say so where there is none."""

import os
import shutil

import pytest
import torch

CHROMIUM_NAMES = ("chromium", "google-chrome", "chromium-browser")


def find_chromium() -> str | None:
    return next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    browser_tests = [item for item in items if item.get_closest_marker("browser")]
    if not browser_tests or find_chromium():
        return
    if os.environ.get("QLAB_BROWSER") == "require":
        raise pytest.UsageError(
            f"QLAB_BROWSER=require, but none of {', '.join(CHROMIUM_NAMES)} is on PATH: install one."
        )
    for item in browser_tests:
        item.add_marker(pytest.mark.skip(reason=f"no Chromium: none of {', '.join(CHROMIUM_NAMES)} is on PATH"))


@pytest.fixture(scope="session")
def chromium_path() -> str:
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium on PATH")
    return path
