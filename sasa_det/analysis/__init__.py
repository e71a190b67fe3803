"""FLOPs and parameters, and the paper's tables to compare them with."""

from .flops import DetectorCost, ModelCost, count_detector, count_network, flop_handles

__all__ = ["DetectorCost", "ModelCost", "count_detector", "count_network", "flop_handles"]
