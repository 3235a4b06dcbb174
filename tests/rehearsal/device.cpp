// An accelerator without hardware: PrivateUse1, which the loader names "sim".
//
// Its memory is the host's and its operations run on the CPU, by torch's own fallback. It refuses what CUDA refuses:
// tensors of two devices in one operation, a generator of another device, operations that are not deterministic where
// determinism is required. It counts what makes the host wait for a GPU, or raises an error there, as
// torch.cuda.set_sync_debug_mode("error") does.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/TensorFactories.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <set>
#include <string>

namespace {

constexpr auto kSim = c10::DeviceType::PrivateUse1;
const c10::Device sim_device(kSim, 0);

bool on_sim(const at::Tensor& tensor) { return tensor.device().type() == kSim; }

// ---- host syncs -----------------------------------------------------------------------------------------------

std::mutex counting;
c10::Dict<std::string, int64_t> counts;
std::atomic<bool> refusing{false};
thread_local bool inside = false;  // an operation's copies to the CPU and back are the fallback's, and no syncs

void synced(const std::string& kind) {
  if (inside) return;
  TORCH_CHECK(!refusing, "a host sync where none is allowed: ", kind);
  std::lock_guard<std::mutex> lock(counting);
  counts.insert_or_assign(kind, (counts.contains(kind) ? counts.at(kind) : 0) + 1);
}

struct Inside {
  bool before = inside;
  Inside() { inside = true; }
  ~Inside() { inside = before; }
};

// ---- memory, streams and generators ---------------------------------------------------------------------------

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = size ? std::malloc(size) : nullptr;
    return {data, data, &std::free, sim_device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t size) const override { default_copy_data(to, from, size); }
};
Memory memory;
REGISTER_ALLOCATOR(kSim, &memory);

// Pinned memory of the host, which a device copies from and to while the host goes on.
struct PinnedMemory final : c10::Allocator {
  static inline std::mutex guard;
  static inline std::set<const void*> held;
  static void release(void* data) {
    std::lock_guard<std::mutex> lock(guard);
    held.erase(data);
    std::free(data);
  }
  static bool holds(const void* data) {
    std::lock_guard<std::mutex> lock(guard);
    return held.count(data) > 0;
  }
  c10::DataPtr allocate(size_t size) override {
    void* data = size ? std::malloc(size) : nullptr;
    std::lock_guard<std::mutex> lock(guard);
    held.insert(data);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t size) const override { default_copy_data(to, from, size); }
};
PinnedMemory pinned_memory;

// One device with one stream.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kSim;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::Stream stream() const noexcept { return c10::Stream(c10::Stream::DEFAULT, sim_device); }
  c10::DeviceType type() const override { return kSim; }
  c10::Device exchangeDevice(c10::Device) const override { return sim_device; }
  c10::Device getDevice() const override { return sim_device; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream other) const noexcept override { return other; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { synced("synchronize"); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct SimGenerator final : at::CPUGeneratorImpl {
  SimGenerator() : at::CPUGeneratorImpl(c10::default_rng_seed_val) {
    device_ = sim_device;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::make_generator<SimGenerator>();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<SimGenerator>(); }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isPinnedPtr(const void* data) const override { return PinnedMemory::holds(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto* held = storage.unsafeGetStorageImpl();
    auto data = memory.allocate(size);
    if (auto both = std::min(size, held->nbytes())) std::memcpy(data.get(), held->data(), both);
    held->set_data_ptr(std::move(data));
    held->set_nbytes(size);
  }
};

// ---- operations -----------------------------------------------------------------------------------------------

// Operations whose result's shape, or an error, depends on values: the host reads them.
const std::set<std::string> reading{
    "aten::nonzero",  "aten::masked_select", "aten::equal",    "aten::bincount",
    "aten::_unique2", "aten::unique_dim",    "aten::allclose", "aten::unique_consecutive",
    "aten::repeat_interleave",
};

// Operations that CUDA refuses under torch.use_deterministic_algorithms; sums of integers are exact in any order.
bool nondeterministic(const std::string& name, const at::Tensor& first) {
  bool floats = first.defined() && at::isFloatingType(first.scalar_type());
  return name == "aten::kthvalue" || name == "aten::histc" || name == "aten::median" ||
         (floats && (name == "aten::cumsum" || name == "aten::cumsum_"));
}

void check(const c10::OperatorHandle& op, const torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  bool sim = false, host = false;
  at::Tensor first;
  // A scalar of the CPU may be an argument of a kernel; it is none that is written to, indexes or is one of a list.
  auto see = [&](const at::Tensor& tensor, bool scalars) {
    if (!tensor.defined()) return;
    if (!first.defined()) first = tensor;
    if (on_sim(tensor)) sim = true;
    else if (tensor.dim() > 0 || !scalars) host = true;
  };
  const auto& arguments = op.schema().arguments();
  const auto values = torch::jit::last(*stack, arguments.size());
  for (size_t place = 0; place < arguments.size(); ++place) {
    const auto& value = values[place];
    const auto& argument = arguments[place];
    bool written = argument.alias_info() && argument.alias_info()->isWrite();
    if (value.isTensor()) see(value.toTensor(), !written && argument.name() != "index" && argument.name() != "indices");
    else if (value.isTensorList()) for (const at::Tensor& tensor : value.toTensorVector()) see(tensor, false);
    else if (value.isOptionalTensorList()) {
      // Indices: the host counts what a mask selects, and moves those that are on the CPU.
      for (const auto& held : value.toListRef()) {
        if (!held.isTensor() || !held.toTensor().defined()) continue;
        const auto& index = held.toTensor();
        bool mask = index.scalar_type() == at::kBool || index.scalar_type() == at::kByte;
        if (mask || !on_sim(index)) synced("index");
      }
    } else if (value.isGenerator() && value.toGenerator().defined()) {
      auto device = value.toGenerator().device();
      TORCH_CHECK(device.type() == kSim, "Expected a 'sim' device type for generator but found '", device.type(),
                  "' (", name, ")");
    }
  }
  TORCH_CHECK(!(sim && host),
              "Expected all tensors to be on the same device, but found at least two devices, sim:0 and cpu! (", name, ")");
  if (at::globalContext().deterministicAlgorithms() && nondeterministic(name, first))
    at::globalContext().alertNotDeterministic(name + " on sim");
  if (reading.count(name)) synced(name.substr(6));
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check(op, stack);
  Inside within;
  // The kernel beneath wants a generator of the CPU: one that begins, and hands on, with the state of the given one.
  at::Generator given, inner;
  for (auto& value : torch::jit::last(*stack, op.schema().arguments().size()))
    if (value.isGenerator() && value.toGenerator().defined()) {
      given = value.toGenerator();
      inner = at::detail::createCPUGenerator();
      inner.set_state(given.get_state());
      const_cast<c10::IValue&>(static_cast<const c10::IValue&>(value)) = c10::IValue(inner);
    }
  at::native::cpu_fallback(op, stack);
  if (given.defined()) given.set_state(inner.get_state());
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the CPU.
at::Tensor as_host(const at::Tensor& tensor) {
  if (!on_sim(tensor)) return tensor;
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  void* data = tensor.numel() ? tensor.data_ptr() : nullptr;
  return at::from_blob(data, tensor.sizes(), tensor.strides(), [](void*) {}, options);
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const auto& host = on_sim(from) ? to : from;
  bool waits = !(non_blocking && PinnedMemory::holds(host.storage().data()));
  if (from.device() != to.device() && waits) synced(on_sim(from) ? "to the host" : "to the device");
  as_host(to).copy_(as_host(from));
  return to;
}

const at::Tensor& resized(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* held = self.unsafeGetTensorImpl();
  size_t needed = (c10::multiply_integers(size) + held->storage_offset()) * held->dtype().itemsize();
  if (held->storage().nbytes() < needed) Hooks().resizePrivateUse1Bytes(held->storage(), needed);
  held->set_sizes_contiguous(size);
  return self;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) resized(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Scalar read_scalar(const at::Tensor& self) {
  synced("item");
  return as_host(self).item();
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  auto* held = self.unsafeGetTensorImpl();
  held->set_storage_keep_dtype(std::move(storage));
  held->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  int64_t size = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(storage), 0, {c10::SymInt(size)}, {c10::SymInt(1)});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& from) {
  return set_storage(self, from.storage(), from.sym_storage_offset(), from.sym_sizes(), from.sym_strides());
}

// A parameter that moves here stays the same object, as on CUDA.
bool has_compatible_shallow_copy_type(const at::Tensor&, const at::Tensor&) { return true; }

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

// Attention is written out in operations that have a fallback; the CPU's fused one is no operation of this device.
int64_t attention_in_operations(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                const std::optional<at::Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", read_scalar);
  m.impl("resize_", resized);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("_has_compatible_shallow_copy_type", has_compatible_shallow_copy_type);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("_fused_sdp_choice", attention_in_operations);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

// Under autocast the products are taken in the lower precision, as on CUDA.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
}

TORCH_LIBRARY(rehearsal, m) {
  m.def("register_hooks", []() { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
  m.def("syncs", []() { return counts.copy(); });
  m.def("reset", []() { counts.clear(); });
  m.def("as_host", as_host);
  m.def("refuse", [](bool refuse) { refusing = refuse; });
}

}  // namespace
