// What each instruction set provides. Here and not beside the kernels, so that nothing but kernels is
// compiled for an ISA that the CPU may lack.
#include "kernels.h"

namespace nf4 {

#define NF4_DECLARE_KERNELS(isa)                                                                          \
  void dequantize_blocks_##isa(const uint8_t*, const float*, const float*, int64_t, void*, Dtype);        \
  int64_t quantize_blocks_##isa(const void*, Dtype, int64_t, uint8_t*, float*);                           \
  int64_t find_scales_##isa(const SearchTables&, const void*, Dtype, int64_t, int16_t*, float*, float*);  \
  void measure_blocks_##isa(const SearchTables&, const int16_t*, const int16_t*, int64_t, int, int32_t*); \
  void encode_blocks_##isa(const SearchTables&, const void*, Dtype, int64_t, const float*, uint8_t*);     \
  void linear_f32_##isa(const LinearRows&)

NF4_DECLARE_KERNELS(portable);
int linear_order_portable(int);
const Kernels kernels_portable = {"portable",
                                  nullptr,
                                  dequantize_blocks_portable,
                                  quantize_blocks_portable,
                                  find_scales_portable,
                                  measure_blocks_portable,
                                  encode_blocks_portable,
                                  {64, 1, linear_order_portable, linear_f32_portable},
                                  {64, 1, linear_order_portable, nullptr}};

#ifdef NF4_X86
NF4_DECLARE_KERNELS(avx2);
void linear_i16_avx2(const LinearRows&);
int linear_order_f32_avx2(int);
int linear_order_i16_avx2(int);
const Kernels kernels_avx2 = {"avx2",
                              nullptr,
                              dequantize_blocks_avx2,
                              quantize_blocks_avx2,
                              find_scales_avx2,
                              measure_blocks_avx2,
                              encode_blocks_avx2,
                              {64, 1, linear_order_f32_avx2, linear_f32_avx2},
                              {64, 1, linear_order_i16_avx2, linear_i16_avx2}};

NF4_DECLARE_KERNELS(avx512);
void scale_blocks_avx512(const ScaleMap&, const uint8_t*, int64_t, float, float, float*);
void linear_i16_avx512(const LinearRows&);
int linear_order_f32_avx512(int);
int linear_order_i16_avx512(int);
const Kernels kernels_avx512 = {"avx512",
                                scale_blocks_avx512,
                                dequantize_blocks_avx512,
                                quantize_blocks_avx512,
                                find_scales_avx512,
                                measure_blocks_avx512,
                                encode_blocks_avx512,
                                {128, 1, linear_order_f32_avx512, linear_f32_avx512},
                                {128, 8, linear_order_i16_avx512, linear_i16_avx512}};
#endif

}  // namespace nf4
