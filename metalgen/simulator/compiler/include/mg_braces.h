// What compiler/repair.py wraps: expressions on vectors that C++ for OpenCL refuses and Metal takes.
#pragma once
#include "metal_types"
#ifndef MG_MACROS_ONLY
namespace mg {

// `half4 * float`: a scalar takes the type of the vector's elements, whatever its own rank.
template <typename S>
struct weak_scalar {
  S value;
  METAL_INTERNAL constexpr operator S() const { return value; }
};
template <typename S>
METAL_INTERNAL constexpr weak_scalar<S> weak(S value) {
  return weak_scalar<S>{value};
}
#define MG_DEFINE(OP)                                                                     \
  template <typename T, int N, typename S>                                                \
  METAL_INTERNAL constexpr auto operator OP(metal::vec<T, N> a, weak_scalar<S> b) {       \
    return a OP cast<T>(b.value);                                                         \
  }                                                                                       \
  template <typename T, int N, typename S>                                                \
  METAL_INTERNAL constexpr auto operator OP(weak_scalar<S> a, metal::vec<T, N> b) {       \
    return cast<T>(a.value) OP b;                                                         \
  }
MG_DEFINE(+)
MG_DEFINE(-)
MG_DEFINE(*)
MG_DEFINE(/)
MG_DEFINE(%)
MG_DEFINE(&)
MG_DEFINE(|)
MG_DEFINE(^)
MG_DEFINE(<<)
MG_DEFINE(>>)
MG_DEFINE(==)
MG_DEFINE(!=)
MG_DEFINE(<)
MG_DEFINE(<=)
MG_DEFINE(>)
MG_DEFINE(>=)
#undef MG_DEFINE
#define MG_ASSIGN(OP, space)                                                              \
  template <typename T, int N, typename S>                                                \
  METAL_INTERNAL constexpr space metal::vec<T, N>& operator OP##=(space metal::vec<T, N>& a, \
                                                                  weak_scalar<S> b) {     \
    return a = a OP cast<T>(b.value);                                                     \
  }                                                                                       \
  template <typename T, typename S, enable_t<is_scalar<T>::value, int> = 0>               \
  METAL_INTERNAL constexpr space T& operator OP##=(space T& a, weak_scalar<S> b) {        \
    return a = (T)(a OP b.value);                                                         \
  }
#define MG_DEFINE(OP)       \
  MG_ASSIGN(OP, thread)     \
  MG_ASSIGN(OP, device)     \
  MG_ASSIGN(OP, threadgroup)
MG_DEFINE(+)
MG_DEFINE(-)
MG_DEFINE(*)
MG_DEFINE(/)
#undef MG_DEFINE
#undef MG_ASSIGN

// The same for a swizzle that is assigned to, of which there is no reference: `v.xy *= 2.0f`.
template <typename V, typename S>
METAL_INTERNAL constexpr auto element(S value) {
  typedef typename bare<V>::type Bare;
  if constexpr (shape<Bare>::vector) {
    return cast<typename shape<Bare>::element>(value);
  } else {
    return value;
  }
}

// The object of a const member function is in thread.
template <typename T>
METAL_INTERNAL constexpr thread T& in_thread(__generic T& object) {
  return *(thread T*)&object;
}
template <typename T>
METAL_INTERNAL constexpr const thread T& in_thread(const __generic T& object) {
  return *(const thread T*)&object;
}

// `float4 a = {0}` and `f({i, i, i})`: a list for a vector, or for a structure. Elements that a list
// does not give are 0.
template <typename... A>
struct list;
template <>
struct list<> {
  template <typename V>
  METAL_INTERNAL constexpr int put_all(thread V& out, int at) const {
    return at;
  }
};
template <typename A, typename... B>
struct list<A, B...> {
  A first;
  list<B...> rest;
  template <typename V>
  METAL_INTERNAL constexpr int put_all(thread V& out, int at) const {
    return rest.put_all(out, put(out, at, first));
  }
  static constexpr __constant int count = (shape<A>::count + ... + shape<B>::count);
  template <typename T, int N, enable_t<(N >= (shape<A>::count + ... + shape<B>::count)), int> = 0>
  METAL_INTERNAL constexpr operator metal::vec<T, N>() const {
    metal::vec<T, N> out{};
    put_all(out, 0);
    return out;
  }
};
METAL_INTERNAL constexpr list<> braces() { return list<>{}; }
template <typename A, typename... B>
METAL_INTERNAL constexpr list<A, B...> braces(A a, B... b) {
  return list<A, B...>{a, braces(b...)};
}

}  // namespace mg
#endif
