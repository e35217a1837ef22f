#include <metal_simdgroup>
#include <metal_simdgroup_matrix>

using namespace metal;

// N elements moved by one load or store, at an alignment of A bytes.
template <typename T, int N, int A>
struct alignas(A) mg_wide {
  T v[N];
};

// The same in threadgroup memory, where everything lies at a multiple of its size, up to 16 bytes.
template <typename T, int N>
using mg_tile_wide = mg_wide<T, N, (N * sizeof(T) < 16 ? N * sizeof(T) : 16)>;

// N elements from anywhere in device memory.
template <int N, typename T>
METAL_FUNC void mg_load(thread T* x, const device T* from) {
  const mg_wide<T, N, sizeof(T)> wide = *(const device mg_wide<T, N, sizeof(T)>*)from;
  #pragma unroll
  for (int n = 0; n < N; n++) x[n] = wide.v[n];
}

// The same, with zeros for all but the first `count`, which alone are read.
template <int N, typename T>
METAL_FUNC void mg_load_part(thread T* x, const device T* from, int count) {
  #pragma unroll
  for (int n = 0; n < N; n++) x[n] = n < count ? from[n] : T(0);
}

// N elements from threadgroup memory, and back.
template <int N, typename T>
METAL_FUNC void mg_load(thread T* x, const threadgroup T* from) {
  const mg_tile_wide<T, N> wide = *(const threadgroup mg_tile_wide<T, N>*)from;
  #pragma unroll
  for (int n = 0; n < N; n++) x[n] = wide.v[n];
}

template <int N, typename T>
METAL_FUNC void mg_store(threadgroup T* to, const thread T* x) {
  mg_tile_wide<T, N> wide;
  #pragma unroll
  for (int n = 0; n < N; n++) wide.v[n] = x[n];
  *(threadgroup mg_tile_wide<T, N>*)to = wide;
}

// N elements to anywhere in device memory, and only the first `count` of them.
template <int N, typename T>
METAL_FUNC void mg_store(device T* to, const thread T* x) {
  mg_wide<T, N, sizeof(T)> wide;
  #pragma unroll
  for (int n = 0; n < N; n++) wide.v[n] = x[n];
  *(device mg_wide<T, N, sizeof(T)>*)to = wide;
}

template <int N, typename T>
METAL_FUNC void mg_store_part(device T* to, const thread T* x, int count) {
  #pragma unroll
  for (int n = 0; n < N; n++) {
    if (n < count) to[n] = x[n];
  }
}

METAL_FUNC float mg_reciprocal(float x) {
  return 1.0f / x;
}

// Reductions over a row of 8x8 matrices: it lies in the lanes that differ in bits 0 and 3.
METAL_FUNC float mg_row_max(float x) {
  x = max(x, simd_shuffle_xor(x, 1));
  return max(x, simd_shuffle_xor(x, 8));
}

METAL_FUNC float mg_row_sum(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, 8);
}

// The natural logarithm of sum * 2^(2 half_exponent); -inf for an empty sum, in fast math too, and
// finite for others.
METAL_FUNC float mg_log_sum_exp(float half_exponent, float sum) {
  const float twice_ln2 = 1.38629436111989062f;
  const float value = max((half_exponent + 0.5f * precise::log2(sum)) * twice_ln2, -3.402823466e38f);
  return as_type<float>(sum == 0.0f ? 0xFF800000u : as_type<uint>(value));
}

// metalgen_forward_f16_d64_f8e0774563(q, k, v, scale) -> out: the body of the kernel; MLX writes its signature.
  typedef half T;
  typedef half Out;
  typedef half F;
  constexpr int D = 64;
  constexpr int DV = 64;
  constexpr int BQ = 64;
  constexpr int BK = 32;
  constexpr int SIMDGROUPS = 4;
  constexpr int ROW_BLOCKS = 2;
  constexpr int ROWS = 16;
  constexpr int K_FRAGMENTS = 4;
  constexpr int V_FRAGMENTS = 8;
  constexpr int HEADS_PER_KV = 1;
  constexpr int D_FRAGMENTS = 8;
  constexpr int KV_STRIDE = 72;
  constexpr int KV_SLOT = 2304;
  constexpr float LOWEST = -3.402823466e38f;
  const float scale2 = scale;

  const int lane = thread_index_in_simdgroup;
  const int sg = simdgroup_index_in_threadgroup;
  const int row = ((lane >> 2) & 4) + ((lane >> 1) & 3);
  const int col = ((lane >> 1) & 4) + ((lane & 1) << 1);

  const int q_len = q_shape[2];
  const int kv_len = k_shape[2];
  const int offset = kv_len - q_len;  // query i stands beside key i + offset
  const int batch = int(threadgroup_position_in_grid.z);
  const int head = int(threadgroup_position_in_grid.y);
  const int kv_head = head / HEADS_PER_KV;
  const int row_count = q_len;
  // Later rows see more keys: they start first, so that the last wave of groups is short.
  const int q_block = int(threadgroups_per_grid.x) - 1 - int(threadgroup_position_in_grid.x);
  const int64_t row_base = (int64_t(batch) * q_shape[1] + head) * q_len;
  const int first = q_block * BQ + sg * ROWS;
  const int last = min(first + ROWS, q_len) - 1;
  const int group_last = min(q_block * BQ + BQ, q_len) - 1;
  const device uint8_t* q_head = q + batch * q_strides[0] + head * q_strides[1];
  const device uint8_t* k_head = k + batch * k_strides[0] + kv_head * k_strides[1];
  const device uint8_t* v_head = v + batch * v_strides[0] + kv_head * v_strides[1];
  const int q_pitch = int(q_strides[2]);
  const int k_pitch = int(k_strides[2]);
  const int v_pitch = int(v_strides[2]);

  threadgroup mg_wide<uint, 4, 16> kv_memory[1 * KV_SLOT * sizeof(T) / 16];
  threadgroup T* kv_tile = (threadgroup T*)kv_memory;

  simdgroup_matrix<F, 8, 8> q_fragments[ROW_BLOCKS][D_FRAGMENTS];
  #pragma unroll
  for (int r = 0; r < ROW_BLOCKS; r++) {
    const device T* q_row = (const device T*)(q_head + int64_t(min(first + r * 8 + row, row_count - 1)) * q_pitch);
    #pragma unroll
    for (int b = 0; b < 2; b++) {
      const int column = (b * 8 + col) * 4;
      T x[8];
      mg_load<8>(x, q_row + column);

      #pragma unroll
      for (int w = 0; w < 4; w++) {
        q_fragments[r][b * 4 + w].thread_elements()[0] = F(x[w]);
        q_fragments[r][b * 4 + w].thread_elements()[1] = F(x[4 + w]);
      }
    }
  }

  simdgroup_matrix<float, 8, 8> o[ROW_BLOCKS][V_FRAGMENTS];
  #pragma unroll
  for (int r = 0; r < ROW_BLOCKS; r++) {
    #pragma unroll
    for (int f = 0; f < V_FRAGMENTS; f++) o[r][f] = make_filled_simdgroup_matrix<float, 8>(0.0f);
  }

  float base[ROW_BLOCKS];
  #pragma unroll
  for (int r = 0; r < ROW_BLOCKS; r++) base[r] = LOWEST;

  constexpr float LARGE = 268435456.0f;
  const float coarse = as_type<float>((as_type<uint>(scale2) + 0x7fffffu) & 0xff800000u);
  const float half_fine = 0.5f * scale2 / coarse;
  float l[ROW_BLOCKS];
  #pragma unroll
  for (int r = 0; r < ROW_BLOCKS; r++) l[r] = 0.0f;

  const int any_past = min(kv_len, last + offset + 1);
  const int all_past = min(kv_len, first + offset + 1);

  // The keys that some row of the group sees, from a whole tile on.
  int k_begin = 0;
  int k_end = min(kv_len, group_last + offset + 1);
  k_begin = k_begin / BK * BK;

  const int k_line = ((sg * 32 + lane) >> 4) * 2;
  const int k_column = ((sg * 32 + lane) & 15) * 4;
  threadgroup T* const k_to = kv_tile + k_line * KV_STRIDE + k_column * 2;
  const device uint8_t* k_from = k_head + int64_t(k_begin + k_line) * k_pitch + k_column * sizeof(T);
  const int v_line = ((sg * 32 + lane) >> 3);
  const int v_column = ((sg * 32 + lane) & 7) * 8;
  threadgroup T* const v_to = kv_tile + v_line * KV_STRIDE + v_column;
  const device uint8_t* v_from = v_head + int64_t(k_begin + v_line) * v_pitch + v_column * sizeof(T);
  const threadgroup T* const o_v_4 = kv_tile + row * KV_STRIDE + col * 4;
  const threadgroup T* const s_k_4 = kv_tile + col * KV_STRIDE + row * 8;

  const int inside_past = q_block * BQ + BQ - ROWS < row_count ? min(min(kv_len, q_block * BQ + offset + 1) - BK + 1, k_end) : 0;

  int k0 = k_begin;
  while (true) {
    for (; k0 < inside_past; k0 += BK) {
      simdgroup_matrix<float, 8, 8> s[ROW_BLOCKS][K_FRAGMENTS];
      #pragma unroll
      for (int r = 0; r < ROW_BLOCKS; r++) {
        #pragma unroll
        for (int f = 0; f < K_FRAGMENTS; f++) s[r][f] = make_filled_simdgroup_matrix<float, 8>(0.0f);
      }

      threadgroup_barrier(mem_flags::mem_threadgroup);

      {
        #pragma unroll
        for (int n = 0; n < 2; n++) {
          const device T* even = (const device T*)(k_from + (n * 16) * k_pitch);

          const device T* odd = (const device T*)(k_from + (n * 16 + 1) * k_pitch);

          #pragma unroll
          for (int m = 0; m < 1; m++) {
            T even_x[4];

            mg_load<4>(even_x, even + m * 64);

            T odd_x[4];

            mg_load<4>(odd_x, odd + m * 64);

            T x[8];
            #pragma unroll
            for (int e = 0; e < 4; e++) {
              x[2 * e] = even_x[e];
              x[2 * e + 1] = odd_x[e];
            }
            mg_store<8>(k_to + n * 16 * KV_STRIDE + m * 128, x);
          }
        }
      }
      k_from += int64_t(BK) * k_pitch;

      threadgroup_barrier(mem_flags::mem_threadgroup);

      {
        #pragma unroll
        for (int f = 0; f < K_FRAGMENTS; f++) {
          #pragma unroll
          for (int b = 0; b < 2; b++) {
            T x[8];
            mg_load<8>(x, s_k_4 + f * (8 * KV_STRIDE) + b * 64);

            #pragma unroll
            for (int w = 0; w < 4; w++) {
              simdgroup_matrix<F, 8, 8> k_fragment;
              k_fragment.thread_elements()[0] = F(x[2 * w]);
              k_fragment.thread_elements()[1] = F(x[2 * w + 1]);
              #pragma unroll
              for (int r = 0; r < ROW_BLOCKS; r++) {
                simdgroup_multiply_accumulate(s[r][f], q_fragments[r][b * 4 + w], k_fragment, s[r][f]);
              }
            }
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);

      {
        #pragma unroll
        for (int n = 0; n < 2; n++) {
          const device T* line = (const device T*)(v_from + (n * 16) * v_pitch);

          #pragma unroll
          for (int m = 0; m < 1; m++) {
            T x[8];

            mg_load<8>(x, line + m * 64);

            mg_store<8>(v_to + n * 16 * KV_STRIDE + m * 64, x);
          }
        }
      }
      v_from += int64_t(BK) * v_pitch;

      {
        #pragma unroll
        for (int r = 0; r < ROW_BLOCKS; r++) {
          float sum = 0.0f;
          float peak = LOWEST;
          #pragma unroll
          for (int f = 0; f < K_FRAGMENTS; f++) {
            #pragma unroll
            for (int e = 0; e < 2; e++) {
              peak = max(peak, s[r][f].thread_elements()[e]);
            }
          }
          peak = mg_row_max(peak);
          // Without a shift the masked scores of a row that has seen no key give 2^-huge = 0.
          const bool none = peak == LOWEST;
          const float row_unit = fabs(peak * scale2) < LARGE ? scale2 : coarse;
          const float top = none ? base[r] : max(base[r], peak * row_unit);
          const float shift = none ? 0.0f : top;
          const float rescale = fast::exp2(base[r] - top);
          base[r] = top;
          #pragma unroll
          for (int f = 0; f < K_FRAGMENTS; f++) {
            #pragma unroll
            for (int e = 0; e < 2; e++) {
              s[r][f].thread_elements()[e] = fast::exp2(fma(s[r][f].thread_elements()[e], row_unit, -shift));
              sum += s[r][f].thread_elements()[e];
            }
          }
          l[r] = fma(l[r], rescale, sum);
          #pragma unroll
          for (int f = 0; f < V_FRAGMENTS; f++) {
            #pragma unroll
            for (int e = 0; e < 2; e++) {
              o[r][f].thread_elements()[e] *= rescale;
            }
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);

      {
        #pragma unroll
        for (int f = 0; f < K_FRAGMENTS; f++) {
          simdgroup_matrix<F, 8, 8> p[ROW_BLOCKS];
          #pragma unroll
          for (int r = 0; r < ROW_BLOCKS; r++) {
            p[r].thread_elements()[0] = F(s[r][f].thread_elements()[0]);
            p[r].thread_elements()[1] = F(s[r][f].thread_elements()[1]);
          }
          #pragma unroll
          for (int b = 0; b < 2; b++) {
            T x[8];
            mg_load<8>(x, o_v_4 + f * (8 * KV_STRIDE) + b * 32);

            #pragma unroll
            for (int w = 0; w < 4; w++) {
              simdgroup_matrix<F, 8, 8> v_fragment;
              v_fragment.thread_elements()[0] = F(x[2 * w]);
              v_fragment.thread_elements()[1] = F(x[2 * w + 1]);
              #pragma unroll
              for (int r = 0; r < ROW_BLOCKS; r++) {
                simdgroup_multiply_accumulate(o[r][b * 4 + w], p[r], v_fragment, o[r][b * 4 + w]);
              }
            }
          }
        }
      }
    }
    if (!(k0 < k_end)) break;

    // Does any row here see a key of this pass?
    const bool live = first < row_count && k0 < any_past;

    simdgroup_matrix<float, 8, 8> s[ROW_BLOCKS][K_FRAGMENTS];
    #pragma unroll
    for (int r = 0; r < ROW_BLOCKS; r++) {
      #pragma unroll
      for (int f = 0; f < K_FRAGMENTS; f++) s[r][f] = make_filled_simdgroup_matrix<float, 8>(0.0f);
    }

    threadgroup_barrier(mem_flags::mem_threadgroup);

    {
      const int near = kv_len - 1 - (k0) - k_line;

      #pragma unroll
      for (int n = 0; n < 2; n++) {
        const device T* even = (const device T*)(k_from + min(n * 16, near) * k_pitch);

        const device T* odd = (const device T*)(k_from + min(n * 16 + 1, near) * k_pitch);

        #pragma unroll
        for (int m = 0; m < 1; m++) {
          T even_x[4];

          mg_load<4>(even_x, even + m * 64);

          T odd_x[4];

          mg_load<4>(odd_x, odd + m * 64);

          T x[8];
          #pragma unroll
          for (int e = 0; e < 4; e++) {
            x[2 * e] = even_x[e];
            x[2 * e + 1] = odd_x[e];
          }
          mg_store<8>(k_to + n * 16 * KV_STRIDE + m * 128, x);
        }
      }
    }
    k_from += int64_t(BK) * k_pitch;

    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (live) {
      #pragma unroll
      for (int f = 0; f < K_FRAGMENTS; f++) {
        #pragma unroll
        for (int b = 0; b < 2; b++) {
          T x[8];
          mg_load<8>(x, s_k_4 + f * (8 * KV_STRIDE) + b * 64);

          #pragma unroll
          for (int w = 0; w < 4; w++) {
            simdgroup_matrix<F, 8, 8> k_fragment;
            k_fragment.thread_elements()[0] = F(x[2 * w]);
            k_fragment.thread_elements()[1] = F(x[2 * w + 1]);
            #pragma unroll
            for (int r = 0; r < ROW_BLOCKS; r++) {
              simdgroup_multiply_accumulate(s[r][f], q_fragments[r][b * 4 + w], k_fragment, s[r][f]);
            }
          }
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    {
      const int near = kv_len - 1 - (k0) - v_line;

      #pragma unroll
      for (int n = 0; n < 2; n++) {
        const device T* line = (const device T*)(v_from + min(n * 16, near) * v_pitch);

        #pragma unroll
        for (int m = 0; m < 1; m++) {
          T x[8];

          mg_load<8>(x, line + m * 64);

          mg_store<8>(v_to + n * 16 * KV_STRIDE + m * 64, x);
        }
      }
    }
    v_from += int64_t(BK) * v_pitch;

    if (live) {
      {
        #pragma unroll
        for (int r = 0; r < ROW_BLOCKS; r++) {
          const int i = first + r * 8 + row;
          const int place = i + offset - (k0 + col);
          const int past = min(kv_len - (k0 + col), place + 1);

          #pragma unroll
          for (int f = 0; f < K_FRAGMENTS; f++) {
            #pragma unroll
            for (int e = 0; e < 2; e++) {
              s[r][f].thread_elements()[e] = f * 8 + e < past ? s[r][f].thread_elements()[e] : LOWEST;
            }
          }
        }
      }

      #pragma unroll
      for (int r = 0; r < ROW_BLOCKS; r++) {
        float sum = 0.0f;
        float peak = LOWEST;
        #pragma unroll
        for (int f = 0; f < K_FRAGMENTS; f++) {
          #pragma unroll
          for (int e = 0; e < 2; e++) {
            peak = max(peak, s[r][f].thread_elements()[e]);
          }
        }
        peak = mg_row_max(peak);
        // Without a shift the masked scores of a row that has seen no key give 2^-huge = 0.
        const bool none = peak == LOWEST;
        const float row_unit = fabs(peak * scale2) < LARGE ? scale2 : coarse;
        const float top = none ? base[r] : max(base[r], peak * row_unit);
        const float shift = none ? 0.0f : top;
        const float rescale = fast::exp2(base[r] - top);
        base[r] = top;
        #pragma unroll
        for (int f = 0; f < K_FRAGMENTS; f++) {
          #pragma unroll
          for (int e = 0; e < 2; e++) {
            s[r][f].thread_elements()[e] = fast::exp2(fma(s[r][f].thread_elements()[e], row_unit, -shift));
            sum += s[r][f].thread_elements()[e];
          }
        }
        l[r] = fma(l[r], rescale, sum);
        #pragma unroll
        for (int f = 0; f < V_FRAGMENTS; f++) {
          #pragma unroll
          for (int e = 0; e < 2; e++) {
            o[r][f].thread_elements()[e] *= rescale;
          }
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (live) {
      #pragma unroll
      for (int f = 0; f < K_FRAGMENTS; f++) {
        simdgroup_matrix<F, 8, 8> p[ROW_BLOCKS];
        #pragma unroll
        for (int r = 0; r < ROW_BLOCKS; r++) {
          p[r].thread_elements()[0] = F(s[r][f].thread_elements()[0]);
          p[r].thread_elements()[1] = F(s[r][f].thread_elements()[1]);
        }
        #pragma unroll
        for (int b = 0; b < 2; b++) {
          T x[8];
          mg_load<8>(x, o_v_4 + f * (8 * KV_STRIDE) + b * 32);

          #pragma unroll
          for (int w = 0; w < 4; w++) {
            simdgroup_matrix<F, 8, 8> v_fragment;
            v_fragment.thread_elements()[0] = F(x[2 * w]);
            v_fragment.thread_elements()[1] = F(x[2 * w + 1]);
            #pragma unroll
            for (int r = 0; r < ROW_BLOCKS; r++) {
              simdgroup_multiply_accumulate(o[r][b * 4 + w], p[r], v_fragment, o[r][b * 4 + w]);
            }
          }
        }
      }
    }

    k0 += BK;
  }

  // A row that saw no key has l == 0: zeros, and a log-sum-exp of -inf.
  #pragma unroll
  for (int r = 0; r < ROW_BLOCKS; r++) {
    const float sum = mg_row_sum(l[r]);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    #pragma unroll
    for (int f = 0; f < V_FRAGMENTS; f++) {
      #pragma unroll
      for (int e = 0; e < 2; e++) {
        o[r][f].thread_elements()[e] *= inverse;
      }
    }
  }
  #pragma unroll
  for (int r = 0; r < ROW_BLOCKS; r++) {
    const int n = first + r * 8 + row;
    if (n < row_count) {
      device Out* o_row = out + (row_base + n) * DV;
      #pragma unroll
      for (int b = 0; b < 2; b++) {
        const int column = (b * 8 + col) * 4;
        Out x[8];
        #pragma unroll
        for (int w = 0; w < 4; w++) {
          x[2 * w] = Out(o[r][b * 4 + w].thread_elements()[0]);
          x[2 * w + 1] = Out(o[r][b * 4 + w].thread_elements()[1]);
        }
        mg_store<8>(o_row + column, x);
      }
    }
  }
