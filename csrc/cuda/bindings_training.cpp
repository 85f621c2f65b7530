// Bindings of the kernels of a training step: norms, rotations, activation, loss, LoRA's thin matrices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "bindings.h"
#include "launchers.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;
using Adapter = std::tuple<Address, Address, int, int, int, int, float>;  // a, b, first_row ... scaling
using Gradients = std::tuple<Address, Address>;

cudaStream_t stream_of(Address stream) { return pointer<CUstream_st>(stream); }

int count(const char* name, int64_t value) {
  require(value >= 0 && value <= INT32_MAX, name, "0 to 2147483647", value);
  return static_cast<int>(value);
}

void dequantize_rows(Address codes, Address absmax, Address quant_map, Address nested_absmax,
                     Address nested_quant_map, float nested_offset, int64_t rows, int64_t columns,
                     Address out, int64_t stride, int out_dtype, bool overlap, Address stream) {
  require(rows >= 0, "rows", "at least 0", rows);
  require(columns >= 1, "columns", "at least 1", columns);
  require(stride >= columns, "stride", "at least columns", stride);
  check_dtype("out_dtype", out_dtype);
  const Nf4Weight weight =
      weight_of(codes, absmax, quant_map, nested_absmax, nested_quant_map, nested_offset);
  check("dequantize_rows", nf4_dequantize_rows(&weight, rows, columns, pointer<void>(out), stride, out_dtype,
                                               overlap, stream_of(stream)));
}

void copy_rows(Address source, int64_t source_stride, Address target, int64_t target_stride, int64_t rows,
               int64_t size, int dtype, Address stream) {
  require(rows >= 0, "rows", "at least 0", rows);
  require(size >= 0, "size", "at least 0", size);
  check_dtype("dtype", dtype);
  const Nf4Rows from = {pointer<void>(source), source_stride}, to = {pointer<void>(target), target_stride};
  check("copy_rows", nf4_copy_rows(&from, &to, rows, size, dtype, stream_of(stream)));
}

void rms_norm(Address x, int64_t x_stride, Address residual, int64_t residual_stride, Address sum,
              int64_t sum_stride, Address weight, Address y, int64_t y_stride, int64_t rows, int64_t size,
              float eps, int dtype, Address stream) {
  check_dtype("dtype", dtype);
  const Nf4Rows in = {pointer<void>(x), x_stride}, out = {pointer<void>(y), y_stride};
  const Nf4Rows added = {pointer<void>(residual), residual_stride}, kept = {pointer<void>(sum), sum_stride};
  check("rms_norm", nf4_rms_norm(&in, residual ? &added : nullptr, &kept, pointer<void>(weight), &out,
                                 count("rows", rows), count("size", size), eps, dtype, stream_of(stream)));
}

void rms_norm_backward(Address grad_y, int64_t grad_y_stride, Address x, int64_t x_stride, Address weight,
                       Address passed, int64_t passed_stride, Address grad_x, int64_t grad_x_stride,
                       int64_t rows, int64_t size, float eps, int dtype, Address stream) {
  check_dtype("dtype", dtype);
  const Nf4Rows grads = {pointer<void>(grad_y), grad_y_stride}, in = {pointer<void>(x), x_stride};
  const Nf4Rows past = {pointer<void>(passed), passed_stride}, out = {pointer<void>(grad_x), grad_x_stride};
  check("rms_norm_backward",
        nf4_rms_norm_backward(&grads, &in, pointer<void>(weight), &past, &out, count("rows", rows),
                              count("size", size), eps, dtype, stream_of(stream)));
}

void rotary(Address x, int64_t x_stride, Address y, int64_t y_stride, int64_t rows, int64_t heads,
            int64_t head_size, Address cosines, Address sines, int64_t table_rows, int64_t table_stride,
            bool backward, int dtype, Address stream) {
  require(head_size >= 2 && head_size % 2 == 0, "head_size", "an even number", head_size);
  require(table_rows >= 1, "table_rows", "at least 1", table_rows);
  check_dtype("dtype", dtype);
  const Nf4Rows in = {pointer<void>(x), x_stride}, out = {pointer<void>(y), y_stride};
  check("rotary", nf4_rotary(&in, &out, count("rows", rows), count("heads", heads),
                             count("head_size", head_size), pointer<void>(cosines), pointer<void>(sines),
                             table_rows, table_stride, backward, dtype, stream_of(stream)));
}

void swiglu(Address gate_up, int64_t gate_up_stride, Address y, int64_t y_stride, int64_t rows, int64_t size,
            bool backward, int dtype, Address stream) {
  check_dtype("dtype", dtype);
  const Nf4Rows in = {pointer<void>(gate_up), gate_up_stride}, out = {pointer<void>(y), y_stride};
  check("swiglu",
        nf4_swiglu(&in, &out, count("rows", rows), count("size", size), backward, dtype, stream_of(stream)));
}

void cross_entropy(Address logits, int64_t stride, Address targets, Address losses, int64_t rows,
                   int64_t size, bool gradient, float scale, int dtype, Address stream) {
  require(size >= 1, "size", "at least 1", size);
  check_dtype("dtype", dtype);
  const Nf4Rows in = {pointer<void>(logits), stride};
  check("cross_entropy",
        nf4_cross_entropy(&in, pointer<const int64_t>(targets), pointer<float>(losses), count("rows", rows),
                          count("size", size), gradient, scale, dtype, stream_of(stream)));
}

std::vector<Nf4Adapter> adapters_of(const std::vector<Adapter>& given, const std::vector<Gradients>* grads) {
  require(given.size() <= NF4_MOST_ADAPTERS, "adapters", "at most 8", static_cast<int64_t>(given.size()));
  if (grads) {
    require(grads->size() == given.size(), "gradients", "as many as adapters",
            static_cast<int64_t>(grads->size()));
  }
  std::vector<Nf4Adapter> all;
  for (size_t i = 0; i < given.size(); ++i) {
    const auto& [a, b, first_row, rows, first_rank, rank, scaling] = given[i];
    const Gradients grad = grads ? (*grads)[i] : Gradients{0, 0};
    all.push_back({pointer<const float>(a), pointer<const float>(b), pointer<float>(std::get<0>(grad)),
                   pointer<float>(std::get<1>(grad)), first_row, rows, first_rank, rank, scaling});
  }
  return all;
}

void lora_pack(const std::vector<Adapter>& adapters, Address matrix, int64_t stride, int64_t n, int64_t k,
               int64_t r, int dtype, Address stream) {
  check_dtype("dtype", dtype);
  const std::vector<Nf4Adapter> all = adapters_of(adapters, nullptr);
  check("lora_pack", nf4_lora_pack(all.data(), count("adapters", all.size()), pointer<void>(matrix), stride,
                                   count("n", n), count("k", k), count("r", r), dtype, stream_of(stream)));
}

void lora_unpack(const std::vector<Adapter>& adapters, const std::vector<Gradients>& gradients,
                 Address grad_a, Address grad_b, int64_t n, int64_t k, bool add, int dtype, Address stream) {
  check_dtype("dtype", dtype);
  const std::vector<Nf4Adapter> all = adapters_of(adapters, &gradients);
  check("lora_unpack",
        nf4_lora_unpack(all.data(), count("adapters", all.size()), pointer<void>(grad_a),
                        pointer<void>(grad_b), count("n", n), count("k", k), add, dtype, stream_of(stream)));
}

}  // namespace

void bind_training(py::module_& m) {
  using namespace py::literals;
  m.def("dequantize_rows", &dequantize_rows, "codes"_a, "absmax"_a, "quant_map"_a, "nested_absmax"_a,
        "nested_quant_map"_a, "nested_offset"_a, "rows"_a, "columns"_a, "out"_a, "stride"_a, "out_dtype"_a,
        "overlap"_a, "stream"_a);
  m.def("copy_rows", &copy_rows, "source"_a, "source_stride"_a, "target"_a, "target_stride"_a, "rows"_a,
        "size"_a, "dtype"_a, "stream"_a);
  m.def("rms_norm", &rms_norm, "x"_a, "x_stride"_a, "residual"_a, "residual_stride"_a, "sum"_a,
        "sum_stride"_a, "weight"_a, "y"_a, "y_stride"_a, "rows"_a, "size"_a, "eps"_a, "dtype"_a, "stream"_a);
  m.def("rms_norm_backward", &rms_norm_backward, "grad_y"_a, "grad_y_stride"_a, "x"_a, "x_stride"_a,
        "weight"_a, "passed"_a, "passed_stride"_a, "grad_x"_a, "grad_x_stride"_a, "rows"_a, "size"_a, "eps"_a,
        "dtype"_a, "stream"_a);
  m.def("rotary", &rotary, "x"_a, "x_stride"_a, "y"_a, "y_stride"_a, "rows"_a, "heads"_a, "head_size"_a,
        "cosines"_a, "sines"_a, "table_rows"_a, "table_stride"_a, "backward"_a, "dtype"_a, "stream"_a);
  m.def("swiglu", &swiglu, "gate_up"_a, "gate_up_stride"_a, "y"_a, "y_stride"_a, "rows"_a, "size"_a,
        "backward"_a, "dtype"_a, "stream"_a);
  m.def("cross_entropy", &cross_entropy, "logits"_a, "stride"_a, "targets"_a, "losses"_a, "rows"_a, "size"_a,
        "gradient"_a, "scale"_a, "dtype"_a, "stream"_a);
  m.def("lora_pack", &lora_pack, "adapters"_a, "matrix"_a, "stride"_a, "n"_a, "k"_a, "r"_a, "dtype"_a,
        "stream"_a);
  m.def("lora_unpack", &lora_unpack, "adapters"_a, "gradients"_a, "grad_a"_a, "grad_b"_a, "n"_a, "k"_a,
        "add"_a, "dtype"_a, "stream"_a);
}
