"""What TensorRT's layer names say: the ONNX nodes that were fused into a layer, and the modules they came from.

A fused layer is called after its parts: ``layer1.0.conv1.weight + QuantizeLinear_20 + Conv_22``. Later versions also
list the ONNX nodes as metadata.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_ONNX = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\[]|$)")
_COPY = re.compile(r"Reformatting CopyNode for (?:Input|Output) Tensor \d+ to (.+)", re.DOTALL)
_WEIGHT = re.compile(r"([\w.]+)\.(?:weight|bias|in_proj_weight|in_proj_bias|kernel|gamma|beta)")
_OPERATOR = re.compile(r"([A-Z][A-Za-z]*)(?:_\w+)?")
_QUANTISER = re.compile(r"(?:.*[/_])?(?:Dynamic)?(?:Q|Deq)uantizeLinear(?:_\w+)?")
_HEAVY = re.compile(r"(?:Conv|ConvTranspose|Gemm|MatMul)_\d+")
# what TensorRT and its ONNX parser put in, or name after no node
_INSERTED = re.compile(r"\(Unnamed Layer|onnx::|ONNXTRT_|__my|\[|[a-z_]+_after_")
_COMPILED = re.compile(r"_myl\d*_\d+$")
# a kernel of TensorRT's compiler is called after what it does; these only copy
_COPIES = re.compile(r"__myl_(?:Move|Tran|Resh|Cast|Copy)+(?:_|$)")


def served(name: str) -> str:
    """The name of the layer a reformatting copy is made for; empty for any other layer."""
    found = _COPY.fullmatch(name)
    return found[1] if found else ""


def parts(name: str, metadata: str = "") -> tuple[str, ...]:
    """The names of weights and ONNX nodes a layer is made of; the nodes from the metadata, where it lists any."""
    own = tuple(_split(served(name) or name))
    nodes = _ONNX.findall(metadata)
    if not nodes:
        return own
    return tuple(part for part in own if _WEIGHT.fullmatch(part)) + tuple(nodes)


def copies(name: str, own: Sequence[str]) -> bool:
    """Whether the name alone tells that a layer only moves or rewrites numbers."""
    if served(name) or _COPIES.match(name):
        return True
    known = [part for part in own if not _INSERTED.match(part)]
    return bool(known) and all(_QUANTISER.fullmatch(part) for part in known)


def operator(own: Sequence[str]) -> str:
    """The ONNX operator of the first part that is no quantiser: ``Conv``; empty where the names do not tell."""
    for part in own:
        found = _OPERATOR.fullmatch(part.rpartition("/")[2])
        if found and not _QUANTISER.fullmatch(part) and not _WEIGHT.fullmatch(part):
            return found[1]
    return ""


def layers(rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The model's layers behind the parts of each row.

    A weight's module path stands for the convolution or product that uses it. A node called after a path is the layer
    of that path, and of the operation where other nodes lie deeper. Any other node keeps its name. Quantisers are no
    layers, and where a row has nothing else it has none.
    """
    paths = {_path(part)[0] for own in rows for part in own}
    containers = {""} | {path.rsplit(".", i)[0] for path in paths for i in range(1, path.count(".") + 1)}
    return [_layers(own, containers) for own in rows]


def quantisers(own: Iterable[str]) -> tuple[str, ...]:
    """Those parts that are quantisers or dequantisers."""
    return tuple(part for part in own if _QUANTISER.fullmatch(part))


def _layers(own: Sequence[str], containers: set[str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    weighted = sum(1 for part in own if _WEIGHT.fullmatch(part) and part.endswith("weight"))
    for part in own:
        if _INSERTED.match(part) or _QUANTISER.fullmatch(part):
            continue
        weight = _WEIGHT.fullmatch(part)
        path, last = _path(part)
        if weight:
            found[weight[1]] = None
        elif last and path not in containers:
            found[path] = None
        elif last:
            found[f"{path}.{last.lower()}".strip(".")] = None
        elif weighted and _HEAVY.fullmatch(part):
            weighted -= 1  # the weight before has named it
        else:
            found[part] = None
    return tuple(found)


def _path(part: str) -> tuple[str, str]:
    """``/layer1/layer1.0/conv1/Conv_1`` as ``layer1.0.conv1`` and ``Conv_1``; empty for any other form."""
    *scopes, last = _COMPILED.sub("", part).strip("/").split("/")
    if "/" not in part or not _OPERATOR.fullmatch(last) or _INSERTED.match(part) or _QUANTISER.fullmatch(part):
        return "", ""
    path = ""
    for scope in scopes:
        path = scope if not path or scope.startswith(f"{path}.") else f"{path}.{scope}"
    return path, last


def _split(name: str) -> Iterable[str]:
    for part in name.split(" + "):
        inner = re.fullmatch(r"PWN\((.*)\)", part)  # a fused chain of elementwise operations
        ends = re.fullmatch(r"\{ForeignNode\[(.*?)\.\.\.(.*)\]\}", part)  # a part of the graph, by its ends
        if inner:
            for one in inner[1].split(", "):
                yield from _split(one)
        elif ends:
            yield from ends.groups()
        elif part:
            yield part
