// The operators for training, as Python sees them.
#include "packed_attention.h"
#include "elementwise.h"

extern "C" {
void tt_packed_forward(const Packed* a, int32_t threads) { packed_forward(*a, threads); }
void tt_packed_backward(const Packed* a, const PackedGradient* b, int32_t threads) { packed_backward(*a, *b, threads); }
void tt_rms_forward(const float* x, const float* weight, i64 n, i64 d, float eps, float* y, float* inverse, int32_t threads) {
  rms_forward(x, weight, n, d, eps, y, inverse, threads);
}
void tt_rms_backward(const float* x, const float* weight, const float* inverse, const float* d_y, i64 n, i64 d, float* d_x,
                     float* d_weight, int32_t threads) {
  rms_backward(x, weight, inverse, d_y, n, d, d_x, d_weight, threads);
}
void tt_swiglu_forward(const float* gate, const float* up, i64 n, float* y, int32_t threads) {
  swiglu_forward(gate, up, n, y, threads);
}
void tt_swiglu_backward(const float* gate, const float* up, const float* d_y, i64 n, float* d_gate, float* d_up, int32_t threads) {
  swiglu_backward(gate, up, d_y, n, d_gate, d_up, threads);
}
void tt_softmax_loss(float* logits, i64 n, i64 vocab, const i64* targets, const float* scales, float z_loss, float* nll,
                     float* lse, int32_t threads) {
  softmax_loss(logits, n, vocab, targets, scales, z_loss, nll, lse, threads);
}
}
