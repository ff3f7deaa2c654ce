"""A program saved by `torch.export`."""

from __future__ import annotations

import json
import os
import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from workbench.errors import LoadError
from workbench.models import inputs
from workbench.models.model import Model
from workbench.models.sources import _program
from workbench.models.sources._base import Request
from workbench.models.sources.module import checked

TITLE = "A torch.export program"
OPTIONS = {"inputs"}

_OLD = "serialized_exported_program.json"  # how it was called before torch 2.8
_CODE = ("custom_obj", "opaque_obj", "aotinductor")  # pickles and compiled libraries, which run when loaded

# reading a program resolves these strings to Python objects, some of them by eval; what is not plainly part of a
# network is refused
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed|higher_order)\.(?!from_file)\w+(\.\w+)?"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|math\.(ceil|floor|trunc|sqrt|log|log2|exp|pow)|torch\.(sym_\w+|_sym_sqrt)"
)
_EXPRESSION = re.compile(
    r"(?:(?:Symbol|Float)\('[\w.+-]*'|[a-z]+=|[A-Z][A-Za-z]*|[a-z]+\d+|int_oo|oo|\d+(?:\.\d+)?|[-+*/%(),<>=!&|~ ])*"
)
# comparisons of input sizes, which is what several inputs with an open batch axis leave
_GUARD = re.compile(r"(?:L(?:\['\w+'\]|\[\d+\])+\.size\(\)\[\d+\]|\b(?:and|or|not)\b|\d+|[-+*/%()<>=! ])*")
_PLAIN = re.compile(r"[^\"\\\n\r()]*")
# never resolved, or dropped before it is (see `_program.module`)
_FREE_TEXT = {
    "stack_trace", "from_node", "source_fn_stack", "torch_fn", "doc_string", "in_spec", "out_spec", "guards_code"
}  # fmt: skip

_LOCK = threading.Lock()


def fits(request: Request) -> bool:
    """An archive with a serialised program in it, or the ending."""
    return request.suffix == ".pt2" or _OLD in request.members or "models/model.json" in request.members


def read(request: Request) -> Model:
    """The program as a module whose layers have the names they had when it was exported."""
    _check_archive(request)
    with warnings.catch_warnings(), _weights_only():
        warnings.simplefilter("ignore")  # torch's own, about its tree utilities
        try:
            with request.path.open("rb") as file:
                program = torch.export.load(file)
        except pickle.UnpicklingError as error:
            raise LoadError(
                f"{request.path} is refused: besides tensors its weights or examples hold other objects, and reading "
                "them would run code. Save the module's weights instead: torch.save(module.state_dict(), …)."
            ) from error
        except Exception as error:  # a damaged program fails anywhere in torch's parser
            raise request.damaged(error) from error
    example, keywords = _example(program, request)
    module = _program.module(program, example, keywords)
    inputs.check(example, request.title)
    return checked(module, example, keywords, request.title, source=request.path.name, weights="as given")


def _example(program: ExportedProgram, request: Request) -> tuple[dict[str, Tensor], bool]:
    """The caller's inputs, those saved with the program, or noise of the shapes it was exported with."""
    names = _program.input_names(program)
    if request.inputs is not None:
        given = request.inputs
        if isinstance(given, dict) and set(given) != set(names):
            raise LoadError(
                f"{request.path} takes the inputs {', '.join(names)}; {', '.join(map(str, given))} are given."
            )
        listed = [given[name] for name in names] if isinstance(given, dict) else given
        listed = list(listed) if isinstance(listed, (tuple, list)) else [listed]
        if len(listed) != len(names):
            raise LoadError(f"{request.path} takes {len(names)} inputs ({', '.join(names)}); {len(listed)} are given.")
        values = [inputs.tensor(value, f"inputs[{name!r}]") for name, value in zip(names, listed, strict=True)]
    else:
        saved = program.example_inputs
        values = [*saved[0], *saved[1].values()] if saved else _program.noise(program)
    if len(values) != len(names) or not all(isinstance(v, Tensor) for v in values):
        raise LoadError(f"{request.path} takes inputs that are no tensors; export a module that takes tensors alone.")
    example = dict(zip(names, (v.detach().clone() for v in values), strict=True))
    return example, _program.takes_keywords(program)


def _check_archive(request: Request) -> None:
    members = request.members
    if not members:
        raise request.damaged("it is no archive as torch.export.save writes it")
    code = next((m for m in members if m.endswith(".so") or any(word in m for word in _CODE)), None)
    if code:
        raise LoadError(
            f"{request.path} holds {code}, code that would run on loading. Export the plain program: "
            "torch.export.save(torch.export.export(module, inputs), FILE)."
        )
    with zipfile.ZipFile(request.path) as archive:
        programs = [n for n in archive.namelist() if n.endswith(_OLD) or re.search(r"(^|/)models/[^/]+\.json$", n)]
        if len(programs) != 1:
            raise request.damaged(f"it holds {len(programs)} programs; one is wanted")
        try:
            program = json.loads(archive.read(programs[0]))
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise request.damaged(error) from error
    for key, text in _strings(program):
        rule = {"target": _TARGET, "expr_str": _EXPRESSION, "guards_code": _GUARD}.get(key, _PLAIN)
        unsafe = "default_factory" in text if key in _FREE_TEXT else not rule.fullmatch(text)
        if unsafe:
            raise LoadError(
                f"{request.path} is refused: its {key} {text[:60]!r} is no part of a network that torch.export writes, "
                "and reading it could run code. Export the module again, or save its weights: "
                "torch.save(module.state_dict(), …)."
            )


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a JSON value with the key it stands under, keys themselves included."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield "name", name
            yield from _strings(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)
    elif isinstance(value, str):
        yield key, value


@contextmanager
def _weights_only() -> Iterator[None]:
    """Forbid torch's parser the full unpickling it falls back to for weights, constants and examples."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    with _LOCK:
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before
