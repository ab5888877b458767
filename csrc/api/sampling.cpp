#include "common/check.h"
#include "ops_core.h"

namespace fastllm {
namespace {

constexpr int64_t kLseTile = 512;

void check_logits(const char* op, const Tensor& logits) {
  check(logits.ndim == 2 && logits.dtype == DType::f32 && logits.shape[1] > 0 &&
            logits.shape[1] < INT32_MAX && rows_contiguous(logits),
        op, "logits must be f32 [rows, columns] with contiguous columns, at least one");
}
bool is_packed(const Tensor& t, DType dtype, int64_t rows, int64_t columns) {
  return t.ndim == 2 && t.dtype == dtype && t.contiguous() && t.shape[0] == rows &&
         t.shape[1] == columns;
}
bool is_column(const Tensor& t, DType dtype, int64_t rows) {
  return t.ndim == 1 && t.dtype == dtype && t.contiguous() && t.shape[0] == rows;
}
void check_scratch(const char* op, const Tensor& scratch, int64_t floats) {
  check(scratch.dtype == DType::f32 && scratch.contiguous() && scratch.numel() >= floats, op,
        "scratch is too small");
}
int64_t tiles_of(const Tensor& logits) { return (logits.shape[1] + kLseTile - 1) / kLseTile; }

}  // namespace

LogProbsArgs log_probs_args(Tensor out, Tensor scratch, Tensor logits, Tensor ids) {
  const char* op = "log_probs";
  check_logits(op, logits);
  check(ids.dtype == DType::i32 || ids.dtype == DType::i64, op, "ids must be i32 or i64");
  check(ids.ndim == 2 && ids.contiguous() && ids.shape[0] == logits.shape[0], op,
        "ids must be contiguous [rows, picks]");
  check(is_packed(out, DType::f32, ids.shape[0], ids.shape[1]), op, "out must be f32 like ids");
  check_scratch(op, scratch, logits.shape[0] * tiles_of(logits) * 2);
  return {.out = out.as<float>(),
          .scratch = scratch.as<float>(),
          .logits = logits.as<float>(),
          .ids = ids.data,
          .rows = logits.shape[0],
          .columns = logits.shape[1],
          .stride = logits.stride[0],
          .picks = ids.shape[1],
          .long_ids = ids.dtype == DType::i64};
}

TopLogProbsArgs top_log_probs_args(Tensor values, Tensor ids, Tensor scratch, Tensor logits) {
  const char* op = "top_log_probs";
  check_logits(op, logits);
  check(values.ndim == 2 && values.shape[1] <= logits.shape[1] &&
            is_packed(values, DType::f32, logits.shape[0], values.shape[1]),
        op, "values must be contiguous f32 [rows, k] with k <= columns");
  check(is_packed(ids, DType::i32, logits.shape[0], values.shape[1]), op,
        "ids must be contiguous i32 [rows, k]");
  check_scratch(op, scratch, logits.shape[0] * tiles_of(logits) * 2);
  return {.values = values.as<float>(),
          .ids = ids.as<int32_t>(),
          .scratch = scratch.as<float>(),
          .logits = logits.as<float>(),
          .rows = logits.shape[0],
          .columns = logits.shape[1],
          .stride = logits.stride[0],
          .k = values.shape[1]};
}

SamplingArgs sampling_args(Tensor ids, Tensor logprob, Tensor logprob_t, Tensor scratch,
                           Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p,
                           Tensor min_p, Tensor repetition, Tensor presence, Tensor frequency,
                           Tensor seed, Tensor position, Tensor penalized, Tensor counts,
                           Tensor in_prompt, Tensor banned) {
  const char* op = "sampling";
  check_logits(op, logits);
  const int64_t rows = logits.shape[0], columns = logits.shape[1];
  const Tensor* floats[] = {&logprob, &logprob_t,  &temperature, &top_p,
                            &min_p,   &repetition, &presence,    &frequency};
  for (const Tensor* t : floats)
    check(is_column(*t, DType::f32, rows), op, "a per-row f32 argument is not contiguous [rows]");
  check(is_column(ids, DType::i32, rows) && is_column(top_k, DType::i32, rows) &&
            is_column(position, DType::i32, rows),
        op, "ids, top_k and position must be contiguous i32 [rows]");
  check(is_column(seed, DType::i64, rows), op, "seed must be contiguous i64 [rows]");
  check(is_column(penalized, DType::u8, rows), op, "penalized must be contiguous u8 [rows]");
  check(counts.ndim == 2, op, "counts must have 2 dimensions");
  const int64_t counted = counts.shape[0] == 0 ? 0 : rows;
  check(is_packed(counts, DType::i32, counted, columns) &&
            is_packed(in_prompt, DType::u8, counted, columns),
        op,
        "counts (i32) and in_prompt (u8) must be contiguous [rows, columns], or both [0, columns]");
  check(banned.ndim == 2 && is_packed(banned, DType::i32, rows, banned.shape[1]), op,
        "banned must be contiguous i32 [rows, any]");
  check_scratch(op, scratch, rows * (tiles_of(logits) * 6 + 1));
  return {.ids = ids.as<int32_t>(),
          .logprob = logprob.as<float>(),
          .logprob_t = logprob_t.as<float>(),
          .scratch = scratch.as<float>(),
          .logits = logits.as<float>(),
          .temperature = temperature.as<float>(),
          .top_k = top_k.as<int32_t>(),
          .top_p = top_p.as<float>(),
          .min_p = min_p.as<float>(),
          .repetition = repetition.as<float>(),
          .presence = presence.as<float>(),
          .frequency = frequency.as<float>(),
          .seed = seed.as<int64_t>(),
          .position = position.as<int32_t>(),
          .penalized = penalized.as<uint8_t>(),
          .counts = counted ? counts.as<int32_t>() : nullptr,
          .in_prompt = counted ? in_prompt.as<uint8_t>() : nullptr,
          .banned = banned.as<int32_t>(),
          .rows = rows,
          .columns = columns,
          .stride = logits.stride[0],
          .num_banned = banned.shape[1]};
}

}  // namespace fastllm
