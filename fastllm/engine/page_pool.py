"""Which pages of the KV cache are in use, by how many, and what the unused ones still hold.

A page is in use, blank, or kept: kept pages have no user but a name, which says what they hold, and
who wants that content takes them as they are. Blank pages go first, then the kept ones, in the
order in which they were left.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PagePool:
    """Page numbers from 0 to `num_pages` - 1, their users and names. It touches no memory.

    most_kept: of the pages without a user; so that on a CPU, where a page takes memory once it has
    been written, a cache does not fill its whole reserve with what was asked for long ago.
    """

    def __init__(self, num_pages: int, most_kept: int | None = None) -> None:
        self.num_pages = num_pages
        self.most_kept = num_pages if most_kept is None else most_kept
        self._blank = list(range(num_pages - 1, -1, -1))  # a stack: last used, warmest
        self._kept: OrderedDict[int, None] = OrderedDict()  # the one left longest ago first
        self._users = [0] * num_pages
        self._names: list[list[bytes]] = [[] for _ in range(num_pages)]
        self._page_of: dict[bytes, int] = {}

    @property
    def free_pages(self) -> int:
        """How many pages nobody uses, kept ones included."""
        return len(self._blank) + len(self._kept)

    @property
    def kept_pages(self) -> int:
        """How many pages nobody uses that still hold what their name says."""
        return len(self._kept)

    def users(self, page: int) -> int:
        """How many use a page."""
        return self._users[page]

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages. Raises RuntimeError if there are fewer: ask `free_pages` first."""
        if count > self.free_pages:
            raise RuntimeError(
                f"{count} pages of KV cache are needed, {self.free_pages} of {self.num_pages} are "
                "free: wait until the generations in progress end"
            )
        pages = [self._blank.pop() if self._blank else self._drop_oldest() for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Count one more user of each page; kept ones come into use again."""
        for page in pages:
            if self._users[page] == 0:
                del self._kept[page]
            self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back; a page is free when its last user has.

        The last of them are left first, so that of a prefix the end is lost before its beginning.
        """
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if not self._names[page]:
                self._blank.append(page)
                continue
            self._kept[page] = None
            if len(self._kept) > self.most_kept:
                self._blank.append(self._drop_oldest())

    def _drop_oldest(self) -> int:
        page, _ = self._kept.popitem(last=False)
        self.unname(page)
        return page

    # Names

    def name(self, page: int, name: bytes) -> bool:
        """Say what a page in use holds; False if another page has this name: it keeps it."""
        if name in self._page_of:
            return False
        self._page_of[name] = page
        self._names[page].append(name)
        return True

    def find(self, name: bytes) -> int | None:
        """The page that has this name."""
        return self._page_of.get(name)

    def unname(self, page: int, but: bytes | None = None) -> None:
        """Forget a page's names, all or all but one; the page has a user, or is about to."""
        for name in self._names[page]:
            if name != but:
                del self._page_of[name]
        self._names[page] = [name for name in self._names[page] if name == but]

    def forget(self) -> None:
        """Forget every name: kept pages are blank then."""
        for page in self._page_of.values():
            self._names[page].clear()
        self._page_of.clear()
        self._blank += reversed(self._kept)
        self._kept.clear()
