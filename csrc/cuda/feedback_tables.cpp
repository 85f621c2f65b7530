// The tables of the kernels that round by what layers read.
#include <cmath>
#include <cstring>

#include "feedback.cuh"

namespace nf4 {

FeedbackTables feedback_tables(const SearchTables& tables) {
  FeedbackTables out = {encode_tables(tables), {}, {}, {}};
  memcpy(out.levels, tables.levels, sizeof out.levels);
  for (int i = 0; i < kMultipliers; ++i) {
    out.multipliers[i] = nominal_multiplier(i);
    out.inverses[i] = static_cast<int>(std::nearbyint(kUnit / static_cast<double>(out.multipliers[i])));
  }
  return out;
}

}  // namespace nf4
