"""LoRA on experts and routers: thin matrices that are trained beside frozen weights. Start at `lora.py`."""

from .lora import add_lora, lora_parameters, merge_lora, unmerge_lora

__all__ = ["add_lora", "lora_parameters", "merge_lora", "unmerge_lora"]
