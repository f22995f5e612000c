// context.c - see context.h.
#include "context.h"

#include "memory.h"

struct ggml_context * context_new(size_t size) {
    size = GGML_PAD(size, GGML_MEM_ALIGN);
    void * memory = aligned_new(size);
    if (!memory) return NULL;
    return ggml_init((struct ggml_init_params) { .mem_size = size, .mem_buffer = memory, .no_alloc = true });
}

void context_free(struct ggml_context * ctx) {
    void * memory = ctx ? ggml_get_mem_buffer(ctx) : NULL;
    ggml_free(ctx);
    aligned_free(memory);
}
