"""Pages of keys and values, which the sequences of an engine share until one of them writes.

A sequence's block tables say which page holds which positions. Kernels read the tables, and append to a sequence's last
page; everything else about them happens here, in time that does not depend on how much a page holds.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rlxc.artifact.kv import KEY_TILE, KvLayer, KvPlan, PageLayout
from rlxc.dtypes import DType
from rlxc.runtime.engines import KvRows
from rlxc.runtime.engines.memory import private_memory

Bytes = npt.NDArray[np.int8]

_SLAB_BYTES = 4 << 20  # a few thousand mappings are as many as some systems allow
_SPARE_BYTES = 32 << 20  # a sequence after another need not wait for the system to clear memory again
_STORED: dict[DType, np.dtype[Any]] = {
    DType.F32: np.dtype(np.float32),
    DType.F16: np.dtype(np.float16),
    DType.BF16: np.dtype(np.uint16),
    DType.INT8: np.dtype(np.int8),
}


class _Slab:
    """Memory that pages are cut from, and the numbers of those that nobody has."""

    def __init__(self, size: int, pages: int) -> None:
        self.memory = private_memory(size * pages, large_pages=True)
        self.address: int = self.memory.ctypes.data
        self.pages = pages
        self.free = list(range(pages))


class Page:
    """A page that is in use: it returns to its pool when nobody refers to it any more.

    Attributes:
        address: where it begins.
        memory: its bytes.
    """

    __slots__ = ("_number", "_pool", "_slab", "address", "memory")

    def __init__(self, pool: PagePool, slab: _Slab, number: int) -> None:
        self._pool, self._slab, self._number = pool, slab, number
        begin, size = number * pool.layout.nbytes, pool.layout.nbytes
        self.address = slab.address + begin
        self.memory: Bytes = slab.memory[begin : begin + size]

    def __del__(self) -> None:
        self._pool.give_back(self._slab, self._number)


class PagePool:
    """Hands out the pages of one block table of a model; they begin at multiples of 64 bytes.

    Pages are cut from larger pieces of memory. Of those that hold no page in use, a few stay, and the others go back to
    the system. A page that is handed out holds what its last owner left in it.
    """

    def __init__(self, layout: PageLayout, slab_bytes: int = _SLAB_BYTES) -> None:
        self.layout = layout
        self._pages_per_slab = max(1, slab_bytes // layout.nbytes)
        self._most_spare = max(1, _SPARE_BYTES // (self._pages_per_slab * layout.nbytes))
        # Those in use that have pages left: taking from the oldest lets the others empty.
        self._open: dict[_Slab, None] = {}
        self._spare: list[_Slab] = []
        self._returned: deque[tuple[_Slab, int]] = deque()
        self._lock = threading.Lock()

    def take(self) -> Page:
        """A page that nobody else has.

        Raises:
            MemoryError: there is none.
        """
        with self._lock:
            slab = next(iter(self._open), None)
            if slab is None:
                slab = self._spare.pop() if self._spare else _Slab(self.layout.nbytes, self._pages_per_slab)
                self._open[slab] = None
            number = slab.free.pop()
            if not slab.free:
                del self._open[slab]
        self._settle()
        return Page(self, slab, number)

    def give_back(self, slab: _Slab, number: int) -> None:
        """Take a page back, from any thread and at any moment: this one may be taking another right now."""
        self._returned.append((slab, number))
        self._settle()

    def _settle(self) -> None:
        # Whoever has the lock comes here after he has let go of it: nothing that was returned meanwhile is forgotten.
        while self._returned and self._lock.acquire(blocking=False):
            try:
                while self._returned:
                    self._put_back(*self._returned.popleft())
            finally:
                self._lock.release()

    def _put_back(self, slab: _Slab, number: int) -> None:
        slab.free.append(number)
        self._open[slab] = None
        if len(slab.free) == slab.pages:
            del self._open[slab]
            if len(self._spare) < self._most_spare:
                self._spare.append(slab)


class _Table:
    """What one block table of a cache holds.

    Attributes:
        pages: by their numbers: position ``p`` is in page ``p // page_size``. None for those that were let go.
        first: the oldest position held.
    """

    __slots__ = ("first", "pages", "pool")

    def __init__(self, pool: PagePool, pages: list[Page | None], first: int) -> None:
        self.pool, self.pages, self.first = pool, pages, first

    @property
    def window(self) -> int | None:
        return self.pool.layout.window

    def needed(self, position: int) -> int:
        """The oldest position that a token at ``position``, or a later one, sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)

    def let_go(self, position: int, page_size: int) -> None:
        """Return the pages before a position."""
        old, new = self.first // page_size, position // page_size
        if new > old:
            self.first = new * page_size
            self.pages[old:new] = [None] * (new - old)


class PagedCache:
    """One sequence's keys and values, in pages that it may share with other sequences.

    A step is ``reserve``, then the kernels, then ``advance``. What others can see of a page, all before
    ``writable_from``, is never written: a step that would do so goes on in a copy of the page. That is one page of each
    table at most, since pages past the end are not kept. The tables themselves are shared as well, until one of their
    caches changes them: a fork takes as long for many tokens as for few.

    Attributes:
        position: the number of tokens held.
        tables: the address of the block tables: int64 ``[tables, table_width]``, the distance of each page from the
            anchor in bytes. Entries of pages that are not held mean nothing.
        writable_from: the first position that can be written in place.
    """

    def __init__(self, plan: KvPlan, pools: Sequence[PagePool], anchor: int) -> None:
        assert plan.page_size is not None
        self.position = self.writable_from = 0
        self._plan, self._page_size, self._anchor = plan, plan.page_size, anchor
        self._held = [_Table(pool, [], 0) for pool in pools]
        self._entries = np.zeros((len(pools), plan.table_width), np.int64)
        self.tables: int = self._entries.ctypes.data
        self._room = 0  # positions that there are pages for
        self._shares_tables = False

    def reserve(self, count: int) -> None:
        """Make sure that the next ``count`` positions can be written, and let go of what is too old to be seen again.

        Raises:
            MemoryError: there is none; nothing has changed.
        """
        start = self.position
        if start >= self.writable_from and start + count <= self._room:
            return
        begin, end = self._page_count(start), self._page_count(start + count)
        is_shared = start < self.writable_from and start % self._page_size > 0
        begin -= is_shared
        taken = [[table.pool.take() for _ in range(begin, end)] for table in self._held]
        if is_shared:
            for table, pages in zip(self._held, taken):
                shared = table.pages[begin]
                assert shared is not None
                pages[0].memory[:] = shared.memory
        self._own_tables()
        for number, (table, pages) in enumerate(zip(self._held, taken)):
            self._place(number, begin, pages)
            table.let_go(table.needed(start - self._plan.rollback), self._page_size)
        self.writable_from = min(self.writable_from, begin * self._page_size)
        self._room = end * self._page_size

    def advance(self, count: int) -> None:
        """The next ``count`` positions have been written."""
        self.position += count

    @property
    def oldest(self) -> int:
        """The least number of tokens that it can be cut back to: the next one must see all that its window has."""
        oldest = 0
        for table in self._held:
            if table.first and table.window is not None:
                oldest = max(oldest, table.first + table.window - 1)
        return oldest

    def truncate(self, position: int) -> None:
        """Forget the tokens from ``position`` on; pages past the end are returned."""
        kept = self._page_count(position)
        self._room = min(self._room, kept * self._page_size)  # first: an interrupt may come between two lines
        self.position = position
        if not self._shares_tables:
            for table in self._held:
                del table.pages[kept:]

    def fork(self) -> PagedCache:
        """Another cache with the same tokens, in the same pages: this one goes on in the last, the other in a copy."""
        self.writable_from = max(self.writable_from, self.position)
        self._shares_tables = True
        fork = PagedCache.__new__(PagedCache)
        fork._plan, fork._page_size, fork._anchor = self._plan, self._page_size, self._anchor
        fork._held, fork._entries, fork.tables = self._held, self._entries, self.tables
        fork._shares_tables, fork.position = True, self.position
        fork.writable_from = fork._room = self._page_count(self.position) * self._page_size
        return fork

    @property
    def memory(self) -> Mapping[int, int]:
        """The bytes of each page and of the block tables, by their addresses."""
        pieces = {self.tables: self._entries.nbytes}
        for table in self._held:
            size = table.pool.layout.nbytes
            pieces |= {page.address: size for page in table.pages[: self._pages] if page is not None}
        return pieces

    def rows(self) -> list[KvRows]:
        """A copy of each layer's rows, of a window those that can still be seen; of a sharing layer none."""
        return [self._rows(layer) for layer in self._plan.layers]

    def load(self, position: int, layers: Sequence[KvRows]) -> None:
        """Fill an empty cache with ``position`` tokens, whose rows are as :meth:`rows` gave them.

        Raises:
            MemoryError: there is none; nothing has changed.
        """
        owners = [(layer, rows) for layer, rows in zip(self._plan.layers, layers) if layer.shares is None]
        count = self._page_count(position)
        firsts = [
            max(rows.first for layer, rows in owners if layer.table == number)
            for number in range(len(self._held))
        ]
        begins = [first // self._page_size for first in firsts]
        taken = [[table.pool.take() for _ in range(begin, count)] for table, begin in zip(self._held, begins)]
        for layer, rows in owners:
            assert layer.table is not None
            begin, pages = begins[layer.table], taken[layer.table]
            self._fill(layer, pages, begin * self._page_size, rows)
        self._own_tables()
        for number, (table, begin, first) in enumerate(zip(self._held, begins, firsts)):
            table.pages, table.first = [None] * begin, first
            self._place(number, begin, taken[number])
        self.position, self._room = position, count * self._page_size

    @property
    def _pages(self) -> int:
        """Pages of each table that are this cache's; a table that others share may have more."""
        return self._room // self._page_size

    def _own_tables(self) -> None:
        """Copy the tables, if others share them: they are about to change."""
        if self._shares_tables:
            held = [_Table(table.pool, table.pages[: self._pages], table.first) for table in self._held]
            entries = self._entries.copy()
            self._held, self._entries, self.tables = held, entries, entries.ctypes.data
            self._shares_tables = False

    def _page_count(self, position: int) -> int:
        """How many pages so many positions begin."""
        return -(-position // self._page_size)

    def _place(self, number: int, begin: int, pages: list[Page]) -> None:
        """Let the last pages of a table, from number ``begin`` on, be these."""
        self._entries[number, begin : begin + len(pages)] = [page.address - self._anchor for page in pages]
        self._held[number].pages[begin:] = pages

    def _rows(self, layer: KvLayer) -> KvRows:
        if layer.shares is not None:
            return KvRows(self.position, *_no_rows(layer))
        assert layer.table is not None
        table = self._held[layer.table]
        first = max(table.first, table.needed(self.position - self._plan.rollback))
        begin = first // self._page_size
        parts = [
            self._parts(layer, page)
            for page in table.pages[begin : self._page_count(self.position)]
            if page is not None
        ]
        if not parts:
            return KvRows(first, *_no_rows(layer))
        rows = slice(first - begin * self._page_size, self.position - begin * self._page_size)
        stacked = [np.stack(part) for part in zip(*parts)]
        return KvRows(first, *(part.reshape(len(parts) * self._page_size, -1)[rows] for part in stacked))

    def _fill(self, layer: KvLayer, pages: Sequence[Page], begin: int, rows: KvRows) -> None:
        """Write a layer's rows into pages whose first position is ``begin``, and zeros where there are none."""
        sources = [rows.keys, rows.values, rows.key_scales, rows.value_scales]
        places = [self._parts(layer, page) for page in pages]
        for source, part in zip(sources, zip(*places)):
            assert source is not None
            whole = np.zeros((len(pages) * self._page_size, source.shape[1]), source.dtype)
            whole[rows.first - begin :][: len(source)] = source
            for place, numbers in zip(part, whole.reshape(len(pages), *part[0].shape)):
                place[...] = numbers

    def _parts(self, layer: KvLayer, page: Page) -> list[npt.NDArray[Any]]:
        """A layer's keys, values and scales in a page, positions first, then heads."""
        assert layer.table is not None
        place = self._held[layer.table].pool.layout.layers[layer.index]
        heads, size, dim = layer.heads, self._page_size, layer.head_dim
        dtype = _STORED[layer.dtype]

        def array(at: int, dtype: np.dtype[Any], *shape: int) -> npt.NDArray[Any]:
            return page.memory[at:].view(dtype)[: int(np.prod(shape))].reshape(shape)

        keys = array(place.keys, dtype, heads, size // KEY_TILE, dim, KEY_TILE).transpose(1, 3, 0, 2)
        values = array(place.values, dtype, heads, size, dim).transpose(1, 0, 2)
        scales = [
            array(at, np.dtype(np.float32), heads, size).T
            for at in (place.key_scales, place.value_scales)
            if at is not None
        ]
        return [keys, values, *scales]


def _no_rows(layer: KvLayer) -> list[npt.NDArray[Any]]:
    """Keys, values and scales of no position."""
    rows: npt.NDArray[Any] = np.zeros((0, layer.heads * layer.head_dim), _STORED[layer.dtype])
    scales: npt.NDArray[Any] = np.zeros((0, layer.heads), np.float32)
    return [rows, rows, scales, scales] if layer.dtype is DType.INT8 else [rows, rows]
