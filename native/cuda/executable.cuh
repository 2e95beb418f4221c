// A loaded program, and the state of its steps.
//
// A program is cut into stages at load. A stage is a few launches: one operation, or several that run faster together
// (stages.cu). A step uploads its plan in one copy (plan.cuh), runs the stages on a stream, as launches or as the graph
// that was made of them (graph.cuh), and copies the logits back.
#ifndef ADAPTRT_CUDA_EXECUTABLE_CUH
#define ADAPTRT_CUDA_EXECUTABLE_CUH
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "adapters.cuh"
#include "attention.cuh"
#include "graph.cuh"
#include "memory.cuh"
#include "pager.cuh"
#include "plan.cuh"
#include "product.cuh"
#include "record.cuh"
#include "shared.cuh"
#include "shelf.cuh"
#include "upload.cuh"

namespace adaptrt {

// A register's place: columns of a buffer of activations.
struct view {
  int buffer = -1;
  int64_t offset = 0;
};

// Activations [tokens, width], in the forms that somebody reads. Rows of bfloat16 are filled up with zeros to 64.
struct activations {
  int64_t width;
  bool wants_wide = false, wants_narrow = false;
  float *wide = nullptr;
  __nv_bfloat16 *narrow = nullptr;
  int64_t narrow_stride() const { return cpu_align(width, BLOCK); }
};

using tensor_key = std::tuple<const void *, int32_t, int64_t, int64_t>;  // data, dtype, rows, cols
inline tensor_key key_of(const adrt_tensor &t) { return {t.data, t.dtype, t.rows, t.cols}; }
using factor_key = std::pair<tensor_key, factor_form>;

struct loaded_matrix {
  packed_matrix w;
  int block;  // of the pager, which says where it is
};

class stage {
 public:
  virtual ~stage() = default;
  virtual void launch(adrt_executable &e) const = 0;
  // Hidden values of a token that all its adapters of the step need at most.
  virtual int64_t hidden_width(const adrt_executable &e) const;
  virtual int64_t projected_width(const adrt_executable &e) const;  // the same of terms in common
};

// A tensor of an adapter on the device, shared by all terms that have the same pointer.
struct shared_factor {
  factor f;
  std::shared_ptr<device_memory> memory;  // of all tensors that came with it
  int64_t number = 0;   // of all that there were
  int64_t terms = 0;    // that have had it
  factor plain = {};    // its values as bfloat16, once a step has wanted them
  device_memory plain_memory;
};

// A term that many adapters may have is multiplied for all tokens at once, from so many on.
constexpr int32_t least_common_tokens = 9;

// What the host knows of an adapter at an attach point.
struct host_attachment {
  bool acts = false, maps_input = false;
  int64_t width = 0;       // of its hidden values
  int64_t more_terms = 0;  // beyond the first
  // The first term's, where it is low-rank with a U that other terms have, too. Of all adapters of a step: the first
  // such pair, and whether there is nothing but this.
  shared_factor *v = nullptr, *u = nullptr;
  bool alone = false;
  // Whether it is one low-rank term with a U, and at most a gain, all factors of the same dtype here.
  bool lone = false;
  int32_t dtype = 0;
  bool vectors = false;  // of outputs: e or g_out
};

// All adapters of a step together.
struct joined_adapters {
  std::vector<host_attachment> points;  // by target
  uint64_t hash = 0;
};

// Records are made for so many tokens: for fewer another launch is not worth it.
constexpr int32_t least_recorded_tokens = 5;

struct adapter {
  size_t bytes() const { return table.size() + vectors.size() + factor_bytes; }
  device_memory table;    // [n_targets] attachment, then terms
  device_memory vectors;  // d, e, gains, sparse arrays ...
  std::vector<std::shared_ptr<shared_factor>> factors;
  size_t factor_bytes = 0;  // that it brought
  std::vector<host_attachment> targets;
};

struct rope_table {
  const float *inverse;  // [half]
  std::vector<float> values;
  float factor;
  float *cos_sin;  // [tokens, 2, half], of the current step
};

struct kv_layer {
  int64_t k_offset, v_offset;
  int32_t dim;
};

struct device_scope {
  explicit device_scope(int device) {
    cudaGetDevice(&before);
    check(cudaSetDevice(device), "choice of the device");
  }
  ~device_scope() { cudaSetDevice(before); }
  int before = 0;
};

// The streams, freed with the executable. Adapters come on their own.
struct device_queues {
  cudaStream_t main = nullptr, adapters = nullptr;
  void create();
  cudaError_t wait() const;  // not for the device, which other threads may be capturing graphs on
  ~device_queues();
};

struct products {
  product_context *context = nullptr;
  ~products() { product_destroy(context); }
};

}  // namespace adaptrt

struct adrt_executable {
  explicit adrt_executable(const adrt_options &o) : options(o), device(o.device), budget(o.gpu_memory ? o.gpu_memory : SIZE_MAX) {
    budget.admit(&shelf);
    budget.admit(&weights);
  }

  adrt_options options;
  int device;
  bool hopper = false;
  int multiprocessors = 0;
  char device_name[96] = "";
  mutable char description[192] = "";  // of the latest call
  bool faulted = false;  // the device's context is lost

  adaptrt::budget budget;  // before all that is counted in it
  adaptrt::device_queues queues;
  adaptrt::products products;
  std::unique_ptr<adaptrt::landing> arrivals;   // while weights are loaded
  std::unique_ptr<adaptrt::uploader> uploader;  // of adapters
  adaptrt::device_memory stored;                // where their tensors arrive before they are packed

  adaptrt::pager weights;
  std::vector<adaptrt::device_memory> vectors;
  size_t vector_bytes = 0;
  std::map<adaptrt::tensor_key, adaptrt::loaded_matrix> matrices;  // a tied head is loaded once
  std::vector<std::unique_ptr<adaptrt::stage>> stages;
  std::vector<adaptrt::activations> buffers;
  std::vector<attach_point> points;  // by target
  std::vector<adaptrt::rope_table> rope_tables;
  int64_t vocabulary = INT64_MAX, logit_rows = 0;  // token ids are below the one; rows of the head
  int64_t widest_input = 0;                // of any product

  std::vector<adaptrt::kv_layer> kv_layers;  // by layer number
  int64_t page_bytes = 0;
  int32_t n_pages = 0;
  std::vector<adaptrt::device_memory> page_slabs;
  std::vector<uint8_t *> page_addresses;
  adaptrt::device_memory page_table;  // page_addresses on the device

  adaptrt::shelf shelf{*this};                              // what is attached, by handle
  std::vector<std::unique_ptr<adaptrt::adapter>> adapters;  // by handle, empty when detached or not on the device
  std::map<adaptrt::factor_key, std::weak_ptr<adaptrt::shared_factor>> factors;
  int64_t factors_made = 0;

  int32_t token_room = 0;             // tokens that the activations hold
  adaptrt::device_memory activation_memory;
  __nv_bfloat16 *mapped = nullptr;    // [tokens, widest input filled up]: what W sees where an adapter maps its input
  float *map_scratch = nullptr;       // [tokens, 2, widest input]
  __half *queries = nullptr;          // [tokens, heads, dim] of the largest attention
  __nv_bfloat16 *gathered = nullptr;  // [tokens, width of the head's input]
  int32_t logit_room = 0;
  adaptrt::device_memory logits;      // [logit_room, logit_rows] float
  adaptrt::device_memory mapped_memory, workspace, partial, arrived, hidden, projected, record_memory, beside, beside_terms;
  adaptrt::term_record *records = nullptr;  // [points, tokens] of the step, or none
  adaptrt::pinned_memory host_logits;

  adaptrt::plan plan;
  uint32_t launches_beside = 0;  // of products with adapters inside, in the step
  adaptrt::graph_cache graphs;

  int64_t largest_queries = 0;  // halves a token
  std::vector<adaptrt::attention_shape> attention_shapes;
  std::vector<adaptrt::packed_matrix> product_weights;  // for the workspace
  adaptrt::joined_adapters acting;  // of the step
  std::map<std::vector<int32_t>, adaptrt::joined_adapters> joined;  // of steps before, too, by the handles of their adapters
  int64_t acting_factors = 0;                           // factors_made when `joined` was made: it points to some
  uint64_t generation = 0;                              // counts what makes graphs stale: memory that moved

  adaptrt::queue queue() const { return {queues.main, hopper}; }
  size_t first_logit_term() const { return points.size() * plan.tokens.shrink_tiles.size(); }  // of beside_terms
  adaptrt::source source_of(const adaptrt::view &v) const;
  adaptrt::destination destination_of(const adaptrt::view &v) const;
};

namespace adaptrt {

// load.cu
adrt_executable *load(const adrt_program &program, const adrt_options &options);
const char *describe(const adrt_executable &e);  // as it is now, one line
// stages.cu: the program's operations as stages over `weights`
void make_stages(adrt_executable &e, const adrt_program &program);
// weights.cu: tensors as the kernels read them, once a tensor
loaded_matrix load_matrix(adrt_executable &e, const adrt_tensor &tensor);
const float *load_vector(adrt_executable &e, const adrt_tensor &tensor);
// Matrices of the same width one above the other, as one and each by itself; false when they do not fit together.
bool load_together(adrt_executable &e, const std::vector<const adrt_tensor *> &tensors, loaded_matrix &all,
                   std::vector<packed_matrix> &each);
// room.cu: memory for the step that is planned
void make_room(adrt_executable &e);
// What a step of so many tokens of one sequence takes, adapters aside.
size_t step_bytes(adrt_executable &e, const product_context *context, int32_t n_tokens);
int splits_of(const adrt_executable &e, const attention_shape &shape, int64_t n_blocks);
void reserve_pages(adrt_executable &e, int32_t n_pages);
// attach.cu
std::unique_ptr<adapter> make_adapter(adrt_executable &e, const std::vector<adrt_attachment> &attachments);
void forget_released(adrt_executable &e);  // tensors that no adapter has any more
const factor &plain_form(adrt_executable &e, shared_factor &s);  // panels of bfloat16
// step.cu
void step(adrt_executable &e, const adrt_batch &batch);
// peak.cu
adrt_peaks measure_peaks(adrt_executable &e);

}  // namespace adaptrt
#endif
