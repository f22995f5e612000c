// vision.h - from a picture to what the language model sees of it: tower, projector, and merging of views.
// How many rows that gives is known here alone.
#pragma once

#include "merge.h"
#include "projector.h"
#include "vit.h"

typedef struct vision {
    vit vit;
    projector projector;
    merge merge;
} vision;

pyllava_status vision_read(vision * v, const pyllava_gguf * file); // kinds and hyper-parameters
// device: of the tower and the projector; NULL: the CPU.
pyllava_status vision_bind(vision * v, weights * w, int32_t n_embd_text, ggml_backend_dev_t device);
void vision_free(vision * v);

// Rows of a picture of this layout, merged; of one view before that, where layout is NULL.
int32_t vision_rows(const vision * v, const pyllava_layout * layout);
// How many of n views are encoded at once: enough to keep all cores busy, in memory that does not grow with
// n.
int32_t vision_views(const vision * v, int32_t n);
// Patches of g->n_views views f32 [n_views * n_patch, 3 * patch_size^2] to embeddings [n_views *
// vision_rows(v, NULL), n_embd].
tensor * vision_embed(graph * g, const vision * v, tensor * patches);
// views [1 + columns * rows, vision_rows(v, NULL), n_embd] to out [vision_rows(v, layout), n_embd].
void vision_merge(const vision * v, const pyllava_layout * layout, const float * views, float * out);
