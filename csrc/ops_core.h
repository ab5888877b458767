// The native ops of dense models: argument structs and the functions that check tensors and fill
// them. Files of one op include this, not ops.h, so that another op compiles none of them anew.
#pragma once
#include <cstdint>

#include "common/formats.h"
#include "common/team.h"
#include "common/tensor.h"

namespace fastllm {

// y[rows, n] = (h * rsqrt(mean(h^2) + eps)) * weight with h = x, or h = residual + x (then h is
// stored). Rows are indexed [outer, inner] so that heads of a fused projection need no copy. One
// row per task step; bound by memory.
struct RmsNormArgs {
  void* y;                // [outer, inner, n] contiguous
  const void* x;          // [outer, inner, n], rows contiguous
  const void* weight;     // [n]
  const float* residual;  // [outer, inner, n] contiguous, or null
  float* h;               // where residual + x goes, or null
  DType y_type, x_type, weight_type;
  int64_t outer, inner, n, x_outer_stride, x_inner_stride;
  float eps;
};
RmsNormArgs rms_norm_args(Tensor y, Tensor x, Tensor weight, Tensor residual, Tensor h, double eps);

// The gradients of the norm: with n = x * rstd and g = dy * weight,
//   dx = rstd * (g - n * mean(g * n)) [+ dh],  dweight = sum over rows of dy * n.
// Rows are taken in chunks of rms_norm_chunk_rows(n); `partial` gets the dweight of each.
struct RmsNormBackwardArgs {
  void* dx;          // [outer, inner, n] contiguous, or null: not wanted
  float* dresidual;  // the same in fp32, or null
  void* dweight;     // [n], or null
  float* partial;    // [chunks, n], with dweight
  const void* dy;    // [outer, inner, n] contiguous
  const float* dh;   // [outer, inner, n] contiguous, or null
  const void* x;     // [outer, inner, n], rows contiguous
  const void* weight;
  DType dx_type, dweight_type, dy_type, x_type, weight_type;
  int64_t outer, inner, n, x_outer_stride, x_inner_stride;
  float eps;
};
RmsNormBackwardArgs rms_norm_backward_args(Tensor dx, Tensor dresidual, Tensor dweight,
                                           Tensor partial, Tensor dy, Tensor dh, Tensor x,
                                           Tensor weight, double eps);
// A chunk's sums are 1/16 of its rows or less, and a few hundred rows are work for many threads.
constexpr int64_t rms_norm_chunk_rows(int64_t n) {
  const int64_t rows = 16384 / (n > 0 ? n : 1);
  return rows < 16 ? 16 : rows > 256 ? 256 : rows;
}
int64_t rms_norm_backward_scratch(int64_t rows, int64_t n);  // floats of `partial`

// What x is brought to before it meets quantized weights.
enum class Activation : uint8_t { int8, bf16, fp32, fp8 };

// Where a product goes: y[m, n] = round(sums + bias), or round(base + scale * sums).
struct MatmulOutput {
  void* y;           // [m, n], rows contiguous
  const void* bias;  // [n], or null
  DType y_type, bias_type;
  int64_t n, y_stride;
  const float* base = nullptr;  // [m, n], rows contiguous, or null
  int64_t base_stride = 0;
  float scale = 1.f;
};

// y = x @ W.T + bias with W [n, k] packed. Few rows are bound by the bytes of W, many by
// multiplications.
struct QuantMatmulArgs {
  MatmulOutput out;
  const void* x;  // [m, k], rows contiguous
  const void* data;
  const void* scales;
  void* scratch;  // prepared_bytes(m, k): rows that all threads share; null: each prepares its own
  DType x_type;
  Format format;
  Activation activation;
  int64_t m, k, x_stride;
};
QuantMatmulArgs quant_matmul_args(Tensor y, Tensor x, Tensor data, Tensor scales, int64_t format,
                                  int64_t n, Tensor bias, int64_t activation, Tensor scratch);

// dx = dy @ W with W [n, k] packed in a quantized format: the gradient of quant_matmul's input.
struct QuantMatmulInputGradArgs {
  MatmulOutput out;  // dx [m, k]
  const void* dy;    // [m, n], rows contiguous
  const void* data;
  const void* scales;
  void* scratch;  // as in QuantMatmulArgs, for rows of n
  DType type;     // of dy, and what values of W are rounded to
  Format format;
  int64_t m, n, dy_stride;
};
QuantMatmulInputGradArgs quant_matmul_input_grad_args(Tensor dx, Tensor dy, Tensor data,
                                                      Tensor scales, int64_t format,
                                                      Tensor scratch);

// y = x @ weight.T + bias, weight [n, k] in rows: panels are packed on the way, with the sums of
// quant_matmul.
struct LinearArgs {
  MatmulOutput out;
  const void* x;       // [m, k], rows contiguous
  const void* weight;  // [n, k], rows contiguous
  void* scratch;       // as in QuantMatmulArgs
  DType type;          // of x and weight
  int64_t m, k, x_stride, weight_stride;
};
LinearArgs linear_args(Tensor y, Tensor x, Tensor weight, Tensor bias, Tensor scratch);

// y = round(base + scale * (t @ b.T)): the product of a low-rank adapter, summed onto another one
// of fp32 [m, n] before the one rounding.
LinearArgs lora_add_args(Tensor y, Tensor t, Tensor b, Tensor base, double scale, Tensor scratch);

// y[t, h] = weight[h] @ x[t, h], and behind it a copy of tail[t, h]: each head has a weight [n, k] of
// its own, whose rows or whose columns are contiguous. The sums are those of linear.
struct HeadLinearArgs {
  char* y;             // [tokens, heads, n + tail_dim] contiguous
  const char* x;       // [tokens, heads, k], heads contiguous
  const char* weight;  // [heads, n, k]
  const char* tail;    // [tokens, heads, tail_dim], heads contiguous, or null
  DType type;          // of all
  bool transposed;     // the columns of a head's weight are contiguous, not its rows
  int64_t tokens, heads, n, k, tail_dim;
  int64_t x_token_stride, x_head_stride, weight_head_stride, weight_stride;  // in elements
  int64_t tail_token_stride, tail_head_stride;
};
HeadLinearArgs head_linear_args(Tensor y, Tensor x, Tensor weight, Tensor tail);

// y[i] = row ids[i] of a table, zeros for an id outside it.
struct EmbeddingArgs {
  void* y;  // [count, k] contiguous
  const void* ids;
  const void* data;  // dense: [n, k], rows contiguous
  const void* scales;
  DType y_type, ids_type, data_type;
  bool packed;
  Format format;
  int64_t count, n, k, row_stride;
};
EmbeddingArgs embedding_args(Tensor y, Tensor ids, Tensor weight);
EmbeddingArgs quant_embedding_args(Tensor y, Tensor ids, Tensor data, Tensor scales, int64_t format,
                                   int64_t n);

// dweight[id] = sum of the rows of dy with that id, in their order. Ids are sorted by counting, then
// ranges of the table are shared among the threads.
struct EmbeddingBackwardArgs {
  void* dweight;    // [n, k] contiguous
  const void* dy;   // [count, k] contiguous
  const void* ids;  // [count]
  int32_t* order;   // [n + 1] ends of the ids' runs, then [count] tokens sorted by id
  DType dweight_type, dy_type, ids_type;
  int64_t count, n, k;
};
EmbeddingBackwardArgs embedding_backward_args(Tensor dweight, Tensor dy, Tensor ids, Tensor order);

// One step of AdamW on every element; see fastllm/ops/adamw.py. Bound by memory: 30 bytes an
// element of a bf16 parameter with fp32 gradient and master.
struct AdamwStepArgs {
  void* param;
  float *master, *exp_avg, *exp_avg_sq;  // master null: the parameter is fp32 and its own
  const void* grad;
  const float* grad_scale;  // one value, or null
  DType param_type, grad_type;
  int64_t count;
  float decay, new_share, keep_sq, new_share_sq, rate, inverse_root, eps;
};
AdamwStepArgs adamw_step_args(Tensor param, Tensor master, Tensor exp_avg, Tensor exp_avg_sq,
                              Tensor grad, Tensor grad_scale, double lr, double beta1, double beta2,
                              double eps, double weight_decay, int64_t step);

// The sum of squares: of chunks of kSquaresChunk elements, then of the chunks in order.
struct SumOfSquaresArgs {
  float* total;    // one value
  float* partial;  // [chunks]
  const void* x;
  DType dtype;
  int64_t count;
};
SumOfSquaresArgs sum_of_squares_args(Tensor total, Tensor partial, Tensor x);
constexpr int64_t kSquaresChunk = 16384;
int64_t sum_of_squares_scratch(int64_t count);  // floats of `partial`

// Rows of a file (GGUF blocks) or of a dense tensor into panels of 16 interleaved rows.
struct PackArgs {
  void *data, *scales;
  const void* rows;        // [n, bytes of a row] or [n, k]; by_rows: data with R = 1
  const void* row_scales;  // by_rows: scales with R = 1
  DType rows_type;
  Format format;
  bool by_rows;  // the rows are packed one by one
  int64_t n, k, row_stride;
};
PackArgs pack_args(Tensor data, Tensor scales, Tensor rows, int64_t format, int64_t n, int64_t k);
PackArgs pack_rows_args(Tensor data, Tensor scales, Tensor row_data, Tensor row_scales,
                        int64_t format, int64_t n, int64_t k);

// The inverse: rows packed one by one (R = 1), or the blocks of a GGUF file.
struct UnpackArgs {
  void *rows, *row_scales;  // contiguous
  const void *data, *scales;
  Format format;
  bool by_rows;
  int64_t n, k;
};
UnpackArgs unpack_rows_args(Tensor row_data, Tensor row_scales, Tensor data, Tensor scales,
                            int64_t format, int64_t n, int64_t k);
UnpackArgs unpack_blocks_args(Tensor rows, Tensor data, Tensor scales, int64_t format, int64_t n,
                              int64_t k);

// y[tokens, heads, dim] = x with the first 2 * half dimensions of every head rotated (half-split
// layout).
struct RopeArgs {
  void* y;        // contiguous
  const void* x;  // heads contiguous
  const int32_t* positions;
  const float *cos, *sin;  // [table_rows, half]
  DType dtype;
  int64_t tokens, heads, dim, half, table_rows, x_token_stride, x_head_stride;
};
RopeArgs rope_args(Tensor y, Tensor x, Tensor positions, Tensor cos, Tensor sin);

// How the two products of a gated feed-forward become one value (see cpu/gated_activation.h); the
// order is that of fastllm/ops/gated_activation.py.
enum class Gating : uint8_t { silu, gelu, gelu_tanh, swiglu_oai };

// y[outer, inner, n] = act(gate) * up.
struct SwigluArgs {
  void* y;
  const void *gate, *up;
  DType dtype;
  Gating gating;
  int64_t outer, inner, n, gate_outer, gate_inner, up_outer, up_inner;
};
SwigluArgs swiglu_args(Tensor y, Tensor gate, Tensor up, int64_t gating);

// The gradients of gate and up, side by side in one row of 2 n. Bound by memory.
struct SwigluBackwardArgs {
  void* both;      // [outer, inner, 2 n] contiguous
  const void* dy;  // [outer, inner, n] contiguous
  const void *gate, *up;
  DType dtype;
  Gating gating;
  int64_t outer, inner, n, gate_outer, gate_inner, up_outer, up_inner;
};
SwigluBackwardArgs swiglu_backward_args(Tensor both, Tensor dy, Tensor gate, Tensor up,
                                        int64_t gating);

// Where the tokens of each sequence lie: rows of q, k, v and pages of the cache (see cpu/paging.h).
struct Paging {
  const int32_t *block_table, *cu_seqlens, *cache_seqlens;
  int64_t sequences, table_width, table_stride, tokens, num_pages, page_size;
};
constexpr int64_t kMaxHeadDim = 576;  // a latent of 512 and a rotated key of 64

// The caches that new keys and values go to: [num_pages, kv_heads, page_size, dim | value_dim], the
// bytes of a (page, head) interleaved: K [page/16][dim/w][16][w], V [page/w][dim][w], w = 1 for f32
// and 2 for narrower types.
struct KvTarget {
  void *k_cache, *v_cache;
  float *k_scales, *v_scales;  // [num_pages, kv_heads, page_size] of int8 caches; others: null
  Paging paging;
  DType dtype;  // of the new keys and values, and of the caches unless these are int8
  int64_t kv_heads, dim, value_dim;
};
struct Rows {  // [tokens, heads, dim], heads contiguous; strides in elements
  const void* data;
  int64_t token_stride, head_stride;
};
struct AppendKvArgs {
  KvTarget to;
  Rows k, v;
};
AppendKvArgs append_kv_args(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor block_table,
                            Tensor cu_seqlens, Tensor cache_seqlens, Tensor k_scales,
                            Tensor v_scales);

struct RopeAppendKvArgs {
  KvTarget to;
  Rows q, k, v;
  void* q_out;  // [tokens, heads, dim] contiguous
  const int32_t* positions;
  const float *cos, *sin;  // [table_rows, half]
  int64_t heads, half, table_rows;
};
RopeAppendKvArgs rope_append_kv_args(Tensor q_out, Tensor q, Tensor k, Tensor v, Tensor positions,
                                     Tensor cos, Tensor sin, Tensor k_cache, Tensor v_cache,
                                     Tensor block_table, Tensor cu_seqlens, Tensor cache_seqlens,
                                     Tensor k_scales, Tensor v_scales);

// New rows of the compressed cache [num_pages, page_size, latent | rope_key], in natural order.
// Strides and sizes are in bytes.
struct AppendMlaArgs {
  char* cache;
  const char *latent, *rope_key;
  Paging paging;
  int64_t latent_bytes, rope_key_bytes, latent_stride, rope_key_stride;
};
AppendMlaArgs append_mla_args(Tensor latent, Tensor rope_key, Tensor cache, Tensor block_table,
                              Tensor cu_seqlens, Tensor cache_seqlens);

// The query side of attention, whatever the keys come from. Positions are cut into splits of 512;
// with `partials` the splits of a row may run on several threads, to the same bits.
struct AttentionRows {
  void* o;     // [tokens, heads, value_dim] contiguous
  float* lse;  // natural logarithm, or null
  Rows q;
  const float* sinks;  // [heads], or null
  float* partials;     // [splits, tokens, heads, value_dim rounded up to 16 + 16], or null
  DType dtype;         // of q and o
  int64_t tokens, heads, kv_heads, dim, value_dim;
  int64_t window_left, window_right;  // keys seen before and after a query's position; -1: all
  float scale, softcap;               // softcap 0: none
};

// Attention over rows of keys and values in natural order: batches [B, T, H, D], or documents cut
// out of [T, H, D] by cu_seqlens.
struct AttentionArgs {
  AttentionRows rows;
  Rows k, v;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [documents + 1], or null: batches
  const uint8_t* key_mask;                     // a byte for each key, or null
  void* packed;  // scratch for the words of K and V, see attention_scratch; or null
  int64_t documents, queries, keys;  // queries, keys: of each batch, or of all documents
  int64_t q_batch_stride, k_batch_stride, v_batch_stride, mask_batch_stride;
};
AttentionArgs attention_args(Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v,
                             Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor key_mask,
                             Tensor sinks, Tensor scratch, double scale, int64_t window_left,
                             int64_t window_right, double softcap);
// How many f32 the scratch of a call should have (0: none is of use); without it the call is right
// too, and slower.
int64_t attention_scratch(const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& cu_seqlens_q);

// Causal attention over the paged cache.
struct PagedAttentionArgs {
  AttentionRows rows;
  const void *k_cache, *v_cache;
  const float *k_scales, *v_scales;  // [num_pages, kv_heads, page_size] of int8 caches, or null
  Paging paging;
  DType cache_dtype;
};
PagedAttentionArgs paged_attention_args(Tensor o, Tensor q, Tensor k_cache, Tensor v_cache,
                                        Tensor block_table, Tensor cu_seqlens, Tensor cache_seqlens,
                                        Tensor k_scales, Tensor v_scales, Tensor sinks,
                                        Tensor partials, double scale, int64_t window_left,
                                        double softcap);

// The same over the compressed cache [num_pages, page_size, columns] in natural order: one KV head,
// whose values are the first columns of its keys.
struct MlaAttentionArgs {
  AttentionRows rows;
  const void* cache;
  Paging paging;
};
MlaAttentionArgs mla_attention_args(Tensor o, Tensor q, Tensor cache, Tensor block_table,
                                    Tensor cu_seqlens, Tensor cache_seqlens, Tensor partials,
                                    int64_t value_dim, double scale);

// Rows [batch, tokens, heads, dim], dim contiguous; strides in elements.
struct BatchRows {
  const void* data;
  int64_t batch_stride, token_stride, head_stride;
};

// Gradients of attention over batches of one length, or documents one after the other (then
// cu_seqlens are given and batches is 1). See cpu/attention_backward.cpp.
struct AttentionBackwardArgs {
  void *dq, *dk, *dv;  // contiguous, like q, k, v
  float* dsinks;       // [heads]
  BatchRows grad_o, q, k, v, o;
  BatchRows grad_lse;                          // f32, one element a row; data may be null
  const float* lse;                            // [batch, heads, queries]
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [documents + 1], or null
  const uint8_t* key_mask;                     // [batch, keys], or null
  const float* sinks;                          // [heads], or null
  float *delta, *dq_sums;                      // the two parts of scratch
  int64_t window_left, window_right;           // -1: no bound
  int64_t batches, documents, queries, keys;
  int32_t heads, kv_heads, dim, value_dim;
  float scale, softcap;
  DType dtype;
};
AttentionBackwardArgs attention_backward_args(Tensor dq, Tensor dk, Tensor dv, Tensor dsinks,
                                              Tensor grad_o, Tensor grad_lse, Tensor q, Tensor k,
                                              Tensor v, Tensor o, Tensor lse, Tensor cu_seqlens_q,
                                              Tensor cu_seqlens_k, Tensor key_mask, Tensor sinks,
                                              Tensor scratch, double scale, int64_t window_left,
                                              int64_t window_right, double softcap);
// Floats of scratch: delta, batches * heads * queries of them, and, where the dQ of a KV head of
// `queries` rows is more than a thread keeps, fp32 sums of dQ: (batches * queries + 8 * documents) *
// heads * dim, dim rounded up to 16.
int64_t attention_backward_scratch(int64_t batches, int64_t documents, int64_t queries,
                                   int64_t heads, int64_t kv_heads, int64_t dim);
constexpr int64_t kThreadGradientBytes = 1 << 20;

// Log-softmax of logits rows at chosen ids; NaN at ids outside [0, columns).
struct LogProbsArgs {
  float* out;           // [rows, picks]
  float* scratch;       // [rows, ceil(columns / 512), 2]
  const float* logits;  // [rows, columns]
  const void* ids;      // [rows, picks] int32, or int64 if long_ids
  int64_t rows, columns, stride, picks;
  bool long_ids;
};
LogProbsArgs log_probs_args(Tensor out, Tensor scratch, Tensor logits, Tensor ids);

// The k largest log-probabilities of each row, descending, ties to the lower id.
struct TopLogProbsArgs {
  float* values;        // [rows, k]
  int32_t* ids;         // [rows, k]
  float* scratch;       // [rows, ceil(columns / 512), 2]
  const float* logits;  // [rows, columns]
  int64_t rows, columns, stride, k;
};
TopLogProbsArgs top_log_probs_args(Tensor values, Tensor ids, Tensor scratch, Tensor logits);

// One sampled token per row (see cpu/sampling.cpp). Everything per row is read when the kernel
// runs.
struct SamplingArgs {
  int32_t* ids;
  float *logprob, *logprob_t;
  float* scratch;       // [rows, ceil(columns / 512) * 6 + 1]
  const float* logits;  // [rows, columns]
  const float* temperature;
  const int32_t* top_k;
  const float *top_p, *min_p, *repetition, *presence, *frequency;
  const int64_t* seed;
  const int32_t* position;
  const uint8_t* penalized;
  int32_t* counts;           // [rows, columns], or null: no penalties
  const uint8_t* in_prompt;  // [rows, columns], or null
  const int32_t* banned;     // [rows, num_banned]
  int64_t rows, columns, stride, num_banned;
};
SamplingArgs sampling_args(Tensor ids, Tensor logprob, Tensor logprob_t, Tensor scratch,
                           Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p,
                           Tensor min_p, Tensor repetition, Tensor presence, Tensor frequency,
                           Tensor seed, Tensor position, Tensor penalized, Tensor counts,
                           Tensor in_prompt, Tensor banned);

// z = cap(logit) * inverse_temperature, cap(l) = softcap * tanh(l / softcap); softcap 0: none.
struct LogitScale {
  float softcap, inverse_temperature;
  bool changes() const { return softcap != 0.f || inverse_temperature != 1.f; }
};

// One target a row of logits: losses, and the gradient of the logits (see cpu/loss_rows.cpp). The
// logits are overwritten by z where scaling changes them.
struct LossRowsArgs {
  float* logits;                          // [rows, columns]
  const void* targets;                    // [rows] int32, or int64 if long_targets
  float *out, *lse, *entropy;             // [rows]; entropy may be null
  const float *given_lse, *coefficients;  // [rows], [rows, 4]: only the gradient is made; or null
  void* d;                                // [rows, columns], or null
  LogitScale scaling;
  DType d_type;
  bool long_targets, is_loss;  // is_loss: out is the cross entropy, else the log-probability
  float label_smoothing, z_loss, scale;  // scale: of the gradient of a loss
  int64_t rows, columns, stride, d_stride;
};
LossRowsArgs log_prob_rows_args(Tensor logprob, Tensor lse, Tensor entropy, Tensor logits,
                                Tensor targets, double temperature, double softcap);
LossRowsArgs cross_entropy_rows_args(Tensor loss, Tensor lse, Tensor d, Tensor logits,
                                     Tensor targets, double softcap, double label_smoothing,
                                     double z_loss, double scale);
LossRowsArgs target_gradient_rows_args(Tensor d, Tensor logits, Tensor targets, Tensor lse,
                                       Tensor coefficients, double temperature, double softcap);

// Divergences of rows of logits from a teacher's rows, or from its k log-probabilities a row (see
// cpu/kl_rows.cpp). Both logits are overwritten by z.
enum class DivergenceKind : uint8_t { forward, reverse, js };
struct KlRowsArgs {
  float *logits, *teacher;       // [rows, columns]; teacher null: ids and logprobs
  const void* ids;               // [rows, picks] int32, or int64 if long_ids
  const float *logprobs, *grad;  // [rows, picks], [rows]
  float *out, *lse;              // [rows], or null: only the gradient is made
  void* d;                       // [rows, columns], or null
  LogitScale scaling, teacher_scaling;
  DType d_type;
  DivergenceKind kind;
  bool long_ids;
  float beta;
  int64_t rows, columns, stride, teacher_stride, d_stride, picks;
};
KlRowsArgs kl_rows_args(Tensor out, Tensor lse, Tensor d, Tensor grad, Tensor logits,
                        Tensor teacher, double temperature, double softcap, double teacher_softcap,
                        int64_t kind, double beta);
KlRowsArgs kl_top_rows_args(Tensor out, Tensor lse, Tensor d, Tensor grad, Tensor logits,
                            Tensor ids, Tensor logprobs, double temperature, double softcap,
                            int64_t kind, double beta);

// y[m, n] (+)= a @ b, or a' @ b if transposed (see cpu/gradient_product.cpp).
struct GradientProductArgs {
  void* y;        // [m, n] f32, or bf16 where one block of k makes all of it
  const void* a;  // [m, k], rows contiguous; transposed: [k, m]
  const void* b;  // [k, n], rows contiguous
  void* scratch;  // a block of b in panels: gradient_product_scratch bytes
  DType y_type, type;
  bool transposed, add;
  int64_t m, n, k, k_block, y_stride, a_stride, b_stride;
};
GradientProductArgs gradient_product_args(Tensor y, Tensor a, Tensor b, Tensor scratch,
                                          bool transposed, bool add);
int64_t gradient_product_scratch(int64_t n, int64_t k, bool transposed);

// y[columns] (+)= the sum of the rows of x.
struct ColumnSumsArgs {
  float* y;
  const void* x;  // [rows, columns], rows contiguous
  DType type;
  bool add;
  int64_t rows, columns, stride;
};
ColumnSumsArgs column_sums_args(Tensor y, Tensor x, bool add);

}  // namespace fastllm
