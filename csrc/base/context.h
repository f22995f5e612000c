// context.h - contexts of tensors without data, in memory of ours: ggml asserts that its own is there.
#pragma once

#include <ggml.h>

struct ggml_context * context_new(size_t size); // room for `size` bytes of tensors; NULL on failure
void context_free(struct ggml_context * ctx);   // NULL is fine
