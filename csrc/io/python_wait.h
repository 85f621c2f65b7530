// What bindings over a RangeReader share: waiting as Python's main thread must, and the failure as Python
// data.
#pragma once

#include <pybind11/pybind11.h>

#include "range_reader.h"

namespace nf4 {

// Waits until all is over, with the interpreter unlocked. Signal handlers run meanwhile; if one raises
// (Ctrl-C), reading stops and its exception goes on. `tick` is called now and then, and at the end.
template <typename Tick>
void wait_in_python(RangeReader& reader, Tick&& tick) {
  for (bool ended = false; !ended;) {
    {
      const pybind11::gil_scoped_release unlocked;
      ended = reader.ended_within(std::chrono::milliseconds(50));
    }
    try {
      tick();
      if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
    } catch (...) {
      reader.stop();
      throw;
    }
  }
}

// None, or (what, index of the range, code).
inline pybind11::object failure_of(const RangeReader& reader) {
  const Failure& failure = reader.failure();
  const char* what = nullptr;
  switch (failure.trouble) {
    case Trouble::kNone:
      return pybind11::none();
    case Trouble::kDamaged:
      what = "damaged";
      break;
    case Trouble::kEnded:
      what = "ended";
      break;
    case Trouble::kSystem:
      what = "system";
      break;
    case Trouble::kDestination:
      what = "destination";
      break;
  }
  return pybind11::make_tuple(what, failure.range, failure.code);
}

}  // namespace nf4
