"""A name of the zoo."""

from __future__ import annotations

from workbench.models import zoo
from workbench.models.model import Model
from workbench.models.sources._base import Request

TITLE = "A network of the zoo"
OPTIONS = {"weights"}


def fits(request: Request) -> bool:
    """A name in `zoo.ZOO`."""
    return request.is_name


def read(request: Request) -> Model:
    """The network with shipped or random weights."""
    module, weights = zoo.trained(request.source, request.weights)
    return Model(
        request.name or request.source, zoo.example(request.source), module=module, source="zoo", weights=weights
    )
