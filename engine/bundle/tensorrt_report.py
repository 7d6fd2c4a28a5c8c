"""What export did to make a bundle's graphs fit TensorRT: ``reports/tensorrt.json``, written by export, read here.

For every TensorRT variant it says whether the plain ONNX file serves as it is, which passes changed the graph, how
far the outputs moved, and which nodes compute in fp32 although the variant is fp16, with the reason for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import BundleError
from .files import os_errors
from .manifest import Precision

if TYPE_CHECKING:
    from .bundle import Bundle

TENSORRT_REPORT = "reports/tensorrt.json"


class _Model(BaseModel):
    # Fields that a later version adds are left out, so its bundles stay readable; the manifest guards what matters.
    model_config = ConfigDict(extra="ignore", frozen=True)


class PassEntry(_Model):
    """One change of the graph."""

    name: str
    places: int
    """How often it applied."""
    reason: str


class Fp32Layer(_Model):
    """A node that computes in fp32 within an fp16 graph."""

    node: str
    """Name of the ONNX node; TensorRT's layer names begin with it, or list it when several were fused."""
    op: str
    reason: str
    """Key of `TensorrtReport.reasons`."""


class Difference(_Model):
    """One output of the variant against the fp32 ONNX graph: worst case over the inputs."""

    tensor: str
    max_abs: float
    max_rel: float
    """max |difference| / max |reference|."""


class TensorrtVariant(_Model):
    """One graph in one precision."""

    graph: str
    variant: str
    """Name in the manifest, such as ``fp16-tensorrt``."""
    precision: Precision
    file: str
    same_as: str | None
    """Plain variant whose file serves unchanged; None when the graph was changed."""
    weights: str | None
    """File that this graph's external data lies in; must stay beside `file`. None when the weights are inside."""
    passes: list[PassEntry]
    fp32_layers: list[Fp32Layer]
    differences: list[Difference]
    sizes: list[dict[str, int]]
    """Sizes of the dynamic dimensions that were compared; one empty entry per input for a fixed graph."""
    findings: list[str]
    """What TensorRT 10.3 may refuse or handle badly; empty when nothing is known."""


class TensorrtReport(_Model):
    """The whole report."""

    schema_version: int = 1
    reference: str
    """What the differences are measured against."""
    tolerance: float
    """Largest relative difference an fp32 variant may have; fp16 is measured, and bound by the manifest's parity."""
    reasons: dict[str, str]
    """Why a node stayed in fp32, by the key that `Fp32Layer.reason` names."""
    variants: list[TensorrtVariant]

    def find(self, graph: str, precision: str) -> TensorrtVariant | None:
        """The entry of one graph in one precision (or variant name), or None."""
        return next((v for v in self.variants if v.graph == graph and precision in (v.variant, v.precision)), None)


def read_tensorrt_report(bundle: Bundle) -> TensorrtReport | None:
    """The bundle's report; None for a bundle exported before there was one.

    Raises:
        BundleError: The report is there and cannot be read.
    """
    if TENSORRT_REPORT not in bundle.manifest.files:
        return None
    path = bundle.file(TENSORRT_REPORT)
    with os_errors(f"reading '{path}'"):
        data = path.read_bytes()
    try:
        return TensorrtReport.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise BundleError(
            f"'{path}' is not a TensorRT report: {'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}.",
            "Export the bundle again.",
        ) from error
