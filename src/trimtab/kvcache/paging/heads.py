"""What a policy that works head by head stands on: K and V rows of every (slot, layer, KV head).

Each head has a length of its own. Two stores have this face: `PerHeadRows` keeps all rows in full,
`CodedRows` packs the older ones. Policies that choose rows (snapkv, h2o, ...) run on either, so that choosing
and packing combine. Keys are stored rotated, so the order of rows inside a head carries no meaning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from typing import ClassVar

from torch import Tensor

from trimtab.kernels.coded import CodedTables
from trimtab.kernels.paged import PagedRows
from trimtab.kvcache.base import KVShape, StepRows


class HeadRows(ABC):
    """`length` int32 [slots, L, G]: committed rows of each head."""

    chunks_generated: ClassVar[bool] = True  # settling changes nothing that a later row sees
    fetched: int = 0  # bytes brought from host memory since the policy last took account
    shape: KVShape
    length: Tensor

    # --- memory

    @abstractmethod
    def open(self, slot: int, prompt_length: int) -> None: ...

    @abstractmethod
    def close(self, slot: int) -> None: ...

    def fits(self, slot: int, count: int) -> bool:
        """Whether `reserve` would find all it needs in place. Asked for every token, so it must be quick."""
        return False

    @abstractmethod
    def reserve(self, slot: int, count: int, beside: int = 0) -> bool:
        """Room for `count` rows more in every head, and for packing them, while the policy holds `beside`
        bytes elsewhere. False, and nothing changed, if there is none."""

    def most_rows(self, slot: int, count: int) -> int:
        """How many of the next `count` rows may be computed in one step."""
        return count

    # --- a step

    @abstractmethod
    def write(self, layer: int, k: Tensor, v: Tensor, rows: StepRows) -> None:
        """Store rotated k, v [N, G, d] behind each span's committed rows."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor, rows: StepRows) -> tuple[Tensor, Tensor]:
        """(out [N, H, d], logsumexp [N, H]) of rotated q over committed and new rows."""

    @abstractmethod
    def column_sums(
        self,
        layer: int,
        q: Tensor,
        spans: Tensor,
        sums: Tensor,
        lse: Tensor | None = None,
        start: Tensor | None = None,
    ) -> None:
        """Add to `sums` float32 [spans, G, keys] what each key receives from the spans' rows of rotated q.

        A span is (slot, first, end), its rows those of q. They stand behind the committed rows, or behind
        `start` (shaped like `length`) ones. `lse` [N, H]: their logsumexp where it is known already.
        """

    def whole_step(self, rows: StepRows) -> PagedRows | CodedTables | None:
        """If all layers may attend to these rows in one native call: where they lie."""
        return None

    @abstractmethod
    def arrange(self, slot: int, order: Seq[int]) -> None:
        """Make new rows `order` (ascending), counted from the committed ones, the first new ones."""

    @abstractmethod
    def grow(self, slot: int, count: int) -> None:
        """`count` new rows become committed."""

    def settle(self, slot: int) -> int:
        """Pack what is due, once the prompt is complete and rows were chosen; returns bytes moved."""
        return 0

    # --- choosing

    @abstractmethod
    def layer_rows(self, slot: int, layer: int) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values float32 [G, n, d] of the committed rows of a layer, none of them packed;
        n rows are at least those of the longest head, and those behind a head's last are arbitrary."""

    @abstractmethod
    def keep(self, slot: int, index: Tensor, count: Tensor | None = None) -> int:
        """Keep of each head only rows `index` int64 [L, G, n], in that order (of head (l, g) only the first
        `count[l, g]`); frees pages and returns the bytes copied."""

    @abstractmethod
    def replace(self, slot: int, victim: Tensor) -> int:
        """Drop row `victim` int64 [L, G] of each head by moving its last row there; returns bytes copied."""

    # --- meters

    @property
    @abstractmethod
    def bytes_capacity(self) -> int: ...

    @property
    @abstractmethod
    def bytes_used(self) -> int: ...

    @property
    def bytes_host(self) -> int:
        """Bytes in use in host memory."""
        return 0

    @abstractmethod
    def held(self, slot: int) -> int:
        """Bytes one text holds."""

    def host_held(self, slot: int) -> int:
        """Bytes one text holds in host memory."""
        return 0

    @property
    def exhausted(self) -> str | None:
        """The bound that the last failed `reserve` met, if it was another than that of `bytes_capacity`."""
        return None

    @abstractmethod
    def read(self, slot: int) -> int:
        """Bytes that a decode step of one text reads."""

    @abstractmethod
    def check(self) -> None: ...
