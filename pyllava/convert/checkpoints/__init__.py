"""Reading checkpoints: safetensors and torch files, tensor by tensor, with plain positioned reads; no code of theirs is run."""
