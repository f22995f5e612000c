// pair_merge.c - see pair_merge.h. A merge of one of its parts makes a candidate stale, which shows in their
// size.
#include "pair_merge.h"

#include <stdlib.h>

pyllava_status pair_merge_start(pair_merge * m, int32_t n_max) {
    m->n = m->n_heap = 0;
    if (n_max <= m->n_max) return PYLLAVA_OK;
    pair_merge_free(m);
    m->symbols = malloc((size_t) n_max * sizeof *m->symbols);
    // Each symbol is proposed once with its right neighbour, and each merge takes one candidate away and
    // proposes at most two.
    m->heap = malloc((size_t) n_max * 2 * sizeof *m->heap);
    if (!m->symbols || !m->heap) FAIL(PYLLAVA_ERR_MEMORY, "out of memory for a text of %d characters", n_max);
    m->n_max = n_max;
    return PYLLAVA_OK;
}

void pair_merge_free(pair_merge * m) {
    free(m->symbols);
    free(m->heap);
    m->symbols = NULL;
    m->heap = NULL;
    m->n_max = 0;
}

void pair_merge_add(pair_merge * m, int32_t size, int32_t id) {
    const merge_symbol * last = m->n ? &m->symbols[m->n - 1] : NULL;
    if (last) m->symbols[m->n - 1].next = m->n;
    m->symbols[m->n] = (merge_symbol) { m->n - 1, -1, last ? last->begin + last->size : 0, size, id };
    m->n++;
}

// ---------------------------------------------------------------------------------- priority queue

static bool better(const merge_candidate * a, const merge_candidate * b) {
    return a->score != b->score ? a->score > b->score : a->left < b->left;
}

static void heap_push(pair_merge * m, merge_candidate c) {
    int32_t i = m->n_heap++;
    for (; i > 0 && better(&c, &m->heap[(i - 1) / 2]); i = (i - 1) / 2) m->heap[i] = m->heap[(i - 1) / 2];
    m->heap[i] = c;
}

static merge_candidate heap_pop(pair_merge * m) {
    merge_candidate top = m->heap[0], last = m->heap[--m->n_heap];
    int32_t i = 0;
    for (;;) {
        int32_t child = 2 * i + 1;
        if (child >= m->n_heap) break;
        if (child + 1 < m->n_heap && better(&m->heap[child + 1], &m->heap[child])) child++;
        if (!better(&m->heap[child], &last)) break;
        m->heap[i] = m->heap[child];
        i = child;
    }
    m->heap[i] = last;
    return top;
}

// ----------------------------------------------------------------------------------------- merging

static void propose(pair_merge * m, int32_t left, int32_t right) {
    if (left < 0 || right < 0) return;
    const merge_symbol *a = &m->symbols[left], *b = &m->symbols[right];
    merge_candidate c = { 0, left, right, a->size + b->size, -1 };
    if (m->find(m->own, a, b, &c)) heap_push(m, c);
}

void pair_merge_run(pair_merge * m) {
    for (int32_t i = 0; i + 1 < m->n; i++) propose(m, i, i + 1);
    while (m->n_heap) {
        const merge_candidate c = heap_pop(m);
        merge_symbol *left = &m->symbols[c.left], *right = &m->symbols[c.right];
        if (!left->size || !right->size || left->size + right->size != c.size) continue;
        left->size = c.size;
        left->id = c.id;
        right->size = 0;
        left->next = right->next;
        if (right->next >= 0) m->symbols[right->next].previous = c.left;
        propose(m, left->previous, c.left);
        propose(m, c.left, left->next);
    }
}
