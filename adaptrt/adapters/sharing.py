"""One object for equal tensors of different adapters, so that backends attach them once (VeRA's projections)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from hashlib import sha256
from weakref import WeakValueDictionary

from adaptrt.adapters.variant import Adapter
from adaptrt.tensor import Tensor


class SharedTensors:
    """The tensors that several targets of an adapter use, by content, as long as any adapter holds them."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[tuple[str, tuple[int, ...], bytes], Tensor] = WeakValueDictionary()

    def unite(self, adapter: Adapter) -> Adapter:
        """The adapter with those of its shared tensors that are known already in the place of its own."""
        uses = Counter(name for target in adapter.targets for name in target.tensors.values())
        shared = {name: self._first(adapter.tensors[name]) for name, count in uses.items() if count > 1}
        return replace(adapter, tensors={**adapter.tensors, **shared})

    def _first(self, tensor: Tensor) -> Tensor:
        key = (tensor.dtype, tensor.shape, sha256(tensor.data.data).digest())
        return self._known.setdefault(key, tensor)
