// fast_attention.c - attention of the fast mode: a task uses the loops of a micro table if they support this
// head size, else those of attention.c, which shared_code.h includes before this file.
static int32_t queries_of(int32_t head_dim) { return head_dim <= MAX_HEAD ? MAX_QUERIES : KERNEL_QUERIES; }

#if defined(KERNEL_SIZES)
size_t fast_attention_scratch_size(void) { return ATTEND_SCRATCH; }
int32_t fast_attention_queries(int32_t head_dim) { return queries_of(head_dim); }
#endif

// Key/value heads of a task for rows of an answer: longer pieces of the cache's rows are read faster, but
// every thread should get several tasks.
static int heads_together(const attention_env * env, int group, int nth) {
    int heads = 4;
    while (heads > 1 && (heads * group > FEW_TOKENS || env->n_blocks * env->n_head_kv < 4 * nth * heads))
        heads /= 2;
    return heads;
}

// For rows of an answer, each key and value is read once for the few heads that share it; rows of prompts and
// views share tiles of keys.
static void run_fast(attention_task * t, int heads, const micro * m, char * scratch) {
    const attention_env * env = t->env;
    const attention_block * b = t->block;
    const int n_rows = b->n * t->group, width = env->n_head * t->d;
    const bool few = env->rows == ROWS_ANSWER;
    if (few ? t->d > MAX_HEAD : queries_of(t->d) < MAX_QUERIES || n_rows > MAX_QUERIES) {
        for (; heads > 0; heads--, t->head_kv++) run_task(t);
        return;
    }
    const int64_t at = (int64_t) b->first * width + (int64_t) t->head_kv * t->group * t->d;
    attention_work work = {
        .q = t->q + at,
        .y = t->y + at,
        .q_stride = (size_t) width,
        .n = b->n,
        .group = t->group,
        .d = t->d,
        .heads = heads,
        .n_visible = env->n_visible + b->first,
        .k = (const char *) t->k->data + head_offset(t, t->k),
        .v = (const char *) t->v->data + head_offset(t, t->v),
        .k_stride = t->k->nb[1],
        .v_stride = t->v->nb[1],
        .k_type = t->k->type,
        .v_type = t->v->type,
        .cells = b->cells,
        .first_row = b->first_row,
        .scratch = scratch,
    };
    if (!few) {
        m->attend_many(&work);
        return;
    }
    work.n = 1;
    for (int token = 0; token < b->n; token++, work.n_visible++) {
        for (int head = 0; head < t->group; head += FEW_TOKENS) {
            work.q = t->q + at + (int64_t) token * width + (int64_t) head * t->d;
            work.y = t->y + at + (int64_t) token * width + (int64_t) head * t->d;
            work.group = t->group - head < FEW_TOKENS ? t->group - head : FEW_TOKENS;
            m->attend_few(&work);
        }
    }
}

void KERNEL(fast_attention)(struct ggml_tensor * dst, int ith, int nth, void * userdata) {
    kernel_job * job = userdata;
    const attention_env * env = job->attention;
    attention_task t = new_task(env, dst, ith);
    const int heads = env->rows == ROWS_ANSWER ? heads_together(env, t.group, nth) : 1;
    const int64_t n_pieces = (env->n_head_kv + heads - 1) / heads, n_tasks = env->n_blocks * n_pieces;
    for (;;) {
        const int64_t task = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (task >= n_tasks || atomic_load_explicit(env->env.cancel, memory_order_relaxed)) return;
        t.block = &env->blocks[env->n_blocks - 1 - task / n_pieces]; // the longest first
        t.head_kv = (int) (task % n_pieces) * heads;
        const int left = env->n_head_kv - t.head_kv;
        run_fast(&t, left < heads ? left : heads, env->env.micro,
                 env->env.scratch + ith * env->env.scratch_size);
    }
}
