"""The tabs of a dashboard: a view says in its own file that it wants to be one, and `qlab.views` imports it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from qlab.lab import Lab
from qlab.views.view import View

Factory = TypeVar("Factory", bound=Callable[[Lab], View])


@dataclass(frozen=True)
class Tab:
    """One tab. place: smaller stands further left. is_offered: whether a lab's dashboard has it."""

    title: str
    factory: Callable[[Lab], View]
    place: float
    is_offered: Callable[[Lab], bool]


TABS: dict[str, Tab] = {}
"""Every tab by title; one registered again replaces the earlier one."""


def tab(
    title: str, *, place: float, is_offered: Callable[[Lab], bool] = lambda _: True
) -> Callable[[Factory], Factory]:
    """Makes a view, or a function from a Lab to a view, a tab of every dashboard made later.

    The view is built when its tab is first opened. In a notebook: `qlab.views.tab("Mine", place=90)(MyView)`.
    """

    def register(factory: Factory) -> Factory:
        TABS[title] = Tab(title, factory, place, is_offered)
        return factory

    return register


def tabs_of(lab: Lab) -> list[Tab]:
    """The tabs that a lab's dashboard has, from left to right."""
    return sorted((one for one in TABS.values() if one.is_offered(lab)), key=lambda one: one.place)
