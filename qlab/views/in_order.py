"""Messages from the browser, put back into the order in which they were sent.

A kernel may handle messages of a widget out of order when they come close together while a cell starts or awaits
(seen with ipykernel 7.4: 4, 1, 6 typed, 1, 6, 4 received). For edits and selections the last one must win.
"""

from typing import Any

Message = dict[str, Any]


class InOrder:
    """Hands out each browser's messages by their turn, `(browser, number)`, numbered from 0.

    >>> queue = InOrder()
    >>> queue.arrived("tab", 1, {"value": 6})
    []
    >>> queue.arrived("tab", 0, {"value": 4})
    [{'value': 4}, {'value': 6}]
    """

    def __init__(self) -> None:
        self._next: dict[str, int] = {}
        self._early: dict[tuple[str, int], Message] = {}

    @property
    def is_waiting(self) -> bool:
        return bool(self._early)

    def arrived(self, browser: str, number: int, message: Message) -> list[Message]:
        """The messages whose turn it is now: none while an earlier one is missing."""
        self._early[browser, number] = message
        due = []
        turn = self._next.get(browser, 0)
        while (browser, turn) in self._early:
            due.append(self._early.pop((browser, turn)))
            turn += 1
        self._next[browser] = max(turn, self._next.get(browser, 0))
        return due

    def give_up(self) -> list[Message]:
        """All that still wait: what they wait for was lost, perhaps with a connection."""
        due = [self._early[turn] for turn in sorted(self._early)]
        for browser, number in self._early:
            self._next[browser] = max(self._next[browser], number + 1)
        self._early.clear()
        return due
