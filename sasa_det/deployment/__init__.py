"""Detectors as programs of torch.export and as ONNX files: docs/deployment.md."""

from .export import export_onnx, export_program, open_onnx, run_onnx
from .networks import BackboneNetwork, DetectorNetwork, ExportedNetwork, network_of

__all__ = [
    "BackboneNetwork",
    "DetectorNetwork",
    "ExportedNetwork",
    "export_onnx",
    "export_program",
    "network_of",
    "open_onnx",
    "run_onnx",
]
