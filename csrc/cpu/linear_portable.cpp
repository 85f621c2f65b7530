// Fused product in plain C++: a block's 64 levels are looked up, multiplied with x, summed in float32 and
// scaled once.
#include "kernels.h"

namespace nf4 {

// x keeps its order.
int linear_order_portable(int position) { return position; }

void linear_f32_portable(const LinearRows& rows) {
  const float* const x = static_cast<const float*>(rows.x);
  for (int row = 0; row < rows.num_rows; ++row) {
    float sums[kMaxRows] = {};
    const uint8_t* codes = rows.codes + row * rows.num_blocks * kBlockBytes;
    for (int64_t block = 0; block < rows.num_blocks; ++block) {
      float levels[kBlock];
      for (int64_t i = 0; i < kBlockBytes; ++i) {
        levels[2 * i] = rows.levels[codes[i] >> 4];
        levels[2 * i + 1] = rows.levels[codes[i] & 15];
      }
      for (int m = 0; m < rows.m; ++m) {
        const float* const x_block = x + (block * rows.m + m) * kBlock;
        float lanes[8] = {};
        for (int64_t i = 0; i < kBlock; i += 8) {
          for (int lane = 0; lane < 8; ++lane) lanes[lane] += levels[i + lane] * x_block[i + lane];
        }
        const float sum =
            ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
        sums[m] += sum * rows.scales[row * rows.scale_stride + block];
      }
      codes += kBlockBytes;
    }
    for (int m = 0; m < rows.m; ++m) rows.y[m * kGroupRows + row] = sums[m];
  }
}

}  // namespace nf4
