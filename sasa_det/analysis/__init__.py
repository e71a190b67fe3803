"""FLOPs, parameters, time and memory, and the paper's tables.

Exported is what counts; what measures is in modules of its own, for ``tools/benchmark.py``.
"""

from .flops import DetectorCost, ModelCost, count_detector, count_network, flop_handles

__all__ = ["DetectorCost", "ModelCost", "count_detector", "count_network", "flop_handles"]
