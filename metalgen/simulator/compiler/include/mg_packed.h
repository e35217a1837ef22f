// packed_T2, 3, 4: vectors without padding, aligned as one element. (Metal's <metal_types> has them.)
#pragma once
#include "metal_types"
#ifndef MG_MACROS_ONLY
namespace metal {

#define MG_PACKED(N, FIELDS, ...)                                                 \
  template <typename T>                                                              \
  struct packed_vec<T, N> {                                                          \
    T FIELDS;                                                                        \
    packed_vec() = default;                                                          \
    constexpr packed_vec(vec<T, N> v) { set(v); }                                    \
    template <typename A, typename... B, mg::enable_t<!mg::same<A, vec<T, N>>::value, int> = 0> \
    constexpr explicit(sizeof...(B) == 0) packed_vec(A a, B... b) {                  \
      set(mg::make<vec<T, N>>(a, b...));                                             \
    }                                                                                \
    constexpr void set(vec<T, N> v) {                                                \
      for (int i = 0; i < N; ++i) (&x)[i] = v[i];                                    \
    }                                                                                \
    constexpr operator vec<T, N>() const { return vec<T, N>{__VA_ARGS__}; }          \
    constexpr operator vec<T, N>() const __constant { return vec<T, N>{__VA_ARGS__}; } \
    constexpr T operator[](int i) const { return (&x)[i]; }                          \
    constexpr T operator[](int i) const __constant { return (&x)[i]; }               \
    constexpr thread T& operator[](int i) thread { return (&x)[i]; }                 \
    constexpr device T& operator[](int i) device { return (&x)[i]; }                 \
    constexpr threadgroup T& operator[](int i) threadgroup { return (&x)[i]; }       \
    template <typename U>                                                            \
    packed_vec& operator+=(U u) {                                                    \
      return *this = vec<T, N>(*this) + u;                                           \
    }                                                                                \
    template <typename U>                                                            \
    packed_vec& operator-=(U u) {                                                    \
      return *this = vec<T, N>(*this) - u;                                           \
    }                                                                                \
    template <typename U>                                                            \
    packed_vec& operator*=(U u) {                                                    \
      return *this = vec<T, N>(*this) * u;                                           \
    }                                                                                \
    template <typename U>                                                            \
    packed_vec& operator/=(U u) {                                                    \
      return *this = vec<T, N>(*this) / u;                                           \
    }                                                                                \
  };
#define MG_COMMA ,
MG_PACKED(2, x MG_COMMA y, x, y)
MG_PACKED(3, x MG_COMMA y MG_COMMA z, x, y, z)
MG_PACKED(4, x MG_COMMA y MG_COMMA z MG_COMMA w, x, y, z, w)
#undef MG_COMMA
#undef MG_PACKED

// An operator with a packed vector is that of the vector.
#define MG_DEFINE(OP)                                                                      \
  template <typename T, int N>                                                             \
  METAL_INTERNAL constexpr auto operator OP(packed_vec<T, N> a, packed_vec<T, N> b) {      \
    return vec<T, N>(a) OP vec<T, N>(b);                                                   \
  }                                                                                        \
  template <typename T, int N>                                                             \
  METAL_INTERNAL constexpr auto operator OP(packed_vec<T, N> a, vec<T, N> b) {             \
    return vec<T, N>(a) OP b;                                                              \
  }                                                                                        \
  template <typename T, int N>                                                             \
  METAL_INTERNAL constexpr auto operator OP(vec<T, N> a, packed_vec<T, N> b) {             \
    return a OP vec<T, N>(b);                                                              \
  }                                                                                        \
  template <typename T, int N, typename S, mg::enable_t<mg::is_scalar<S>::value, int> = 0> \
  METAL_INTERNAL constexpr auto operator OP(packed_vec<T, N> a, S b) {                     \
    return vec<T, N>(a) OP mg::cast<T>(b);                                                 \
  }                                                                                        \
  template <typename T, int N, typename S, mg::enable_t<mg::is_scalar<S>::value, int> = 0> \
  METAL_INTERNAL constexpr auto operator OP(S a, packed_vec<T, N> b) {                     \
    return mg::cast<T>(a) OP vec<T, N>(b);                                                 \
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
template <typename T, int N>
METAL_INTERNAL constexpr vec<T, N> operator-(packed_vec<T, N> a) {
  return -vec<T, N>(a);
}
template <typename T, int N>
METAL_INTERNAL constexpr vec<T, N> operator~(packed_vec<T, N> a) {
  return ~vec<T, N>(a);
}

#define MG_DEFINE(T)                      \
  typedef packed_vec<T, 2> packed_##T##2; \
  typedef packed_vec<T, 3> packed_##T##3; \
  typedef packed_vec<T, 4> packed_##T##4;
MG_SCALARS(MG_DEFINE)
#undef MG_DEFINE
}  // namespace metal

#define MG_DEFINE(T)          \
  using metal::packed_##T##2; \
  using metal::packed_##T##3; \
  using metal::packed_##T##4;
MG_SCALARS(MG_DEFINE)
#undef MG_DEFINE
#endif
