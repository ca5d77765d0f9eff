"""What lies on disk: checkpoints that resume, exports, deltas and LoRA adapters."""

from .resumable import full_state_dict, load_checkpoint, save_checkpoint

__all__ = ["full_state_dict", "load_checkpoint", "save_checkpoint"]
