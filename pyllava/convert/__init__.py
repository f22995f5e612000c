"""Converters: a LLaVA checkpoint in, two GGUF files out (language model and projector file).

`convert_llava` does it in one step. The steps one by one are `llava_surgery` or `llava_surgery_v2`,
`convert_image_encoder_to_gguf` and `convert_legacy_llama`. Each script is a thin `main`. A checkpoint is read
tensor by tensor with plain positioned reads, so memory stays small whatever its size, and no code from it is
ever run.
"""
