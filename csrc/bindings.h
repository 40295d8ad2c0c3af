// The Python function of an op, made from the list of its fields in args.h. Pointers are passed as
// addresses, enums as integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <type_traits>

#include "args.h"

namespace sk {

struct Bits {
  uint64_t value;
  explicit operator uint64_t() const { return value; }
};

// How Python passes a field of type T.
template <class T, Rule kRule>
struct Passed {
  using Type = std::conditional_t<std::is_enum_v<T>, int, T>;
};
template <class T, Rule kRule>
struct Passed<T*, kRule> {
  using Type = uintptr_t;
};
template <>
struct Passed<uint64_t, Rule::kBits> {
  using Type = Bits;
};

template <class Args, class Field>
using TypeOf = std::decay_t<decltype(Field::of(std::declval<Args&>()))>;
template <class Args, class Field>
using PassedFor = typename Passed<TypeOf<Args, Field>, Field::kRule>::Type;

// The address of a tensor is 0 if its memory was freed.
template <class Args, class Field>
void require(Args& args, const Field& field) {
  if constexpr (std::is_pointer_v<TypeOf<Args, Field>> && Field::kRule == Rule::kRequired)
    if (!Field::of(args))
      throw pybind11::value_error(std::string(field.name) +
                                  ": got a tensor whose memory was freed");
}

// m.name(fields...) calls run(args), unless the batch is empty.
template <class Args, class Run>
void bind(pybind11::module_& m, const char* name, const Run& run) {
  static constexpr auto kFields = Args::fields();
  const auto define = [&](auto... fields) {
    m.def(
        name,
        [run](PassedFor<Args, decltype(fields)>... values) {
          Args args = {};
          ((decltype(fields)::of(args) = TypeOf<Args, decltype(fields)>(values)), ...);
          if (args.rows == 0 || args.elements == 0) return;
          (require(args, std::get<decltype(fields)>(kFields)), ...);
          run(args);
        },
        pybind11::arg(fields.name).noconvert()...);
  };
  std::apply(define, kFields);
}

}  // namespace sk

// As NumPy's and torch's: two's complement.
template <>
struct pybind11::detail::type_caster<sk::Bits> {
  PYBIND11_TYPE_CASTER(sk::Bits, const_name("int"));
  bool load(handle integer, bool) {
    value.value = PyLong_AsUnsignedLongLongMask(integer.ptr());
    const bool failed = PyErr_Occurred();
    if (failed) PyErr_Clear();
    return !failed;
  }
};
