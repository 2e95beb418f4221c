// Products with packed matrices: y[tokens, rows] = x[tokens, cols] W[rows, cols]^T, on the device.
//
//   packed_bytes -> describe_packed -> launch_pack      once a matrix, when a model is loaded
//   launch_product                                      any number of tokens, any kind of weights
//   launch_rows, launch_dequantize                      weights themselves: embeddings, adapters that need them
//
// Weights stay as they are stored (spec/format.md), reordered so that every load of a warp is one line of 512 bytes
// and what arrives in a register is what a tensor core's operand needs. The arithmetic: weights and tokens enter
// the tensor cores as bfloat16, sums are float32. Nothing here allocates, synchronizes or prints, except
// product_create; every launch can be captured in a graph.
//
// The kernels are launched so that they may start while the kernel before them on the stream still runs
// (programmatic dependent launch). They read weights and nothing else before that kernel has ended. So weights must
// not be written by the very kernel before a product; everything else is as usual.
#ifndef ADAPTRT_CUDA_PRODUCT_CUH
#define ADAPTRT_CUDA_PRODUCT_CUH
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#include "adaptrt.h"

namespace adaptrt {

// What a matrix became on the device. f32 and f16 weights are rounded to bf16, and so are nf4 weights whose rows
// are no multiple of 64 long, since their blocks run across the ends of rows.
enum class weight_kind : int32_t { nf4, int8, bf16 };

constexpr int tile_rows = 16;       // rows of a tile: the M of a tensor core's product
constexpr int block_cols = 64;      // columns of a tile: one scale a row
constexpr int col_blocks_step = 4;  // a row is filled up with zeros to a multiple of so many blocks

struct packed_matrix {
  weight_kind kind;
  int64_t rows, cols;
  int64_t row_tiles, col_blocks;  // col_blocks counts the padding
  uint8_t *codes;                 // [row_tiles, col_blocks, tile]: 512 bytes of nf4, 1024 of int8, 2048 of bf16
  __half2 *scales;                // [row_tiles, col_blocks, 8]: of rows g and g + 8; absent for bf16
  float *unit;                    // [1], a power of two: a block's scale is its half times this
};

// Bytes of a packed matrix; the buffer must be aligned to 256. 0 for sizes or types that cannot be.
size_t packed_bytes(adrt_dtype dtype, int64_t rows, int64_t cols);
packed_matrix describe_packed(adrt_dtype dtype, int64_t rows, int64_t cols, void *buffer);
// `stored` holds the tensor's bytes as in the file, on the device, aligned to 64.
cudaError_t launch_pack(adrt_dtype dtype, const void *stored, const packed_matrix &to, cudaStream_t stream);

struct product_output {
  void *y;              // [tokens, rows]: float, or __nv_bfloat16 when `bf16`
  int64_t stride;       // elements between tokens
  bool bf16;
  bool accumulate;      // y += instead of y =  (float only)
};

// What the launchers know about a device; made once. product_create loads cuBLAS when it is there.
struct product_context;
cudaError_t product_create(int device, product_context **out);
void product_destroy(product_context *context);

// Bytes of workspace that products with this matrix and up to so many tokens need. The largest of all products
// serves all of them, one stream at a time. The first workspace_zero_bytes must be zero before the first use; every
// product leaves them so.
size_t product_workspace_bytes(const product_context *context, const packed_matrix &w, int max_tokens);
constexpr size_t workspace_zero_bytes = 64 * 1024;

// x: [tokens, cols] bf16 aligned to 16 bytes, x_stride (elements between tokens) a multiple of 8. `beside`: adapters of
// the output, planned by plan_beside (beside.cuh). `ready`: x has been written before the kernel before this one lets this
// one start, so that both may run at the same time.
struct beside_call;
cudaError_t launch_product(const product_context *context, const packed_matrix &w, const __nv_bfloat16 *x,
                           int64_t x_stride, int tokens, const product_output &out, void *workspace,
                           cudaStream_t stream, const beside_call *beside = nullptr, bool ready = false);

// Whether a kernel that is launched after the product may read x from its start on, and finds room beside it.
bool leaves_room_after(const product_context *context, const packed_matrix &w, int tokens);

// out[i, :] = row indices[i] of W as float; out_stride in elements. An index outside of the matrix gives zeros.
cudaError_t launch_rows(const packed_matrix &w, const int32_t *indices, int n, float *out, int64_t out_stride,
                        cudaStream_t stream);
// out[rows, cols] = W as bf16, row-major
cudaError_t launch_dequantize(const packed_matrix &w, __nv_bfloat16 *out, cudaStream_t stream);

}  // namespace adaptrt
#endif
