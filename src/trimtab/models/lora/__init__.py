"""Low-rank adapters (LoRA): small matrices beside a model's own, trained while those stay as they are."""

from trimtab.models.lora.adapters import Adapters, add_lora, on, target_names
from trimtab.models.lora.files import load_adapters, save_adapters
from trimtab.models.lora.peft_files import load_peft, save_peft
from trimtab.models.lora.settings import LoraSettings

__all__ = [
    "Adapters",
    "LoraSettings",
    "add_lora",
    "load_adapters",
    "load_peft",
    "on",
    "save_adapters",
    "save_peft",
    "target_names",
]
