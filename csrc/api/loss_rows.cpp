#include <cmath>

#include "common/check.h"
#include "ops_core.h"

namespace fastllm {
namespace {

void check_logits(const Tensor& logits, const char* op) {
  check(logits.ndim == 2 && logits.dtype == DType::f32 && logits.shape[1] > 0 &&
            logits.shape[1] < INT32_MAX && rows_contiguous(logits),
        op, "logits must be f32 [rows, columns] with contiguous columns, at least one");
}
float* column(const Tensor& t, int64_t rows, const char* op, const char* what) {
  check(t.ndim == 1 && t.dtype == DType::f32 && t.contiguous() && t.shape[0] == rows, op, what);
  return t.as<float>();
}
bool is_ids(const Tensor& t, int64_t rows, int ndim) {
  return (t.dtype == DType::i32 || t.dtype == DType::i64) && t.ndim == ndim && t.contiguous() &&
         t.shape[0] == rows;
}
LogitScale logit_scale(double temperature, double softcap, const char* op) {
  check(temperature > 0 && std::isfinite(temperature), op, "temperature must be positive");
  check(softcap >= 0 && std::isfinite(softcap), op, "softcap must not be negative");
  return {static_cast<float>(softcap), 1.f / static_cast<float>(temperature)};
}
void check_gradient(const Tensor& d, const Tensor& logits, const char* op) {
  check(is_float(d) && d.ndim == 2 && rows_contiguous(d) && same_shape(d, logits), op,
        "d must be f32 or bf16, rows contiguous, shaped like logits");
}
LossRowsArgs loss_rows_args(const Tensor& logits, const Tensor& targets, LogitScale scaling,
                            const char* op) {
  check_logits(logits, op);
  check(is_ids(targets, logits.shape[0], 1), op, "targets must be contiguous i32 or i64 [rows]");
  return {.logits = logits.as<float>(),
          .targets = targets.data,
          .out = nullptr,
          .lse = nullptr,
          .entropy = nullptr,
          .given_lse = nullptr,
          .coefficients = nullptr,
          .d = nullptr,
          .scaling = scaling,
          .d_type = DType::f32,
          .long_targets = targets.dtype == DType::i64,
          .is_loss = false,
          .label_smoothing = 0.f,
          .z_loss = 0.f,
          .scale = 1.f,
          .rows = logits.shape[0],
          .columns = logits.shape[1],
          .stride = logits.stride[0],
          .d_stride = 0};
}
void set_gradient(LossRowsArgs& a, const Tensor& d, const Tensor& logits, const char* op) {
  check_gradient(d, logits, op);
  a.d = d.data, a.d_type = d.dtype, a.d_stride = d.stride[0];
}

KlRowsArgs divergence_args(const Tensor& out, const Tensor& lse, const Tensor& d,
                           const Tensor& grad, const Tensor& logits, LogitScale scaling,
                           int64_t kind, double beta, const char* op) {
  check_logits(logits, op);
  check(kind >= 0 && kind <= 2, op, "unknown kind");
  const int64_t rows = logits.shape[0];
  KlRowsArgs a{};
  a.logits = logits.as<float>();
  if (out.given()) {
    a.out = column(out, rows, op, "out must be contiguous f32 [rows]");
    a.lse = column(lse, rows, op, "lse must be contiguous f32 [rows]");
  }
  if (d.given()) {
    check_gradient(d, logits, op);
    a.d = d.data, a.d_stride = d.stride[0];
    a.grad = column(grad, rows, op, "grad must be contiguous f32 [rows]");
  }
  a.d_type = d.given() ? d.dtype : DType::f32;
  a.scaling = scaling;
  a.kind = static_cast<DivergenceKind>(kind);
  a.beta = static_cast<float>(beta);
  a.rows = rows, a.columns = logits.shape[1], a.stride = logits.stride[0];
  return a;
}

}  // namespace

LossRowsArgs log_prob_rows_args(Tensor logprob, Tensor lse, Tensor entropy, Tensor logits,
                                Tensor targets, double temperature, double softcap) {
  const char* op = "log_prob_rows";
  LossRowsArgs a = loss_rows_args(logits, targets, logit_scale(temperature, softcap, op), op);
  a.out = column(logprob, a.rows, op, "logprob must be contiguous f32 [rows]");
  a.lse = column(lse, a.rows, op, "lse must be contiguous f32 [rows]");
  if (entropy.given())
    a.entropy = column(entropy, a.rows, op, "entropy must be contiguous f32 [rows]");
  return a;
}

LossRowsArgs cross_entropy_rows_args(Tensor loss, Tensor lse, Tensor d, Tensor logits,
                                     Tensor targets, double softcap, double label_smoothing,
                                     double z_loss, double scale) {
  const char* op = "cross_entropy_rows";
  LossRowsArgs a = loss_rows_args(logits, targets, logit_scale(1.0, softcap, op), op);
  a.out = column(loss, a.rows, op, "loss must be contiguous f32 [rows]");
  a.lse = column(lse, a.rows, op, "lse must be contiguous f32 [rows]");
  if (d.given()) set_gradient(a, d, logits, op);
  a.is_loss = true;
  a.label_smoothing = static_cast<float>(label_smoothing);
  a.z_loss = static_cast<float>(z_loss);
  a.scale = static_cast<float>(scale);
  return a;
}

LossRowsArgs target_gradient_rows_args(Tensor d, Tensor logits, Tensor targets, Tensor lse,
                                       Tensor coefficients, double temperature, double softcap) {
  const char* op = "target_gradient_rows";
  LossRowsArgs a = loss_rows_args(logits, targets, logit_scale(temperature, softcap, op), op);
  a.given_lse = column(lse, a.rows, op, "lse must be contiguous f32 [rows]");
  check(coefficients.dtype == DType::f32 && coefficients.ndim == 2 && coefficients.contiguous() &&
            coefficients.shape[0] == a.rows && coefficients.shape[1] == 4,
        op, "coefficients must be contiguous f32 [rows, 4]");
  a.coefficients = coefficients.as<float>();
  set_gradient(a, d, logits, op);
  return a;
}

KlRowsArgs kl_rows_args(Tensor out, Tensor lse, Tensor d, Tensor grad, Tensor logits,
                        Tensor teacher, double temperature, double softcap, double teacher_softcap,
                        int64_t kind, double beta) {
  const char* op = "kl_rows";
  KlRowsArgs a = divergence_args(out, lse, d, grad, logits, logit_scale(temperature, softcap, op),
                                 kind, beta, op);
  check_logits(teacher, op);
  check(same_shape(teacher, logits), op, "teacher must be shaped like logits");
  a.teacher = teacher.as<float>();
  a.teacher_stride = teacher.stride[0];
  a.teacher_scaling = logit_scale(temperature, teacher_softcap, op);
  return a;
}

KlRowsArgs kl_top_rows_args(Tensor out, Tensor lse, Tensor d, Tensor grad, Tensor logits,
                            Tensor ids, Tensor logprobs, double temperature, double softcap,
                            int64_t kind, double beta) {
  const char* op = "kl_top_rows";
  KlRowsArgs a = divergence_args(out, lse, d, grad, logits, logit_scale(temperature, softcap, op),
                                 kind, beta, op);
  check(is_ids(ids, a.rows, 2) && ids.shape[1] >= 1 && ids.shape[1] <= a.columns, op,
        "ids must be contiguous i32 or i64 [rows, k]");
  check(logprobs.dtype == DType::f32 && logprobs.contiguous() && same_shape(logprobs, ids), op,
        "logprobs must be contiguous f32, shaped like ids");
  a.ids = ids.data;
  a.long_ids = ids.dtype == DType::i64;
  a.logprobs = logprobs.as<float>();
  a.picks = ids.shape[1];
  return a;
}

}  // namespace fastllm
