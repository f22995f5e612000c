// merge.c - see merge.h.
#include "merge.h"

#include <ggml-backend.h>
#include <math.h>
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

// Python's a // b of two positive floats, which is not always floor(a / b).
static int32_t floor_divided(double a, double b) {
    const double quotient = (a - fmod(a, b)) / b, whole = floor(quotient);
    return (int32_t) (quotient - whole > 0.5 ? whole + 1 : whole);
}

// The grid that the region is shown on: itself, or a smaller one.
static region shown_of(const merge * m, const pyllava_layout * l, const region * r) {
    region s = { 0, 0, r->columns, r->rows };
    if (l->flat || m->n_most == 0) return s;
    const double most = (double) m->n_most * m->n_side * m->n_side;
    const double t = sqrt((double) r->rows * r->columns / most);
    if (t <= 1.1) return s;
    s.rows = floor_divided(r->rows, t);
    s.columns = floor_divided(r->columns, t);
    if (s.rows < 1) s.rows = 1;
    if (s.columns < 1) s.columns = 1;
    return s;
}

int32_t merge_length(const merge * m, const pyllava_layout * l) {
    const region r = region_of(m, l), s = shown_of(m, l, &r);
    const int32_t view = m->n_side * m->n_side;
    if (l->flat) return view + r.rows * r.columns;
    return view + (l->columns ? s.rows * (s.columns + 1) : 1);
}

static float * put_newline(const merge * m, float * out) {
    ggml_backend_tensor_get(m->newline, out, 0, ggml_nbytes(m->newline));
    return out + m->n_embd;
}

static float * put_patches(const merge * m, const float * from, int32_t n, float * out) {
    memcpy(out, from, (size_t) n * (size_t) m->n_embd * sizeof *out);
    return out + (size_t) n * (size_t) m->n_embd;
}

// What the views make of a picture, and where its patches are.
typedef struct grid {
    const merge * m;
    const pyllava_layout * l;
    const float * views;
    region r;
} grid;

// The row of the patch at this place of the grid of all tiles.
static const float * patch_at(const grid * g, int32_t x, int32_t y) {
    const int32_t n = g->m->n_side, tile = 1 + y / n * g->l->columns + x / n, patch = y % n * n + x % n;
    return g->views + ((size_t) tile * n * n + patch) * (size_t) g->m->n_embd;
}

// A row of the grid, as it is: its stretches in one tile after the other.
static float * put_row(const grid * g, int32_t y, float * out) {
    const int32_t n = g->m->n_side, end = g->r.x + g->r.columns;
    for (int32_t x = g->r.x; x < end;) {
        const int32_t rest = end - x, here = n - x % n < rest ? n - x % n : rest;
        out = put_patches(g->m, patch_at(g, x, y), here, out);
        x += here;
    }
    return out;
}

// Between which two of n places number i of n_out lies, and how far from the first.
typedef struct between {
    int32_t first, second;
    float part;
} between;

static between between_of(int32_t i, int32_t n_out, int32_t n) {
    const float at = (float) n / (float) n_out * ((float) i + 0.5f) - 0.5f, inside = at > 0 ? at : 0;
    const int32_t first = inside < (float) (n - 1) ? (int32_t) inside : n - 1;
    const float part = inside - (float) first;
    return (between) { first, first + (first < n - 1), part < 1 ? part : 1 };
}

// A row of the reduced grid: bilinear, corners not aligned, no smoothing, as torch's interpolate.
static float * put_reduced_row(const grid * g, const region * s, int32_t i, float * out) {
    const between v = between_of(i, s->rows, g->r.rows);
    const int32_t top = g->r.y + v.first, bottom = g->r.y + v.second;
    for (int32_t j = 0; j < s->columns; j++, out += g->m->n_embd) {
        const between h = between_of(j, s->columns, g->r.columns);
        const int32_t left = g->r.x + h.first, right = g->r.x + h.second;
        const float *a = patch_at(g, left, top), *b = patch_at(g, right, top);
        const float *c = patch_at(g, left, bottom), *d = patch_at(g, right, bottom);
        for (int32_t k = 0; k < g->m->n_embd; k++) {
            const float upper = (1 - h.part) * a[k] + h.part * b[k];
            const float lower = (1 - h.part) * c[k] + h.part * d[k];
            out[k] = (1 - v.part) * upper + v.part * lower;
        }
    }
    return out;
}

void merge_apply(const merge * m, const pyllava_layout * l, const float * views, float * out) {
    const grid g = { m, l, views, region_of(m, l) };
    const region s = shown_of(m, l, &g.r);
    const bool is_reduced = s.rows != g.r.rows || s.columns != g.r.columns;
    out = put_patches(m, views, m->n_side * m->n_side, out);
    if (!l->flat && l->columns == 0) put_newline(m, out);
    for (int32_t i = 0; i < s.rows; i++) {
        out = is_reduced ? put_reduced_row(&g, &s, i, out) : put_row(&g, g.r.y + i, out);
        if (!l->flat) out = put_newline(m, out);
    }
}
