// Products for very many tokens: weights become bf16 once, a slab of rows at a time, and cuBLAS multiplies. cuBLAS
// is loaded at run time; without it the other kernels do all the work.
#include <dlfcn.h>

#include <new>

#include "launch.cuh"

namespace adaptrt {

// As much of cuBLAS's interface as is used here; the numbers are its enumerations' and have not changed since
// version 11.
struct cublas_library {
  using handle = struct cublasContext *;
  enum : int { success = 0, not_transposed = 0, transposed = 1, type_f32 = 0, type_bf16 = 14 };
  enum : int { compute_f32 = 68, any_algorithm = -1 };
  int (*create)(handle *);
  int (*destroy)(handle);
  int (*set_stream)(handle, cudaStream_t);
  int (*set_workspace)(handle, void *, size_t);
  int (*gemm)(handle, int, int, int, int, int, const void *, const void *, int, int, const void *, int, int, const void *,
              void *, int, int, int, int);
  void *library;
  handle at;
};

namespace {

constexpr int warps = 8;
constexpr size_t slab_bytes = size_t(256) << 20, cublas_bytes = size_t(32) << 20;
constexpr int row_bytes = 128 + 16;  // of a tile in shared memory; padded, so that rows start in different banks
constexpr int unpack_shared_bytes = pair_table_bytes + warps * tile_rows * row_bytes;

template <typename function>
bool find(void *library, const char *name, function *to) {
  *to = reinterpret_cast<function>(dlsym(library, name));
  return *to != nullptr;
}

bool find_all(cublas_library *c) {
  return find(c->library, "cublasCreate_v2", &c->create) && find(c->library, "cublasDestroy_v2", &c->destroy) &&
         find(c->library, "cublasSetStream_v2", &c->set_stream) &&
         find(c->library, "cublasSetWorkspace_v2", &c->set_workspace) &&
         find(c->library, "cublasGemmEx", &c->gemm) && c->create(&c->at) == cublas_library::success;
}

struct unpack_arguments {
  packed_matrix w;
  int64_t first_tile, tiles;  // of rows
  __nv_bfloat16 *out;
  nf4_values codebook;
};

// Registers of a tile -> shared memory -> whole lines of rows.
__device__ void write_rows(uint8_t *shared, const uint32_t (&a)[4][4], __nv_bfloat16 *out, int64_t rows,
                           int64_t cols) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < 4; step++)
    for (int r = 0; r < 4; r++)
      *reinterpret_cast<uint32_t *>(shared + (lane / 4 + r % 2 * 8) * row_bytes + step * 32 + r / 2 * 16 +
                                    lane % 4 * 4) = a[step][r];
  __syncwarp();
  for (int row = lane / 8; row < tile_rows && row < rows; row += 4)
    *reinterpret_cast<uint4 *>(out + row * cols + lane % 8 * 8) =
        *reinterpret_cast<const uint4 *>(shared + row * row_bytes + lane % 8 * 16);
  __syncwarp();
}

template <weight_kind kind>
__global__ void __launch_bounds__(warps * 32) unpack_tiles(const __grid_constant__ unpack_arguments args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  let_next_kernel_start();
  if constexpr (kind == weight_kind::nf4) fill_pair_table(shared, args.codebook, warps * 32);
  __syncthreads();
  wait_for_kernel_before();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  decoder<kind> decode = {shared_address(shared) - shared_start + lane * 4};
  __nv_bfloat162 unit = __float2bfloat162_rn(decoder<kind>::scaled ? *args.w.unit : 1.f);  // a power of two: exact
  constexpr int at_once = col_blocks_step, vectors = decoder<kind>::vectors;
  int64_t groups = args.w.col_blocks / at_once;
  for (int64_t i = int64_t(blockIdx.x) * warps + warp; i < args.tiles * groups; i += int64_t(gridDim.x) * warps) {
    int64_t tile = i / groups, block = i % groups * at_once;
    int64_t from = (args.first_tile + tile) * args.w.col_blocks + block;
    uint4 codes[at_once * vectors];  // all on their way before the first is used
#pragma unroll
    for (int j = 0; j < at_once * vectors; j++)
      codes[j] = *reinterpret_cast<const uint4 *>(args.w.codes + from * tile_bytes(kind) + j * 512 + lane * 16);
#pragma unroll
    for (int k = 0; k < at_once; k++) {
      if ((block + k) * block_cols >= args.w.cols) break;
      uint32_t a[4][4];
      __half2 scales = decoder<kind>::scaled ? args.w.scales[(from + k) * 8 + lane / 4] : __half2();
      decode_tile<kind>(a, codes + k * vectors, scales, decode);
      if constexpr (decoder<kind>::scaled)
        for (int j = 0; j < 16; j++) a[j / 4][j % 4] = scaled_pair(a[j / 4][j % 4], unit);
      write_rows(shared + pair_table_bytes + warp * tile_rows * row_bytes, a,
                 args.out + tile * tile_rows * args.w.cols + (block + k) * block_cols,
                 args.w.rows - (args.first_tile + tile) * tile_rows, args.w.cols);
    }
  }
}

int64_t slab_tiles(const packed_matrix &w) {
  int64_t tiles = int64_t(slab_bytes) / (tile_rows * w.cols * 2) / 16 * 16;
  return tiles < 16 ? 16 : tiles < w.row_tiles ? tiles : w.row_tiles;
}

template <weight_kind kind>
cudaError_t unpack_slab(const product_call &call, int64_t first_tile, int64_t tiles, __nv_bfloat16 *out) {
  unpack_arguments args = {call.w, first_tile, tiles, out, call.context->codebook};
  cudaError_t status =
      cudaFuncSetAttribute(unpack_tiles<kind>, cudaFuncAttributeMaxDynamicSharedMemorySize, unpack_shared_bytes);
  if (status != cudaSuccess) return status;
  return launch(call, unpack_tiles<kind>, dim3(unsigned(2 * call.context->multiprocessors)), dim3(warps * 32),
                unpack_shared_bytes, args);
}

cudaError_t unpack_slab(const product_call &call, int64_t first_tile, int64_t tiles, __nv_bfloat16 *out) {
  switch (call.w.kind) {
    case weight_kind::nf4: return unpack_slab<weight_kind::nf4>(call, first_tile, tiles, out);
    case weight_kind::int8: return unpack_slab<weight_kind::int8>(call, first_tile, tiles, out);
    default: return unpack_slab<weight_kind::bf16>(call, first_tile, tiles, out);
  }
}

// y[tokens, rows] row-major is [rows, tokens] to cuBLAS, which counts columns first.
bool multiply_slab(const product_call &call, const __nv_bfloat16 *weights, int64_t first_row, int64_t rows) {
  const cublas_library &c = *call.context->cublas;
  float one = 1, before = call.out.accumulate ? 1 : 0;
  size_t item = call.out.bf16 ? sizeof(__nv_bfloat16) : sizeof(float);
  return c.gemm(c.at, c.transposed, c.not_transposed, int(rows), call.tokens, int(call.w.cols), &one, weights,
                c.type_bf16, int(call.w.cols), call.x, c.type_bf16, int(call.x_stride), &before,
                static_cast<uint8_t *>(call.out.y) + first_row * item, call.out.bf16 ? c.type_bf16 : c.type_f32,
                int(call.out.stride), c.compute_f32, c.any_algorithm) == c.success;
}

}  // namespace

cublas_library *load_cublas() {
  for (const char *name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
    cublas_library c = {};
    c.library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!c.library) continue;
    cublas_library *out = find_all(&c) ? new (std::nothrow) cublas_library(c) : nullptr;
    if (out) return out;
    dlclose(c.library);
  }
  return nullptr;
}

void unload_cublas(cublas_library *c) {
  if (!c) return;
  c->destroy(c->at);
  dlclose(c->library);
  delete c;
}

bool can_multiply_dense(const product_context &context, const packed_matrix &w) {
  return context.cublas && w.cols % block_cols == 0;
}

bool launch_square(const product_context &context, const __nv_bfloat16 *a, const __nv_bfloat16 *b, __nv_bfloat16 *y, int n,
                   cudaStream_t stream) {
  if (!context.cublas) return false;
  const cublas_library &c = *context.cublas;
  float one = 1, zero = 0;
  return c.set_stream(c.at, stream) == c.success &&  // which also brings back cuBLAS's own workspace
         c.gemm(c.at, c.transposed, c.not_transposed, n, n, n, &one, a, c.type_bf16, n, b, c.type_bf16, n, &zero, y,
                c.type_bf16, n, c.compute_f32, c.any_algorithm) == c.success;
}

size_t dense_workspace_bytes(const packed_matrix &w) {
  return workspace_zero_bytes + cublas_bytes + size_t(slab_tiles(w)) * tile_rows * w.cols * sizeof(__nv_bfloat16);
}

cudaError_t launch_dense(const product_call &call) {
  const cublas_library &c = *call.context->cublas;
  uint8_t *workspace = static_cast<uint8_t *>(call.workspace) + workspace_zero_bytes;
  __nv_bfloat16 *weights = reinterpret_cast<__nv_bfloat16 *>(workspace + cublas_bytes);
  if (c.set_stream(c.at, call.stream) != c.success || c.set_workspace(c.at, workspace, cublas_bytes) != c.success)
    return cudaErrorUnknown;
  int64_t at_once = slab_tiles(call.w);
  for (int64_t first = 0; first < call.w.row_tiles; first += at_once) {
    int64_t left = call.w.row_tiles - first, tiles = left < at_once ? left : at_once;
    int64_t rows = tiles < left ? tiles * tile_rows : call.w.rows - first * tile_rows;
    cudaError_t status = unpack_slab(call, first, tiles, weights);
    if (status != cudaSuccess) return status;
    if (!multiply_slab(call, weights, first * tile_rows, rows)) return cudaErrorUnknown;
  }
  return cudaSuccess;
}

}  // namespace adaptrt
