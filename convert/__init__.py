"""Converters: a LLaVA checkpoint in, two GGUF files out (language model and projector file).

Each script is a thin `main`: `llava_surgery`, `convert_image_encoder_to_gguf`, `convert_legacy_llama`. A
checkpoint is read tensor by tensor with plain positioned reads, so memory stays small whatever its size, and
no code from it is ever run.
"""
