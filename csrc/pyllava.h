// pyllava.h - image and text in, text out: LLaVA-style inference.
//
//   pyllava_gguf     a parsed GGUF file: metadata and tensor table. Immutable.
//   pyllava_model    weights, vocabulary, hyper-parameters. Immutable; share it between threads.
//   pyllava_session  KV cache, compute buffers. One thread at a time; must not outlive its model.
//   pyllava_sampler  random state and last tokens of one answer. One thread at a time; may outlive its model.
//
// A function that can fail returns pyllava_status and writes results through trailing out_ pointers, which
// stay untouched on failure; pyllava_last_error() then explains in one line, on the same thread. Text is
// UTF-8 with a byte length. Shapes are row-major, slowest first. *_free(NULL) is fine. Nothing here prints,
// exits or aborts.

#ifndef PYLLAVA_H
#define PYLLAVA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define PYLLAVA_API __declspec(dllexport)
#else
#define PYLLAVA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define PYLLAVA_ABI 7 // raised with every incompatible change of this file

#define PYLLAVA_MAX_LAYERS 512

typedef enum pyllava_status {
    PYLLAVA_OK = 0,
    PYLLAVA_ERR_ARGUMENT = 1,    // the caller's mistake: null pointer, out of range, wrong state
    PYLLAVA_ERR_NOT_FOUND = 2,   // no such file
    PYLLAVA_ERR_IO = 3,          // the operating system refused to open, read or map
    PYLLAVA_ERR_FILE = 4,        // not a well-formed GGUF file
    PYLLAVA_ERR_MISMATCH = 5,    // well-formed, but its parts contradict each other or the other file
    PYLLAVA_ERR_UNSUPPORTED = 6, // a model this library does not run
    PYLLAVA_ERR_MEMORY = 7,      // what is needed does not fit; the text gives the numbers
    PYLLAVA_ERR_CONTEXT = 8,     // more positions than n_ctx, or than cells of the KV cache are free
    PYLLAVA_ERR_CANCELLED = 9,   // pyllava_session_cancel, or a progress callback that returned false
    PYLLAVA_ERR_NUMERIC = 10,    // NaN or infinite logits, or weights
    PYLLAVA_ERR_DEVICE = 11,     // the back end could not be started or failed
} pyllava_status;

typedef enum pyllava_precision {
    PYLLAVA_EXACT = 0, // f32 activations, full-precision weights, any thread count: same bytes
    PYLLAVA_FAST = 1,  // may round numbers to 8 or 12 bits; any thread count: same bytes
} pyllava_precision;

typedef enum pyllava_log_level {
    PYLLAVA_LOG_DEBUG = 10,
    PYLLAVA_LOG_INFO = 20,
    PYLLAVA_LOG_WARNING = 30
} pyllava_log_level;

typedef struct pyllava_gguf pyllava_gguf;
typedef struct pyllava_model pyllava_model;
typedef struct pyllava_session pyllava_session;
typedef struct pyllava_sampler pyllava_sampler;

typedef bool (*pyllava_progress_fn)(const char * stage, float fraction, void * user); // false cancels
typedef void (*pyllava_log_fn)(pyllava_log_level level, const char * text, void * user);
// Called for each named intermediate: f32, row-major [shape[0], ..., shape[n_dims - 1]].
typedef void (*pyllava_trace_fn)(const char * name, const float * data, const int64_t * shape, int n_dims,
                                 void * user);

PYLLAVA_API int pyllava_abi(void);                     // PYLLAVA_ABI of the library
PYLLAVA_API const char * pyllava_version(void);        // "0.1.0"
PYLLAVA_API const char * pyllava_engine_version(void); // the ggml version that was built in
PYLLAVA_API const char * pyllava_last_error(void);     // the last failure on this thread; "" before the first

// ---------------------------------------------------------------------------------------- plug-ins

// Loads a back end from a file. A library built with PYLLAVA_PLUGINS has no back end of its own: it needs the
// CPU's, whose file lies beside it, before anything else, and may be given others. Of n alternatives (builds
// for different CPUs) the one that suits this machine best is loaded. The paths are absolute. To be called
// before the first model is loaded, by one thread at a time. PYLLAVA_ERR_DEVICE: none of the files can be
// used, the text says why, and the library is as it was.
PYLLAVA_API pyllava_status pyllava_plugin_load(const char * const * paths, int32_t n);

// -------------------------------------------------------------------------------------- GGUF files

typedef struct pyllava_kv {
    const char * key;
    int32_t type;      // GGUF value type: 0 u8 1 i8 2 u16 3 i16 4 u32 5 i32 6 f32 7 bool 8 string 9 array ...
    int32_t item_type; // of an array's items; else equal to type
    uint64_t n;        // items of an array; else 1
    const void * data; // the packed little-endian items; NULL where they are strings
} pyllava_kv;

typedef struct pyllava_tensor_info {
    const char * name;
    const char * type; // ggml's name of it: "f16", "q8_0", ...
    int32_t n_dims;
    int64_t shape[4]; // row-major, slowest first
    uint64_t offset;  // from the start of the file
    uint64_t size;    // bytes
} pyllava_tensor_info;

PYLLAVA_API pyllava_status pyllava_gguf_open(const char * path, pyllava_gguf ** out_file);
PYLLAVA_API void pyllava_gguf_free(pyllava_gguf * file);
PYLLAVA_API uint32_t pyllava_gguf_version(const pyllava_gguf * file);
PYLLAVA_API uint32_t pyllava_gguf_alignment(const pyllava_gguf * file);
PYLLAVA_API uint64_t pyllava_gguf_n_kv(const pyllava_gguf * file);
PYLLAVA_API uint64_t pyllava_gguf_n_tensors(const pyllava_gguf * file);
PYLLAVA_API pyllava_status pyllava_gguf_kv(const pyllava_gguf * file, uint64_t i, pyllava_kv * out_kv);
// String i_item of key i: a pointer into the file and its bytes (no terminating zero).
PYLLAVA_API pyllava_status pyllava_gguf_string(const pyllava_gguf * file, uint64_t i, uint64_t i_item,
                                               const char ** out_text, uint64_t * out_size);
PYLLAVA_API pyllava_status pyllava_gguf_tensor(const pyllava_gguf * file, uint64_t i,
                                               pyllava_tensor_info * out_info);
// The bytes of key i in the file (its name, types and value), for copying it unchanged.
PYLLAVA_API pyllava_status pyllava_gguf_record(const pyllava_gguf * file, uint64_t i, uint64_t * out_offset,
                                               uint64_t * out_size);

// ----------------------------------------------------------------------------------------- devices

typedef enum pyllava_device_kind {
    PYLLAVA_DEVICE_CPU = 0,
    PYLLAVA_DEVICE_GPU = 1,        // with memory of its own
    PYLLAVA_DEVICE_INTEGRATED = 2, // shares the machine's memory
    PYLLAVA_DEVICE_OTHER = 3,      // accelerators that this library does not use
} pyllava_device_kind;

typedef struct pyllava_device {
    const char * name;                  // "CPU", "CUDA0", "Vulkan1": what the device parameters name
    const char * description;           // the maker's name of it
    const char * backend;               // "CPU", "CUDA", "Vulkan", ...
    int32_t kind;                       // pyllava_device_kind
    uint64_t memory_free, memory_total; // bytes; 0 where unknown
} pyllava_device;

// What this build finds on this machine; numbered from 0. Below 0: minus the status, nothing could be listed.
PYLLAVA_API int32_t pyllava_device_count(void);
PYLLAVA_API pyllava_status pyllava_device_describe(int32_t i, pyllava_device * out_device);
// Hardware threads that this process may use; fewer where a control group allows less of their time.
PYLLAVA_API int32_t pyllava_cpu_count(void);

// ---------------------------------------------------------------------------------- number formats

typedef struct pyllava_tensor_type {
    const char * name;                 // "f16", "q8_0", "q4_K", ...
    int32_t id;                        // in a GGUF file
    int64_t block;                     // elements that are stored together: a row is a multiple of it
    uint64_t block_size;               // their bytes
    bool can_quantize, can_dequantize; // from f32, to f32
} pyllava_tensor_type;

typedef struct pyllava_rows {
    const char * type;    // its name, in any case
    int64_t n, n_per_row; // f32 [n, n_per_row]; whole blocks
    int64_t first;        // number of the first row in messages
    uint64_t size;        // the exact bytes of all n rows of the type
} pyllava_rows;

// Converts rows of weights from f32 and to f32. The quantised rows are aligned to 8 bytes.
// PYLLAVA_ERR_NUMERIC names the first row that holds NaN, infinity or a number too large for the type; the
// rows before it are in out. Any number of threads may call it.
PYLLAVA_API pyllava_status pyllava_tensor_type_find(const char * name, pyllava_tensor_type * out_type);
PYLLAVA_API pyllava_status pyllava_quantize(const pyllava_rows * rows, const float * from, void * out);
PYLLAVA_API pyllava_status pyllava_dequantize(const pyllava_rows * rows, const void * from, float * out);

// ------------------------------------------------------------------------------------------- model

typedef struct pyllava_model_params {
    const char * path;   // language model (first file, if split)
    const char * mmproj; // vision tower and projector; NULL for text only
    bool use_mmap;       // true: weights stay in the file's pages; the file must not change
    // Where the parts lie. Layers that no device holds are computed by the CPU.
    const char * device;        // NULL or "auto": all GPUs; "cpu"; or names with commas between
    const char * vision_device; // NULL or "auto": the main GPU, where it fits; "cpu"; or a name
    int32_t n_gpu_layers;       // the last n, and the output with n > n_layer; -1: all that fit
    int32_t main_gpu;           // which of the devices takes the tower, from 0
    const float * tensor_split; // [n_tensor_split] shares of the devices; NULL: by free memory
    int32_t n_tensor_split;
    bool kv_on_host;                                // the KV cache in host memory, not beside its layer
    const struct pyllava_session_params * plan_for; // leaves memory for such a session; 0: the default
    pyllava_progress_fn progress;                   // may be NULL
    pyllava_log_fn log;                             // may be NULL
    void * user;
} pyllava_model_params;

// How a picture that is no square becomes square views.
typedef enum pyllava_aspect {
    PYLLAVA_PAD = 0,    // one view: the picture on a square of the mean colour
    PYLLAVA_SQUASH = 1, // one view: the picture without its shape
    PYLLAVA_ANYRES = 2, // LLaVA-1.6: the whole picture without its shape, then tiles of it
} pyllava_aspect;

typedef struct pyllava_model_info {
    int32_t n_vocab, n_embd, n_layer, n_head, n_head_kv, head_dim, n_ff, n_ctx_train;
    int32_t bos_id, eos_id, unk_id;                 // bos_id and unk_id may be -1: none
    bool add_bos;                                   // prompts begin with BOS
    bool space_prefix;                              // pyllava_tokenize puts a space in front of texts
    bool nfc;                                       // see pyllava_tokenize
    bool has_vision;                                // the fields below are 0 without it
    int32_t image_size, patch_size, n_image_tokens; // per view
    int32_t n_embd_vision, n_layer_vision, n_layer_vision_run;
    float image_mean[3], image_std[3];
    int32_t aspect;     // pyllava_aspect
    int32_t anyres_max; // LLaVA-OneVision's anyres_max_N: large grids of tiles are reduced; 0: they are not
    int32_t n_pinpoints;
    int32_t pinpoints[64][2];   // width, height: resolutions that the tiled picture may have
    uint64_t size, size_vision; // bytes of weights
} pyllava_model_info;

typedef struct pyllava_model_devices {
    int32_t n_layer;
    const char * layers[PYLLAVA_MAX_LAYERS]; // name of the device that computes it, "CPU" among them
    const char *output, *vision;             // vision: NULL for a text-only model
    bool kv_on_host;
    int32_t n_gpu_layers; // as the parameter counts them
} pyllava_model_devices;

PYLLAVA_API pyllava_status pyllava_model_load(const pyllava_model_params * params,
                                              pyllava_model ** out_model);
PYLLAVA_API void pyllava_model_free(pyllava_model * model);
// Where pyllava_model_load would put the parts, without loading them.
PYLLAVA_API pyllava_status pyllava_model_plan(const pyllava_model_params * params,
                                              pyllava_model_devices * out_devices);
PYLLAVA_API pyllava_status pyllava_model_describe(const pyllava_model * model, pyllava_model_info * out_info);
PYLLAVA_API pyllava_status pyllava_model_placement(const pyllava_model * model,
                                                   pyllava_model_devices * out_devices);
// The parsed files, for their metadata; owned by the model. mmproj is NULL for a text-only model.
PYLLAVA_API const pyllava_gguf * pyllava_model_file(const pyllava_model * model);
PYLLAVA_API const pyllava_gguf * pyllava_model_mmproj(const pyllava_model * model);

// --------------------------------------------------------------------------------------- tokenizer

typedef struct pyllava_range {
    uint64_t begin, end;
} pyllava_range; // bytes [begin, end)

// Text to token ids. Special tokens are recognised in the whole text except in `plain`, ascending byte
// ranges of a user's own words. n_bytes + 2 ids are nearly always enough; where they are not, out_n receives
// the count that is needed with PYLLAVA_ERR_ARGUMENT. Text that is not UTF-8 is an error. Models whose info
// says nfc were trained on texts in Unicode's normalisation form C: others are the caller's to normalise,
// each stretch between the ends of plain ranges by itself.
PYLLAVA_API pyllava_status pyllava_tokenize(const pyllava_model * model, const char * text, uint64_t n_bytes,
                                            const pyllava_range * plain, uint64_t n_plain, bool add_bos,
                                            int32_t * out_ids, uint64_t n_max, uint64_t * out_n);
// The bytes of one token as they stand in an answer ("" for control tokens unless with_special); may be part
// of a character.
PYLLAVA_API pyllava_status pyllava_token_piece(const pyllava_model * model, int32_t id, bool with_special,
                                               const char ** out_text, uint64_t * out_size);
PYLLAVA_API bool pyllava_token_is_end(const pyllava_model * model, int32_t id); // ends an answer

// ----------------------------------------------------------------------------------------- session

typedef struct pyllava_session_params {
    int32_t n_ctx;       // positions per sequence
    int32_t n_batch;     // positions computed at once in prefill, 1..2048
    int32_t n_seq;       // independent sequences, 1..256
    int32_t n_threads;   // 0: one per physical core
    int32_t n_views;     // image views encoded at once, >= 1; fewer where they have more than 4096 patches
    const char * type_k; // "f32" "f16" "bf16" "q8_0" ...; NULL: f32 when exact, f16 when fast
    const char * type_v;
    pyllava_precision precision;
    int32_t flash_attn; // on devices: 1 on, 0 off, -1: if supported, in the fast mode
    // Cells of the KV cache, n_ctx..n_ctx * n_seq. A cell holds one position, for all sequences that share it
    // (pyllava_seq_copy).
    // A sequence takes cells as it grows. 0: n_ctx for each sequence.
    int32_t kv_cells;
} pyllava_session_params;

// The most memory that a session with these parameters takes, in bytes. In host memory the KV cache takes its
// share only as cells are used.
typedef struct pyllava_session_plan {
    uint64_t kv_size, compute_size, compute_size_vision;
} pyllava_session_plan;

// A stretch of positions: n token ids, or n rows of image embeddings f32 [n, n_embd] (then tokens is NULL
// and key names the picture: rows with equal key and index are taken to be equal when a prompt is compared
// with what a sequence holds).
typedef struct pyllava_span {
    const int32_t * tokens;
    const float * embd;
    uint64_t key;
    int32_t n;
} pyllava_span;

PYLLAVA_API pyllava_status pyllava_session_create(const pyllava_model * model,
                                                  const pyllava_session_params * params,
                                                  pyllava_session ** out_session);
PYLLAVA_API void pyllava_session_free(pyllava_session * session);
PYLLAVA_API pyllava_status pyllava_session_memory(const pyllava_session * session,
                                                  pyllava_session_plan * out_plan);

// The one call allowed from another thread: makes the running call (or the next) end with
// PYLLAVA_ERR_CANCELLED, until it is called again with false.
PYLLAVA_API void pyllava_session_cancel(pyllava_session * session, bool cancel);
// Called for every named intermediate of later computations; NULL stops it. Slow.
PYLLAVA_API void pyllava_session_trace(pyllava_session * session, pyllava_trace_fn fn, void * user);
PYLLAVA_API void pyllava_session_progress(pyllava_session * session, pyllava_progress_fn fn, void * user);

// Image views f32 [n_views, 3, image_size, image_size] (normalised) to embeddings f32 [n_views,
// n_image_tokens, n_embd].
PYLLAVA_API pyllava_status pyllava_encode(pyllava_session * session, const float * pixels, int32_t n_views,
                                          float * out_embd);

// How the views of one picture lie: the first shows the whole of it, columns x rows tiles follow row by row.
typedef struct pyllava_layout {
    int32_t columns, rows; // 0, 0: the first view alone
    int32_t width, height; // of the picture in pixels; tells how the grid was padded
    bool flat;             // true: neither unpadding nor newline (always so in LLaVA-1.5)
} pyllava_layout;

// The rows that one picture becomes for the language model: those of the whole picture, then those of the
// tiles as one grid, without its padding and with the learned newline after each of its rows (LLaVA-NeXT's
// spatial_unpad). views: f32 [1 + columns * rows, n_image_tokens, n_embd]; out_rows: f32 [n, n_embd] with n
// from pyllava_merge_length.
PYLLAVA_API pyllava_status pyllava_merge_length(const pyllava_model * model, const pyllava_layout * layout,
                                                int32_t * out_n);
PYLLAVA_API pyllava_status pyllava_merge(const pyllava_model * model, const pyllava_layout * layout,
                                         const float * views, float * out_rows);

// log_prob is the natural logarithm of the probability that the model itself gives the token: softmax of the
// unchanged logits over the whole vocabulary at temperature 1, before the mask and any stage of the sampler.
// It is exact to 3e-6 and the rounding to float32.
typedef struct pyllava_choice {
    int32_t id;
    float log_prob;
} pyllava_choice;

// Rows of prompts and rows of answers are computed in different ways, whose sums round differently. A row's
// numbers depend on its content, its kind and the positions before it, never on the rows that are computed in
// the same step.
typedef enum pyllava_row_kind { PYLLAVA_PROMPT, PYLLAVA_ANSWER } pyllava_row_kind;

#define PYLLAVA_LAST    (-1)      // first: the last row
#define PYLLAVA_NOTHING INT32_MAX // first: no row

// Rows to be computed for one sequence, and the results that are wanted.
typedef struct pyllava_run {
    int32_t seq;
    bool append; // the spans follow what the sequence holds; false: they are all that it is to hold
    pyllava_row_kind kind;
    const pyllava_span * spans; // [n_spans]
    int32_t n_spans;
    int32_t first;    // logits of the rows from this one on, counted from the first row of the spans
    float * logits;   // f32 [rows from that one on, n_vocab]; NULL where none are wanted
    int32_t n_reused; // receives how many rows the sequence held already
    // Instead of logits (then first is PYLLAVA_LAST): the sampler chooses a token from the logits of the last
    // row, as pyllava_sample does. Samplers run after all runs have been computed, so a step that fails
    // leaves them as they were.
    pyllava_sampler * sampler; // NULL: none; one run's alone
    const uint32_t * mask;
    int32_t n_alternatives;
    pyllava_choice *choice, *alternatives;
} pyllava_run;

// Computes one step of several sequences, each at most once. A run that does not append reuses the rows that
// its sequence already begins with (of the same content and kind), up to the row `first`, and drops the
// others; the remaining rows are computed in as few graphs as possible (of at most n_batch rows of prompts
// and 64 rows of logits). On failure no run has happened: a sequence that was appended to holds what it held,
// any other may hold only the rows that its run would have reused. The sequence of a prompt whose logits are
// NaN or infinite is emptied.
PYLLAVA_API pyllava_status pyllava_step(pyllava_session * session, pyllava_run * runs, int32_t n_runs);

// Computes up to n_steps steps in one call. The runs are those of the first step: each appends rows of an
// answer and has a sampler. Every further step appends the tokens chosen in the step before. choice has room
// for n_steps, alternatives for n_steps * n_alternatives. The call ends after n_steps, after a step that
// chose a token that ends an answer, or when `seconds` have passed. out_n_steps receives the number of
// completed steps; these are kept even if the next step fails, and only a failure of the first step is an
// error. The runs are changed.
PYLLAVA_API pyllava_status pyllava_generate(pyllava_session * session, pyllava_run * runs, int32_t n_runs,
                                            int32_t n_steps, double seconds, int32_t * out_n_steps);

// Three uses of pyllava_step.
//
// Makes sequence seq hold exactly these spans and gives the last row's logits f32 [n_vocab]. Only the rows
// after the prefix that it already holds are computed, and always the last one. On failure the sequence holds
// the part computed so far. out_n_reused may be NULL.
PYLLAVA_API pyllava_status pyllava_prefill(pyllava_session * session, int32_t seq, const pyllava_span * spans,
                                           int32_t n_spans, float * out_logits, int32_t * out_n_reused);
// The same, but gives the logits of every row, f32 [sum of n, n_vocab], so nothing is reused.
PYLLAVA_API pyllava_status pyllava_logits(pyllava_session * session, int32_t seq, const pyllava_span * spans,
                                          int32_t n_spans, float * out_logits);
// Appends token ids[i] to sequence seqs[i] (each at most once) in one step; logits f32 [n, n_vocab].
PYLLAVA_API pyllava_status pyllava_decode(pyllava_session * session, const int32_t * seqs,
                                          const int32_t * ids, int32_t n, float * out_logits);

PYLLAVA_API pyllava_status pyllava_seq_length(const pyllava_session * session, int32_t seq, int32_t * out_n);
// How many rows of these runs, one after the other, a sequence begins with: rows of the same content and
// kind. Only the spans and kinds of the runs are read.
PYLLAVA_API pyllava_status pyllava_seq_shared(const pyllava_session * session, int32_t seq,
                                              const pyllava_run * runs, int32_t n_runs, int32_t * out_n);
// How many of the KV cache's cells would be free if these sequences, each at most once, held nothing.
PYLLAVA_API pyllava_status pyllava_cells_free(pyllava_session * session, const int32_t * seqs, int32_t n,
                                              int32_t * out_n);
PYLLAVA_API pyllava_status pyllava_seq_trim(pyllava_session * session, int32_t seq,
                                            int32_t n); // keep the first n
PYLLAVA_API pyllava_status pyllava_seq_copy(pyllava_session * session, int32_t from, int32_t to,
                                            int32_t n); // shares cells

// ----------------------------------------------------------------------------------------- sampler

typedef struct pyllava_bias {
    int32_t id;
    float bias; // is added to the token's logit; -INFINITY: it is not to be chosen
} pyllava_bias;

// Names, defaults and formulas are llama.cpp's. Only tokens that this sampler chose count for the penalties
// and for DRY, never those of the prompt.
typedef struct pyllava_sampler_params {
    float temperature;       // <= 0: greedy, if dynatemp_range is 0
    float dynatemp_range;    // 0: off; else temperature +- range: least at no entropy, most at the largest,
    float dynatemp_exponent; // least + (most - least) * (entropy / ln n)^exponent
    int32_t top_k;           // 0: off
    float top_p;             // 1: off
    float min_p;             // 0: off
    float typical_p;         // 1: off
    float top_n_sigma;       // <= 0: off
    float xtc_probability;   // 0: off; that of excluding the top choices for a token
    float xtc_threshold;     // probability that makes a token one of them; above 0.5: off
    float repeat_penalty;    // 1: off
    float presence_penalty;  // 0: off
    float frequency_penalty; // 0: off
    int32_t repeat_last_n;   // the penalties apply to the last n tokens
    // DRY: a token that would continue a repeat of n >= allowed_length tokens loses multiplier * base^(n -
    // allowed_length). Repeats do not reach over the text of a breaker (1..40 bytes).
    float dry_multiplier; // 0: off
    float dry_base;
    int32_t dry_allowed_length;
    int32_t dry_penalty_last_n;                 // tokens that are looked back on
    const char * const * dry_sequence_breakers; // [n_dry_sequence_breakers], terminated by zeros
    int32_t n_dry_sequence_breakers;
    int32_t mirostat;      // 0: off; version 1 or 2. Bias, temperature and it are then the only stages
    float mirostat_tau;    // bits of surprise that are aimed at
    float mirostat_eta;    // rate of learning
    float adaptive_target; // < 0: off; adaptive-p: probability that is aimed at
    float adaptive_decay;  // it remembers about 1 / (1 - decay) tokens
    const pyllava_bias * logit_bias; // [n_logit_bias]; those of one token add up
    int32_t n_logit_bias;
    bool ignore_eos; // tokens that end an answer are not to be chosen
    // Which stages there are, in this order: [n_samplers] names. NULL: penalties, dry, top_n_sigma, top_k,
    // typ_p, top_p, min_p, xtc, temperature, adaptive_p. One that is not named is off, whatever its options;
    // without "temperature", it is 1. adaptive_p always comes last.
    const char * const * samplers;
    int32_t n_samplers;
    uint64_t seed;
} pyllava_sampler_params;

// For the vocabulary of this model. All its memory is taken here; arrays of params are copied.
PYLLAVA_API pyllava_status pyllava_sampler_create(const pyllava_model * model,
                                                  const pyllava_sampler_params * params,
                                                  pyllava_sampler ** out_sampler);
PYLLAVA_API void pyllava_sampler_free(pyllava_sampler * sampler);
// Chooses from logits f32 [n_vocab] and remembers the choice. The stages: mask, logit_bias and ignore_eos,
// then those of params.samplers, then a draw; of equal logits the lowest ids come first. No stage but the
// mask leaves nothing: tokens that are not to be chosen are, where the mask leaves no others. The same seed
// and logits give the same tokens on every platform (with mirostat or dynatemp_range only as far as the C
// library's log and pow have the same digits). Takes no memory.
// mask: a bit for each token, number id % 32 of word id / 32, set where it may be chosen; NULL: any may.
// PYLLAVA_ERR_ARGUMENT where it leaves none.
// out_alternatives: [n_alternatives], at most n_vocab: the most probable tokens by log_prob, whatever the
// stages made of them; may be NULL for 0.
PYLLAVA_API pyllava_status pyllava_sample(pyllava_sampler * sampler, const float * logits,
                                          const uint32_t * mask, int32_t n_alternatives,
                                          pyllava_choice * out_choice, pyllava_choice * out_alternatives);

#ifdef __cplusplus
}
#endif
#endif
