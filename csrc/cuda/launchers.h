// The border between kernels and bindings: what a weight is, and every launcher. Each returns a cudaError_t
// as int, starts its work in `stream` on the current device, and waits for nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

extern "C" {

enum Nf4Dtype { NF4_FLOAT32 = 0, NF4_BFLOAT16 = 1, NF4_FLOAT16 = 2 };  // as in nf4format._native

struct Nf4Weight {
  const uint8_t* codes;
  const uint8_t* absmax;
  const float* levels;
  const float* nested_absmax;
  const float* nested_map;
  float offset;
};

// One of the products that share an input: its weight [n, k], its bias (or null) and its output.
struct Nf4Linear {
  Nf4Weight weight;
  const void* bias;
  void* y;
  int n;
};

// A matrix row-major, `stride` elements from one row to the next.
struct Nf4Rows {
  void* data;
  int64_t stride;
};

// A LoRA adapter of one of several layers that share an input: fp32 masters a [rank, k] and b [rows, rank],
// their gradients, and its place among the others' rows and ranks.
struct Nf4Adapter {
  const float* a;
  const float* b;
  float* grad_a;
  float* grad_b;
  int first_row;
  int rows;
  int first_rank;
  int rank;
  float scaling;
};

#define NF4_MOST_WEIGHTS 4   // of one launch: q, k, v or gate, up; one more than either needs
#define NF4_MOST_ADAPTERS 8  // of one launch: two for each of these weights

int nf4_dequantize(const Nf4Weight* weight, int64_t start, int64_t stop, void* out, int dtype, int overlap,
                   cudaStream_t stream);

int nf4_dequantize_rows(const Nf4Weight* weight, int64_t rows, int64_t columns, void* out, int64_t stride,
                        int dtype, int overlap, cudaStream_t stream);

int nf4_embedding(const Nf4Weight* weight, const int64_t* ids, int64_t num_ids, int64_t rows, int64_t width,
                  void* out, int dtype, int overlap, cudaStream_t stream);

int nf4_linear_few_rows(const Nf4Linear* linears, int num_weights, const void* x, int num_tokens, int k,
                        int dtype, int overlap, cudaStream_t stream);

// Linked only where NF4_WGMMA is defined.
int64_t nf4_linear_wgmma_workspace(int num_tokens, int n, int k);

int nf4_linear_wgmma(const Nf4Linear* linear, const void* x, int num_tokens, int k, int dtype,
                     void* workspace, int overlap, cudaStream_t stream);

int nf4_linear_any_shape(const Nf4Weight* weight, const void* x, const void* bias, void* y, int num_tokens,
                         int n, int k, int dtype, int overlap, cudaStream_t stream);

// Chunk i of a sweep of AdamW: `count` elements from a parameter and its gradient, float32 or bfloat16, whose
// moments begin at element `at` of page `page`, and which of the settings holds for them.
struct Nf4AdamwChunk {
  void* parameter;
  const void* gradient;
  int32_t page, at, count;
  uint16_t setting;
  uint8_t parameter_dtype, gradient_dtype;
};

struct Nf4AdamwSetting {
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step;  // from 1
};

struct Nf4GradientChunk {
  const void* gradient;
  int32_t count, dtype;
};

#define NF4_MOST_PAGES 256   // of one launch of AdamW: their addresses are kernel arguments
#define NF4_MOST_SETTINGS 8  // of one launch; more take more launches

// `chunks` lie on the device; those given must lie in pages first_page .. first_page + num_pages - 1, which
// begin at `pages`. gradient_factor may be null; where it is not finite nothing is changed.
int nf4_adamw(const Nf4AdamwChunk* chunks, int64_t num_chunks, int first_page, int num_pages,
              void* const* pages, int64_t page_elements, const Nf4AdamwSetting* settings, int num_settings,
              const float* gradient_factor, cudaStream_t stream);

// The same over 8-bit states: chunks begin a block of 256, in their pages and in their parameters;
// page_elements is a multiple of 256, and a page is aligned to 8 bytes. tables, float32 [4, 256] on the
// device: the levels of the first and the second moments' map, and the borders of each as a search tree (see
// adamw_8bit.cu).
int nf4_adamw_8bit(const Nf4AdamwChunk* chunks, int64_t num_chunks, int first_page, int num_pages,
                   void* const* pages, int64_t page_elements, const Nf4AdamwSetting* settings,
                   int num_settings, const float* gradient_factor, const float* tables, cudaStream_t stream);

// The Euclidean norm of all chunks together to *norm; sums_of_squares is room for num_chunks numbers.
int nf4_gradient_norm(const Nf4GradientChunk* chunks, int64_t num_chunks, float* sums_of_squares, float* norm,
                      cudaStream_t stream);

int nf4_copy_rows(const Nf4Rows* source, const Nf4Rows* target, int64_t num_rows, int64_t size, int dtype,
                  cudaStream_t stream);

int nf4_rms_norm(const Nf4Rows* x, const Nf4Rows* residual, const Nf4Rows* sum, const void* weight,
                 const Nf4Rows* y, int num_rows, int size, float eps, int dtype, cudaStream_t stream);

int nf4_rms_norm_backward(const Nf4Rows* grad_y, const Nf4Rows* x, const void* weight, const Nf4Rows* passed,
                          const Nf4Rows* grad_x, int num_rows, int size, float eps, int dtype,
                          cudaStream_t stream);

int nf4_rotary(const Nf4Rows* x, const Nf4Rows* y, int64_t num_rows, int num_heads, int head_size,
               const void* cosines, const void* sines, int64_t table_rows, int64_t table_stride, int backward,
               int dtype, cudaStream_t stream);

int nf4_swiglu(const Nf4Rows* gate_up, const Nf4Rows* y, int64_t num_rows, int size, int backward, int dtype,
               cudaStream_t stream);

int nf4_cross_entropy(const Nf4Rows* logits, const int64_t* targets, float* losses, int num_rows, int size,
                      int gradient, float scale, int dtype, cudaStream_t stream);

int nf4_lora_pack(const Nf4Adapter* adapters, int count, void* matrix, int64_t stride, int n, int k, int r,
                  int dtype, cudaStream_t stream);

int nf4_lora_unpack(const Nf4Adapter* adapters, int count, const void* grad_a, const void* grad_b, int n,
                    int k, int add, int dtype, cudaStream_t stream);

}  // extern "C"
