// merge.c - see merge.h.
#include "merge.h"

#include <ggml-backend.h>
#include <string.h>

pyllava_status merge_bind(merge * m, weights * w, bool with_newline, int32_t n_side, int32_t n_embd) {
    m->n_side = n_side;
    m->n_embd = n_embd;
    if (!with_newline) {
        weights_ignore(w, "model.image_newline");
        weights_ignore(w, "v.image_newline");
        return w->status;
    }
    const char * name = weights_has(w, "v.image_newline") ? "v.image_newline" : "model.image_newline";
    if (!weights_has(w, "%s", name)) {
        FAIL(PYLLAVA_ERR_MISMATCH,
             "%s: says mm_patch_merge_type spatial_unpad, but has no tensor model.image_newline: convert it "
             "again with the newline in llava.projector",
             w->files[0]->path);
    }
    m->newline = weights_vector(w, n_embd, "%s", name);
    weights_ignore(w, "model.image_newline"); // a file may hold both names
    return w->status;
}

// The part of the grid of patches that shows the picture; the rest is the padding of its tiles.
typedef struct region {
    int32_t x, y, columns, rows;
} region;

static region region_of(const merge * m, const pyllava_layout * l) {
    region r = { 0, 0, l->columns * m->n_side, l->rows * m->n_side };
    if (l->flat || r.columns == 0) return r;
    const int64_t w = l->width, h = l->height;
    if (w * r.rows > h * r.columns) { // wider than the grid
        r.y = (r.rows - (int32_t) (h * r.columns / w)) / 2;
        r.rows -= 2 * r.y;
    } else {
        r.x = (r.columns - (int32_t) (w * r.rows / h)) / 2;
        r.columns -= 2 * r.x;
    }
    return r;
}

int32_t merge_length(const merge * m, const pyllava_layout * l) {
    const region r = region_of(m, l);
    const int32_t view = m->n_side * m->n_side;
    if (l->flat) return view + r.rows * r.columns;
    return view + (l->columns ? r.rows * (r.columns + 1) : 1);
}

static float * put_newline(const merge * m, float * out) {
    ggml_backend_tensor_get(m->newline, out, 0, ggml_nbytes(m->newline));
    return out + m->n_embd;
}

static float * put_patches(const merge * m, const float * from, int32_t n, float * out) {
    memcpy(out, from, (size_t) n * (size_t) m->n_embd * sizeof *out);
    return out + (size_t) n * (size_t) m->n_embd;
}

void merge_apply(const merge * m, const pyllava_layout * l, const float * views, float * out) {
    const region r = region_of(m, l);
    const int32_t n = m->n_side;
    out = put_patches(m, views, n * n, out);
    if (!l->flat && l->columns == 0) put_newline(m, out);
    for (int32_t y = r.y; y < r.y + r.rows; y++) {
        for (int32_t x = r.x; x < r.x + r.columns;) { // the row's stretch in one tile
            const int32_t tile = 1 + y / n * l->columns + x / n, patch = y % n * n + x % n;
            const int32_t rest = r.x + r.columns - x, here = n - x % n < rest ? n - x % n : rest;
            out = put_patches(m, views + ((size_t) tile * n * n + patch) * (size_t) m->n_embd, here, out);
            x += here;
        }
        if (!l->flat) out = put_newline(m, out);
    }
}
