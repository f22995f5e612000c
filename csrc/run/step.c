// step.c - one step: the runs of some sequences are cut into batches, and each batch is one graph. Rows of
// prompts and rows of answers go into separate graphs, since they are computed differently; a run longer than
// a batch takes several, short runs share one. The numbers of a row do not depend on its batch.
#include "session.h"

#include "prompt.h"
#include "sampler.h"
#include "thread.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// A run of this step, and how far it is.
typedef struct run_state {
    pyllava_run * run;
    span_cursor at;
    int32_t total;      // rows of all its spans
    int32_t keep;       // rows that may be reused, at most
    int32_t from;       // logits are read from this row on; if none are wanted, the last row's are checked
    int32_t n_in_batch; // rows of the batch that is being made
    int32_t cell;       // of position 0, of a sequence in a range that is appended to; else -1
    float * row;        // [n_vocab] logits of the last row if the caller does not get them, or NULL
} run_state;

typedef struct step {
    pyllava_session * s;
    run_state * runs;
    kv_wish * wishes; // [n] of the runs
    int32_t n;
    int32_t done, todo; // rows of prompts, for the progress
    int32_t not_finite; // the run whose logits are NaN or infinite, or -1
} step;

static pyllava_status check_choice(const pyllava_session * s, const pyllava_run * runs, int32_t i) {
    const pyllava_run * r = &runs[i];
    if (r->first != PYLLAVA_LAST || r->logits)
        FAIL(PYLLAVA_ERR_ARGUMENT, "run %d: a sampler's choice, or logits, not both", i);
    if (!r->choice || (r->n_alternatives && !r->alternatives))
        FAIL(PYLLAVA_ERR_ARGUMENT, "run %d: need choice, and alternatives for n_alternatives > 0", i);
    if (sampler_n_vocab(r->sampler) != s->model->vocab.n)
        FAIL(PYLLAVA_ERR_ARGUMENT, "run %d: a sampler for a vocabulary of %d, the model's is %d", i,
             sampler_n_vocab(r->sampler), s->model->vocab.n);
    for (int32_t j = 0; j < i; j++) {
        if (runs[j].sampler == r->sampler)
            FAIL(PYLLAVA_ERR_ARGUMENT, "run %d: its sampler is that of run %d", i, j);
    }
    return sampler_check(r->sampler, r->mask, r->n_alternatives);
}

static pyllava_status check_run(const pyllava_session * s, pyllava_run * runs, int32_t i, run_state * out) {
    pyllava_run * r = &runs[i];
    int64_t total;
    if (r->seq < 0 || r->seq >= s->params.n_seq)
        FAIL(PYLLAVA_ERR_ARGUMENT, "sequence: found %d, need 0..%d", r->seq, s->params.n_seq - 1);
    for (int32_t j = 0; j < i; j++) {
        if (runs[j].seq == r->seq) FAIL(PYLLAVA_ERR_ARGUMENT, "sequence %d stands twice in one step", r->seq);
    }
    if (r->kind != PYLLAVA_PROMPT && r->kind != PYLLAVA_ANSWER)
        FAIL(PYLLAVA_ERR_ARGUMENT, "run %d: kind: found %d", i, (int) r->kind);
    if (r->n_spans < 1 || !r->spans) FAIL(PYLLAVA_ERR_ARGUMENT, "run %d: need at least one span", i);
    TRY(spans_check(r->spans, r->n_spans, s->model->vocab.n, &total));
    const int32_t held = r->append ? s->kv.sequences[r->seq].length : 0;
    if (held && held + total > s->params.n_ctx) {
        FAIL(PYLLAVA_ERR_CONTEXT, "sequence %d is full: n_ctx is %d (it holds %d, %lld more were asked for)",
             r->seq, s->params.n_ctx, held, (long long) total);
    }
    if (total > s->params.n_ctx) {
        FAIL(PYLLAVA_ERR_CONTEXT, "prompt of %lld positions, n_ctx is %d: raise n_ctx or shorten the prompt",
             (long long) total, s->params.n_ctx);
    }
    if (r->first < PYLLAVA_LAST) FAIL(PYLLAVA_ERR_ARGUMENT, "run %d: first: found %d", i, r->first);
    const int32_t from = r->first == PYLLAVA_LAST ? (int32_t) total - 1 : r->first;
    if (r->sampler) TRY(check_choice(s, runs, i));
    else if (from < total && !r->logits) FAIL(PYLLAVA_ERR_ARGUMENT, "run %d: need logits", i);
    *out = (run_state) {
        .run = r,
        .cell = kv_range(&s->kv, r->seq, held),
        .at = { .spans = r->spans },
        .total = (int32_t) total,
        .keep = from < total ? from : (int32_t) total,
        .from = from < total ? from : (int32_t) total - 1,
    };
    return PYLLAVA_OK;
}

// How many rows the sequence keeps (those that the run shares with it, up to the first row whose logits are
// wanted), and how many cells the other rows need.
static kv_wish begin_run(const pyllava_session * s, run_state * r) {
    const kv_sequence * q = &s->kv.sequences[r->run->seq];
    int32_t shared = 0;
    if (!r->run->append) {
        shared = run_shared(r->run, q, 0);
        if (shared > r->keep) shared = r->keep;
        span_skip(&r->at, shared);
    }
    r->run->n_reused = shared;
    const int32_t held = r->run->append ? q->length : shared;
    return (kv_wish) { .seq = r->run->seq, .keep = held, .n = r->total - shared };
}

// Adds rows of one run to the batch, as many as it takes.
static void add_rows(pyllava_session * s, run_state * r) {
    batch * b = &s->batch;
    const kv_sequence * q = &s->kv.sequences[r->run->seq];
    const int32_t most = r->run->kind == PYLLAVA_PROMPT ? s->params.n_batch : b->n_max;
    int32_t n = r->total - r->at.done < most - b->n ? r->total - r->at.done : most - b->n;
    const int32_t quiet = r->from > r->at.done ? r->from - r->at.done : 0; // rows before the first wanted one
    if (n > quiet + BATCH_LOGITS - b->n_out) n = quiet + BATCH_LOGITS - b->n_out;
    const int32_t first = b->n;
    kv_reserve(&s->kv, r->run->seq, n);
    for (int32_t i = 0; i < n; i++) {
        int32_t row;
        if (r->at.done >= r->from) b->out_rows[b->n_out++] = b->n;
        const pyllava_span * span = span_next(&r->at, &row);
        const int32_t position = q->length + i;
        float * embd = batch_add(b, position, q->cells[position], span_content(span, row, r->run->kind));
        if (span->tokens) language_embed(&s->model->language, span->tokens[row], embd);
        else memcpy(embd, span->embd + (size_t) row * (size_t) b->n_embd, (size_t) b->n_embd * sizeof *embd);
    }
    const int32_t longest = r->run->kind == PYLLAVA_PROMPT ? runner_block_rows(&s->runner) : 1;
    const int32_t n_held = q->length + n;
    r->n_in_batch = n;
    if (n == 0) return;
    batch_attend(b, first, longest, q->cells);
    batch_window(b, first, kv_range(&s->kv, r->run->seq, n_held), n_held, s->kv.n_rows);
}

// Reads the logits of a batch into the memory of their runs.
static pyllava_status read_logits(step * t, pyllava_row_kind kind) {
    pyllava_session * s = t->s;
    const size_t n_vocab = (size_t) s->model->vocab.n;
    for (int32_t i = 0, first = 0; i < t->n; i++) {
        run_state * r = &t->runs[i];
        if (r->run->kind != kind || !r->n_in_batch) continue;
        const int32_t begin = r->at.done - r->n_in_batch > r->from ? r->at.done - r->n_in_batch : r->from;
        const int32_t n = r->at.done - begin;
        if (n <= 0) continue;
        float * to = r->row ? r->row : r->run->logits + (size_t) (begin - r->from) * n_vocab;
        t->not_finite = i;
        TRY(runner_logits(&s->runner, first, n, to));
        t->not_finite = -1;
        first += n;
    }
    return PYLLAVA_OK;
}

static void end_batch(step * t, pyllava_row_kind kind, pyllava_status status) {
    kv_cache * kv = &t->s->kv;
    const uint64_t * contents = t->s->batch.contents;
    for (int32_t i = 0; i < t->n; i++) {
        run_state * r = &t->runs[i];
        if (r->run->kind != kind) continue;
        if (status == PYLLAVA_OK) kv_commit(kv, r->run->seq, contents, r->n_in_batch);
        else kv_rollback(kv, r->run->seq, r->n_in_batch);
        contents += r->n_in_batch;
        r->n_in_batch = 0;
    }
}

static int32_t rows_left(const step * t, pyllava_row_kind kind) {
    int32_t n = 0;
    for (int32_t i = 0; i < t->n; i++) {
        if (t->runs[i].run->kind == kind) n += t->runs[i].total - t->runs[i].at.done;
    }
    return n;
}

// Makes a batch of the next rows of that kind and computes it. Progress is reported first, before any cell is
// taken.
static pyllava_status next_batch(step * t, pyllava_row_kind kind) {
    pyllava_session * s = t->s;
    if (kind == PYLLAVA_PROMPT) TRY(session_report(s, "prefill", (float) t->done / (float) t->todo));
    else TRY(session_check(s));
    batch_clear(&s->batch);
    for (int32_t i = 0; i < t->n; i++) {
        if (t->runs[i].run->kind == kind) add_rows(s, &t->runs[i]);
    }
    pyllava_status status =
        runner_rows(&s->runner, &s->batch, kind == PYLLAVA_PROMPT ? ROWS_PROMPT : ROWS_ANSWER);
    if (status == PYLLAVA_OK && s->batch.n_out) status = read_logits(t, kind);
    end_batch(t, kind, status);
    if (kind == PYLLAVA_PROMPT) t->done += s->batch.n;
    return status;
}

// Takes back a step that failed. Cells that it has written are zeroed, since attention on devices multiplies
// them by 0.
static void undo(step * t, bool keep, pyllava_status status) {
    pyllava_session * s = t->s;
    char text[PYLLAVA_ERROR_MAX];
    snprintf(text, sizeof text, "%s", error_text()); // the step's error, before other calls replace it
    for (int32_t i = 0; i < t->n; i++) {
        const run_state * r = &t->runs[i];
        const bool spoiled = i == t->not_finite && status == PYLLAVA_ERR_NUMERIC;
        if (spoiled && r->run->kind == PYLLAVA_PROMPT)
            kv_trim(&s->kv, r->run->seq, 0); // an earlier row may be the cause
        else if (!keep) kv_trim(&s->kv, r->run->seq, t->wishes[i].keep);
    }
    runner_clear_unused(&s->runner);
    error_set(status, "%s", text);
}

static pyllava_status compute(step * t, bool keep) {
    pyllava_status status = PYLLAVA_OK;
    for (int32_t i = 0; i < t->n; i++) {
        t->wishes[i] = begin_run(t->s, &t->runs[i]);
        if (t->runs[i].run->kind == PYLLAVA_PROMPT) t->todo += t->wishes[i].n;
    }
    TRY(kv_make_room(&t->s->kv, t->wishes, t->n));
    while (status == PYLLAVA_OK && rows_left(t, PYLLAVA_ANSWER)) status = next_batch(t, PYLLAVA_ANSWER);
    while (status == PYLLAVA_OK && rows_left(t, PYLLAVA_PROMPT)) status = next_batch(t, PYLLAVA_PROMPT);
    if (status == PYLLAVA_OK && t->todo) status = session_report(t->s, "prefill", 1.0f);
    if (status != PYLLAVA_OK) undo(t, keep, status);
    for (int32_t i = 0; status == PYLLAVA_OK && i < t->n; i++) {
        const pyllava_run * r = t->runs[i].run;
        if (r->sampler)
            status = sampler_choose(r->sampler, t->runs[i].row, r->mask, r->n_alternatives, r->choice,
                                    r->alternatives);
    }
    return status;
}

static pyllava_status take_rows(step * t) {
    const size_t size = (size_t) t->s->model->vocab.n * sizeof(float);
    for (int32_t i = 0; i < t->n; i++) {
        run_state * r = &t->runs[i];
        if (r->run->sampler || r->keep == r->total) TRY_ALLOC(r->row = malloc(size), size);
    }
    return PYLLAVA_OK;
}

// Sequences by where their cells begin, the scattered ones last: neighbours share a window.
static void sort_runs(step * t) {
    for (int32_t i = 1; i < t->n; i++) {
        const run_state r = t->runs[i];
        int32_t at = i;
        for (; at > 0 && (uint32_t) t->runs[at - 1].cell > (uint32_t) r.cell; at--)
            t->runs[at] = t->runs[at - 1];
        t->runs[at] = r;
    }
}

static pyllava_status check_count(const pyllava_session * s, int32_t n_runs) {
    if (n_runs < 1 || n_runs > s->params.n_seq) {
        FAIL(PYLLAVA_ERR_ARGUMENT, "a step of %d runs: need 1..%d, one for each sequence at most", n_runs,
             s->params.n_seq);
    }
    return PYLLAVA_OK;
}

static pyllava_status take_step(pyllava_session * s, pyllava_run * runs, int32_t n_runs, bool keep) {
    TRY(session_check(s));
    TRY(check_count(s, n_runs));
    step t = { .s = s, .n = n_runs, .not_finite = -1 };
    t.runs = calloc((size_t) n_runs, sizeof *t.runs);
    t.wishes = calloc((size_t) n_runs, sizeof *t.wishes);
    pyllava_status status = PYLLAVA_OK;
    if (!t.runs || !t.wishes) status = error_set(PYLLAVA_ERR_MEMORY, "out of memory for a step");
    for (int32_t i = 0; status == PYLLAVA_OK && i < n_runs; i++) status = check_run(s, runs, i, &t.runs[i]);
    if (status == PYLLAVA_OK) sort_runs(&t);
    if (status == PYLLAVA_OK) status = take_rows(&t);
    if (status == PYLLAVA_OK) status = compute(&t, keep);
    for (int32_t i = 0; t.runs && i < n_runs; i++) free(t.runs[i].row);
    free(t.runs);
    free(t.wishes);
    return status;
}

static pyllava_status check_steps(const pyllava_session * s, const pyllava_run * runs, int32_t n_runs) {
    TRY(check_count(s, n_runs));
    for (int32_t i = 0; i < n_runs; i++) {
        if (!runs[i].append || runs[i].kind != PYLLAVA_ANSWER || !runs[i].sampler)
            FAIL(PYLLAVA_ERR_ARGUMENT, "run %d: need rows of an answer, appended, and a sampler", i);
    }
    return PYLLAVA_OK;
}

// Makes the runs of the next step: they append the tokens that this one chose.
static void next_step(pyllava_run * runs, pyllava_span * spans, int32_t n_runs) {
    for (int32_t i = 0; i < n_runs; i++) {
        spans[i] = (pyllava_span) { .tokens = &runs[i].choice->id, .n = 1 };
        runs[i].spans = &spans[i];
        runs[i].n_spans = 1;
        runs[i].choice++;
        runs[i].alternatives += runs[i].n_alternatives;
    }
}

static bool has_end(const vocab * v, const pyllava_run * runs, int32_t n_runs) {
    for (int32_t i = 0; i < n_runs; i++) {
        if (v->ends[runs[i].choice->id]) return true;
    }
    return false;
}

static pyllava_status take_steps(pyllava_session * s, pyllava_run * runs, int32_t n_runs, int32_t n_steps,
                                 int64_t us, int32_t * out_n) {
    pyllava_span * spans = calloc((size_t) n_runs, sizeof *spans);
    TRY_ALLOC(spans, (size_t) n_runs * sizeof *spans);
    const int64_t end = thread_now_us() + us;
    pyllava_status status = PYLLAVA_OK;
    *out_n = 0;
    while (status == PYLLAVA_OK && *out_n < n_steps) {
        status = take_step(s, runs, n_runs, false);
        if (status != PYLLAVA_OK) break;
        ++*out_n;
        if (has_end(&s->model->vocab, runs, n_runs) || thread_now_us() >= end) break;
        next_step(runs, spans, n_runs);
    }
    free(spans);
    return *out_n ? PYLLAVA_OK : status;
}

pyllava_status session_generate(pyllava_session * s, pyllava_run * runs, int32_t n_runs, int32_t n_steps,
                                int64_t us, int32_t * out_n) {
    TRY(check_steps(s, runs, n_runs));
    TRY(session_enter(s));
    const pyllava_status status = take_steps(s, runs, n_runs, n_steps, us, out_n);
    s->is_busy = false;
    return status;
}

pyllava_status session_step(pyllava_session * s, pyllava_run * runs, int32_t n_runs, bool keep) {
    TRY(session_enter(s));
    const pyllava_status status = take_step(s, runs, n_runs, keep);
    s->is_busy = false;
    return status;
}
