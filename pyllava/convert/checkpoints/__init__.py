"""Reading checkpoints: safetensors and torch files, tensor by tensor, with plain positioned reads.

No code of theirs is run, and nothing here knows GGUF.
"""
