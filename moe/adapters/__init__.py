"""LoRA on experts and routers: thin matrices that are trained beside frozen weights. Start at `lora.py`."""

from .lora import add_lora, disable_lora, lora_parameters, merge_lora, unmerge_lora, use_lora
from .quantize import dequantize_experts, quantize_experts

__all__ = [
    "add_lora",
    "dequantize_experts",
    "disable_lora",
    "lora_parameters",
    "merge_lora",
    "quantize_experts",
    "unmerge_lora",
    "use_lora",
]
