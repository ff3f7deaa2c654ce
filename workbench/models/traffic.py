"""Which tensors a call reads and writes, told by their memory: a view moves nothing, a change in place does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_LOOKUPS = (torch.ops.aten.embedding.default, torch.ops.aten._embedding_bag.default)


@dataclass(frozen=True)
class Held:
    """A tensor as it was when it was seen, without its numbers.

    Attributes
    ----------
    storage
        The same for tensors that share memory, and for no others within one `Traffic`.
    view
        Offset and strides within that memory.
    shape
        Batch axis included; None for a length that differs from sample to sample.
    dtype
        numpy's name, ``bfloat16`` besides.
    nbytes
        Of its numbers, those that it repeats by a stride of zero counted once.
    """

    storage: int
    view: tuple[int, ...]
    shape: tuple[int | None, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Moved:
    """What one call reads and writes.

    Attributes
    ----------
    reads
        Its tensors, weights not among them.
    gives
        Those it returns, views of what it reads included, and those it changes in place.
    written
        Those of `gives` whose numbers it writes; empty for a call that only gives views.
    changed
        Storages of what it is given and changes in place.
    weights
        Storages of the weights it uses, with the bytes read.
    looked_up
        Which of them are tables of embeddings, of which it reads the rows looked up.
    """

    reads: tuple[Held, ...]
    gives: tuple[Held, ...]
    written: tuple[Held, ...]
    changed: frozenset[int]
    weights: Mapping[int, int]
    looked_up: frozenset[int]

    def per_sample(self, batch: int) -> tuple[int, int, int]:
        """Bytes of activations read, of weights read, and written, of one sample of a batch.

        A tensor whose first axis is no multiple of the batch is counted whole.
        """
        if not self.written:
            return 0, 0, 0
        weights = sum(n // batch if key in self.looked_up else n for key, n in self.weights.items())
        return _of_one(self.reads, batch), weights, _of_one(self.written, batch)


def _of_one(tensors: Iterable[Held], batch: int) -> int:
    return sum(t.nbytes // batch if t.shape and t.shape[0] and t.shape[0] % batch == 0 else t.nbytes for t in tensors)


class Traffic(TorchDispatchMode):
    """Notes which memory is changed and which weights are used while it is entered.

    Parameters
    ----------
    module
        Its parameters and buffers are the weights.
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module):
        super().__init__()
        # a weak reference keeps the address from being given to another tensor, and frees the memory all the same
        self._known: dict[int, StorageWeakRef] = {}
        self._kept: dict[int, Tensor] = {}
        self._weights = {self.storage(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._changed: list[int] = []
        self._used: list[tuple[int, int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        schema = getattr(func, "_schema", None)  # operators of a higher order have none
        if schema is not None:
            named = {argument.name: argument for argument in schema.arguments}
            given = [*zip(schema.arguments, args, strict=False), *((named[key], kwargs[key]) for key in kwargs)]
            for argument, value in given:
                writes = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in _tensors(value):
                    self._note(tensor, writes, func, output)
        return output

    def _note(self, tensor: Tensor, writes: bool, func: Any, output: Any) -> None:
        storage = self.storage(tensor)
        if writes:
            self._changed.append(storage)
        if storage in self._weights:
            lookup = func in _LOOKUPS
            nbytes = min(_nbytes(tensor), sum(map(_nbytes, _tensors(output)))) if lookup else _nbytes(tensor)
            self._used.append((storage, nbytes, lookup))

    def storage(self, tensor: Tensor) -> int:
        """A number for the memory of a tensor, given to no other for as long as this object lives."""
        try:
            reference = StorageWeakRef(tensor.untyped_storage())
        except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have none
            self._kept[id(tensor)] = tensor
            return -id(tensor)
        return self._known.setdefault(reference.cdata, reference).cdata

    def mark(self) -> tuple[int, int]:
        """The present, for `since`."""
        return len(self._changed), len(self._used)

    def since(self, mark: tuple[int, int], given: Any, output: Any) -> Moved:
        """What a call moved that began at `mark`, from its arguments and what it gave."""
        inward, returned = self.held(given), self.held(output)
        sources = {held.storage for held in inward}
        changed = frozenset(self._changed[mark[0] :]) & sources
        weights: dict[int, int] = {}
        for storage, nbytes, _ in self._used[mark[1] :]:
            weights[storage] = max(nbytes, weights.get(storage, 0))
        reads = tuple(held for held in inward if held.storage not in self._weights)
        silent = changed - {held.storage for held in returned}
        gives = (*returned, *(held for held in reads if held.storage in silent))
        fresh = {held.storage for held in gives} - sources - self._weights
        return Moved(
            reads=reads,
            gives=gives,
            written=tuple(held for held in gives if held.storage in changed | fresh),
            changed=changed,
            weights=weights,
            looked_up=frozenset(storage for storage, _, lookup in self._used[mark[1] :] if lookup),
        )

    def held(self, value: Any) -> tuple[Held, ...]:
        """The tensors in any nesting of tuples, lists and dicts, each once."""
        return tuple(dict.fromkeys(self._held(tensor) for tensor in _tensors(value)))

    def _held(self, tensor: Tensor) -> Held:
        dtype = str(tensor.dtype).removeprefix("torch.")
        if _is_plain(tensor):
            view = (tensor.storage_offset(), *tensor.stride())
            return Held(self.storage(tensor), view, tuple(tensor.shape), dtype, _nbytes(tensor))
        return Held(self.storage(tensor), (), (None,) * tensor.dim(), dtype, _nbytes(tensor))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has strides: not sparse, not nested."""
    return tensor.layout == torch.strided and not tensor.is_nested


def _nbytes(tensor: Tensor) -> int:
    if not _is_plain(tensor):
        return tensor.numel() * tensor.element_size()
    lengths = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(n for n, stride in lengths if stride or n == 0) * tensor.element_size()
